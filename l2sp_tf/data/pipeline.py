"""The tf.data pipeline: streams decoded images, unchanged or augmented."""

import dataclasses
import functools

import numpy as np
import tensorflow as tf

from l2sp_tf.data import images as ops
from l2sp_tf.data.decoding import Images, Undecoded
from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError
from l2sp_tf.models.pixels import PixelFormat


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Section 4.1: resize, subtract the mean, blur, mirror and crop.

    Attributes:
        resize: the new length of both sides, or of the shorter side, in pixels.
        resize_mode: "squash" (both sides) or "shorter_side".
        resize_filter: "area", or "bilinear" for the filter of the authors' code.
        crop: the side of the square that the network sees.
        blur: "gaussian", "authors" (their colour distortion, before the mean is subtracted) or "none".
        blur_kernel: the width of the Gaussian kernel in pixels, odd.
        blur_sigma: the range of its standard deviation, in pixels.
        mirror: whether to mirror half of the training images.
        pixels: a PixelFormat; its channel order and scale are applied last, its mean is not used.
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
        for name in ("resize", "crop"):
            self._set(name, fields.whole(name, getattr(self, name)))
        ops.check_resize(self.resize_mode, self.resize_filter)
        fields.choice("blur", self.blur, ops.BLURS)
        fields.yes_or_no("mirror", self.mirror)
        if self.crop > self.resize:
            raise InputError(f"crop is {self.crop}, larger than resize, {self.resize}: give a smaller crop or a larger resize.")
        kernel, sigma = ops.check_blur(self.blur_kernel, self.blur_sigma)
        self._set("blur_kernel", kernel)
        self._set("blur_sigma", sigma)
        if not isinstance(self.pixels, PixelFormat):
            raise InputError(f"pixels is {self.pixels!r}: give a PixelFormat.")

    def _set(self, name, value):
        object.__setattr__(self, name, value)

    @classmethod
    def for_size(cls, side):
        """Returns the paper's image operations for crops of another side, in proportion: to s from 224 pixels.

        Resizes to 256 s / 224, and blurs with a kernel of about 5 s / 224 pixels, the nearest odd number, and deviations of
        0.1 s / 224 to 2 s / 224; a kernel of one pixel is no blur.

        Args:
            side: s, in pixels.
        """
        scale = fields.whole("image_size", side) / cls.crop
        kernel = 2 * round((cls.blur_kernel * scale - 1) / 2) + 1
        low, high = (float(f"{sigma * scale:.4g}") for sigma in cls.blur_sigma)
        blur = {"blur_kernel": kernel, "blur_sigma": (low, high)} if kernel > 1 else {"blur": "none"}
        return cls(resize=round(cls.resize * scale), crop=side, **blur)

    def with_pixels(self, pixels):
        """Returns a copy for a network with another pixel format."""
        return dataclasses.replace(self, pixels=pixels)

    def plain(self):
        """Returns all attributes but the pixel format, as a dict."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "pixels"}


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """A data set that is ready for training and testing.

    Attributes:
        name, classes, digest: of the data set.
        train, test: Images, or Undecoded ones.
        mean: float32 [3] in RGB order, subtracted from all images; by default the mean of the training images.
        preprocessing: a Preprocessing.
    """

    name: str
    classes: tuple
    digest: str
    train: Images | Undecoded
    test: Images | Undecoded
    mean: np.ndarray
    preprocessing: Preprocessing

    @property
    def pixels(self):
        """The pixel format of a network that is trained on this task: order and scale, with the mean of the task."""
        return self.preprocessing.pixels.with_mean([float(str(value)) for value in self.mean])  # 0.1, not 0.10000000149

    def train_batches(self, **options):
        """Returns the stream of `training_batches`, whose options are given."""
        return training_batches(self.train, self.preprocessing, self.mean, **options)

    def test_data(self, batch_size, crops=1):
        """Returns the stream of `test_batches`."""
        return test_batches(self.test, self.preprocessing, self.mean, batch_size=batch_size, crops=crops)


def prepare(dataset, preprocessing, *, mean=None, mean_of=None, train=None, **options):
    """Makes a Dataset ready for a Preprocessing, and computes the mean of its training images unless a mean is given.

    A split is decoded on first use: the training images here if their mean is needed, otherwise during training or
    testing.

    Args:
        dataset: a Dataset.
        preprocessing: a Preprocessing.
        mean: three numbers in RGB order, subtracted from all images; None for the mean of the training images.
        mean_of: int64 [k], the positions of the training images to average; None for all.
        train: the training images, if `undecoded` has made them before.
        options: skip_bad_images, progress and cache_dir, as in `decode`.

    Returns:
        A Task.

    Raises:
        InputError, OSError: as in `decode`.
    """
    train = undecoded(dataset.train, preprocessing, **options) if train is None else train
    test = undecoded(dataset.test, preprocessing, **options)
    if mean is None:
        mean = channel_mean(train.images if mean_of is None else train.sample(mean_of))
    mean = np.asarray(mean, np.float32)
    return Task(dataset.name, dataset.classes, dataset.digest, train, test, mean, preprocessing)


def undecoded(split, preprocessing, **options):
    """Returns the images of a Split for a Preprocessing, decoded on first use: `Undecoded`.

    Args:
        split: a Split.
        preprocessing: a Preprocessing.
        options: as in `decode`.
    """
    p = preprocessing
    return Undecoded(split, p.resize, mode=p.resize_mode, filter=p.resize_filter, **options)


def channel_mean(images):
    """Computes the mean of each channel over all pixels of all images, in RGB order: float32 [3], summed in float64."""
    total = np.zeros(3)
    for image in map(images.__getitem__, range(len(images))):
        # columns first, in integers: this is exact, and the fastest order
        total += image.reshape(len(image), -1).sum(axis=0, dtype=np.uint32).reshape(-1, 3).sum(axis=0, dtype=np.float64)
    return (total / images.sides.prod(axis=1).sum()).astype(np.float32)


def training_batches(images, preprocessing, mean, *, batch_size, seed, first_step=0, iterations, part=(0, 1)):
    """Streams randomly blurred, mirrored and cropped images; a batch may span two epochs.

    The permutation of an epoch is a function of (seed, epoch), and the random numbers of an image are a function of
    (seed, epoch, index). So the stream from `first_step` on equals the rest of the stream from 0, to the bit.

    Args:
        images: Images, resized as `preprocessing` says.
        preprocessing: a Preprocessing.
        mean: float32 [3] in RGB order, subtracted from the pixels (0 to 255).
        batch_size: images per batch; it may exceed the number of images.
        seed: a non-negative integer.
        first_step: the number of the first batch, from 0.
        iterations: the number of the batch to stop before.
        part: (i, n) for the i-th of n equal parts of each batch; the n parts in order make the batch, up to rounding in
            the blur.

    Returns:
        A tf.data.Dataset of iterations - first_step pairs: float32 [b, crop, crop, 3] and int32 [b], where b is
        batch_size / n.

    Raises:
        InputError: an argument is out of its range.
    """
    _check_stream(images, preprocessing, batch_size)
    order = {"batch_size": batch_size, "seed": seed, "first_step": first_step, "iterations": iterations, "part": part}
    rows = training_rows(len(images), **order)
    spec = tf.TensorSpec([batch_size // part[1]], tf.int64)
    places = tf.data.Dataset.from_generator(rows, output_signature=(spec, spec))
    read, labels = images.reader, tf.constant(images.labels)
    mean = tf.constant(mean, tf.float32)

    @tf.autograph.experimental.do_not_convert  # it has no branches to convert, and the conversion takes half a second
    def make(epochs, indices):
        return _augmented(read, preprocessing, mean, seed, epochs, indices), tf.gather(labels, indices)

    return places.map(make, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(2)


def test_batches(images, preprocessing, mean, *, batch_size, order=None, crops=1):
    """Streams every image once, in order, with a central crop or ten crops; the last batch may be smaller.

    The ten crops are the four corners (top left, top right, bottom left, bottom right), the centre, and then their
    mirror images.

    Args:
        images: Images, resized as `preprocessing` says.
        preprocessing: a Preprocessing; its blur and mirror are ignored.
        mean: float32 [3] in RGB order, subtracted from the pixels (0 to 255).
        batch_size: images per batch.
        order: int64 [n], the indices of the images to show; None for all from first to last.
        crops: 1 or 10 of each image.

    Returns:
        A tf.data.Dataset of float32 [b, crop, crop, 3], or [b, 10, crop, crop, 3], and int32 [b].

    Raises:
        InputError: an argument is out of its range.
    """
    _check_stream(images, preprocessing, batch_size)
    if crops not in (1, 10):
        raise InputError(f"crops is {crops!r}: give 1 or 10.")
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


test_batches.__test__ = False  # type: ignore[attr-defined]  # pytest must not take it for a test


def _check_stream(images, preprocessing, batch_size):
    fields.whole("batch_size", batch_size)
    if not len(images):
        raise InputError("There are no images to stream.")
    shorter = images.sides.min(axis=1)
    wrong = shorter[shorter != preprocessing.resize]
    if wrong.size:
        raise InputError(f"The images are decoded at {wrong[0]} pixels, but resize is {preprocessing.resize}.")
    if preprocessing.resize_mode == "squash" and not (images.sides == preprocessing.resize).all():
        raise InputError('The images kept their aspect, but resize_mode is squash: decode them with mode="squash".')


def training_rows(count, *, batch_size, seed, first_step, iterations, part=(0, 1)):
    """Returns the order of training: a function that yields the epoch and the index of each image of each batch.

    Args:
        count: number of images.
        batch_size, seed, first_step, iterations, part: as in `training_batches`.

    Returns:
        A function that returns a generator of pairs of int64 [batch_size / n].

    Raises:
        InputError: an argument is out of its range.
    """
    if not 0 <= seed < 2**60:
        raise InputError(f"seed is {seed}: give a number from 0 to below 2^60.")
    if not 0 <= first_step <= iterations:
        raise InputError(f"first_step is {first_step}, but there are {iterations} iterations: give one from 0 to {iterations}.")
    index, parts = part
    if not 0 <= index < parts or batch_size % parts:
        raise InputError(f"part is {part} and batch_size is {batch_size}: give (i, n) with 0 <= i < n and n a divisor.")
    size = batch_size // parts
    rows = slice(index * size, (index + 1) * size)
    return lambda: ((e[rows], i[rows]) for e, i in _training_order(count, batch_size, seed, first_step, iterations))


def _training_order(count, batch_size, seed, first_step, iterations):
    """Yields the epoch and the index of each image of each batch: two int64 [batch_size]."""

    @functools.lru_cache(maxsize=2)
    def permutation(epoch):
        return np.random.default_rng([seed, epoch]).permutation(count)

    for batch in range(first_step, iterations):
        epochs, places = np.divmod(np.arange(batch * batch_size, (batch + 1) * batch_size), count)
        indices = np.empty(batch_size, np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            indices[inside] = permutation(int(epoch))[places[inside]]
        yield epochs, indices


def _augmented(read, preprocessing, mean, seed, epochs, indices):
    """Applies section 4.1's random blur, mirror and crop to images [b], each with its own seeds: float32 [b, crop, crop, 3].

    The crop and the mirror are drawn first, so that only visible pixels are read and blurred.
    """

    def seeds(operation):
        # different pairs (seed, operation), and different pairs (epoch, index), give different numbers
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
    """Applies the authors' distortion to each whole image, because the contrast needs its mean, then takes rows and columns."""

    def one(inputs):
        index, seed, rows, columns = inputs
        x = ops.random_distortion(read.whole(index), seed)
        return tf.gather(tf.gather(x, rows, axis=0), columns, axis=1)

    return tf.map_fn(one, (indices, seeds, rows, columns), fn_output_signature=tf.float32)


def _central_place(sides, size):
    """Returns the rows and columns of the central crop of each image [b]: a list of one pair of int64 [b, size]."""
    middle = (sides - size) // 2
    return [_window(middle[:, 0], middle[:, 1], size)]


def _ten_places(sides, size):
    """Returns the rows and columns of the four corners and the centre, then of their mirror images: ten pairs."""
    first, last = tf.zeros_like(sides[:, 0]), sides - size
    corners = [_window(top, left, size) for top in (first, last[:, 0]) for left in (first, last[:, 1])]
    upright = corners + _central_place(sides, size)
    return upright + [(rows, columns[:, ::-1]) for rows, columns in upright]


def _window(top, left, size):
    along = tf.range(size, dtype=tf.int64)
    return top[:, None] + along, left[:, None] + along


def _ordered(x, preprocessing):
    """Applies the scale and the channel order that the network was trained with."""
    pixels = preprocessing.pixels
    if pixels.scale != (1.0, 1.0, 1.0):
        x = x * tf.constant(pixels.scale, tf.float32)
    return x[..., ::-1] if pixels.channel_order == "bgr" else x


def preprocessing_for(interface):
    """Returns the `Preprocessing` for testing a model with this `Interface`."""
    names = ("resize", "resize_mode", "resize_filter", "crop", "pixels")
    return Preprocessing(**{name: getattr(interface, name) for name in names})
