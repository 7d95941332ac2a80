"""The pull to the start apart from the gradient, for adaptive optimizers: what AdamW is to L2."""

from collections.abc import Callable

import keras
from keras import ops

from l2sp_tf.files.types import Tensor
from l2sp_tf.optimizers.stepping import Stepping
from l2sp_tf.penalties.formulas import Penalty


@keras.saving.register_keras_serializable(package="l2sp_tf")
class Decoupled(Stepping):
    """A Keras optimizer whose every step begins with w <- w - lr_t alpha F (w - w0).

    F = 1 but for Eq. (4), and w0 = 0 for Eq. (1) with its beta on the new layers. lr_t is the learning rate of the
    step, of a schedule too. Under SGD without momentum this is the gradient step of the penalty; adaptive optimizers
    would divide that by the size of each weight's gradients, and pull most where the loss pulls least.

    The inner optimizer may be any of Keras that steps each weight by itself: not Ftrl, ScheduleFreeAdamW or MultiOptimizer.

    Args:
        optimizer, name: as `l2sp_tf.optimizers.stepping.Stepping`; `Decoupled.of(optimizer, model)` is how to make one.
    """

    needs = "gradient"

    def step(self, update: Callable[[], object], penalty: Penalty, variable: Tensor, learning_rate: Tensor) -> None:
        # before the inner step, from the weight at which the gradient was taken
        self.assign_sub(variable, ops.cast(learning_rate, "float32") * penalty.gradient(variable))
        update()
