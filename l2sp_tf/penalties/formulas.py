"""The penalties of section 3 as Keras regularizers, one class for each equation.

Symbols: `w` the weight, `w0` its anchor (the pre-trained value), `alpha` the strength, `fisher` the diagonal of the Fisher
information, `g` a group of weights and `p_g` its size. `register_penalty` registers each class.
"""

import copy
import importlib.metadata
import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.memory import shared_tensor
from l2sp_tf.files.types import Tensor
from l2sp_tf.penalties import effect, maps


class UnboundPenaltyError(RuntimeError):
    """Raised for a penalty that is not bound to its weight (as after loading a model), or that a step ignores."""


def check_strength(value: Any, name: str) -> float:
    """Returns a strength as a float.

    Raises:
        InputError: it is not a finite number of at least 0.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise InputError(f"{name} is {value!r}: give a finite number that is at least 0.")
    return float(value)


PENALTIES: dict[str, type["Penalty"]] = {}  # the registered classes by symbol


def register_penalty(symbol: str, title: str, grid: Iterable[float]) -> Callable[[type["Penalty"]], type["Penalty"]]:
    """Registers a penalty under its symbol for Keras' files, train.py, cross-validation, records, tables and figures.

    To add a penalty, subclass `Penalty`, `AnchoredPenalty` or `FisherPenalty` and define `value`. Define `gradient` for
    `Decoupled`, and `pull` for `Proximal`. For train.py, install a package that names the module of the class as an entry
    point of the group "l2sp_tf.penalties".

    Args:
        symbol: its name in train.py and records, such as "l2_sp": lower case letters, digits and underscores.
        title: its name in tables and figures, such as "L2-SP".
        grid: the default strengths of cross-validation.

    Returns:
        A class decorator.

    Raises:
        InputError: the symbol is malformed or taken, the class is not a `Penalty`, or the grid is empty.
    """

    def register(cls):
        known = PENALTIES.get(symbol)
        if not fields.is_symbol(symbol):
            raise InputError(f"The symbol {symbol!r} is not a word of lower case letters, digits and underscores: give one.")
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise InputError(f"The symbol {symbol} is that of {known.__module__}.{known.__qualname__}: give another.")
        if not issubclass(cls, Penalty):
            raise InputError(f"{cls.__name__} is not a subclass of l2sp_tf.penalties.formulas.Penalty: make it one.")
        cls.symbol, cls.title = symbol, title
        cls.grid = tuple(check_strength(alpha, "grid") for alpha in grid)
        if not cls.grid:
            raise InputError(f"The grid of {cls.__name__} is empty: give at least one strength.")
        PENALTIES[symbol] = cls
        return keras.saving.register_keras_serializable(package=cls.__module__.partition(".")[0])(cls)

    return register


def load_registered() -> None:
    """Imports the installed modules that register penalties: entry points of the group "l2sp_tf.penalties".

    Raises:
        InputError: names a module that cannot be imported.
    """
    for entry in importlib.metadata.entry_points(group="l2sp_tf.penalties"):
        try:
            entry.load()
        except Exception as error:  # third-party modules may raise anything
            raise InputError(
                f"The penalties of {entry.value} cannot be imported ({error}): mend or remove its package."
            ) from error


class Penalty(keras.regularizers.Regularizer):
    """The base class of the penalties: a strength alpha, and the key of the bound weight.

    A penalty from a file has a key but is not bound. Files cannot keep all penalties of a model, and the loaded ones alone
    would train another objective. `attach` binds them all again.

    Args:
        alpha: strength, finite and not negative.
        key: the key of the weight, set by `attach`.

    Raises:
        InputError: the strength is not a finite number of at least 0.
    """

    symbol, title, grid = "", "", ()  # see `register_penalty`
    is_penalty = True  # `drop_penalties` looks for it
    # Optional methods: gradient(w) for `Decoupled`, pull(d, step) for `Proximal`; see `L2`.
    gradient: Any = None
    pull: Any = None

    def __init__(self, alpha: float, *, key: str | None = None) -> None:
        self.alpha = check_strength(alpha, "alpha")
        self.key = key
        self._is_attached = False

    def __call__(self, w: Tensor) -> Tensor:
        """Returns the value of the penalty, a scalar in float32 at least; w is a tensor or variable of the weight's shape.

        Raises:
            UnboundPenaltyError: the penalty is not bound.
        """
        if not self.is_bound:
            raise UnboundPenaltyError(self._unbound())
        return effect.passed_on(self, self.value(w))

    def value(self, w: Tensor) -> Tensor:
        """Returns the value at w, a scalar tensor in float32 at least; each subclass defines its formula here."""
        raise NotImplementedError

    def displacement(self, w: Tensor) -> Tensor:
        """Returns the tensor that the penalty pulls to 0, in float32 at least: w, or w - w0 with an anchor."""
        return self._weight(w)

    def proximal_map(self, w: Tensor, step: Tensor) -> Tensor:
        """argmin_x penalty(x) + sum_j (x_j - w_j)^2 / (2 step_j), by the formula of `pull`.

        Args:
            w: a tensor or variable of any float type, of the weight's shape.
            step: at least 0, a scalar or a tensor of that shape.

        Returns:
            A tensor of the dtype of `w`, but float32 at least; entries that the map puts on w0 equal it bit by bit.
        """
        d = self.displacement(w)
        w = self._weight(w)
        pull, stays = self.pull(d, ops.cast(step, d.dtype))
        return ops.where(stays, self._origin(w), w - pull)  # w0 itself: w - pull may differ by a rounding or a sign

    def _origin(self, w):
        """Returns the point that the penalty pulls w to."""
        return ops.zeros_like(w)

    @property
    def is_bound(self) -> bool:
        """Whether the value can be computed."""
        return self._is_attached or self.key is None

    def _unbound(self):
        """Returns the error message of a penalty that is not bound."""
        return (
            f"{type(self).__name__} on {self.key or 'a weight'} came from a file or a clone and is not bound again: call "
            "l2sp_tf.attach(model, ...) before training or evaluating the loss, or l2sp_tf.detach(model) to drop the penalty."
        )

    def bind(self, key: str, **_: Any) -> Any:
        """Returns a copy of this penalty for the weight named `key`."""
        bound = type(self)(**{**self.get_config(), "key": key})
        bound._is_attached = True
        return bound

    def get_config(self) -> dict[str, Any]:
        """The strength and the key: small enough to live in a `.keras` file."""
        return {"alpha": self.alpha, "key": self.key}

    def _weight(self, w):
        """Casts w to float32 at least."""
        return ops.cast(w, keras.backend.result_type(keras.backend.standardize_dtype(w.dtype), "float32"))

    def __repr__(self):
        return f"{type(self).__name__}(alpha={self.alpha:g})"


class AnchoredPenalty(Penalty):
    """A penalty on w - w0.

    Args:
        alpha: strength, finite and not negative.
        anchor: w0, an array of the weight's shape, copied. Without it the penalty is a template for `attach`, and a call
            raises.
        key, digest: the weight's key and the digest of its anchors, set by `attach`.

    Raises:
        InputError: the strength is not a finite number of at least 0, or the anchor is not finite.
    """

    def __init__(self, alpha: float, anchor: Tensor | None = None, *, key: str | None = None, digest: str | None = None) -> None:
        super().__init__(alpha, key=key)
        self.digest = digest
        self._anchor: Any = None if anchor is None else _constant(anchor, self._name_of("anchor"))

    @property
    def is_bound(self) -> bool:
        return self._anchor is not None

    @property
    def anchor(self) -> Tensor:
        """w0, a tensor, or None."""
        return self._anchor

    def bind(self, key: str, *, anchor: Tensor = None, digest: str | None = None, **_: Any) -> Any:
        """Returns a copy of this penalty for one weight, bound to its anchor; shares the memory of a read-only anchor."""
        bound = super().bind(key)
        bound.digest, bound._anchor = digest, _constant(anchor, bound._name_of("anchor"), share=True)
        return bound

    def _unbound(self):
        of = f" of digest {self.digest[:12]}" if self.digest else ""
        return (
            f"{type(self).__name__} on {self.key or 'a weight'} is not bound to its anchors{of}: "
            "call l2sp_tf.attach(model, ...) with the saved anchors "
            "before training or evaluating the loss, or l2sp_tf.detach(model) to drop the penalty."
        )

    def _name_of(self, what):
        return f"the {what} of {self.key or type(self).__name__}"

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "digest": self.digest}

    def displacement(self, w: Tensor) -> Tensor:
        """Returns w - w0, in float32 at least."""
        _check_shapes(self, weight=w.shape, anchor=self._anchor.shape)
        w = self._weight(w)
        return ops.subtract(w, self._origin(w))

    def _origin(self, w):
        return ops.cast(self._anchor, w.dtype)


class FisherPenalty(AnchoredPenalty):
    """A penalty on w - w0 in the metric of the Fisher diagonal.

    Args:
        fisher: F_jj, finite and not negative, an array of the weight's shape.
        fisher_digest: the digest of the Fisher diagonal, set by `attach`.

    Raises:
        InputError: an entry of `fisher` is negative or not finite, or its shape differs from the anchor's.
    """

    def __init__(
        self,
        alpha: float,
        anchor: Tensor | None = None,
        fisher: Tensor | None = None,
        *,
        key: str | None = None,
        fisher_digest: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(alpha, anchor, key=key, **kwargs)
        self.fisher_digest, self._root_fisher = fisher_digest, None
        if fisher is not None:
            self._set_fisher(fisher)

    @property
    def is_bound(self) -> bool:
        return super().is_bound and self._root_fisher is not None

    @property
    def fisher(self) -> Tensor:
        """F_jj, a tensor, or None."""
        return None if self._root_fisher is None else ops.square(self._root_fisher)

    def bind(self, key: str, *, fisher: Tensor = None, fisher_digest: str | None = None, **bound_to: Any) -> Any:
        """Returns a copy of this penalty for one weight, bound to its anchor and Fisher diagonal."""
        bound = super().bind(key, **bound_to)
        bound.fisher_digest = fisher_digest
        if fisher is not None:
            bound._set_fisher(fisher)
        return bound

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "fisher_digest": self.fisher_digest}

    def _set_fisher(self, fisher):
        fisher, what = ops.convert_to_numpy(fisher), self._name_of("Fisher diagonal")
        if np.any(fisher < 0):
            raise InputError(f"T{what[1:]} has negative entries, but it is a mean of squares: give one that is at least 0.")
        self._root_fisher = _constant(np.sqrt(fisher), what)
        if self._anchor is not None:
            _check_shapes(self, anchor=self._anchor.shape, fisher=self._root_fisher.shape)

    def _weighted_displacement(self, w):
        """F_jj^(1/2) (w_j - w0_j) for each j; Eqs. (4) and (7) sum its squares."""
        d = self.displacement(w)
        return ops.multiply(ops.cast(self._root_fisher, d.dtype), d)

    def _fisher_as(self, x):
        return ops.cast(self.fisher, x.dtype)


class _Grouped:
    """Groups of weights: the fan-in of each output channel (section 3, Group-Lasso-SP).

    `group_axes` are the axes summed inside a group, by default all but the last; `attach` sets them for depthwise and other
    kernels. `epsilon` is added inside the root and smooths the kink at w0 (1e-16 in the authors' code).
    """

    def __init__(self, *args: Any, group_axes: Iterable[int] | None = None, epsilon: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group_axes = None if group_axes is None else tuple(group_axes)
        self.epsilon = check_strength(epsilon, "epsilon")

    def bind(self, key, *, group_axes=None, **kwargs):
        bound = super().bind(key, **kwargs)
        if self.group_axes is None and group_axes is not None:
            bound.group_axes = tuple(group_axes)
        return bound

    def get_config(self):
        return {**super().get_config(), "group_axes": self.group_axes, "epsilon": self.epsilon}

    def _group_norms(self, x):
        """alpha * sum_g sqrt(p_g) (sum_{j in g} x_j^2 + epsilon)^(1/2)."""
        axes, p_g = self._axes(x), self._group_size(x)
        if not axes and not self.epsilon:  # groups of one weight, such as the gammas of batch norm
            return ops.multiply(self.alpha, ops.sum(ops.absolute(x)))
        norms = _root(_sum_over(ops.square(x), axes), self.epsilon)
        return ops.multiply(self.alpha * math.sqrt(p_g), ops.sum(norms))

    def _axes(self, x):
        return tuple(range(len(x.shape) - 1)) if self.group_axes is None else self.group_axes

    def _group_size(self, x):
        """p_g."""
        return math.prod(x.shape[axis] for axis in self._axes(x))


class _Square(Penalty):
    """alpha / 2 * sum_j d_j^2 of the displacement d: w for Eq. (1), w - w0 for Eq. (2)."""

    def value(self, w: Tensor) -> Tensor:
        return ops.multiply(self.alpha, _half_square_sum(self.displacement(w)))

    def gradient(self, w: Tensor) -> Tensor:
        """alpha d."""
        return self.alpha * self.displacement(w)

    def pull(self, d: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the part that the proximal map subtracts, s alpha d / (1 + s alpha), and False: no entry becomes exactly 0."""
        return maps.quadratic(d, step * self.alpha)


@register_penalty("l2", "L2", (1e-5, 1e-4, 1e-3, 1e-2))
class L2(_Square):
    """Eq. (1): L2, weight decay. alpha / 2 * sum_j w_j^2, which is `keras.regularizers.L2(alpha / 2)`."""


@register_penalty("l2_sp", "L2-SP", (1e-3, 1e-2, 1e-1, 1.0))
class L2SP(_Square, AnchoredPenalty):
    """Eq. (2): L2-SP. alpha / 2 * sum_j (w_j - w0_j)^2."""


@register_penalty("l2_sp_fisher", "L2-SP-Fisher", (1e-3, 1e-2, 1e-1, 1.0))
class L2SPFisher(FisherPenalty):
    """Eq. (4): L2-SP-Fisher. alpha / 2 * sum_j F_jj (w_j - w0_j)^2."""

    def value(self, w: Tensor) -> Tensor:
        return ops.multiply(self.alpha, _half_square_sum(self._weighted_displacement(w)))

    def gradient(self, w: Tensor) -> Tensor:
        """alpha F (w - w0)."""
        d = self.displacement(w)
        return self.alpha * self._fisher_as(d) * d

    def pull(self, d: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """s alpha F d / (1 + s alpha F)."""
        return maps.quadratic(d, step * self.alpha * self._fisher_as(d))


@register_penalty("l1_sp", "L1-SP", (1e-5, 1e-4, 1e-3, 1e-2))
class L1SP(AnchoredPenalty):
    """Eq. (5): L1-SP. alpha * sum_j |w_j - w0_j|, with the subgradient 0 at w0.

    Args:
        epsilon: replaces |x| by sqrt(x^2 + epsilon), which smooths the kink at w0 (1e-16 in the authors' code).
    """

    def __init__(self, alpha: float, anchor: Tensor | None = None, *, epsilon: float = 0.0, **kwargs: Any) -> None:
        super().__init__(alpha, anchor, **kwargs)
        self.epsilon = check_strength(epsilon, "epsilon")

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "epsilon": self.epsilon}

    def value(self, w: Tensor) -> Tensor:
        d = self.displacement(w)
        if self.epsilon:
            return ops.multiply(self.alpha, ops.sum(ops.sqrt(ops.square(d) + self.epsilon)))
        return ops.multiply(self.alpha, ops.sum(ops.absolute(d)))

    def pull(self, d: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """sign(d) s alpha, or all of d where |d| <= s alpha."""
        return maps.soft_threshold(d, step * self.alpha)


@register_penalty("gl_sp", "GL-SP", (1e-5, 1e-4, 1e-3, 1e-2))
class GroupLassoSP(_Grouped, AnchoredPenalty):
    """Eq. (6): GL-SP. alpha * sum_g sqrt(p_g) ||w_g - w0_g||_2, with the subgradient 0 at w0."""

    def value(self, w: Tensor) -> Tensor:
        return self._group_norms(self.displacement(w))

    def pull(self, d: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """d min(1, s alpha sqrt(p_g) / ||d_g||) for a scalar s; for an s per weight see `maps.weighted_group`."""
        axes, strength = self._axes(d), self.alpha * math.sqrt(self._group_size(d))
        if len(step.shape) == 0:
            return maps.group(d, strength * step, axes)
        return maps.weighted_group(d, ops.ones_like(d), strength, step, axes)


@register_penalty("gl_sp_fisher", "GL-SP-Fisher", (1e-5, 1e-4, 1e-3, 1e-2))
class GroupLassoSPFisher(_Grouped, FisherPenalty):
    """Eq. (7): GL-SP-Fisher. alpha * sum_g sqrt(p_g) (sum_{j in g} F_jj (w_j - w0_j)^2)^(1/2)."""

    def value(self, w: Tensor) -> Tensor:
        return self._group_norms(self._weighted_displacement(w))

    def pull(self, d: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """See `maps.weighted_group`."""
        strength = self.alpha * math.sqrt(self._group_size(d))
        return maps.weighted_group(d, self._fisher_as(d), strength, step, self._axes(d))


PAPER = tuple(PENALTIES)  # the symbols of Eqs. (1), (2) and (4)-(7), in this order


def smoothed(penalty: Penalty, epsilon: float) -> Penalty:
    """Returns a copy of a penalty with epsilon inside its roots, Eqs. (5)-(7).

    A penalty without roots, or with a nonzero epsilon, is returned unchanged.

    Raises:
        InputError: epsilon is not a finite number of at least 0.
    """
    epsilon = check_strength(epsilon, "epsilon")
    if not epsilon or getattr(penalty, "epsilon", None) != 0:
        return penalty
    penalty = copy.copy(penalty)
    penalty.epsilon = epsilon
    return penalty


def _half_square_sum(x):
    """1/2 sum_j x_j^2."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.nn.l2_loss(x)  # two passes over x with its gradient; square and sum take six
    return ops.multiply(0.5, ops.sum(ops.square(x)))


def _sum_over(x, axes):
    """Sums over some axes; for all but the last, the usual case, the gradient of a bias is TensorFlow's faster sum."""
    if not axes:
        return x
    if keras.backend.backend() == "tensorflow" and axes == tuple(range(len(x.shape) - 1)):
        import tensorflow as tf

        return tf.raw_ops.BiasAddGrad(out_backprop=x)
    return ops.sum(x, axis=axes)


def _root(x, epsilon):
    """sqrt(x + epsilon) for sums of squares x, computed as x / sqrt(x).

    If x is 0 or so small that its root may round to 0, it is x / 1. The gradient there is 1 instead of infinite, and the
    chain rule through the square makes it 0.
    """
    x = ops.add(x, epsilon) if epsilon else x
    is_zero = ops.cast(ops.less(x, np.finfo(keras.backend.standardize_dtype(x.dtype)).tiny), x.dtype)
    return ops.multiply(x, ops.rsqrt(ops.add(x, is_zero)))


def _constant(value, what, share=False):
    """Makes a tensor that a traced function captures instead of embedding.

    It copies `value`. If `share` is set, it shares the memory of a read-only array, except on a GPU.
    """
    array = value if isinstance(value, np.ndarray) else ops.convert_to_numpy(value)
    if not np.all(np.isfinite(array.astype("float32", copy=False))):
        raise InputError(f"T{what[1:]} has entries that are not finite: give finite numbers.")
    if keras.backend.backend() != "tensorflow":
        return ops.convert_to_tensor(np.array(array))  # a copy: the conversion may share memory
    import tensorflow as tf

    is_shared = share and not array.flags.writeable and not tf.config.list_logical_devices("GPU")
    # without the scope, a penalty made during tracing would hold a symbolic tensor
    with tf.init_scope():
        return shared_tensor(array) if is_shared else ops.convert_to_tensor(np.array(array))


def _check_shapes(penalty, **shapes):
    (first, a), (second, b) = ((name, tuple(shape)) for name, shape in shapes.items())
    if a != b:
        on = f" on {penalty.key}" if penalty.key else ""
        raise InputError(f"{type(penalty).__name__}{on}: the {first} has the shape {a}, but the {second} has {b}.")
