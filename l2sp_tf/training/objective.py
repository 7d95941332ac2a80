"""What a training minimises besides the penalties, cross-entropy, and what it measures."""

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.data.batches import labelled_batches
from l2sp_tf.data.digests import digest_of_rows
from l2sp_tf.data.given import are_finite, checked
from l2sp_tf.data.labels import are_shares
from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """The mean over a batch of v_i w_i H(q_i, softmax(z_i)): the cross-entropy of the logits z_i of image i to its label.

    q_i is the label as shares of the K classes, smoothed to (1 - epsilon) q_i + epsilon / K; v_i is the sample weight, w_i the
    weight of the class. As in Keras, the sum is divided by the number of images, not by the sum of the weights.

    Attributes:
        classes: K.
        has_shares: whether the labels of the data are float32 [n, K], and not int32 [n].
        has_weights: whether the data have sample weights.
        smoothing: epsilon.
        class_weight: the weights of the classes, K floats; None for 1.
    """

    classes: int
    has_shares: bool = False
    has_weights: bool = False
    smoothing: float = 0.0
    class_weight: tuple | None = None

    @classmethod
    def of(cls, task, recipe, class_weight=None):
        """Returns the objective of training on a `Task`, `GivenArrays` or `GivenStream`.

        Args:
            task: the data.
            recipe: the `Recipe`.
            class_weight: as in Keras' `fit`, a dict from the number of a class to its weight; other classes weigh 1.

        Raises:
            InputError: `class_weight` names an unknown class, a weight is no number from 0 on, or there are sample weights too.
        """
        has_shares, has_weights = (getattr(task, name, False) for name in ("has_shares", "has_weights"))
        weights = None if class_weight is None else _each_class(class_weight, len(task.classes))
        if weights is not None and has_weights:
            raise InputError("class_weight is given, but the data have sample weights too: multiply the two, and give one.")
        return cls(len(task.classes), has_shares, has_weights, recipe.label_smoothing, weights)

    @property
    def _takes_shares(self):
        return self.has_shares or self.smoothing > 0

    def loss(self):
        """Returns the loss of a model with logits."""
        if self._takes_shares:
            return keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=self.smoothing)
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def metrics(self):
        """Returns new metrics: the cross-entropy to the labels as they are, and the accuracy."""
        return _metrics(self._takes_shares)

    def compile(self, model, optimizer, jit_compile):
        """Compiles a model with logits, and returns its metrics; sample weights count in them, weights of classes do not."""
        metrics = self.metrics()
        how = "weighted_metrics" if self.has_weights else "metrics"
        model.compile(optimizer, self.loss(), jit_compile=jit_compile, **{how: metrics})
        return metrics

    def feed(self, batches):
        """Returns the batches of the data as the compiled model takes them."""
        if self.class_weight is None and self._takes_shares == self.has_shares:
            return batches
        table = None if self.class_weight is None else tf.constant(self.class_weight)

        @tf.autograph.experimental.do_not_convert
        def prepared(x, y, *weights):
            if table is not None:
                weights = [tf.gather(table, tf.argmax(y, axis=-1) if self.has_shares else y)]
            if self._takes_shares and not self.has_shares:
                y = tf.one_hot(y, self.classes)
            return x, y, *weights

        return batches.map(prepared, num_parallel_calls=1).prefetch(2)


def _metrics(takes_shares):
    kind = "Categorical" if takes_shares else "SparseCategorical"
    return [
        getattr(keras.metrics, f"{kind}Crossentropy")(from_logits=True, name="cross_entropy"),
        getattr(keras.metrics, f"{kind}Accuracy")(name="accuracy"),
    ]


def _each_class(weights, classes):
    """Returns the weights of all classes from those of some."""
    if not isinstance(weights, dict):
        raise InputError(f"class_weight is a {type(weights).__name__}: give a dict from the number of a class to its weight.")
    for key in weights:
        is_number = isinstance(key, (int, np.integer)) and not isinstance(key, bool)
        if not is_number or not 0 <= key < classes:
            raise InputError(f"class_weight names the class {key!r}: give numbers of classes from 0 to {classes - 1}.")
    found = tuple(fields.number(f"class_weight of {i}", weights.get(i, 1.0)) for i in range(classes))
    if not any(found):
        raise InputError("The class weights are all 0: give at least one class a weight.")
    return found


class Validation:
    """Measures cross-entropy and accuracy on validation data, in the mode of inference and without penalties.

    Both are means over all images, weighted if the data have sample weights, as `evaluate` has them.

    Args:
        data: a `Task`, whose test images are taken; or `GivenArrays` or a finite `GivenStream`.
        batch_size: images per step.
    """

    def __init__(self, data, batch_size):
        self.data, self.batch_size, self._model, self._traced = data, batch_size, None, {}

    @property
    def identity(self):
        """A dict that identifies the data."""
        images = {} if not hasattr(self.data, "test") else {"images": digest_of_rows(self.data.test)}
        return {"name": self.data.name, "digest": self.data.digest, **images}

    def __call__(self, model):
        """Returns {"val_cross_entropy": ..., "val_accuracy": ...} of a model with logits.

        Raises:
            InputError: a batch is wrong, or no image has a weight above 0.
        """
        if self._model is not model:
            self._model, self._traced = model, {}
        metrics, classes, counted = _metrics(True), len(self.data.classes), False
        for x, labels, weights in labelled_batches(self.data.test_data(self.batch_size), model, size=self.batch_size):
            targets, weights = checked(are_finite(x), len(tf.nest.flatten(x)[0]), labels, weights, classes)
            counted |= weights is None or bool(weights.any())
            targets = targets if are_shares(targets.shape) else np.eye(classes, dtype=np.float32)[targets]
            scores = self._scores(x)
            for metric in metrics:
                metric.update_state(targets, scores, sample_weight=weights)
        if not counted:
            raise InputError("validation_data has no image with a weight above 0: give at least one.")
        return {f"val_{metric.name}": float(metric.result()) for metric in metrics}

    def _scores(self, x):
        """Returns the logits of a batch; traced once for all sizes of batches."""
        spec = keras.tree.map_structure(lambda leaf: tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype), x)
        if str(spec) not in self._traced:
            call = tf.function(lambda x: self._model(x, training=False), autograph=False)
            self._traced[str(spec)] = call.get_concrete_function(spec)
        return self._traced[str(spec)](*tf.nest.flatten(x))
