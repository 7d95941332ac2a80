"""Chooses strengths and learning rate by cross-validation on the training images alone (section 4.2)."""

import collections
import dataclasses
import hashlib
import itertools
import pathlib
import statistics
import warnings
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from sklearn.model_selection import StratifiedKFold

from l2sp_tf.data.digests import digest_of_rows
from l2sp_tf.data.given import GivenArrays, GivenStream, collected
from l2sp_tf.data.pipeline import channel_mean
from l2sp_tf.experiments import records
from l2sp_tf.experiments.plans import Setting
from l2sp_tf.experiments.runs import folder_of, run_record, settings_of
from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.plain import plain
from l2sp_tf.files.provenance import provenance
from l2sp_tf.files.types import Path, Weights
from l2sp_tf.models.pixels import PixelFormat
from l2sp_tf.penalties.anchors import Anchors
from l2sp_tf.penalties.formulas import PENALTIES, Penalty
from l2sp_tf.training.objective import Objective
from l2sp_tf.training.recipe import Recipe
from l2sp_tf.training.trainer import task_for

AXES = ("alpha", "beta", "learning_rate")
MOST_EXTENSIONS = 3  # values tried beyond each end of the given grid


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting and its accuracy in [0, 1] on the held-out part of each fold; None if it diverged there."""

    alpha: float
    beta: float
    learning_rate: float
    accuracies: tuple

    @property
    def mean(self):
        """The mean accuracy over the folds; a diverged fold counts as 0."""
        return statistics.fmean(accuracy or 0.0 for accuracy in self.accuracies)

    @property
    def diverged(self):
        """Whether it diverged on every fold."""
        return all(accuracy is None for accuracy in self.accuracies)


@dataclasses.dataclass(frozen=True)
class Selection:
    """The result of cross-validation.

    Attributes:
        penalty: the class of the penalty, such as `L2SP`.
        recipe: the recipe before the choice.
        candidates: every tried setting, in the order of the grid, then of its extensions.
        edges: the chosen values at an end of the tried values, as texts such as "alpha 1000".
    """

    penalty: type
    recipe: Recipe
    candidates: tuple
    edges: tuple = ()

    @property
    def best(self) -> Candidate | None:
        """The candidate with the highest mean accuracy, or None if every setting diverged.

        Ties go to the larger alpha, then to the first.
        """
        alive = [candidate for candidate in self.candidates if not candidate.diverged]
        return max(alive, key=lambda candidate: (candidate.mean, candidate.alpha), default=None)

    def _chosen(self):
        if self.best is None:
            raise InputError(f"Every setting of {self.penalty.__name__} diverged: try lower learning rates or weaker penalties.")
        return self.best

    @property
    def best_penalty(self) -> Penalty:
        """The penalty with the chosen alpha; raises InputError if every setting diverged."""
        return self.penalty(self._chosen().alpha)

    @property
    def best_recipe(self) -> Recipe:
        """The recipe with the chosen beta and learning rate; raises InputError if every setting diverged."""
        return self.recipe.replace(beta=self._chosen().beta, learning_rate=self._chosen().learning_rate)

    def record(self, question: dict[str, Any], folds: int) -> dict[str, Any]:
        """Returns the record of this selection, in the format of `records`.

        Args:
            question: `records.question` of the candidates' settings.
            folds: the number of folds.
        """
        candidates = [dataclasses.asdict(candidate) | {"accuracies": list(candidate.accuracies)} for candidate in self.candidates]
        chosen = None if self.best is None else {name: getattr(self.best, name) for name in AXES}
        made = {"question": question, "folds": folds, "candidates": candidates, "chosen": chosen, "edges": list(self.edges)}
        return {"format": records.SELECTION, **made, **provenance()}

    def __str__(self):
        lines = [f"{self.penalty.__name__}: alpha, beta and learning rate by mean accuracy over the folds"]
        for c in self.candidates:
            mark = "  <- chosen" if c is self.best else ""
            score = "diverged" if c.diverged else f"{c.mean:.1%}"
            lines.append(f"  {c.alpha:g}, {c.beta:g}, {c.learning_rate:g}: {score}{mark}")
        if self.best is None:
            lines.append("Every setting diverged.")
        if self.edges:
            lines.append(f"The choice lies at the edge of what was tried: {', '.join(self.edges)}.")
        return "\n".join(lines)


class Search:
    """A grid that grows until its best setting lies inside, or until `MOST_EXTENSIONS` values beyond an end were tried.

    An axis of one value does not grow. The next value repeats the last ratio, but at most a factor of ten: 0.1 and 1 give
    10. An end at 0 does not grow.

    Args:
        symbol: of the penalty.
        axes: the initial values, by the names of AXES.
        folds: the number of folds.
        frozen: the number of frozen first units.
    """

    def __init__(self, symbol, axes, folds, frozen=0):
        self.symbol, self.folds, self.frozen = symbol, folds, frozen
        self.axes = {name: list(dict.fromkeys(axes[name])) for name in AXES}
        self._added = {}
        self._scores = {}  # values of the axes -> accuracies on the folds

    def pending(self):
        """Returns the next runs to score: a `Setting` for each fold of each unscored point; [] when the search is over."""
        values = self._missing() or (self._missing() if self._extend() else [])
        settings = [Setting(self.symbol, *combination, frozen=self.frozen) for combination in values]
        return [setting.on_fold(fold) for setting in settings for fold in range(self.folds)]

    def _missing(self):
        return [values for values in itertools.product(*self.axes.values()) if values not in self._scores]

    def score(self, setting, accuracy):
        """Adds the accuracy of a run on a fold, None if it diverged; call it in the order of the folds."""
        self._scores.setdefault((setting.alpha, setting.beta, setting.learning_rate), []).append(accuracy)

    def selection(self, recipe=None):
        """Returns the `Selection` among all scored settings."""
        candidates = tuple(Candidate(*values, tuple(accuracies)) for values, accuracies in self._scores.items())
        made = Selection(PENALTIES[self.symbol], recipe, candidates)
        if made.best is None:
            return made
        return dataclasses.replace(made, edges=tuple(f"{name} {value:g}" for name, value, _ in self._edges(made.best)))

    def _edges(self, best):
        """Yields (name, value, next value beyond) for each axis with the best setting at an end."""
        for name, values in self.axes.items():
            value, ordered = getattr(best, name), sorted(values)
            for end, inner in ((ordered[0], ordered[1:2]), (ordered[-1], ordered[-2:-1])):
                if value == end and inner and value > 0:
                    factor = min(max(end / inner[0], 0.1), 10.0) if inner[0] > 0 else 10.0
                    yield name, value, float(f"{end * factor:.6g}")

    def _extend(self):
        """Extends the axes beyond the ends where the best setting lies; returns whether any axis grew."""
        best = self.selection().best if self._scores else None
        found = False
        for name, value, beyond in [] if best is None else list(self._edges(best)):
            side = (name, beyond > value)
            if self._added.get(side, 0) < MOST_EXTENSIONS:
                self._added[side] = self._added.get(side, 0) + 1
                self.axes[name].append(beyond)
                found = True
        return found


def search_all(searches, run):
    """Runs cross-validation until every search is over; each round gathers the runs of all searches.

    Args:
        searches: a dict from any key to a `Search`.
        run: maps a list of pairs (key, `Setting` on a fold) to a list of records.
    """
    while pending := [(key, setting) for key, search in searches.items() for setting in search.pending()]:
        for (key, setting), record in zip(pending, run(pending), strict=True):
            searches[key].score(setting, accuracy_of(record))


def accuracy_of(record):
    """Returns the accuracy of a record, or None if the run diverged."""
    return None if records.diverged(record) else record["results"]["accuracy"]


def cross_validate(
    pretrained: keras.Model,
    data: Any,
    penalty: type[Penalty],
    recipe: Recipe | None = None,
    *,
    alphas: Iterable[float] | None = None,
    betas: Iterable[float] | None = None,
    learning_rates: Iterable[float] | None = None,
    folds: int = 5,
    seed: int = 0,
    pixels: PixelFormat | str | None = None,
    anchors: Weights | None = None,
    fisher: Weights | None = None,
    frozen: int = 0,
    num_classes: int | None = None,
    class_weight: dict[int, float] | None = None,
    run_dir: Path | None = None,
    verbose: int = 0,
    **options: Any,
) -> Selection:
    """Chooses alpha, beta and the learning rate on stratified folds of the training images (section 4.2).

    Each setting is fine-tuned once without each fold, and scored by its accuracy on that fold. A diverged run scores 0, and
    a setting that diverges on every fold is never chosen. If the best setting lies at an end of the grid, the grid grows
    (see `Search`). The test images are never read. Refit on all training images with
    `finetune(pretrained, data, selection.best_penalty, selection.best_recipe)`.

    Args:
        pretrained, recipe, pixels, anchors, fisher, frozen, num_classes, class_weight, verbose: as in `finetune`.
        data: as in `finetune`. A stream is read into memory once, so that what it draws at random is fixed, and is in the
            held-out images too. Batches of the folds have the size of its first one.
        penalty: a class, such as `L2SP`.
        alphas: strengths; by default the recipe's grid for the penalty.
        betas: strengths on the new layer; by default the recipe's beta.
        learning_rates: initial rates; by default `Recipe.rates`, the paper's for its own recipe.
        folds: number of folds.
        seed: draws the folds; runs on fold i use seed i.
        run_dir: a folder for the records of the runs and of the selection; the same call resumes an interrupted one.
        options: callbacks, checkpoint_every, strategy and jit_compile, as in `finetune`.

    Returns:
        A `Selection`.

    Raises:
        InputError: a bad argument, a class with fewer images than folds, or a stream that does not end or not fit into memory.
    """
    recipe = recipe or Recipe()
    if isinstance(penalty, str) or not isinstance(penalty, type) or penalty not in PENALTIES.values():
        names = ", ".join(known.__name__ for known in PENALTIES.values())
        raise InputError(f"penalty is {penalty!r}: give a class, one of {names}; alphas are its strengths.")
    task, recipe = _task_to_split(pretrained, data, recipe, pixels, num_classes, verbose)
    weights = Objective.of(task, recipe, class_weight).class_weight
    parts = fold_tasks(task, folds, seed)
    axes = [
        _axis("alphas", alphas, recipe.grid_for(penalty.symbol)),
        _axis("betas", betas, (recipe.beta_for(penalty.symbol),)),
        _axis("learning_rates", learning_rates, recipe.rates(), above=0),
    ]
    search = Search(penalty.symbol, dict(zip(AXES, axes, strict=True)), folds, frozen)
    options |= {"class_weight": class_weight}
    options |= {"anchors": anchors if anchors is not None else Anchors.of(pretrained), "fisher": fisher, "frozen": frozen}
    folder = None if run_dir is None else pathlib.Path(run_dir)
    runs = _FoldRuns(pretrained, recipe, parts, seed, folder, options | {"verbose": verbose})
    # the caller's task may be any subset with any preprocessing, and the model may differ from its anchors
    runs.known |= {"images": digest_of_rows(task.train), "prepared": plain(task.preprocessing), "target": task.name}
    runs.known |= {} if weights is None else {"class_weight": list(weights)}
    alpha, beta, rate = (values[0] for values in search.axes.values())
    first = Setting(penalty.symbol, alpha, beta, rate, frozen)
    search_all({penalty.symbol: search}, lambda pairs: [runs.record(setting) for _, setting in pairs])
    found = search.selection(recipe)
    if folder is not None:
        question = records.question(runs.settings(first, task))
        write_selection(folder, found.record(question, folds))
    return found


def _task_to_split(pretrained, data, recipe, pixels, num_classes, verbose):
    """Returns the `Task`, or arrays whose images have one class each, and the recipe."""
    say = print if verbose else lambda line: None
    task, recipe = task_for(pretrained, data, recipe, pixels, say, num_classes=num_classes)
    if isinstance(task, GivenStream):
        recipe = recipe.replace(batch_size=task.batch_size)  # the refit takes the batches of the stream
        task = collected(task, lambda line: warnings.warn(line, stacklevel=4))
    if isinstance(task, GivenArrays):
        task.check_judgeable()
    return task, recipe


class _FoldRuns:
    """Makes the runs of `cross_validate`, and records each once in `run_dir` if there is one."""

    def __init__(self, pretrained, recipe, parts, seed, run_dir, options):
        self.pretrained, self.recipe, self.parts, self.seed = pretrained, recipe, parts, seed
        self.run_dir, self.options = run_dir, options
        self.known = {"source": "model", "weights": "model", "backbone": pretrained.name, "start": Anchors.of(pretrained).digest}

    def settings(self, setting, task, **fold):
        """Returns everything that a run's result depends on."""
        return settings_of(setting, task, self.recipe, self.options["anchors"], self.options["fisher"], **self.known, **fold)

    def record(self, setting):
        """Reads the record of a run on a fold, or makes the run."""
        part = self.parts[setting.fold]
        settings = self.settings(setting, part, fold=[setting.fold, len(self.parts), self.seed])
        folder = None if self.run_dir is None else folder_of(self.run_dir, setting, settings)
        if folder is not None and (folder / "run.json").exists():
            return records.read_record(folder / "run.json")
        options = {**self.options, "seed": setting.seed, "run_dir": folder, "save": False}
        record = run_record(self.pretrained, part, setting, setting.recipe_of(self.recipe), settings, **options)
        if folder is not None:
            records.write_record(folder / "run.json", record)
        return record


def _axis(name, values, default, above=None):
    """Checks one list of values of `cross_validate`; None gives the default."""
    found = tuple(default) if values is None else fields.each_number(name, values, above=above)
    if not found:
        raise InputError(f"{name} is empty: give at least one number, or leave it out.")
    return found


def write_selection(workdir, record):
    """Writes the record of a selection, and returns its path. It replaces a different answer to the same question.

    A selection of one candidate never replaces a choice among several.
    """
    question = record["question"]
    path = workdir / "selections" / f"{question['penalty']}-{records.run_key(question)}" / "selection.json"
    try:
        before = records.read_record(path) if path.exists() else {}
    except InputError:  # damaged: overwrite it
        before = {}
    if len(record["candidates"]) == 1 < len(before.get("candidates", ())):
        warnings.warn(f"A single setting is not a choice, so the selection among several in {path} stays.", stacklevel=2)
        return path
    if any(before.get(name) != plain(record[name]) for name in ("question", "folds", "candidates", "chosen", "edges")):
        records.write_record(path, record)
    return path


def check_folds(folds, data):
    """Checks the number of folds against the training images of a `Task`, `Dataset` or `GivenArrays`; raises as `fold_tasks`."""
    fields.whole("folds", folds)
    smallest = int(np.bincount(data.train.labels, minlength=len(data.classes)).min())
    if smallest < 2:
        raise InputError(f"The smallest class of {data.name} has {smallest} training images, too few for folds: give more.")
    if not 2 <= folds <= smallest:
        raise InputError(
            f"{folds} folds were asked for, but the smallest class of {data.name} has {smallest} training images: "
            f"give a number from 2 to {smallest}."
        )


def fold_tasks(task, folds, seed=0):
    """Splits the training images of a task into `folds` tasks, each with one stratified fold as its test images.

    If the task subtracts the mean of its training images, each fold subtracts that of its own. Warns if equal images are in
    several folds.

    Raises:
        InputError: fewer than two folds, or a class with fewer images than folds.
    """
    check_folds(folds, task)
    labels = task.train.labels
    parts = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels))
    _warn_of_copies(task, [held_out for _, held_out in parts])
    has_own_mean = task.mean is not None and np.array_equal(task.mean, channel_mean(task.train))
    made = []
    for train, held_out in parts:
        part = dataclasses.replace(task, train=task.train.take(train), test=task.train.take(held_out))
        made.append(dataclasses.replace(part, mean=channel_mean(part.train)) if has_own_mean else part)
    return made


def _warn_of_copies(task, folds):
    """Warns of equal images in several folds, which would be trained on and tested on."""
    found = collections.defaultdict(list)
    for fold, positions in enumerate(folds):
        for i in positions:
            found[_print_of(task, i)].append(fold)
    count = sum(len(places) for places in found.values() if len(set(places)) > 1)
    if count:
        warnings.warn(
            f"{count} of the {len(task.train)} training images of {task.name} are equal to one in another fold: the accuracies "
            "on the folds say too much.",
            stacklevel=4,
        )


def _print_of(task, i):
    """Returns a hash of the pixels of a training image."""
    image = task.image(task.train.places[i]) if isinstance(task, GivenArrays) else task.train[i]
    leaves = [np.ascontiguousarray(leaf) for leaf in keras.tree.flatten(image)]
    return hashlib.sha256(repr([leaf.shape for leaf in leaves]).encode() + b"".join(leaf.tobytes() for leaf in leaves)).digest()
