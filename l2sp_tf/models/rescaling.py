"""Whether a network rescales pixels itself, so that it must see them as they are."""

import keras

from l2sp_tf.models.units import graph_of, operations_of

# Layers that move pixels, or leave them out, without changing their scale; at a network's beginning.
MOVES = (
    *(keras.layers.InputLayer, keras.layers.Identity, keras.layers.ZeroPadding2D, keras.layers.Cropping2D, keras.layers.Resizing),
    *(keras.layers.CenterCrop, keras.layers.RandomCrop, keras.layers.RandomFlip, keras.layers.RandomRotation),
    *(keras.layers.RandomTranslation, keras.layers.RandomZoom, keras.layers.Reshape, keras.layers.Permute),
)
ARITHMETIC = {"Add", "Subtract", "Multiply", "Divide", "TrueDivide"}  # operations of keras.ops, as in `preprocess_input`


def rescaling_of(model):
    """Finds the first layer or operation that rescales pixels before any layer with weights or of another kind sees them.

    These are Rescaling and Normalization, and the arithmetic of the `preprocess_input` of keras.applications.

    Args:
        model: a functional or Sequential model, perhaps of nested ones.

    Returns:
        Its name, or None if there is none or the model has no graph.
    """
    if graph_of(model) is None:
        return None
    parents, seen = operations_of(model), set()
    for operation, read in parents.items():  # each after those that it reads
        if read <= seen:
            if isinstance(operation, keras.layers.Rescaling | keras.layers.Normalization):
                return operation.name
            if not isinstance(operation, keras.Layer) and type(operation).__name__ in ARITHMETIC and read:
                return operation.name
            if isinstance(operation, MOVES) or not isinstance(operation, keras.Layer):
                seen.add(operation)
    return None
