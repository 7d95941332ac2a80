"""Proximal maps: the part that argmin_x penalty(x) + sum_j (x_j - w_j)^2 / (2 s_j) subtracts from d = w - w0.

Each function returns a pair: the part of d to subtract, and a boolean for entries that go to w0 exactly. s is the step size,
a scalar or of the shape of d.
"""

from keras import ops

NEWTON_STEPS = 8
NEGLIGIBLE = 1e-20  # a Fisher entry below this share of its group's largest counts as 0


def quadratic(d, weight):
    """Eqs. (1), (2) and (4), as sum_j weight_j d_j^2 / (2 s_j): d weight / (1 + weight), with weight = s alpha F."""
    return d * weight / (1 + weight), False


def soft_threshold(d, threshold):
    """Eq. (5): sign(d) threshold, or all of d if |d| <= threshold, with threshold = s alpha."""
    return ops.sign(d) * threshold, ops.abs(d) <= threshold


def group(d, threshold, axes):
    """Eq. (6) with a scalar s: d min(1, threshold / ||d||) for groups over `axes`, with threshold = s alpha sqrt(p_g)."""
    norm = ops.sqrt(ops.sum(ops.square(d), axis=axes, keepdims=True))
    stays = norm <= threshold
    return d * (threshold / ops.where(stays, 1, norm)), stays


def weighted_group(d, fisher, strength, step, axes):
    """Eq. (7), and Eq. (6) with an s per weight: d_j lambda s_j F_jj / (N + lambda s_j F_jj), lambda = alpha sqrt(p_g).

    N, the norm of the result in the metric of F, solves sum_j F_jj d_j^2 / (N + lambda s_j F_jj)^2 = 1. It is 0 if the sum
    is at most 1 at N = 0. Newton's method finds it.

    1 / sqrt(sum) is concave and rises with N: Newton's steps from below never pass the root. If s F is constant in the
    group, it is a straight line, and the first step is exact. All quantities are scaled by the largest of their group,
    since F_jj spans many powers of ten.
    """
    d_max, f_max, s_max = (_largest(ops.abs(a), axes) for a in (d, fisher, ops.broadcast_to(step, d.shape)))
    f, strength = fisher / f_max, strength * ops.sqrt(f_max) * s_max / d_max
    f = ops.where(f > NEGLIGIBLE, f, 0)
    a, b = ops.sqrt(f) * ops.abs(d) / d_max, strength * f * step / s_max
    norm = ops.maximum(ops.max(a - b, axis=axes, keepdims=True), 0)  # at most the root: at the root each term is at most 1
    for _ in range(NEWTON_STEPS):
        norm = _newton(norm, a, b, axes)
    shared = norm + b
    share = ops.where(shared > 0, b / ops.where(shared > 0, shared, 1), 0)
    return d * share, ops.logical_and(norm == 0, f > 0)


def _newton(norm, a, b, axes):
    """One Newton step for 1 / sqrt(sum a^2 / (norm + b)^2) = 1; a norm of 0 stays if the sum is at most 1."""
    below = norm + b
    below = ops.where(below > 0, below, 1)  # 0 only where a is 0 too
    squares = ops.square(a / below)
    total = ops.sum(squares, axis=axes, keepdims=True)
    slope = ops.sum(squares / below, axis=axes, keepdims=True)
    return norm + total * ops.maximum(ops.sqrt(total) - 1, 0) / ops.where(slope > 0, slope, 1)


def _largest(x, axes):
    """Returns the largest entry of each group, or 1 if that is 0."""
    largest = ops.max(x, axis=axes, keepdims=True)
    return ops.where(largest > 0, largest, 1)
