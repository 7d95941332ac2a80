"""Decoding: turns the images of a split into pixels of one size, only those that are used, each once."""

import dataclasses
import functools
import mmap
import os

import numpy as np
import tensorflow as tf

from l2sp_tf.data import images as ops
from l2sp_tf.data.codecs import check, decode_bytes
from l2sp_tf.data.headers import header_of, too_large
from l2sp_tf.data.sets import default_cache_dir
from l2sp_tf.data.store import PixelStore
from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.memory import shared_tensor
from l2sp_tf.files.reading import MAX_IMAGE_BYTES

DECODE_BATCH = 64
MEMORY_LIMIT_BYTES = 2**26  # takes about a second to decode: not worth a file
MEASURED_IMAGES = 100  # images whose headers are read to estimate a split's size


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Decoded images.

    Attributes:
        pixels: uint8 in RGB order: [n, size, size, 3]; or [all pixels, 3], if sides differ or the images lie in a
            mapped `PixelStore`.
        labels: int32 [n].
        skipped: the names of the images that were left out because they could not be decoded.
        sides: int64 [n, 2], the height and width of each image; None if the shape of `pixels` gives them.
        offsets: int64 [n], the offset of each image in pixels; None if they follow one another.
        places: int64 [n], the offsets if all images of the split followed one another. They identify a part of a split
            wherever its pixels lie.
    """

    pixels: np.ndarray
    labels: np.ndarray
    skipped: tuple = ()
    sides: np.ndarray | None = None
    offsets: np.ndarray | None = None
    places: np.ndarray | None = None

    def __post_init__(self):
        if self.sides is None:
            object.__setattr__(self, "sides", np.tile(np.int64(self.pixels.shape[1:3]), (len(self.pixels), 1)))
        if self.places is None:
            places = np.cumsum(self.sides.prod(axis=1)) - self.sides.prod(axis=1)
            object.__setattr__(self, "places", places.astype(np.int64))
        if self.offsets is None:
            object.__setattr__(self, "offsets", self.places)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        """Returns the pixels of one image: uint8 [h, w, 3]."""
        height, width = self.sides[index]
        first = self.offsets[index]
        return self.pixels.reshape(-1, 3)[first : first + height * width].reshape(height, width, 3)

    def take(self, positions):
        """Returns the images at `positions` alone, in that order, sharing the pixels."""
        labels, *rest = (array[positions] for array in (self.labels, self.sides, self.offsets, self.places))
        return Images(self.pixels, labels, self.skipped, *rest)

    @functools.cached_property
    def reader(self):
        """The `_Reader` of these images."""
        return _Reader(self)


class _Reader:
    """Reads whole images or parts of them inside a tf.data map."""

    def __init__(self, images):
        with tf.device("CPU:0"):
            self._pixels = shared_tensor(images.pixels.reshape(-1, 3))  # the graph captures it and does not copy it
            self._offsets, self._sides = tf.constant(images.offsets), tf.constant(images.sides)

    def sides(self, indices):
        """Returns the height and width of each image: int64 [b, 2]."""
        return tf.gather(self._sides, indices)

    def window(self, indices, rows, columns):
        """Returns the pixels of each image [b] in its own rows [b, h] and columns [b, w]: uint8 [b, h, w, 3]."""
        rows = tf.gather(self._offsets, indices)[:, None] + rows * self.sides(indices)[:, 1:]
        return tf.gather(self._pixels, rows[:, :, None] + columns[:, None, :])

    def whole(self, index):
        """Returns one image: uint8 [h, w, 3]."""
        height, width = tf.unstack(self._sides[index])
        first = self._offsets[index]
        return tf.reshape(self._pixels[first : first + height * width], tf.stack([height, width, 3]))


class Undecoded:
    """The images of a split, decoded on first use; from then on it acts as their `Images`.

    Args:
        split: a Split.
        size, options: as in `decode`.
    """

    def __init__(self, split, size, **options):
        self.split, self._size, self._options = split, size, options
        self._skips = options.get("skip_bad_images", False)

    @functools.cached_property
    def images(self):
        """All images, decoded: `Images`."""
        return decode(self.split, self._size, **self._options)

    @property
    def skipped(self):
        """As in `Images`; decodes nothing if a bad image is an error."""
        return self.images.skipped if self._skips else ()

    @property
    def labels(self):
        """As in `Images`; decodes nothing if a bad image is an error."""
        return self.images.labels if self._skips else np.asarray(self.split.labels, np.int32)

    def sample(self, positions):
        """Returns the `Images` at some positions of the split, decoding only these unless all are decoded already."""
        if "images" in self.__dict__ and not self.images.skipped:
            return self.images.take(positions)
        return decode(self.split.take(positions), self._size, **self._options, every_class=False)

    def __len__(self):
        return len(self.images if self._skips else self.split)

    def __getitem__(self, index):
        return self.images[index]

    def __getattr__(self, name):
        if name.startswith("_"):  # copying and pickling look these up before `split` is set
            raise AttributeError(name)
        return getattr(self.images, name)


def decode(
    split,
    size,
    *,
    mode="squash",
    filter="area",
    skip_bad_images=False,
    progress=None,
    memory_limit_bytes=MEMORY_LIMIT_BYTES,
    cache_dir=None,
    every_class=True,
):
    """Reads and decodes every image of a split, converts it to three channels and resizes it.

    Files are JPEG, PNG, GIF, BMP or WebP, whatever their names. They are turned upright as their Exif orientation says,
    and transparent ones are drawn on white. Records of TensorFlow Datasets are JPEG or PNG, and are read as it reads
    them: neither turned nor drawn on white.

    A large result lies in the `PixelStore` of the cache folder, mapped into memory. An image that any process has decoded
    there in the same way is not decoded again, in any split.

    Args:
        split: a Split.
        size: the side of the result, or its shorter side.
        mode, filter: as in `resize`.
        skip_bad_images: whether to leave out images that cannot be decoded, instead of raising.
        progress: called with (images done, images to decode) from time to time.
        memory_limit_bytes: the largest result that each process decodes into its own memory.
        cache_dir: the folder of the store; by default that of `load_dataset`.
        every_class: whether to refuse a class without an image left.

    Returns:
        Images, in the order of the split.

    Raises:
        InputError: an image is empty, truncated or of another kind, has more than 2^28 bytes, or has more than
            178,956,970 pixels before or after resizing; or a class has no image left.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    size = fields.whole("size", size)
    ops.check_resize(mode, filter)
    how = (size, mode, filter)
    progress = progress or (lambda done, count: None)
    if decoded_bytes(split, size, mode) <= memory_limit_bytes:
        pixels, offsets, sides, bad = _into_memory(split, how, progress)
    else:
        store = PixelStore(default_cache_dir() if cache_dir is None else cache_dir, how)
        bad = _into_store(store, split, how, progress)
        pixels, offsets, sides = store.read([key for i, key in enumerate(split.keys) if i not in bad])
    if bad and not skip_bad_images:
        raise InputError(_bad_images_message(split, bad))
    kept = [i for i in range(len(split)) if i not in bad]
    if every_class:
        _check_every_class_is_left(split, kept)
    if mode == "squash" and offsets is None:
        pixels = pixels.reshape(-1, size, size, 3)
    labels = np.asarray(split.labels[kept], np.int32)
    return Images(pixels, labels, tuple(split.names[i] for i in sorted(bad)), sides, offsets)


def decoded_bytes(split, size, mode="squash"):
    """Returns how many bytes a split's decoded images take; for large splits with "shorter_side" an estimate."""
    count = len(split) * size * size * 3
    if mode == "squash" or not len(split):
        return count
    places = np.unique(np.linspace(0, len(split) - 1, MEASURED_IMAGES).round().astype(int))
    sides = [split.pixels.shape[1:3] if split.pixels is not None else _sides(split.read(i)) for i in places]
    areas = [int(np.prod([side * size // min(pair) for side in pair])) for pair in sides if min(pair) > 0]
    return int(np.sum(areas) * 3 * len(split) / len(places))


def _sides(content):
    """Returns the height and width that an image file states, zeros if it states none."""
    try:
        return header_of(content).sides
    except ValueError:
        return 0, 0


def _into_memory(split, how, progress):
    """Decodes a split into memory.

    Returns:
        Pixels [all pixels, 3], None, sides [n, 2], and {index: reason} of the bad images.
    """
    kept, bad = [], {}
    for _, last, pixels, reasons in _decoded(split, how):
        kept.extend(pixels)
        bad |= reasons
        progress(last, len(split))
    size = sum(image.size for image in kept)
    memory = np.frombuffer(mmap.mmap(-1, max(1, size)), np.uint8)[:size]  # mmap is aligned, so tensors can share it
    if kept:
        np.concatenate([image.reshape(-1) for image in kept], out=memory)
    return memory.reshape(-1, 3), None, np.array([image.shape[:2] for image in kept], np.int64).reshape(-1, 2), bad


def _into_store(store, split, how, progress):
    """Decodes the images of a split that the store lacks, and returns {index: reason} of the bad images."""
    if not store.missing(split.keys):
        return {}
    bad = {}
    with store.writing():
        missing = set(store.missing(split.keys))  # another process may have stored some while this one waited
        first = {key: i for i, key in reversed(list(enumerate(split.keys))) if key in missing}
        places = sorted(first.values())
        part = split.take(places)
        for begin, end, pixels, reasons in _decoded(part, how) if places else ():
            keys = [split.keys[places[i]] for i in range(begin, end) if i not in reasons]
            store.append(keys, list(pixels))
            bad |= {split.keys[places[i]]: reason for i, reason in reasons.items()}
            progress(end, len(part))
    return {i: bad[key] for i, key in enumerate(split.keys) if key in bad}


def _decoded(split, how):
    """Yields (first, last, pixels, {index: reason}) over a split, and decodes nothing else."""
    return _decoded_files(split, how) if split.pixels is None else _decoded_arrays(split, how)


def _decoded_arrays(split, how):
    """Yields (first, last, uint8 [last - first, h, w, 3], {}) over the images of an array."""
    for first in range(0, len(split), DECODE_BATCH):
        last = min(first + DECODE_BATCH, len(split))
        yield first, last, ops.resize(ops.to_three_channels(split.pixels[first:last]), *how).numpy(), {}


def _decoded_files(split, how):
    """Yields (first, last, pixels, {index: reason}) over the files: the pixels of those that decode, in order."""
    if split.files is not None:
        # a file too large for an image gets an unreadable name; the second try finds out that it is too large
        source = [os.fsencode(path) if path.stat().st_size <= MAX_IMAGE_BYTES else b"" for path in split.files]
        read = tf.io.read_file
    else:
        source = np.arange(len(split))
        read = lambda i: tf.ensure_shape(tf.numpy_function(split.read, [i], tf.string, stateful=False), [])  # noqa: E731
    dataset = tf.data.Dataset.from_tensor_slices((np.arange(len(split)), source))

    @tf.autograph.experimental.do_not_convert
    def make(i, place):
        return i, decode_bytes(read(place), *how, as_stored=split.files is None)

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
    """Reads the files first..last-1 that the parallel pass dropped again, to learn the reason."""
    reasons = {}
    for i in range(first, last):
        if i not in decoded:
            content = split.read(i)  # raises OSError if the disk is at fault, not the image
            try:
                check(content, how, as_stored=split.files is None)
                decoded[i] = decode_bytes(tf.constant(content), *how, as_stored=split.files is None).numpy()
            except ValueError as error:
                reasons[i] = _reason(split, i, error)
            except tf.errors.OpError:
                reasons[i] = "truncated or damaged"
    return [decoded[i] for i in range(first, last) if i in decoded], reasons


def _reason(split, i, error):
    """Returns why an image is not even decoded; of a file that is too large only the beginning was read."""
    size = split.files[i].stat().st_size if split.files is not None else 0
    return too_large(size, MAX_IMAGE_BYTES, "bytes") if size > MAX_IMAGE_BYTES else str(error)


def _bad_images_message(split, bad):
    shown = "; ".join(f"{split.names[i]} ({bad[i]})" for i in sorted(bad)[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return (
        f"{len(bad)} of {len(split)} images cannot be decoded: {shown}{more}. "
        "Repair or remove them, or leave them out with --skip_bad_images."
    )


def _check_every_class_is_left(split, kept):
    lost = np.setdiff1d(split.labels, split.labels[kept])
    if lost.size:
        example = split.names[int(np.flatnonzero(split.labels == lost[0])[0])]
        raise InputError(f"{lost.size} classes have no image that can be decoded, such as the class of {example}.")
