"""Decoupled steps for adaptive optimizers: the pull to w0 apart from the gradient, as AdamW does for weight decay."""

from collections.abc import Callable

import keras
from keras import ops

from l2sp_tf.files.types import Tensor
from l2sp_tf.optimizers.stepping import Stepping
from l2sp_tf.penalties.formulas import Penalty


@keras.saving.register_keras_serializable(package="l2sp_tf")
class Decoupled(Stepping):
    """A Keras optimizer whose every step begins with w <- w - lr_t alpha F (w - w0).

    F = 1 except in Eq. (4). For Eq. (1) w0 = 0, and on new layers its strength is beta. lr_t is the learning rate of the
    step, from a schedule too. Under SGD without momentum this is the gradient step of the penalty. Adaptive optimizers
    would divide that gradient by the size of each weight's gradients, and so pull most where the loss pulls least.

    The inner optimizer must step each weight by itself: not Ftrl, ScheduleFreeAdamW or MultiOptimizer.

    Args:
        optimizer, name: as in `l2sp_tf.optimizers.stepping.Stepping`. Prefer `Decoupled.of(optimizer, model)`.
    """

    needs = "gradient"

    def step(self, update: Callable[[], object], penalty: Penalty, variable: Tensor, learning_rate: Tensor) -> None:
        # first, at the weight where the loss's gradient was taken
        self.assign_sub(variable, ops.cast(learning_rate, "float32") * penalty.gradient(variable))
        update()
