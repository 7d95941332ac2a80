"""The head of a classifier: finds its layers, and replaces them."""

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from l2sp_tf.files.errors import InputError
from l2sp_tf.models.copies import detached_copy, infer, probes
from l2sp_tf.penalties.weights import keyed_weights

CONVOLUTIONS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)
SCORES = {"softmax", "sigmoid", "log_softmax", "log_sigmoid", "hard_sigmoid", "sparsemax"}
FEATURES = {
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "hard_silu", "mish", "tanh", "hard_tanh", "glu"),
    *("softplus", "softsign", "exponential", "exp", "squareplus", "sparse_plus", "sparse_sigmoid", "threshold"),
    *("hard_shrink", "soft_shrink", "tanh_shrink"),
}
POOLS = {
    3: keras.layers.GlobalAveragePooling1D,
    4: keras.layers.GlobalAveragePooling2D,
    5: keras.layers.GlobalAveragePooling3D,
}
NORMALIZATIONS = (
    *(keras.layers.BatchNormalization, keras.layers.LayerNormalization, keras.layers.GroupNormalization),
    *(keras.layers.RMSNormalization, keras.layers.Normalization),
)


@dataclasses.dataclass(frozen=True)
class Head:
    """The head that `head_of` finds.

    Attributes:
        layers: the paths of the layers and operations from the head to the output, in the order of the calls, such as
            ("mobilenet/conv_preds", "mobilenet/reshape_2", "mobilenet/predictions"); empty without a head.
        keys: the keys of the head's weights, as in `keyed_weights`.
    """

    layers: tuple
    keys: tuple


@dataclasses.dataclass
class _Step:
    """One operation on the way back from the output: its node in the graph, and the models around it."""

    models: tuple
    calls: tuple  # the calls of these models, each in the graph of the model around it
    node: object

    @property
    def operation(self):
        return self.node.operation

    @property
    def path(self):
        return "/".join([model.name for model in self.models[1:]] + [self.operation.name])


@dataclasses.dataclass
class _Found:
    """The end of the way back.

    Attributes:
        kind: "head"; "features", if there is no head and everything stays; or "unclear", if scores come from no single layer.
        steps: the `_Step`s from the output back to the head, included; without a head, to the end of the way.
        owners: the layers whose weights make the scores; several if it is unclear.
    """

    kind: str
    steps: list
    owners: list


def head_of(model):
    """Finds the original head of a classifier: the last layer with weights, if it makes logits or class scores.

    Args:
        model: a functional or Sequential model; with several outputs, all their heads are found.

    Returns:
        A `Head`. If the scores come from several layers, or from a layer that is neither Dense nor a 1x1 convolution,
        it lists all of these layers.

    Raises:
        InputError: the model is subclassed.
    """
    _check_graph(model, "head_of", "give it such a model")
    found = [_found_in(model, tensor) for tensor in model.outputs]
    found = [one for one in found if one.kind != "features"]
    own = {id(v) for one in found for owner in one.owners for v in owner.weights}
    keys = [key for key, weight in keyed_weights(model).items() if id(weight.variable) in own] if own else []
    layers = dict.fromkeys(step.path for one in found for step in reversed(one.steps))
    return Head(tuple(layers), tuple(keys))


def with_new_head(
    pretrained: keras.Model,
    num_classes: int,
    *,
    seed: int | None = None,
    bias: float = 0.0,
    say: Callable[[str], object] = print,
) -> keras.Model:
    """Copies a pre-trained classifier with a new, random last layer of logits, and says in one line what it replaced.

    The graph is followed back from the output, into nested models, to the last layer with weights. If that layer is Dense or
    a 1x1 convolution, and makes one number for each class, it is cut off with everything behind it. It does so if its
    activation and those behind it are linear, softmax or sigmoid. Otherwise the model is a backbone without a head and stays
    whole. Image features get global average pooling. The copy keeps layer names and weights and shares nothing with
    `pretrained`. The new layer is called "new_head", with a number appended if that name is taken.

    Args:
        pretrained: a built functional or Sequential model with one output.
        num_classes: number of classes of the target task.
        seed: the seed of the head's Glorot uniform initial weights.
        bias: the initial value of the head's biases.
        say: called with the line that says what was cut off.

    Returns:
        A functional Keras model that returns logits [b, num_classes].

    Raises:
        InputError: the model is subclassed or has several outputs; or the new layer would see class scores, of several
            classifiers or of a layer that is neither Dense nor a 1x1 convolution.
    """
    _check_graph(pretrained, "with_new_head", "build the new model from its layers, and give it to attach")
    if len(pretrained.outputs) != 1:
        raise InputError(f"The model {pretrained.name!r} has {len(pretrained.outputs)} outputs: with_new_head needs one.")
    copy = detached_copy(pretrained)
    found = _found_in(copy, copy.outputs[0])
    if found.kind == "unclear":
        _refuse_scores(pretrained, ", ".join(dict.fromkeys(owner.name for owner in found.owners)))
    features = _features(copy, found)
    names = {layer.name for layer in copy.layers}
    x = _flat(features, names, found.kind == "head" and len(copy.outputs[0].shape) == 2)
    initial = {"kernel_initializer": keras.initializers.GlorotUniform(seed=seed)}
    if bias:
        initial["bias_initializer"] = keras.initializers.Constant(bias)
    layer = keras.layers.Dense(num_classes, name=_unused("new_head", names), **initial)
    inputs = inputs_of(copy)
    model = keras.Model(inputs, layer(x), name=pretrained.name)
    model._trainable = copy._trainable
    if found.kind == "head" and _are_scores(keras.Model(inputs, x)):
        _refuse_scores(pretrained, features._keras_history.operation.name)
    say(_sentence(pretrained, num_classes, found, features))
    return model


def _check_graph(model, function, advice):
    if not isinstance(model, keras.Model) or getattr(model, "inputs", None) is None:
        raise InputError(f"{function} needs a functional or Sequential model, not {type(model).__name__}: {advice}.")


def _refuse_scores(model, names):
    raise InputError(
        f"The output of the model {model.name!r} is class scores of {names}, which a new head cannot use as features: "
        "build a model that ends before them, and give it to with_new_head."
    )


def _sentence(pretrained, num_classes, found, features):
    classes = f"({num_classes} class{'es' if num_classes != 1 else ''})"
    if found.kind == "head":
        cut = ", ".join(step.path for step in reversed(found.steps))
        return f"The new head {classes} takes the place of {cut} of the model {pretrained.name}."
    name = features._keras_history.operation.name
    return f"The new head {classes} stands on the output of {name} of the model {pretrained.name}; nothing was cut off."


def _found_in(model, tensor):
    """Finds the layers that make an output; an output that looks like class scores on an example is treated as such."""
    found = _find(tensor, (model,), ())
    if found.kind == "features" and found.owners and _are_scores(keras.Model(inputs_of(model), tensor)):
        found = _find(tensor, (model,), (), scores=True)
        found.kind = "head" if found.kind == "head" else "unclear"
    return found


def _find(tensor, models, calls, scores=False):
    """Follows the graph back from a tensor to the layers that make it.

    Args:
        tensor: in the graph of the innermost of `models`.
        models, calls: as in a `_Step`.
        scores: whether the tensor is known to become class scores.
    """
    steps = []
    end = _back(tensor, models, calls, steps)
    scores = scores or _makes_scores(steps[:-1])
    while end is not None and scores and isinstance(end.operation, NORMALIZATIONS):  # a normalization of logits, before a softmax
        end = _back(end.node.input_tensors[0], end.models, end.calls, steps)
    owners = [step.operation for step in steps if _weights_of(step.operation)]
    if end is None:
        return _Found("features", steps, owners)
    if not _weights_of(end.operation):
        return _of_several(end, steps, scores)
    if _is_head(end, steps[:-1], scores):
        return _Found("head", steps, owners)
    is_unclear = scores or (_activation(end.operation) in SCORES and _is_linear(end.operation))
    return _Found("unclear" if is_unclear else "features", steps, owners)


def _of_several(end, steps, scores):
    """Judges an operation that joins several tensors: a sum of class scores is unclear, branches without a head are features."""
    branches = [_find(tensor, end.models, end.calls, scores) for tensor in _sources(end)]
    owners = list({id(owner): owner for branch in branches for owner in branch.owners}.values())
    ends = {id(branch.steps[-1].operation) for branch in branches if branch.steps}
    heads = all(branch.kind == "head" for branch in branches)
    if heads and len(ends) == 1:  # one head on every branch, as in z / sum(z)
        longest = max(branches, key=lambda branch: len(branch.steps))
        return _Found("head", steps + longest.steps, owners)
    are_scores = all(branch.kind != "features" for branch in branches) and (
        _is_sum(end.operation) or all(branch.kind == "unclear" or _makes_scores(branch.steps) for branch in branches)
    )
    return _Found("unclear" if scores or are_scores else "features", steps, owners)


def _back(tensor, models, calls, steps):
    """Goes back past operations without weights, and appends each operation to `steps`.

    Returns:
        The first step with weights or with several input tensors; None at the inputs.
    """
    while True:
        operation, index, position = tensor._keras_history
        if isinstance(operation, keras.layers.InputLayer):
            if not calls:
                return None
            tensor = _outer(tensor, models, calls)
            models, calls = models[:-1], calls[:-1]
            continue
        node = operation._inbound_nodes[index]
        graph = _graph(operation)
        if graph is not None:
            tensor, models, calls = graph.outputs[position], (*models, operation), (*calls, node)
            continue
        step = _Step(models, calls, node)
        steps.append(step)
        if not _sources(step):
            return None
        if _weights_of(operation) or len(_sources(step)) != 1:
            return step
        tensor = node.input_tensors[0]


def _outer(tensor, models, calls):
    """Returns the tensor that a nested model is called with for one of its inputs."""
    graph = _graph(models[-1])
    place = next(number for number, x in enumerate(graph.inputs) if x is tensor)
    return calls[-1].input_tensors[place]


def _graph(operation):
    """Returns the functional model that an operation is or contains, or None."""
    graph = getattr(operation, "_functional", None) or operation
    return graph if isinstance(graph, keras.Model) and hasattr(graph, "_run_through_graph") else None


def _sources(step):
    """Returns the distinct tensors that an operation takes, without masks: a mask only says which entries count."""
    masks = {id(x) for x in keras.tree.flatten(step.node.arguments.kwargs.get("mask"))}
    return list({id(x): x for x in step.node.input_tensors if id(x) not in masks}.values())


def _weights_of(operation):
    return operation.weights if isinstance(operation, keras.Layer) else []


def _judged(operation):
    """Returns the layer inside any wrappers."""
    while isinstance(operation, keras.layers.Wrapper):
        operation = operation.layer
    return operation


def _activation(operation):
    """Returns the name of the activation that an operation is or ends with, or None."""
    operation = _judged(operation)
    activation = getattr(operation, "activation", None)
    if callable(activation):
        name = getattr(activation, "__name__", None) or getattr(activation, "name", type(activation).__name__)
        return _snake(name)
    return _snake(type(operation).__name__)


def _snake(name):
    """Returns the function name of an operation's class, such as log_softmax for LogSoftmax."""
    if name.isupper() or name in ("ReLU", "LeakyReLU", "PReLU"):
        return {"ReLU": "relu", "LeakyReLU": "leaky_relu", "PReLU": "relu"}.get(name, name.lower())
    return "".join(f"_{c.lower()}" if c.isupper() and number else c.lower() for number, c in enumerate(name))


def _makes_scores(steps):
    return any(_activation(step.operation) in SCORES for step in steps)


def _is_linear(operation):
    return isinstance(_judged(operation), (keras.layers.Dense, keras.layers.EinsumDense, *CONVOLUTIONS))


def _is_sum(operation):
    """Whether an operation or layer combines numbers of the same class."""
    return type(operation).__name__ in ("Add", "Average", "Subtract", "Maximum", "Minimum", "Multiply", "Mean", "Sum", "Stack")


def _is_head(step, behind, scores):
    """Whether a layer makes one number for each class.

    Args:
        step: the `_Step` of the layer.
        behind: the steps from the layer to the output.
        scores: whether the output is known to be class scores.
    """
    layer = _judged(step.operation)
    names = {_activation(layer), *(_activation(other.operation) for other in behind)}
    scores = scores or bool(names & SCORES)
    if not scores and (names & FEATURES or not _is_known(layer)):
        return False
    shape = step.node.input_tensors[0].shape
    if isinstance(layer, keras.layers.Dense):
        return True
    if isinstance(layer, keras.layers.EinsumDense):
        return len(shape) == 2
    if not isinstance(layer, CONVOLUTIONS) or set(layer.kernel_size) != {1}:
        return False
    spatial = shape[1:-1] if layer.data_format == "channels_last" else shape[2:]
    return set(spatial) == {1} or scores or any(_pools(other) for other in behind)


def _is_known(layer):
    """Whether a layer has a linear activation, a score or none, so that its outputs are known."""
    activation = getattr(layer, "activation", None)
    return activation is None or _activation(layer) in {"linear", *SCORES}


def _pools(step):
    return "Global" in type(step.operation).__name__ or type(step.operation).__name__ in ("Mean", "Max")


def _features(model, found):
    """Returns the tensor that the new head takes as input; a nested model with the head inside is rebuilt to end there."""
    if found.kind != "head":
        return model.outputs[0]
    step = found.steps[-1]
    tensor = step.node.input_tensors[0]
    for inner, call in zip(reversed(step.models[1:]), reversed(step.calls), strict=True):
        if _graph(inner) is not None and len(_calls_of(inner)) > 1:
            raise InputError(f"The model {inner.name!r} is called more than once: with_new_head cannot end it earlier.")
        shorter = keras.Model(inputs_of(inner), tensor, name=inner.name)
        shorter._trainable = inner._trainable
        tensor = shorter(*call.arguments.args, **call.arguments.kwargs)
    return tensor


def inputs_of(model):
    """Returns a model's inputs in the structure that it takes, or its only input."""
    structure = getattr(_graph(model), "_inputs_struct", None)
    return structure if isinstance(structure, dict) or len(model.inputs) > 1 else model.inputs[0]


def _calls_of(model):
    """Returns the calls of a nested model, without the one that created a functional model."""
    return [node for node in model._inbound_nodes if not node.is_input and node.outputs[0] not in model.outputs]


def _flat(x, names, is_pooled):
    """Turns features into [b, c]: averages images over positions, and sequences if the old head's were; flattens one position."""
    rank = len(x.shape)
    if rank not in POOLS or (rank == 3 and not is_pooled):
        return x
    if set(x.shape[1:-1]) == {1}:
        return keras.layers.Flatten(name=_unused("new_flatten", names))(x)
    return POOLS[rank](name=_unused("new_pool", names))(x)


def _unused(name, names):
    return next(n for n in (name, *(f"{name}_{number}" for number in range(2, len(names) + 3))) if n not in names)


def _are_scores(features):
    """Whether features are non-negative and sum to 1 on a made-up example, as class scores do."""
    for inputs in probes(features):
        try:
            (x,) = infer(features, inputs)
        except Exception:  # a made-up input may make any model fail
            continue
        x = x.astype("float64")
        return x.ndim > 1 and x.shape[-1] > 1 and bool(np.all(x >= 0) and np.all(np.abs(x.sum(axis=-1) - 1) < 1e-3))
    return False
