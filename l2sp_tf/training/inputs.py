"""What a training gets as data, if not a `Task`: the caller's own images and validation data."""

import warnings

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.data.batches import never_ends
from l2sp_tf.data.given import given
from l2sp_tf.data.pipeline import Preprocessing, Task, prepare
from l2sp_tf.data.sets import Dataset
from l2sp_tf.files.errors import InputError
from l2sp_tf.models.rescaling import rescaling_of
from l2sp_tf.training.objective import Validation
from l2sp_tf.training.recipe import Recipe

MOST_APART = 20  # 255 and 1 are further apart, and the brightest of some images less


def taken_as_given(model, data, recipe, pixels, **options):
    """Returns arrays or a stream for a training, and the recipe without settings of images.

    Args:
        model: the Keras model that they are for.
        data: as in `given.given`.
        recipe: the `Recipe`; its settings of images have no effect.
        pixels: None, as the images are the caller's.
        options: num_classes, name and say, as in `given.given`.

    Raises:
        InputError: `pixels` is given, or an error of `given.given`.
    """
    if pixels is not None:
        raise InputError(f"pixels is {pixels!r}, but images in arrays and streams are taken as they are: leave it out.")
    made = given(data, model, batch_size=recipe.batch_size, **options)
    idle = recipe.images_set
    if made.has_own_batches and recipe.batch_size not in (Recipe.batch_size, made.batch_size):
        idle.append("batch_size")
    if idle:
        warnings.warn(f"The recipe's {', '.join(idle)} have no effect on the data, which are taken as they are.", stacklevel=4)
    rescaling = rescaling_of(model)
    if rescaling is not None and _are_small(made.sample()):
        warnings.warn(
            f"The model {model.name!r} rescales pixels itself ({rescaling!r}) and so expects them from 0 to 255, but the first "
            "images lie within -1 and 1.",
            stacklevel=4,
        )
    return made, recipe.replace(images=Preprocessing(), crops=1, mean=None)


def _are_small(x):
    """Whether all numbers of some images are floats within -1 and 1, and not all are whole."""
    values = [np.asarray(leaf) for leaf in keras.tree.flatten(x)]
    return all(value.dtype.kind == "f" and np.abs(value).max() <= 1 and (value % 1).any() for value in values)


def _largest(x):
    """Returns the largest absolute number in some images [n, h, w] or [n, h, w, c], 0 if there are none."""
    leaves = [leaf for leaf in map(np.asarray, keras.tree.flatten(x)) if leaf.ndim > 2 and leaf.dtype.kind in "iuf"]
    return max((max(float(leaf.max()), -float(leaf.min())) for leaf in leaves), default=0.0)


def _warn_of_scales(training, validation):
    if max(training, validation) > MOST_APART * min(training, validation):
        warnings.warn(
            f"The numbers of the first training images reach {training:g}, and those of validation_data {validation:g}: give "
            "both on one scale.",
            stacklevel=5,
        )


def validation_of(model, data, task, batch_size, name=None):
    """Returns the `Validation` of a training.

    Args:
        model: the Keras model, whose inputs the data must fit.
        data: as in `given.given`, but a stream has an end; or a `Task` or a `Dataset`, whose test images are taken; or None.
        task: what is trained on; its preparation serves a `Dataset`.
        batch_size: images per step.
        name: of a stream, as in `given.given`.

    Raises:
        InputError: the data do not fit the model, the classes or the pixels, or have no end.
    """
    if data is None:
        return None
    if isinstance(data, Dataset):
        if not isinstance(task, Task):
            raise InputError("validation_data is a Dataset, but the training images are not prepared by a recipe: prepare it.")
        data = prepare(data, task.preprocessing, mean=task.mean)
    if not isinstance(data, Task):
        if never_ends(data):
            raise InputError("validation_data never ends: give a finite part of it, such as data.take(n).")
        name = name if isinstance(data, (tf.data.Dataset, keras.utils.PyDataset)) else None
        data = given(data, model, batch_size=batch_size, num_classes=len(task.classes), name=name)
        if not isinstance(task, Task):
            _warn_of_scales(_largest(task.sample()), _largest(data.sample()))
    elif data.classes != task.classes:
        raise InputError(f"validation_data has the classes {data.classes}, but the training has {task.classes}: give the same.")
    elif isinstance(task, Task) and data.pixels != task.pixels:
        raise InputError(
            f"validation_data has the pixels {data.pixels}, but the training images have {task.pixels}: prepare it with the "
            "same pixels, and with mean=task.mean of the training task."
        )
    return Validation(data, batch_size)
