"""The base of optimizers that step the penalties apart from the loss, around another Keras optimizer."""

import contextlib
import functools
import warnings
from collections.abc import Callable

import keras
from keras import ops

from l2sp_tf.files.errors import InputError
from l2sp_tf.files.types import Tensor
from l2sp_tf.penalties import effect
from l2sp_tf.penalties.formulas import PENALTIES, Penalty
from l2sp_tf.penalties.weights import forget_traced_steps


def _of_inner(name):
    """Makes a property of the inner optimizer; Keras' constructor sets it before the inner optimizer exists."""

    def set_on_inner(self, value):
        if "inner_optimizer" in vars(self):
            setattr(self.inner_optimizer, name, value)

    return property(lambda self: getattr(self.inner_optimizer, name), set_on_inner)


class Stepping(keras.optimizers.Optimizer):
    """An optimizer that steps the penalties of Eq. (3) apart from the gradient of the loss.

    It wraps the `update_step` of another Keras optimizer for each weight, and adds the step of the weight's penalty.
    Subclasses define that step. Learning rate, clipping, gradient accumulation, moving averages and state stay those of the
    inner optimizer.

    Use `of`: while the model is compiled with this optimizer, its `train_step` keeps the penalties out of the gradient. In a
    custom training loop, leave `model.losses` out of the loss.

    Args:
        optimizer: a Keras optimizer or its name; do not use it elsewhere afterwards.
        name: the name of this optimizer.

    Raises:
        InputError: it is not an optimizer, or it does not step each weight by its `update_step`.
    """

    needs = ""  # the method that a penalty must have to be stepped

    def __init__(self, optimizer: keras.optimizers.Optimizer | str, name: str | None = None) -> None:
        optimizer = _checked(optimizer)
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = optimizer
        optimizer.update_step = functools.partial(self._update, optimizer.update_step)

    @classmethod
    def of(cls, optimizer: keras.optimizers.Optimizer | str, model: keras.Model) -> keras.optimizers.Optimizer:
        """Wraps `optimizer`, and keeps the penalties of `model` out of the gradient in each step of this optimizer.

        Their values stay in the loss that Keras reports, and in `model.losses`. Compiled with another optimizer, the model
        trains with the penalties in the gradient again.

        Args:
            optimizer: a Keras optimizer or its name. One that is of this class already, as in a loaded model, is
                returned as it is.
            model: the model to compile with the optimizer and to fit; call `attach` first.

        Raises:
            InputError: as the class; Keras runs on another backend than TensorFlow; the model carries no penalty, or one
                that cannot be stepped.
        """
        if keras.backend.backend() != "tensorflow":
            raise InputError(f"{cls.__name__} needs Keras' TensorFlow backend, but this is {keras.backend.backend()}.")
        penalties = [v.regularizer for v in model.trainable_variables if isinstance(v.regularizer, Penalty)]
        if not penalties:
            raise InputError(f"The model {model.name!r} carries no penalty to step: call l2sp_tf.attach(model, ...) first.")
        for penalty in penalties:
            cls.check(penalty)
        optimizer = optimizer if isinstance(unscaled(optimizer), cls) else cls(optimizer)
        _step_apart(model)
        forget_traced_steps(model)
        return optimizer

    @classmethod
    def check(cls, penalty: Penalty) -> None:
        """Raises InputError if the penalty cannot be stepped."""
        if getattr(penalty, cls.needs) is None:
            names = ", ".join(kind.__name__ for kind in PENALTIES.values() if getattr(kind, cls.needs) is not None)
            raise InputError(f"{cls.__name__} cannot step {penalty}: it can step {names}.")

    def step(self, update: Callable[[], object], penalty: Penalty, variable: Tensor, learning_rate: Tensor) -> None:
        """Takes the step of one penalised weight.

        Args:
            update: a function without arguments that takes the inner optimizer's step of the weight.
            penalty: the `Penalty` on the weight.
            variable: the weight, a variable of the backend.
            learning_rate: the learning rate of this step.
        """
        raise NotImplementedError

    def _update(self, update, gradient, variable, learning_rate):
        """Replaces the inner optimizer's `update_step`."""
        penalty = self._penalty_on(self._trainable_variables[self._get_variable_index(variable)])
        if penalty is None:
            update(gradient, variable, learning_rate)
        else:
            self.step(functools.partial(update, gradient, variable, learning_rate), penalty, variable, learning_rate)

    def _penalty_on(self, variable):
        penalty = getattr(variable, "regularizer", None)
        if not isinstance(penalty, Penalty):
            return None
        self.check(penalty)
        return penalty

    def build(self, variables):
        self.inner_optimizer.build(variables)
        super().build(variables)

    def apply(self, grads, trainable_variables=None):
        if not self.built:
            self.build(list(trainable_variables))
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        penalties = [self._penalty_on(variable) for variable in variables]
        penalised = [penalty is not None for penalty in penalties]
        if not any(penalised):
            raise InputError(
                f"{type(self).__name__} finds no penalty on the weights, so that training would run un-anchored: call "
                "l2sp_tf.attach(model, ...) with the saved anchors, or compile the model with a plain optimizer."
            )
        if twice := effect.pop_in_gradient().intersection(penalties):
            penalty = next(iter(twice))
            raise InputError(
                f"{penalty} on {penalty.key or 'a weight'} is in the gradient of the loss and would count twice: call "
                f"l2sp_tf.{type(self).__name__}.of(model.optimizer, model) first, or leave model.losses out of your own loss."
            )
        for penalty in filter(None, penalties):
            effect.took_part(penalty)
        # the penalty also pulls weights that the loss does not reach
        missing = [g is None and p for g, p in zip(grads, penalised, strict=True)]
        grads = [ops.zeros_like(v) if m else g for g, v, m in zip(grads, variables, missing, strict=True)]
        self.inner_optimizer.apply(grads, variables)

    learning_rate = _of_inner("learning_rate")
    iterations = _of_inner("iterations")
    loss_scale_factor = _of_inner("loss_scale_factor")

    @property
    def variables(self):
        return self.inner_optimizer.variables

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self):
        return {"name": self.name, "optimizer": keras.saving.serialize_keras_object(self.inner_optimizer)}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        optimizer = keras.saving.deserialize_keras_object(config["optimizer"], custom_objects=custom_objects)
        return cls(**{**config, "optimizer": optimizer})


def _step_apart(model):
    """Wraps a model's `train_step` to keep the penalties out of the gradient while a `Stepping` optimizer steps them."""
    take = model.train_step
    if getattr(take, "is_apart", False):
        return

    @functools.wraps(take)
    def train_step(*args, **kwargs):
        steps_penalties = isinstance(unscaled(model.optimizer), Stepping)
        with effect.apart() if steps_penalties else contextlib.nullcontext():
            return take(*args, **kwargs)

    train_step.is_apart = True
    object.__setattr__(model, "train_step", train_step)  # bypasses Keras' tracking


def unscaled(optimizer):
    """Returns the optimizer inside a LossScaleOptimizer, or the optimizer itself."""
    return optimizer.inner_optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else optimizer


def _checked(optimizer):
    """Returns the optimizer, made from its name if need be; raises unless it steps each weight by its `update_step`."""
    try:
        optimizer = keras.optimizers.get(optimizer)
    except ValueError:
        optimizer = None
    if optimizer is None:
        raise InputError('Keras does not know the optimizer to wrap: give one of keras.optimizers, or a name such as "sgd".')
    name = type(optimizer).__name__
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise InputError(f"{name} goes outside: wrap its inner optimizer, and give the result to {name} or to compile.")
    # these rewrite a weight from their state, or delegate the step: a change of the weight here would be lost
    own = isinstance(optimizer, (keras.optimizers.Ftrl, keras.optimizers.ScheduleFreeAdamW))
    if own or type(optimizer).apply is not keras.optimizers.Optimizer.apply:
        raise InputError(f"{name} cannot be wrapped, as it does not step each weight by itself: give one such as SGD or AdamW.")
    if "update_step" in vars(optimizer):
        raise InputError(f"This {name} is wrapped already: give the wrapping optimizer, or a new {name}.")
    if optimizer.weight_decay:
        warnings.warn(
            f"The optimizer {name} has weight_decay={optimizer.weight_decay:g}, which pulls to zero and away from the "
            "anchors: set weight_decay=0 to let the penalty alone decide.",
            stacklevel=4,
        )
    return optimizer
