"""Eq. (3): splits a model's weights into S (shared) and S-bar (new) and binds alpha and beta to them."""

import dataclasses
import hashlib
import json
import math
import warnings
import weakref
from collections.abc import Iterable

import keras
import numpy as np

from l2sp_tf.files.arrays import digest_of_arrays
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.types import Weights
from l2sp_tf.penalties import effect
from l2sp_tf.penalties.anchors import Anchors
from l2sp_tf.penalties.formulas import L2, AnchoredPenalty, FisherPenalty, Penalty, UnboundPenaltyError, check_strength
from l2sp_tf.penalties.matching import match
from l2sp_tf.penalties.weights import drop_penalties, forget_traced_steps, keyed_weights, set_regularizer

SHARED, NEW, LEFT_OUT = "S", "S-bar", "left out"
FROZEN = "frozen"  # why a weight is left out


@dataclasses.dataclass(frozen=True)
class CoveredWeight:
    """One weight of a coverage: its group, its penalty or the reason for none, and ||w - w0|| if it is in S."""

    key: str
    group: str
    shape: tuple
    penalty: dict | None
    reason: str = ""
    distance: float | None = None

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
    """The weights in S, in S-bar or left out (frozen ones too), with the reasons; prints as a table.

    Attributes:
        weights: a tuple of `CoveredWeight`, in the model's order.
        anchors_digest: the digest of the anchors, or None.
        is_saved: whether a `.keras` file of the model keeps penalties. If so, the loaded model refuses to train until
            `attach` is called.
    """

    weights: tuple
    anchors_digest: str | None
    is_saved: bool = True

    @property
    def distance(self) -> float:
        """||w - w0|| over S at the call of `attach`; 0 at a fresh start."""
        return math.sqrt(sum((weight.distance or 0.0) ** 2 for weight in self.group(SHARED)))

    def group(self, name: str) -> list[CoveredWeight]:
        """Returns the weights of one group: "S", "S-bar" or "left out"."""
        return [weight for weight in self.weights if weight.group == name]

    @property
    def counts(self) -> dict[str, tuple[int, int]]:
        """The number of weight tensors and of their entries, by group."""
        return {name: (len(self.group(name)), sum(w.size for w in self.group(name))) for name in (SHARED, NEW, LEFT_OUT)}

    @property
    def digest(self) -> str:
        """The SHA-256 of the whole coverage: equal digests mean the same penalties on the same weights."""
        rows = [[w.key, w.group, w.shape, w.penalty, w.reason] for w in self.weights]
        return hashlib.sha256(json.dumps([rows, self.anchors_digest], sort_keys=True).encode()).hexdigest()

    def __str__(self):
        rows = [("variable", "group", "shape", "distance", "penalty")]
        for w in self.weights:
            distance = "" if w.distance is None else f"{w.distance:.4g}"
            rows.append((w.key, w.group, "x".join(map(str, w.shape)) or "scalar", distance, str(w)))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join((*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4])) for row in rows]
        lines.append(", ".join(f"{name}: {n} tensors, {size:,} numbers" for name, (n, size) in self.counts.items()))
        if not self.is_saved:
            lines.append("a .keras file of this model keeps none of the penalties: call attach again after loading it")
        return "\n".join([*lines, f"distance to the anchors when attached: {self.distance:.6g}"])


def attach(
    model: keras.Model,
    penalty: Penalty,
    anchors: Weights | None = None,
    beta: float = 0.01,
    *,
    params: str = "all",
    fisher: Weights | None = None,
    new: Iterable[str] = (),
) -> Coverage:
    """Eq. (3): puts `penalty` on the shared weights S and L2 of strength beta on the new ones S-bar.

    A trainable weight is in S if the anchors hold its starting point, and in S-bar otherwise. `l2sp_tf.penalties.matching`
    defines the match; anchors of a nested backbone match too. Frozen weights are left out: call `attach` again after
    unfreezing them. The call replaces all earlier penalties of this package. If it raises, the model is unchanged.

    Args:
        model: a built Keras model of any kind, compiled or not.
        penalty: a penalty with its strength, such as `L2SP(0.1)`; each weight gets its own copy.
        anchors: the pre-trained weights, an `Anchors`. May be None for `L2`: then S is empty, and beta applies to all
            weights.
        beta: strength of L2 on S-bar, finite and at least 0.
        params: "all" penalises every trainable weight, as in the paper. "kernels" penalises only weight matrices and
            convolution kernels, as in the authors' code: biases, gammas and betas of normalisation stay free.
        fisher: a mapping from key to F_jj, such as a `Fisher`; for the Fisher penalties.
        new: names of layers to treat as new although the anchors hold weights of these names.

    Returns:
        The `Coverage`.

    Raises:
        InputError: a bad argument; no weight matches the anchors; a layer is LoRA-enabled or quantized; the model was
            attached to other anchors before; Fisher values are missing, or were estimated at other weights than the
            anchors.
    """
    beta = check_strength(beta, "beta")
    _check_arguments(penalty, anchors, params, fisher)
    anchors = anchors if isinstance(anchors, Anchors) or anchors is None else Anchors(anchors)
    weights = keyed_weights(model)
    _refuse_unfaithful_layers(weights.values())
    _refuse_other_anchors(weights.values(), anchors)
    found = match(weights, anchors or {})
    matches = _shared(weights, found, new)
    values = None if fisher is None else _FisherValues(fisher, anchors, matches)
    plan = _Plan(penalty, anchors, beta, params, values, found.other_shape)
    rows, bound = [], {}
    for key, weight, is_trained in _trainable(model, weights):
        row, bound[key] = plan.cover(key, weight, matches.get(key), is_trained)
        rows.append(row)
    found.refuse([row.key for row in rows if row.penalty is not None and not _is_in(row.key, new)])
    if anchors is not None and not matches:
        raise InputError(
            f"No trainable weight of the model {model.name!r} ({', '.join(list(weights)[:3])}, ...) has the name and "
            f"shape of one of the anchors ({', '.join(list(anchors)[:3])}, ...): give the anchors of the model it started from."
        )
    drop_penalties(weights)
    for key, regularizer in bound.items():
        if regularizer is not None:
            set_regularizer(weights[key], regularizer)
    forget_traced_steps(model)
    if doubt := found.warning([row.key for row in rows if row.group == SHARED]):
        warnings.warn(doubt, stacklevel=2)
    return Coverage(tuple(rows), anchors.digest if anchors is not None else None, _is_saved(model, bound))


def _trainable(model, weights):
    """Yields (key, weight, whether the model trains it) for each weight that its layer created as trainable."""
    trained = {id(variable) for variable in model.trainable_variables}  # v.trainable ignores frozen parents
    for key, weight in weights.items():
        is_trained = id(weight.variable) in trained
        if is_trained or any(variable is weight.variable for variable in weight.layer._trainable_variables):
            yield key, weight, is_trained


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The checked arguments of `attach`."""

    penalty: Penalty
    anchors: Anchors | None
    beta: float
    params: str
    fisher: "_FisherValues | None"
    other_shape: dict

    def cover(self, key, weight, anchor, is_trained):
        """Returns the row of one weight and its penalty, or None; `anchor` is the key of its anchor, or None."""
        group, reason, regularizer = NEW, "", None
        if not is_trained:
            group, reason = LEFT_OUT, FROZEN
        elif self.params == "kernels" and not _is_kernel(weight.variable):
            group, reason = LEFT_OUT, 'not a kernel (params="all" has it)'
        elif anchor is not None:
            group, regularizer = SHARED, self._shared(key, weight, anchor)
        else:
            reason, regularizer = self._reason(key), L2(self.beta).bind(key)
        distance = _distance(weight.variable, self.anchors[anchor]) if group == SHARED else None
        return _row(key, group, reason, weight.variable, regularizer, distance), regularizer

    def _shared(self, key, weight, anchor):
        values = {} if self.fisher is None else {"fisher": self.fisher[key], "fisher_digest": self.fisher.digest}
        axes = {"group_axes": _group_axes(weight)}
        return self.penalty.bind(key, anchor=self.anchors[anchor], digest=self.anchors.digest, **axes, **values)

    def _reason(self, key):
        if self.anchors is None:
            return ""
        return f"the anchor has the shape {self.anchors[self.other_shape[key]].shape}" if key in self.other_shape else "no anchor"


class _FisherValues:
    """The Fisher diagonal by the keys of the model's weights.

    Raises:
        InputError: it was estimated at other weights than the anchors, or its keys match the weights ambiguously.
    """

    def __init__(self, fisher, anchors, matches):
        self._values = fisher
        self.digest = digest_of_arrays(fisher)
        provenance = getattr(fisher, "provenance", None)
        if provenance is not None and anchors is not None:
            self._matches = _by_hash(fisher, provenance, anchors, matches)
            return
        known = {key: np.shape(value) for key, value in fisher.items()}
        found = match({key: anchors[other].shape for key, other in matches.items()} if anchors else {}, known, values=False)
        found.refuse()
        self._matches = found.pairs | found.other_shape  # the penalty refuses another shape

    def __getitem__(self, key):
        if key not in self._matches:
            raise InputError(f"The Fisher diagonal has no entry for {key}: estimate it for every weight that the penalty is on.")
        return self._values[self._matches[key]]


def _by_hash(fisher, provenance, anchors, matches):
    """Maps each key to the name of the Fisher entry that was estimated at the anchor's values, whatever that name."""
    estimated_at = provenance.get("weights")
    if provenance["model"] == anchors.digest:
        return {key: other for key, other in matches.items() if other in fisher}
    if estimated_at is None:  # an older file without hashes
        raise InputError(
            f"This Fisher diagonal was estimated on a model of digest {str(provenance['model'])[:12]}, but the anchors have "
            f"{anchors.digest[:12]}: estimate it on the model that the anchors were taken from."
        )
    # other names or another head change the digest, but not the relevant weights: compare weight by weight
    hashes, entries = {entry["name"]: entry["sha256"] for entry in anchors.manifest}, {}
    in_both = set(hashes.values()) & set(estimated_at.values())
    for key in sorted(hashes.keys() & estimated_at.keys()):  # statistics too: F depends on them
        if hashes[key] != estimated_at[key] and not {hashes[key], estimated_at[key]} <= in_both:  # and not just renamed
            raise _estimated_elsewhere(key, key)
    for name in fisher:
        entries.setdefault(estimated_at[name], []).append(name)
    shapes = {key: value.shape for key, value in fisher.items()}
    names = match({key: anchors[other].shape for key, other in matches.items()}, shapes, values=False)
    found = {}
    for key, other in matches.items():
        candidates = entries.get(hashes[other], [])
        by_name = names.pairs.get(key) or names.other_shape.get(key)
        if by_name in candidates or len(candidates) == 1:  # constant weights, such as gammas, share one hash
            found[key] = by_name if by_name in candidates else candidates[0]
        elif by_name is not None:
            raise _estimated_elsewhere(by_name, other)
    layers = {_parted(key)[0]: _parted(name)[0] for key, name in found.items()}
    for key in matches.keys() - found.keys():  # constants, such as zero biases, follow the kernel of their layer
        layer, variable = _parted(key)
        name = f"{layers.get(layer)}/{variable}"
        if name in entries.get(hashes[matches[key]], []):
            found[key] = name
    return found


def _parted(key):
    """Splits a key into its layer and the name of the variable."""
    layer, _, variable = key.rpartition("/")
    return layer, variable


def _estimated_elsewhere(name, anchor):
    return InputError(
        f"This Fisher diagonal was estimated at other weights than the anchors: {name} differs from {anchor}; "
        "estimate it on the model that the anchors were taken from."
    )


def _distance(variable, anchor):
    """||w - w0||."""
    return math.sqrt(float(np.sum(np.square(variable.numpy().astype("float32") - anchor.astype("float32"), dtype="float64"))))


def _is_saved(model, bound):
    """Whether a `.keras` file of the model keeps at least one of the penalties."""
    if not any(bound.values()):
        return True
    names = {keras.saving.get_registered_name(type(penalty)) for penalty in filter(None, bound.values())}
    try:
        text = json.dumps(model.get_config(), default=str)
        return any(f'"{name}"' in text for name in names)
    except Exception:  # without a config, the file has no layers to keep penalties in
        return False


def detach(model: keras.Model) -> int:
    """Removes the penalties of this package from all weights of `model`; returns their number."""
    count = drop_penalties(keyed_weights(model))
    forget_traced_steps(model)
    return count


class AnchorGuard(keras.callbacks.Callback):
    """Stops a training that would ignore a penalty of a coverage.

    Pass it to `fit` as a callback. At the start of training it compares the model's weights with the coverage. It raises if
    a weight has lost its penalty, or was frozen or unfrozen after `attach`. It raises too if a layer is now LoRA-enabled or
    quantized.

    After the first step it raises and restores the weights if a penalty took no part: a `train_step` may ignore
    `model.losses`. A penalty takes part if the step takes its gradient, or `Proximal` or `Decoupled` steps it. A step that
    may have been traced before `attach` is retraced. Only TensorFlow steps are checked, not those of other Keras backends.

    It warns about an optimizer with weight decay, which pulls to zero.

    Args:
        coverage: the result of `attach` for the model, or for a part of it such as a nested backbone.
    """

    def __init__(self, coverage: Coverage) -> None:
        super().__init__()
        self.coverage = coverage
        self._first_step: _FirstStep | None = None

    def on_train_begin(self, logs: dict[str, float] | None = None) -> None:
        penalties = check_bound(self.model, self.coverage)
        decay = getattr(self.model.optimizer, "weight_decay", None)
        if decay:
            warnings.warn(
                f"The optimizer {type(self.model.optimizer).__name__} has weight_decay={decay:g}, which pulls to zero "
                "and away from their anchors: set weight_decay=0 to let the penalty alone decide.",
                stacklevel=2,
            )
        self._first_step = None
        if keras.backend.backend() == "tensorflow":
            self._first_step = _FirstStep(self.model, penalties)

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        if self._first_step is not None and self._first_step.check():
            self._first_step = None


class _FirstStep:
    """Checks that the penalties take part in the next step of a model; skips a traced step that passed before."""

    _known: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # traced step -> penalties seen in it

    def __init__(self, model, penalties):
        self._model, self._penalties, self._before = model, penalties, []
        step = getattr(model, "train_function", None)
        seen = self._known.get(step, ()) if step is not None else ()
        self._missing = [penalty for penalty in penalties if penalty not in seen]
        if self._missing:
            self._before = [variable.numpy() for variable in model.variables]
            if step is not None:
                model.make_train_function(force=True)
        self._watch = effect.Watch(self._missing)

    def check(self):
        """Returns whether the check is done; False asks for another step.

        Raises:
            UnboundPenaltyError: a penalty took no part; the weights are restored to those before the step.
        """
        missing = [penalty for penalty in self._missing if penalty not in self._watch.seen]
        if missing and self._model.run_eagerly and isinstance(self._model.optimizer, keras.optimizers.LossScaleOptimizer):
            return False  # it skips eager steps with non-finite gradients
        self._watch.close()
        if missing:
            for variable, value in zip(self._model.variables, self._before, strict=True):
                variable.assign(value)
            raise UnboundPenaltyError(
                f"Training would run un-anchored: {missing[0]} on {missing[0].key} takes no part in the steps of "
                f"{type(self._model).__name__} {self._model.name!r}; its train_step must add sum(self.losses) to the loss whose "
                "gradients it gives to the optimizer, as compute_loss does. The weights are as they were."
            )
        if getattr(self._model, "train_function", None) is not None:
            self._known[self._model.train_function] = weakref.WeakSet(self._penalties)
        return True


def check_bound(model, coverage):
    """Compares the penalties on a model's weights with a coverage, and returns them.

    Raises:
        UnboundPenaltyError: names the first weight that differs.
    """
    weights = keyed_weights(model)
    try:
        _refuse_unfaithful_layers(weights.values())
    except InputError as error:
        raise UnboundPenaltyError(str(error)) from None
    place = _place(weights, coverage)
    rows, penalties = {place + row.key: row for row in coverage.weights}, []
    for key, weight, is_trained in _trainable(model, weights):
        if not key.startswith(place):
            continue  # outside the attached part
        found = weight.variable.regularizer
        if problem := _problem(rows.get(key), found, is_trained):
            raise UnboundPenaltyError(
                f"Training would run un-anchored: {key} {problem}; call l2sp_tf.attach(model, ...) again with the saved anchors."
            )
        if is_trained and isinstance(found, Penalty):
            penalties.append(found)
    return penalties


def _place(weights, coverage):
    """Finds the attached part of a model: "" for the whole, else the path of a nested model, ending with "/".

    Raises:
        UnboundPenaltyError: the model does not contain it.
    """
    keys = [row.key for row in coverage.weights]
    for place in ["", *(key.removesuffix(keys[0]) for key in weights if keys and key.endswith(f"/{keys[0]}"))]:
        if all(place + key in weights for key in keys):
            return place
    missing = next(key for key in keys if key not in weights)
    raise UnboundPenaltyError(
        f"Training would run un-anchored: the model has no weight {missing}, which the coverage lists; call "
        "l2sp_tf.attach(model, ...) again with the saved anchors, and give its coverage."
    )


def _problem(row, found, is_trained):
    """Describes how a weight's regularizer contradicts its row in the coverage; "" if it does not."""
    if row is None:
        return "is trainable now, but was not there when the penalty was attached" if is_trained else ""
    is_frozen = row.reason.startswith(FROZEN)
    if is_trained and is_frozen:
        return "is trainable now, but was frozen when the penalty was attached"
    if not is_trained and not is_frozen:
        return "is frozen now, but was trainable when the penalty was attached"
    if row.penalty is None:
        return f"should carry no penalty, but carries {found!r}" if isinstance(found, Penalty) else ""
    return "" if _same(found, row.penalty) else f"should carry {row}, but carries {found!r}"


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


def _row(key, group, reason, variable, penalty, distance):
    """Makes the coverage row of one weight; its reason notes another library's regularizer, replaced or kept."""
    other = variable.regularizer
    if other is not None and not isinstance(other, Penalty):
        verb = "keeps" if penalty is None else "replaces"
        reason = f"{reason}; {verb} {type(other).__name__}".lstrip("; ")
    config = None if penalty is None else {"class_name": type(penalty).__name__, "config": penalty.get_config()}
    return CoveredWeight(key, group, tuple(variable.shape), config, reason, distance)


def _shared(weights, found, new):
    """Maps each key in S to its anchor's key; layers named in `new`, and exchanged layers, are left out."""
    layers = {part for key in weights for part in key.split("/")[:-1]}
    if unknown := [name for name in new if name not in layers]:
        raise InputError(f"new names the layer {unknown[0]!r}, which the model does not have: name one of its layers.")
    exchanged = _exchanged(weights, found)
    return {k: other for k, other in found.pairs.items() if not _is_in(k, new) and k.rpartition("/")[0] not in exchanged}


def _exchanged(weights, found):
    """Returns the layers that match another name by number only, with unrelated values: new layers.

    An example is a new head that Keras, or `with_new_head`, numbered after the old one. If most of the model is unrelated to
    its anchors, the weights were never loaded, and the result is empty.
    """
    names = {key: (key.split("/")[-2:-1], found.pairs[key].split("/")[-2:-1]) for key in found.doubts}
    sizes = {key: math.prod(weights[key].variable.shape) for key in found.pairs}
    if 2 * sum(sizes[key] for key in found.doubts) > sum(sizes.values()):
        return set()
    return {key.rpartition("/")[0] for key, (own, other) in names.items() if own != other}


def _is_in(key, layers):
    """Whether a key names a weight inside one of the layers."""
    return bool(set(layers) & set(key.split("/")[:-1]))


def _is_kernel(variable):
    """Whether a weight is a matrix or a convolution kernel, not an offset or scale."""
    name = variable.name.lower()
    return len(variable.shape) >= 2 and not any(word in name for word in ("bias", "beta", "gamma", "scale"))


def _group_axes(weight):
    """Returns the fan-in axes of one output channel (p_g = h * w * d), or None for all axes but the last."""
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
    """Raises for LoRA and quantized layers: LoRA freezes the anchored kernel and trains another, quantization replaces it."""
    for weight in weights:
        if getattr(weight.layer, "lora_enabled", False):
            raise InputError(f"The layer {weight.layer.name!r} is LoRA-enabled and cannot be anchored: attach without LoRA.")
        if getattr(weight.layer, "quantization_mode", None):
            raise InputError(f"The layer {weight.layer.name!r} is quantized and cannot be anchored: attach to the float model.")


def _refuse_other_anchors(weights, anchors):
    """Raises if the model was attached to other anchors before, in this process or before saving."""
    regularizers = [weight.variable.regularizer for weight in weights]
    known = {r.digest for r in regularizers if isinstance(r, AnchoredPenalty) and r.digest}
    if anchors is not None and (others := known - {anchors.digest}):
        raise InputError(
            f"This model is attached to anchors of digest {min(others)[:12]}, but these have {anchors.digest[:12]}: "
            "load the anchors saved with the run, or call l2sp_tf.detach(model) first to start from new ones."
        )
