"""Checks of a source model: implausible accuracies on the source task are reported."""

import warnings

import keras
import numpy as np
import pytest
from PIL import Image
from test_plans import plan

import l2sp_tf as l2sp
from l2sp_tf.experiments import starts
from l2sp_tf.models import keras_files
from l2sp_tf.models.pixels import PixelFormat

CASES = [  # classes, correct, total, whether a warning is expected
    (10, 30, 300, True),  # chance
    (10, 45, 300, True),  # above chance, but typical of classes sorted by name (10, 100, ...)
    (10, 120, 300, False),
    (2, 50, 100, True),
    (2, 20, 100, True),  # two swapped classes
    (2, 80, 100, False),
    (1000, 100, 50_000, True),  # 0.2%
    (1000, 150, 50_000, False),
    (365, 200, 36_500, True),
    (10, 1, 1, True),  # one image shows nothing
]


@pytest.mark.parametrize(("classes", "correct", "total", "doubted"), CASES)
@pytest.mark.parametrize("origin", ["file", "imagenet", "scratch"])
def test_a_source_accuracy_near_chance_brings_a_warning_with_its_causes(origin, classes, correct, total, doubted, recwarn):
    before = {"accuracy": correct / total, "correct": correct, "total": total}
    source = type("Source", (), {"name": "s", "classes": tuple(map(str, range(classes)))})
    starts._doubt(before, source, origin)
    assert len(recwarn) == doubted
    if doubted:
        text = str(recwarn[0].message)
        assert "\n" not in text and f"chance is {1 / classes:.1%}" in text
        assert ("order" in text and "preprocess" in text) and (("--source_iterations" in text) == (origin == "scratch"))


def test_a_class_order_other_than_the_outputs_brings_a_warning(tmp_path):
    """Compares a network that is always right with the same network after permuting its outputs."""
    folder = tmp_path / "colours"
    for split in ("train", "test"):
        for label in range(4):
            (folder / split / str(label)).mkdir(parents=True)
            for number in range(12):
                colour = tuple(200 if label == channel else 20 for channel in range(3))
                Image.new("RGB", (8, 8), colour).save(folder / split / str(label) / f"{number}.png")
    inputs = keras.Input((6, 6, 3))
    outputs = keras.layers.Dense(4, name="predictions")(keras.layers.GlobalAveragePooling2D()(inputs))
    model, path = keras.Model(inputs, outputs), tmp_path / "m.keras"
    recipe = l2sp.Recipe().replace(iterations=1, batch_size=4, resize=8, crop=6, blur="none", mean="weights")
    tasks = {"source": str(folder), "target": str(folder), "recipe": recipe, "source_recipe": recipe}
    for order in ([0, 1, 2, 3], [1, 2, 3, 0]):
        model.layers[-1].set_weights([np.eye(4, dtype="float32")[:3, order], np.float32([0, 0, 0, 100])[order]])
        keras_files.save_model(model, path, PixelFormat(mean=(0, 0, 0)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            start = starts.prepare_start(plan(workdir=tmp_path / "w", weights=str(path), **tasks), say=lambda line: None)
        found = [str(warning.message) for warning in caught if "source accuracy" in str(warning.message)]
        assert start.before["accuracy"] == (order[0] == 0) and len(found) == (order[0] != 0)
        assert all("another order than the model's outputs" in text and "--pixels" in text for text in found)
