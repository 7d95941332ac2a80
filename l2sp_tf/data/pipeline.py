"""The tf.data pipeline: every image is decoded once, before training, and then streamed."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import pathlib

import numpy as np
import tensorflow as tf

from l2sp_tf.data import images as ops
from l2sp_tf.data.datasets import default_cache_dir
from l2sp_tf.errors import InputError
from l2sp_tf.files import atomic_path

MAX_PIXELS = 178_956_970  # of an image as declared in its header: more would be a decompression bomb
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
DECODE_BATCH = 64
PIECE_BYTES = 2**23  # of the float32 images that one call blurs: more would leave the processor's caches


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Section 4.1: resize, subtract the mean, blur, mirror and crop.

    Attributes:
        resize: both sides are squashed to this many pixels.
        crop: the side of the square that the network sees.
        blur: "gaussian" or "none".
        blur_kernel: the width of the Gaussian kernel in pixels, odd.
        blur_sigma: the range of its standard deviation, in pixels.
        mirror: whether half of the training images are mirrored.
        channel_order: "rgb" or "bgr".
    """

    resize: int = 256
    crop: int = 224
    blur: str = "gaussian"
    blur_kernel: int = 5
    blur_sigma: tuple = (0.1, 2.0)
    mirror: bool = True
    channel_order: str = "rgb"

    def __post_init__(self):
        _check_count("resize", self.resize)
        _check_count("crop", self.crop)
        if self.crop > self.resize:
            raise InputError(f"crop is {self.crop}, larger than resize, {self.resize}")
        if self.blur not in ("none", "gaussian"):
            raise InputError(f"blur is {self.blur!r}: it must be none or gaussian")
        if self.channel_order not in ("rgb", "bgr"):
            raise InputError(f"channel_order is {self.channel_order!r}: it must be rgb or bgr")
        ops.check_blur(self.blur_kernel, self.blur_sigma)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Decoded images of one size.

    Attributes:
        pixels: uint8 [n, size, size, 3] in RGB order, an array or a memory-mapped file.
        labels: int32 [n].
        skipped: the names of the images that were left out because they could not be decoded.
    """

    pixels: np.ndarray
    labels: np.ndarray
    skipped: tuple = ()

    def __len__(self):
        return len(self.labels)

    @functools.cached_property
    def reader(self):
        """A function from indices int64 [b] to their pixels, for use in a tf.data map."""
        if isinstance(self.pixels, np.memmap):
            return self._read_from_disk
        with tf.device("CPU:0"):
            pixels = tf.convert_to_tensor(self.pixels)  # captured by the graph, where an array would be copied into it
        return lambda indices: tf.gather(pixels, indices)

    def _read_from_disk(self, indices):
        pixels = tf.numpy_function(lambda i: np.asarray(self.pixels[i]), [indices], tf.uint8, stateful=False)
        return tf.ensure_shape(pixels, [None, *self.pixels.shape[1:]])


def decode(split, size, *, skip_bad_images=False, progress=None, memory_limit_bytes=2**31, cache_dir=None):
    """Reads and decodes every image of a split, makes it three-channel and squashes it to `size` x `size`.

    Args:
        split: a Split.
        size: the side of the result.
        skip_bad_images: leave out what cannot be decoded, instead of raising.
        progress: called with (images done, images in all) from time to time.
        memory_limit_bytes: a larger result lies in a file, which is mapped into memory.
        cache_dir: the folder of that file; by default that of `load_dataset`.

    Returns:
        Images, in the order of the split.

    Raises:
        InputError: an image is empty, truncated, neither a JPEG nor a PNG, or declares more than
            178,956,970 pixels; or a class has no image left.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    _check_count("size", size)
    chunks = _decoded_arrays(split, size) if split.files is None else _decoded_files(split, size)
    kept, bad = [], []
    with _store(split, size, memory_limit_bytes, cache_dir) as store:
        for first, last, pixels, reasons in chunks:
            bad.extend(reasons.items())
            kept.extend(i for i in range(first, last) if i not in reasons)
            if not bad or skip_bad_images:
                store.append(pixels)
            if progress is not None:
                progress(last, len(split))
        if bad and not skip_bad_images:
            raise InputError(_bad_images_message(split, bad))
        _check_every_class_is_left(split, kept)
    return Images(store.pixels(len(kept)), np.asarray(split.labels[kept], np.int32), tuple(split.names[i] for i, _ in bad))


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A data set that is ready to train and test on.

    Attributes:
        name, classes, digest: of the data set.
        train, test: Images.
        mean: float32 [3], the mean of the training images, subtracted from all.
        preprocessing: a Preprocessing.
    """

    name: str
    classes: tuple
    digest: str
    train: Images
    test: Images
    mean: np.ndarray
    preprocessing: Preprocessing


def prepare(dataset, preprocessing, *, skip_bad_images=False, progress=None, cache_dir=None):
    """Decodes a Dataset for a Preprocessing, and computes the mean of its training images.

    Args:
        dataset: a Dataset.
        preprocessing: a Preprocessing.
        skip_bad_images, progress, cache_dir: as in `decode`.

    Returns:
        A Task.

    Raises:
        InputError, OSError: as in `decode`.
    """
    options = {"skip_bad_images": skip_bad_images, "progress": progress, "cache_dir": cache_dir}
    train, test = (decode(split, preprocessing.resize, **options) for split in (dataset.train, dataset.test))
    return Task(dataset.name, dataset.classes, dataset.digest, train, test, channel_mean(train), preprocessing)


def channel_mean(images):
    """The mean of each channel over all pixels of all images, in RGB order: float32 [3], summed in float64."""
    total = np.zeros(3)
    for first in range(0, len(images), DECODE_BATCH):
        total += images.pixels[first : first + DECODE_BATCH].sum(axis=(0, 1, 2), dtype=np.float64)
    return (total / math.prod(images.pixels.shape[:3])).astype(np.float32)


def training_batches(images, preprocessing, mean, *, batch_size, seed, start=0, iterations):
    """Streams randomly blurred, mirrored and cropped images, epoch after epoch across the borders of batches.

    The permutation of an epoch is a function of (seed, epoch), and what is drawn for an image
    one of (seed, epoch, index): the stream from `start` on is, to the bit, the rest of the stream
    from 0.

    Args:
        images: Images of the size `preprocessing.resize`.
        preprocessing: a Preprocessing.
        mean: float32 [3] in RGB order, subtracted from the pixels (0 to 255).
        batch_size: images a batch; it may exceed their number.
        seed: a non-negative integer.
        start: the first batch.
        iterations: the batch to stop before.

    Returns:
        A tf.data.Dataset of iterations - start pairs: float32 [batch_size, crop, crop, 3] and int32
        [batch_size].

    Raises:
        InputError: an argument is out of its range.
    """
    _check_stream(images, preprocessing, batch_size)
    if not 0 <= seed < 2**60:
        raise InputError(f"seed is {seed}: it must lie between 0 and 2^60")
    if not 0 <= start <= iterations:
        raise InputError(f"the batches {start} to {iterations} were asked for: the first must not be negative or above the last")
    spec = tf.TensorSpec([batch_size], tf.int64)
    places = tf.data.Dataset.from_generator(
        lambda: _training_order(len(images), batch_size, seed, start, iterations), output_signature=(spec, spec)
    )
    piece = _piece(batch_size, preprocessing.resize)
    read, labels = images.reader, tf.constant(images.labels)
    mean = tf.constant(mean, tf.float32)

    def make(epochs, indices):
        x = tf.cast(read(indices), tf.float32) - mean
        return _augment(x, preprocessing, seed, epochs, indices), tf.gather(labels, indices)

    batches = places.rebatch(piece).map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    return batches.rebatch(batch_size, drop_remainder=True).prefetch(2)


def test_batches(images, preprocessing, mean, *, batch_size, order=None):
    """Every image once, in order, cropped at its centre; the last batch may be smaller.

    Args:
        images: Images of the size `preprocessing.resize`.
        preprocessing: a Preprocessing; of it only the crop and the order of channels count.
        mean: float32 [3] in RGB order, subtracted from the pixels (0 to 255).
        batch_size: images a batch.
        order: int64 [n], the indices of the images to show; None for all from first to last.

    Returns:
        A tf.data.Dataset of float32 [b, crop, crop, 3] and int32 [b].

    Raises:
        InputError: an argument is out of its range.
    """
    _check_stream(images, preprocessing, batch_size)
    read, labels = images.reader, tf.constant(images.labels)
    mean = tf.constant(mean, tf.float32)

    def make(indices):
        x = tf.cast(ops.central_crop(read(indices), preprocessing.crop), tf.float32) - mean
        return _ordered(x, preprocessing), tf.gather(labels, indices)

    order = np.arange(len(images)) if order is None else np.asarray(order, np.int64)
    indices = tf.data.Dataset.from_tensor_slices(order).batch(batch_size)
    return indices.map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(2)


test_batches.__test__ = False  # pytest must not take it for a test


def _check_count(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise InputError(f"{name} is {value!r}: it must be a positive integer")


def _check_stream(images, preprocessing, batch_size):
    _check_count("batch_size", batch_size)
    if not len(images):
        raise InputError("there are no images to stream")
    if images.pixels.shape[1] != preprocessing.resize:
        raise InputError(f"the images are decoded at {images.pixels.shape[1]} pixels, but resize is {preprocessing.resize}")


def _training_order(count, batch_size, seed, start, iterations):
    """Yields for each batch the epoch and the index of each of its images: two int64 [batch_size]."""

    @functools.lru_cache(maxsize=2)
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(count)

    for batch in range(start, iterations):
        epochs, places = np.divmod(np.arange(batch * batch_size, (batch + 1) * batch_size), count)
        indices = np.empty(batch_size, np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            indices[inside] = permutation(int(epoch))[places[inside]]
        yield epochs, indices


def _piece(batch_size, size):
    """The largest part of a batch that is worked on at once: it divides the batch, so resuming cuts no differently."""
    limit = max(1, PIECE_BYTES // (size * size * 3 * 4))
    return max(part for part in range(1, min(batch_size, limit) + 1) if batch_size % part == 0)


def _augment(x, preprocessing, seed, epochs, indices):
    """Section 4.1's random blur, mirror and crop of a batch, each image by its own seeds."""

    def seeds(operation):
        # no two of (seed, operation) and no two of (epoch, index) share a number
        return tf.stack([tf.fill(tf.shape(indices), tf.constant(4 * seed + operation, tf.int64)), epochs * 2**32 + indices], 1)

    if preprocessing.blur == "gaussian":
        x = ops.random_blur(x, seeds(0), preprocessing.blur_kernel, preprocessing.blur_sigma)
    if preprocessing.mirror:
        x = ops.random_mirror(x, seeds(1))
    return _ordered(ops.random_crop(x, preprocessing.crop, seeds(2)), preprocessing)


def _ordered(x, preprocessing):
    return x[..., ::-1] if preprocessing.channel_order == "bgr" else x


def _decoded_arrays(split, size):
    """Yields (first, last, uint8 [last - first, size, size, 3], {}) over the images of an array."""
    for first in range(0, len(split), DECODE_BATCH):
        last = min(first + DECODE_BATCH, len(split))
        yield first, last, ops.resize(ops.to_three_channels(split.pixels[first:last]), size).numpy(), {}


def _decoded_files(split, size):
    """Yields (first, last, pixels, {index: reason}) over the files: the pixels of those that decode, in order."""
    paths = [os.fsencode(path) for path in split.files]
    dataset = tf.data.Dataset.from_tensor_slices((np.arange(len(paths)), paths))
    dataset = dataset.map(
        lambda i, path: (i, _decode_bytes(tf.io.read_file(path), size)), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
    )
    first = 0
    for indices, pixels in dataset.ignore_errors(log_warning=False).batch(DECODE_BATCH).prefetch(1).as_numpy_iterator():
        last = int(indices[-1]) + 1
        yield first, last, *_with_second_try(split, size, first, last, dict(zip(indices.tolist(), pixels, strict=True)))
        first = last
    if first < len(split):
        yield first, len(split), *_with_second_try(split, size, first, len(split), {})


def _with_second_try(split, size, first, last, decoded):
    """Reads again the files first..last-1 that the parallel pass dropped, to learn why."""
    reasons = {}
    for i in range(first, last):
        if i not in decoded:
            content = split.files[i].read_bytes()  # raises OSError where the disk is at fault and not the image
            try:
                decoded[i] = _decode_bytes(tf.constant(content), size).numpy()
            except tf.errors.InvalidArgumentError:
                reasons[i] = _reason(content)
    return [decoded[i] for i in range(first, last) if i in decoded], reasons


@tf.function
def _decode_bytes(content, size):
    """The image in the bytes of a JPEG or a PNG file: uint8 [size, size, 3]. Whatever else it is raises InvalidArgumentError."""
    is_jpeg = tf.io.is_jpeg(content)
    sides = tf.cond(is_jpeg, lambda: tf.io.extract_jpeg_shape(content)[:2], lambda: _png_sides(content))
    count = tf.reduce_prod(tf.cast(sides, tf.int64))
    checks = [tf.debugging.assert_positive(sides), tf.debugging.assert_less_equal(count, tf.constant(MAX_PIXELS, tf.int64))]
    with tf.control_dependencies(checks):  # the pixels of a huge image are never made
        content = tf.identity(content)
    image = tf.cond(is_jpeg, lambda: tf.io.decode_jpeg(content, channels=3), lambda: tf.io.decode_png(content, channels=3))
    return tf.ensure_shape(ops.resize(image, size), [size, size, 3])


def _png_sides(content):
    """Height and width from the header of a PNG: int32 [2]."""
    is_png = tf.equal(tf.strings.substr(content, 0, 8), PNG_SIGNATURE)
    with tf.control_dependencies([tf.debugging.Assert(is_png, ["neither JPEG nor PNG"])]):
        return tf.io.decode_raw(tf.strings.substr(content, 16, 8), tf.int32, little_endian=False)[::-1]


def _reason(content):
    if not content:
        return "empty"
    if not content.startswith((b"\xff\xd8\xff", PNG_SIGNATURE)):
        return "neither a JPEG nor a PNG"
    return "truncated, damaged or too large"


def _bad_images_message(split, bad):
    shown = "; ".join(f"{split.names[i]} ({reason})" for i, reason in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"{len(bad)} of {len(split)} images cannot be decoded: {shown}{more}. "
        "Repair or remove them, or leave them out with --skip_bad_images"
    )


def _check_every_class_is_left(split, kept):
    lost = np.setdiff1d(split.labels, split.labels[kept])
    if lost.size:
        example = split.names[int(np.flatnonzero(split.labels == lost[0])[0])]
        raise InputError(f"{lost.size} classes have no image that can be decoded, among them that of {example}")


@contextlib.contextmanager
def _store(split, size, memory_limit_bytes, cache_dir):
    """Yields where to append the pixels of a split: memory, or a file that appears when all are written."""
    shape = (len(split), size, size, 3)
    if math.prod(shape) <= memory_limit_bytes:
        yield _Memory(shape)
        return
    identity = hashlib.sha256(repr((split.names, shape)).encode()).hexdigest()[:16]
    path = pathlib.Path(default_cache_dir() if cache_dir is None else cache_dir) / f"pixels-{identity}.uint8"
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        yield _File(path, file, shape)


class _Memory:
    def __init__(self, shape):
        self._array, self._count = np.empty(shape, np.uint8), 0

    def append(self, pixels):
        if len(pixels):
            self._array[self._count : self._count + len(pixels)] = pixels
            self._count += len(pixels)

    def pixels(self, count):
        return self._array[:count]


class _File:
    def __init__(self, path, file, shape):
        self._path, self._file, self._shape = path, file, shape

    def append(self, pixels):
        # written, not mapped: a full disk then raises OSError, where a mapping would kill the process
        for image in pixels:
            self._file.write(image.tobytes())

    def pixels(self, count):
        return np.memmap(self._path, np.uint8, mode="r", shape=(count, *self._shape[1:]))
