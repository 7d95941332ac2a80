"""Networks that rescale pixels themselves are found, and get pixels as they are."""

import importlib

import keras
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf import data
from l2sp_tf.models.pixels import PIXELS
from l2sp_tf.models.rescaling import rescaling_of
from l2sp_tf.models.zoo import APPLICATIONS, pixels_of, pixels_of_application

layers = keras.layers
CHEAP = ("EfficientNetB0", "ConvNeXtTiny", "MobileNetV3Small", "MobileNet", "MobileNetV2", "ResNet50")


@pytest.mark.parametrize("name", [n if n in CHEAP else pytest.param(n, marks=pytest.mark.slow) for n in APPLICATIONS.values()])
def test_applications_rescale_themselves_or_behind_preprocess_input(name):
    build = getattr(keras.applications, name)
    size = 224 if name.startswith("VGG") else 75
    model = build(weights=None, input_shape=(size, size, 3), classes=3)
    assert (rescaling_of(model) is not None) == pixels_of_application(name.lower()).is_raw
    inputs = keras.Input((size, size, 3))
    whole = keras.Model(inputs, model(importlib.import_module(build.__module__).preprocess_input(inputs)))
    assert rescaling_of(whole) is not None


def network(*first, last=()):
    inputs = x = keras.Input((8, 8, 3))
    for layer in (*first, layers.Conv2D(2, 3), *last, layers.GlobalAveragePooling2D(), layers.Dense(2)):
        x = layer(x)
    return keras.Model(inputs, x)


@pytest.mark.parametrize(
    ("first", "last", "found"),
    [
        ((layers.Rescaling(1 / 255, name="a"),), (), "a"),
        (
            (
                layers.RandomFlip(),
                layers.Resizing(8, 8),
                layers.Normalization(name="b"),
            ),
            (),
            "b",
        ),
        ((keras.Sequential([layers.RandomFlip(), layers.Rescaling(1 / 127.5, -1, name="c")]),), (), "c"),
        ((), (layers.Rescaling(2.0),), None),
        ((layers.BatchNormalization(),), (), None),
        ((layers.ZeroPadding2D(1),), (layers.Normalization(),), None),
        ((layers.Dropout(0.1), layers.Rescaling(2.0)), (), None),
    ],
)
def test_only_what_comes_before_all_weights_counts(first, last, found):
    for layer in first:
        if isinstance(layer, layers.Normalization):
            layer.build((None, 8, 8, 3))
    assert rescaling_of(network(*first, last=last)) == found


def dataset(folder):
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for label in ("a", "b"):
            (folder / part / label).mkdir(parents=True)
            for i in range(4):
                image = rng.integers(0, 256, (8, 8, 3)).astype("uint8")
                keras.utils.save_img(folder / part / label / f"{i}.png", image, scale=False)
    return data.load_dataset(folder)


RECIPE = l2sp.Recipe(iterations=1, batch_size=4).replace(resize=8, crop=8, blur="none", mirror=False)


def test_fine_tuning_gives_it_raw_pixels_and_refuses_others(tmp_path, capsys):
    images, model = dataset(tmp_path), network(layers.Rescaling(1 / 255, name="rescale"))
    for pixels in (None, "raw"):
        run = l2sp.finetune(model, images, l2sp.L2SP(0.1), RECIPE, pixels=pixels, verbose=0)
        assert run.interface.pixels == PIXELS["raw"] and run.interface.mean == "weights"
    for pixels in ("rgb", "bgr", "torch", "tf"):
        with pytest.raises(l2sp.InputError, match=r"rescales pixels itself \('rescale'\), but would get them as"):
            l2sp.finetune(model, images, l2sp.L2SP(0.1), RECIPE, pixels=pixels, verbose=0)
        with pytest.raises(l2sp.InputError, match=r"rescales pixels itself"):
            l2sp.cross_validate(model, images, l2sp.L2SP, RECIPE, pixels=pixels, alphas=[1], folds=2)
    with pytest.raises(l2sp.InputError, match="rescales pixels itself"):  # the authors' networks do not
        l2sp.finetune(model, images, l2sp.L2SP(0.1), RECIPE.replace(mean="authors"), verbose=0)
    by_name = l2sp.finetune(model, images, l2sp.L2SP(0.1), RECIPE.replace(mean="training"), pixels="rgb", verbose=0)
    assert by_name.interface.pixels.mean != (0, 0, 0) and by_name.interface.mean == "training"


def test_others_still_have_to_say(tmp_path):
    images = dataset(tmp_path)
    for run in (l2sp.finetune, lambda *given: l2sp.cross_validate(given[0], given[1], l2sp.L2SP, given[3], alphas=[1], folds=2)):
        with pytest.raises(l2sp.InputError, match="pixels was not given: say how .* 'raw' or 'tf'"):
            run(network(), images, l2sp.L2SP(0.1), RECIPE)


def test_a_whole_model_that_rescales_sees_raw_pixels(tmp_path):
    network(layers.Rescaling(1 / 255)).save(tmp_path / "m.keras")
    assert pixels_of(tmp_path / "m.keras") == PIXELS["raw"]
    network().save(tmp_path / "n.keras")
    with pytest.raises(l2sp.InputError, match="does not say how its weights see pixels"):
        pixels_of(tmp_path / "n.keras")
