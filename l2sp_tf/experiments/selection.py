"""Choosing strengths and learning rate by cross-validation on the training images alone (section 4.2)."""

import dataclasses
import itertools
import pathlib
import statistics
import warnings

import numpy as np
from sklearn.model_selection import StratifiedKFold

from l2sp_tf.data.pipeline import channel_mean
from l2sp_tf.experiments import records
from l2sp_tf.experiments.plans import Setting
from l2sp_tf.experiments.runs import folder_of, run_record, settings_of
from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.plain import plain
from l2sp_tf.files.provenance import provenance
from l2sp_tf.penalties.anchors import Anchors
from l2sp_tf.penalties.formulas import PENALTIES
from l2sp_tf.training.recipe import Recipe
from l2sp_tf.training.trainer import as_task, images_digest

LEARNING_RATES = (0.005, 0.01, 0.02)  # section 4.2
AXES = ("alpha", "beta", "learning_rate")
MOST_EXTENSIONS = 3  # values that are tried beyond each end of what was asked for


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting and the accuracies, in [0, 1], that it reached on the held-out part of each fold, None where it diverged."""

    alpha: float
    beta: float
    learning_rate: float
    accuracies: tuple

    @property
    def mean(self):
        """The mean accuracy over the folds; a fold on which it diverged counts 0."""
        return statistics.fmean(accuracy or 0.0 for accuracy in self.accuracies)

    @property
    def diverged(self):
        """Whether it diverged on every fold."""
        return all(accuracy is None for accuracy in self.accuracies)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What cross-validation found.

    Attributes:
        penalty: the class of the penalty, such as `L2SP`.
        recipe: the recipe without the choice.
        candidates: every setting that was tried, in the order of the grid, then of its extensions.
        edges: where the best lies at the end of what was tried, as no more was allowed: texts such as "alpha 1000".
    """

    penalty: type
    recipe: Recipe
    candidates: tuple
    edges: tuple = ()

    @property
    def best(self):
        """The candidate with the highest mean accuracy; of equals the strongest penalty, and of those the first.

        None if every setting diverged.
        """
        alive = [candidate for candidate in self.candidates if not candidate.diverged]
        return max(alive, key=lambda candidate: (candidate.mean, candidate.alpha), default=None)

    def _chosen(self):
        if self.best is None:
            raise InputError(f"Every setting of {self.penalty.__name__} diverged: try lower learning rates or weaker penalties.")
        return self.best

    @property
    def best_penalty(self):
        """The penalty with the chosen alpha; an InputError if every setting diverged."""
        return self.penalty(self._chosen().alpha)

    @property
    def best_recipe(self):
        """The recipe with the chosen beta and learning rate; an InputError if every setting diverged."""
        return self.recipe.replace(beta=self._chosen().beta, learning_rate=self.best.learning_rate)

    def record(self, question, folds):
        """The record of a selection, as `records` describes it.

        Args:
            question: `records.question` of the settings that were chosen among.
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
    """A grid that grows until its best setting lies inside, or `MOST_EXTENSIONS` values beyond an end were tried.

    An axis of one value stays so. Beyond an end follows the number that continues the last step between two values, as in
    0.1, 1 and then 10, but at most ten times as much. Nothing is tried beyond 0.

    Args:
        symbol: of the penalty.
        axes: by the names of AXES the values to begin with.
        folds: the number of folds.
        frozen: how many of the first units are frozen.
    """

    def __init__(self, symbol, axes, folds, frozen=0):
        self.symbol, self.folds, self.frozen = symbol, folds, frozen
        self.axes = {name: list(dict.fromkeys(axes[name])) for name in AXES}
        self._added = {}
        self._scores = {}  # from values of the axes to the accuracies on the folds

    def pending(self):
        """The runs to score next, a `Setting` for each fold of what has no score; none when the search is over."""
        values = self._missing() or (self._missing() if self._extend() else [])
        settings = [Setting(self.symbol, *combination, frozen=self.frozen) for combination in values]
        return [setting.on_fold(fold) for setting in settings for fold in range(self.folds)]

    def _missing(self):
        return [values for values in itertools.product(*self.axes.values()) if values not in self._scores]

    def score(self, setting, accuracy):
        """Takes the accuracy of a run on a fold, None where it diverged; folds come in order."""
        self._scores.setdefault((setting.alpha, setting.beta, setting.learning_rate), []).append(accuracy)

    def selection(self, recipe=None):
        """The `Selection` among all settings that were scored, of a recipe."""
        candidates = tuple(Candidate(*values, tuple(accuracies)) for values, accuracies in self._scores.items())
        made = Selection(PENALTIES[self.symbol], recipe, candidates)
        if made.best is None:
            return made
        return dataclasses.replace(made, edges=tuple(f"{name} {value:g}" for name, value, _ in self._edges(made.best)))

    def _edges(self, best):
        """The axes at an end of which the best setting lies: name, that value, and the one beyond."""
        for name, values in self.axes.items():
            value, ordered = getattr(best, name), sorted(values)
            for end, inner in ((ordered[0], ordered[1:2]), (ordered[-1], ordered[-2:-1])):
                if value == end and inner and value > 0:
                    factor = min(max(end / inner[0], 0.1), 10.0) if inner[0] > 0 else 10.0
                    yield name, value, float(f"{end * factor:.6g}")

    def _extend(self):
        """Adds the values beyond the ends at which the best setting lies; returns whether there was any."""
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
    """Runs cross-validation until every search is over. All searches go on side by side, so that `run` gets many runs at once.

    Args:
        searches: a dict from any key to a `Search`.
        run: of a list of pairs (key, `Setting` on a fold), returns a record for each.
    """
    while pending := [(key, setting) for key, search in searches.items() for setting in search.pending()]:
        for (key, setting), record in zip(pending, run(pending), strict=True):
            searches[key].score(setting, accuracy_of(record))


def accuracy_of(record):
    """The accuracy of a record, None where the run diverged."""
    return None if records.diverged(record) else record["results"]["accuracy"]


def cross_validate(
    pretrained,
    data,
    penalty,
    recipe=None,
    *,
    alphas=None,
    betas=None,
    learning_rates=LEARNING_RATES,
    folds=5,
    seed=0,
    pixels=None,
    anchors=None,
    fisher=None,
    frozen=0,
    run_dir=None,
    verbose=0,
    **options,
):
    """Chooses alpha, beta and the learning rate on stratified folds of the training images (section 4.2).

    Each setting is fine-tuned once on the rest of each fold, and scored by its accuracy on the fold; a run that diverges is
    a result, and never chosen. The grid grows where its best lies at an end (see `Search`). The test images are never read.
    Refit on all training images with `finetune(pretrained, data, selection.best_penalty, selection.best_recipe)`.

    Args:
        pretrained, data, recipe, pixels, anchors, fisher, frozen, verbose: as in `finetune`.
        penalty: a class, such as `L2SP`.
        alphas: strengths; by default the recipe's grid for the penalty.
        betas: strengths on the new layer; by default the recipe's one.
        learning_rates: initial rates.
        folds: number of folds.
        seed: of the folds; the runs on fold i have the seed i.
        run_dir: a folder for a record of each run and of the selection; the same call goes on where another was cut off.
        options: callbacks, checkpoint_every, strategy and jit_compile, as in `finetune`.

    Returns:
        A `Selection`.

    Raises:
        InputError: a bad argument, or a class with fewer images than folds.
    """
    recipe = recipe or Recipe()
    if isinstance(penalty, str) or not isinstance(penalty, type) or penalty not in PENALTIES.values():
        names = ", ".join(known.__name__ for known in PENALTIES.values())
        raise InputError(f"penalty is {penalty!r}: give a class, one of {names}; alphas are its strengths.")
    task = as_task(data, recipe, pixels)
    parts = fold_tasks(task, folds, seed)
    axes = [
        _axis("alphas", alphas, recipe.grid_for(penalty.symbol)),
        _axis("betas", betas, (recipe.beta_for(penalty.symbol),)),
        _axis("learning_rates", learning_rates, LEARNING_RATES, above=0),
    ]
    search = Search(penalty.symbol, dict(zip(AXES, axes, strict=True)), folds, frozen)
    options |= {"anchors": anchors if anchors is not None else Anchors.of(pretrained), "fisher": fisher, "frozen": frozen}
    folder = None if run_dir is None else pathlib.Path(run_dir)
    runs = _FoldRuns(pretrained, recipe, parts, seed, folder, options | {"verbose": verbose})
    # a task may be any part of its data set, prepared otherwise than the recipe says, and the model apart from its anchors
    runs.known |= {"images": images_digest(task), "prepared": plain(task.preprocessing), "target": task.name}
    first = Setting(penalty.symbol, *next(itertools.product(*search.axes.values())), frozen=frozen)
    search_all({penalty.symbol: search}, lambda pairs: [runs.record(setting) for _, setting in pairs])
    found = search.selection(recipe)
    if folder is not None:
        question = records.question(runs.settings(first, task, recipe))
        write_selection(folder, found.record(question, folds))
    return found


class _FoldRuns:
    """The runs of `cross_validate`: each is recorded once, and fine-tunes the same model on another fold or setting."""

    def __init__(self, pretrained, recipe, parts, seed, run_dir, options):
        self.pretrained, self.recipe, self.parts, self.seed = pretrained, recipe, parts, seed
        self.run_dir, self.options = run_dir, options
        self.known = {"source": "model", "weights": "model", "backbone": pretrained.name, "start": Anchors.of(pretrained).digest}

    def settings(self, setting, task, recipe, **fold):
        """What the result of a run depends on."""
        return settings_of(setting, task, recipe, self.options["anchors"], self.options["fisher"], **self.known, **fold)

    def record(self, setting):
        """The record of a run on a fold: that in its folder, or of a run that is made now."""
        part = self.parts[setting.fold]
        recipe = self.recipe.replace(beta=setting.beta, learning_rate=setting.learning_rate)
        settings = self.settings(setting, part, recipe, fold=[setting.fold, len(self.parts), self.seed])
        folder = None if self.run_dir is None else folder_of(self.run_dir, setting, settings)
        if folder is not None and (folder / "run.json").exists():
            return records.read_record(folder / "run.json")
        options = {**self.options, "seed": setting.seed, "run_dir": folder, "save": False}
        record = run_record(self.pretrained, part, setting, recipe, settings, **options)
        if folder is not None:
            records.write_record(folder / "run.json", record)
        return record


def _axis(name, values, default, above=None):
    """The values that one of the arguments of `cross_validate` names, or the default where it names none."""
    found = tuple(default) if values is None else fields.each_number(name, values, above=above)
    if not found:
        raise InputError(f"{name} is empty: give at least one number, or leave it out.")
    return found


def write_selection(workdir, record):
    """Writes the record of a selection in place of an earlier one that answers the same question otherwise; returns its path.

    One setting alone was not chosen among others, and does not take the place of a choice.
    """
    question = record["question"]
    path = workdir / "selections" / f"{question['penalty']}-{records.run_key(question)}" / "selection.json"
    try:
        before = records.read_record(path) if path.exists() else {}
    except InputError:  # it is damaged
        before = {}
    if len(record["candidates"]) == 1 < len(before.get("candidates", ())):
        warnings.warn(f"One setting is no choice, so the selection among several in {path} stays.", stacklevel=2)
        return path
    if any(before.get(name) != plain(record[name]) for name in ("question", "folds", "candidates", "chosen", "edges")):
        records.write_record(path, record)
    return path


def check_folds(folds, data):
    """Checks the number of folds against the training images of a `Task` or a `Dataset`; errors as `fold_tasks`."""
    fields.whole("folds", folds)
    smallest = int(np.bincount(data.train.labels, minlength=len(data.classes)).min())
    if smallest < 2:
        raise InputError(f"The smallest class of {data.name} has {smallest} training images, which no folds can part: give more.")
    if not 2 <= folds <= smallest:
        raise InputError(
            f"{folds} folds were asked for, but the smallest class of {data.name} has {smallest} training images: "
            f"give a number from 2 to {smallest}."
        )


def fold_tasks(task, folds, seed=0):
    """The training images of a task in `folds` ways: as tasks whose test images are one stratified fold each.

    Where the mean that is subtracted is that of the task's training images, each fold's is that of its own.

    Raises:
        InputError: fewer than two folds, or a class with fewer images than folds.
    """
    check_folds(folds, task)
    labels = task.train.labels
    has_own_mean = np.array_equal(task.mean, channel_mean(task.train))
    made = []
    for train, held_out in StratifiedKFold(folds, shuffle=True, random_state=seed).split(labels, labels):
        part = dataclasses.replace(task, train=task.train.take(train), test=task.train.take(held_out))
        made.append(dataclasses.replace(part, mean=channel_mean(part.train)) if has_own_mean else part)
    return made
