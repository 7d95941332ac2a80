"""Copies models, and values into models, with all the state that layers derive or keep outside their weights."""

import inspect
import tempfile
import warnings

import keras
import numpy as np
from keras.src.saving.serialization_lib import SafeModeScope  # a live Lambda is trusted, unlike a file

from l2sp_tf.files.errors import InputError
from l2sp_tf.penalties.assignment import finish, is_custom, is_merged, own_weights, said_by, title
from l2sp_tf.penalties.weights import drop_penalties, keyed_weights

TOLERANCE = 1e-5  # of the largest entry
SETTINGS = (keras.initializers.Initializer, keras.regularizers.Regularizer, keras.constraints.Constraint)
CARRIED = {"name", "trainable", "_trainable", "_called", "_parent_path"}  # the last two come with the first call
LOOKUPS = (keras.layers.StringLookup, keras.layers.IntegerLookup)


def detached_copy(model):
    """Copies a functional or Sequential model, without our penalties. The copy computes the same and shares nothing.

    The copy has the weights, the adapted state, the `trainable` flags and the call arguments of the original. Its random
    layers draw their own seeds, and it is not compiled. Both models are compared on one made-up example.

    Raises:
        InputError: a layer cannot be rebuilt from its configuration, its state cannot be copied, or the outputs differ;
            the message names the layer.
    """
    copy = copy_of(model)
    if copy.weights:
        drop_penalties(keyed_weights(copy))
    return copy


def copy_of(model, *, scope=None, seeds=False):
    """Copies a model as `detached_copy` does, but keeps the regularizers that the layers' configurations name.

    Args:
        model: a functional or Sequential model.
        scope: a context in which to create the copy's variables; None for no context.
        seeds: whether the copy's random layers draw the original's numbers.

    Raises:
        InputError: as in `detached_copy`.
    """
    if not model.built:
        raise InputError(f"The model {model.name!r} is not built: call it on an input before it is copied.")
    made = {}
    if scope is None:
        copy = _rebuilt(model, made)
    else:
        with scope:
            copy = _rebuilt(model, made)
    pairs = _pairs(made)
    for one, two in pairs:
        _carry(one, two)
        if seeds:
            for a, b in zip(one._seed_generators, two._seed_generators, strict=True):
                b.state.assign(a.state.numpy())
    for one, two in pairs:  # the public setter would also set the layers inside
        two._trainable = one._trainable
    for one, two in pairs:
        for a, b in _own_pairs(one, two):
            b.trainable = a.trainable
    check_same(model, copy)
    return copy


def copy_variables(source, target):
    """Assigns the values of all variables of `source`, random seeds included, to `target`, a model of the same architecture.

    Raises:
        InputError: a layer cannot derive its state from the values; the message names it.
    """
    for one, two in zip(_state(source), _state(target), strict=True):
        two.assign(one.numpy())
    finish(target._flatten_layers())


def carry_tables(source, target):
    """Copies the vocabularies of `source`'s lookup layers to those of `target`, a model of the same architecture.

    Raises:
        InputError: the models have different numbers of lookup layers.
    """
    ones, twos = ([layer for layer in model._flatten_layers() if isinstance(layer, LOOKUPS)] for model in (source, target))
    if len(ones) != len(twos):
        raise InputError(f"The model {target.name!r} has {len(twos)} lookup layers, but the model of the values has {len(ones)}.")
    for one, two in zip(ones, twos, strict=True):
        _carry_vocabulary(one, two)


def _rebuilt(operation, made):
    """Rebuilds a layer, model or operation with new weights, or returns the copy that was already built."""
    if id(operation) not in made:
        if _is_graph(operation):
            copy = _graph_or_whole_rebuilt(operation, made)
        elif isinstance(operation, keras.Sequential):
            copy = keras.Sequential([_rebuilt(layer, made) for layer in operation._layers], name=operation.name)
        elif isinstance(operation, keras.layers.InputLayer):
            copy = _input_rebuilt(operation)
        else:
            copy = _layer_rebuilt(operation)
        made[id(operation)] = operation, copy
    return made[id(operation)][1]


def _is_graph(operation):
    """Whether this is a functional model whose `call` runs its graph."""
    if not isinstance(operation, keras.Model) or not hasattr(operation, "_run_through_graph"):
        return False
    return type(operation).call.__module__.startswith("keras.")


def _graph_or_whole_rebuilt(model, made):
    """Rebuilds a functional model layer by layer; if that fails, by the configuration of the model as a whole.

    A model with a constructor of its own, such as a backbone of KerasHub, makes layers whose own configurations may not do.
    """
    before = dict(made)
    try:
        return _graph_rebuilt(model, made)
    except InputError as error:
        made.clear()
        made.update(before)
        copy = None if _is_made_of_tensors(type(model)) else _whole_rebuilt(model)
        layers = [] if copy is None else [*zip(model._flatten_layers(), copy._flatten_layers(), strict=True)]
        if copy is None or any(id(one) in made and one.weights for one, _ in layers):  # else a shared layer would be copied twice
            raise error
        for one, two in reversed(layers):  # inner layers first, as when each is rebuilt
            made.setdefault(id(one), (one, two))
        return copy


def _whole_rebuilt(model):
    """Makes a model again from its own configuration; returns None if that fails or gives any other layers."""
    try:
        copy = type(model).from_config(model.get_config())
        pairs = [*zip(model._flatten_layers(), copy._flatten_layers(), strict=True)]
        is_same = all(type(one) is type(two) and _settings_of(one) == _settings_of(two) for one, two in pairs)
    except Exception:  # a custom model may raise anything; the layer's error is the one to report
        return None
    return copy if is_same else None


def _settings_of(layer):
    """Returns all that is known of a layer besides its values, comparable with that of a copy: weights, options and functions."""
    own = [(variable.name, tuple(variable.shape), variable.dtype) for variable in own_weights(layer)]
    # the configurations of Keras' own layers tell all; a graph computes by its layers, and keeps how it was compiled
    kept = {} if type(layer).__module__.startswith("keras.") or _is_graph(layer) else vars(layer)
    kept = {
        name: value
        for name, value in kept.items()
        if isinstance(value, (bool, int, float, str)) or (inspect.isfunction(value) and not hasattr(type(layer), name))
    }
    try:
        config = {name: None if _is_penalty(layer, name) else value for name, value in layer.get_config().items()}
    except Exception as error:  # some layers of KerasHub have none that works; their copies then have none either
        config = type(error).__name__
    return [own, [layer.name] if own else [], _comparable(kept), _comparable(config)]  # Keras numbers layers without weights


def _is_penalty(layer, name):
    """Whether an option of a layer is one of our penalties, which whoever copies a model drops or sets."""
    return bool(getattr(getattr(layer, name, None), "is_penalty", False))


def _comparable(value):
    """Turns a layer's options into values that are equal if they mean the same; those that a copy takes over are left out."""
    if isinstance(value, dict):
        return {name: _comparable(inner) for name, inner in value.items() if name not in CARRIED}
    if isinstance(value, (list, tuple)):
        return [_comparable(inner) for inner in value]
    if isinstance(value, np.ndarray):
        return value.dtype, value.shape, value.tobytes()
    if inspect.isfunction(value):
        return value.__code__, _comparable([cell.cell_contents for cell in value.__closure__ or ()])
    if callable(getattr(value, "get_config", None)):
        return type(value), _comparable(value.get_config())
    return value


def _is_made_of_tensors(cls):
    """Whether the constructor of a functional model takes its inputs and outputs, and so no configuration of its own."""
    return list(inspect.signature(cls.__init__).parameters)[1:3] == ["inputs", "outputs"]


def _graph_rebuilt(model, made):
    def call(copy, *args, **kwargs):
        try:
            return copy(*args, **kwargs)
        except Exception as error:  # a custom layer may raise anything
            raise InputError(f"The layer {title(copy)} cannot be called again in a copy: {said_by(error)}.") from error

    inputs = keras.tree.map_structure(lambda x: _rebuilt(x._keras_history.operation, made).output, model.input)
    outputs = model._run_through_graph(inputs, operation_fn=lambda operation: _rebuilt(operation, made), call_fn=call)
    cls = type(model) if _is_made_of_tensors(type(model)) else keras.Model
    return cls(inputs, outputs, name=model.name)


def _input_rebuilt(layer):
    options = {name: getattr(layer, name) for name in ("batch_shape", "dtype", "sparse", "ragged", "optional", "name")}
    return keras.layers.InputLayer(**options)


def _layer_rebuilt(layer):
    parts = layer._flatten_layers() if isinstance(layer, keras.Layer) else [layer]
    try:
        with keras.saving.custom_object_scope(_objects_of(parts)), SafeModeScope(False), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
            copy = type(layer).from_config(_config_of(layer))
    except Exception as error:  # a custom layer may raise anything
        raise InputError(
            f"The layer {title(layer)} cannot be made again from its configuration: {said_by(error)}; give it a get_config "
            "with all arguments of its constructor."
        ) from error
    for one, two in zip(parts, copy._flatten_layers() if isinstance(layer, keras.Layer) else [copy], strict=False):
        for name, value in _functions_of(one).items():
            if inspect.isfunction(getattr(two, name, None)):
                setattr(two, name, value)  # a deserialized lambda has lost its module's names
    return copy


def _config_of(layer):
    """Returns a layer's configuration with its lambdas as objects, because Keras cannot read the lambdas that it writes."""
    lambdas = {name: value for name, value in _functions_of(layer).items() if value.__name__ == "<lambda>"}
    config = layer.get_config()
    if not isinstance(layer, keras.layers.Lambda):  # it reads the lambda that it wrote
        config |= {name: value for name, value in lambdas.items() if name in config}
    return config


def _functions_of(layer):
    """Returns, by attribute, the functions that a layer was given, such as activations; methods and Keras' own do not count."""
    return {
        name: value
        for name, value in vars(layer).items()
        if inspect.isfunction(value) and not hasattr(type(layer), name) and not str(value.__module__).startswith("keras.")
    }


def _objects_of(parts):
    """Returns, by name, the classes and functions that a layer's configuration may name."""
    found = {}
    for part in parts:
        found[type(part).__name__] = type(part)
        found |= {value.__name__: value for value in _functions_of(part).values()}
        found |= {type(value).__name__: type(value) for value in vars(part).values() if isinstance(value, SETTINGS)}
    return found


def _pairs(made):
    """Pairs each layer of the original, inner ones included, with its copy; a model's parts come before the model."""
    found, copies = {}, set()
    for one, two in made.values():
        if isinstance(one, keras.Layer):
            if not two.built and one.built:
                two.build_from_config(one.get_build_config())
            ones = [layer for layer in one._flatten_layers() if id(layer) not in found]
            twos = [layer for layer in two._flatten_layers() if id(layer) not in copies]
            if _is_graph(one) and len(ones) != len(twos):
                # inputs that models share, and layers beside the graph, compute nothing
                ones, twos = ([layer for layer in layers if layer.variables] for layers in (ones, twos))
            if len(ones) != len(twos):
                raise InputError(f"The layer {title(one)} cannot be copied: the copy has other layers inside.")
            found |= {id(a): (a, b) for a, b in zip(ones, twos, strict=True)}
            copies |= {id(b) for b in twos}
    return list(found.values())


def _carry(one, two):
    """Copies a layer's own weights and its other state, without the layers inside."""
    for a, b in _own_pairs(one, two):
        b.assign(a.numpy())
    try:
        for a, b in zip(_unlisted(one), _unlisted(two), strict=True):
            b.assign(a.numpy())
        if isinstance(one, LOOKUPS):
            _carry_vocabulary(one, two)
        else:
            _carry_kept(one, two)
    except Exception as error:  # a custom layer may raise anything
        raise InputError(
            f"The layer {title(one)} cannot be copied, as its state cannot be carried over: {said_by(error)}."
        ) from error
    finish([two])


def _carry_kept(one, two):
    """Copies the extra state of custom layers with the methods by which Keras saves and loads it."""
    if is_custom(one, "load_own_variables") and not is_merged(one):
        store = {}
        one.save_own_variables(store)
        two.load_own_variables({name: np.asarray(value) for name, value in store.items()})
    if is_custom(one, "save_assets") and is_custom(one, "load_assets"):
        with tempfile.TemporaryDirectory() as folder:
            one.save_assets(folder)
            two.load_assets(folder)


def _carry_vocabulary(one, two):
    """Copies the table of a lookup layer in memory: a file would split words at line ends."""
    vocabulary = one.get_vocabulary()
    if one.lookup_table.size() == 0:
        return
    idf = one.idf_weights_const.numpy()[: len(vocabulary)] if one.output_mode == "tf_idf" else None
    if vocabulary != two.get_vocabulary() or idf is not None:
        two._frozen_vocab_size = None  # it belongs to the table that is replaced
        two.set_vocabulary(vocabulary, idf_weights=idf)


def _own_pairs(one, two):
    """Pairs a layer's own weights with those of its copy: in order, or by name if the copy created them in another order."""
    ones, twos = own_weights(one), own_weights(two)
    named = {variable.name: variable for variable in twos}
    if [v.name for v in ones] != [v.name for v in twos] and {v.name for v in ones} == set(named) and len(named) == len(ones):
        twos = [named[variable.name] for variable in ones]
    if [v.shape for v in ones] != [v.shape for v in twos]:
        raise InputError(
            f"The layer {title(one)} cannot be copied: its configuration makes weights of shapes "
            f"{[tuple(v.shape) for v in twos]}, but it has {[tuple(v.shape) for v in ones]}."
        )
    return list(zip(ones, twos, strict=True))


def _unlisted(layer):
    """Returns variables outside of `layer.variables`, such as the states of a stateful LSTM."""
    listed = {id(variable) for variable in layer.variables}
    held = [
        v for name, v in vars(layer).items() if not name.startswith("_") and isinstance(v, (keras.Variable, list, tuple, dict))
    ]
    leaves = {id(leaf): leaf for leaf in keras.tree.flatten(held) if isinstance(leaf, keras.Variable)}
    return [leaf for key, leaf in leaves.items() if key not in listed]


def _state(model):
    return [*model.variables, *(variable for layer in model._flatten_layers() for variable in _unlisted(layer))]


def check_same(model, copy):
    """Compares a model with its copy on one made-up example, in inference mode; neither changes.

    Raises:
        InputError: the outputs differ; the message names the first layer whose output does.
    """
    for inputs in probes(model):
        try:
            expected = infer(model, inputs)
        except Exception:  # a made-up input may make any model fail
            continue
        try:
            found = infer(copy, inputs, like=model)
        except Exception as error:
            raise InputError(f"The copy of the model {model.name!r} does not compute: {said_by(error)}.") from error
        if not _are_close(expected, found):
            raise InputError(_difference(model, copy, inputs))
        return
    warnings.warn(
        f"The copy of the model {model.name!r} could not be compared with it, because the model fails on made-up inputs.",
        stacklevel=4,
    )


def infer(model, inputs, *, like=None):
    """Returns a model's outputs in inference mode as arrays, without changing its state.

    Args:
        model: a built model.
        inputs: arrays or tensors in the structure of the model's inputs.
        like: a model of the same architecture whose random seeds are used.
    """
    with _stateless(model, like):
        return [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(model(inputs, training=False))]


def _stateless(model, like):
    """Returns a scope in which no variable changes and random layers use the seeds of `like`."""
    seeds = zip(_seeds(model), _seeds(like or model), strict=True)
    return keras.StatelessScope(state_mapping=[(own, other.value) for own, other in seeds])


def _seeds(model):
    return [generator.state for layer in model._flatten_layers() for generator in layer._seed_generators]


def probes(model):
    """Yields made-up inputs of one example in the structure of the model's inputs; unknown sides are tried at several sizes."""
    specs = getattr(getattr(model, "_functional", None) or model, "_inputs_struct", None)
    if specs is None:
        return
    words = [word for layer in model._flatten_layers() if isinstance(layer, LOOKUPS) for word in layer.get_vocabulary()[-3:]]
    is_fixed = all(None not in spec.shape[1:] for spec in keras.tree.flatten(specs))
    for scale in (1,) if is_fixed else (1, 2, 4):
        rng = np.random.default_rng(0)
        yield keras.tree.map_structure(lambda spec: _made_up(spec, scale, words, rng), specs)  # noqa: B023 (used at once)


def _made_up(spec, scale, words, rng):
    side = scale * (32 if len(spec.shape) > 3 else 8)
    shape = (spec.shape[0] or 1, *(length or side for length in spec.shape[1:]))
    if spec.dtype == "string":
        words = [str(word) for word in words] or ["a", "b"]
        return np.resize(np.array([" ".join(words), *words], object), shape)
    if keras.backend.is_float_dtype(spec.dtype):
        return keras.ops.convert_to_tensor(rng.normal(size=shape), dtype=spec.dtype)
    numbers = rng.integers(0, 2, shape)
    numbers.flat[0] = 1  # so that a mask does not hide everything
    return keras.ops.convert_to_tensor(numbers, dtype=spec.dtype)


def _are_close(expected, found):
    return len(expected) == len(found) and all(_is_close(a, b) for a, b in zip(expected, found, strict=True))


def _is_close(a, b):
    """Whether two arrays differ by rounding only: at most 1e-5 of the largest finite entry; NaN equals NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind not in "fcV" or not a.size:  # bfloat16 is of kind V
        return bool(np.array_equal(a, b))
    a, b = (x if x.dtype.kind == "c" else x.astype("float64") for x in (a, b))
    if not np.array_equal(np.isnan(a), np.isnan(b)) or not np.array_equal(np.isinf(a), np.isinf(b)):
        return False
    is_finite = np.isfinite(a)
    a, b = a[is_finite], b[is_finite]
    return not a.size or bool(np.abs(a - b).max() <= TOLERANCE * np.abs(a).max())


def _difference(model, copy, inputs):
    """Returns a message that names the first layer whose output differs in the copy."""
    trails = [], []
    for one, like, trail in zip((model, copy), (model, model), trails, strict=True):
        with _stateless(one, like):
            _trace(one, inputs, trail)
    for (layer, a), (_, b) in zip(*trails, strict=True):
        if not _are_close(*([keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(out)] for out in (a, b))):
            return (
                f"The layer {title(layer)} computes something else in a copy of the model {model.name!r}: let its "
                "save_own_variables and load_own_variables, or its get_config, carry the state that it keeps."
            )
    return f"A copy of the model {model.name!r} computes something else than the model: give a functional or Sequential one."


def _trace(model, inputs, trail):
    """Runs the graph of a model and of the models inside it, and appends each operation with its output to `trail`."""
    graph = getattr(model, "_functional", None) or model
    if not hasattr(graph, "_run_through_graph"):
        return model(inputs, training=False)

    def call(operation, *args, **kwargs):
        if _is_graph(getattr(operation, "_functional", None) or operation):
            output = _trace(operation, args[0], trail)
        else:
            if getattr(operation, "_call_has_training_arg", False):
                kwargs["training"] = False
            output = operation(*args, **kwargs)
        trail.append((operation, output))
        return output

    return graph._run_through_graph(graph._standardize_inputs(inputs), operation_fn=lambda operation: operation, call_fn=call)
