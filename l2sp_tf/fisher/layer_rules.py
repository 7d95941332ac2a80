"""Squared per-example gradients of a layer's weights: one rule for each kind of layer.

Symbols: `x` [B, ...] the input of a layer, `z` [B, ...] its output before the activation, `g` [n, B, ...] the
gradients of n scalars with respect to z, b the example, p a position (pixel, token), c and k channels of x and z.
A rule turns (x, g) into the sum over n and b of the squared gradient of each weight. It sums over positions before
it squares, and over examples after it: the square is that of one example.
"""

import contextlib
import itertools
import math
import string

import keras
import tensorflow as tf
from keras import layers, ops

from l2sp_tf.files.errors import InputError

HALF = ("float16", "bfloat16")


class Rule:
    """Computes a layer's output, and the squared per-example gradients of its weights.

    `RULES` lists the rule of each class of layers.

    Attributes:
        layer: the layer that owns the weights.
        call: the layer's own `call`.
        relies_on: the methods that a subclass of the listed class must not override.
    """

    relies_on = ("call",)

    def __init__(self, layer):
        self.layer, self.call = layer, layer.call

    @classmethod
    def serves(cls, layer, base):
        """Whether a layer computes as the listed class `base` does."""
        return all(getattr(type(layer), name) is getattr(base, name) for name in cls.relies_on)

    def output(self, x, **kwargs):
        """Computes z."""
        return self.call(x, **kwargs)

    def activate(self, z):
        """Computes the layer's output from z."""
        return z

    def squares(self, x, g):
        """Sums the squared gradients over n and b.

        Returns:
            A list of (variable, tensor of its shape); the variable is None where the layer does without.
        """
        raise NotImplementedError


class Linear(Rule):
    """z is linear in the weights, and an activation follows."""

    def output(self, x, **kwargs):
        with attribute(self.layer, "activation", None):
            return self.call(x, **kwargs)

    def activate(self, z):
        return z if self.layer.activation is None else self.layer.activation(z)


class Dense(Linear):
    """z_p = x_p W + bias: the gradient of W is sum_p x_p g_pᵀ."""

    def squares(self, x, g):
        kernel = product_squares(_flat(x), _flat(g, 2))
        return [(self.layer.kernel, kernel), (self.layer.bias, shift_squares(g, self.layer.bias))]


class EinsumDense(Linear):
    """z = einsum(equation, x, W) + bias, in which the first index is the example."""

    def squares(self, x, g):
        inputs, kernel, outputs, n = _letters(self.layer.equation, len(x.shape), len(g.shape) - 1)
        gradients = tf.einsum(f"{inputs},{n}{outputs}->{n}{inputs[0]}{kernel}", x, g)
        return [(self.layer.kernel, sum_of_squares(gradients)), (self.layer.bias, shift_squares(g, self.layer.bias))]


class Conv(Linear):
    """z_p = sum over taps of x_{p+tap} W_tap + bias: each tap is a product, within each group of channels."""

    relies_on = ("call", "convolution_op")

    def squares(self, x, g):
        layer, x, g = self.layer, _channels_last(self.layer, x), _channels_last(self.layer, g)
        grouped = _by_group(_flat(g, 2), layer.groups)
        taps = _tap_by_tap(layer, x, g, lambda tap: product_squares(_by_group(_flat(tap), layer.groups), grouped))
        kernel = tf.reshape(tf.transpose(taps, (0, 2, 1, 3)), layer.kernel.shape)  # [taps, groups, C / groups, K / groups]
        return [(layer.kernel, kernel), (layer.bias, shift_squares(g, layer.bias))]


class DepthwiseConv(Linear):
    """z_pcm = sum over taps of x_{p+tap,c} w_{tap,cm} + bias_cm."""

    def squares(self, x, g):
        layer, x, g = self.layer, _channels_last(self.layer, x), _channels_last(self.layer, g)
        return [(layer.kernel, depthwise_squares(layer, x, g)), (layer.bias, shift_squares(g, layer.bias))]


class SeparableConv(Linear):
    """h = depthwise convolution of x, z_p = h_p W + bias: the gradient of h_p is g_p Wᵀ."""

    def squares(self, x, g):
        layer, geometry = self.layer, ("strides", "padding", "dilation_rate", "data_format")
        h = ops.depthwise_conv(x, full_precision(layer.depthwise_kernel), **{name: getattr(layer, name) for name in geometry})
        x, h, g = (_channels_last(layer, t) for t in (x, h, g))
        pointwise = tf.reshape(full_precision(layer.pointwise_kernel), layer.pointwise_kernel.shape[-2:])
        return [
            (layer.depthwise_kernel, depthwise_squares(layer, x, tf.tensordot(g, pointwise, [[-1], [1]]))),
            (layer.pointwise_kernel, tf.reshape(product_squares(_flat(h), _flat(g, 2)), layer.pointwise_kernel.shape)),
            (layer.bias, shift_squares(g, layer.bias)),
        ]


class BatchNormalization(Rule):
    """z = gamma x̂ + beta with x̂ = (x - mean) / sqrt(variance + epsilon), by the moving statistics."""

    def squares(self, x, g):
        x_hat, axes = self.normalised(x)  # from x: z does not give x̂ where gamma = 0
        gamma = shift_squares(g * x_hat, self.layer.gamma, axes)
        return [(self.layer.gamma, gamma), (self.layer.beta, shift_squares(g, self.layer.beta, axes))]

    def normalised(self, x):
        """(x̂, the axes of x that gamma and beta have)."""
        axis = self.layer.axis % len(x.shape)
        shape = [-1 if i == axis else 1 for i in range(len(x.shape))]
        moving = (self.layer.moving_mean, self.layer.moving_variance)
        mean, variance = (tf.reshape(tf.cast(full_precision(v), x.dtype), shape) for v in moving)
        return (x - mean) * tf.math.rsqrt(variance + self.layer.epsilon), [axis]


class LayerNormalization(BatchNormalization):
    """z = gamma x̂ + beta, in which each example has its own mean and variance."""

    @classmethod
    def serves(cls, layer, base):
        return super().serves(layer, base) and not getattr(layer, "rms_scaling", False)

    def normalised(self, x):
        axes = [self.layer.axis] if isinstance(self.layer.axis, int) else self.layer.axis
        axes = sorted(axis % len(x.shape) for axis in axes)
        mean, variance = tf.nn.moments(x, axes, keepdims=True)
        return (x - mean) * tf.math.rsqrt(variance + self.layer.epsilon), axes


class ByExample(Rule):
    """Any other layer: calls it again for one example after the other, and differentiates by its own weights."""

    def output(self, x, *args, **kwargs):
        """Computes z.

        Raises:
            InputError: the layer does not map a batch of examples to a tensor of as many.
        """
        z = self.call(x, *args, **kwargs)
        self.given = (x, args, kwargs)
        if not tf.is_tensor(z) or not _has_examples(z) or not any(map(_has_examples, tf.nest.flatten(self.given))):
            raise InputError(
                f"The layer {self.layer.name} ({type(self.layer).__name__}) does not give one tensor of as many examples as it "
                "gets: pass slow_fallback=True, or make its weights not trainable."
            )
        return z

    def squares(self, x, g):
        inner = {id(v) for child in self.layer._flatten_layers(include_self=False) for v in child.variables}
        own = [v for v in self.layer.trainable_variables if id(v) not in inner]

        def one(b, sums):
            found = self._squares_of_one(b, own, g[:, b : b + 1])
            return b + 1, [total + square for total, square in zip(sums, found, strict=True)]

        start = (0, [tf.zeros_like(full_precision(v)) for v in own])
        sums = tf.while_loop(lambda b, _: b < tf.shape(g)[1], one, start, parallel_iterations=1)[1]
        return list(zip(own, sums, strict=True))

    def _squares_of_one(self, b, own, g):
        """The squares of example b, whose gradients are g [n, 1, ...]."""
        x, args, kwargs = tf.nest.map_structure(lambda t: t[b : b + 1] if _has_examples(t) else t, self.given)
        scope = keras.StatelessScope()
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            values = substitute(scope, self.layer.variables, own, tape)
            with scope, in_full_precision(self.layer):
                z = self.call(x, *args, **kwargs)
        gradients = [tape.gradient(z, values, g_n, unconnected_gradients="zero") for g_n in tf.unstack(g)]
        return [sum(tf.square(tf.convert_to_tensor(gradient)) for gradient in of_one) for of_one in zip(*gradients, strict=True)]


# Keras names the common bases of its convolutions only in private modules.
BaseConv, BaseDepthwiseConv, BaseSeparableConv = (
    cls.__mro__[1] for cls in (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)
)
# The first class that fits decides; `ByExample` serves all other layers.
RULES = {
    layers.Dense: Dense,
    layers.EinsumDense: EinsumDense,
    layers.Conv1D: Conv,  # has a `call` of its own, for causal padding
    BaseConv: Conv,
    BaseDepthwiseConv: DepthwiseConv,
    BaseSeparableConv: SeparableConv,
    layers.BatchNormalization: BatchNormalization,
    layers.LayerNormalization: LayerNormalization,
}


def rule_for(layer):
    """Makes the `Rule` of a layer, or returns None for a layer with LoRA or quantized weights: they have no rule."""
    if getattr(layer, "lora_enabled", False) or getattr(layer, "_is_quantized", False):
        return None
    kinds = (rule for base, rule in RULES.items() if isinstance(layer, base) and rule.serves(layer, base))
    return next(kinds, ByExample)(layer)


def check_layers(weights):
    """Checks that each layer that owns one of the weights has a rule.

    Args:
        weights: a dict from key to `l2sp_tf.penalties.weights.Weight`.

    Raises:
        InputError: layers with LoRA or quantized weights have none; the message names them.
    """
    wrong = {w.layer.name: type(w.layer).__name__ for w in weights.values() if rule_for(w.layer) is None}
    if wrong:
        raise InputError(
            "There is no rule for the squared gradients of these layers: "
            f"{', '.join(f'{name} ({kind})' for name, kind in list(wrong.items())[:5])}"
            f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}: "
            "pass slow_fallback=True, or make their weights not trainable."
        )


def sum_of_squares(gradients):
    """Sums squares over n and b: [n, B, ...] -> [...]."""
    return tf.reduce_sum(tf.square(gradients), (0, 1))


def product_squares(x, g):
    """sum_nb (sum_p x_bpc g_nbpk)², [..., C, K], for x [..., B, P, C] and g [n, ..., B, P, K]."""
    if x.shape[-2] == 1:  # one position: the square of a product is the product of squares
        return tf.matmul(tf.square(x[..., 0, :]), tf.reduce_sum(tf.square(g[..., 0, :]), 0), transpose_a=True)
    return tf.reduce_sum(tf.square(tf.matmul(x, g, transpose_a=True)), (0, -3))


def shift_squares(g, weight, axes=None):
    """sum_nb (sum_p g_nbp)² for a weight that is added to z.

    Args:
        g: [n, B, ...].
        weight: the variable, or None.
        axes: the axes of z that the weight has. None aligns its shape with the last axes by the rule of
            broadcasting, and sums over those where its side is 1.

    Returns:
        A tensor of the weight's shape, or None without a weight.
    """
    if weight is None:
        return None
    rank, first = len(g.shape), len(g.shape) - len(weight.shape)
    if axes is None:
        kept = [first + i for i, side in enumerate(weight.shape) if side != 1 or g.shape[first + i] == 1]
    else:
        kept = [axis + 1 for axis in axes]
    per_example = tf.reduce_sum(g, [axis for axis in range(2, rank) if axis not in kept])
    return tf.reshape(sum_of_squares(per_example), weight.shape)


def depthwise_squares(layer, x, g):
    """sum_nb (sum_p x_{b,p+tap,c} g_nbpcm)² for a depthwise kernel [*taps, C, M], M the depth multiplier."""
    flat = _flat(g, 2)
    flat = tf.reshape(flat, (flat.shape[0], -1, _positions(g, 2), x.shape[-1], g.shape[-1] // x.shape[-1]))
    taps = _tap_by_tap(layer, x, g, lambda tap: sum_of_squares(tf.reduce_sum(_flat(tap)[..., None] * flat, 2)))
    return tf.reshape(taps, (*layer.kernel_size, *flat.shape[-2:]))


def _tap_by_tap(layer, x, g, squares):
    """Stacks squares(the part of x that a tap of the kernel meets) for one tap after the other.

    It forces the order, which begins after g: left alone, the executor would cut all taps out of x
    as soon as x is known, in the forward pass, and keep them until g is.
    """
    found = []
    with tf.control_dependencies([g]):
        padded, cuts = _padded(layer, x, g)
    for cut in itertools.product(*cuts):
        with tf.control_dependencies([found[-1] if found else g]):
            found.append(squares(padded[(slice(None), *cut)]))
    return tf.stack(found)


def _padded(layer, x, g):
    """The padded input, and for each spatial axis the slices of it that the taps meet, as long as g."""
    pads, cuts = [(0, 0)], []
    for axis, (k, s, d) in enumerate(zip(layer.kernel_size, layer.strides, layer.dilation_rate, strict=True), start=1):
        size, out = _side(x, axis), _side(g, axis + 1)
        span = (out - 1) * s + 1
        missing = span + (k - 1) * d - size
        before = {"valid": 0, "causal": (k - 1) * d}.get(layer.padding, _positive(missing) // 2)
        pads.append((before, _positive(missing - before)))
        cuts.append([slice(t * d, t * d + span, s) for t in range(k)])
    if any(not isinstance(side, int) or side for pair in pads for side in pair):
        x = tf.pad(x, [*pads, (0, 0)])
    return x, cuts


def _side(t, axis):
    return t.shape[axis] if t.shape[axis] is not None else tf.shape(t)[axis]


def _positive(number):
    return max(number, 0) if isinstance(number, int) else tf.maximum(number, 0)


def _flat(t, first=1):
    """Joins the positions, which begin at axis `first`: [B, *spatial, C] -> [B, P, C], or with n before B."""
    return tf.reshape(t, (*t.shape[: first - 1], -1, _positions(t, first), t.shape[-1]))


def _positions(t, first=1):
    sides = t.shape[first:-1]
    return math.prod(sides) if None not in sides else tf.reduce_prod(tf.shape(t)[first:-1])


def _by_group(t, groups):
    """[..., B, P, C] -> [..., groups, B, P, C / groups]."""
    rank, position = len(t.shape), _side(t, -2)
    split = tf.reshape(t, (*t.shape[: rank - 3], -1, position, groups, t.shape[-1] // groups))
    return tf.transpose(split, (*range(rank - 3), rank - 1, rank - 3, rank - 2, rank))


def _channels_last(layer, t):
    """Moves the channels to the end, if the layer has data_format "channels_first"."""
    if layer.data_format != "channels_first":
        return t
    axis = len(t.shape) - 1 - layer.rank
    return tf.transpose(t, (*range(axis), *range(axis + 1, len(t.shape)), axis))


def _letters(equation, x_rank, z_rank):
    """The index letters of an einsum's input, kernel and output, with "..." spelled out, and one more letter."""
    inputs, kernel, outputs = equation.replace(" ", "").replace("->", ",").split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = max(x_rank - len(inputs.replace("...", "")), z_rank - len(outputs.replace("...", "")))
    dots = "".join(free[:hidden])
    return *(part.replace("...", dots) for part in (inputs, kernel, outputs)), free[hidden]


def _has_examples(t):
    """Whether the first axis of a tensor is the batch, whose length is unknown while a model is traced."""
    return tf.is_tensor(t) and t.shape.rank is not None and t.shape.rank > 0 and t.shape[0] is None


def full_precision(variable):
    """The value of a variable, in float32 if it is in half precision."""
    value = tf.convert_to_tensor(variable.value)
    return value if value.dtype == tf.float64 else tf.cast(value, tf.float32)


def substitute(scope, variables, watched, tape):
    """Lets a scope read float32 tensors for variables in half precision, and tensors that a tape watches for others.

    Args:
        scope: a `keras.StatelessScope`.
        variables: those of a layer.
        watched: a list of those to differentiate by.
        tape: the gradient tape.

    Returns:
        The tensors for `watched`.
    """
    values = {id(v): tf.identity(full_precision(v)) for v in (*watched, *(v for v in variables if v.dtype in HALF))}
    scope.state_mapping.update(values)  # its constructor would cast them back to half precision
    found = [values[id(v)] for v in watched]
    tape.watch(found)
    return found


@contextlib.contextmanager
def in_full_precision(model):
    """Lets the layers of a model compute in float32 instead of half precision."""
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if keras.backend.is_float_dtype(layer.compute_dtype) and layer.compute_dtype not in ("float32", "float64"):
                stack.enter_context(attribute(layer, "_dtype_policy", keras.DTypePolicy("float32")))
        yield


@contextlib.contextmanager
def attribute(layer, name, value):
    """Gives a layer another attribute for a while, without Keras' tracking."""
    own, missing = vars(layer), object()
    before = own.get(name, missing)
    object.__setattr__(layer, name, value)
    try:
        yield
    finally:
        if before is missing:
            object.__delattr__(layer, name)
        else:
            object.__setattr__(layer, name, before)
