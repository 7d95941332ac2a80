"""The starting point w0: a snapshot of a model's weights by value, saved and verified."""

from typing import Any, Self

import keras

from l2sp_tf.files.arrays import Snapshot
from l2sp_tf.penalties.matching import restore
from l2sp_tf.penalties.weights import keyed_weights


class Anchors(Snapshot):
    """The pre-trained weights w0 of section 3, a read-only mapping from key to array.

    Keys are those of `l2sp_tf.penalties.weights.keyed_weights`, such as "conv1_conv/kernel". All
    weights are kept, trainable or not, so that the pre-trained model can be restored from
    its anchors: the original head and the source's batch-norm statistics are in them.

    Args:
        arrays: a mapping from key to array.
        metadata: what is known of the weights, a dict from name to what JSON can hold, or None: "pixels", the
            `PixelFormat.plain` that they were trained on, and "provenance", where they come from.
    """

    @classmethod
    def of(cls, model: keras.Model, metadata: dict[str, Any] | None = None) -> Self:
        """Copies the weights of a built model by value; later training does not change them."""
        return cls({key: weight.variable.numpy() for key, weight in keyed_weights(model).items()}, metadata)

    def restore(self, model: keras.Model) -> None:
        """Assigns these values to the weights of `model` that have the same key; its layers derive their state from them.

        Args:
            model: a built model of the same architecture.

        Raises:
            InputError: a weight of the model is missing here or has another shape, or the
                other way round; both sides are listed, and the model is left as it was.
        """
        restore(model, self)
