"""Squared per-example gradients, one rule for each kind of layer.

Symbols: `x` the input of a layer, `g` the gradient of a scalar with respect to the layer's
output before the activation, b the example, p a position (pixel, token), c and k channels of
the input and of the output. A rule turns (x, g) into the sum over b of the squared gradient of
each weight: the square is taken for each example, after the sum over positions and before
the sum over the batch.
"""

import contextlib
import itertools
import math
import string
import typing

import keras
import tensorflow as tf
from keras import layers, ops

from l2sp_tf.files.errors import InputError


class Site(typing.NamedTuple):
    """A place where weights enter a model.

    Attributes:
        layer: the layer that owns the weights.
        x: its input.
        output: the tensor that the weights give, before the activation.
        squares: a function from a list of gradients with respect to `output`, one for each
            cotangent, to a dict from the id of a variable to the sum over the batch and the list
            of its squared per-example gradients.
        is_dense: whether it is a `Dense` layer applied to [B, C].
    """

    layer: keras.Layer
    x: tf.Tensor
    output: tf.Tensor
    squares: typing.Callable
    is_dense: bool = False


def rule_for(layer):
    """The rule of a layer, or None where there is none.

    A subclass shares the rule of its base if it has not overridden what the rule relies on. Layers
    of other kinds take the rule that calls them again for one example after the other; a layer with
    LoRA or quantized weights has no rule.

    Returns:
        None, or a function (layer, call, watch, x, **kwargs) -> (output, list of `Site`), in which
        `call` is the layer's own `call`, and `watch` a function that makes a tensor a source of gradients.
    """
    if getattr(layer, "lora_enabled", False) or getattr(layer, "_is_quantized", False):
        return None
    for base, methods, rule in _RULES:
        if isinstance(layer, base) and all(getattr(type(layer), name) in known for name, known in methods.items()):
            return _by_example if getattr(layer, "rms_scaling", False) else rule
    return _by_example


def check_layers(weights):
    """Checks that each layer that owns one of the weights has a rule, which those with LoRA and quantized ones have not.

    Args:
        weights: a dict from key to `l2sp_tf.penalties.weights.Weight`.

    Raises:
        InputError: some have none; each is named.
    """
    wrong = {w.layer.name: type(w.layer).__name__ for w in weights.values() if rule_for(w.layer) is None}
    if wrong:
        raise InputError(
            "There is no rule for the squared gradients of these layers: "
            f"{', '.join(f'{name} ({kind})' for name, kind in list(wrong.items())[:5])}"
            f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}: "
            "pass slow_fallback=True, or make their weights not trainable."
        )


@contextlib.contextmanager
def instrumented(model, weights, tape, *, rules=True):
    """While the block traces a model, each layer notes where its weights enter, and computes in float32 at least.

    The model's layers get their own `call` and policy back at the end, and no variable of the
    model is assigned meanwhile.

    Args:
        model: a built Keras model.
        weights: a dict from key to `l2sp_tf.penalties.weights.Weight`: those of interest.
        tape: the gradient tape that records the block, which watches no variables by itself.
        rules: False leaves the layers alone and watches the values of the weights instead.

    Yields:
        A `Trace`.
    """
    trace = Trace(weights, tape)
    trace.substitute(model, rules)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_in_full_precision(model))
        if rules:
            for layer in {id(w.layer): w.layer for w in weights.values()}.values():
                stack.enter_context(_attribute(layer, "call", trace.wrapped(layer)))
        stack.enter_context(trace)
        yield trace


class Trace(keras.StatelessScope):
    """What happened while a model was traced.

    Attributes:
        sites: each `Site` that was met.
        values: the tensors that stood for the weights, by key, if there were no rules.
    """

    def __init__(self, weights, tape):
        super().__init__()
        self.sites, self.values = [], {}
        self._weights, self._tape = weights, tape
        self._owners = {id(w.variable): (key, w.layer) for key, w in weights.items()}
        self._graph = tf.compat.v1.get_default_graph()
        self._running, self._called, self._twice, self._stray = [], set(), set(), set()

    def substitute(self, model, rules):
        """Puts float32 tensors in the place of half-precision variables and, without rules, of the weights."""
        if not rules:
            self._owners = {}
            for key, weight in self._weights.items():
                value = tf.identity(_full_precision(weight.variable))
                self._tape.watch(value)
                self.values[key] = self.state_mapping[id(weight.variable)] = value
        for variable in model.variables:
            if id(variable) not in self.state_mapping and variable.dtype in ("float16", "bfloat16"):
                self.state_mapping[id(variable)] = _full_precision(variable)

    def wrapped(self, layer):
        """The layer's `call`, with its rule around it."""
        call, rule = layer.call, rule_for(layer)

        def watch(tensor):
            self._tape.watch(tensor)
            return tensor

        def run(x, *args, **kwargs):
            # a loop traces its body in a graph of its own, once for all rounds
            again = id(layer) in self._called or tf.compat.v1.get_default_graph() is not self._graph
            (self._twice if again else self._called).add(id(layer))
            self._running.append(layer)
            try:
                output, sites = rule(layer, call, watch, x, *args, **kwargs)
            finally:
                self._running.pop()
            self.sites.extend(sites)
            return output

        return run

    def get_current_value(self, variable):
        key, owner = self._owners.get(id(variable), (None, None))
        if key is not None and not (self._running and self._running[-1] is owner):
            self._stray.add(key)
        return super().get_current_value(variable)

    def check(self):
        """Checks that each layer was called once, and each weight read by its own layer only.

        Raises:
            InputError: gradients of several uses of a weight would have to be added before they
                are squared; each layer or weight is named.
        """
        shared = list(dict.fromkeys(w.layer.name for w in self._weights.values() if id(w.layer) in self._twice))
        wrong = [f"the layer {name} is called more than once" for name in shared]
        wrong += [f"the weight {key} is used outside its layer" for key in sorted(self._stray)]
        if wrong:
            raise InputError(f"Squares of shared weights' gradients do not add: {'; '.join(wrong[:5])}; pass slow_fallback=True.")


def _dense(layer, call, watch, x, **kwargs):
    with _without_activation(layer):
        output = watch(call(x, **kwargs))

    def squares(gs):
        return _keep(layer, gs, kernel=lambda g: dense_squares(x, g), bias=lambda g: bias_squares(g, layer.bias.shape))

    return _activate(layer, output), [Site(layer, x, output, squares, is_dense=len(x.shape) == 2)]


def _einsum_dense(layer, call, watch, x, **kwargs):
    with _without_activation(layer):
        output = watch(call(x, **kwargs))

    def squares(gs):
        return _keep(
            layer,
            gs,
            kernel=lambda g: einsum_squares(layer.equation, x, g),
            bias=lambda g: bias_squares(g, layer.bias.shape),
        )

    return _activate(layer, output), [Site(layer, x, output, squares)]


def _conv(layer, call, watch, x, **kwargs):
    with _without_activation(layer):
        output = watch(call(x, **kwargs))

    def squares(gs):
        x_last, gs_last = _channels_last(layer, x), [_channels_last(layer, g) for g in gs]
        found = _keep(layer, gs_last, bias=lambda g: bias_squares(g, layer.bias.shape))
        return {id(layer.kernel): conv_squares(x_last, gs_last, *_geometry(layer), groups=layer.groups), **found}

    return _activate(layer, output), [Site(layer, x, output, squares)]


def _depthwise_conv(layer, call, watch, x, **kwargs):
    with _without_activation(layer):
        output = watch(call(x, **kwargs))

    def squares(gs):
        x_last, gs_last = _channels_last(layer, x), [_channels_last(layer, g) for g in gs]
        return _keep(
            layer,
            gs_last,
            kernel=lambda g: depthwise_squares(x_last, g, *_geometry(layer)),
            bias=lambda g: bias_squares(g, layer.bias.shape),
        )

    return _activate(layer, output), [Site(layer, x, output, squares)]


def _separable_conv(layer, call, watch, x, **kwargs):
    """Two sites: the depthwise convolution, whose output the layer's own call never shows, and the pointwise one."""
    del call, kwargs
    inner = watch(
        ops.depthwise_conv(
            x,
            layer.depthwise_kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
    )
    output = ops.conv(inner, layer.pointwise_kernel, data_format=layer.data_format)
    if layer.use_bias:
        output += ops.reshape(layer.bias, (-1,) + (1,) * (layer.rank if layer.data_format == "channels_first" else 0))
    output = watch(output)
    ones = (1,) * layer.rank

    def inner_squares(gs):
        x_last, gs_last = _channels_last(layer, x), [_channels_last(layer, g) for g in gs]
        return _keep(layer, gs_last, depthwise_kernel=lambda g: depthwise_squares(x_last, g, *_geometry(layer)))

    def squares(gs):
        inner_last, gs_last = _channels_last(layer, inner), [_channels_last(layer, g) for g in gs]
        found = _keep(layer, gs_last, bias=lambda g: bias_squares(g, layer.bias.shape))
        return {id(layer.pointwise_kernel): conv_squares(inner_last, gs_last, ones, ones, ones, "valid"), **found}

    return _activate(layer, output), [Site(layer, x, inner, inner_squares), Site(layer, inner, output, squares)]


def _batch_normalization(layer, call, watch, x, **kwargs):
    output = watch(call(x, **kwargs))
    axis = layer.axis % len(x.shape)
    shape = [-1 if i == axis else 1 for i in range(len(x.shape))]
    mean = tf.cast(tf.convert_to_tensor(layer.moving_mean), output.dtype)
    scale = tf.math.rsqrt(tf.cast(tf.convert_to_tensor(layer.moving_variance), output.dtype) + layer.epsilon)

    def gamma(g):
        # y = gamma x̂ + beta with x̂ = (x - mean) scale, taken from x: y does not give x̂ where gamma = 0.
        return bias_squares(g * (x - tf.reshape(mean, shape)), layer.gamma.shape, [axis]) * tf.square(scale)

    def squares(gs):
        return _keep(layer, gs, gamma=gamma, beta=lambda g: bias_squares(g, layer.beta.shape, [axis]))

    return output, [Site(layer, x, output, squares)]


def _layer_normalization(layer, call, watch, x, **kwargs):
    output = watch(call(x, **kwargs))
    axes = sorted(axis % len(x.shape) for axis in ([layer.axis] if isinstance(layer.axis, int) else layer.axis))

    def gamma(g):
        mean, variance = tf.nn.moments(x, axes, keepdims=True)
        return bias_squares(g * (x - mean) * tf.math.rsqrt(variance + layer.epsilon), layer.gamma.shape, axes)

    def squares(gs):
        return _keep(layer, gs, gamma=gamma, beta=lambda g: bias_squares(g, layer.beta.shape, axes))

    return output, [Site(layer, x, output, squares)]


def _by_example(layer, call, watch, x, *args, **kwargs):
    """Any other layer: called again for one example after the other, and differentiated by its own weights."""
    output = call(x, *args, **kwargs)
    given = (x, args, kwargs)
    if not tf.is_tensor(output) or not _has_examples(output) or not any(map(_has_examples, tf.nest.flatten(given))):
        raise InputError(
            f"The layer {layer.name} ({type(layer).__name__}) does not give one tensor of as many examples as it gets: "
            "pass slow_fallback=True, or make its weights not trainable."
        )
    output = watch(output)
    inner = {id(v) for child in layer._flatten_layers(include_self=False) for v in child.variables}
    own = [v for v in layer.trainable_variables if id(v) not in inner]

    def squares(gs):
        def one(b, sums):
            x, args, kwargs = tf.nest.map_structure(lambda t: t[b : b + 1] if _has_examples(t) else t, given)
            values = [tf.identity(_full_precision(v)) for v in own]
            scope = keras.StatelessScope()
            half = {id(v): _full_precision(v) for v in layer.variables if v.dtype in ("float16", "bfloat16")}
            # not through its constructor, which casts to the dtype of the variable
            scope.state_mapping.update(half | {id(v): value for v, value in zip(own, values, strict=True)})
            with tf.GradientTape(persistent=True, watch_accessed_variables=False) as tape:
                tape.watch(values)
                with scope, _in_full_precision(layer):
                    y = call(x, *args, **kwargs)
            for g in gs:
                gradients = tape.gradient(y, values, g[b : b + 1], unconnected_gradients="zero")
                sums = [s + tf.square(tf.convert_to_tensor(m)) for s, m in zip(sums, gradients, strict=True)]
            return b + 1, sums

        count, start = tf.shape(output)[0], [tf.zeros_like(_full_precision(v)) for v in own]
        sums = tf.while_loop(lambda b, _: b < count, one, (0, start), parallel_iterations=1)[1]
        return {id(v): total for v, total in zip(own, sums, strict=True)}

    return output, [Site(layer, x, output, squares)]


def _has_examples(t):
    """Whether the first axis of a tensor is the batch, whose length is not known while a model is traced."""
    return tf.is_tensor(t) and t.shape.rank is not None and t.shape.rank > 0 and t.shape[0] is None


def sum_of_squares(m):
    """sum_b m_b^2 over the first axis."""
    return tf.reduce_sum(tf.square(m), 0)


def dense_squares(x, g):
    """sum_b (sum_p x_bpc g_bpk)^2 for a kernel [C, K]; x is [B, ..., C] and g [B, ..., K]."""
    if len(x.shape) == 2:  # one position: the square of a product is the product of squares
        return tf.matmul(tf.square(x), tf.square(g), transpose_a=True)
    return sum_of_squares(tf.matmul(_flat(x), _flat(g), transpose_a=True))


def einsum_squares(equation, x, g):
    """sum_b (d/dW)^2 for y = einsum(equation, x, W), whose first axis is the batch."""
    inputs, kernel, outputs = _letters(equation, len(x.shape), len(g.shape))
    return sum_of_squares(tf.einsum(f"{inputs},{outputs}->{inputs[0]}{kernel}", x, g))


def bias_squares(g, shape, axes=None):
    """sum_b (sum_p g_bp)^2 for a weight that is added to the output.

    Args:
        g: [B, ...].
        shape: of the weight.
        axes: the axes of g that are the weight's; by default its last ones, by the rule of
            broadcasting, in which a side of length 1 is summed over.
    """
    rank = len(g.shape)
    if axes is None:
        axes = [rank - len(shape) + i for i, side in enumerate(shape) if side != 1 or g.shape[rank - len(shape) + i] == 1]
    summed = [axis for axis in range(1, rank) if axis not in axes]
    per_example = tf.reduce_sum(g, summed) if summed else g
    return tf.reshape(sum_of_squares(per_example), shape)


def conv_squares(x, gs, kernel_size, strides, dilations, padding, groups=1):
    """sum_b (sum_p x_b,p+tap,c g_bpk)^2 for each tap of a kernel [*kernel_size, C / groups, K], summed over `gs`.

    One tap at a time: gᵀ times the input at the positions that the tap meets is the gradient of
    the tap for each example. The square is elementwise, so the taps need not meet. The gradients
    of `gs` stand side by side as channels, so that the input is cut but once for all.

    Args:
        x: [B, *spatial, C].
        gs: a list of [B, *spatial, K].
        kernel_size, strides, dilations: one number for each spatial axis.
        padding: "same", "valid" or "causal".
        groups: of channels.
    """
    channels, filters = x.shape[-1], gs[0].shape[-1]
    one_position = math.prod(side or 0 for side in gs[0].shape[1:-1]) == 1
    # [B, P, C] -> [B, groups, C / groups, P], or [B, C, P] for one group
    transposed = [_by_group(g, groups) for g in gs]
    g = transposed[0] if len(gs) == 1 else tf.concat(transposed, axis=-2)

    def rule(tap):
        if groups > 1:
            tap = tf.reshape(tap, (-1, _positions(tap), groups, channels // groups))
            return tf.reduce_sum(tf.square(tf.einsum("bgkp,bpgc->bgkc", g, tap)), 0)
        if one_position:  # the square of a product is the product of squares
            return tf.matmul(tf.square(g[..., 0]), tf.square(_flat(tap)[:, 0]), transpose_a=True)
        return tf.reduce_sum(tf.square(tf.matmul(g, _flat(tap))), 0)

    squares = tf.stack(_tap_by_tap(rule, x, gs[0], g, kernel_size, strides, dilations, padding))
    # [taps, groups, gradients, K / groups, C / groups] -> [taps, C / groups, K]
    squares = tf.reshape(squares, (-1, groups, len(gs), filters // groups, channels // groups))
    return tf.reshape(tf.transpose(tf.reduce_sum(squares, 2), (0, 3, 1, 2)), (*kernel_size, channels // groups, filters))


def depthwise_squares(x, g, kernel_size, strides, dilations, padding):
    """sum_b (sum_p x_b,p+tap,c g_bpcm)^2 for each tap of a depthwise kernel [*kernel_size, C, M]."""
    channels = x.shape[-1]
    multiplier = g.shape[-1] // channels
    flat = tf.reshape(g, (-1, _positions(g), channels, multiplier))

    def rule(tap):
        return sum_of_squares(tf.reduce_sum(_flat(tap)[..., None] * flat, 1))

    taps = _tap_by_tap(rule, x, g, g, kernel_size, strides, dilations, padding)
    return tf.reshape(tf.stack(taps), (*kernel_size, channels, multiplier))


def _tap_by_tap(rule, x, g, first, kernel_size, strides, dilations, padding):
    """Applies a rule to the part of the input that each tap meets, one after the other.

    The order is forced, beginning after the tensor `first`: left alone, the executor would cut
    all taps out of x as soon as x is known, in the forward pass, and keep them until g is.
    """
    squares = []
    with tf.control_dependencies([first]):
        padded, cuts = _padded(x, g, kernel_size, strides, dilations, padding)
    for cut in itertools.product(*cuts):
        with tf.control_dependencies([squares[-1] if squares else first]):
            squares.append(rule(padded[(slice(None), *cut)]))
    return squares


def _padded(x, g, kernel_size, strides, dilations, padding):
    """The padded input, and for each spatial axis the slices of it that the taps meet, as long as g."""
    pads, cuts = [(0, 0)], []
    for axis, (k, s, d) in enumerate(zip(kernel_size, strides, dilations, strict=True), start=1):
        size, out = (t.shape[axis] if t.shape[axis] is not None else tf.shape(t)[axis] for t in (x, g))
        span = (out - 1) * s + 1
        missing = span + (k - 1) * d - size
        before = {"valid": 0, "causal": (k - 1) * d}.get(padding, _positive(missing) // 2)
        pads.append((before, _positive(missing - before)))
        cuts.append([slice(t * d, t * d + span, s) for t in range(k)])
    if any(not isinstance(side, int) or side for pair in pads for side in pair):
        x = tf.pad(x, [*pads, (0, 0)])
    return x, cuts


def _positive(number):
    return max(number, 0) if isinstance(number, int) else tf.maximum(number, 0)


def _flat(t):
    """[B, *spatial, C] -> [B, P, C]."""
    return tf.reshape(t, (-1, _positions(t), t.shape[-1]))


def _positions(t):
    return math.prod(t.shape[1:-1]) if None not in t.shape[1:-1] else tf.reduce_prod(tf.shape(t)[1:-1])


def _by_group(t, groups):
    """[B, *spatial, C] -> [B, C, P], or [B, groups, C / groups, P] for more than one group."""
    if groups == 1:
        return tf.transpose(_flat(t), (0, 2, 1))
    return tf.transpose(tf.reshape(t, (-1, _positions(t), groups, t.shape[-1] // groups)), (0, 2, 3, 1))


def _geometry(layer):
    return layer.kernel_size, layer.strides, layer.dilation_rate, layer.padding


def _channels_last(layer, t):
    """Moves the channels of a layer with data_format "channels_first" to the end."""
    if getattr(layer, "data_format", None) != "channels_first":
        return t
    return tf.transpose(t, (0, *range(2, len(t.shape)), 1))


def _letters(equation, x_rank, y_rank):
    """The index letters of an einsum's input, kernel and output, with those of "..." spelled out."""
    inputs, kernel, outputs = equation.replace(" ", "").replace("->", ",").split(",")
    free = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = max(x_rank - len(inputs.replace("...", "")), y_rank - len(outputs.replace("...", "")))
    dots = "".join(free[:hidden])
    return tuple(part.replace("...", dots) for part in (inputs, kernel, outputs))


def _keep(layer, gs, **rules):
    """The squares of those weights that the layer has, summed over `gs`, keyed by the id of the variable."""
    variables = {name: getattr(layer, name, None) for name in rules}
    return {id(v): sum(rules[name](g) for g in gs) for name, v in variables.items() if v is not None}


def _full_precision(variable):
    """The value of a variable, in float32 if it is in half precision."""
    value = tf.convert_to_tensor(variable.value)
    return value if value.dtype == tf.float64 else tf.cast(value, tf.float32)


@contextlib.contextmanager
def _attribute(layer, name, value):
    """Gives a layer another attribute for a while, behind the back of Keras' tracking."""
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


@contextlib.contextmanager
def _in_full_precision(model):
    """Lets the layers of a model compute in float32 instead of half precision."""
    with contextlib.ExitStack() as stack:
        for layer in model._flatten_layers():
            if keras.backend.is_float_dtype(layer.compute_dtype) and layer.compute_dtype not in ("float32", "float64"):
                stack.enter_context(_attribute(layer, "_dtype_policy", keras.DTypePolicy("float32")))
        yield


def _without_activation(layer):
    """Switches the activation of a layer off."""
    return _attribute(layer, "activation", None)


def _activate(layer, output):
    return output if layer.activation is None else layer.activation(output)


# Keras names the common bases of its convolutions only in private modules.
BaseConv, BaseDepthwiseConv, BaseSeparableConv = (
    cls.__mro__[1] for cls in (layers.Conv2D, layers.DepthwiseConv2D, layers.SeparableConv2D)
)

# (class, the methods that the rule relies on with their known implementations, rule), the first match wins.
_RULES = [
    (layers.Dense, {"call": {layers.Dense.call}}, _dense),
    (layers.EinsumDense, {"call": {layers.EinsumDense.call}}, _einsum_dense),
    (BaseConv, {"call": {BaseConv.call, layers.Conv1D.call}, "convolution_op": {BaseConv.convolution_op}}, _conv),
    (BaseDepthwiseConv, {"call": {BaseDepthwiseConv.call}}, _depthwise_conv),
    (BaseSeparableConv, {"call": {BaseSeparableConv.call}}, _separable_conv),
    (layers.BatchNormalization, {"call": {layers.BatchNormalization.call}}, _batch_normalization),
    (layers.LayerNormalization, {"call": {layers.LayerNormalization.call}}, _layer_normalization),
]
