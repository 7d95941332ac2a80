"""Proximal steps: each step minimises the penalty exactly, so that weights can stay at w0 for good."""

import math
from collections.abc import Callable

import keras
from keras import ops

from l2sp_tf.files.errors import InputError
from l2sp_tf.files.types import Tensor
from l2sp_tf.optimizers.stepping import Stepping
from l2sp_tf.penalties.formulas import AnchoredPenalty, Penalty
from l2sp_tf.penalties.weights import keyed_weights


@keras.saving.register_keras_serializable(package="l2sp_tf")
class Proximal(Stepping):
    """A Keras optimizer whose every step ends with the proximal map of the penalty.

    w <- argmin_x penalty(x) + sum_j (x_j - v_j)^2 / (2 s_j). v is the weight after the inner optimizer's step on the loss
    alone, and s_j the length of that step for a constant gradient of 1 (see `step_sizes`). The fixed points are the
    minimisers of loss + penalty for every inner optimizer. For Eqs. (5)-(7) the map puts weights on w0 bit by bit (see
    `Penalty.proximal_map`).

    The inner optimizer may be SGD, with or without (Nesterov) momentum, Adam, AdamW, Nadam or Adamax.

    Args:
        optimizer, name: as in `l2sp_tf.optimizers.stepping.Stepping`. Prefer `Proximal.of(optimizer, model)`.

    Raises:
        InputError: the inner optimizer is another one, or SGD with a momentum of 1.
    """

    needs = "pull"

    def __init__(self, optimizer: keras.optimizers.Optimizer | str, name: str | None = None) -> None:
        super().__init__(optimizer, name)
        _step_rule(self.inner_optimizer)

    @classmethod
    def check(cls, penalty: Penalty) -> None:
        super().check(penalty)
        if getattr(penalty, "epsilon", 0):
            raise InputError(
                f"{penalty} has epsilon={penalty.epsilon:g}, which smooths the kink at w0: Proximal needs epsilon=0."
            )

    def step(self, update: Callable[[], object], penalty: Penalty, variable: Tensor, learning_rate: Tensor) -> None:
        update()
        sizes = step_sizes(self.inner_optimizer, variable, learning_rate)
        self.assign(variable, penalty.proximal_map(variable, sizes))


def step_sizes(optimizer, variable, learning_rate):
    """Returns the step length of each entry of a weight under a constant gradient of 1, with momentum at its limit.

    SGD: lr / (1 - momentum). Adam: lr sqrt(1 - beta_2^t) / (sqrt(v) + epsilon), with its largest v so far under
    `amsgrad`; Nadam: lr / (sqrt(v / (1 - beta_2^t)) + epsilon); Adamax: lr / (u + epsilon).

    Args:
        optimizer: a built Keras optimizer that has just stepped the weight.
        variable: the weight.
        learning_rate: the learning rate of the step.

    Returns:
        A float32 tensor: a scalar for SGD, of the weight's shape for the others.

    Raises:
        InputError: the optimizer has another type.
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


def frozen_share(model: keras.Model) -> dict[str, float]:
    """Measures the share of each layer's anchored weights that equal w0 bit by bit.

    Args:
        model: a model with bound penalties, as after `attach`.

    Returns:
        A dict from layer key to a share in [0, 1], and "all" for all layers together; {} without anchored weights.
    """
    layers: dict[str, int] = {}
    counts: dict[str, int] = {}
    for key, weight in keyed_weights(model).items():
        penalty = weight.variable.regularizer
        if isinstance(penalty, AnchoredPenalty) and penalty.is_bound and weight.variable.trainable:
            layer, equal = key.rsplit("/", 1)[0], ops.equal(weight.variable, ops.cast(penalty.anchor, weight.variable.dtype))
            layers[layer] = layers.get(layer, 0) + int(ops.count_nonzero(equal))
            counts[layer] = counts.get(layer, 0) + math.prod(weight.variable.shape)
    total = {"all": sum(layers.values()) / sum(counts.values())} if counts else {}
    return {**{layer: count / counts[layer] for layer, count in layers.items()}, **total}
