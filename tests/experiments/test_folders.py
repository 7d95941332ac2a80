"""A model's file reproduces the images and predictions in the record of its run, to the last image."""

import json
import math
import shutil
import zipfile

import keras
import numpy as np
import pytest
from PIL import Image
from test_plans import plan

import l2sp_tf as l2sp
from l2sp_tf.data.pipeline import preprocessing_for
from l2sp_tf.experiments.folders import interface_at, report_of_files
from l2sp_tf.experiments.runner import run_plan
from l2sp_tf.models import keras_files, zoo
from l2sp_tf.models.pixels import PIXELS, Interface, PixelFormat

CLASSES = {"source": ("ape", "bee", "cow"), "target": ("yes", "no")}
BGR = PixelFormat("bgr", scale=(0.01, 0.02, 0.03), mean=(90.0, 60.0, 120.0))


def photographs(folder, classes, count, seed):
    """Writes PNG files of many shapes <split>/<class>/<number>.png, whose colours correlate weakly with their class."""
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(9, 20, size=2)
                pixels = rng.normal(90, 60, size=(height, width, 3)) + [40 * label, 10, -30 * label]
                Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(folder / split / name / f"{number:02}.png")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks, named after sets for which the authors publish a mean."""
    folder = tmp_path_factory.mktemp("tasks")
    photographs(folder / "imagenet2012", CLASSES["source"], 9, seed=0)
    photographs(folder / "stanford_dogs", CLASSES["target"], 9, seed=1)
    network = zoo.small_resnet((6, 6, 3), 3, widths=(4,), depths=(1,))
    l2sp.Anchors.of(network, {"pixels": BGR.plain()}).save(folder / "bgr.safetensors")
    keras_files.save_model(network, folder / "torch.keras", PIXELS["torch"])
    return folder


WAYS = [  # mean, resize_mode, resize_filter, weights, crops
    ("training", "shorter_side", "bilinear", "none", 1),
    ("authors", "squash", "bilinear", "bgr.safetensors", 1),
    ("weights", "shorter_side", "area", "torch.keras", 1),
    ((130.0, 20.5, 60.1), "squash", "area", "anchors", 10),  # the mean of the first run
]


def run(workdir, way, anchors=None):
    mean, mode, filter, weights, crops = way
    images = {"resize": 8, "crop": 6, "resize_mode": mode, "resize_filter": filter, "blur": "none"}
    recipe = l2sp.Recipe(iterations=8, batch_size=6, crops=crops, mean=mean).replace(**images)
    options = {"recipe": recipe, "source_recipe": l2sp.Recipe.source(recipe), "widths": (4,), "depths": (1,)}
    options |= {"source": "imagenet2012", "target": "stanford_dogs", "weights": str(anchors) if weights == "anchors" else weights}
    options |= {"backbone": "resnet50" if weights.endswith(".keras") else "small"}
    (record,) = run_plan(plan(workdir=workdir, penalties=("l2_sp",), seeds=(0,), **options), say=lambda line: None)
    (folder,) = (path.parent for path in workdir.glob("runs/*/run.json"))
    return record, folder


def right_of(predictions, classes):
    return [file.split("/")[-2] == classes[label] for file, label in zip(predictions.files, predictions.labels, strict=True)]


@pytest.fixture(scope="module")
def finished(tasks, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tasks)
        return run(tmp_path_factory.mktemp("w"), WAYS[0])


@pytest.mark.filterwarnings("ignore:The source accuracy")
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_files_of_a_run_repeat_its_record_to_the_last_image(way, tasks, finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tasks)
    record, folder = finished if way == WAYS[0] else run(tmp_path, way, finished[1] / "anchors.safetensors")
    assert record["classes"] == ["no", "yes"]
    # a .keras file brings its own network, which the backbone flag does not name
    assert record["settings"]["backbone"] == ("small_resnet" if way[3].endswith(".keras") else "small")
    assert (record["settings"]["anchors"] == finished[0]["settings"]["anchors"]) == (way in (WAYS[0], WAYS[3]))
    predictions = l2sp.predict_images(folder, "stanford_dogs/test")
    assert [file.split("/")[-2] for file in predictions.files] == ["no"] * 9 + ["yes"] * 9
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(record["results"]["right"]), np.uint8))[:18]
    assert right_of(predictions, record["classes"]) == list(bits.astype(bool))
    files = (str(folder / name) for name in ("model.keras", "anchors.safetensors"))
    report = report_of_files(*files, source="imagenet2012")
    assert report.accuracies == record["results"]["source"]
    # a file of an earlier version lacks the interface, but the record beside it has it
    old = shutil.copytree(folder, tmp_path / "old")
    strip(old / "model.keras")
    again = l2sp.predict_images(old / "model.keras", "stanford_dogs/test")
    np.testing.assert_array_equal(again.probabilities, predictions.probabilities)
    assert again.table() == predictions.table()


def strip(path):
    """Removes the interface from a model's file."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist() if name != keras_files.INTERFACE_MEMBER}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_run_stores_how_its_images_are_made_and_the_class_of_each_output(finished):
    _, folder = finished
    found = keras_files.stored_interface(folder / "model.keras")
    assert (found.resize, found.crop, found.resize_mode, found.resize_filter) == (8, 6, "shorter_side", "bilinear")
    assert (found.classes, found.mean, found.crops) == (("no", "yes"), "training", 1)
    assert found.pixels == keras_files.stored_pixels(folder / "model.keras") and found.pixels.mean is not None
    assert keras.models.load_model(folder / "model.keras").output_shape == (None, 2)  # Keras ignores the extra entry


def test_given_settings_must_agree_with_the_file(finished):
    _, folder = finished
    path = folder / "model.keras"
    model = keras_files.load_model(path)
    stored = keras_files.stored_interface(path)
    agreeing = {"pixels": "rgb", "mean": stored.pixels.mean, "resize": 8, "resize_mode": "shorter_side"}
    assert interface_at(path, model, **agreeing, resize_filter=None) == stored
    for name, value in [("resize", 9), ("resize_mode", "squash"), ("resize_filter", "area"), ("mean", (1, 2, 3))]:
        with pytest.raises(l2sp.InputError, match=f"{name} is .*: leave --{name} out"):
            interface_at(path, model, **{name: value})
    with pytest.raises(l2sp.InputError, match="--pixels says bgr"):
        interface_at(path, model, pixels="bgr")


def test_a_file_without_settings_needs_the_pixels_and_warns_of_what_it_assumes(finished, tmp_path):
    _, folder = finished
    stored = keras_files.stored_interface(folder / "model.keras")
    model = keras_files.load_model(folder / "model.keras")
    model.save(tmp_path / "plain.keras")
    path = tmp_path / "plain.keras"
    assert keras_files.stored_interface(path) is None
    with pytest.raises(l2sp.InputError, match="give --pixels="):
        interface_at(path, model)
    with pytest.warns(UserWarning, match="assuming --resize=7, --resize_filter=area"):
        made = interface_at(path, model, pixels="rgb", mean=("1", "2", "3"), resize_mode="shorter_side")
    assert made == Interface(PIXELS["rgb"].with_mean((1, 2, 3)), 7, "shorter_side", "area", 6)
    images = {"resize": 8, "resize_mode": "shorter_side", "resize_filter": "bilinear"}
    made = interface_at(path, model, pixels="rgb", mean=stored.pixels.mean, **images)
    assert preprocessing_for(made) == preprocessing_for(stored)


def test_an_interface_reads_back_what_it_wrote_and_refuses_anything_else():
    one = Interface(BGR, 300, "squash", "area", 224, 10, (1, 2, 3), ("é", "b,c", ""))
    assert Interface.from_json(one.to_json(), BGR, "x") == one
    values = json.loads(one.to_json())
    changes = [("resize", 0), ("resize", 2**20), ("resize", True), ("crop", "6"), ("crops", 1.0), ("mean", [1, 2])]
    changes += [("classes", "abc"), ("classes", []), ("classes", [1]), ("resize_mode", None), ("more", 1)]
    for name, value in changes:
        with pytest.raises(l2sp.InputError, match=r"What x says of its images and classes is damaged .*: use another copy"):
            Interface.from_json(json.dumps({**values, name: value}), BGR, "x")
    for text in ("", "[]", "{}", '{"resize": NaN}'):
        with pytest.raises(l2sp.InputError, match="What x says"):
            Interface.from_json(text, BGR, "x")
    assert math.isqrt(178_956_970) == 13377
