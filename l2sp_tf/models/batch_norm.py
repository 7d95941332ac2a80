"""Batch norm: its moving statistics, and its training by one TensorFlow operation in place of Keras 3's ten."""

import types

import keras
from keras.layers import BatchNormalization

from l2sp_tf.files.errors import InputError
from l2sp_tf.penalties.weights import forget_traced_steps

STATISTICS = ("moving_mean", "moving_variance")


def is_statistic(weight):
    """Whether a `Weight` is one of batch norm's moving statistics."""
    return isinstance(weight.layer, BatchNormalization) and weight.variable.name in STATISTICS


def fuse_batch_norm(model: keras.Model) -> keras.Model:
    """Makes a model's batch norm train by TensorFlow's fused operation, in place; results are the same up to rounding.

        y = gamma (x - mean) / sqrt(variance + epsilon) + beta, with the mean and the variance of the batch.

    Keras 3 composes this of operations that each read and write the whole tensor of images. The fused operation makes two
    passes forward and two backward. Saved files and clones of the model do not keep the change: call this again after loading
    or cloning. Keras' own operation still runs in inference, in frozen layers and in subclasses with a `call` of their own.
    It also runs with other axes than the last of four, float64, masks, renormalisation or synchronized statistics.

    Args:
        model: a Keras model.

    Returns:
        The number of fused layers: 0 on Keras' other backends.

    Raises:
        InputError: `model` is not a Keras model.
    """
    _check_model(model)
    if keras.backend.backend() != "tensorflow":
        return 0
    known = [layer for layer in model._flatten_layers() if _runs_keras_call(layer)]
    for layer in known:
        object.__setattr__(layer, "call", types.MethodType(_call, layer))  # bypasses Keras' attribute tracking
    if known:
        forget_traced_steps(model)
    return len(known)


def keep_statistics(model: keras.Model) -> int:
    """Makes batch norm use and keep its moving statistics in training too, in place, while gamma and beta are trained.

        y = gamma (x - moving mean) / sqrt(moving variance + epsilon) + beta, in training as in inference

    For a fine-tuning with batches that are small or of small images, whose own statistics are noisy. Saved files and clones of
    the model do not keep the change: call this again after loading or cloning. Call it before or after `fuse_batch_norm`.

    Args:
        model: a Keras model.

    Returns:
        The number of layers of batch norm.

    Raises:
        InputError: `model` is not a Keras model.
    """
    _check_model(model)
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, BatchNormalization)]
    for layer in layers:
        object.__setattr__(layer, "call", types.MethodType(_call_with_kept_statistics, layer))
    if layers:
        forget_traced_steps(model)
    return len(layers)


def _call_with_kept_statistics(self, inputs, training=None, mask=None):
    """Replaces `BatchNormalization.call`, or that of a subclass: the mode of inference."""
    return type(self).call(self, inputs, training=False, mask=mask)


def _check_model(model):
    if not isinstance(model, keras.Model):
        raise InputError(f"The model is a {type(model).__name__}: give a Keras model.")


def set_moving_statistics(model, *, fresh=False, decay=None):
    """Sets the moving statistics of batch norm as a recipe asks, in place.

        moving = decay moving + (1 - decay) statistics of the batch

    Args:
        model: a Keras model.
        fresh: whether to reset the moving means to 0 and the moving variances to 1, as in a new layer.
        decay: the decay of the moving statistics; None keeps each layer's own momentum.
    """
    for layer in model._flatten_layers():
        if not isinstance(layer, BatchNormalization):
            continue
        if fresh:
            layer.moving_mean.assign(keras.ops.zeros_like(layer.moving_mean))
            layer.moving_variance.assign(keras.ops.ones_like(layer.moving_variance))
        if decay is not None:
            layer.momentum = float(decay)


def _runs_keras_call(layer):
    """Whether a layer is batch norm with Keras' own `call`, which `keep_statistics` has not replaced."""
    replaced = getattr(vars(layer).get("call"), "__func__", None)
    return getattr(type(layer), "call", None) is BatchNormalization.call and replaced is not _call_with_kept_statistics


def _call(self, inputs, training=None, mask=None):
    """Replaces `BatchNormalization.call`: uses the fused operation where it can."""
    if not (training and self.trainable and mask is None and _can_be_fused(self, inputs)):
        return BatchNormalization.call(self, inputs, training=training, mask=mask)
    import tensorflow as tf

    x = tf.cast(inputs, tf.float32)
    ones = tf.ones(x.shape[-1])
    y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=x,
        scale=tf.cast(self.gamma, tf.float32) if self.scale else ones,
        offset=tf.cast(self.beta, tf.float32) if self.center else tf.zeros_like(ones),
        mean=[],
        variance=[],
        epsilon=self.epsilon,
        is_training=True,
    )
    count = tf.cast(tf.size(x) // x.shape[-1], tf.float32)
    variance *= (count - 1) / count  # the operation divides by count - 1, Keras by count
    for moving, value in ((self.moving_mean, mean), (self.moving_variance, variance)):
        before = tf.cast(moving, tf.float32)
        moving.assign(before * self.momentum + value * (1 - self.momentum))
    return tf.cast(y, self.compute_dtype)


def _can_be_fused(layer, inputs):
    is_image = len(inputs.shape) == 4 and layer.axis in (-1, 3)
    is_float32 = keras.backend.result_type(inputs.dtype, "float32") == "float32"
    return is_image and is_float32 and not layer.synchronized and not layer.renorm
