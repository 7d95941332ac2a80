"""The image operations of section 4.1, stateless, on one image or on a batch.

Every operation takes an image [h, w, c] or a batch [b, h, w, c]. A random operation takes
one seed of two integers with an image, and b of them [b, 2] with a batch: each image is
drawn by its own seed, whichever images it is batched with.
"""

import tensorflow as tf

from l2sp_tf.errors import InputError


def resize(image, size):
    """Squashes both sides to `size`: bilinear, and smoothed where it shrinks so that nothing aliases.

    Args:
        image: [h, w, c] or [b, h, w, c], in 0..255, of any numeric dtype.
        size: the new height and width.

    Returns:
        uint8 of the new size, rounded to the nearest integer.
    """
    resized = tf.image.resize(image, [size, size], method="bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


def to_three_channels(image):
    """Repeats a grey channel three times and leaves three channels as they are.

    Args:
        image: [..., 1] or [..., 3].

    Returns:
        [..., 3] of the same dtype.

    Raises:
        InputError: there are neither one nor three channels.
    """
    channels = image.shape[-1]
    if channels not in (1, 3):
        raise InputError(f"an image has {channels} channels: it must have 1 (grey) or 3 (RGB)")
    return tf.repeat(image, 3, axis=-1) if channels == 1 else tf.convert_to_tensor(image)


def random_blur(image, seed, kernel_size=5, sigma=(0.1, 2.0)):
    """Blurs with a Gaussian kernel whose standard deviation is drawn uniformly from the range `sigma`.

    The border is reflected, and each kernel sums to 1: a constant passes unchanged, so that
    it does not matter whether the mean is subtracted before or after.

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
    low, high = sigma
    sigmas = low + (high - low) * _uniform(seeds, 1)[:, 0]
    blurred = _convolve(images, _gaussian_kernels(sigmas, kernel_size))
    return _unbatched(blurred, image)


def random_mirror(image, seed):
    """Mirrors left to right with probability 1/2.

    Args:
        image: [h, w, c] or [b, h, w, c].
        seed: int32 or int64 [2], or [b, 2] for a batch.

    Returns:
        The image or its mirror image, same shape and dtype.
    """
    images, seeds = _batched(image, seed)
    mirrored = _uniform(seeds, 1)[:, :, None, None] < 0.5
    return _unbatched(tf.where(mirrored, images[:, :, ::-1], images), image)


def random_crop(image, size, seed):
    """Cuts out a square at a place drawn uniformly from all that lie inside the image.

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
    height, width = _sides_at_least(images, size)
    places = tf.cast(tf.stack([height, width]) - size + 1, tf.float32)
    # a product may round up to the number of places itself
    offsets = tf.cast(tf.minimum(tf.floor(_uniform(seeds, 2) * places), places - 1), tf.int32)
    rows = offsets[:, :1] + tf.range(size)
    columns = offsets[:, 1:] + tf.range(size)
    cropped = tf.gather(tf.gather(images, rows, axis=1, batch_dims=1), columns, axis=2, batch_dims=1)
    return _unbatched(cropped, image)


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


def check_blur(kernel_size, sigma):
    """Raises InputError unless `kernel_size` is odd and `sigma` is a range of positive numbers."""
    if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0:
        raise InputError(f"the blur kernel is {kernel_size!r} pixels wide: give an odd positive number, such as 5")
    if len(sigma) != 2 or not 0 < sigma[0] <= sigma[1] < float("inf"):
        raise InputError(f"the blur's sigma range is {sigma!r}: give two positive numbers, the smaller first")


def _batched(image, seed):
    image, seed = tf.convert_to_tensor(image), tf.convert_to_tensor(seed)
    return (image, seed) if image.shape.rank == 4 else (image[None], seed[None])


def _unbatched(images, like):
    return images if len(like.shape) == 4 else images[0]


def _uniform(seeds, count):
    """Draws `count` numbers in [0, 1) for each seed [b, 2]: float32 [b, count]."""
    return tf.map_fn(lambda seed: tf.random.stateless_uniform([count], seed), seeds, fn_output_signature=tf.float32)


def _gaussian_kernels(sigmas, kernel_size):
    """One kernel for each standard deviation [b]: float32 [kernel_size, b], each column summing to 1."""
    offset = tf.range(kernel_size, dtype=tf.float32)[:, None] - kernel_size // 2
    kernels = tf.exp(-0.5 * tf.square(offset / sigmas))
    return kernels / tf.reduce_sum(kernels, axis=0)


def _convolve(images, kernels):
    """Convolves each image with its own kernel [k, b], first down the columns, then along the rows."""
    radius = kernels.shape[0] // 2
    batch, height, width, channels = tf.unstack(tf.shape(images))
    images = tf.gather(images, _reflected(height, radius), axis=1)
    images = tf.gather(images, _reflected(width, radius), axis=2)
    # one kernel per image is one kernel per channel once the batch lies in the channels
    stacked = tf.reshape(tf.transpose(images, [1, 2, 0, 3]), [1, height + 2 * radius, width + 2 * radius, batch * channels])
    kernels = tf.repeat(kernels, channels, axis=1)
    stacked = tf.nn.depthwise_conv2d(stacked, kernels[:, None, :, None], [1, 1, 1, 1], "VALID")
    stacked = tf.nn.depthwise_conv2d(stacked, kernels[None, :, :, None], [1, 1, 1, 1], "VALID")
    return tf.transpose(tf.reshape(stacked, [height, width, batch, channels]), [2, 0, 1, 3])


def _reflected(side, radius):
    """The rows -radius..side+radius-1 reflected into the image, as often as it takes when it is small."""
    period = tf.maximum(2 * (side - 1), 1)
    place = tf.math.floormod(tf.range(-radius, side + radius), period)
    return tf.minimum(place, 2 * (side - 1) - place)


def _sides_at_least(image, size):
    """Height and width of an image or a batch, as integers where they are known."""
    height, width = image.shape[-3:-1]
    if height is None or width is None:
        sides = tf.shape(image)[-3:-1]
        with tf.control_dependencies([tf.debugging.assert_greater_equal(sides, size, "a crop exceeds its image")]):
            height, width = tf.unstack(tf.identity(sides))
    elif size > height or size > width:
        raise InputError(f"a crop of {size}x{size} does not fit in an image of {height}x{width}")
    return height, width
