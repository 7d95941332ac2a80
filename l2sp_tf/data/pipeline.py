"""The tf.data pipeline: every image is decoded once, before training, and then streamed."""

import contextlib
import dataclasses
import functools
import hashlib
import mmap
import os
import pathlib

import numpy as np
import tensorflow as tf

from l2sp_tf.data import images as ops
from l2sp_tf.data.datasets import default_cache_dir
from l2sp_tf.errors import InputError
from l2sp_tf.files import atomic_path
from l2sp_tf.memory import shared_tensor
from l2sp_tf.pixels import PixelFormat
from l2sp_tf.reading import MAX_IMAGE_BYTES, MAX_PIXELS

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
DECODE_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Section 4.1: resize, subtract the mean, blur, mirror and crop.

    Attributes:
        resize: both sides are squashed to this many pixels, or the shorter one is made so long.
        resize_mode: "squash" or "shorter_side".
        resize_filter: "area", or "bilinear" for that of the authors' code.
        crop: the side of the square that the network sees.
        blur: "gaussian", "authors" (their colour distortion, before the mean is subtracted) or "none".
        blur_kernel: the width of the Gaussian kernel in pixels, odd.
        blur_sigma: the range of its standard deviation, in pixels.
        mirror: whether half of the training images are mirrored.
        pixels: a PixelFormat; of it the order of the channels and their scale, after all else.
    """

    resize: int = 256
    crop: int = 224
    blur: str = "gaussian"
    blur_kernel: int = 5
    blur_sigma: tuple = (0.1, 2.0)
    mirror: bool = True
    pixels: PixelFormat = PixelFormat()
    resize_mode: str = "squash"
    resize_filter: str = "area"

    def __post_init__(self):
        _check_count("resize", self.resize)
        _check_count("crop", self.crop)
        if self.crop > self.resize:
            raise InputError(f"crop is {self.crop}, larger than resize, {self.resize}")
        ops.check_resize(self.resize_mode, self.resize_filter)
        if self.blur not in ops.BLURS:
            raise InputError(f"blur is {self.blur!r}: it must be {', '.join(ops.BLURS[:-1])} or {ops.BLURS[-1]}")
        if not isinstance(self.pixels, PixelFormat):
            raise InputError(f"pixels is {self.pixels!r}: it must be a PixelFormat")
        ops.check_blur(self.blur_kernel, self.blur_sigma)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Decoded images.

    Attributes:
        pixels: uint8 in RGB order, an array or a memory-mapped file: [n, size, size, 3], or, of images
            with sides of their own, [pixels in all, 3], one image after the other.
        labels: int32 [n].
        skipped: the names of the images that were left out because they could not be decoded.
        sides: int64 [n, 2], the height and width of each image; None where `pixels` tells them.
        starts: int64 [n], where each image begins, counted in pixels; None where one follows the other.
    """

    pixels: np.ndarray
    labels: np.ndarray
    skipped: tuple = ()
    sides: np.ndarray | None = None
    starts: np.ndarray | None = None

    def __post_init__(self):
        if self.sides is None:
            object.__setattr__(self, "sides", np.tile(np.int64(self.pixels.shape[1:3]), (len(self.pixels), 1)))
        if self.starts is None:
            starts = np.cumsum(self.sides.prod(axis=1)) - self.sides.prod(axis=1)
            object.__setattr__(self, "starts", starts.astype(np.int64))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """The pixels of one image: uint8 [h, w, 3]."""
        height, width = self.sides[index]
        first = self.starts[index]
        return self.pixels.reshape(-1, 3)[first : first + height * width].reshape(height, width, 3)

    def take(self, positions):
        """The images at `positions` alone, in that order; the pixels are shared."""
        labels, sides, starts = (array[positions] for array in (self.labels, self.sides, self.starts))
        return Images(self.pixels, labels, self.skipped, sides, starts)

    @functools.cached_property
    def reader(self):
        """A `_Reader` of these images."""
        return _Reader(self)


class _Reader:
    """Reads whole images or parts of them inside a tf.data map."""

    def __init__(self, images):
        with tf.device("CPU:0"):
            self._pixels = shared_tensor(images.pixels.reshape(-1, 3))  # captured by the graph, not copied into it
            self._starts, self._sides = tf.constant(images.starts), tf.constant(images.sides)

    def sides(self, indices):
        """The height and width of each image: int64 [b, 2]."""
        return tf.gather(self._sides, indices)

    def window(self, indices, rows, columns):
        """The pixels of each image [b] in its own rows [b, h] and columns [b, w]: uint8 [b, h, w, 3]."""
        rows = tf.gather(self._starts, indices)[:, None] + rows * self.sides(indices)[:, 1:]
        return tf.gather(self._pixels, rows[:, :, None] + columns[:, None, :])

    def whole(self, index):
        """One image: uint8 [h, w, 3]."""
        height, width = tf.unstack(self._sides[index])
        first = self._starts[index]
        return tf.reshape(self._pixels[first : first + height * width], tf.stack([height, width, 3]))


def decode(
    split,
    size,
    *,
    mode="squash",
    filter="area",
    skip_bad_images=False,
    progress=None,
    memory_limit_bytes=2**31,
    cache_dir=None,
):
    """Reads and decodes every image of a split, makes it three-channel and resizes it.

    Args:
        split: a Split.
        size: the side of the result, or its shorter side.
        mode, filter: as `resize` takes them.
        skip_bad_images: leave out what cannot be decoded, instead of raising.
        progress: called with (images done, images in all) from time to time.
        memory_limit_bytes: a larger result lies in a file, which is mapped into memory.
        cache_dir: the folder of that file; by default that of `load_dataset`.

    Returns:
        Images, in the order of the split.

    Raises:
        InputError: an image is empty, truncated, neither a JPEG nor a PNG, has more than 2^28 bytes, or
            would have more than 178,956,970 pixels before or after it is resized; or a class has no image left.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    _check_count("size", size)
    ops.check_resize(mode, filter)
    how = (size, mode, filter)
    chunks = _decoded_files(split, how) if split.pixels is None else _decoded_arrays(split, how)
    kept, bad = [], []
    with _store(split, how, memory_limit_bytes, cache_dir) as store:
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
    pixels, sides = store.pixels(), np.array(store.sides, np.int64)
    if mode == "squash":
        pixels = pixels.reshape(-1, size, size, 3)
    return Images(pixels, np.asarray(split.labels[kept], np.int32), tuple(split.names[i] for i, _ in bad), sides)


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A data set that is ready to train and test on.

    Attributes:
        name, classes, digest: of the data set.
        train, test: Images.
        mean: float32 [3] in RGB order, by default the mean of the training images, subtracted from all.
        preprocessing: a Preprocessing.
    """

    name: str
    classes: tuple
    digest: str
    train: Images
    test: Images
    mean: np.ndarray
    preprocessing: Preprocessing

    @property
    def pixels(self):
        """How a network that is trained on this task sees pixels: order and scale, with the mean of the task."""
        return self.preprocessing.pixels.with_mean([float(str(value)) for value in self.mean])  # 0.1, not 0.10000000149


def prepare(dataset, preprocessing, *, mean=None, skip_bad_images=False, progress=None, cache_dir=None):
    """Decodes a Dataset for a Preprocessing, and computes the mean of its training images if none is given.

    Args:
        dataset: a Dataset.
        preprocessing: a Preprocessing.
        mean: three numbers in RGB order, subtracted from all images; None for that of the training images.
        skip_bad_images, progress, cache_dir: as in `decode`.

    Returns:
        A Task.

    Raises:
        InputError, OSError: as in `decode`.
    """
    options = {"skip_bad_images": skip_bad_images, "progress": progress, "cache_dir": cache_dir}
    options |= {"mode": preprocessing.resize_mode, "filter": preprocessing.resize_filter}
    train, test = (decode(split, preprocessing.resize, **options) for split in (dataset.train, dataset.test))
    mean = channel_mean(train) if mean is None else np.asarray(mean, np.float32)
    return Task(dataset.name, dataset.classes, dataset.digest, train, test, mean, preprocessing)


def channel_mean(images):
    """The mean of each channel over all pixels of all images, in RGB order: float32 [3], summed in float64."""
    total = np.zeros(3)
    for image in map(images.__getitem__, range(len(images))):
        # down the columns first, in integers: the fastest order, and exact
        total += image.reshape(len(image), -1).sum(axis=0, dtype=np.uint32).reshape(-1, 3).sum(axis=0, dtype=np.float64)
    return (total / images.sides.prod(axis=1).sum()).astype(np.float32)


def training_batches(images, preprocessing, mean, *, batch_size, seed, start=0, iterations, part=(0, 1)):
    """Streams randomly blurred, mirrored and cropped images, epoch after epoch across the borders of batches.

    The permutation of an epoch is a function of (seed, epoch), and what is drawn for an image
    one of (seed, epoch, index): the stream from `start` on is, to the bit, the rest of the stream
    from 0.

    Args:
        images: Images, resized as `preprocessing` says.
        preprocessing: a Preprocessing.
        mean: float32 [3] in RGB order, subtracted from the pixels (0 to 255).
        batch_size: images a batch; it may exceed their number.
        seed: a non-negative integer.
        start: the first batch.
        iterations: the batch to stop before.
        part: (i, n) for the i-th of n equal parts of each batch alone; the n parts one after the other are the batch,
            up to rounding in the blur.

    Returns:
        A tf.data.Dataset of iterations - start pairs: float32 [b, crop, crop, 3] and int32 [b], where b is
        batch_size / n.

    Raises:
        InputError: an argument is out of its range.
    """
    _check_stream(images, preprocessing, batch_size)
    if not 0 <= seed < 2**60:
        raise InputError(f"seed is {seed}: it must lie between 0 and 2^60")
    if not 0 <= start <= iterations:
        raise InputError(f"the batches {start} to {iterations} were asked for: the first must not be negative or above the last")
    index, parts = part
    if not 0 <= index < parts or batch_size % parts:
        raise InputError(f"part is {part} of batches of {batch_size}: give one of as many parts as divide them")
    size = batch_size // parts
    rows = slice(index * size, (index + 1) * size)
    spec = tf.TensorSpec([size], tf.int64)
    places = tf.data.Dataset.from_generator(
        lambda: ((e[rows], i[rows]) for e, i in _training_order(len(images), batch_size, seed, start, iterations)),
        output_signature=(spec, spec),
    )
    read, labels = images.reader, tf.constant(images.labels)
    mean = tf.constant(mean, tf.float32)

    @tf.autograph.experimental.do_not_convert  # it has no branches, and converting it takes half a second
    def make(epochs, indices):
        return _augmented(read, preprocessing, mean, seed, epochs, indices), tf.gather(labels, indices)

    return places.map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(2)


def test_batches(images, preprocessing, mean, *, batch_size, order=None, crops=1):
    """Every image once, in order, cropped at its centre, or ten times; the last batch may be smaller.

    Ten crops are those of the four corners (top left, top right, bottom left, bottom right) and of the
    centre, and then their mirror images.

    Args:
        images: Images, resized as `preprocessing` says.
        preprocessing: a Preprocessing; its blur and mirror do not count.
        mean: float32 [3] in RGB order, subtracted from the pixels (0 to 255).
        batch_size: images a batch.
        order: int64 [n], the indices of the images to show; None for all from first to last.
        crops: 1 or 10 of each image.

    Returns:
        A tf.data.Dataset of float32 [b, crop, crop, 3], or [b, 10, crop, crop, 3], and int32 [b].

    Raises:
        InputError: an argument is out of its range.
    """
    _check_stream(images, preprocessing, batch_size)
    if crops not in (1, 10):
        raise InputError(f"crops is {crops!r}: it must be 1 or 10")
    read, labels = images.reader, tf.constant(images.labels)
    mean, size = tf.constant(mean, tf.float32), preprocessing.crop

    @tf.autograph.experimental.do_not_convert
    def make(indices):
        places = _central_place if crops == 1 else _ten_places
        views = [read.window(indices, *place) for place in places(read.sides(indices), size)]
        x = views[0] if crops == 1 else tf.stack(views, axis=1)
        x = tf.ensure_shape(x, [None] * (len(x.shape) - 3) + [size, size, 3])
        return _ordered(tf.cast(x, tf.float32) - mean, preprocessing), tf.gather(labels, indices)

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
    shorter = images.sides.min(axis=1)
    wrong = shorter[shorter != preprocessing.resize]
    if wrong.size:
        raise InputError(f"the images are decoded at {wrong[0]} pixels, but resize is {preprocessing.resize}")
    if preprocessing.resize_mode == "squash" and not (images.sides == preprocessing.resize).all():
        raise InputError('the images kept their aspect, but resize_mode is squash: decode them with mode="squash"')


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


def _augmented(read, preprocessing, mean, seed, epochs, indices):
    """Section 4.1's random blur, mirror and crop of images [b], each by its own seeds: float32 [b, crop, crop, 3].

    The crop and the mirror are drawn first, so that only what they show is read and blurred.
    """

    def seeds(operation):
        # no two of (seed, operation) and no two of (epoch, index) share a number
        return tf.stack([tf.fill(tf.shape(indices), tf.constant(4 * seed + operation, tf.int64)), epochs * 2**32 + indices], 1)

    p = preprocessing
    margin = p.blur_kernel // 2 if p.blur == "gaussian" else 0
    rows, columns = ops.random_places(read.sides(indices), p.crop, seeds(2), seeds(1) if p.mirror else None, margin)
    if p.blur == "authors":
        x = _distorted(read, indices, seeds(0), rows, columns) - mean
    elif p.blur == "gaussian":
        x = ops.blur_inside(read.window(indices, rows, columns), seeds(0), p.blur_kernel, p.blur_sigma, mean)
    else:
        x = tf.cast(read.window(indices, rows, columns), tf.float32) - mean
    return _ordered(tf.ensure_shape(x, [indices.shape[0], p.crop, p.crop, 3]), p)


def _distorted(read, indices, seeds, rows, columns):
    """The authors' distortion of each whole image, whose mean the contrast needs, and of that its rows and columns."""

    def one(inputs):
        index, seed, rows, columns = inputs
        x = ops.random_distortion(read.whole(index), seed)
        return tf.gather(tf.gather(x, rows, axis=0), columns, axis=1)

    return tf.map_fn(one, (indices, seeds, rows, columns), fn_output_signature=tf.float32)


def _central_place(sides, size):
    """The rows and columns of the central crop of each image [b]: a list of one pair of int64 [b, size]."""
    middle = (sides - size) // 2
    return [_window(middle[:, 0], middle[:, 1], size)]


def _ten_places(sides, size):
    """The rows and columns of the four corners and the centre, and of their mirror images: ten such pairs."""
    first, last = tf.zeros_like(sides[:, 0]), sides - size
    corners = [_window(top, left, size) for top in (first, last[:, 0]) for left in (first, last[:, 1])]
    upright = corners + _central_place(sides, size)
    return upright + [(rows, columns[:, ::-1]) for rows, columns in upright]


def _window(top, left, size):
    along = tf.range(size, dtype=tf.int64)
    return top[:, None] + along, left[:, None] + along


def _ordered(x, preprocessing):
    """The scale, and the order of the channels, that the network was trained on."""
    pixels = preprocessing.pixels
    if pixels.scale != (1.0, 1.0, 1.0):
        x = x * tf.constant(pixels.scale, tf.float32)
    return x[..., ::-1] if pixels.channel_order == "bgr" else x


def _decoded_arrays(split, how):
    """Yields (first, last, uint8 [last - first, h, w, 3], {}) over the images of an array."""
    for first in range(0, len(split), DECODE_BATCH):
        last = min(first + DECODE_BATCH, len(split))
        yield first, last, ops.resize(ops.to_three_channels(split.pixels[first:last]), *how).numpy(), {}


def _decoded_files(split, how):
    """Yields (first, last, pixels, {index: reason}) over the files: the pixels of those that decode, in order."""
    if split.files is not None:
        # a file too large for an image gets a name that cannot be read, and is told from others in the second try
        source = [os.fsencode(path) if path.stat().st_size <= MAX_IMAGE_BYTES else b"" for path in split.files]
        read = tf.io.read_file
    else:
        source = np.arange(len(split))
        read = lambda i: tf.ensure_shape(tf.numpy_function(split.read, [i], tf.string, stateful=False), [])  # noqa: E731
    dataset = tf.data.Dataset.from_tensor_slices((np.arange(len(split)), source))

    @tf.autograph.experimental.do_not_convert
    def make(i, place):
        return i, _decode_bytes(read(place), *how)

    dataset = dataset.map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    first, decoded = 0, {}
    for i, pixels in dataset.ignore_errors(log_warning=False).prefetch(DECODE_BATCH).as_numpy_iterator():
        decoded[int(i)] = pixels
        if len(decoded) == DECODE_BATCH:
            yield first, int(i) + 1, *_with_second_try(split, how, first, int(i) + 1, decoded)
            first, decoded = int(i) + 1, {}
    if first < len(split):
        yield first, len(split), *_with_second_try(split, how, first, len(split), decoded)


def _with_second_try(split, how, first, last, decoded):
    """Reads again the files first..last-1 that the parallel pass dropped, to learn why."""
    reasons = {}
    for i in range(first, last):
        if i not in decoded:
            content = split.read(i)  # raises OSError where the disk is at fault and not the image
            try:
                if len(content) <= MAX_IMAGE_BYTES:
                    decoded[i] = _decode_bytes(tf.constant(content), *how).numpy()
                    continue
            except tf.errors.InvalidArgumentError:
                pass
            reasons[i] = _reason(content)
    return [decoded[i] for i in range(first, last) if i in decoded], reasons


@tf.function(autograph=False)
def _decode_bytes(content, size, mode, filter):
    """The image in the bytes of a JPEG or a PNG file, resized: uint8 [h, w, 3]. All else raises InvalidArgumentError."""
    is_jpeg = tf.io.is_jpeg(content)
    sides = tf.cond(is_jpeg, lambda: tf.io.extract_jpeg_shape(content)[:2], lambda: _png_sides(content))
    long = tf.cast(sides, tf.int64)
    count = tf.reduce_prod(long)
    if mode == "shorter_side":  # a line of pixels would become a long band
        count = tf.maximum(count, tf.reduce_max(long) * size // tf.reduce_min(long) * size)
    checks = [
        tf.debugging.assert_positive(sides),
        tf.debugging.assert_less_equal(count, tf.constant(MAX_PIXELS, tf.int64)),
    ]
    with tf.control_dependencies(checks):  # the pixels of a huge image are never made
        content = tf.identity(content)
    image = tf.cond(is_jpeg, lambda: tf.io.decode_jpeg(content, channels=3), lambda: tf.io.decode_png(content, channels=3))
    return ops.resize(image, size, mode, filter)


def _png_sides(content):
    """Height and width from the header of a PNG: int32 [2]."""
    is_png = tf.equal(tf.strings.substr(content, 0, 8), PNG_SIGNATURE)
    is_whole = tf.strings.length(content) >= 24  # else the error of substr below quotes the bytes, and cannot be decoded itself
    with tf.control_dependencies([tf.debugging.Assert(is_png & is_whole, ["neither JPEG nor PNG"])]):
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
def _store(split, how, memory_limit_bytes, cache_dir):
    """Yields where to append the pixels of a split: memory, or a file that appears when all are written."""
    identity = hashlib.sha256(repr((split.names, *how)).encode()).hexdigest()[:16]
    path = pathlib.Path(default_cache_dir() if cache_dir is None else cache_dir) / f"pixels-{identity}.uint8"
    size, mode, _ = how
    needed = len(split) * size * size * 3
    if mode == "shorter_side":
        needed = max(needed, memory_limit_bytes)  # not known yet
    with contextlib.ExitStack() as stack:
        yield _Store(path, needed if needed <= memory_limit_bytes else 0, stack)


class _Store:
    """Pixels one image after the other: in memory up to its capacity, in a file as soon as it is exceeded."""

    def __init__(self, path, capacity, stack):
        self.sides, self._bytes = [], 0
        self._path, self._stack, self._file = path, stack, None
        # pages that are not written take no memory, and are aligned so that tensors can share them
        self._memory = np.frombuffer(mmap.mmap(-1, max(1, capacity)), np.uint8)[:capacity]

    def append(self, images):
        for image in images:
            end = self._bytes + image.size
            if self._file is None and end > len(self._memory):
                self._open_file()
            if self._file is None:
                self._memory[self._bytes : end] = image.reshape(-1)
            else:
                # written, not mapped: a full disk then raises OSError, where a mapping would kill the process
                self._file.write(image.tobytes())
            self.sides.append(image.shape[:2])
            self._bytes = end

    def _open_file(self):
        self._file = self._stack.enter_context(self._stack.enter_context(atomic_path(self._path)).open("wb"))
        self._file.write(self._memory[: self._bytes])
        self._memory = None

    def pixels(self):
        """uint8 [pixels in all, 3], once the file has its name."""
        if self._file is None:
            return self._memory[: self._bytes].reshape(-1, 3)
        # copy-on-write, as only writable memory can be shared with tensors; nobody writes to it
        return np.memmap(self._path, np.uint8, mode="c", shape=(self._bytes // 3, 3))
