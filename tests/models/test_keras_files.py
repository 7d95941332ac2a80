"""Weights files round-trip, say how their weights see pixels, and are refused if they do not fit."""

import functools
import re

import h5py
import numpy as np
import pytest
from published import write_published

import l2sp_tf as l2sp
from l2sp_tf.models import keras_files, zoo
from l2sp_tf.models.pixels import PIXELS, PixelFormat


def tiny(classes=3, **kwargs):
    return zoo.small_resnet((8, 8, 3), classes, **{"widths": (4, 8), "depths": (1, 2), **kwargs})


@pytest.mark.parametrize("ending", [".safetensors", ".weights.h5", ".keras"])
def test_weights_files_round_trip_and_misfits_are_refused(ending, tmp_path):
    model, path = tiny(), tmp_path / f"m{ending}"
    {
        ".safetensors": lambda: l2sp.Anchors.of(model).save(path),
        ".weights.h5": lambda: model.save_weights(path),
        ".keras": lambda: model.save(path),
    }[ending]()
    other = zoo.backbone("small", 3, image_size=8, weights=str(path), widths=(4, 8), depths=(1, 2))
    for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    for misfit in (tiny(classes=4), tiny(depths=(1, 1))):
        with pytest.raises(l2sp.InputError, match="architecture"):
            keras_files.load_weights(misfit, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(l2sp.InputError):
        keras_files.load_weights(tiny(), path)


def test_missing_and_unknown_weights_files_are_refused(tmp_path):
    with pytest.raises(l2sp.InputError, match="no weights file"):
        keras_files.load_weights(tiny(), tmp_path / "none.safetensors")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(l2sp.InputError, match="unknown kind"):
        keras_files.load_weights(tiny(), tmp_path / "weights.bin")


@pytest.mark.parametrize("ending", [".safetensors", ".keras"])
def test_files_carry_the_pixel_format_of_their_weights(ending, tmp_path):
    pixels, path = PixelFormat("bgr", (0.5, 1, 2), (1, 2, 3)), tmp_path / f"m{ending}"
    model = tiny()
    if ending == ".keras":
        keras_files.save_model(model, path, pixels)
    else:
        l2sp.Anchors.of(model, {"pixels": pixels.plain()}).save(path)
    assert keras_files.stored_pixels(path) == zoo.pixels_of(path) == zoo.pixels_of(str(path), pixels) == pixels
    other = tiny()
    keras_files.load_weights(other, path)
    for one, two in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    with pytest.raises(l2sp.InputError, match=f"m{ending} sees pixels as bgr, scale 0.5/1/2, mean 1/2/3, but --pixels says rgb"):
        zoo.pixels_of(path, "rgb")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(l2sp.InputError, match="damaged"):
        zoo.pixels_of(path)


@pytest.mark.parametrize("ending", [".safetensors", ".keras", ".weights.h5"])
def test_files_without_a_pixel_format_need_the_flag(ending, tmp_path):
    path = tmp_path / f"m{ending}"
    model = tiny()
    {
        ".safetensors": lambda: l2sp.Anchors.of(model).save(path),
        ".weights.h5": lambda: model.save_weights(path),
        ".keras": lambda: model.save(path),
    }[ending]()
    with pytest.raises(l2sp.InputError, match=f"m{ending} does not say .* give --pixels=rgb, bgr, torch, raw or tf"):
        zoo.pixels_of(path)
    assert zoo.pixels_of(path, "torch") == PIXELS["torch"]
    with pytest.raises(l2sp.InputError, match="no weights file"):
        zoo.pixels_of(tmp_path / f"none{ending}")


def test_the_head_of_a_file_is_counted(tmp_path):
    l2sp.Anchors.of(tiny(classes=7)).save(tmp_path / "m.safetensors")
    assert keras_files.head_classes(tmp_path / "m.safetensors") == 7
    l2sp.Anchors({"a/kernel": np.zeros(3)}).save(tmp_path / "n.safetensors")
    assert keras_files.head_classes(tmp_path / "n.safetensors") is keras_files.head_classes("m.keras") is None


def test_published_weights_are_those_that_keras_reads(tmp_path):
    """MobileNetV3 has convolutions with and without bias, batch norm, a Rescaling and a convolutional head."""
    build = functools.partial(zoo.backbone, "mobilenet_v3_small", 5, image_size=32)
    model, rng = build(), np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.uniform(0.5, 1, weight.shape))
    write_published(tmp_path / "a.h5", model)
    by_keras = build()
    by_keras.load_weights(tmp_path / "a.h5")
    ours = build(weights=tmp_path / "a.h5")
    for one, two, three in zip(model.get_weights(), by_keras.get_weights(), ours.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)
    assert keras_files.has_head(tmp_path / "a.h5", ours)
    write_published(tmp_path / "b.h5", model, drop=1)
    before = build()
    random = before.get_weights()[-2:]
    keras_files.load_weights(before, tmp_path / "b.h5")
    for one, two in zip([*model.get_weights()[:-2], *random], before.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    assert not keras_files.has_head(tmp_path / "b.h5", before)
    assert zoo.pixels_of(tmp_path / "b.h5", None, "mobilenetv3small") == PIXELS["raw"]
    assert zoo.pixels_of(tmp_path / "b.h5", None, "mobilenetv2") == PIXELS["tf"]


def test_published_weights_of_another_network_are_refused_and_change_nothing(tmp_path):
    model = tiny()
    before = model.get_weights()
    others = ((tiny(depths=(1, 1)), 0, "missing"), (tiny(widths=(4, 6)), 0, "(3, 3, 4, 8)"), (tiny(), 2, "missing"))
    for other, drop, message in others:
        write_published(tmp_path / "a.h5", other, drop)
        with pytest.raises(l2sp.InputError, match=f"not of the architecture of the model .*{re.escape(message)}"):
            keras_files.load_weights(model, tmp_path / "a.h5")
    content = (tmp_path / "a.h5").read_bytes()
    for damaged in (content[: len(content) // 2], b"x" * 100):
        (tmp_path / "a.h5").write_bytes(damaged)
        with pytest.raises(l2sp.InputError, match="damaged or not in the format of keras.applications"):
            keras_files.load_weights(model, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.attrs["layer_names"] = ["a"]
        file.create_group("a").attrs["weight_names"] = ["../../b"]
        file["b"] = h5py.ExternalLink("other.h5", "/c")
    with pytest.raises(l2sp.InputError, match="damaged or not in the format"):
        keras_files.load_weights(model, tmp_path / "a.h5")
    for one, two in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
