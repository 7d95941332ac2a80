"""Assigns values to weights, and updates the state that layers derive from their weights."""

import re

import numpy as np

from l2sp_tf.files.errors import InputError
from l2sp_tf.penalties.weights import keyed_weights


def assign(model, values):
    """Assigns values to weights of a model, and updates the state that their layers derive from them.

    Args:
        model: a built model.
        values: a mapping from keys of `keyed_weights(model)` to arrays of the same shapes.

    Raises:
        InputError: names the layer that cannot derive its state from the values.
    """
    weights = keyed_weights(model)
    for key, value in values.items():
        weights[key].variable.assign(value)
    finish({id(weights[key].layer): weights[key].layer for key in values}.values())


def finish(layers):
    """Updates the state that layers derive from newly assigned weights, such as the constants of Normalization.

    Raises:
        InputError: names the layer that cannot derive its state.
    """
    for layer in layers:
        if own_weights(layer):
            try:
                _finish(layer)
            except Exception as error:  # custom layers may raise anything
                raise InputError(
                    f"The layer {title(layer)} cannot derive its state from its weights: {said_by(error)}."
                ) from error


def _finish(layer):
    if is_custom(layer, "load_own_variables") and not is_merged(layer):
        store = {}
        layer.save_own_variables(store)
        layer.load_own_variables({name: np.asarray(value) for name, value in store.items()})
    if callable(getattr(layer, "finalize_state", None)):
        layer.finalize_state()


def own_weights(layer):
    """Returns the weights of a layer without those of its inner layers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def is_custom(layer, method):
    """Whether a layer defines a method outside Keras."""
    found = getattr(type(layer), method, None)
    return found is not None and not found.__module__.startswith("keras.")


def is_merged(layer):
    """Whether Keras saves other values than the layer's weights: it merges LoRA and dequantizes."""
    return getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None) is not None


def said_by(error):
    """Returns the line of an error that gives its cause, without the text that Keras adds."""
    lines = [re.sub(r"\x1b\[\d+m", "", line).strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and not line.startswith(("Exception encountered", "Error when deserializing"))]
    return (telling or [type(error).__name__])[0].split(". ")[0].rstrip(".")


def title(layer):
    return f"{layer.name!r} of class {type(layer).__name__}"
