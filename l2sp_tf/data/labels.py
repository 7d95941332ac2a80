"""Labels and sample weights in any form: checked, as numbers of classes or as shares of them."""

import numpy as np

from l2sp_tf.files.errors import InputError

SUM_TOLERANCE = 1e-3  # of shares in half precision


def are_shares(shape):
    """Whether labels of this shape are rows of one number a class, [n, K], and not numbers of classes, [n] or [n, 1]."""
    return len(shape) == 2 and shape[1] != 1


def targets_of(labels, n, classes, what):
    """Converts labels to what the cross-entropy is taken to: the number of the class, or the shares of all classes.

    Args:
        labels: integers [n] or [n, 1], booleans or whole floats; or shares [n, K] that sum to 1, one-hot or not.
        n: number of images.
        classes: K.
        what: the output's name, for messages.

    Returns:
        int32 [n], or float32 [n, K] of shares.

    Raises:
        InputError: the labels have another shape, number or range.
    """
    labels = np.asarray(labels)
    if not are_shares(labels.shape) or labels.shape != (n, classes) or not _are_numbers(labels):
        return classes_of(labels, n, classes, what).astype(np.int32)
    labels = labels.astype(np.float32)
    sums = labels.sum(axis=1)
    wrong = ~((labels >= 0).all(axis=1) & (np.abs(sums - 1) <= SUM_TOLERANCE))  # NaN is wrong too
    if wrong.any():
        fault = f"sum to {sums[wrong][0]:g}" if (labels[wrong][0] >= 0).all() else "are not all from 0 on"
        raise InputError(f"The labels of {what} have a row of shares that {fault}: give one-hot labels, or shares that sum to 1.")
    return labels


def _are_numbers(labels):
    return labels.dtype.kind in "iubf" or labels.dtype.name == "bfloat16"


def classes_of(labels, n, classes, what, *, one_hot=True):
    """Converts labels of any form to classes [n] in int64.

    Args:
        labels: as in `right_answers`.
        n: number of images.
        classes: K; 2 for one output.
        what: the output's name, for messages.
        one_hot: whether rows of K numbers are allowed.

    Raises:
        InputError: the labels have another shape, number or range, or several classes for an image.
    """
    labels = np.asarray(labels)
    if not _are_numbers(labels):
        raise InputError(f"The labels of {what} are of the kind {labels.dtype.name}: give the numbers of the classes.")
    if labels.ndim == 0 or len(labels) != n:
        count = "no axis of images" if labels.ndim == 0 else f"{len(labels)} rows"
        raise InputError(f"The labels of {what} have {count}, but there are {n} images: give one label for each image.")
    shape, labels = labels.shape, labels.reshape(n, -1)
    if labels.shape[1] not in ({1, classes} if one_hot else {1}) or sum(size != 1 for size in shape[1:]) > 1:
        forms = f"[n], [n, 1] or one-hot [n, {classes}]" if one_hot else "[n] or [n, 1]"
        raise InputError(f"The labels of {what} have the shape {shape}: give them as {forms}.")
    if labels.dtype.kind not in "iub":
        labels = labels.astype(np.float64)
        if not np.isfinite(labels).all():
            raise InputError(f"The labels of {what} are not all finite: give the numbers of the classes.")
    return _of_rows(labels, what) if labels.shape[1] > 1 else _of_numbers(labels[:, 0], classes, what)


def weights_of(weights, n, what):
    """Returns sample weights [n] or [n, 1] as float64 [n].

    Raises:
        InputError: they have another shape, or are negative or not finite.
    """
    weights = np.asarray(weights)
    if weights.ndim == 0 or len(weights) != n or weights.size != n or weights.dtype.kind not in "iubf":
        raise InputError(f"The sample weights of {what} have the shape {weights.shape}, but there are {n} images: give one each.")
    weights = weights.reshape(n).astype(np.float64)
    if not (np.isfinite(weights) & (weights >= 0)).all():
        raise InputError(f"The sample weights of {what} are not all finite and at least 0: give such weights.")
    return weights


def _of_rows(rows, what):
    """Returns the position of the only entry above 0 in each row."""
    above = rows > 0
    if (above.sum(axis=1) != 1).any() or (rows < 0).any():
        several = above.sum(axis=1) > 1
        kind = "several classes" if several.any() else "no class"
        if several.any() and (rows % 1 != 0).any():
            kind = "shares of several classes"
        raise InputError(
            f"The labels of {what} give some images {kind}, which top-1 accuracy cannot judge: give one class for each image."
        )
    return np.argmax(above, axis=1)


def _of_numbers(labels, classes, what):
    wrong = (labels % 1 != 0) | (labels < 0) | (labels >= classes)
    if wrong.any():
        raise InputError(
            f"The labels of {what} contain {labels[wrong][0]}, but it has {classes} classes: "
            f"give whole numbers from 0 to {classes - 1}."
        )
    return labels.astype(np.int64)
