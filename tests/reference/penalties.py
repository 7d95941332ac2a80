"""Naive oracles in float64 NumPy: loops over single weights and groups, written from the paper alone."""

import itertools
import math

import numpy as np


def penalty(name, alpha, w, w0=None, fisher=None, group_axes=None):
    """Value and gradient of Eqs. (1), (2), (4)-(7) for one weight, by loops over its entries."""
    w = np.asarray(w, "float64")
    w0 = np.zeros_like(w) if w0 is None else np.asarray(w0, "float64")
    f = np.ones_like(w) if fisher is None else np.asarray(fisher, "float64")
    if name in ("gl_sp", "gl_sp_fisher"):
        return _grouped(alpha, w, w0, f, group_axes)
    value, gradient = 0.0, np.zeros_like(w)
    for j in np.ndindex(*w.shape):
        d = w[j] - w0[j]
        if name == "l1_sp":
            value += alpha * abs(d)
            gradient[j] = alpha * (1 if d > 0 else -1 if d < 0 else 0)
        else:
            value += alpha / 2 * f[j] * d * d
            gradient[j] = alpha * f[j] * d
    return value, gradient


def _grouped(alpha, w, w0, f, group_axes):
    axes = tuple(range(w.ndim - 1)) if group_axes is None else tuple(group_axes)
    others = [axis for axis in range(w.ndim) if axis not in axes]
    value, gradient = 0.0, np.zeros_like(w)
    for channel in itertools.product(*(range(w.shape[axis]) for axis in others)):
        members = [j for j in np.ndindex(*w.shape) if tuple(j[axis] for axis in others) == channel]
        norm = math.sqrt(sum(f[j] * (w[j] - w0[j]) ** 2 for j in members))
        value += alpha * math.sqrt(len(members)) * norm
        for j in members:
            gradient[j] = alpha * math.sqrt(len(members)) * f[j] * (w[j] - w0[j]) / norm if norm else 0.0
    return value, gradient
