"""Predicts the classes of new images, prepared as the model's file says."""

import dataclasses
import functools
import pathlib
import tempfile
import warnings

import numpy as np

from l2sp_tf.data.decoding import decode
from l2sp_tf.data.headers import FIRST_BYTES, KINDS
from l2sp_tf.data.layout import is_image, is_system
from l2sp_tf.data.pipeline import preprocessing_for, test_batches
from l2sp_tf.data.sets import Split
from l2sp_tf.evaluation.answers import Judge
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.table import Table


@dataclasses.dataclass(frozen=True)
class Predictions:
    """A model's answers on images.

    Attributes:
        files: the paths of the images, str.
        labels: int64 [n], the output with the highest score for each image.
        probabilities: float64 [n], of that output.
        classes: the names of the outputs.
        skipped: the paths of the images that were left out because they could not be decoded.
    """

    files: tuple
    labels: np.ndarray
    probabilities: np.ndarray
    classes: tuple
    skipped: tuple = ()

    def __len__(self) -> int:
        return len(self.files)

    def table(self, most: int | None = None) -> Table:
        """Returns a `Table` of file, class and probability for the first `most` images."""
        rows = [
            (file, self.classes[label], f"{p:.4f}")
            for file, label, p in zip(self.files[:most], self.labels, self.probabilities, strict=False)
        ]
        left = len(self) - len(rows)
        return Table(("file", "class", "probability"), rows, f"and {left} more images" if left else "")


def predict(model, images, interface, *, batch_size=64, skip_bad_images=False):
    """Returns the class and probability of each image, with the same crops and scores as `evaluate`.

    Args:
        model: a Keras classifier with one output.
        images: a folder, searched with its subfolders, or a list of files: JPEG, PNG, GIF, BMP or WebP.
        interface: how images are made, and the class of each output. Outputs without names are called by their number.
        batch_size: crops per step.
        skip_bad_images: whether to leave out images that cannot be decoded, with a warning, instead of raising.

    Returns:
        `Predictions`; those of a folder are in the order of the paths.

    Raises:
        InputError: there is no image, an image cannot be decoded, or the interface does not fit the model.
    """
    if interface is None or interface.pixels.mean is None:
        raise InputError("The model's interface is missing or has no mean: give an Interface whose pixel format has a mean.")
    classes, files = _classes(model, interface), _files(images)
    names = tuple(map(str, files))
    split = Split(names, np.zeros(len(files), np.int32), files=files)
    options = {"mode": interface.resize_mode, "filter": interface.resize_filter, "skip_bad_images": skip_bad_images}
    judge = Judge(model, model, interface.crops, None, probabilities=True)
    with tempfile.TemporaryDirectory() as cache:
        decoded = decode(split, interface.resize, **options, cache_dir=cache)
        size = max(1, batch_size // interface.crops)
        how = preprocessing_for(interface), np.float32(interface.pixels.mean)
        batches = test_batches(decoded, *how, batch_size=size, crops=interface.crops)
        labels, probabilities = map(np.concatenate, zip(*(judge.probable(x) for x, _ in batches), strict=True))
    skipped = set(decoded.skipped)
    if skipped:
        first = decoded.skipped[0]
        warnings.warn(f"{len(skipped)} images were left out because they cannot be decoded, such as {first}.", stacklevel=3)
    kept = tuple(name for name in names if name not in skipped)
    return Predictions(kept, labels, probabilities, classes, decoded.skipped)


def _files(images):
    """Lists the paths of the images: the given files, and all files in given folders and their subfolders but hidden ones."""
    if isinstance(images, (str, pathlib.Path)):
        images = [images]
    found, others = [], []
    for path in map(pathlib.Path, images):
        if path.is_dir():
            for below in sorted(p for p in path.rglob("*") if p.is_file() and not any(map(is_system, p.relative_to(path).parts))):
                (found if is_image(below.name, functools.partial(_head, below)) else others).append(below)
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"There is no image {path}: give image files, or a folder of them.")
    if not found:
        where = ", ".join(map(str, images)) or "an empty list"
        raise InputError(f"There are no images in {where}: give {KINDS} files, or a folder of them.")
    if others:
        warnings.warn(f"{len(others)} files are not {KINDS} and were left out, such as {others[0]}.", stacklevel=4)
    return tuple(dict.fromkeys(found))


def _head(path):
    with path.open("rb") as file:
        return file.read(FIRST_BYTES)


def _classes(model, interface):
    """Returns the names of a model's outputs; a single output has two classes.

    Raises:
        InputError: there are several outputs, or the numbers of names and classes differ.
    """
    if len(model.outputs) != 1:
        raise InputError(f"The model {model.name!r} has {len(model.outputs)} outputs: give a model with one.")
    count = max(2, model.outputs[0].shape[-1])
    if interface.classes is None:
        return tuple(map(str, range(count)))
    if len(interface.classes) != count:
        raise InputError(f"The model has {count} outputs, but {len(interface.classes)} classes are named: use another copy.")
    return interface.classes
