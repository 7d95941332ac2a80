"""The image operations of section 4.1, stateless, on one image or on a batch.

Every operation takes an image [h, w, c] or a batch [b, h, w, c]. A random operation takes one seed of two
integers for an image, or b of them [b, 2] for a batch. Each image is drawn by its own seed, so its neighbours in the
batch do not matter. `random_places` and `blur_inside` apply crop, mirror and blur with the same random numbers, but
read and blur only the pixels that a crop shows.
"""

import functools

import tensorflow as tf

from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError

RESIZE_MODES = ("squash", "shorter_side")
RESIZE_FILTERS = ("area", "bilinear")
BLURS = ("gaussian", "authors", "none")


def resize(image, size, mode="squash", filter="area"):
    """Resizes by averaging areas where a side shrinks, so that nothing aliases, and bilinearly where it is stretched.

    A new pixel is the mean over the rectangle [i h / h', (i + 1) h / h') x [j w / w', (j + 1) w / w') of the image; pixels
    partly inside it count by that part. The "bilinear" filter is that of the authors' code (TensorFlow 1): it weights
    the four pixels around (i h / h', j w / w') bilinearly, even if the image shrinks a lot.

    Args:
        image: [h, w, c] or [b, h, w, c], in 0..255, of any numeric dtype.
        size: the new height and width, or the new shorter side.
        mode: "squash" gives both sides this size; "shorter_side" keeps the aspect, and the longer
            side becomes floor(longer * size / shorter).
        filter: "area", or "bilinear" for the authors'.

    Returns:
        uint8 of the new size, rounded to the nearest integer.

    Raises:
        InputError: the mode or the filter is unknown.
    """
    check_resize(mode, filter)
    image = tf.convert_to_tensor(image)
    old = tf.shape(image)[-3:-1]
    new = tf.constant([size, size])
    if mode == "shorter_side":
        long = tf.cast(old, tf.int64)
        new = tf.cast(long * size // tf.reduce_min(long), tf.int32)
    resized = _resized_as_in_tensorflow_1(image, new) if filter == "bilinear" else _resized_by_area(image, old, new)
    sides = [size, size] if mode == "squash" else [None, None]
    resized = tf.ensure_shape(resized, [*image.shape[:-3], *sides, image.shape[-1]])
    return tf.cast(tf.round(resized), tf.uint8)


def _resized_by_area(image, old, new):
    resized = tf.image.resize(image, tf.minimum(old, new), method="area")
    return tf.cond(tf.reduce_any(new > old), lambda: tf.image.resize(resized, new, method="bilinear"), lambda: resized)


def _resized_as_in_tensorflow_1(image, new):
    images = image if image.shape.rank == 4 else image[None]
    resized = tf.compat.v1.image.resize_bilinear(images, new, align_corners=False, half_pixel_centers=False)
    return _unbatched(resized, image)


def to_three_channels(image):
    """Repeats a grey channel three times and leaves three channels unchanged.

    Args:
        image: [..., 1] or [..., 3].

    Returns:
        [..., 3] of the same dtype.

    Raises:
        InputError: the number of channels is neither one nor three.
    """
    channels = image.shape[-1]
    if channels not in (1, 3):
        raise InputError(f"An image has {channels} channels: give one of 1 (grey) or 3 (RGB).")
    return tf.repeat(image, 3, axis=-1) if channels == 1 else tf.convert_to_tensor(image)


def random_blur(image, seed, kernel_size=5, sigma=(0.1, 2.0)):
    """Blurs with a Gaussian kernel, whose standard deviation is drawn uniformly from the range `sigma`.

    The border is reflected, and each kernel sums to 1. A constant is unchanged, so the mean may be
    subtracted before or after.

    Args:
        image: float32 [h, w, c] or [b, h, w, c].
        seed: int32 or int64 [2], or [b, 2] for a batch.
        kernel_size: odd, in pixels.
        sigma: the smallest and the largest standard deviation, in pixels.

    Returns:
        float32 of the shape of `image`.

    Raises:
        InputError: the kernel or the range cannot be used.
    """
    check_blur(kernel_size, sigma)
    images, seeds = _batched(tf.cast(image, tf.float32), seed)
    height, width = tf.unstack(tf.shape(images)[1:3])
    radius = kernel_size // 2
    padded = tf.gather(images, _reflected(tf.range(-radius, height + radius), height), axis=1)
    padded = tf.gather(padded, _reflected(tf.range(-radius, width + radius), width), axis=2)
    return _unbatched(tf.ensure_shape(blur_inside(padded, seeds, kernel_size, sigma), images.shape), image)


def blur_inside(images, seeds, kernel_size=5, sigma=(0.1, 2.0), mean=0.0):
    """Blurs as `random_blur` does, but only pixels at least kernel_size // 2 away from the border.

    Args:
        images: uint8 or float32 [b, h + kernel_size - 1, w + kernel_size - 1, c].
        seeds: int32 or int64 [b, 2].
        kernel_size, sigma: as in `random_blur`.
        mean: subtracted afterwards, a number or float32 [c].

    Returns:
        float32 [b, h, w, c].
    """
    low, high = sigma
    sigmas = low + (high - low) * _uniform(seeds, 1)[:, 0]
    return _convolution(kernel_size, images.dtype)(images, _gaussian_kernels(sigmas, kernel_size), mean)


def random_distortion(image, seed):
    """Changes brightness, saturation and contrast by random factors: the "blur" of the authors' code.

    Brightness: x + d, d in (-63/255, 63/255). On pixels of 0 to 255 this is next to nothing, as in the authors' code.
    Saturation: the S of HSV times a factor in (0.5, 1.5), cut at 1. Contrast: m + f (x - m), m the
    mean of each channel over the whole image, f in (0.2, 1.8). Nothing is cut off at 0 or 255.

    Args:
        image: [h, w, 3] or [b, h, w, 3], in 0..255, RGB, the mean not subtracted.
        seed: int32 or int64 [2], or [b, 2] for a batch.

    Returns:
        float32 of the shape of `image`.
    """
    x, seeds = _batched(tf.cast(image, tf.float32), seed)
    brightness, saturation, contrast = tf.unstack(_uniform(seeds, 3)[:, :, None, None, None], axis=1)
    x += (2 * brightness - 1) * 63 / 255
    high, low = tf.reduce_max(x, axis=-1, keepdims=True), tf.reduce_min(x, axis=-1, keepdims=True)
    # S = (high - low) / high; hue and value stay, so each channel's distance from the highest scales with S
    scale = tf.minimum(0.5 + saturation, tf.math.divide_no_nan(high, high - low))
    x = tf.where(high > 0, high - (high - x) * scale, high)
    mean = tf.reduce_mean(x, axis=[1, 2], keepdims=True)
    return _unbatched(mean + (0.2 + 1.6 * contrast) * (x - mean), image)


def random_mirror(image, seed):
    """Mirrors left to right with probability 1/2.

    Args:
        image: [h, w, c] or [b, h, w, c].
        seed: int32 or int64 [2], or [b, 2] for a batch.

    Returns:
        The image or its mirror image, same shape and dtype.
    """
    images, seeds = _batched(image, seed)
    mirrored = _is_mirrored(seeds)[:, None, None, None]
    return _unbatched(tf.where(mirrored, images[:, :, ::-1], images), image)


def random_crop(image, size, seed):
    """Cuts out a square at a place drawn uniformly from all places inside the image.

    Args:
        image: [h, w, c] or [b, h, w, c].
        size: the height and width to cut out.
        seed: int32 or int64 [2], or [b, 2] for a batch.

    Returns:
        [size, size, c] or [b, size, size, c], same dtype.

    Raises:
        InputError: `size` exceeds a side of the image.
    """
    images, seeds = _batched(image, seed)
    _sides_at_least(images, size)
    sides = tf.tile(tf.shape(images)[None, 1:3], [tf.shape(images)[0], 1])
    rows, columns = random_places(sides, size, seeds)
    cropped = tf.gather(tf.gather(images, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
    return _unbatched(cropped, image)


def random_places(sides, size, crop_seeds, mirror_seeds=None, margin=0):
    """Returns the rows and columns that `random_crop` shows, plus a margin, after `random_mirror` if it has seeds.

    Args:
        sides: int32 or int64 [b, 2], the height and width of each image.
        size: the height and width to cut out.
        crop_seeds: int32 or int64 [b, 2].
        mirror_seeds: int32 or int64 [b, 2], or None for no mirroring.
        margin: pixels around the square; those outside the image are reflected into it.

    Returns:
        Rows and columns of the image before mirroring: two int64 [b, size + 2 * margin].
    """
    sides = tf.cast(sides, tf.int64)
    places = tf.cast(sides - size + 1, tf.float32)
    # the product may round up to the number of places
    offsets = tf.cast(tf.minimum(tf.floor(_uniform(crop_seeds, 2) * places), places - 1), tf.int64)
    window = tf.range(-margin, size + margin, dtype=tf.int64)
    rows, columns = (_reflected(offsets[:, i : i + 1] + window, sides[:, i : i + 1]) for i in (0, 1))
    if mirror_seeds is not None:
        columns = tf.where(_is_mirrored(mirror_seeds)[:, None], sides[:, 1:] - 1 - columns, columns)
    return rows, columns


def central_crop(image, size):
    """Cuts out the square in the middle, from row floor((h - size) / 2) and column floor((w - size) / 2).

    Args:
        image: [h, w, c] or [b, h, w, c].
        size: the height and width to cut out.

    Returns:
        [size, size, c] or [b, size, size, c], same dtype.

    Raises:
        InputError: `size` exceeds a side of the image.
    """
    image = tf.convert_to_tensor(image)
    height, width = _sides_at_least(image, size)
    top, left = (height - size) // 2, (width - size) // 2
    return image[..., top : top + size, left : left + size, :]


def check_resize(mode, filter="area"):
    """Raises InputError unless `mode` and `filter` are known."""
    fields.choice("resize_mode", mode, RESIZE_MODES)
    fields.choice("resize_filter", filter, RESIZE_FILTERS)


def check_blur(kernel_size, sigma):
    """Returns the width of the blur's kernel as an int, and the range of its deviation as two floats.

    Raises:
        InputError: the width is not an odd number of pixels, or the range is not two positive numbers in order.
    """
    kernel_size = fields.whole("blur_kernel", kernel_size)
    if kernel_size % 2 == 0:
        raise InputError(f"blur_kernel is {kernel_size}: give an odd number of pixels.")
    if not isinstance(sigma, (tuple, list)) or len(sigma) != 2:
        raise InputError(f"blur_sigma is {sigma!r}: give the smallest and the largest, in pixels.")
    low, high = (fields.number("blur_sigma", value, above=0) for value in sigma)
    if low > high:
        raise InputError(f"blur_sigma is {sigma!r}: give the smallest first.")
    return kernel_size, (low, high)


def _batched(image, seed):
    image, seed = tf.convert_to_tensor(image), tf.convert_to_tensor(seed)
    return (image, seed) if image.shape.rank == 4 else (image[None], seed[None])


def _unbatched(images, like):
    return images if len(like.shape) == 4 else images[0]


def _uniform(seeds, count):
    """Draws `count` numbers in [0, 1) for each seed [b, 2]: float32 [b, count], multiples of 2^-24.

    Hashes counters with three rounds of SplitMix64's finalizer. This takes all seeds at once; TensorFlow's
    stateless generators take one seed per call.
    """
    seeds = tf.cast(seeds, tf.uint64)
    draws = tf.range(1, count + 1, dtype=tf.int64)
    hashed = _hash(_hash(_hash(seeds[:, :1]) + seeds[:, 1:]) + tf.cast(draws, tf.uint64))
    return tf.cast(tf.bitwise.right_shift(hashed, tf.constant(40, tf.uint64)), tf.float32) * 2**-24


def _hash(x):
    """Adds SplitMix64's constant (the golden ratio) and applies its mixing function, which is one-to-one on uint64."""
    x += tf.constant(0x9E3779B97F4A7C15, tf.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(shift, tf.uint64))) * tf.constant(factor, tf.uint64)
    return tf.bitwise.bitwise_xor(x, tf.bitwise.right_shift(x, tf.constant(31, tf.uint64)))


def _is_mirrored(seeds):
    return _uniform(seeds, 1)[:, 0] < 0.5


def _gaussian_kernels(sigmas, kernel_size):
    """Returns one kernel for each standard deviation [b]: float32 [kernel_size, b], each column summing to 1."""
    offset = tf.range(kernel_size, dtype=tf.float32)[:, None] - kernel_size // 2
    kernels = tf.exp(-0.5 * tf.square(offset / sigmas))
    return kernels / tf.reduce_sum(kernels, axis=0)


@functools.cache
def _convolution(kernel_size, dtype):
    """Returns a function that convolves images [b, h, w, c] with one kernel each [kernel_size, b], wherever it fits inside."""

    def convolve(images, kernels, mean):
        images = tf.cast(images, tf.float32)
        height, width = tf.unstack(tf.shape(images)[1:3] - kernel_size + 1)
        kernels = kernels[:, :, None, None, None]
        images = sum(kernels[i] * images[:, i : i + height] for i in range(kernel_size))
        return sum(kernels[i] * images[:, :, i : i + width] for i in range(kernel_size)) - mean

    # XLA fuses the sums into one loop; otherwise each term would pass through memory
    shapes = (([None] * 4, dtype), ([kernel_size, None], tf.float32), (None, tf.float32))
    signature = [tf.TensorSpec(shape, kind) for shape, kind in shapes]
    return tf.function(convolve, input_signature=signature, jit_compile=True, autograph=False)


def _reflected(places, side):
    """Reflects places outside 0..side-1 into it, repeatedly if the side is small."""
    period = tf.maximum(2 * (side - 1), 1)
    place = tf.math.floormod(places, period)
    return tf.minimum(place, 2 * (side - 1) - place)


def _sides_at_least(image, size):
    """Returns height and width of an image or a batch, as integers if known, after checking that the crop fits."""
    height, width = image.shape[-3:-1]
    if height is None or width is None:
        sides = tf.shape(image)[-3:-1]
        with tf.control_dependencies([tf.debugging.assert_greater_equal(sides, size, "A crop is larger than its image.")]):
            height, width = tf.unstack(tf.identity(sides))
    elif size > height or size > width:
        raise InputError(f"A crop of {size}x{size} does not fit in an image of {height}x{width}.")
    return height, width
