"""The weights of a Keras model, each under one key."""

import dataclasses
import gc
import itertools
import re

import keras
import numpy as np


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight of a model: its key, the Keras variable, and the layer that owns it."""

    key: str
    variable: keras.Variable
    layer: keras.Layer


def keyed_weights(model):
    """Lists each weight of a model once, under the key "<layer>/.../<weight>".

    A key joins the names of the layers from the model's children down to the weight's owner, and the weight's name. It omits
    the model's name, so that a model and its clone agree. A shared layer is listed once, at its first place. Seeds of random
    layers are state, not weights, and are not listed.

    Args:
        model: a built Keras model or layer.

    Returns:
        A dict from key to `Weight`, in the order in which Keras tracks the layers.

    Raises:
        ValueError: the model has no weights, as it was never built or called.
    """
    found, seen = {}, set()

    def walk(layer, prefix):
        children = layer._flatten_layers(include_self=False, recursive=False)
        inner = {id(v) for child in children for v in child.weights}
        for variable in layer.weights:
            if id(variable) in seen or id(variable) in inner:
                continue
            seen.add(id(variable))
            key = _unused("/".join((*prefix, _name_of(variable, layer))), found)
            found[key] = Weight(key, variable, layer)
        for child in children:
            walk(child, (*prefix, child.name))

    walk(model, ())
    if not found:
        raise ValueError(f"The model {model.name!r} has no weights: build it, or call it on an input, first.")
    return found


def values_of(model):
    """Copies the values of a model's weights: a dict from key to array."""
    return {key: weight.variable.numpy() for key, weight in keyed_weights(model).items()}


def _name_of(variable, layer):
    """Returns the name of a weight, or of its attribute in the layer if Keras generated the name.

    Keras numbers generated names ("variable_4") through the process: a copy or a loaded model has others.
    """
    if not re.fullmatch(r"variable(_\d+)?", variable.name):
        return variable.name
    return next((name for name, value in vars(layer).items() if value is variable), "variable")


def first_not_finite(model):
    """Returns the key of the first weight with a number that is not finite, or None.

    Normalisation statistics come first: a forward pass writes them, so they locate the layer that left the range. A backward
    pass spreads such numbers to all weights at once.

    Args:
        model: a built Keras model.
    """
    weights = sorted(keyed_weights(model).values(), key=lambda weight: weight.variable.trainable)  # a stable sort
    return next((w.key for w in weights if not np.isfinite(w.variable.numpy().astype("float32")).all()), None)


def set_regularizer(weight, regularizer):
    """Sets a regularizer or None on a `Weight`: on its variable, which Keras reads, and on its layer, which Keras saves."""
    weight.variable.regularizer = regularizer
    name = weight.variable.name
    for attribute in (f"{name}_regularizer", f"{name.removesuffix('_kernel')}_regularizer", "depthwise_regularizer"):
        if hasattr(weight.layer, attribute):
            setattr(weight.layer, attribute, regularizer)
            break


def drop_penalties(weights):
    """Removes the penalties of this package from weights; keeps other regularizers.

    Args:
        weights: a dict as `keyed_weights` returns it.

    Returns:
        The number of removed penalties.
    """
    found = [weight for weight in weights.values() if getattr(weight.variable.regularizer, "is_penalty", False)]
    for weight in found:
        set_regularizer(weight, None)
    return len(found)


def forget_traced_steps(model):
    """Makes a model, and all models that contain it, retrace their steps: traced steps keep the old state of the layers."""
    # A layer does not know the models that contain it, so all models are searched. Of other objects only the type is read:
    # some are half constructed, and gc.get_referrers, which inspects them, can crash.
    kinds, changed = _with_subclasses(keras.Model), {id(variable) for variable in model.variables}
    objects = gc.get_objects()
    for other in list(itertools.compress(objects, map(kinds.__contains__, map(type, objects)))):
        steps = [name for name in ("train", "test") if vars(other).get(f"{name}_function") is not None]
        if steps and any(id(variable) in changed for variable in other.variables):
            for name in steps:  # remade, not removed: the model may be in `fit`
                getattr(other, f"make_{name}_function")(force=True)


def _with_subclasses(kind):
    """Returns a class and all its subclasses."""
    return {kind}.union(*(_with_subclasses(child) for child in kind.__subclasses__()))


def _unused(key, taken):
    """Returns the key, with "#2", "#3", ... appended if it is taken."""
    number, candidate = 1, key
    while candidate in taken:
        number += 1
        candidate = f"{key}#{number}"
    return candidate
