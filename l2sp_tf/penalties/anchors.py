"""The anchors w0: a copy of a model's weights, saved and verified."""

from typing import Any, Self

import keras

from l2sp_tf.files.arrays import Snapshot
from l2sp_tf.penalties.matching import restore
from l2sp_tf.penalties.weights import values_of


class Anchors(Snapshot):
    """The pre-trained weights w0 of section 3, a read-only mapping from key to array.

    Keys are those of `l2sp_tf.penalties.weights.keyed_weights`, such as "conv1_conv/kernel". All weights are kept,
    trainable or not, with the original head and the source's batch-norm statistics: the anchors can restore the
    pre-trained model.

    Args:
        arrays: a mapping from key to array.
        metadata: a dict from name to JSON value, or None. "pixels" is the `PixelFormat.plain` of the training images;
            "provenance" is the origin of the weights.
    """

    @classmethod
    def of(cls, model: keras.Model, metadata: dict[str, Any] | None = None) -> Self:
        """Copies the weights of a built model; later training does not change the copies."""
        return cls(values_of(model), metadata)

    def restore(self, model: keras.Model) -> None:
        """Assigns these values to the matching weights of `model`; its layers then update the state derived from them.

        Args:
            model: a built model of the same architecture.

        Raises:
            InputError: weights are missing on one side, or shapes differ. The message lists both sides; the model is
                unchanged.
        """
        restore(model, self)
