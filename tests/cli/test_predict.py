"""The command `predict`: the answers of `eval.py --predict`, and one sentence for a mistake."""

import keras
import numpy as np
import pytest
from PIL import Image

from l2sp_tf.cli import eval as evaluation, predict
from l2sp_tf.models import keras_files
from l2sp_tf.models.pixels import Interface, PixelFormat

INTERFACE = Interface(PixelFormat("rgb", mean=(1, 2, 3)), 8, "squash", "area", 6, classes=("cat", "dog"))


@pytest.fixture
def files(tmp_path):
    """The paths of a model, a folder of two images, and one more image."""
    rng = np.random.default_rng(0)
    (tmp_path / "folder").mkdir()
    for name in ("folder/a.png", "folder/b.png", "c.png"):
        Image.fromarray(rng.integers(0, 256, size=(9, 9, 3), dtype=np.uint8)).save(tmp_path / name)
    inputs = keras.Input((6, 6, 3))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(inputs)))
    keras_files.save_model(model, tmp_path / "model.keras", INTERFACE)
    return tmp_path / "model.keras", tmp_path / "folder", tmp_path / "c.png"


def test_it_answers_as_eval_does(files, tmp_path, capsys):
    model, folder, image = files
    assert predict.main([str(folder), str(image), f"--model={model}"]) == 0
    text = (tmp_path / "predictions.csv").read_text()
    assert text.splitlines()[0] == "file,class,probability" and len(text.splitlines()) == 4
    assert "| file" in capsys.readouterr().out
    to = f"--output={tmp_path / 'again.csv'}"
    assert predict.main([str(folder), str(image), f"--workdir={tmp_path}", to]) == 0
    assert (tmp_path / "again.csv").read_text() == text
    for given in ([f"--predict={folder}", f"--predict={image}"], [f"--predict={folder},{image}"]):
        assert evaluation.main([*given, f"--model={model}", f"--output={tmp_path / 'eval.csv'}"]) == 0
        assert (tmp_path / "eval.csv").read_text() == text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "No image is named"),
        (["x.png"], "Give either --model, a .keras file, or --workdir"),
        (["x.png", "--model=m.keras", "--workdir=w"], "Give either --model"),
        (["x.png", "--picsels=rgb"], "did you mean --pixels?"),
    ],
)
def test_a_mistake_is_one_sentence(words, message, capsys):
    assert predict.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
