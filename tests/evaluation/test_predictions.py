"""Predictions for new images: they are the answers of `evaluate`, and bad images are refused or left out with a warning."""

import csv
import pathlib

import keras
import numpy as np
import pytest
from PIL import Image

import l2sp_tf as l2sp
from l2sp_tf.cli.eval import main
from l2sp_tf.data import load_dataset, prepare
from l2sp_tf.data.pipeline import preprocessing_for
from l2sp_tf.models import keras_files
from l2sp_tf.models.pixels import Interface, PixelFormat

CLASSES = ("a", "b,c", "é")
INTERFACE = Interface(PixelFormat("bgr", mean=(10, 20, 30)), 8, "shorter_side", "bilinear", 6, classes=CLASSES)


def classifier(activation=None, units=3):
    keras.utils.set_random_seed(2)
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Flatten()(keras.layers.Rescaling(0.01)(inputs))
    return keras.Model(inputs, keras.layers.Dense(units, activation=activation)(x))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder <split>/<class>/<number>.png with three classes, and some files that are not images."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(5):
                pixels = rng.integers(0, 256, size=(*rng.integers(7, 20, size=2), 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("crops", [1, 10])
@pytest.mark.parametrize("activation", [None, "softmax"])
def test_predictions_are_the_answers_of_evaluate(activation, crops, images):
    model = classifier(activation)
    interface = Interface(**{**vars(INTERFACE), "crops": crops})
    task = prepare(load_dataset(images), preprocessing_for(interface), mean=interface.pixels.mean)
    expected = l2sp.evaluate(model, task, crops=crops, answers=True)
    found = l2sp.predict_images(model, images / "test", interface, batch_size=4 * crops)
    names = [pathlib.Path(file).parent.name for file in found.files]
    assert [CLASSES[label] == name for label, name in zip(found.labels, names, strict=True)] == list(expected["right"])
    assert 0 < expected["correct"] < 15
    batches = l2sp.data.test_batches(task.test, task.preprocessing, task.mean, batch_size=15, crops=crops)
    x = next(iter(batches))[0].numpy().reshape(-1, 6, 6, 3)
    p = model(x).numpy().astype("float64")
    p = p if activation else np.exp(p) / np.exp(p).sum(axis=1, keepdims=True)
    p = p.reshape(15, crops, 3).mean(axis=1)
    np.testing.assert_allclose(found.probabilities, p.max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(found.labels, p.argmax(axis=1))


def test_one_sigmoid_gives_two_classes(images):
    model, interface = classifier("sigmoid", units=1), Interface(**{**vars(INTERFACE), "classes": ("no", "yes")})
    files = sorted((images / "test").rglob("*.png"))
    p = l2sp.predict_images(model, files, interface)
    logits = np.log(p.probabilities / (1 - p.probabilities)) * np.where(p.labels == 1, 1, -1)
    model.layers[-1].bias.assign([-np.median(logits) - 1e-3])
    found = l2sp.predict_images(model, files, interface)
    np.testing.assert_array_equal(found.labels, logits > np.median(logits) + 1e-3)
    assert found.labels.sum() == 7 and found.probabilities.min() >= 0.5


def test_files_are_read_once_in_order_and_others_are_left_out_with_a_warning(images, tmp_path):
    first, second = (images / "test" / "a" / f"{n}.png" for n in (3, 1))
    found = l2sp.predict_images(classifier(), [first, str(second), first], INTERFACE)
    assert found.files == (str(first), str(second))
    whole = l2sp.predict_images(classifier(), images / "test", INTERFACE)
    for file, label, p in zip(found.files, found.labels, found.probabilities, strict=True):
        at = whole.files.index(file)
        assert whole.labels[at] == label and whole.probabilities[at] == pytest.approx(p, rel=1e-6)
    for name in ("a.PNG", "b/c.jpeg", ".hidden/d.png", ".e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.warns(UserWarning, match="1 files are not .* and were left out, such as .*notes.txt"):
        found = l2sp.predict_images(classifier(), tmp_path, INTERFACE)
    assert [pathlib.Path(file).name for file in found.files] == ["a.PNG", "c.jpeg"]


def test_bad_images_are_refused_or_left_out_with_a_warning(images, tmp_path):
    good = images / "test" / "a" / "0.png"
    (tmp_path / "bad.png").write_bytes(good.read_bytes()[:60])
    (tmp_path / "empty").mkdir()
    both = [tmp_path / "bad.png", good]
    with pytest.raises(l2sp.InputError, match=r"1 of 2 images cannot be decoded: .*bad.png"):
        l2sp.predict_images(classifier(), both, INTERFACE)
    with pytest.warns(UserWarning, match=r"1 images were left out .*bad.png"):
        found = l2sp.predict_images(classifier(), both, INTERFACE, skip_bad_images=True)
    assert found.files == (str(good),) and found.skipped == (str(both[0]),) and len(found.labels) == 1
    for none, message in [(tmp_path / "empty", "no images in"), (tmp_path / "x.png", "no image .*x.png"), ([], "an empty list")]:
        with pytest.raises(l2sp.InputError, match=message):
            l2sp.predict_images(classifier(), none, INTERFACE)


def test_an_interface_that_does_not_fit_is_refused(images, tmp_path):
    with pytest.raises(l2sp.InputError, match="has 4 outputs, but 3 classes are named"):
        l2sp.predict_images(classifier(units=4), images, INTERFACE)
    with pytest.raises(l2sp.InputError, match="interface is missing or has no mean"):
        l2sp.predict_images(classifier(), images)
    two = classifier()
    with pytest.raises(l2sp.InputError, match="has 2 outputs"):
        l2sp.predict_images(keras.Model(two.inputs, [two.outputs[0], two.outputs[0] + 1]), images, INTERFACE)
    broken = classifier()
    broken.layers[-1].bias.assign([np.nan, 0, 0])
    with pytest.raises(l2sp.InputError, match="gives NaN"):
        l2sp.predict_images(broken, images, INTERFACE)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "runs" / "one" / "model.keras").write_bytes(b"")
    with pytest.raises(l2sp.InputError, match="There is no model.keras in .*one of the runs under it, such as .*one"):
        l2sp.predict_images(tmp_path, images)


@pytest.fixture
def eval_py(capsys):
    """Calls eval.py in this process: (status, what it printed, its errors and warnings)."""
    return lambda *words: (main([*map(str, words)]), *capsys.readouterr())


def test_the_command_writes_a_csv_and_prints_a_table(images, tmp_path, eval_py):
    model, path = classifier(), tmp_path / "model.keras"
    keras_files.save_model(model, path, INTERFACE)
    expected = l2sp.predict_images(model, images / "test", INTERFACE)
    status, printed, errors = eval_py(f"--predict={images / 'test'}", f"--model={path}")
    assert status == 0, errors
    rows = list(csv.reader((tmp_path / "predictions.csv").open(encoding="utf-8")))
    assert rows[0] == ["file", "class", "probability"] and len(rows) == 16
    assert [(file, name) for file, name, _ in rows[1:]] == [
        (file, CLASSES[label]) for file, label in zip(expected.files, expected.labels, strict=True)
    ]
    np.testing.assert_allclose([float(p) for *_, p in rows[1:]], expected.probabilities, atol=1e-4)
    assert "| file" in printed and f"wrote {tmp_path / 'predictions.csv'}" in printed
    one = images / "test" / "b,c" / "0.png"  # the name contains a comma
    (tmp_path / "run").mkdir()
    path.rename(tmp_path / "run" / "model.keras")
    status, printed, _ = eval_py(f"--predict={one}", f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'x.csv'}")
    assert status == 0 and len((tmp_path / "x.csv").read_text(encoding="utf-8").splitlines()) == 2
    status, _, error = eval_py(f"--predict={tmp_path / 'none'}", f"--workdir={tmp_path / 'run'}")
    assert status == 2 and error.startswith("error: There is no image") and error.count("\n") == 1
    status, _, error = eval_py(f"--predict={one}", f"--workdir={tmp_path / 'run'}", "--resize=9")
    assert status == 2 and "resize is 9" in error and "was trained with 8: leave --resize out" in error
    status, _, error = eval_py(f"--predict={one}", f"--workdir={tmp_path / 'run'}", "--mean=1,2,3")
    assert status == 2 and "mean is 1,2,3" in error and "was trained with 10.0,20.0,30.0: leave --mean out" in error


def test_a_long_table_is_cut_on_the_screen_alone():
    found = l2sp.Predictions(tuple("abcde"), np.arange(5) % 2, np.linspace(0.5, 1, 5), ("no", "yes"))
    assert len(found.table().rows) == 5 and not found.table().notes
    short = found.table(2)
    assert short.rows == [("a", "no", "0.5000"), ("b", "yes", "0.6250")] and short.notes == "and 3 more images"
