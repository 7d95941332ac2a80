"""The record of one run, with a stub for the run."""

import dataclasses
import pathlib
import types

import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.experiments import records, runs
from l2sp_tf.experiments.plans import Setting
from l2sp_tf.models.pixels import PIXELS

SETTING = Setting("l2_sp", 0.1, 0.01, 0.01)


class Images:
    """A stub of test images with the attributes that their digest reads."""

    def __init__(self, labels, skipped):
        self.labels, self.skipped = np.int32(labels), skipped

    def __len__(self):
        return len(self.labels)


def task(digest="d" * 64, labels=(0, 1, 1), skipped=()):
    return types.SimpleNamespace(digest=digest, classes=("a", "b"), test=Images(labels, skipped), pixels=PIXELS["rgb"])


def record(history=None, error=None, stopped_at=None, **measured):
    """The record of a stubbed run that ended with a log row or an error, with given measurements."""

    def finetune(*args, **options):
        if error is not None:
            raise error
        coverage = types.SimpleNamespace(digest="c", counts={"S": (1, 2)})
        fields = {"model": None, "coverage": coverage, "history": [history], "stopped_at": stopped_at, "seconds": 1.5}
        return types.SimpleNamespace(**fields)

    anchors = types.SimpleNamespace(digest="a" * 64)
    recipe = l2sp.Recipe()
    settings = runs.settings_of(SETTING, task(), recipe, anchors, source="s", target="t")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runs, "finetune", finetune)
        measure = lambda run: {"accuracy": 0.5, "correct": 1, "total": 2, **measured}  # noqa: E731
        made = runs.run_record(None, task(), SETTING, recipe, settings, measure, anchors=anchors)
    records.check_record({"format": records.FORMAT, **made}, "run.json")
    return made


def test_a_record_has_the_last_row_and_where_a_callback_stopped_it():
    made = record({"step": 9, "distance": 0.25, "penalty": 0.5, "accuracy": 1.0}, stopped_at=9)
    assert made["results"]["distance"] == 0.25 and made["results"]["stopped_at"] == 9 and made["classes"] == ["a", "b"]
    assert "stopped_at" not in record({"step": 9, "distance": 0.25, "penalty": 0.5})["results"]


@pytest.mark.parametrize("name", ["distance", "penalty"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_last_step_into_infinity_is_a_divergence(name, value):
    made = record({"step": 7, "distance": 1.0, "penalty": 1.0, name: value})
    assert made["results"] == {"diverged": f"The {name} is {value} after step 7."}


def test_a_loss_that_is_not_finite_is_a_divergence():
    made = record(error=FloatingPointError("The loss is nan after step 3."))
    assert made["results"] == {"diverged": "The loss is nan after step 3."} and records.diverged(made)


def test_a_last_step_after_which_every_output_is_nan_is_a_divergence():
    last = {"step": 7, "distance": 1.0, "penalty": 1.0}
    assert record(last, nan=2)["results"] == {"diverged": "The outputs are NaN on all 2 test images."}
    assert record(last, nan=1)["results"]["nan"] == 1 and not records.diverged(record(last, nan=1))


def test_settings_that_change_no_result_change_no_folder():
    def folder(recipe, setting=SETTING, **more):
        settings = runs.settings_of(setting, task(), recipe, types.SimpleNamespace(digest="a"), source="s", target="t", **more)
        return runs.folder_of(pathlib.Path("w"), setting, settings)

    plain = folder(l2sp.Recipe())
    assert folder(l2sp.Recipe(log_every=3)) == folder(l2sp.Recipe(alpha={"l2": 7.0})) == plain
    assert folder(l2sp.Recipe(decay_at=6000)) == folder(l2sp.Recipe(smoothing=1e-16)) == plain  # L2-SP has no root
    root = dataclasses.replace(SETTING, symbol="gl_sp")
    assert folder(l2sp.Recipe(smoothing=1e-16), root) != folder(l2sp.Recipe(), root)
    step = {"smoothing": 1e-16, "penalty_step": "proximal"}
    assert folder(l2sp.Recipe().replace(**step), root) == folder(l2sp.Recipe(penalty_step="proximal"), root)
    idle = [
        ({"blur": "none"}, {"blur_kernel": 3}),
        ({"blur": "authors"}, {"blur_sigma": (1, 2)}),
        ({"solver": "adam"}, {"momentum": 0.5}),
    ]
    for off, number in idle:
        r = l2sp.Recipe()
        without = folder(r.replace(**off))
        assert without == folder(r.replace(**off, **number)) != plain != folder(r.replace(**number))
    frozen, fresh = dataclasses.replace(SETTING, frozen=1), l2sp.Recipe(moving_statistics="fresh")
    assert folder(fresh, frozen) == folder(l2sp.Recipe(), frozen) and folder(fresh) != plain
    assert folder(l2sp.Recipe(beta=0.5, learning_rate=0.3)) == plain  # the setting's beta and rate replace them
    others = [l2sp.Recipe(momentum=0.5), l2sp.Recipe(crops=10), l2sp.Recipe(mean=(1, 2, 3))]
    settings = [dataclasses.replace(SETTING, **change) for change in ({"seed": 1}, {"frozen": 2}, {"beta": 0.1})]
    found = [folder(recipe) for recipe in others] + [folder(l2sp.Recipe(), setting) for setting in settings]
    found += [folder(l2sp.Recipe(), dataclasses.replace(SETTING, fold=n), fold=[n, 3]) for n in (0, 1)]
    assert len({plain, *found}) == 1 + len(found)


def test_test_images_are_the_same_only_if_all_of_them_are():
    changes = ({}, {"digest": "e" * 64}, {"labels": (1, 0, 1)}, {"skipped": ("x",)})
    digests = {runs.test_digest(task(**change)) for change in changes}
    assert len(digests) == 4 and runs.test_digest(task()) == runs.test_digest(task())
