"""Eq. (3): splits a model's weights into S (shared) and S-bar (new) and binds alpha and beta to them."""

import dataclasses
import hashlib
import json
import math
import warnings

import keras
import numpy as np

from l2sp_tf.anchors import Anchors
from l2sp_tf.errors import InputError
from l2sp_tf.regularizers import L2, AnchoredPenalty, FisherPenalty, Penalty, UnboundPenaltyError, check_strength
from l2sp_tf.variables import forget_traced_steps, keyed_weights, match_keys, set_regularizer

SHARED, NEW, LEFT_OUT = "S", "S-bar", "left out"


@dataclasses.dataclass(frozen=True)
class CoveredWeight:
    """One trainable weight in the coverage: its group, and the penalty on it or the reason for none."""

    key: str
    group: str
    shape: tuple
    penalty: dict | None
    reason: str = ""

    @property
    def size(self):
        return math.prod(self.shape)

    def __str__(self):
        if self.penalty is None:
            return self.reason
        config = self.penalty["config"]
        symbol = "beta" if self.group == NEW else "alpha"
        return f"{self.penalty['class_name']} {symbol}={config['alpha']:g}" + (f" ({self.reason})" if self.reason else "")


@dataclasses.dataclass(frozen=True)
class Coverage:
    """Which trainable weights are in S, in S-bar or left out, and why; prints as a table.

    Attributes:
        weights: a tuple of `CoveredWeight`, in the model's order.
        anchors_digest: the digest of the anchors, or None.
        distance: ||w - w0|| over S when the penalty was attached; 0 at a fresh start.
    """

    weights: tuple
    anchors_digest: str | None
    distance: float

    def group(self, name):
        """The weights of one group: "S", "S-bar" or "left out"."""
        return [weight for weight in self.weights if weight.group == name]

    @property
    def counts(self):
        """For each group the number of weight tensors and of numbers in them."""
        return {name: (len(self.group(name)), sum(w.size for w in self.group(name))) for name in (SHARED, NEW, LEFT_OUT)}

    @property
    def digest(self):
        """The sha256 of the whole coverage: equal digests mean the same penalties on the same weights."""
        rows = [dataclasses.astuple(weight) for weight in self.weights]
        return hashlib.sha256(json.dumps([rows, self.anchors_digest], sort_keys=True).encode()).hexdigest()

    def __str__(self):
        rows = [("variable", "group", "shape", "penalty")]
        rows += [(w.key, w.group, "x".join(map(str, w.shape)) or "scalar", str(w)) for w in self.weights]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3])) for row in rows]
        counts = ", ".join(f"{name}: {n} tensors, {size:,} numbers" for name, (n, size) in self.counts.items())
        return "\n".join([*lines, counts, f"distance to the anchors when attached: {self.distance:.6g}"])


def attach(model, penalty, anchors=None, beta=0.01, *, params="kernels", fisher=None, new=()):
    """Eq. (3): puts `penalty` on the shared weights S and L2 of strength beta on the new ones S-bar.

    A trainable weight is in S if the anchors hold one of the same key and shape (the anchors
    of a nested backbone count), and in S-bar otherwise. Penalties that were on these weights
    are replaced. Nothing is changed if an error is raised.

    Args:
        model: a built Keras model of any kind, compiled or not.
        penalty: a penalty with its strength, such as `L2SP(0.1)`; a template that is copied.
        anchors: the pre-trained weights, an `Anchors`. May be None for `L2`: then nothing is
            shared and beta is on everything.
        beta: strength of L2 on S-bar, finite and at least 0.
        params: "kernels" penalises weight matrices and convolution kernels (what the authors
            did); "all" also biases and the gammas and betas of normalisation.
        fisher: for the Fisher penalties a mapping from key to F_jj (such as a `Fisher`).
        new: names of layers that are new although the anchors hold weights of their name.

    Returns:
        The `Coverage`.

    Raises:
        InputError: a bad argument; no weight matches the anchors; a layer is LoRA-enabled or
            quantized; the model was attached to other anchors before; Fisher values missing.
    """
    beta = check_strength(beta, "beta")
    _check_arguments(penalty, anchors, params, fisher)
    anchors = anchors if isinstance(anchors, Anchors) or anchors is None else Anchors(anchors)
    weights = keyed_weights(model)
    _refuse_unfaithful_layers(weights.values())
    _refuse_other_anchors(weights.values(), anchors)
    matches = _shared(weights, anchors or {}, new)
    fisher_matches = match_keys(matches, fisher) if fisher is not None else {}
    rows, bound = [], {}
    for key, weight in weights.items():
        if not weight.variable.trainable:
            continue
        group, reason = _group(key, weight, matches, anchors, params)
        if group == SHARED:
            values = {"anchor": anchors[matches[key]], "digest": anchors.digest, "group_axes": _group_axes(weight)}
            bound[key] = penalty.bind(key, **values, fisher=_fisher_of(key, fisher, fisher_matches))
        elif group == NEW:
            bound[key] = L2(beta, key=key)
        rows.append(_row(key, group, reason, weight.variable, bound.get(key)))
    if anchors is not None and not any(row.group == SHARED for row in rows):
        raise InputError(
            f"No trainable weight of the model {model.name!r} ({', '.join(list(weights)[:3])}, ...) has the name and "
            f"shape of one of the anchors ({', '.join(list(anchors)[:3])}, ...): give the anchors of the model it started from."
        )
    for key, regularizer in bound.items():
        set_regularizer(weights[key], regularizer)
    forget_traced_steps(model)
    moved = [weights[row.key].variable.numpy() - anchors[matches[row.key]] for row in rows if row.group == SHARED]
    distance = math.sqrt(sum(float(np.sum(np.square(d, dtype="float64"))) for d in moved))
    return Coverage(tuple(rows), anchors.digest if anchors is not None else None, distance)


def detach(model):
    """Takes the penalties of this package off all weights of `model`, and returns how many there were."""
    count = sum(set_regularizer(weight, None, only=Penalty) for weight in keyed_weights(model).values())
    forget_traced_steps(model)
    return count


class AnchorGuard(keras.callbacks.Callback):
    """Stops a training that would run without the penalties of a coverage.

    Give it to `fit` among the callbacks. When training starts it compares what `attach`
    bound with what the model's weights carry now, and raises if a trainable weight has lost
    its penalty, was unfrozen after `attach`, or sits in a layer made LoRA-enabled or
    quantized since, or if `Proximal.of` or `Decoupled.of` took the penalties out of the gradient
    for an optimizer that the model is not compiled with. It warns of an optimizer whose own
    weight decay pulls towards zero.

    Args:
        coverage: what `attach` returned for the model.
    """

    def __init__(self, coverage):
        super().__init__()
        self.coverage = coverage

    def on_train_begin(self, logs=None):
        check_bound(self.model, self.coverage)
        _check_stepped(self.model)
        decay = getattr(self.model.optimizer, "weight_decay", None)
        if decay:
            warnings.warn(
                f"The optimizer {type(self.model.optimizer).__name__} has weight_decay={decay:g}, which pulls to zero "
                "and away from their anchors: set weight_decay=0 to let the penalty alone decide.",
                stacklevel=2,
            )


def check_bound(model, coverage):
    """Compares the penalties that a model carries with a coverage.

    Raises:
        UnboundPenaltyError: the two differ; the message names the first weight that does.
    """
    weights = {key: weight for key, weight in keyed_weights(model).items() if weight.variable.trainable}
    try:
        _refuse_unfaithful_layers(weights.values())
    except InputError as error:
        raise UnboundPenaltyError(str(error)) from None
    expected = {row.key: row for row in coverage.weights}
    matches = match_keys(weights, expected)
    for key, weight in weights.items():
        row, found = expected.get(matches.get(key)), weight.variable.regularizer
        if row is None:
            problem = "is trainable now, but was not when the penalty was attached"
        elif row.penalty is None or _same(found, row.penalty):
            continue
        else:
            problem = f"should carry {row}, but carries {found!r}"
        raise UnboundPenaltyError(
            f"Training would run un-anchored: {key} {problem}; call l2sp_tf.attach(model, ...) again with the saved anchors."
        )


def _check_stepped(model):
    """Penalties without a gradient need an optimizer that steps them, perhaps inside Keras' LossScaleOptimizer."""
    optimizer = model.optimizer
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        optimizer = optimizer.inner_optimizer
    stepped = [v for v in model.trainable_variables if getattr(v.regularizer, "stepped", False)]
    if stepped and not getattr(optimizer, "steps_penalties", False):
        raise UnboundPenaltyError(
            f"Training would run un-anchored: the penalty on {stepped[0].path} is left to an optimizer that steps it, but the "
            f"model is compiled with {type(optimizer).__name__}: compile it with what l2sp_tf.Proximal.of or Decoupled.of "
            "returned, or call l2sp_tf.attach(model, ...) again."
        )


def _same(regularizer, expected):
    return (
        isinstance(regularizer, Penalty)
        and regularizer.is_bound
        and type(regularizer).__name__ == expected["class_name"]
        and regularizer.get_config() == expected["config"]
    )


def _check_arguments(penalty, anchors, params, fisher):
    if not isinstance(penalty, Penalty):
        raise InputError(f"penalty is {penalty!r}: give one of this package, such as l2sp_tf.L2SP(0.1).")
    if params not in ("kernels", "all"):
        raise InputError(f'params is {params!r}: give "kernels" or "all".')
    if anchors is None and not isinstance(penalty, L2):
        raise InputError(f"{penalty} needs anchors: pass anchors=l2sp_tf.Anchors.of(pretrained_model).")
    if isinstance(penalty, FisherPenalty) and fisher is None:
        raise InputError(f"{penalty} needs the Fisher diagonal: pass fisher=, a mapping from weight to array.")


def _row(key, group, reason, variable, penalty):
    """The coverage of one weight; says so where another library's regularizer is replaced or kept."""
    other = variable.regularizer
    if other is not None and not isinstance(other, Penalty):
        verb = "keeps" if penalty is None else "replaces"
        reason = f"{reason}; {verb} {type(other).__name__}".lstrip("; ")
    config = None if penalty is None else {"class_name": type(penalty).__name__, "config": penalty.get_config()}
    return CoveredWeight(key, group, tuple(variable.shape), config, reason)


def _shared(weights, anchors, new):
    """The keys whose anchor has the same shape, with the anchor's key, except in layers called new."""
    layers = {part for key in weights for part in key.split("/")[:-1]}
    if unknown := [name for name in new if name not in layers]:
        raise InputError(f"new names the layer {unknown[0]!r}, which the model does not have: name one of its layers.")
    matches = match_keys(weights, anchors)
    return {
        key: other
        for key, other in matches.items()
        if anchors[other].shape == tuple(weights[key].variable.shape) and not set(new) & set(key.split("/")[:-1])
    }


def _group(key, weight, matches, anchors, params):
    """The group of a weight and, if there is something to say, the reason."""
    if params == "kernels" and not _is_kernel(weight.variable):
        return LEFT_OUT, 'not a kernel (params="all" has it)'
    if key in matches:
        return SHARED, ""
    if anchors is None:
        return NEW, ""
    other = match_keys([key], anchors).get(key)
    return NEW, f"the anchor has the shape {anchors[other].shape}" if other else "no anchor"


def _is_kernel(variable):
    """Whether a weight multiplies its input: a matrix or a convolution kernel, and no offset or scale."""
    name = variable.name.lower()
    return len(variable.shape) >= 2 and not any(word in name for word in ("bias", "beta", "gamma", "scale"))


def _fisher_of(key, fisher, matches):
    if fisher is None:
        return None
    if key not in matches:
        raise InputError(f"The Fisher diagonal has no entry for {key}: estimate it for every weight that the penalty is on.")
    return fisher[matches[key]]


def _group_axes(weight):
    """The axes of the fan-in of one output channel (p_g = h * w * d), or None for all but the last."""
    layer, rank = weight.layer, len(weight.variable.shape)
    depthwise = isinstance(layer, (keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D))
    if rank > 2 and (depthwise or weight.variable.name == "depthwise_kernel"):
        return tuple(range(rank - 2))
    transposed = (keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose)
    if rank > 2 and isinstance(layer, transposed):
        return (*range(rank - 2), rank - 1)
    if isinstance(layer, keras.layers.EinsumDense) and weight.variable.name == "kernel":
        operands, output = layer.equation.replace("...", "").split("->")
        return tuple(axis for axis, letter in enumerate(operands.split(",")[1]) if letter not in output)
    return None


def _refuse_unfaithful_layers(weights):
    """LoRA freezes the base kernel and trains another; quantization replaces it: neither can be anchored."""
    for weight in weights:
        if getattr(weight.layer, "lora_enabled", False):
            raise InputError(f"The layer {weight.layer.name!r} is LoRA-enabled and cannot be anchored: attach without LoRA.")
        if getattr(weight.layer, "quantization_mode", None):
            raise InputError(f"The layer {weight.layer.name!r} is quantized and cannot be anchored: attach to the float model.")


def _refuse_other_anchors(weights, anchors):
    """A model bound to anchors before, in this process or in the one that saved it, keeps to the same ones."""
    regularizers = [weight.variable.regularizer for weight in weights]
    known = {r.digest for r in regularizers if isinstance(r, AnchoredPenalty) and r.digest}
    if anchors is not None and (others := known - {anchors.digest}):
        raise InputError(
            f"This model is attached to anchors of digest {min(others)[:12]}, but these have {anchors.digest[:12]}: "
            "load the anchors saved with the run, or call l2sp_tf.detach(model) first to start from new ones."
        )
