"""Batches (x, labels, weights) from arrays, `tf.data`, `PyDataset`, or any iterable of batches."""

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.files.errors import InputError

FORMS = "give arrays (x, y), a tf.data.Dataset, a keras.utils.PyDataset, or batches (x, y)"


def labelled_batches(data, model, *, size, crops=1):
    """Yields (x, labels, weights) for each non-empty batch, in order, from data of any form.

    x is a tensor, or a dict or tuple of tensors, as in the data; only 8-bit integers, which are pixels, become
    float32. Labels and weights are unchanged; weights are None if the data have none.

    Args:
        data: arrays (x, y) or (x, y, weights) as a tuple; a `tf.data.Dataset` of such elements, batched or not; a
            `keras.utils.PyDataset`; or an iterable of batches.
        model: the Keras model, whose inputs show whether an element is an image or a batch.
        size: images per batch, if the data are not batched.
        crops: crops of each image; more than one lie on an axis after that of the images.

    Raises:
        InputError: the data have another form, lack labels, do not end, or differ in their numbers of images.
    """
    if isinstance(data, tf.data.Dataset):
        batches = _of_dataset(data, model, size, crops)
    elif are_arrays(data, model):
        batches = _of_arrays(data, model, size)
    else:
        batches = _of_iterable(data)
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise InputError(f"A batch is a {describe(batch)}, not images with their labels: {FORMS}.")
        x, y, *weights = with_labels(batch)
        x = keras.tree.map_structure(_tensor, tuple(x) if isinstance(x, list) else x)
        check_images(x, model, crops)
        if any(0 in part.shape[:1] for part in tf.nest.flatten(x)):
            continue
        yield x, y, weights[0] if weights else None


def check_readable_again(data):
    """Raises unless the data can be read more than once.

    Raises:
        InputError: they are an iterator, such as a generator.
    """
    if _reads_once(data):
        raise InputError(
            f"The data are a {type(data).__name__}, which can be read only once, but they are needed several times: "
            "give a list of its batches, arrays or a tf.data.Dataset."
        )


def _reads_once(data):
    return hasattr(data, "__next__")


def _of_dataset(data, model, size, crops):
    batched = is_batched(data, model, crops)
    _check_ends(data)
    if batched:
        return data
    sizes = [part.shape for part in tf.nest.flatten(data.element_spec)]
    return data.batch(size if all(shape.is_fully_defined() for shape in sizes) else 1)  # images of different sizes do not stack


def is_batched(data, model, crops=1):
    """Whether the elements of a `tf.data.Dataset` are batches, and not single images.

    Args:
        data, model, crops: as in `labelled_batches`.

    Raises:
        InputError: the elements are not images with their labels.
    """
    spec = data.element_spec
    if not isinstance(spec, tuple) or len(spec) not in (2, 3):
        raise InputError(f"The elements of the tf.data.Dataset are {describe(spec)}, not images with their labels: {FORMS}.")
    if any(part.shape.rank is None for part in tf.nest.flatten(spec)):  # the spec lacks the ranks: look at an element
        for element in data.take(1):
            spec = tf.nest.map_structure(tf.type_spec_from_value, element)
    return _is_batched(spec, model, crops)


def _is_batched(spec, model, crops):
    """Whether the elements of a dataset are batches, judged by their ranks and those of the model's inputs."""
    if any(part.shape.rank == 0 for part in tf.nest.flatten(spec)):
        return False
    answers = set()
    for part, shape in _beside_inputs(spec[0], _shapes(model, crops)):
        answers |= {True} if _fits(part.shape, shape) else set()
        answers |= {False} if part.shape.is_compatible_with(shape[1:]) else set()
    if len(answers) == 1:
        return answers.pop()
    parts = [part.shape for part in tf.nest.flatten(spec)]
    # the first axis decides: all parts of a batch have the same length there, or an unknown one
    return all(shape.rank for shape in parts) and len({shape[0] for shape in parts}) == 1


def _fits(shape, expected):
    """Whether a batch of this shape fits a model's input; Keras adds and drops a last axis of length 1."""
    forms = [expected, expected[:-1]] if expected[-1] == 1 else [expected]
    dropped = shape.rank == len(expected) + 1 and shape[-1] == 1 and shape[:-1].is_compatible_with(expected)
    return dropped or any(shape.is_compatible_with(form) for form in forms)


def check_images(x, model, crops=1):
    """Checks that x, arrays or tensors, is a batch of what a model takes.

    Raises:
        InputError: the shape is another; or x has fractions for an input of whole numbers, which Keras cuts off in silence.
    """
    for part, expected in _beside_inputs(x, _shapes(model, crops)):
        if not _fits(tf.TensorShape(part.shape), expected):
            raise InputError(
                f"x has the shape {tuple(part.shape)}, but the model {model.name!r} takes {expected}, the batch's axis first: "
                "give batches of such images."
            )
    for part, dtype in _beside_inputs(x, {tensor.name: tensor.dtype for tensor in _inputs(model)}):
        takes_whole = keras.backend.is_int_dtype(dtype)
        if takes_whole and keras.backend.is_float_dtype(keras.backend.standardize_dtype(part.dtype)) and np.any(part % 1):
            raise InputError(f"x has fractions, but the model {model.name!r} takes whole numbers ({dtype}): give these.")


def _inputs(model):
    return getattr(model, "inputs", None) or []


def _shapes(model, crops):
    """Returns the shape of each input of a model, by name; several crops of an image lie on the second axis."""
    return {tensor.name: (*tensor.shape[:1], *([crops] * (crops > 1)), *tensor.shape[1:]) for tensor in _inputs(model)}


def _beside_inputs(x, values):
    """Pairs each part of x with the value of its model input; returns no pairs if the inputs are unknown."""
    if isinstance(x, dict):
        return [(part, values[name]) for name, part in x.items() if name in values]
    parts = tf.nest.flatten(x)
    return list(zip(parts, values.values(), strict=True)) if len(parts) == len(values) else []


def are_arrays(data, model):
    """Whether the data are arrays (x, y) or (x, y, weights), and not a tuple of batches."""
    if not isinstance(data, tuple) or len(data) not in (2, 3):
        return False
    x, y = data[:2]
    if _is_array(x) or isinstance(x, dict):
        return True
    if not isinstance(x, (tuple, list)) or not x:
        return False
    inputs = getattr(model, "inputs", None)
    if inputs and len(inputs) > 1:
        return len(x) == len(inputs) and not isinstance(x[0], (tuple, dict))
    return _is_array(y) or not isinstance(y, (tuple, list)) or not _holds_arrays(y)


def _is_array(value):
    return hasattr(value, "shape") and hasattr(value, "__getitem__")


def _holds_arrays(value):
    return any(_is_array(part) or isinstance(part, dict) for part in value)


def aligned_arrays(data, model):
    """Returns x, labels and weights if there are any, as arrays or nests of arrays of equal length.

    Args:
        data: (x, y) or (x, y, weights).
        model: the Keras model, whose inputs show whether a list is one input or several.

    Raises:
        InputError: the lengths differ, or there are no labels.
    """
    x, *others = map(_as_arrays, with_labels(data))
    inputs = getattr(model, "inputs", None)
    if isinstance(x, tuple) and inputs and len(inputs) == 1:  # a list of images, or Keras' list of one input
        x = x[0] if len(x) == 1 and x[0].ndim == len(inputs[0].shape) else np.stack(x)
    lengths = [{_length(part) for part in keras.tree.flatten(part)} for part in (x, *others)]
    if len(set.union(*lengths)) != 1:
        counts = [" and ".join(map(str, sorted(found))) for found in lengths]
        names = [f"{count} {name}" for count, name in zip(counts, ("images", "labels", "sample weights"), strict=False)]
        raise InputError(f"The data have {' but '.join(names)}: give as many of each.")
    return x, *others


def with_labels(data):
    """Returns (x, labels) or (x, labels, weights) without weights that are None.

    Raises:
        InputError: the labels are None; the weights must not pass for them.
    """
    if data[1] is None:
        raise InputError(f"The labels are None, so there is nothing to compare with: {FORMS}.")
    return data[:2] if data[-1] is None else data


def _of_arrays(data, model, size):
    """Yields batches of `size` images from arrays, or nests of arrays, of equal length."""
    parts = aligned_arrays(data, model)
    for start in range(0, _length(keras.tree.flatten(parts)[0]), size):
        yield keras.tree.map_structure(lambda a, i=start: a[i : i + size], parts)


def _as_arrays(part):
    """Converts lists of numbers, data frames and the like to arrays, also inside dicts and tuples."""
    if isinstance(part, dict):
        return {name: _as_arrays(value) for name, value in part.items()}
    if isinstance(part, (tuple, list)) and _holds_arrays(part):
        return tuple(_as_arrays(value) for value in part)
    # anything that can be sliced by images is read only when needed
    return part if tf.is_tensor(part) or (_is_array(part) and hasattr(part, "dtype")) else np.asarray(part)


def _length(part):
    return part.shape[0] if len(part.shape) else 0


def _of_iterable(data):
    if isinstance(data, keras.utils.PyDataset):
        _check_ends(data)
        return _of_py_dataset(data)
    if not hasattr(data, "__iter__") or isinstance(data, (dict, str)) or _is_array(data):
        raise InputError(f"The data are a {describe(data)}: {FORMS}.")
    return iter(data)


def _of_py_dataset(data):
    data.on_epoch_begin()
    for index in range(data.num_batches):
        yield data[index]
    data.on_epoch_end()


def never_ends(data):
    """Whether a `tf.data.Dataset` or a `keras.utils.PyDataset` is known to have no end."""
    if isinstance(data, tf.data.Dataset):
        return bool(data.cardinality() == tf.data.INFINITE_CARDINALITY)
    return isinstance(data, keras.utils.PyDataset) and data.num_batches is None


def _check_ends(data):
    if never_ends(data):
        raise InputError("The data never end: give a finite part of them, such as data.take(n).")


def _tensor(leaf):
    tensor = leaf if tf.is_tensor(leaf) else tf.convert_to_tensor(np.asarray(leaf))
    return tf.cast(tensor, tf.float32) if tensor.dtype == tf.uint8 else tensor


def describe(value):
    """Names the class of a value with its length or shape, for messages."""
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of {len(value)}"
    return f"{type(value).__name__}" + (f" of shape {tuple(value.shape)}" if getattr(value, "shape", None) is not None else "")
