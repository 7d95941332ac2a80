"""Images of the caller's, ready for the network, as training data: arrays, a `tf.data.Dataset` or a `keras.utils.PyDataset`.

No image operation is applied to them. Both classes offer what a `Task` offers to a training.
"""

import contextlib
import dataclasses
import functools
import hashlib
import warnings

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.data.batches import aligned_arrays, are_arrays, check_images, describe, is_batched, labelled_batches, with_labels
from l2sp_tf.data.labels import are_shares, classes_of, targets_of, weights_of
from l2sp_tf.data.pipeline import training_rows
from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.memory import physical_memory

FORMS = "arrays (x, y) or (x, y, sample_weight) in a tuple, a tf.data.Dataset, or a keras.utils.PyDataset"
BLOCK = 256  # images that are checked or hashed at once
OUTPUT = "the output"  # whose labels they are, in messages


def given(data, model, *, batch_size, num_classes=None, name=None, say=print):
    """Returns the `GivenArrays` or the `GivenStream` of data that Keras' `fit` takes.

    Args:
        data: one of FORMS. Labels are integers [n] or [n, 1], or shares of the classes [n, K], one-hot or not.
        model: the Keras model, whose inputs x must fit.
        batch_size: images per batch of a `tf.data.Dataset` whose elements are single images.
        num_classes: K; by default the width of the shares, or for arrays of integers one more than the largest label.
        name: of a stream, by which a folder knows it again (see `GivenStream.check_known_again`).
        say: called with a line on an inferred number of classes.

    Raises:
        InputError: the data have another form, are empty or not finite, differ in length, or do not fit the model or
            `num_classes`.
    """
    if num_classes is not None:
        num_classes = fields.whole("num_classes", num_classes, 2)
    if isinstance(data, tf.data.Dataset):
        return DatasetStream(data, model, batch_size, num_classes, name)
    if isinstance(data, keras.utils.PyDataset):
        return PyDatasetStream(data, model, num_classes, name)
    if not are_arrays(data, model):
        raise InputError(f"data is a {describe(data)}: give {FORMS}, or what l2sp_tf.data.load_dataset or prepare returns.")
    return _arrays_of(data, model, num_classes, say)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A part of arrays: the places of its images and their classes, both int64 [n]."""

    places: np.ndarray
    labels: np.ndarray
    skipped: tuple = ()

    def __len__(self):
        return len(self.places)

    def take(self, positions):
        """Returns the part of the images at `positions` alone, in that order."""
        return Rows(self.places[positions], self.labels[positions])


@dataclasses.dataclass(frozen=True, eq=False)
class GivenArrays:
    """Images and labels in memory.

    Attributes:
        x: an array of images, or a dict or tuple of arrays for several inputs; 8-bit integers become float32 in batches.
        targets: int32 [n], the classes; or float32 [n, K], shares of the classes.
        weights: float32 [n], sample weights; or None.
        classes: the names of the classes, which are their numbers.
        train: the `Rows` to train on.
        test: the `Rows` to measure the accuracy on.
    """

    x: object
    targets: np.ndarray
    weights: np.ndarray | None
    classes: tuple
    train: Rows
    test: Rows
    name = "arrays"
    preprocessing = pixels = mean = None
    has_own_batches = False

    @property
    def has_shares(self):
        """Whether labels are shares of the classes."""
        return self.targets.ndim == 2

    @property
    def has_weights(self):
        """Whether there are sample weights."""
        return self.weights is not None

    @property
    def _parts(self):
        return (self.x, self.targets) if self.weights is None else (self.x, self.targets, self.weights)

    @functools.cached_property
    def digest(self):
        """The sha256 of all images, labels and weights, of their shapes and types and the number of classes, in hexadecimal."""
        return _digest(self._parts, len(self.classes))

    def sample(self):
        """Returns some of the images."""
        return _rows_of(self.x, slice(BLOCK))

    def image(self, place):
        """Returns one image."""
        return _rows_of(self.x, place)

    def check_judgeable(self):
        """Raises an InputError if the labels of an image are shares of several classes."""
        classes_of(self.targets, len(self.targets), len(self.classes), OUTPUT)

    def train_batches(self, *, batch_size, part=(0, 1), **order):
        """Streams batches in the order of `training_batches`, whose options are given: pairs, or triples with weights."""
        rows = training_rows(len(self.train), batch_size=batch_size, part=part, **order)
        places, parts, size = self.train.places, self._parts, batch_size // part[1]

        def generate():
            for _, indices in rows():
                yield _rows_of(parts, places[indices])

        spec = keras.tree.map_structure(lambda a: tf.TensorSpec([size, *a.shape[1:]], a.dtype), parts)
        return tf.data.Dataset.from_generator(generate, output_signature=spec).map(_with_floats).prefetch(2)

    def test_data(self, batch_size, crops=1):
        """Returns arrays for `labelled_batches`."""
        return _rows_of(self._parts, self.test.places)


def _arrays_of(data, model, num_classes, say):
    """Checks arrays, and returns their `GivenArrays`."""
    x, y, *weights = aligned_arrays(data, model)
    x = keras.tree.map_structure(np.asarray, x)
    leaves = keras.tree.flatten(x)
    n = len(leaves[0])
    if not n:
        raise InputError("The arrays hold no images: give at least one.")
    check_images(x, model)
    for start in range(0, n, BLOCK):
        if not are_finite(_rows_of(x, slice(start, start + BLOCK))):
            last = min(start + BLOCK, n) - 1
            raise InputError(f"x has NaN or infinite numbers in the images from {start} to {last}: mend them.")
    y = _one_output(y)
    if num_classes is None and are_shares(y.shape):
        num_classes = y.shape[1]
    if num_classes is None:
        num_classes = _count_classes(classes_of(y, n, np.iinfo(np.int32).max, OUTPUT, one_hot=False), say)
    targets = targets_of(y, n, num_classes, OUTPUT)
    weights = weights_of(weights[0], n, OUTPUT).astype(np.float32) if weights else None
    if weights is not None and not weights.any():
        raise InputError("The sample weights are all 0: give at least one image a weight.")
    rows = Rows(np.arange(n), targets.astype(np.int64) if targets.ndim == 1 else targets.argmax(axis=1))
    return GivenArrays(x, targets, weights, _numbered(num_classes), rows, rows)


def _count_classes(labels, say):
    """Returns one more than the largest label, at least 2; warns of numbers below it that no image has, as if counted from 1."""
    found = np.unique(labels)
    largest, count = found[-1], max(int(found[-1]) + 1, 2)
    say(f"The largest label is {largest}, so the new head has {count} classes: give num_classes if there are more.")
    if len(found) < count:
        gaps = np.flatnonzero(found != np.arange(len(found)))
        first = gaps[0] if len(gaps) else len(found)
        warnings.warn(
            f"The largest label is {largest}, and {count - len(found)} of the {count} classes have no image, first class {first}"
            ": number the classes from 0 on, or give num_classes.",
            stacklevel=2,
        )
    return count


class GivenStream:
    """Batches that the caller's stream gives, which is repeated as long as a training needs it.

    The batches of the stream are taken as they are, and each is checked when it comes. What the caller's own code draws at random
    is the caller's: a training that resumes skips the batches before, and equals one without a stop if the stream gives the
    same batches each time.

    Args:
        model: the Keras model, whose inputs x must fit.
        num_classes: as in `given`.
        data_name: as in `given`.

    Attributes:
        classes, has_shares, has_weights: as in `GivenArrays`.
        batch_size: images per batch; of the first one if the stream has its own batches.

    Raises:
        InputError: the stream is empty, or its first batch does not fit.
    """

    name = "stream"
    preprocessing = pixels = mean = None
    data: tf.data.Dataset | keras.utils.PyDataset
    batch_size: int
    has_own_batches = True

    def __init__(self, model, num_classes, data_name):
        self.model, self.num_classes, self.data_name, self._error = model, num_classes, data_name, None
        first = self._x, y, weights = self._first()
        self._digest = _digest(first, num_classes)
        y = _one_output(y)
        if num_classes is None and not are_shares(y.shape):
            raise InputError("The labels of a stream are numbers, and the largest is not known before its end: give num_classes.")
        self.classes, self.has_weights = _numbered(num_classes or y.shape[1]), weights is not None
        n = len(keras.tree.flatten(self._x)[0])
        self.batch_size = n if self.has_own_batches else self.batch_size
        self.has_shares = self._converted(are_finite(self._x), n, y, weights)[0].ndim == 2

    @property
    def digest(self):
        """What the stream is known by: its name if it has one, or else a hash of its first batch."""
        return f"named {self.data_name}" if self.data_name is not None else self._digest

    def check_known_again(self):
        """Checks that a folder would know this stream again.

        Raises:
            InputError: the stream has no name, and gives another first batch each time.
        """
        if self.data_name is None and _digest(self._first(), self.num_classes) != self._digest:
            raise InputError(
                "The stream gives another first batch each time it is read, so that a run in run_dir would not know it again: "
                'name the data, as in data_name="birds, shuffled", give a stream that repeats, or leave run_dir out.'
            )

    def sample(self):
        """Returns some of the images."""
        return self._x

    def train_batches(self, *, batch_size, seed, first_step, iterations, part=(0, 1)):
        """Streams the caller's batches from a step on: pairs, or triples with weights. Options as in `training_batches`.

        Raises:
            InputError: there are several machines, each of which would read a stream of its own.
        """
        if part != (0, 1):
            raise InputError("A stream cannot be shared by several machines, as each would draw its own: give arrays.")
        batches = self._batches(batch_size, seed, first_step, iterations).take(iterations - first_step)
        return batches.map(self._checked).prefetch(2)

    def test_data(self, batch_size, crops=1):
        """Returns the data for `labelled_batches`."""
        return self.data

    @contextlib.contextmanager
    def errors(self):
        """Raises what went wrong in reading the stream in place of TensorFlow's error about it."""
        try:
            yield
        except tf.errors.OpError:
            if self._error is None:
                raise
            raise self._error from None

    @contextlib.contextmanager
    def _noted(self):
        try:
            yield
        except Exception as error:
            self._error = error
            raise

    @tf.autograph.experimental.do_not_convert
    def _checked(self, x, y, weights=None):
        x = keras.tree.map_structure(_float, x)
        leaves = keras.tree.flatten(x)
        floats = [leaf for leaf in leaves if leaf.dtype.is_floating]
        finite = [tf.constant(True), *(tf.reduce_all(tf.math.is_finite(leaf)) for leaf in floats)]
        inputs = [tf.reduce_all(finite), tf.shape(leaves[0])[0], y, *([weights] if self.has_weights else [])]
        types = [tf.float32 if self.has_shares else tf.int32, *([tf.float32] if self.has_weights else [])]
        y, *weights = tf.numpy_function(self._converted, inputs, types)
        size = leaves[0].shape[0]
        y.set_shape([size, len(self.classes)] if self.has_shares else [size])
        for each in weights:
            each.set_shape([size])
        return x, y, *weights

    def _converted(self, finite, n, y, weights=None):
        """Returns the targets of a batch, and its sample weights if there are any."""
        with self._noted():
            targets, weights = checked(finite, n, y, weights, len(self.classes))
            return [targets] if weights is None else [targets, weights]

    def _first(self):
        """Returns x, labels and weights of the first batch."""
        raise NotImplementedError

    def _batches(self, batch_size, seed, first_step, iterations):
        """Returns the batches from a step on as a tf.data.Dataset."""
        raise NotImplementedError


class DatasetStream(GivenStream):
    """The stream of a `tf.data.Dataset`; single images make batches of `batch_size`, which may span two epochs."""

    def __init__(self, data, model, batch_size, num_classes, data_name):
        self.data, self.batch_size, self.has_own_batches = data, batch_size, is_batched(data, model)
        super().__init__(model, num_classes, data_name)

    def _first(self):
        some = self.data.take(1 if self.has_own_batches else self.batch_size)
        return _some(labelled_batches(some, self.model, size=self.batch_size))

    def check_shares(self, replicas):
        """Raises an InputError unless replicas can get equal shares of each batch."""
        size = tf.nest.flatten(self.data.element_spec)[0].shape[0] if self.has_own_batches else self.batch_size
        if replicas > 1 and (size is None or size % replicas):
            have = "may have any size" if size is None else f"have {size} images"
            raise InputError(
                f"The batches of the stream {have}, which {replicas} replicas cannot share equally: batch it with "
                "drop_remainder=True in a multiple."
            )

    def _batches(self, batch_size, seed, first_step, iterations):
        data = self.data.repeat()
        return (data if self.has_own_batches else data.batch(batch_size, drop_remainder=True)).skip(first_step)


class PyDatasetStream(GivenStream):
    """The stream of a `keras.utils.PyDataset`, in an order of batches that is drawn for each epoch, as Keras' `fit` does.

    The order is a function of (seed, epoch). Batches are read one after the other, without the data set's own workers.
    """

    def __init__(self, data, model, num_classes, data_name):
        self.data = data
        super().__init__(model, num_classes, data_name)

    def _first(self):
        return _some(labelled_batches([self.data[0]] if self.data.num_batches != 0 else [], self.model, size=1))

    def check_shares(self, replicas):
        """Raises an InputError if there are several replicas, because the sizes of the batches are not known."""
        if replicas > 1:
            raise InputError(
                f"The batches of a PyDataset may have any size, which {replicas} replicas cannot share equally: give arrays, "
                "or a tf.data.Dataset that is batched with drop_remainder=True."
            )

    def _batches(self, batch_size, seed, first_step, iterations):
        def generate():
            with self._noted():
                yield from self._read(seed, first_step, iterations)

        spec = keras.tree.map_structure(lambda a: tf.TensorSpec([None, *a.shape[1:]], a.dtype), self._batch(0))
        return tf.data.Dataset.from_generator(generate, output_signature=spec)

    def _read(self, seed, first_step, iterations):
        """Yields the batches from a step on, with the calls at the ends of epochs, those of skipped epochs too."""
        count = self.data.num_batches
        if count is None:
            yield from map(self._batch, range(first_step, iterations))
            return
        for _ in range(first_step // count):
            self.data.on_epoch_begin()
            self.data.on_epoch_end()
        rows = training_rows(count, batch_size=1, seed=seed, first_step=first_step, iterations=iterations)
        for step, (_, (index,)) in enumerate(rows(), first_step):
            if step in (first_step, step - step % count):
                self.data.on_epoch_begin()
            yield self._batch(int(index))
            if (step + 1) % count == 0:
                self.data.on_epoch_end()

    def _batch(self, index):
        batch = self.data[index]
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise InputError(f"A batch of the PyDataset is a {describe(batch)}: give images with their labels, (x, y).")
        x, *others = with_labels(batch)
        return keras.tree.map_structure(np.asarray, (tuple(x) if isinstance(x, list) else x, *others))


def collected(stream, warn):
    """Reads a finite stream into memory once.

    Args:
        stream: a `GivenStream`.
        warn: called with a line on what was read.

    Returns:
        `GivenArrays`.

    Raises:
        InputError: the stream does not end, or does not fit into half of the memory.
    """
    made, size, most = [], 0, physical_memory() // 2  # joining the batches takes as much again
    for x, y, weights in labelled_batches(stream.data, stream.model, size=BLOCK):
        made.append(keras.tree.map_structure(np.asarray, (x, y) if weights is None else (x, y, weights)))
        size += sum(part.nbytes for part in keras.tree.flatten(made[-1]))
        if size > most:
            raise InputError(
                f"The stream has more than the {most / 2**30:.3g} GiB that folds in memory may take: give a part of it, such as "
                "data.take(n), or a Dataset of files."
            )
    arrays = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *made)
    found = _arrays_of(arrays, stream.model, len(stream.classes), str)
    warn(
        f"The stream was read into memory once for the folds, {len(found.train)} images in {size / 2**20:.3g} MiB for batches of "
        f"{stream.batch_size}: what it draws at random, such as augmentation, is fixed, and is in the held-out images too."
    )
    return found


def _some(batches):
    """Returns the first batch."""
    first = next(batches, None)
    if first is None:
        raise InputError("The stream is empty: give at least one image.")
    return first


def _one_output(y):
    if isinstance(y, (dict, tuple, list)) and keras.tree.flatten(y) and hasattr(keras.tree.flatten(y)[0], "shape"):
        raise InputError(f"The labels are a {describe(y)}, but one output is trained: give one array of labels.")
    return np.asarray(y)


def _numbered(count):
    return tuple(map(str, range(count)))


def _rows_of(parts, rows):
    return keras.tree.map_structure(lambda a: a[rows], parts)


def are_finite(x):
    """Whether all numbers in nested arrays or tensors are finite."""
    floats = [array for array in map(np.asarray, keras.tree.flatten(x)) if array.dtype.kind in "fV"]  # V: bfloat16
    return all(np.isfinite(array).all() for array in floats)


def checked(finite, n, y, weights, classes):
    """Returns the targets of a batch as in `targets_of`, and its sample weights in float32 [n] or None.

    Args:
        finite: whether all numbers of its images are finite.
        n: number of images.
        y: the labels.
        weights: the sample weights, or None.
        classes: K.

    Raises:
        InputError: images, labels or weights are wrong.
    """
    if not finite:
        raise InputError("A batch of the stream has NaN or infinite numbers in its images: mend them.")
    targets = targets_of(y, n, classes, OUTPUT)
    return targets, None if weights is None else weights_of(weights, n, OUTPUT).astype(np.float32)


def _float(x):
    return tf.cast(x, tf.float32) if x.dtype == tf.uint8 else x  # 8-bit integers are pixels


@tf.autograph.experimental.do_not_convert
def _with_floats(x, *others):
    return keras.tree.map_structure(_float, x), *others


def _digest(parts, classes):
    """Returns the sha256 of nested arrays, of their structure, shapes and types, and of a number of classes, in hexadecimal."""
    sha = hashlib.sha256(repr((classes, keras.tree.map_structure(lambda leaf: 0, parts))).encode())
    for leaf in keras.tree.flatten(parts):
        if leaf is None:
            continue
        array = np.asarray(leaf)
        sha.update(repr((array.dtype.name, array.shape)).encode())
        for start in range(0, len(array), BLOCK):
            block = array[start : start + BLOCK]
            sha.update(repr(block.tolist()).encode() if block.dtype.hasobject else np.ascontiguousarray(block).tobytes())
    return sha.hexdigest()
