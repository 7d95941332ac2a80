"""What a model's output means: one of K classes, or K yes-or-no answers, and the Fisher information of its logits.

Symbols: `z` the logits of one image, `p` its probabilities, `u` a cotangent of z, H = E[u uᵀ] the Fisher
information of z. For one of K classes p = softmax(z) and H = diag(p) - p pᵀ; for K independent Bernoulli outputs
p = sigmoid(z) and H = diag(p (1 - p)).
"""

import dataclasses
import functools
import math

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.files.errors import InputError

CATEGORICAL, BERNOULLI = "categorical", "bernoulli"
NOISE = {"rademacher": tf.int8, "mc": tf.float64, "exact": tf.float64}  # the dtype of the random numbers of a mode
FLOATING = {tf.float16, tf.bfloat16, tf.float32, tf.float64}
# Operations that only move values.
MOVES = {"Identity", "IdentityN", "Reshape", "Squeeze", "ExpandDims", "Transpose", "EnsureShape"}
# Operations that are linear in their first input, whatever the others are.
LINEAR = MOVES | {"Cast", "BiasAdd", "Mean", "Sum", "AvgPool", "AvgPool3D", "StridedSlice", "Neg", "Pad", "PadV2"}
# Operations that are linear in all their inputs together, as long as only one factor and no divisor depends on the image.
SUMS, PRODUCTS, QUOTIENTS = {"AddV2", "Add", "AddN", "Sub", "ConcatV2"}, {"Mul"}, {"RealDiv", "Div"}
# Operations that multiply by weights: their output counts as scores, whatever precedes them.
SCORES = {"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "Conv2D", "Conv3D", "DepthwiseConv2dNative"}
SCORES |= {"Conv2DBackpropInput", "Conv3DBackpropInputV2", "Placeholder"}


@dataclasses.dataclass(frozen=True)
class Likelihood:
    """What an output means.

    Attributes:
        family: "categorical", one of K classes, or "bernoulli", K outputs that are each on or off.
        is_probability: whether the output is the probabilities p; else it is the logits z, or log p.
        output: the traced output.
        classes: K.
        argument: the input of the softmax or sigmoid that made the output, or None.
        assumed: whether only its linear operation says that the output is logits.
    """

    family: str
    is_probability: bool
    output: tf.Tensor
    classes: int
    argument: tf.Tensor | None = None
    assumed: bool = False

    def logits(self):
        """Computes the logits z [B, K], by logarithms where no softmax or sigmoid operation made the probabilities."""
        if self.argument is not None:
            return _rows(self.argument, self.classes)
        output = _rows(self.output, self.classes)
        if not self.is_probability:
            return output
        tiny = np.finfo(output.dtype.as_numpy_dtype).tiny
        log_p = tf.math.log(tf.maximum(output, tiny))
        return log_p if self.family == CATEGORICAL else log_p - tf.math.log(tf.maximum(1 - output, tiny))

    def doubtful(self, output):
        """Counts the rows of the output's values that contradict this likelihood, int32 [].

        Where logits are assumed, these rows look like probabilities. Where the loss or the caller says that they are
        probabilities, these rows cannot be. NaN contradicts nothing.
        """
        output = _rows(tf.convert_to_tensor(output), self.classes)
        off = tf.abs(tf.reduce_sum(output, axis=1) - 1)
        outside = tf.reduce_any((output < 0) | (output > 1 + 1e-3), axis=1)
        if self.assumed:
            found = (off < 1e-3) & tf.reduce_all(output >= 0, axis=1)
        elif not self.is_probability or self.argument is not None:
            found = tf.zeros_like(off, tf.bool)
        else:
            found = outside | (off > 1e-2) if self.family == CATEGORICAL else outside
        return tf.math.count_nonzero(found, dtype=tf.int32)

    def check(self, doubtful, rows, model):
        """Checks the number of doubtful rows: 0 of stated probabilities, not all of assumed logits.

        Raises:
            InputError: the values contradict this likelihood.
        """
        if self.assumed and doubtful == rows:
            raise InputError(
                f"The outputs of the model {model.name!r} look like probabilities, but no softmax operation gave them: "
                "pass from_logits=False if they are, from_logits=True if they are logits."
            )
        if not self.assumed and doubtful:
            kind = "negative, above 1 or of another sum than 1" if self.family == CATEGORICAL else "negative or above 1"
            raise InputError(
                f"The outputs of the model {model.name!r} are taken for probabilities, because its loss or from_logits=False "
                f"says so, but some are {kind}: pass from_logits=True if they are logits."
            )

    def noise(self, mode, samples, seed, images):
        """Draws the random numbers of a range of images, an array [samples, len(images), numbers] of `NOISE[mode]`.

        "rademacher" takes K signs an image; "mc" takes K uniform numbers, or one for one of K classes; "exact" none.
        """
        if mode == "exact":
            return np.zeros((samples, len(images), 0))
        function = random_signs if mode == "rademacher" else random_uniforms
        count = 1 if mode == "mc" and self.family == CATEGORICAL else self.classes
        return np.stack([function(seed, draw, images.start, images.stop, count) for draw in range(samples)])


def likelihood_of(output, model, from_logits=None, *, place=(0, 1), name=None):
    """Finds out what an output of a model means.

    A softmax or sigmoid operation decides. Otherwise `from_logits` decides, if it is given, and otherwise the loss
    that the model was compiled with. Without either, an output of two or more classes is logits if a linear
    operation made it.

    Args:
        output: the traced output, [B, K], [B] or with more axes of length 1.
        model: the Keras model, whose compiled loss may say what the output means.
        from_logits: whether the output is logits where no softmax or sigmoid operation made it, or None.
        place: the index of the output among the model's outputs, and their number.
        name: of the output, if there are several.

    Returns:
        A `Likelihood`.

    Raises:
        InputError: the output has another shape or an unknown meaning.
    """
    if from_logits not in (None, True, False):
        raise InputError(f"from_logits is {from_logits!r}: give True, False or None.")
    what = f"the output of the model {model.name!r}" if name is None else f"the output {name!r} of the model {model.name!r}"
    classes = count_classes(output, what)
    source = _behind(output)
    if source.op.type in ("Softmax", "LogSoftmax"):
        return _made_by_softmax(source, output, classes, what)
    if source.op.type == "Sigmoid":
        argument = source.op.inputs[0]
        kept = argument if argument.shape[1:].num_elements() == classes else None  # else it moved an axis of images
        return Likelihood(BERNOULLI, True, output, classes, kept)
    loss = _loss_of(model, name, *place)
    said = _said_by(loss, classes)
    if from_logits is None and said is None:
        if loss is not None:
            raise InputError(
                f"{what[0].upper()}{what[1:]} has the loss {_name_of(loss)}, which does not say whether it is logits or "
                "probabilities: pass from_logits=True or from_logits=False."
            )
        _check_linear(source, classes, what)
        return Likelihood(CATEGORICAL, False, output, classes, assumed=True)
    family, of_loss = said or (BERNOULLI if classes == 1 else CATEGORICAL, None)
    if family == CATEGORICAL and classes == 1:
        raise _no_classes(what)
    is_probability = not (of_loss if from_logits is None else from_logits)
    return Likelihood(family, is_probability, output, classes)


def count_classes(output, what):
    """Counts the classes K of a traced output [B, K], [B] or with more axes of length 1.

    Args:
        output: a tensor.
        what: "the output of the model ...", for the message.

    Raises:
        InputError: it has another shape.
    """
    shape = output.shape if tf.is_tensor(output) else None
    known = shape is not None and shape.rank not in (None, 0) and None not in shape[1:]
    inner = shape[2:] if known and shape.rank > 3 and shape[-1] == 1 else shape[1:-1] if known else None  # channels come first
    if not known or any(size != 1 for size in inner):
        raise InputError(
            f"{what[0].upper()}{what[1:]} is {type(output).__name__ if shape is None else shape}: "
            "give a classifier with one output of shape (batch, classes)."
        )
    return math.prod(shape[1:])


def _rows(t, classes):
    """Reshapes [B], [B, K] or more axes of length 1 to [B, K]."""
    return t if t.shape.rank == 2 else tf.reshape(t, [-1, classes])


def _behind(t):
    """Goes back over operations that only move values or change their precision, and returns the tensor before them."""
    while t.op.type in MOVES or (t.op.type == "Cast" and {t.dtype, t.op.inputs[0].dtype} <= FLOATING):
        t = _first_input(t)
    return t


def _first_input(t):
    return t.op.inputs[t.value_index if t.op.type == "IdentityN" else 0]


def _made_by_softmax(source, output, classes, what):
    shape = source.shape
    if classes == 1:
        raise _no_classes(what)
    if shape.rank is None or shape[-1] != classes or any(size != 1 for size in shape[1:-1]):
        raise InputError(
            f"{what[0].upper()}{what[1:]} has {classes} values, but its softmax is over values of the shape {shape}: "
            "give a classifier with one distribution over its classes for each image."
        )
    return Likelihood(CATEGORICAL, source.op.type == "Softmax", output, classes, source.op.inputs[0])


def _no_classes(what):
    return InputError(
        f"{what[0].upper()}{what[1:]} is one number, of which a softmax is always 1: "
        "give a classifier with at least two classes, or with a sigmoid."
    )


def _check_linear(source, classes, what):
    """Checks that an output of unknown meaning has two or more classes and is linear in scores."""
    other = _not_linear(source)
    if other is not None:
        raise InputError(
            f"{what[0].upper()}{what[1:]} comes from the operation {other.op.type} ({other.op.name}), which does not say whether "
            "it is logits or probabilities: pass from_logits=True or from_logits=False, or compile the model with its "
            "cross-entropy."
        )
    if classes == 1:
        raise InputError(
            f"{what[0].upper()}{what[1:]} is one number, and nothing says what it means: pass from_logits=True if it is a logit, "
            "or compile the model with its loss, such as BinaryCrossentropy(from_logits=True)."
        )


def _not_linear(t):
    """Goes back from a tensor, and returns the first one that is not linear in scores, or None."""
    waiting, seen = [t], set()
    while waiting:
        t = waiting.pop()
        kind, inputs = t.op.type, list(t.op.inputs)
        if id(t.op) in seen or kind in SCORES:
            continue
        seen.add(id(t.op))
        if kind in LINEAR:
            waiting.append(_first_input(t))
        elif kind in SUMS | PRODUCTS | QUOTIENTS:
            varying = [i for i, other in enumerate(inputs) if not _is_fixed(other)]
            if (kind in PRODUCTS and len(varying) > 1) or (kind in QUOTIENTS and 1 in varying):
                return t
            waiting += [inputs[i] for i in reversed(varying)]
        else:
            return t
    return None


def _is_fixed(t):
    """Whether a traced tensor depends on constants and variables only, not on the image."""
    captured = {id(inner) for _, inner in getattr(t.graph, "captures", [])}
    waiting, seen = [t], set()
    while waiting:
        t = waiting.pop()
        if id(t) in seen or id(t) in captured:
            continue
        seen.add(id(t))
        if t.op.type.startswith("Placeholder"):
            return False
        waiting += t.op.inputs
    return True


def _families():
    """Lists the cross-entropies of Keras and TensorFlow: from function to (family, default of from_logits)."""
    losses, nn = keras.losses, tf.nn
    categorical = (losses.categorical_crossentropy, losses.sparse_categorical_crossentropy)
    categorical += (losses.categorical_focal_crossentropy, losses.kl_divergence)
    generalized = getattr(losses.CategoricalGeneralizedCrossEntropy(), "fn", None)  # has no public name
    found = dict.fromkeys((*categorical, generalized), (CATEGORICAL, False))
    found |= dict.fromkeys((losses.binary_crossentropy, losses.binary_focal_crossentropy), (BERNOULLI, False))
    logits = (nn.softmax_cross_entropy_with_logits, nn.sparse_softmax_cross_entropy_with_logits)
    return found | dict.fromkeys(logits, (CATEGORICAL, True)) | {nn.sigmoid_cross_entropy_with_logits: (BERNOULLI, True)}


def _loss_of(model, name, index, count):
    """Returns the compiled loss of one of the model's outputs: a loss, a list of several, or None."""
    loss = getattr(model, "loss", None)
    if isinstance(loss, dict):
        return loss.get(name) if name in loss or len(loss) > 1 or count > 1 else next(iter(loss.values()))
    if isinstance(loss, (list, tuple)) and count > 1:
        return loss[index] if len(loss) == count else None
    return loss


def _said_by(loss, classes):
    """Returns (family, from_logits) of a loss, or of the only informative one among several; else None."""
    said = {_said_by_one(one, classes) for one in _list(loss)} - {None}
    return said.pop() if len(said) == 1 else None


def _said_by_one(loss, classes):
    if isinstance(loss, str) and loss.lower() in ("crossentropy", "ce"):  # Keras chooses by the shape
        return BERNOULLI if classes == 1 else CATEGORICAL, False
    if isinstance(loss, (str, dict, type)):
        try:
            loss = keras.losses.get(loss)
        except (ValueError, TypeError):
            return None
    options = dict(getattr(loss, "_fn_kwargs", {}))
    function = getattr(loss, "fn", loss)
    while isinstance(function, functools.partial):
        function, options = function.func, {**function.keywords, **options}
    try:
        family, from_logits = _families()[function]
    except (KeyError, TypeError):  # another loss, or an unhashable one
        return None
    return family, bool(options.get("from_logits", from_logits))


def _name_of(loss):
    names = [one if isinstance(one, str) else getattr(one, "name", None) or getattr(one, "__name__", None) for one in _list(loss)]
    return " and ".join(name or type(one).__name__ for name, one in zip(names, _list(loss), strict=True))


def _list(value):
    return value if isinstance(value, (list, tuple)) else [value]


class Distribution:
    """The distribution of the labels of an image, and factors of H, the Fisher information of its logits.

    Attributes:
        p: the probabilities, [B, K] in float64.
        rank: of H.
        variances: the diagonal of H, [B, K].
    """

    def cotangents(self, mode, noise):
        """Chooses cotangents u of the logits with sum_i u_i u_iᵀ = H, exactly or on average.

        Args:
            mode: "exact", "mc" or "rademacher".
            noise: the random numbers of `Likelihood.noise`.

        Returns:
            (their number, a function from the index, a number or a tensor, to u [B, K])
        """
        if mode == "exact" or (mode == "rademacher" and self.rank == 1):  # a sign changes no square
            return self.rank, self.column
        samples, draw = noise.shape[0], self.by_signs if mode == "rademacher" else self.by_labels
        return samples, lambda i: draw(noise[i]) / math.sqrt(samples)


class Categorical(Distribution):
    """One of K classes, p = softmax(z), with 1 - p to full precision: H = diag(p) - p pᵀ, of rank K - 1."""

    def __init__(self, logits):
        self.p = tf.nn.softmax(tf.cast(logits, tf.float64))
        self.rank = logits.shape[-1] - 1
        self.variances = self.p * (1 - self.p)

    def column(self, i):
        """Column i of a lower triangular factor of H; the last column is 0.

        With the tail sums r_i = sum_{k > i} p_k it is sqrt(p_i r_i / r_{i-1}) (e_i - p_k / r_i [k > i]):
        sums and quotients of positive numbers only, and 0 where a tail vanishes.
        """
        p, classes = self.p, tf.range(self.p.shape[-1])
        before = tf.cumsum(p, axis=1, reverse=True)[:, i, None]  # r_{i-1}
        later = tf.cast(classes > i, p.dtype)
        after = tf.reduce_sum(p * later, axis=1, keepdims=True)
        scale = tf.sqrt(tf.math.divide_no_nan(p[:, i, None] * after, before))
        return scale * (tf.cast(classes == i, p.dtype) - tf.math.divide_no_nan(p, after) * later)

    def by_signs(self, signs):
        """u = S ε with S = diag(√p) - p √pᵀ, for signs ε [B, K]: E[u uᵀ] = S Sᵀ = H.

        The variance of (Jᵀ u)_j² is 2 F² (1 - sum_k q_k²) at most 2 F², where q_k is the share of column
        k of S in F_jj.
        """
        root = tf.sqrt(self.p) * tf.cast(signs, tf.float64)
        return root - self.p * tf.reduce_sum(root, axis=1, keepdims=True)

    def by_labels(self, uniforms):
        """u = onehot(k) - p with the label k drawn from p by its cumulative sums, for uniforms [B, 1] in [0, 1)."""
        sums = tf.cumsum(self.p, axis=1)
        drawn = tf.reduce_sum(tf.cast(sums <= uniforms * sums[:, -1:], tf.int32), axis=1)
        classes = self.p.shape[-1]
        return tf.one_hot(tf.minimum(drawn, classes - 1), classes, dtype=tf.float64) - self.p


class Bernoulli(Distribution):
    """K independent yes-or-no answers, p = sigmoid(z): H = diag(p (1 - p)), of rank K."""

    def __init__(self, logits):
        z = tf.cast(logits, tf.float64)
        self.p, self.q = tf.sigmoid(z), tf.sigmoid(-z)  # 1 - p would be 0 from z = 37 on
        self.rank = logits.shape[-1]
        self.variances = self.p * self.q

    def column(self, i):
        """Column i of a factor of H, sqrt(p_i (1 - p_i)) e_i."""
        return tf.sqrt(self.variances) * tf.cast(tf.range(self.rank) == i, tf.float64)

    def by_signs(self, signs):
        """u_k = ε_k sqrt(p_k (1 - p_k)): E[u uᵀ] = H. The variance is that of `Categorical.by_signs`, by the columns here."""
        return tf.sqrt(self.variances) * tf.cast(signs, tf.float64)

    def by_labels(self, uniforms):
        """u = y - p, each y_k drawn from its own p_k, for uniforms [B, K] in [0, 1)."""
        return tf.where(tf.ensure_shape(uniforms, [None, self.rank]) < self.p, self.q, -self.p)


FAMILIES = {CATEGORICAL: Categorical, BERNOULLI: Bernoulli}


def random_signs(seed, draw, start, stop, count):
    """Draws signs for the images start..stop-1, int8 [stop - start, count], by (seed, draw, image) alone."""
    bits = np.unpackbits(_random_words(seed, draw, start, stop, -(-count // 256)).view("uint8"), axis=1, count=count)
    return 1 - 2 * bits.astype("int8")


def random_uniforms(seed, draw, start, stop, count):
    """Draws numbers in [0, 1) for the images start..stop-1, float64 [stop - start, count], by (seed, draw, image) alone."""
    words = _random_words(seed, draw, start, stop, -(-count // 4))
    return (words >> np.uint64(11))[:, :count] * 2.0**-53


def _random_words(seed, draw, start, stop, blocks):
    """4 `blocks` random 64-bit words for each image: Philox counts in blocks of four, and each image has its own counters."""
    generator = np.random.Philox(key=seed + (draw << 64), counter=start * blocks)
    return generator.random_raw((stop - start) * blocks * 4).reshape(stop - start, -1)
