"""Pixel formats: the presets, writing and reading as JSON, and checks of values."""

import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.models.pixels import PIXELS, PixelFormat, named_pixels


def test_the_torch_format_is_torchvisions_normalisation():
    x, p = np.random.default_rng(0).integers(0, 256, (5, 3)), PIXELS["torch"]
    expected = (x / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose((x - np.array(p.mean)) * p.scale, expected, rtol=1e-12)


def test_json_brings_a_format_back():
    for p in (*PIXELS.values(), PixelFormat("bgr", (1, 2, 3), np.float32([4, 5, 6]))):
        assert PixelFormat.from_json(p.to_json(), "here") == p


@pytest.mark.parametrize("text", ["", "[]", "{", '{"order": 1}', '{"channel_order": []}', '{"scale": [1, 2, NaN]}', "[" * 10**5])
def test_damaged_json_is_refused(text):
    with pytest.raises(l2sp.InputError, match="pixel format in here is damaged"):
        PixelFormat.from_json(text, "here")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_order": "gbr"}, "channel_order is 'gbr'"),
        ({"scale": (1, 2)}, "scale is"),
        ({"scale": (1, 0, 1)}, "no factor may be 0"),
        ({"scale": "123"}, "scale is '123'"),
        ({"mean": (1, 2, float("inf"))}, "mean is"),
        ({"mean": 5}, "mean is 5"),
    ],
)
def test_formats_are_checked(options, message):
    with pytest.raises(l2sp.InputError, match=message):
        PixelFormat(**options)


def test_names_are_looked_up():
    assert named_pixels("bgr") is PIXELS["bgr"] and named_pixels(PIXELS["torch"]) is PIXELS["torch"]
    with pytest.raises(l2sp.InputError, match="'grey' is unknown: give one of rgb, bgr, torch"):
        named_pixels("grey")


def test_only_order_and_scale_must_agree():
    assert PIXELS["rgb"].agrees_with(PixelFormat(mean=(1, 2, 3)))
    assert not PIXELS["rgb"].agrees_with(PIXELS["bgr"]) and not PIXELS["rgb"].agrees_with(PIXELS["torch"])
