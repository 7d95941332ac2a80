"""Cross-validation: what it is scored on, and that it never sees a test image."""

import dataclasses

import numpy as np
import pytest
from test_training import RECIPE, task

import l2sp_tf as l2sp
from l2sp_tf import models
from l2sp_tf.selection import Candidate, Selection, fold_tasks


@pytest.fixture
def pretrained():
    return models.small_resnet((6, 6, 3), 4, widths=(4, 8), depths=(1, 1))


def test_folds_are_stratified_and_cover_every_training_image_once():
    made = task(count=20)
    parts = fold_tasks(made, 3, seed=1)
    held = np.concatenate([part.test.starts for part in parts])
    assert sorted(held) == sorted(made.train.starts)
    for part in parts:
        assert not set(part.train.starts) & set(part.test.starts) and len(part.train) + len(part.test) == 20
        counts = np.bincount(part.test.labels)
        assert counts.max() - counts.min() <= 1
        assert part.train.pixels is made.train.pixels
    other = np.concatenate([part.test.starts for part in fold_tasks(made, 3, seed=2)])
    assert list(other) != list(held)


def test_more_folds_than_images_of_a_class_are_refused():
    for folds in (1, 7):
        with pytest.raises(l2sp.InputError, match=f"{folds} folds .* has 6 training images"):
            fold_tasks(task(count=20), folds)


def test_scores_are_those_of_fine_tuning_on_the_rest_of_each_fold(pretrained):
    made = task()
    grid = {"alphas": (0.01, 1.0), "betas": (0.1,), "learning_rates": (1e-6, 0.05)}
    selection = l2sp.cross_validate(pretrained, made, l2sp.L2SP, RECIPE, **grid, folds=2, seed=3)
    settings = [(c.alpha, c.beta, c.learning_rate) for c in selection.candidates]
    assert settings == [(a, 0.1, r) for a in (0.01, 1.0) for r in (1e-6, 0.05)]
    assert selection.best.learning_rate == 0.05 and selection.best.mean > 0.8  # the other rate learns nothing
    part = fold_tasks(made, 2, seed=3)[1]
    recipe = RECIPE.replace(beta=0.1, learning_rate=0.05)
    alone = l2sp.finetune(pretrained, part, l2sp.L2SP(1.0), recipe, seed=1, verbose=0)
    assert selection.candidates[3].accuracies[1] == pytest.approx(l2sp.evaluate(alone.model, part)["accuracy"], abs=0.11)
    assert isinstance(selection.best_penalty, l2sp.L2SP) and selection.best_penalty.alpha == selection.best.alpha
    assert (selection.best_recipe.beta, selection.best_recipe.learning_rate) == (0.1, 0.05)
    assert str(selection).count("chosen") == 1


def test_test_images_are_never_read(pretrained):
    class Forbidden:
        def __getattr__(self, name):
            raise AssertionError(f"test images were touched: {name}")

    made = dataclasses.replace(task(), test=Forbidden())
    l2sp.cross_validate(pretrained, made, l2sp.L2, RECIPE.replace(iterations=2), alphas=(0.1,), learning_rates=(0.01,), folds=2)


def test_the_best_of_equals_is_the_strongest_penalty_and_grids_have_defaults():
    candidates = tuple(
        Candidate(alpha, 0.01, 0.01, accuracies) for alpha, accuracies in ((1, (0.5, 0.7)), (2, (0.6, 0.6)), (3, (0.1,)))
    )
    assert Selection(l2sp.L2, RECIPE, candidates).best.alpha == 2
    fast = Candidate(2, 0.01, 0.02, (0.6, 0.6))
    assert Selection(l2sp.L2, RECIPE, (*candidates, fast)).best is candidates[1]
    assert all(len(RECIPE.grid_for(symbol)) > 2 for symbol in l2sp.regularizers.PENALTIES)
    with pytest.raises(l2sp.InputError, match="no grid"):
        RECIPE.grid_for("other")


def test_a_setting_that_diverges_is_not_chosen(pretrained):
    options = {"learning_rates": (0.01,), "folds": 2}
    selection = l2sp.cross_validate(pretrained, task(), l2sp.L2SP, RECIPE, alphas=(1e12, 0.1), **options)
    assert selection.candidates[0].accuracies == (0.0, 0.0) and selection.best.alpha == 0.1
