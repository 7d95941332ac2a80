"""Squared per-example gradients of a layer's weights: one rule for each kind of layer.

Symbols: `x` [B, ...] the input of a layer, `z` [B, ...] its output before the activation, `gs` a list of the
gradients `g` [B, ...] of n scalars with respect to z, b the example, p a position (pixel, token), c and k channels of
x and z. A rule turns (x, gs) into the sum over n and b of the squared gradient of each weight. It sums over positions
before it squares, and over examples after it: the square is that of one example.
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
    """Computes a layer's output, and the squared per-example gradients of its weights; `RULES` lists all rules."""

    relies_on: tuple[str, ...] = ("call",)  # the methods that a subclass of the listed class must not override

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

    def squares(self, x, gs):
        """Sums the squared gradients over gs and examples.

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

    def squares(self, x, gs):
        return [(self.layer.kernel, dense_squares(x, gs)), (self.layer.bias, shift_squares(gs, self.layer.bias))]


class EinsumDense(Linear):
    """z = einsum(equation, x, W) + bias, in which the first index is the example."""

    def squares(self, x, gs):
        inputs, kernel, outputs = _letters(self.layer.equation, len(x.shape), len(gs[0].shape))
        gradients = [tf.einsum(f"{inputs},{outputs}->{inputs[0]}{kernel}", x, g) for g in gs]
        return [(self.layer.kernel, sum_of_squares(gradients)), (self.layer.bias, shift_squares(gs, self.layer.bias))]


class Conv(Linear):
    """z_p = sum over taps of x_{p+tap} W_tap + bias: each tap is a product, within each group of channels."""

    relies_on = ("call", "convolution_op")

    def squares(self, x, gs):
        layer, (x, *gs) = self.layer, _channels_last(self.layer, [x, *gs])
        rows = _rows(gs, layer.groups)
        taps = _tap_by_tap(layer, x, gs, lambda tap: product_squares(_columns(tap, layer.groups), rows))
        kernel = tf.reshape(tf.transpose(taps, (0, 3, 1, 2)), layer.kernel.shape)  # from [taps, groups, K / groups, C / groups]
        return [(layer.kernel, kernel), (layer.bias, shift_squares(gs, layer.bias))]


class DepthwiseConv(Linear):
    """z_pcm = sum over taps of x_{p+tap,c} w_{tap,cm} + bias_cm."""

    def squares(self, x, gs):
        layer, (x, *gs) = self.layer, _channels_last(self.layer, [x, *gs])
        return [(layer.kernel, depthwise_squares(layer, x, gs)), (layer.bias, shift_squares(gs, layer.bias))]


class SeparableConv(Linear):
    """h = depthwise convolution of x, z_p = h_p W + bias: the gradient of h_p is g_p Wᵀ."""

    def squares(self, x, gs):
        layer, geometry = self.layer, ("strides", "padding", "dilation_rate", "data_format")
        h = ops.depthwise_conv(x, full_precision(layer.depthwise_kernel), **{name: getattr(layer, name) for name in geometry})
        x, h, *gs = _channels_last(layer, [x, h, *gs])
        pointwise = tf.reshape(full_precision(layer.pointwise_kernel), layer.pointwise_kernel.shape[-2:])
        inner = [tf.tensordot(g, pointwise, [[-1], [1]]) for g in gs]
        return [
            (layer.depthwise_kernel, depthwise_squares(layer, x, inner)),
            (layer.pointwise_kernel, tf.reshape(dense_squares(h, gs), layer.pointwise_kernel.shape)),
            (layer.bias, shift_squares(gs, layer.bias)),
        ]


class BatchNormalization(Rule):
    """z = gamma x̂ + beta with x̂ = (x - mean) / sqrt(variance + epsilon), by the moving statistics."""

    def squares(self, x, gs):
        x_hat, axes = self.normalised(x)  # from x: z does not give x̂ where gamma = 0
        gamma = shift_squares([g * x_hat for g in gs], self.layer.gamma, axes)
        return [(self.layer.gamma, gamma), (self.layer.beta, shift_squares(gs, self.layer.beta, axes))]

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
        z = self.call(x, *args, **kwargs)
        self.given = (x, args, kwargs)
        if not tf.is_tensor(z) or not _has_examples(z) or not any(map(_has_examples, tf.nest.flatten(self.given))):
            raise InputError(
                f"The layer {self.layer.name} ({type(self.layer).__name__}) does not give one tensor of as many examples as it "
                "gets: pass slow_fallback=True, or make its weights not trainable."
            )
        return z

    def squares(self, x, gs):
        inner = {id(v) for child in self.layer._flatten_layers(include_self=False) for v in child.variables}
        own = [v for v in self.layer.trainable_variables if id(v) not in inner]

        def one(b, sums):
            found = self._squares_of_one(b, own, [g[b : b + 1] for g in gs])
            return b + 1, [total + square for total, square in zip(sums, found, strict=True)]

        start = (0, [tf.zeros_like(full_precision(v)) for v in own])
        sums = tf.while_loop(lambda b, _: b < tf.shape(gs[0])[0], one, start, parallel_iterations=1)[1]
        return list(zip(own, sums, strict=True))

    def _squares_of_one(self, b, own, gs):
        """The squares of example b, for its gradients g [1, ...]."""
        x, args, kwargs = tf.nest.map_structure(lambda t: t[b : b + 1] if _has_examples(t) else t, self.given)
        scope = keras.StatelessScope()
        with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
            values = substitute(scope, self.layer.variables, own, tape)
            with scope, in_full_precision(self.layer):
                z = self.call(x, *args, **kwargs)
        gradients = [tape.gradient(z, values, g, unconnected_gradients="zero") for g in gs]
        return [tf.add_n([tf.square(tf.convert_to_tensor(m)) for m in of_weight]) for of_weight in zip(*gradients, strict=True)]


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
    """Sums the squares of a list of gradients [B, ...] over the list and the examples."""
    return tf.add_n([tf.reduce_sum(tf.square(m), 0) for m in gradients])


def dense_squares(x, gs):
    """sum_nb (sum_p x_bpc g_nbpk)² [C, K], for x [B, ..., C] and gs [B, ..., K]."""
    return tf.transpose(product_squares(_columns(x), _rows(gs))[0])


def product_squares(x, g):
    """sum_nb (sum_p x_bpc g_nbpk)² [groups, K, C], for x [groups, B, P, C] and g [groups, B, n, K, P]."""
    groups, _, n, filters, positions = g.shape
    if positions == 1:  # the square of a product is the product of squares
        return tf.matmul(tf.reduce_sum(tf.square(g[..., 0]), 2), tf.square(x[:, :, 0]), transpose_a=True)
    side_by_side = tf.reshape(g, (groups, -1, n * filters, _side(g, -1)))
    squares = tf.reduce_sum(tf.square(tf.matmul(side_by_side, x)), 1)
    return tf.reduce_sum(tf.reshape(squares, (groups, n, filters, x.shape[-1])), 1)


def shift_squares(gs, weight, axes=None):
    """sum_nb (sum_p g_nbp)² for a weight that is added to z.

    Args:
        gs: a list of tensors [B, ...].
        weight: the variable, or None.
        axes: the axes of z that the weight has. None aligns its shape with the last axes by the rule of
            broadcasting, and sums over those where its side is 1.

    Returns:
        A tensor of the weight's shape, or None without a weight.
    """
    if weight is None:
        return None
    sides, first = gs[0].shape, len(gs[0].shape) - len(weight.shape)
    if axes is None:
        axes = [first + i for i, side in enumerate(weight.shape) if side != 1 or sides[first + i] == 1]
    summed = [axis for axis in range(1, len(sides)) if axis not in axes]
    return tf.reshape(sum_of_squares([tf.reduce_sum(g, summed) for g in gs]), weight.shape)


def depthwise_squares(layer, x, gs):
    """sum_nb (sum_p x_{b,p+tap,c} g_nbpcm)² for a depthwise kernel [*taps, C, M], M the depth multiplier."""
    channels, multiplier = x.shape[-1], gs[0].shape[-1] // x.shape[-1]
    flat = [tf.reshape(g, (-1, _positions(g), channels, multiplier)) for g in gs]

    def squares(tap):
        column = tf.reshape(tap, (-1, _positions(tap), channels, 1))
        return sum_of_squares([tf.reduce_sum(column * g, 1) for g in flat])

    return tf.reshape(_tap_by_tap(layer, x, gs, squares), (*layer.kernel_size, channels, multiplier))


def _tap_by_tap(layer, x, gs, squares):
    """Stacks squares(the part of x that a tap of the kernel multiplies) for one tap after the other.

    It forces the order, which begins after gs: left alone, the executor would cut all taps out of x
    as soon as x is known, in the forward pass, and keep them until gs are.
    """
    found = []
    with tf.control_dependencies(gs):
        padded, cuts = _padded(layer, x, gs[0])
    for cut in itertools.product(*cuts):
        with tf.control_dependencies(found[-1:] or gs):
            found.append(squares(padded[(slice(None), *cut)]))
    return tf.stack(found)


def _padded(layer, x, g):
    """The padded input, and for each spatial axis the slices of it that the taps multiply, as long as g."""
    pads, cuts = [(0, 0)], []
    for axis, (k, s, d) in enumerate(zip(layer.kernel_size, layer.strides, layer.dilation_rate, strict=True), start=1):
        size, out = _side(x, axis), _side(g, axis)
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


def _positions(t):
    sides = t.shape[1:-1]
    return math.prod(sides) if None not in sides else tf.reduce_prod(tf.shape(t)[1:-1])


def _columns(x, groups=1):
    """[B, ..., C] -> [groups, B, P, C / groups]."""
    return tf.transpose(tf.reshape(x, (-1, _positions(x), groups, x.shape[-1] // groups)), (2, 0, 1, 3))


def _rows(gs, groups=1):
    """n tensors [B, ..., K] -> [groups, B, n, K / groups, P]."""
    split = [tf.reshape(g, (-1, _positions(g), groups, g.shape[-1] // groups)) for g in gs]
    return tf.stack([tf.transpose(g, (2, 0, 3, 1)) for g in split], 2)


def _channels_last(layer, tensors):
    """Moves the channels to the end, if the layer has data_format "channels_first"."""
    if layer.data_format != "channels_first":
        return tensors
    return [tf.transpose(t, (0, *range(2, len(t.shape)), 1)) for t in tensors]


def _letters(equation, x_rank, z_rank):
    """The index letters of an einsum's input, kernel and output, with "..." spelled out."""
    inputs, kernel, outputs = equation.replace(" ", "").replace("->", ",").split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = max(x_rank - len(inputs.replace("...", "")), z_rank - len(outputs.replace("...", "")))
    dots = "".join(free[:hidden])
    return tuple(part.replace("...", dots) for part in (inputs, kernel, outputs))


def _has_examples(t):
    """Whether the first axis of a tensor is the batch, whose length is unknown while a model is traced."""
    return tf.is_tensor(t) and t.shape.rank is not None and t.shape.rank > 0 and t.shape[0] is None


def full_precision(variable):
    """The value of a variable, in float32 if it is in half precision."""
    value = tf.convert_to_tensor(variable.value)
    return value if value.dtype == tf.float64 else tf.cast(value, tf.float32)


def substitute(scope, variables, watched, tape):
    """Lets a `keras.StatelessScope` read float32 tensors for variables in half precision, and watched ones for `watched`.

    Returns:
        The tensors for `watched`, which the tape watches.
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
