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

    A key joins the names of the layers from the model's children down to the owner of the
    weight, and the weight's own name; the model's name is not part of it, so that a model and
    its clone agree. A shared layer is listed once, under the first place it is met. Seeds of
    random layers are state, not weights, and are not listed.

    Args:
        model: a built Keras model or layer.

    Returns:
        A dict from key to `Weight`, in the order in which Keras tracks the layers.

    Raises:
        ValueError: the model has no weights yet, because it was never built or called.
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


def _name_of(variable, layer):
    """The name of a weight, or that of the layer's attribute where Keras made the name up.

    Such names ("variable_4") are numbered through the process: a copy or a loaded model has others.
    """
    if not re.fullmatch(r"variable(_\d+)?", variable.name):
        return variable.name
    return next((name for name, value in vars(layer).items() if value is variable), "variable")


def first_not_finite(model):
    """The key of the first weight that holds a number that is not finite, or None.

    Statistics of normalisation come first: a forward pass writes them, so they tell in which layer
    the numbers left the range, where a backward pass spreads them to all weights at once.

    Args:
        model: a built Keras model.
    """
    weights = sorted(keyed_weights(model).values(), key=lambda weight: weight.variable.trainable)  # stable
    return next((w.key for w in weights if not np.isfinite(w.variable.numpy().astype("float32")).all()), None)


def set_regularizer(weight, regularizer):
    """Sets a regularizer, or None, on the variable of a `Weight`, which Keras reads, and on its layer, which Keras saves."""
    weight.variable.regularizer = regularizer
    name = weight.variable.name
    for attribute in (f"{name}_regularizer", f"{name.removesuffix('_kernel')}_regularizer", "depthwise_regularizer"):
        if hasattr(weight.layer, attribute):
            setattr(weight.layer, attribute, regularizer)
            break


def drop_penalties(weights):
    """Takes the penalties of this package off weights, and leaves other regularizers.

    Args:
        weights: a dict as `keyed_weights` returns it.

    Returns:
        How many weights had one.
    """
    found = [weight for weight in weights.values() if getattr(weight.variable.regularizer, "is_penalty", False)]
    for weight in found:
        set_regularizer(weight, None)
    return len(found)


def forget_traced_steps(model):
    """Makes a model, and those it is part of, trace their steps again: traced ones keep what the layers were before."""
    # A layer does not know which models it is part of, so that all models are asked. Of other objects only the type is read:
    # some are half made, and gc.get_referrers, which looks into them, was seen to crash.
    kinds, changed = _with_subclasses(keras.Model), {id(variable) for variable in model.variables}
    objects = gc.get_objects()
    for other in list(itertools.compress(objects, map(kinds.__contains__, map(type, objects)))):
        steps = [name for name in ("train", "test") if vars(other).get(f"{name}_function") is not None]
        if steps and any(id(variable) in changed for variable in other.variables):
            for name in steps:  # made anew, not removed: the model may be in `fit`
                getattr(other, f"make_{name}_function")(force=True)


def _with_subclasses(kind):
    """A class and all classes made from it."""
    return {kind}.union(*(_with_subclasses(child) for child in kind.__subclasses__()))


def _unused(key, taken):
    """The key itself, or with "#2", "#3", ... behind it where layers share a name."""
    number, candidate = 1, key
    while candidate in taken:
        number += 1
        candidate = f"{key}#{number}"
    return candidate
