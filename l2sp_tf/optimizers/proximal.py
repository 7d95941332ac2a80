"""Proximal steps: the penalties are minimised exactly within each step, which can leave a weight at w0 for good."""

import math

import keras
from keras import ops

from l2sp_tf.files.errors import InputError
from l2sp_tf.optimizers.stepping import Stepping
from l2sp_tf.penalties.formulas import L1SP, L2, L2SP, AnchoredPenalty, GroupLassoSP, GroupLassoSPFisher, L2SPFisher
from l2sp_tf.penalties.weights import keyed_weights

NEWTON_STEPS = 8
NEGLIGIBLE = 1e-20  # a Fisher entry so far below the largest of its group counts as 0


@keras.saving.register_keras_serializable(package="l2sp_tf")
class Proximal(Stepping):
    """A Keras optimizer whose every step ends with the proximal map of the penalty.

    w <- argmin_x penalty(x) + sum_j (x_j - v_j)^2 / (2 s_j), where v is the weight after the step of the inner
    optimizer on the gradient of the loss alone, and s_j the length of that step for a constant gradient of 1 (see
    `step_sizes`). The fixed points of such steps are the minimisers of loss + penalty, whichever optimizer is inside.
    For Eqs. (5)-(7) the map puts weights exactly, bit by bit, on w0 (see `proximal_map`).

    The inner optimizer may be SGD, with or without (Nesterov) momentum, Adam, AdamW, Nadam or Adamax.

    Args:
        optimizer, name: as `l2sp_tf.optimizers.stepping.Stepping`; `Proximal.of(optimizer, model)` is how to make one.

    Raises:
        InputError: it is another optimizer, or SGD with a momentum of 1.
    """

    penalties = (L2, L2SP, L2SPFisher, L1SP, GroupLassoSP, GroupLassoSPFisher)

    def __init__(self, optimizer, name=None):
        super().__init__(optimizer, name)
        _step_rule(self.inner_optimizer)

    @classmethod
    def check(cls, penalty):
        super().check(penalty)
        if getattr(penalty, "epsilon", 0):
            raise InputError(
                f"{penalty} has epsilon={penalty.epsilon:g}, which smooths the kink at w0: Proximal needs epsilon=0."
            )

    def step(self, update, penalty, variable, learning_rate):
        update()
        sizes = step_sizes(self.inner_optimizer, variable, learning_rate)
        self.assign(variable, proximal_map(penalty, variable, sizes))


def step_sizes(optimizer, variable, learning_rate):
    """How far `optimizer` goes on to move each entry of a weight when its gradient is constantly 1.

    SGD: lr / (1 - momentum). Adam: lr sqrt(1 - beta_2^t) / (sqrt(v) + epsilon), with its largest v so far under
    `amsgrad`; Nadam: lr / (sqrt(v / (1 - beta_2^t)) + epsilon); Adamax: lr / (u + epsilon).

    Args:
        optimizer: a built Keras optimizer that has just stepped the weight.
        variable: the weight.
        learning_rate: that of the step.

    Returns:
        A float32 tensor, a scalar for SGD and of the weight's shape for the others.

    Raises:
        InputError: the optimizer is of another kind.
    """
    rule = _step_rule(optimizer)
    return rule(optimizer, optimizer._get_variable_index(variable), ops.cast(learning_rate, "float32"))


def _step_rule(optimizer):
    momentum = getattr(optimizer, "momentum", 0.0)
    for kind, rule in STEP_RULES.items():
        if isinstance(optimizer, kind) and momentum < 1:
            return rule
    what = type(optimizer).__name__ + (f" with momentum {momentum:g}" if momentum else "")
    names = ", ".join(kind.__name__ for kind in STEP_RULES)
    raise InputError(f"The step sizes of {what} are not known: wrap one of {names}, with a momentum below 1.")


def _sgd(optimizer, index, learning_rate):
    return learning_rate / (1 - optimizer.momentum)


def _adam(optimizer, index, learning_rate):
    velocities = optimizer._velocity_hats if optimizer.amsgrad else optimizer._velocities
    return learning_rate * ops.sqrt(_correction(optimizer)) / (_root(velocities[index]) + optimizer.epsilon)


def _nadam(optimizer, index, learning_rate):
    return learning_rate / (_root(optimizer._velocities[index]) / ops.sqrt(_correction(optimizer)) + optimizer.epsilon)


def _adamax(optimizer, index, learning_rate):
    return learning_rate / (ops.cast(optimizer._u[index], "float32") + optimizer.epsilon)


def _correction(optimizer):
    return 1 - ops.power(optimizer.beta_2, ops.cast(optimizer.iterations + 1, "float32"))


def _root(velocity):
    return ops.sqrt(ops.cast(velocity, "float32"))


STEP_RULES = {
    keras.optimizers.SGD: _sgd,
    keras.optimizers.Adam: _adam,
    keras.optimizers.Nadam: _nadam,
    keras.optimizers.Adamax: _adamax,
}


def proximal_map(penalty, w, step):
    """argmin_x penalty(x) + sum_j (x_j - w_j)^2 / (2 step_j), entry by entry or group by group.

    With d = w - w0 and s = step, x - w0 is
    Eqs. (1), (2), (4): d / (1 + s alpha F), with F = 1 but for Eq. (4) and w0 = 0 for Eq. (1);
    Eq. (5): sign(d) max(|d| - s alpha, 0);
    Eq. (6), with one s: d max(1 - s lambda / ||d||, 0), where lambda = alpha sqrt(p_g);
    Eq. (7), and Eq. (6) with an s for each weight: N d_j / (N + lambda s_j F_jj), where N, the norm of the result in the
    metric of F, solves sum_j F_jj d_j^2 / (N + lambda s_j F_jj)^2 = 1, and is 0 where the sum is at most 1 at N = 0.

    Args:
        penalty: a bound penalty of this package, without epsilon.
        w: a tensor or variable of any float type, of the anchor's shape.
        step: s, at least 0, a scalar or a tensor of that shape.

    Returns:
        A tensor of the type of `w`, but float32 at least; entries on w0 are equal to it bit by bit.
    """
    w = ops.cast(w, keras.backend.result_type(keras.backend.standardize_dtype(w.dtype), "float32"))
    w0 = ops.zeros_like(w) if isinstance(penalty, L2) else ops.cast(penalty.anchor, w.dtype)
    fisher = ops.cast(penalty.fisher, w.dtype) if hasattr(penalty, "fisher") else None
    step, d = ops.cast(step, w.dtype), w - w0
    if isinstance(penalty, (GroupLassoSP, GroupLassoSPFisher)):
        axes = tuple(range(len(w.shape) - 1)) if penalty.group_axes is None else penalty.group_axes
        strength = penalty.alpha * math.sqrt(math.prod(w.shape[axis] for axis in axes))
        if fisher is None and len(step.shape) == 0:
            pull, stays = _group_pull(d, strength * step, axes)
        else:
            pull, stays = _weighted_group_pull(d, ops.ones_like(d) if fisher is None else fisher, strength, step, axes)
    elif isinstance(penalty, L1SP):
        threshold = step * penalty.alpha
        pull, stays = ops.sign(d) * threshold, ops.abs(d) <= threshold
    else:
        weight = step * penalty.alpha * (1 if fisher is None else fisher)
        pull, stays = d * weight / (1 + weight), False
    return ops.where(stays, w0, w - pull)  # w0 itself, as w0 + 0 would be wrong by a rounding or the sign of a zero


def _group_pull(d, threshold, axes):
    """Eq. (6) with one step size: the part of d to take away, and which groups lose all of it."""
    norm = ops.sqrt(ops.sum(ops.square(d), axis=axes, keepdims=True))
    stays = norm <= threshold
    return d * (threshold / ops.where(stays, 1, norm)), stays


def _weighted_group_pull(d, fisher, strength, step, axes):
    """The same in the metrics of F and of the step sizes, where N is found by Newton's method.

    1 / sqrt(sum) is concave and rises with N, so that Newton's steps from below never pass the root; it is a straight
    line where s F is constant in the group, and then the first step is exact. All quantities are taken relative to the
    largest of their group, since F_jj spans many powers of ten.
    """
    d_max, f_max, s_max = (_largest(ops.abs(a), axes) for a in (d, fisher, ops.broadcast_to(step, d.shape)))
    f, strength = fisher / f_max, strength * ops.sqrt(f_max) * s_max / d_max
    f = ops.where(f > NEGLIGIBLE, f, 0)
    a, b = ops.sqrt(f) * ops.abs(d) / d_max, strength * f * step / s_max
    norm = ops.maximum(ops.max(a - b, axis=axes, keepdims=True), 0)  # below the root, as each term alone is at most 1 there
    for _ in range(NEWTON_STEPS):
        norm = _newton(norm, a, b, axes)
    shared = norm + b
    share = ops.where(shared > 0, b / ops.where(shared > 0, shared, 1), 0)
    return d * share, ops.logical_and(norm == 0, f > 0)


def _newton(norm, a, b, axes):
    """One step for 1 / sqrt(sum a^2 / (norm + b)^2) = 1; none where the norm is 0 and the sum at most 1."""
    below = norm + b
    below = ops.where(below > 0, below, 1)  # 0 only where a is 0 too
    squares = ops.square(a / below)
    total = ops.sum(squares, axis=axes, keepdims=True)
    slope = ops.sum(squares / below, axis=axes, keepdims=True)
    return norm + total * ops.maximum(ops.sqrt(total) - 1, 0) / ops.where(slope > 0, slope, 1)


def _largest(x, axes):
    """The largest entry of each group, or 1 where that is 0."""
    largest = ops.max(x, axis=axes, keepdims=True)
    return ops.where(largest > 0, largest, 1)


def frozen_share(model):
    """The share of each layer's anchored weights that are equal to w0 bit by bit.

    Args:
        model: a model with bound penalties, as `attach` leaves it.

    Returns:
        A dict from layer to a number in [0, 1], under the layers' keys, and of all layers together under "all".
    """
    layers, counts = {}, {}
    for key, weight in keyed_weights(model).items():
        penalty = weight.variable.regularizer
        if isinstance(penalty, AnchoredPenalty) and penalty.is_bound and weight.variable.trainable:
            layer, equal = key.rsplit("/", 1)[0], ops.equal(weight.variable, ops.cast(penalty.anchor, weight.variable.dtype))
            layers[layer] = layers.get(layer, 0) + int(ops.count_nonzero(equal))
            counts[layer] = counts.get(layer, 0) + math.prod(weight.variable.shape)
    total = {"all": sum(layers.values()) / sum(counts.values())} if counts else {}
    return {**{layer: count / counts[layer] for layer, count in layers.items()}, **total}
