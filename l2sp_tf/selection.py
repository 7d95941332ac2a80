"""Choosing strengths and learning rate by cross-validation on the training images alone (section 4.2)."""

import dataclasses
import itertools
import statistics

import numpy as np
from sklearn.model_selection import StratifiedKFold

from l2sp_tf.errors import InputError
from l2sp_tf.evaluation import evaluate
from l2sp_tf.recipe import Recipe
from l2sp_tf.training import as_task, finetune

LEARNING_RATES = (0.005, 0.01, 0.02)  # section 4.2


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting and the accuracies, in [0, 1], that it reached on the held-out part of each fold."""

    alpha: float
    beta: float
    learning_rate: float
    accuracies: tuple

    @property
    def mean(self):
        """The mean accuracy over the folds."""
        return statistics.fmean(self.accuracies)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What cross-validation found.

    Attributes:
        penalty: the class of the penalty, such as `L2SP`.
        recipe: the recipe without the choice.
        candidates: every setting that was tried, in the order of the grid.
    """

    penalty: type
    recipe: Recipe
    candidates: tuple

    @property
    def best(self):
        """The candidate with the highest mean accuracy; of equals the strongest penalty, and of those the first."""
        return max(self.candidates, key=lambda candidate: (candidate.mean, candidate.alpha))

    @property
    def best_penalty(self):
        """The penalty with the chosen alpha."""
        return self.penalty(self.best.alpha)

    @property
    def best_recipe(self):
        """The recipe with the chosen beta and learning rate."""
        return self.recipe.replace(beta=self.best.beta, learning_rate=self.best.learning_rate)

    def __str__(self):
        lines = [f"{self.penalty.__name__}: alpha, beta and learning rate by mean accuracy over the folds"]
        for c in self.candidates:
            mark = "  <- chosen" if c is self.best else ""
            lines.append(f"  {c.alpha:g}, {c.beta:g}, {c.learning_rate:g}: {c.mean:.1%}{mark}")
        return "\n".join(lines)


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
    verbose=0,
):
    """Chooses alpha, beta and the learning rate on stratified folds of the training images (section 4.2).

    Each setting is fine-tuned once on the rest of each fold, and scored by its accuracy on the fold, with central
    crops; a run that diverges has the accuracy 0. The test images are never read. Refit on all training images with
    `finetune(pretrained, data, selection.best_penalty, selection.best_recipe)`.

    Args:
        pretrained, data, recipe, pixels, anchors, fisher, verbose: as in `finetune`.
        penalty: a class, such as `L2SP`.
        alphas: strengths; by default the recipe's grid for the penalty.
        betas: strengths on the new layer; by default the recipe's one.
        learning_rates: initial rates.
        folds: number of folds.
        seed: of the folds; the runs on fold i have the seed i.

    Returns:
        A `Selection`.

    Raises:
        InputError: a bad argument, or a class with fewer images than folds.
    """
    recipe = recipe or Recipe()
    parts = fold_tasks(as_task(data, recipe, pixels), folds, seed)
    candidates = []
    alphas = alphas or recipe.grid_for(penalty.symbol)
    for alpha, beta, rate in itertools.product(alphas, betas or (recipe.beta_for(penalty.symbol),), learning_rates):
        setting = recipe.replace(beta=beta, learning_rate=rate)
        accuracies = []
        for number, part in enumerate(parts):
            options = {"anchors": anchors, "fisher": fisher, "seed": number, "verbose": verbose}
            try:
                run = finetune(pretrained, part, penalty(alpha), setting, **options)
                accuracies.append(evaluate(run.model, part, crops=setting.crops)["accuracy"])
            except FloatingPointError:  # it diverged
                accuracies.append(0.0)
        candidates.append(Candidate(alpha, beta, rate, tuple(accuracies)))
    return Selection(penalty, recipe, tuple(candidates))


def fold_tasks(task, folds, seed=0):
    """The training images of a task in `folds` ways: as tasks whose test images are one stratified fold each.

    The mean that is subtracted stays that of all training images.

    Raises:
        InputError: fewer than two folds, or a class with fewer images than folds.
    """
    labels = task.train.labels
    smallest = int(np.bincount(labels, minlength=len(task.classes)).min())
    if not 2 <= folds <= smallest:
        raise InputError(
            f"{folds} folds were asked for, but the smallest class of {task.name} has {smallest} training images: "
            f"give a number from 2 to {smallest}."
        )
    splitter = StratifiedKFold(folds, shuffle=True, random_state=seed)
    return [
        dataclasses.replace(task, train=task.train.take(train), test=task.train.take(held_out))
        for train, held_out in splitter.split(labels, labels)
    ]
