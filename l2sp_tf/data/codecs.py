"""Turns the bytes of one image file into pixels: upright, on white, resized."""

import math

import numpy as np
import tensorflow as tf

from l2sp_tf.data import images as ops
from l2sp_tf.data.headers import header_of, kind_of, opened, too_large
from l2sp_tf.files.reading import MAX_PIXELS

BAD, OPAQUE_JPEG, OPAQUE_PNG, TRANSPARENT_PNG, BY_PILLOW = -1, 0, 1, 2, 3


def check(content, how, as_stored=False):
    """Returns the `Header` of an image file that may be decoded.

    Args:
        content: its bytes.
        how: (size, mode, filter) of the resizing.
        as_stored: whether only JPEG and PNG are read, as in `decode_bytes`.

    Raises:
        ValueError: it is no image or too large; the message is the reason.
    """
    if as_stored and content and kind_of(content) not in ("JPEG", "PNG"):
        raise ValueError("neither a JPEG nor a PNG")
    header = header_of(content)
    pixels = math.prod(header.sides)
    if pixels > MAX_PIXELS:
        raise ValueError(too_large(pixels, MAX_PIXELS, "pixels"))
    size, mode, _ = how
    resized = max(header.sides) * size // min(header.sides) * size if mode == "shorter_side" else 0
    if resized > MAX_PIXELS:  # a thin line of pixels would become a long band
        raise ValueError(too_large(resized, MAX_PIXELS, f"pixels once the shorter side is {size}"))
    return header


@tf.function(autograph=False)
def decode_bytes(content, size, mode, filter, as_stored=False):
    """Decodes and resizes an image file: uint8 [h, w, 3]. Raises InvalidArgumentError if it cannot be decoded.

    TensorFlow decodes JPEG and PNG, Pillow the others, of which it takes the first picture. 16-bit channels keep their
    upper 8 bits.

    Args:
        content: a string tensor.
        size, mode, filter: as in `resize`.
        as_stored: whether to read JPEG and PNG alone, and neither turn them upright nor draw them on white, as
            TensorFlow Datasets does.
    """

    def look(content):
        try:
            header = check(content, (size, mode, filter), as_stored)
        except ValueError:
            return np.int64([BAD, 1])
        if as_stored:
            return np.int64([header.kind == "PNG", 1])
        by_kind = {"JPEG": OPAQUE_JPEG, "PNG": TRANSPARENT_PNG if header.transparent else OPAQUE_PNG}
        return np.int64([by_kind.get(header.kind, BY_PILLOW), header.orientation])

    way, orientation = tf.unstack(tf.ensure_shape(tf.numpy_function(look, [content], tf.int64, stateful=False), [2]))
    with tf.control_dependencies([tf.debugging.assert_non_negative(way)]):  # checked before a huge image is decoded
        content = tf.identity(content)
    ways = {
        OPAQUE_JPEG: lambda: tf.io.decode_jpeg(content, channels=3),
        OPAQUE_PNG: lambda: tf.io.decode_png(content, channels=3),
        TRANSPARENT_PNG: lambda: _on_white(tf.io.decode_png(content, channels=4)),
        BY_PILLOW: lambda: _on_white(tf.numpy_function(_by_pillow, [content], tf.uint8, stateful=False)),
    }
    image = _upright(tf.ensure_shape(tf.switch_case(tf.cast(way, tf.int32), ways), [None, None, 3]), orientation)
    return ops.resize(image, size, mode, filter)


def _by_pillow(content):
    """Decodes a GIF, BMP or WebP: uint8 [h, w, 4], of no pixels if it is damaged."""
    try:
        image = opened(content)
        left, top, right, bottom = image.tile[0].extents if kind_of(content) == "GIF" else (0, 0, *image.size)
        decoded = np.array(image.convert("RGBA"))
    except Exception:  # Pillow raises exceptions of any kind
        return np.empty((0, 0, 4), np.uint8)
    inside = np.zeros(decoded.shape[:2], bool)
    inside[top:bottom, left:right] = True  # a GIF's picture may leave a part of its canvas free
    decoded[~inside, 3] = 0
    return decoded


def _on_white(image):
    """Draws an image of four channels on white: a c + (1 - a) 255 for each channel c, rounded to the nearest integer."""
    image = tf.cast(tf.ensure_shape(image, [None, None, 4]), tf.int32)
    colour, alpha = image[..., :3], image[..., 3:]
    with tf.control_dependencies([tf.debugging.assert_positive(tf.size(image))]):
        return tf.cast((colour * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)


def _upright(image, orientation):
    """Turns an image [h, w, c] upright, of which Exif's orientation says how it was stored."""
    image = tf.cond(orientation >= 5, lambda: tf.transpose(image, [1, 0, 2]), lambda: image)
    across = tf.reduce_any(orientation == [2, 3, 6, 7])
    down = tf.reduce_any(orientation == [3, 4, 7, 8])
    image = tf.cond(across, lambda: image[:, ::-1], lambda: image)
    return tf.cond(down, lambda: image[::-1], lambda: image)
