"""Converts checkpoints of TF-slim and PyTorch, which `python -m l2sp_tf.cli.convert` writes to a file."""

import glob
import math
import os
import pathlib
import re

import numpy as np

from l2sp_tf.files.arrays import Snapshot
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import SPARE_BYTES, refusing, variables_within
from l2sp_tf.files.writing import sha256_of_file
from l2sp_tf.models.efficientnet_lite import LITE, efficientnet_lite
from l2sp_tf.models.pixels import PIXELS, named_pixels
from l2sp_tf.models.resnets import SLIM, TORCH, imagenet_resnet
from l2sp_tf.models.torch_files import read_checkpoint
from l2sp_tf.models.torch_settings import settings_of
from l2sp_tf.penalties.weights import keyed_weights

SLIM_WEIGHTS = {"kernel": "weights", "bias": "biases"}  # batch norm has the same names as in Keras
TORCH_WEIGHTS = {
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
COUNTERS = ("num_batches_tracked", "n_averaged")  # of batch norm, and of torch.optim.swa_utils.AveragedModel
LITE_OUTSIDE = {"stem_conv": "_conv_stem", "stem_bn": "_bn0", "top_conv": "_conv_head", "top_bn": "_bn1", "predictions": "_fc"}
LITE_IN_BLOCK = {
    "expand_conv": "_expand_conv",
    "expand_bn": "_bn0",
    "dwconv": "_depthwise_conv",
    "bn": "_bn1",
    "project_conv": "_project_conv",
    "project_bn": "_bn2",
}


def convert_tf_slim(path, backbone, *, classes=None, pixels=None):
    """Reads a checkpoint of TF-slim's resnet_v1, such as `resnet_v1_101.ckpt`.

    Args:
        path: the checkpoint: one file (V1), or the common beginning of its files (V2).
        backbone: one of `resnets.SLIM`.
        classes: the required number of classes of the head; None accepts any, also a checkpoint without a head.
        pixels: a `PixelFormat` or its name; None means RGB, with the checkpoint's mean if it has one.

    Returns:
        A `Snapshot` with pixel format and provenance, which `keras_files.load_weights` reads once saved.

    Raises:
        InputError: the checkpoint cannot be read, or its weights are not those of the backbone; the
            message lists both sides.
    """
    _check_backbone(backbone, SLIM)
    pixels = None if pixels is None else named_pixels(pixels)
    path = pathlib.Path(path)
    parts = [file for pattern in ("index", "data-*") for file in sorted(path.parent.glob(f"{glob.escape(path.name)}.{pattern}"))]
    files = [path] if path.is_file() else parts
    if not files:
        raise InputError(
            f"There is no checkpoint {path}: give a .ckpt file, or the common beginning of its .index and .data files."
        )
    arrays = _read_checkpoint(path, files)
    scope = next((name.split("/")[0] for name in arrays if "/" in name), "")
    mean = arrays.pop(f"{scope}/mean_rgb", None)
    pixels = pixels or PIXELS["rgb"].with_mean(mean)
    head = f"{scope}/logits/weights"  # a convolution of 1x1
    if head in arrays and arrays[head].shape[:2] == (1, 1):
        arrays[head] = arrays[head][0, 0]
    found = _match(arrays, backbone, lambda keys: {key: _slim_name(scope, *key.split("/")) for key in keys}, classes, path)
    return _snapshot(found, pixels, "tf_slim", backbone, files)


def convert_torch(path, backbone, *, classes=None, pixels=None, state=None, say=print):
    """Reads a state dict of PyTorch, such as `resnet50_places365.pth.tar`: a ResNet of torchvision or timm, or EfficientNet-Lite.

    A prefix that all names share, such as "module." or "_orig_mod.", is left out. The config.json that timm saves beside a file,
    and the flags that a trainer keeps in it, must name the backbone; they may give the pixel format.

    Args:
        path: the file.
        backbone: one of `resnets.TORCH` or `efficientnet_lite.LITE`.
        classes: the required number of classes of the head; None accepts any, also a file without a head.
        pixels: a `PixelFormat` or its name; None means what is said beside the weights, else torchvision's, or "raw" for
            EfficientNet-Lite, which rescales itself.
        state: the name of the state dict in a checkpoint with several, as in `read_state_dict`.
        say: called with a line if nothing names the network of a ResNet's weights.

    Returns:
        A `Snapshot` with pixel format and provenance, which `keras_files.load_weights` reads once saved.

    Raises:
        InputError: `read_state_dict` refuses the file; its weights are not those of the backbone (the message lists both
            sides); or another network or pixel format is said beside them.
    """
    _check_backbone(backbone, (*TORCH, *LITE))
    pixels = None if pixels is None else named_pixels(pixels)
    arrays, others = read_checkpoint(path, state)
    if backbone in TORCH:
        settings = settings_of(pathlib.Path(path), others)
        pixels = _said_pixels(settings, backbone, pixels)
        if not any(said.network for said in settings):
            say(f"{path} does not name its network: timm's resnetaa and resnetblur have the names and shapes of {backbone} too.")
    arrays = _without_shared_prefix({name: a for name, a in arrays.items() if not name.endswith(COUNTERS)})
    arrays = {name: _turned(name, a) for name, a in arrays.items()}
    pixels = pixels or PIXELS["raw" if backbone in LITE else "torch"]
    found = _match(arrays, backbone, _lite_names if backbone in LITE else _torch_names, classes, path)
    return _snapshot(found, pixels, "torch", backbone, [pathlib.Path(path)])


def _said_pixels(settings, backbone, given):
    """Checks what is said of a network, and returns the pixel format that was given, or else that which is said, or None."""
    for said in settings:
        said.check(backbone)
        if given is None:
            given = said.pixels()
        elif (own := said.pixels()) is not None and not own.agrees_with(given):
            raise InputError(f"{said.where} says that the network sees pixels as {own}, but pixels is {given}: leave pixels out.")
    return given


def _without_shared_prefix(arrays):
    """Leaves out the parts at the beginning of all names that are the same in all, but never the last two parts of a name."""
    parts = [name.split(".") for name in arrays]
    shared = os.path.commonprefix([part[:-2] for part in parts])
    return {".".join(part[len(shared) :]): array for part, array in zip(parts, arrays.values(), strict=True)}


def _turned(name, array):
    """Turns an array from PyTorch's order of axes, [out, in, ...], to that of Keras, [..., in, out]."""
    turns = {2: (1, 0), 4: (2, 3, 0, 1) if "depthwise" in name else (2, 3, 1, 0)}
    return array.transpose(turns.get(array.ndim, range(array.ndim)))


def published_network(name, num_classes, image_size=224):
    """Builds a network whose weights these converters read: one of SLIM, TORCH or LITE."""
    return (efficientnet_lite if name in LITE else imagenet_resnet)(name, num_classes, image_size)


def _check_backbone(backbone, known):
    if backbone not in known:
        raise InputError(f"The backbone {backbone!r} cannot be read from this kind of file: give one of {', '.join(known)}.")


def _is_slot(name):
    """Whether a variable of a checkpoint serves training only, not the model."""
    return name == "global_step" or name.endswith(("/Momentum", "/ExponentialMovingAverage"))


def _slim_name(scope, layer, weight):
    """Returns TF-slim's name for one of our weights."""
    if layer == "predictions":
        return f"{scope}/logits/{SLIM_WEIGHTS[weight]}"
    place, kind = layer.rsplit("_", 1)
    if block := re.fullmatch(r"conv(\d+)_block(\d+)_(\d)", place):
        stage, unit, number = map(int, block.groups())
        place = f"block{stage - 1}/unit_{unit}/bottleneck_v1/{f'conv{number}' if number else 'shortcut'}"
    return f"{scope}/{place}/{'BatchNorm/' if kind == 'bn' else ''}{SLIM_WEIGHTS.get(weight, weight)}"


def _torch_names(keys):
    """Returns torchvision's name for each of our weights."""
    return {key: _torch_name(*key.split("/")) for key in keys}


def _torch_name(layer, weight):
    weight = TORCH_WEIGHTS.get(weight, weight)
    if layer == "predictions":
        return f"fc.{weight}"
    place, kind = layer.rsplit("_", 1)
    block = re.fullmatch(r"conv(\d+)_block(\d+)_(\d)", place)
    if not block:
        return f"{kind}1.{weight}"
    stage, unit, number = map(int, block.groups())
    name = f"{kind}{number}" if number else f"downsample.{0 if kind == 'conv' else 1}"
    return f"layer{stage - 1}.{unit - 1}.{name}.{weight}"


def _lite_names(keys):
    """Returns the name in the EfficientNet-Lite packages for each of our weights; they count all blocks from 0."""
    blocks, names = {}, {}
    for key in keys:
        layer, weight = key.split("/")
        block, _, place = layer.partition("_")
        if block.startswith("block"):
            number = blocks.setdefault(block, len(blocks))
            layer = f"_blocks.{number}.{LITE_IN_BLOCK[place]}"
        names[key] = f"{LITE_OUTSIDE.get(layer, layer)}.{TORCH_WEIGHTS.get(weight, weight)}"
    return names


def _match(arrays, backbone, names_of, classes, path):
    """Returns a file's arrays under our keys; each must be used once and have the backbone's shape. The head may be missing."""
    bias = names_of(["predictions/bias"])["predictions/bias"]
    if bias in arrays and classes is not None and classes != arrays[bias].size:
        raise InputError(f"{path} has a head of {arrays[bias].size} classes, not {classes}: give --classes={arrays[bias].size}.")
    found = arrays[bias].size if bias in arrays else classes or 1
    limit = 2 * sum(array.nbytes for array in arrays.values()) + SPARE_BYTES  # half precision becomes single precision
    with variables_within(limit, f"{path} has a head of {found} classes, and with it"):
        model = published_network(backbone, found, image_size=32)
    weights = keyed_weights(model)
    names = names_of(weights)
    if not {names["predictions/kernel"], bias} & arrays.keys() and classes is None:
        names = {key: name for key, name in names.items() if not key.startswith("predictions/")}
    shapes = {name: tuple(weights[key].variable.shape) for key, name in names.items()}
    wrong = [
        f"{name} {shapes.get(name, 'missing')} / {arrays[name].shape if name in arrays else 'missing'}"
        for name in dict.fromkeys([*shapes, *arrays])
        if name not in shapes or name not in arrays or shapes[name] != arrays[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(
            f"{path} does not hold the weights of {backbone} (expected / found: {'; '.join(wrong[:5])}{more}): "
            "give the --backbone that it was made with."
        )
    return {key: np.asarray(arrays[name], np.float32) for key, name in names.items()}


def _read_checkpoint(path, files):
    """Returns the model's variables in a TensorFlow checkpoint as a dict from name to array."""
    import tensorflow as tf  # only TF-slim's files need it

    with refusing(f"{path} is damaged or not a checkpoint"):  # TensorFlow raises errors of many kinds
        reader = tf.train.load_checkpoint(str(path))
        shapes, dtypes = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
        shapes = {name: shape for name, shape in shapes.items() if not _is_slot(name)}
        claimed = sum(math.prod(shape) * dtypes[name].size for name, shape in shapes.items())
        if claimed > _bytes_of(files):
            raise ValueError("it claims more numbers than it has bytes for")
        if not all(dtypes[name].is_floating for name in shapes):
            raise ValueError("it holds variables that are not real numbers")
        return {name: reader.get_tensor(name) for name in shapes}


def _bytes_of(files):
    return sum(file.stat().st_size for file in files)


def _snapshot(arrays, pixels, origin, backbone, files):
    """Adds the pixel format and the origin: the kind of file, the architecture and the sha256 of each file."""
    digests = {file.name: sha256_of_file(file) for file in files}
    provenance = {"origin": origin, "backbone": backbone, "files": digests}
    return Snapshot(arrays, {"pixels": pixels.plain(), "provenance": provenance})
