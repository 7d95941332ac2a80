"""Networks by name, and how each sees pixels."""

import math

import keras

from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import variables_within
from l2sp_tf.models.keras_files import existing, load_weights, most_bytes, stored_pixels
from l2sp_tf.models.pixels import PIXELS, named_pixels
from l2sp_tf.models.resnets import SLIM, TORCH, imagenet_resnet, small_resnet

RESNETS = {"resnet50": "ResNet50", "resnet101": "ResNet101", "resnet152": "ResNet152"}
BACKBONES = ("small", *RESNETS, *SLIM, *TORCH)


def backbone(name, num_classes, *, image_size=224, weights=None, widths=(16, 32, 64), depths=(1, 1, 1), block="basic"):
    """Builds a classifier that returns logits.

    Args:
        name: "small" (see `small_resnet`); "resnet50", "resnet101" or "resnet152" of keras.applications;
            or a ResNet of TF-slim or torchvision (see `imagenet_resnet`), such as "resnet50_slim" or
            "resnet18_torch", whose weights `l2sp_tf.models.convert` reads.
        num_classes: number of classes of the source task.
        image_size: height and width of the images, in pixels.
        weights: None for random weights; "imagenet" for those of keras.applications, which are downloaded;
            or the path of a `.safetensors`, `.weights.h5` or `.keras` file of this architecture.
        widths, depths, block: as in `small_resnet`.

    Returns:
        A Keras model from float32 images [b, image_size, image_size, 3] to logits [b, num_classes].

    Raises:
        InputError: the name is unknown, or the weights are not available or of another architecture.
    """
    if name not in BACKBONES:
        raise InputError(f"The backbone {name!r} is unknown: give one of {', '.join(BACKBONES)}.")
    if weights == "imagenet" and name not in RESNETS:
        raise InputError(f"There are no ImageNet weights to download for the backbone {name}: give weights=none, or a file.")
    from_file = weights not in (None, "imagenet")
    limit = most_bytes(existing(weights)) if from_file else math.inf  # num_classes may come from the file
    with variables_within(limit, f"The backbone {name} with {num_classes} classes has"):
        if name == "small":
            model = small_resnet((image_size, image_size, 3), num_classes, widths, depths, block)
        elif name in RESNETS:
            model = _resnet(RESNETS[name], num_classes, image_size, weights)
        else:
            model = imagenet_resnet(name, num_classes, image_size)
    if from_file:
        load_weights(model, weights)
    return model


def _resnet(name, num_classes, image_size, weights):
    if weights == "imagenet" and (num_classes, image_size) != (1000, 224):
        raise InputError(f"The ImageNet weights are for 1000 classes and crops of 224, not {num_classes} and {image_size}.")
    options = {"input_shape": (image_size, image_size, 3), "classes": num_classes, "classifier_activation": None}
    build = getattr(keras.applications, name)
    try:
        return build(weights="imagenet" if weights == "imagenet" else None, **options)
    except Exception as error:  # Keras raises a bare Exception for a failed download
        if weights != "imagenet":
            raise
        raise InputError(
            f"The ImageNet weights of {name} could not be downloaded ({error}): connect to the network, or give weights=PATH."
        ) from error


def pixels_of(weights, given=None):
    """Returns the pixel format of weights: from their file or origin, or else from the caller.

    Args:
        weights: None for random weights, "imagenet", or the path of a file, as in `backbone`.
        given: a `PixelFormat`, one of the names "rgb", "bgr" and "torch", or None.

    Returns:
        A `PixelFormat`.

    Raises:
        InputError: neither gives a format, or the two disagree.
    """
    given = None if given is None else named_pixels(given)
    known = {None: PIXELS["rgb"], "imagenet": PIXELS["bgr"]}.get(weights) or stored_pixels(weights)
    if known is None and given is None:
        raise InputError(f"The file {weights} does not say how its weights see pixels: give --pixels=rgb, bgr or torch.")
    if known is not None and given is not None and not known.agrees_with(given):
        of = {None: "A model trained from scratch", "imagenet": "The ImageNet model"}.get(weights, f"The file {weights}")
        raise InputError(f"{of} sees pixels as {known}, but --pixels says {given}: leave --pixels out.")
    return known or given
