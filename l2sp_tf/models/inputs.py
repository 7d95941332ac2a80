"""What images a network takes: batches of any number, floating-point pixels, squares of one side."""

import keras

from l2sp_tf.files.errors import InputError


def check_inputs(model):
    """Checks that a functional or Sequential model can be fed with batches of images; other models pass.

    Raises:
        InputError: it takes several inputs, no images, batches of one size, or whole numbers, to which Keras would cut off
            pixels.
    """
    inputs = getattr(model, "inputs", None)
    if inputs is None:
        return
    if len(inputs) != 1:
        raise InputError(f"The model {model.name!r} takes {len(inputs)} inputs, but an image is one: give a model of one input.")
    (shape,), (dtype,) = [x.shape for x in inputs], [keras.backend.standardize_dtype(x.dtype) for x in inputs]
    if len(shape) != 4:
        raise InputError(f"The model {model.name!r} takes inputs of shape {shape}, not batches of images: give another model.")
    if shape[0] is not None:
        raise InputError(
            f"The model {model.name!r} takes batches of {shape[0]} images alone: give it an input without batch_size."
        )
    if not keras.backend.is_float_dtype(dtype):
        raise InputError(
            f"The model {model.name!r} takes pixels as {dtype}, to which prepared images would be cut off: give it an input of "
            "float32."
        )


def square_side(what, height, width):
    """Returns the side in pixels of the square images that a network takes, or None if any side will do.

    Args:
        what: the network or its file, for messages.
        height, width: of its images in pixels, None if any will do; one that is known stands for both.

    Raises:
        InputError: they differ.
    """
    if None not in (height, width) and height != width:
        raise InputError(f"{what} takes images of {height}x{width} pixels, but crops are square: give another model.")
    return height or width
