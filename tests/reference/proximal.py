"""The proximal map by general minimisation in float64, from the value of the penalty alone."""

import itertools

import numpy as np
from reference.penalties import penalty
from scipy.optimize import minimize


def proximal(name, alpha, w, w0, fisher, step, group_axes=None):
    """argmin_x penalty(x) + sum_j (x_j - w_j)^2 / (2 step_j), for each group (or weight) by itself."""
    grouped = name in ("gl_sp", "gl_sp_fisher")
    axes = (tuple(range(w.ndim - 1)) if group_axes is None else group_axes) if grouped else ()
    others = [axis for axis in range(w.ndim) if axis not in axes]
    result, step = np.empty(w.shape), np.broadcast_to(np.asarray(step, "float64"), w.shape)
    w, w0, fisher = (np.asarray(a, "float64") for a in (w, w0, fisher))
    for channel in itertools.product(*(range(w.shape[axis]) for axis in others)):
        group = [slice(None)] * w.ndim
        for axis, index in zip(others, channel, strict=True):
            group[axis] = index
        group = tuple(group)
        result[group] = _minimiser(name, alpha, *(a[group] for a in (w, w0, fisher, step)))
    return result


def _minimiser(name, alpha, w, w0, fisher, step):
    shape = (-1, 1)  # one group of the default axes

    def objective(x):
        value, gradient = penalty(name, alpha, x.reshape(shape), w0.reshape(shape), fisher.reshape(shape))
        distance = x - w.ravel()
        return value + np.sum(distance**2 / step.ravel()) / 2, gradient.ravel() + distance / step.ravel()

    found = [minimize(objective, start.ravel(), jac=True, method="BFGS", tol=1e-13).x for start in (w, (w + w0) / 2)]
    found.append(w0.ravel())  # the kink, which no gradient method meets
    return min(found, key=lambda x: objective(x)[0]).reshape(w.shape)
