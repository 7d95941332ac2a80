"""Weights and models in files: reads them without running what they ask for, and writes `.keras` files with their interface."""

import io
import itertools
import pathlib
import tempfile
import zipfile

import h5py
import keras

from l2sp_tf.files.arrays import Snapshot, read_header
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import SPARE_BYTES, h5_shapes, open_zip, parse_json, refusing, variables_within
from l2sp_tf.files.writing import atomic_path
from l2sp_tf.models.copies import carry_tables, detached_copy
from l2sp_tf.models.pixels import Interface, PixelFormat
from l2sp_tf.models.presets import INSTALL, keras_hub
from l2sp_tf.penalties.assignment import assign
from l2sp_tf.penalties.matching import restore
from l2sp_tf.penalties.weights import keyed_weights, values_of

# members of the zip of a .keras file; older files have the first alone
PIXELS_MEMBER, INTERFACE_MEMBER = "l2sp_tf/pixels.json", "l2sp_tf/interface.json"
KINDS = ".safetensors, .weights.h5, .h5 or .keras"
HEAD = {"predictions/kernel", "predictions/bias"}
MAX_MEMBER_BYTES = 10_000_000


def load_weights(model, path):
    """Loads a `.safetensors`, `.weights.h5`, `.h5` or `.keras` file into a built model of the same architecture.

    A `.h5` file is one in Keras' older format, as the weights of keras.applications are published. Where a file has all
    weights but those of the layer "predictions", that layer keeps its own.

    Raises:
        InputError: the file is missing, damaged, of an unknown kind, or of another architecture (the
            message lists both sides); the model then keeps its weights.
    """
    path = existing(path)
    if path.suffix == ".safetensors":
        stored = Snapshot.load(path)
        own = {} if HEAD & stored.keys() else {key: value for key, value in values_of(model).items() if key in HEAD}
        restore(model, {**stored, **own})
    elif path.suffix == ".keras":
        loaded = load_model(path)
        restore(model, values_of(loaded))
        carry_tables(loaded, model)
    elif path.name.endswith(".weights.h5"):
        _check_h5(model, path)
        before = values_of(model)
        try:
            with refusing(f"The weights file {path} is damaged"):
                model.load_weights(path)
        except InputError:
            assign(model, before)
            raise
    elif is_published(path):
        assign(model, _published_values(model, path))
    else:
        raise InputError(f"The weights file {path} is of an unknown kind: give a {KINDS} file.")


def existing(path):
    """Returns the path of a file that exists; raises InputError otherwise."""
    path = pathlib.Path(path)
    if not path.is_file():
        or_preset = "" if path.suffix else f", or install KerasHub for its presets: {INSTALL}"
        raise InputError(f"There is no weights file {path}: give the path of a {KINDS} file{or_preset}.")
    return path


def is_published(path):
    """Whether a file's name ends as those of the weights of keras.applications do: `.h5`, but not `.weights.h5`."""
    return str(path).endswith((".h5", ".hdf5")) and not str(path).endswith(".weights.h5")


def _published_values(model, path):
    """Reads a file in Keras' older format, which lists the arrays of each layer with weights in the order of the layers.

    Returns:
        A dict from the key of each weight to its array, without those of the head if the file has none.
    """
    what = f"The weights file {path} is damaged or not in the format of keras.applications"
    with refusing(what), h5py.File(path) as file:
        shapes = h5_shapes(file, path.stat().st_size)
        root = file if _names(file, "layer_names") else file["model_weights"]
        groups = {name: _names(root[name], "weight_names") for name in _names(root, "layer_names")}
        found = {name: [root[name][weight] for weight in weights] for name, weights in groups.items() if weights}
        if {array.name.lstrip("/") for arrays in found.values() for array in arrays} - shapes.keys():
            raise ValueError("it lists arrays that it does not hold")
        layers = {layer.name: layer.trainable_weights + layer.non_trainable_weights for layer in model.layers if layer.weights}
        if len(found) == len(layers) - 1:
            layers.popitem()  # the file has no head
        own = [(name, [tuple(variable.shape) for variable in variables]) for name, variables in layers.items()]
        other = [(name, [array.shape for array in arrays]) for name, arrays in found.items()]
        if [shapes for _, shapes in own] != [shapes for _, shapes in other]:
            _refuse_published(model, path, own, other)
        variables = [id(variable) for group in layers.values() for variable in group]
        values = dict(zip(variables, (array[()] for arrays in found.values() for array in arrays), strict=True))
    return {key: values[id(weight.variable)] for key, weight in keyed_weights(model).items() if id(weight.variable) in values}


def _refuse_published(model, path, own, other):
    pairs = itertools.zip_longest(own, other, fillvalue=("missing", []))
    wrong = [f"{a[0]} {a[1]} / {b[0]} {b[1]}" for a, b in pairs if a[1] != b[1]]
    more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
    raise InputError(
        f"{path} is not of the architecture of the model {model.name!r} (model / file: {'; '.join(wrong[:3])}{more}): "
        "choose the --backbone that it was published for."
    )


def _names(group, attribute):
    """Returns the names that an attribute of an HDF5 group lists; a long list is split over attributes with a number."""
    parts = [attribute] if attribute in group.attrs else []
    parts = parts or list(itertools.takewhile(group.attrs.__contains__, (f"{attribute}{i}" for i in itertools.count())))
    names = [name for part in parts for name in group.attrs[part]]
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


def has_head(path, model):
    """Whether a file of weights for a model holds those of its head, the layer "predictions" or the last with weights.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = existing(path)
    if path.suffix == ".safetensors":
        return read_header(path)[1].keys() >= HEAD
    if not is_published(path):
        return True
    return _published_values(model, path).keys() == keyed_weights(model).keys()


def _check_h5(model, path):
    """Compares the arrays of a `.weights.h5` file with those the model would write, because Keras skips some that differ."""
    with tempfile.TemporaryDirectory() as folder:
        own = pathlib.Path(folder) / "own.weights.h5"
        model.save_weights(own)
        expected = _h5_shapes(own)
    with refusing(f"The weights file {path} is damaged"):
        found = _h5_shapes(path)
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if wrong:
        listed = "; ".join(f"{name} {expected.get(name, 'missing')} / {found.get(name, 'missing')}" for name in wrong[:5])
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(f"{path} is not of the architecture of the model {model.name!r} (model / file: {listed}{more}).")


def _h5_shapes(path):
    with h5py.File(path) as file:
        shapes = h5_shapes(file, path.stat().st_size)
    return {name: shape for name, shape in shapes.items() if not name.startswith("optimizer")}


def load_model(path):
    """Reads a `.keras` file without its optimizer, and without running any code that it asks for.

    Raises:
        InputError: the file is missing, is damaged, has unknown layers, or needs more memory than its size allows.
    """
    path = pathlib.Path(path)
    if not path.is_file() or path.suffix != ".keras":
        raise InputError(f"There is no model file {path}: give the path of a .keras file.")
    what = f"The model file {path} cannot be loaded"
    with open_zip(path) as archive, refusing(what):
        text = archive.read("config.json")
        parse_json(text, what)
        if b"keras_hub>" in text:
            keras_hub()
        with h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as file:
            h5_shapes(file, path.stat().st_size)
    # the file holds the values of almost all variables; a model may create a few more
    with refusing(what), variables_within(most_bytes(path), what + ", as it has"):
        return keras.models.load_model(path, compile=False, safe_mode=True)


def most_bytes(path):
    """Returns how many bytes a model's variables may take if a file holds their values, perhaps in fewer bits."""
    return 4 * path.stat().st_size + SPARE_BYTES


def save_model(model, path, interface):
    """Writes a copy of a functional or Sequential model, without penalties, to a `.keras` file with its interface.

    Args:
        model: the model.
        path: the file.
        interface: an `Interface`, or a `PixelFormat` if nothing more is known, or None if nothing is.

    Raises:
        OSError: the file cannot be written.
    """
    members = {} if interface is None else {PIXELS_MEMBER: interface}
    if isinstance(interface, Interface):
        members = {PIXELS_MEMBER: interface.pixels, INTERFACE_MEMBER: interface}
    with atomic_path(path) as temporary:
        copy = detached_copy(model)
        if model.compiled:
            copy.compile_from_config(model.get_compile_config())
        copy.save(temporary)
        with zipfile.ZipFile(temporary, "a") as archive:  # Keras ignores unknown members
            for name, member in members.items():
                archive.writestr(name, member.to_json())


def stored_pixels(path):
    """Returns the pixel format in a `.safetensors` or `.keras` file, or None if the file has none.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = existing(path)
    text = None
    if path.suffix == ".safetensors":
        text = read_header(path)[0].get("pixels")
    elif path.suffix == ".keras":
        text = _member(path, PIXELS_MEMBER)
    return None if text is None else PixelFormat.from_json(text, path)


def stored_interface(path):
    """Returns the `Interface` in a `.keras` file, or None if the file has none or only a pixel format.

    Raises:
        InputError: the file is missing or damaged.
    """
    path, text = existing(path), None
    pixels = stored_pixels(path)
    if pixels is not None and path.suffix == ".keras":
        text = _member(path, INTERFACE_MEMBER)
    return None if text is None else Interface.from_json(text, pixels, path)


def _member(path, name):
    """Returns the content of one member of a `.keras` file, or None if there is no such member."""
    with open_zip(path) as archive, refusing(f"The model file {path} is damaged"):
        return archive.open(name).read(MAX_MEMBER_BYTES) if name in archive.namelist() else None


def head_classes(path):
    """Returns the number of classes of the head in a `.safetensors` file of weights; None if it has no such head."""
    shape = read_header(path)[1].get("predictions/bias") if pathlib.Path(path).suffix == ".safetensors" else None
    return shape[0] if shape else None


def input_shape(path):
    """Returns the shape of the images that a `.keras` file takes, from its configuration alone.

    Returns:
        (height, width, channels), each None if any size will do; None if the input is not an image.

    Raises:
        InputError: the file is missing or damaged.
    """
    path = existing(path)
    what = f"The model file {path} cannot be loaded"
    with open_zip(path) as archive, refusing(what):
        config = parse_json(archive.read("config.json"), what)
        shape = _first_shape(config)
    is_image = isinstance(shape, list) and len(shape) == 4 and all(n is None or isinstance(n, int) for n in shape)
    return tuple(shape[1:]) if is_image else None


def _first_shape(config):
    """Returns the batch shape of the first input in a model's configuration, or None."""
    if not isinstance(config, dict):
        return None
    inner = config.get("config")
    layers = inner.get("layers") if isinstance(inner, dict) else None
    if config.get("class_name") == "InputLayer" and isinstance(inner, dict):
        return inner.get("batch_shape")
    found = next((shape for layer in layers if (shape := _first_shape(layer))), None) if isinstance(layers, list) else None
    built = config.get("build_config")
    return found or (built.get("input_shape") if isinstance(built, dict) else None)
