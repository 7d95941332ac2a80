"""The units of a network in the order in which an image passes them, and freezing the first n of them (Fig. 3)."""

import numbers
import re

import keras

from l2sp_tf.files.errors import InputError
from l2sp_tf.penalties.weights import forget_traced_steps

# In each pattern, capture 1 matches the layers of the first unit, and capture 2 names the unit of any other layer.
NAMED = {
    "ResNet, ResNetV2, DenseNet": r"(conv1)_(?:pad|conv|bn|relu)|(conv\d+_block\d+)_\w+",
    "VGG, Xception": r"(block1)_(?:conv\d+|pool)(?:_bn|_act)?|(block\d+)_(?:conv\d+|sepconv\d+|pool)(?:_bn|_act)?",
    "MobileNet": r"(conv1)(?:_bn|_relu)?|conv_(?:pad|dw|pw)_(\d+)(?:_bn|_relu)?",
    "MobileNetV2": r"(?:bn_)?(Conv1)(?:_relu)?|(expanded_conv|block_\d+)_[a-z]\w*",
    "MobileNetV3": r"(conv)(?:_bn)?|(expanded_conv(?:_\d+)?)_[a-z]\w*",
    "EfficientNet": r"(stem)_(?:conv|conv_pad|bn|activation)|(block\d+[a-z])_\w+",
    "ConvNeXt": r".+_(stem)_(?:conv|layernorm)|.+_(stage_\d+_block_\d+)_\w+",
    "NASNet": r"(stem)_(?:conv1|bn1)|(?:adjust|normal|reduction|separable_conv)_\w+?_((?:stem|reduce)_\d+|\d+)",
}
# Keras only numbers the convolutions of these networks; the layer that ends a block has a name.
ENDED = {
    "InceptionV3": r"(mixed\d+)",
    "InceptionResNetV2": r"(mixed_\d+[a-z]|block\d+_\d+)(?:_(?:mixed|conv|ac))?",
}


def units(model):
    """Lists the units that Fig. 3 counts, each as a list of layers: the first convolution, then each block or cell.

    Units are recognised by the layer names of `keras.applications` and `l2sp_tf.models.resnets`, also in nested models. Batch
    norm belongs to its convolution's unit. Layers between two blocks (DenseNet's transitions, ConvNeXt's downsampling) and
    after the last one belong to no unit. InceptionV3 and InceptionResNetV2 name only the ends of blocks: a unit is then
    everything between two ends.

    Args:
        model: a functional or Sequential model.

    Returns:
        A list of units in the order of the network, each a list of layers in topological order.

    Raises:
        InputError: the model is of another kind, or its layers have other names.
    """
    return _units(model, operations_of(model))


def unit_count(model):
    """Counts the units of a model; returns 0 if they are unknown."""
    try:
        return len(units(model))
    except InputError:
        return 0


def freeze_first(model: keras.Model, n: int) -> int:
    """Freezes the first n units of a network and everything upstream of them (Fig. 3), and unfreezes all other layers.

    An unnamed shortcut around unit n (Xception) is frozen with it. A frozen batch norm runs in inference mode and
    keeps the source's statistics.

    Args:
        model: a model whose units are known, as in `units`.
        n: number of units, from 0 (nothing is frozen, as after `unfreeze`) to all of them.

    Returns:
        The number of units of the model.

    Raises:
        InputError: n is not between 0 and the number of units, or the units are unknown; the model is unchanged.
    """
    parents = operations_of(model)
    found = _units(model, parents)
    if isinstance(n, bool) or not isinstance(n, numbers.Integral) or not 0 <= n <= len(found):
        last = len(found)
        raise InputError(f"n is {n!r}, but the model {model.name!r} has {last} units: give a number from 0 to {last}.")
    unfreeze(model)
    for layer in _upstream(found, n, parents) if n else ():
        layer.trainable = False
    return len(found)


def unfreeze(model: keras.Model) -> None:
    """Makes all layers, nested models and variables trainable, except those that Keras never trains, such as statistics.

    As in a new layer with LoRA, a kernel under LoRA stays frozen and its low-rank update is trained.

    Args:
        model: any Keras model or layer.
    """
    for layer in model._flatten_layers():
        layer.trainable = True  # one by one: Keras sets inner layers only if the outer layer's value changes
        for variable in layer._trainable_variables:
            variable.trainable = True
    for layer in model._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            kernel = layer._kernel if hasattr(layer, "_kernel") else layer._embeddings
            kernel.trainable = False
    forget_traced_steps(model)


def graph_of(layer):
    """Returns the graph of a functional or built Sequential model, or None for any other layer."""
    graph = getattr(layer, "_functional", None) or layer
    return graph if hasattr(graph, "_nodes_by_depth") else None


def nodes_of(graph):
    """Returns the calls in a model's graph, each after those whose outputs it reads."""
    return [node for depth in sorted(graph._nodes_by_depth, reverse=True) for node in graph._nodes_by_depth[depth]]


def operations_of(model):
    """Lists which operations each operation reads directly, in topological order; nested models are replaced by their layers.

    Returns:
        A dict from operation (a layer, or for example the sum of two tensors) to the set of operations that it reads.

    Raises:
        InputError: the model has no graph.
    """
    if graph_of(model) is None:
        raise InputError(f"The model {model.name!r} is subclassed or not built, so its units are not known: freeze by hand.")
    parents = {}

    def walk(graph, given):
        makers = {id(tensor): makers for tensor, makers in zip(graph.inputs, given, strict=True)}
        for node in nodes_of(graph):
            read = [makers.get(id(tensor), set()) for tensor in node.input_tensors]
            inner = graph_of(node.operation)
            if inner is None:
                if node.is_input:
                    read = [makers.get(id(tensor), set()) for tensor in node.outputs]
                parents.setdefault(node.operation, set()).update(*read)
                made = [{node.operation}] * len(node.outputs)
            elif len(read) == len(inner.inputs):
                made = walk(inner, read)
            else:  # the call leaves out optional inputs
                made = walk(inner, [set().union(*read)] * len(inner.inputs))
            makers.update(zip(map(id, node.outputs), made, strict=True))
        return [makers[id(tensor)] for tensor in graph.outputs]

    walk(graph_of(model), [set()] * len(graph_of(model).inputs))
    return parents


def _units(model, parents):
    layers = [operation for operation in parents if isinstance(operation, keras.Layer)]
    named = [_matched(layers, pattern, {1, 2}) for pattern in NAMED.values()]
    ended = [_between(_matched(layers, pattern, {1}), layers, parents) for pattern in ENDED.values()]
    known = [found for found in named + ended if len(found) > 1]
    if not known:
        raise InputError(
            f"The model {model.name!r} has no layers named as the units of a network of keras.applications or of "
            "l2sp_tf.models.resnets: freeze its layers by hand."
        )
    names = [layer.name for unit in known[0] for layer in unit]
    if len(known) > 1 or len(set(names)) < len(names):
        raise InputError(f"The model {model.name!r} holds more than one network of known units: freeze its layers by hand.")
    for number, unit in enumerate(known[0]):
        above = _reach(unit, parents)
        if misplaced := [layer.name for later in known[0][number + 1 :] for layer in later if layer in above]:
            raise InputError(
                f"The units of the model {model.name!r} do not follow one another ({misplaced[0]!r} lies upstream of "
                f"{unit[-1].name!r}, and the rest of its unit does not): freeze its layers by hand."
            )
    return known[0]


def _matched(layers, pattern, needed):
    """Lists the units of layers whose names match a pattern, or nothing unless exactly the `needed` captures of it matched."""
    found, captured = {}, set()
    for layer in layers:
        if match := re.fullmatch(pattern, layer.name):
            captured.add(match.lastindex)
            found.setdefault(match[match.lastindex], []).append(layer)
    place = {layer: number for number, layer in enumerate(layers)}
    return sorted(found.values(), key=lambda unit: place[unit[-1]]) if captured == needed else []


def _between(ends, layers, parents):
    """Lists the units of a network that names only the ends of blocks: its first convolution with batch norm, then the blocks."""
    if len(ends) < 2:
        return []
    above = _reach(ends[0], parents)
    for layer in layers:
        if layer in above and isinstance(layer, keras.layers.BatchNormalization):
            first = [other for other in layers if other is layer or other in parents[layer]]
            if any(isinstance(other, keras.layers.Conv2D) for other in first):
                break
    else:
        return []
    found = [first]
    done = _reach(found[0], parents)
    for end in ends:
        above = _reach(end, parents)
        found.append([layer for layer in layers if layer in above - done])
        done |= above
    return found


def _upstream(found, n, parents):
    """Lists the layers to freeze with unit n: its own, all that they read from, and branches beside it before unit n + 1."""
    children = {}
    for operation, read in parents.items():
        for parent in read:
            children.setdefault(parent, set()).add(operation)
    unit, following = found[n - 1], set(found[n]) if n < len(found) else set()
    if following:
        ends = {layer for layer in following if not _reach(parents[layer], parents) & following}
    else:
        ends = set().union(*(children.get(layer, set()) for layer in unit))
    beside = _reach(ends, parents) - _reach(unit, children) - following
    return [layer for layer in _reach(unit, parents) | beside if isinstance(layer, keras.Layer)]


def _reach(starts, edges):
    """Returns the starts and everything that the edges reach from them."""
    seen, waiting = set(starts), list(starts)
    while waiting:
        new = edges.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen
