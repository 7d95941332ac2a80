"""Starts: they decode only the images they use, and read earlier measurements."""

import json
import pathlib
import shutil

import keras
import numpy as np
import pytest
from PIL import Image
from published import write_published
from test_plans import plan
from test_store import decoded  # noqa: F401

import l2sp_tf as l2sp
from l2sp_tf.experiments import plans, runner, starts
from l2sp_tf.experiments.forecast import Forecast, Work
from l2sp_tf.experiments.plans import FisherPlan
from l2sp_tf.models import zoo
from l2sp_tf.models.pixels import PIXELS
from l2sp_tf.penalties.anchors import Anchors
from l2sp_tf.training.recipe import Recipe

RECIPE = Recipe.digits().replace(iterations=12, batch_size=8)
SHAPE = {"widths": (4,), "depths": (1,)}
TRAIN, TEST = 12, 3  # images per class
MEAN = (10.0, 20.0, 30.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sets of two classes with distinct images, and two weights files: one with a mean, one without."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("source", "target"):
        for split, count in (("train", TRAIN), ("test", TEST)):
            for label in "ab":
                (root / name / split / label).mkdir(parents=True)
                for i in range(count):
                    pixels = rng.integers(0, 256, (12, 11, 3), np.uint8)
                    Image.fromarray(pixels).save(root / name / split / label / f"{i}.png")
    model = zoo.backbone("small", 2, image_size=RECIPE.images.crop, **SHAPE)
    Anchors.of(model, {"pixels": PIXELS["rgb"].with_mean(MEAN).plain()}).save(root / "with_mean.safetensors")
    Anchors.of(model, {"pixels": PIXELS["rgb"].plain()}).save(root / "without.safetensors")
    return root


@pytest.fixture
def large(monkeypatch):
    """Treats a source of more than 20 images as large, samples 5 of them, and keeps pixels in the store."""
    monkeypatch.setattr(plans, "LARGE", 20)
    monkeypatch.setattr(plans, "LARGE_SAMPLE", 5)
    store_all(monkeypatch)


def store_all(monkeypatch):
    from l2sp_tf.data import decoding

    monkeypatch.setitem(decoding.decode.__kwdefaults__, "memory_limit_bytes", 0)
    monkeypatch.setattr("l2sp_tf.experiments.forecast.MEMORY_LIMIT_BYTES", 0)


def made(folder, workdir, weights="with_mean", **changes):
    recipe = changes.get("recipe", RECIPE)
    options = {"source": str(folder / "source"), "target": str(folder / "target"), "recipe": recipe, "penalties": ("l2_sp",)}
    options |= {"source_recipe": Recipe.source(recipe).replace(iterations=4), "alphas": (0.1,), "seeds": (0,)}
    options |= {"fisher": FisherPlan(transforms=())}  # the random network is so confident that every F_jj is 0
    weights = weights if weights == "none" else str(folder / f"{weights}.safetensors")
    return plan(workdir=workdir, weights=weights, **{"save_models": False, **options, **SHAPE, **changes})


def run(plan, **options):
    said = []
    return runner.run_plan(plan, say=said.append, **options), said


def used(folder, *, train=0):
    """The images that runs use, with `train` of the source's training images."""
    everything = lambda part: {str(path) for path in (folder / part).rglob("*.png")}  # noqa: E731
    order = starts.sample_order(range(2 * TRAIN))[:train]
    listed = [str(folder / f"source/train/{c}/{i}.png") for c in "ab" for i in sorted(map(str, range(TRAIN)))]
    return everything("target") | everything("source/test") | {listed[i] for i in order}


CASES = {
    "the weights have the mean": ({}, 0),
    "F_jj of a sample": ({"penalties": ("l2_sp", "l2_sp_fisher")}, 5),
    "F_jj of a few": ({"penalties": ("l2_sp_fisher",), "fisher": FisherPlan(images=3, transforms=())}, 3),
    "F_jj of more": ({"penalties": ("l2_sp_fisher",), "fisher": FisherPlan(images=17, transforms=())}, 17),
    "the mean is unknown": ({"weights": "without"}, 5),
    "the mean is given": ({"weights": "without", "recipe": RECIPE.replace(mean=MEAN)}, 0),
    "the source model is trained": ({"weights": "none"}, 2 * TRAIN),
}


@pytest.mark.parametrize("case", CASES)
def test_a_start_decodes_once_what_it_uses_and_announced(folder, tmp_path, large, decoded, case):  # noqa: F811
    changes, train = CASES[case]
    asked = made(folder, tmp_path, **changes)
    outline = starts.outline(asked, say=lambda line: None)
    forecast = Forecast([Work(outline, tuple(asked.runs()), outline.trains_source)])
    assert decoded == [] and not (tmp_path / "sources").exists()  # a dry run decodes and trains nothing
    expected = used(folder, train=train)
    assert forecast.images == len(expected) and forecast.pixels_bytes == len(expected) * RECIPE.images.resize**2 * 3
    for again in range(2):
        start = starts.prepare_start(asked, say=lambda line: None)
        if "l2_sp_fisher" in asked.sweep.penalties:
            assert start.fisher.provenance["images"] == train
        assert sorted(decoded) == ([] if again else sorted(expected))
        assert start.mean_of == (5 if case == "the mean is unknown" else None)
        if case in ("the weights have the mean", "the mean is given"):
            assert start.source.mean.tolist() == list(MEAN)
        del decoded[:]
    assert Forecast([Work(starts.outline(asked, say=lambda line: None), (), False)]).images == 0


def test_runs_decode_no_more_than_their_start(folder, tmp_path, large, decoded):  # noqa: F811
    asked = made(folder, tmp_path, penalties=("l2_sp", "l2_sp_fisher"))
    found, said = run(asked)
    assert sorted(decoded) == sorted(used(folder, train=5)) and len(found) == 2
    assert [line.partition(":")[0] for line in said[2:4]] == ["plan", "disk"]
    assert sum(line.startswith("time: about 0:0") for line in said) == 1
    del decoded[:]
    assert run(asked)[0] == found and decoded == []


def test_a_small_source_is_used_whole(folder, tmp_path, decoded):  # noqa: F811
    asked = made(folder, tmp_path, weights="without", penalties=("l2_sp_fisher",))
    (record,), said = run(asked)
    pixels = np.stack([np.array(Image.open(path).resize((10, 10))) for path in (folder / "source/train").rglob("*.png")])
    np.testing.assert_allclose(record["settings"]["source_mean"], pixels.mean(axis=(0, 1, 2)), atol=3)
    assert record["fisher"]["images"] == 2 * TRAIN and "source_mean_of" not in record["settings"]
    assert set(decoded) == used(folder, train=2 * TRAIN)


def test_an_unused_bad_image_does_not_matter_and_used_ones_are_reported_first(folder, tmp_path, large):
    shutil.copytree(folder, tmp_path / "data")
    unused = sorted(used(tmp_path / "data", train=24) - used(tmp_path / "data", train=5))
    pathlib.Path(unused[0]).write_bytes(b"")
    fisher = made(tmp_path / "data", tmp_path / "w", penalties=("l2_sp_fisher",))
    assert run(fisher)[0]
    taken = sorted(used(tmp_path / "data", train=5) - used(tmp_path / "data"))[0]
    for bad in (taken, str(tmp_path / "data/target/test/b/2.png"), str(tmp_path / "data/source/test/a/0.png")):
        content = pathlib.Path(bad).read_bytes()
        pathlib.Path(bad).write_bytes(b"")
        with pytest.raises(l2sp.InputError, match=bad):
            run(fisher.replace(workdir=tmp_path / "x"))
        assert not (tmp_path / "x/runs").exists() and not (tmp_path / "x/fisher").exists()
        pathlib.Path(bad).write_bytes(content)


def test_the_source_accuracy_is_measured_once(folder, tmp_path, monkeypatch):
    asked = made(folder, tmp_path)
    (record,), _ = run(asked)
    with monkeypatch.context() as patched:
        patched.setattr(starts, "evaluate", lambda *args, **kwargs: 1 / 0)
        ((again, _), _) = run(asked.replace(seeds=(0, 1)))
    assert again == record
    (path,) = (tmp_path / "before").glob("*.json")
    path.write_text("{")
    starts.prepare_start(asked, say=lambda line: None)
    assert json.loads(path.read_text()) == record["results"]["source"]["before"]


def test_only_this_plans_records_count(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Forecast, "measured_time", lambda self: "")
    asked = made(folder, tmp_path, penalties=("l2_sp", "l2_sp_fisher"), recipe=RECIPE.replace(iterations=1))
    run(asked)

    def left(**changes):
        _, said = run(asked.replace(**changes), dry_run=True)
        return [line for line in said if line.startswith("plan: ")]

    assert left() == ["plan: 0 runs on folds, then 2 runs; 0 are left"]
    assert left(seeds=(0, 1)) == ["plan: 0 runs on folds, then 4 runs; 2 are left"]
    for changes in (
        {"alphas": (0.2,)},
        {"recipe": asked.setup.recipe.replace(blur="authors")},
        {"recipe": asked.setup.recipe.replace(mean=MEAN)},
        {"per_class": 3},
        {"target": str(folder / "source")},
        {"weights": "none"},
    ):
        assert left(**changes) == ["plan: 0 runs on folds, then 2 runs; 2 are left"], changes
    others = {"images": 3}, {"mode": "mc"}, {"samples": 2}, {"transforms": (("clip", 1.0),)}
    for fisher in (FisherPlan(**{"transforms": (), **other}) for other in others):
        assert left(fisher=fisher) == ["plan: 0 runs on folds, then 2 runs; 1 are left"], fisher


def test_starts_are_prepared_once_and_held_no_longer_than_needed(folder, tmp_path, monkeypatch):
    asked = [made(folder, tmp_path, per_class=n, seeds=(0, 1), alphas=(0.1,), frozen=(0,)) for n in (2, 3, 4, 5, 6)]
    prepared, held = [], []
    prepare = runner.prepare_start
    monkeypatch.setattr(runner, "prepare_start", lambda plan, **o: prepared.append(plan.setup.per_class) or prepare(plan, **o))

    def spied(start, *args):
        held.append(sorted(start.plan.setup.per_class for start in runner._STARTS.values()))
        return {}

    monkeypatch.setattr(runner, "_run", spied)
    runner.run_plans(asked, say=lambda line: None)
    assert prepared == [2, 3, 4, 5, 6] and not runner._STARTS
    assert held == [list(range(n, 7)) for n in (2, 3, 4, 5, 6) for _ in range(2)]
    monkeypatch.setattr(runner, "prepare_start", lambda plan, **o: plan.setup.per_class)
    kept = []
    for n in (0, 0, 1, 0):  # as in a Ray worker, which has no pending jobs
        runner._start_of(asked[n], print, 0)
        kept.append(list(runner._STARTS.values()))
    runner._STARTS.clear()
    assert kept == [[2], [2], [3], [2]]


def test_a_network_that_rescales_pixels_gets_them_raw_unless_the_mean_is_named(folder, tmp_path):
    layers = keras.layers
    inner = keras.Sequential([layers.RandomFlip(), layers.Rescaling(1 / 255)])
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(layers.Conv2D(3, 3)(inner(inputs)))))
    model.save(tmp_path / "m.keras")

    def outline(mean=None, **changes):
        recipe = RECIPE.replace(mean=mean)
        asked = made(folder, tmp_path, recipe=recipe, source_recipe=Recipe.source(recipe))
        return starts.outline(asked.replace(weights=str(tmp_path / "m.keras"), **changes), say=lambda line: None)

    said = outline()
    assert said.pixels == PIXELS["raw"]
    for task in said.tasks:
        np.testing.assert_array_equal(task.mean, [0, 0, 0])
    for mean in ("training", MEAN):
        assert outline(mean).tasks[0].mean.all()  # the source's stay as its training saw them
    np.testing.assert_array_equal([task.mean for task in outline(MEAN).tasks], np.float32([MEAN, MEAN]))
    for changes in ({"pixels": "rgb"}, {"pixels": "tf"}, {"pixels": "bgr"}, {"mean": "authors"}):
        with pytest.raises(l2sp.InputError, match="rescales pixels itself"):
            outline(**changes)


KINDS = {  # how it sees pixels: a network, and the module of its preprocess_input
    "bgr": ("ResNet50", keras.applications.resnet),
    "tf": ("MobileNetV2", keras.applications.mobilenet_v2),
    "raw": ("MobileNetV3Small", keras.applications.mobilenet_v3),
    "torch": ("DenseNet121", keras.applications.densenet),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in ("bgr", "torch") else ()) for kind in KINDS]
)
def test_source_accuracy_is_that_of_keras_own_predict_on_raw_images(kind, tmp_path):
    """Two thirds of the images lie in the class that Keras predicts for them, near the border between both classes."""
    name, module = KINDS[kind]
    rng, side = np.random.default_rng(0), 32
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(side, side, 3), classes=2, classifier_activation=None, name=name.lower()
    )
    coarse = rng.integers(0, 256, (60, 4, 4, 3)).astype(np.uint8)
    images = np.stack([Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC) for image in coarse])
    head = [layer for layer in model.layers if layer.weights][-1]
    kernel, _ = head.get_weights()
    difference = model.predict(module.preprocess_input(images.astype("float32")), verbose=0) @ [-1, 1]
    spread = 1 / difference.std()  # the random network hardly tells images apart
    head.set_weights([kernel * spread, np.array([np.median(difference) * spread, 0])])
    z = model.predict(module.preprocess_input(images.astype("float32")), verbose=0)
    write_published(tmp_path / "w.h5", model)
    for i, (image, predicted) in enumerate(zip(images, z.argmax(1), strict=True)):
        for split in ("train", "test"):
            folder = tmp_path / "data" / split / "ab"[predicted if i % 3 else 1 - predicted]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{i}.png")
    data = str(tmp_path / "data")
    recipe = Recipe().replace(resize=side, crop=side, iterations=1)
    changes = {
        "source": data,
        "target": data,
        "weights": str(tmp_path / "w.h5"),
        "backbone": name,
        "recipe": recipe,
        "source_recipe": recipe,
    }
    before = starts.prepare_start(plan(workdir=tmp_path / "runs", **changes), say=lambda line: None).before
    assert 20 < (z.argmax(1) == 0).sum() < 40
    assert before["correct"] == 40
