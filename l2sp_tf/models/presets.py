"""Image classifiers and backbones of KerasHub, by the names or folders of their presets."""

import functools
import importlib
import importlib.util
import pathlib
import re

import h5py
import keras
import numpy as np

from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import SPARE_BYTES, h5_shapes, read_json, refusing, variables_within

CONFIG, TASK, TASK_WEIGHTS, CONVERTER = "config.json", "task.json", "task.weights.h5", "image_converter.json"
INSTALL = 'pip install "l2sp-tf[hub]"'


def keras_hub():
    """Imports KerasHub, whose layers Keras can then read.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("keras_hub")
    except ImportError as error:
        raise InputError(f"This network needs KerasHub, which cannot be imported ({error}): {INSTALL}.") from error


def is_preset(weights):
    """Whether weights are a preset: a folder with the config.json of KerasHub, or one of KerasHub's names, if it is installed."""
    if pathlib.Path(str(weights)).is_dir():
        return (pathlib.Path(str(weights)) / CONFIG).is_file()
    is_name = re.fullmatch(r"\w+", str(weights)) and weights not in ("none", "imagenet") and not pathlib.Path(weights).exists()
    return bool(is_name) and importlib.util.find_spec("keras_hub") is not None and weights in keras_hub().models.Backbone.presets


def load_preset(preset, image_size=None):
    """Builds the network of a preset with its weights, behind the rescaling of its preset's image converter.

    Args:
        preset: a folder with config.json and weights, or the name of a preset, which KerasHub's own host serves.
        image_size: height and width of the images, in pixels; None for the network's own, which may be any.

    Returns:
        A Keras model from float32 RGB images [b, image_size, image_size, 3], from 0 to 255, to what the preset gives: logits or
        scores [b, num_classes], or features of a backbone. Without an image converter, the pixel format is not known.

    Raises:
        InputError: KerasHub is missing; the preset cannot be read, or is none for images; or it takes another size.
    """
    folder, hub = _folder_of(preset), keras_hub()
    kind = _kind_of(folder, hub)
    what = f"The preset {preset} cannot be loaded"
    files = sorted(folder.glob("*.h5"))
    with refusing(what):
        for file in files:
            with h5py.File(file) as opened:
                h5_shapes(opened, file.stat().st_size)
    limit = 4 * sum(file.stat().st_size for file in files) + SPARE_BYTES
    with refusing(what), variables_within(limit, f"{what}, as it has"):
        network = kind.from_preset(str(folder))
        converter = getattr(getattr(network, "preprocessor", None), "image_converter", None)
        if converter is None and (folder / CONVERTER).is_file():
            converter = hub.layers.ImageConverter.from_preset(str(folder))
    return _with_rescaling(network, converter, preset, image_size)


def preset_shape(preset):
    """Returns the shape of the images that a preset takes: (height, width, channels), each None if any size will do.

    Raises:
        InputError: as in `load_preset`.
    """
    folder = _folder_of(preset)
    shape = _config_of(folder / CONFIG).get("image_shape")
    return tuple(shape) if isinstance(shape, list) and len(shape) == 3 else None


def preset_side(preset):
    """Returns the side in pixels of the square images that a preset's image converter makes; None if it makes no such.

    Raises:
        InputError: as in `load_preset`.
    """
    file = _folder_of(preset) / CONVERTER
    size = _config_of(file).get("image_size") if file.is_file() else None
    return size[0] if isinstance(size, list) and len(set(size)) == 1 else None


@functools.cache
def _folder_of(preset):
    """Returns the folder of a preset; downloads a named one, or finds it in the cache of kagglehub."""
    folder = pathlib.Path(preset)
    if folder.is_dir():
        return folder
    handle = keras_hub().models.Backbone.presets[preset]["kaggle_handle"].removeprefix("kaggle://")
    try:
        return pathlib.Path(importlib.import_module("kagglehub").model_download(handle))
    except Exception as error:  # kagglehub raises errors of many kinds
        raise InputError(
            f"The preset {preset} could not be downloaded ({' '.join(str(error).split())[:200]}): connect to the network, or "
            "give the folder of a preset."
        ) from error


def _kind_of(folder, hub):
    """Returns the class of KerasHub that a preset is of: an image classifier, or else a backbone.

    Raises:
        InputError: it is of another kind, or has a head without weights.
    """
    for file in (TASK, CONFIG):
        if not (folder / file).is_file():
            continue
        values = read_json(folder / file, f"{folder / file} is damaged")
        name = values.get("registered_name") if isinstance(values, dict) else None
        kind = keras.saving.get_registered_object(name) if str(name).startswith("keras_hub>") else None
        if kind is None:
            raise InputError(f"{folder / file} names no class of KerasHub: give the folder of a preset that KerasHub saved.")
        if not issubclass(kind, hub.models.ImageClassifier if file == TASK else hub.models.Backbone):
            raise InputError(
                f"The preset {folder} is a {kind.__name__}, not an image classifier: build it with keras_hub, and give it to "
                "l2sp_tf.attach."
            )
        if file == TASK and not (folder / TASK_WEIGHTS).is_file():
            raise InputError(f"The preset {folder} has no {TASK_WEIGHTS}, so that its head would be random: use another copy.")
        return kind
    raise InputError(f"The folder {folder} has no {CONFIG}: give the folder of a preset.")


def _config_of(file):
    values = read_json(file, f"{file} is damaged")
    config = values.get("config") if isinstance(values, dict) else None
    return config if isinstance(config, dict) else {}


def _with_rescaling(network, converter, preset, image_size):
    """Puts what an image converter computes of pixels before a network, after checking that both fit."""
    shape = network.input_shape
    if not isinstance(shape, tuple) or len(shape) != 4 or shape[-1] != 3:
        raise InputError(f"The preset {preset} takes inputs of shape {shape}, not RGB images: give one for such images.")
    if not isinstance(network.output_shape, tuple) or len(network.output_shape) not in (2, 4):
        raise InputError(
            f"The preset {preset} is the backbone {type(network).__name__} with outputs of shape {network.output_shape}, not one "
            "vector for each image: give the preset of an image classifier."
        )
    if image_size is not None and any(side not in (None, image_size) for side in shape[1:3]):
        raise InputError(
            f"The preset {preset} takes images of {shape[1]}x{shape[2]} pixels, not of {image_size}: give that size."
        )
    x = inputs = keras.Input((image_size or shape[1], image_size or shape[2], 3))
    if converter is not None:
        scale = 1.0 if converter.scale is None else converter.scale
        offset = 0.0 if converter.offset is None else converter.offset
        rescaling = keras.layers.Rescaling(scale, offset, name="pixels")
        _check_rescaling(rescaling, converter, preset)
        x = rescaling(inputs)
    return keras.Model(inputs, network(x), name=re.sub(r"\W", "_", pathlib.Path(preset).name))


def _check_rescaling(rescaling, converter, preset):
    """Compares a rescaling with the converter itself on random pixels of the size that it does not resize."""
    pixels = np.random.default_rng(0).integers(0, 256, (1, *(converter.image_size or (8, 8)), 3)).astype("float32")
    expected, found = (np.asarray(keras.ops.convert_to_numpy(layer(pixels))) for layer in (converter, rescaling))
    if expected.shape != found.shape or np.abs(expected - found).max() > 1e-5 * np.abs(expected).max():
        raise InputError(
            f"The image converter {type(converter).__name__} of the preset {preset} does more than rescale pixels: build the "
            "network with keras_hub, and give it to l2sp_tf.finetune."
        )
