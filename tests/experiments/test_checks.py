"""Mistakes reported before any training, and the report after an interruption."""

import os
import pathlib
import time

import keras
import numpy as np
import pytest
from test_configuration import model_file
from test_entry_points import make_folder
from test_plans import plan

import l2sp_tf as l2sp
from l2sp_tf.experiments import runner
from l2sp_tf.experiments.checks import check_plans
from l2sp_tf.experiments.interruption import kept
from l2sp_tf.models import keras_files, zoo
from l2sp_tf.training.recipe import Recipe

SMALL = {"recipe": Recipe.digits(), "source_recipe": Recipe.source(Recipe.digits()), "widths": (4, 8), "depths": (1, 1)}


def made(tmp_path, **changes):
    return plan(**{"workdir": tmp_path / "w", **SMALL, **changes})


def test_a_right_plan_passes_and_trains_nothing(tmp_path):
    check_plans([made(tmp_path), made(tmp_path, frozen=None), made(tmp_path, folds=5, per_class=5)])
    assert not list((tmp_path / "w").glob("sources")) and not list((tmp_path / "w").glob("runs"))


def recipe(size):
    recipe = Recipe().replace(resize=size, crop=size)
    return {"recipe": recipe, "source_recipe": Recipe.source(recipe)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "resnet50", **recipe(31)}, "Images of 31 pixels are too small for the backbone resnet50"),
        ({"frozen": (0, 9)}, "frozen is 9, but of this backbone's units at most 2 can be frozen"),
        ({"folds": 26, "per_class": 25}, "26 folds were asked for, but the smallest class of digits/target has 25"),
        ({"weights": "missing.h5"}, "There is no weights file missing.h5"),
        ({"weights": "imagenet", "backbone": "resnet50", **recipe(224)}, "has 1000 classes, but digits/source has 10"),
        ({"pixels": "torch"}, "A model trained from scratch sees pixels as rgb"),
        ({"target": "nowhere"}, "nowhere"),
        ({"source": "nowhere"}, "nowhere"),
        ({"workdir": pathlib.Path("/proc/none/w")}, "The workdir /proc/none/w cannot be written"),
    ],
)
def test_a_mistake_in_any_plan_is_reported(tmp_path, changes, message):
    for plans in ([made(tmp_path, **changes)], [made(tmp_path), made(tmp_path, **changes)]):
        with pytest.raises(l2sp.InputError, match=message) as found:
            check_plans(plans)
        assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("shape", "crop", "message"),
    [
        ((16, 16, 3), 8, "takes images of 16x16 pixels, but crop is 8"),
        ((16, 20, 3), 16, "takes images of 16x20 pixels, but crops are square"),
        ((None, 16, 3), 8, "takes images of anyx16 pixels"),
        ((8, 8, 1), 8, "takes images of 1 channels"),
        ((8, 8, 4), 8, "takes images of 4 channels"),
        ((8, 8, 3), 8, None),
        ((None, None, 3), 8, None),
    ],
)
def test_the_input_of_a_keras_file_fits_the_images(tmp_path, shape, crop, message):
    weights = model_file(tmp_path / "m.keras", shape)
    assert keras_files.input_shape(weights) == shape
    folder = str(make_folder(tmp_path / "images"))
    given = {**recipe(crop), "weights": weights, "source": None, "target": folder, "pixels": "rgb"}
    if message is None:
        check_plans([made(tmp_path, **given)])
        return
    with pytest.raises(l2sp.InputError, match=message):
        check_plans([made(tmp_path, **given)])


def test_a_model_without_images_has_no_input_shape(tmp_path):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(tmp_path / "flat.keras")
    assert keras_files.input_shape(tmp_path / "flat.keras") is None
    keras.Sequential([keras.Input((9, 9, 3)), keras.layers.Flatten()]).save(tmp_path / "s.keras")
    assert keras_files.input_shape(tmp_path / "s.keras") == (9, 9, 3)


def test_no_source_model_is_trained_before_a_mistake_in_another_plan_is_reported(tmp_path):
    weights = tmp_path / "other.safetensors"
    l2sp.Anchors.of(zoo.backbone("small", 10, image_size=8, widths=(4, 16), depths=(1, 1))).save(weights)
    plans = [made(tmp_path), made(tmp_path, weights=str(weights), pixels="rgb")]
    with pytest.raises(l2sp.InputError, match="architecture"):
        runner.run_plans(plans, say=lambda text: None)
    assert not list((tmp_path / "w").glob("sources"))


def test_a_stopped_command_lists_finished_runs_and_the_state_of_the_others(tmp_path):
    base = made(tmp_path)
    began = time.time() + 1000
    names = {"old": began - 500, "new": began + 5, "cut": began + 6, "bare": began + 7, "older": began - 600}
    for name, at in names.items():
        folder = base.setup.workdir / "runs" / name
        folder.mkdir(parents=True)
        files = {"old": ["run.json"], "new": ["run.json"], "cut": ["checkpoints/step-0000000012/manifest.json"]}.get(name, [])
        files += ["checkpoints/step-0000000007/manifest.json"] if name in ("cut", "older") else ["config.toml"]
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("{}")
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (at, at))
    lines = kept([base, base.replace(seeds=(7,))], began)
    assert lines == [
        f"finished in {base.setup.workdir}: 2 runs, of this command new",
        "under way: runs/bare, not saved yet, and will start over",
        "under way: runs/cut, saved after step 12 of 200",
    ]
    assert np.all([path.exists() for path in base.setup.workdir.glob("runs/*")])
