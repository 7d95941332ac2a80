"""Backbones, their weights, the new head, and freezing the first n units (Fig. 3)."""

import pathlib
import re
import tempfile

import h5py
import keras

from l2sp_tf.anchors import Anchors
from l2sp_tf.errors import InputError
from l2sp_tf.regularizers import Penalty
from l2sp_tf.variables import keyed_weights, set_regularizer

RESNETS = {"resnet50": "ResNet50", "resnet101": "ResNet101", "resnet152": "ResNet152"}
BACKBONES = ("small", *RESNETS)


def backbone(name, num_classes, *, image_size=224, weights=None, widths=(16, 32, 64), depths=(1, 1, 1), block="basic"):
    """Builds a classifier that returns logits.

    Args:
        name: "small" (see `small_resnet`), "resnet50", "resnet101" or "resnet152".
        num_classes: number of classes of the source task.
        image_size: height and width of the images, in pixels.
        weights: None for random ones, "imagenet" (the ResNets; downloaded by Keras), or the
            path of a `.safetensors`, `.weights.h5` or `.keras` file of this architecture.
        widths, depths, block: of the small ResNet.

    Returns:
        A Keras model from float32 images [b, image_size, image_size, 3] to logits [b, num_classes].

    Raises:
        InputError: an unknown name, or weights that cannot be had or are of another architecture.
    """
    if name == "small":
        if weights == "imagenet":
            raise InputError("There are no ImageNet weights for the backbone small: give weights=none, or a file.")
        model = small_resnet((image_size, image_size, 3), num_classes, widths, depths, block)
    elif name in RESNETS:
        model = _resnet(RESNETS[name], num_classes, image_size, weights)
    else:
        raise InputError(f"The backbone {name!r} is unknown: give one of {', '.join(BACKBONES)}.")
    if weights not in (None, "imagenet"):
        load_weights(model, weights)
    return model


def _resnet(name, num_classes, image_size, weights):
    if weights == "imagenet" and (num_classes, image_size) != (1000, 224):
        raise InputError(f"The ImageNet weights are for 1000 classes and crops of 224, not {num_classes} and {image_size}.")
    options = {"input_shape": (image_size, image_size, 3), "classes": num_classes, "classifier_activation": None}
    build = getattr(keras.applications, name)
    try:
        return build(weights="imagenet" if weights == "imagenet" else None, **options)
    except Exception as error:  # Keras raises a bare Exception for a download that fails
        if weights != "imagenet":
            raise
        raise InputError(
            f"The ImageNet weights of {name} could not be downloaded ({error}): connect to the network, or give weights=PATH."
        ) from error


def small_resnet(input_shape, num_classes, widths=(16, 32, 64), depths=(1, 1, 1), block="basic", name="small_resnet"):
    """A residual network for small images: a 3x3 convolution, then stages of residual blocks.

    Layers are named as in `keras.applications.ResNet50`, convolutions have no bias (batch
    norm follows each), and every stage after the first halves the image.

    Args:
        input_shape: (height, width, channels) of the images.
        num_classes: number of logits.
        widths: channels of each stage (of the 3x3 convolutions, if the block is a bottleneck).
        depths: number of blocks of each stage, as long as `widths`.
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1 with 4 times the channels).

    Raises:
        InputError: an unknown block, or widths and depths of different lengths.
    """
    if block not in ("basic", "bottleneck"):
        raise InputError(f'The block {block!r} is unknown: give "basic" or "bottleneck".')
    if len(widths) != len(depths):
        raise InputError(f"There are {len(widths)} widths but {len(depths)} depths: give one of each for every stage.")
    inputs = keras.Input(input_shape)
    x = _convolution(inputs, widths[0], 3, 1, "conv1")
    x = keras.layers.Activation("relu", name="conv1_relu")(x)
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), start=2):
        for number in range(1, depth + 1):
            stride = 2 if stage > 2 and number == 1 else 1
            x = _block(x, width, stride, block, f"conv{stage}_block{number}")
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    return keras.Model(inputs, keras.layers.Dense(num_classes, name="predictions")(x), name=name)


def _block(x, width, stride, block, name):
    """One residual block: x -> relu(shortcut(x) + branch(x))."""
    layers = [(width, 3, stride), (width, 3, 1)] if block == "basic" else [(width, 1, stride), (width, 3, 1), (4 * width, 1, 1)]
    shortcut = x
    if stride != 1 or x.shape[-1] != layers[-1][0]:
        shortcut = _convolution(x, layers[-1][0], 1, stride, f"{name}_0")
    for number, (filters, size, step) in enumerate(layers, start=1):
        x = _convolution(x, filters, size, step, f"{name}_{number}")
        if number < len(layers):
            x = keras.layers.Activation("relu", name=f"{name}_{number}_relu")(x)
    x = keras.layers.Add(name=f"{name}_add")([shortcut, x])
    return keras.layers.Activation("relu", name=f"{name}_out")(x)


def _convolution(x, filters, size, stride, name):
    convolution = keras.layers.Conv2D(
        filters, size, stride, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv"
    )
    return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(convolution(x))


def load_weights(model, path):
    """Loads a `.safetensors`, `.weights.h5` or `.keras` file into a built model of the same architecture.

    Raises:
        InputError: the file is missing, damaged, of an unknown kind, or of another
            architecture (both sides are listed); the model then keeps its weights.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"There is no weights file {path}: give the path of a .safetensors, .weights.h5 or .keras file.")
    if path.suffix == ".safetensors":
        Anchors.load(path).restore(model)
    elif path.suffix == ".keras":
        Anchors.of(load_model(path)).restore(model)
    elif path.name.endswith(".weights.h5"):
        _check_h5(model, path)
        model.load_weights(path)
    else:
        raise InputError(f"The weights file {path} is of an unknown kind: give a .safetensors, .weights.h5 or .keras file.")


def _check_h5(model, path):
    """Compares the arrays of a `.weights.h5` file with those the model would write; Keras skips some that differ."""
    with tempfile.TemporaryDirectory() as folder:
        own = pathlib.Path(folder) / "own.weights.h5"
        model.save_weights(own)
        expected = _h5_shapes(own)
    try:
        found = _h5_shapes(path)
    except OSError as error:
        raise InputError(f"The weights file {path} is damaged ({error}): use another copy.") from error
    wrong = [name for name in sorted(expected.keys() | found.keys()) if expected.get(name) != found.get(name)]
    if wrong:
        listed = "; ".join(f"{name} {expected.get(name, 'missing')} / {found.get(name, 'missing')}" for name in wrong[:5])
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise InputError(f"{path} is not of the architecture of the model {model.name!r} (model / file: {listed}{more}).")


def _h5_shapes(path):
    shapes = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, item: shapes.update({name: item.shape}) if isinstance(item, h5py.Dataset) else None)
    return {name: shape for name, shape in shapes.items() if not name.startswith("optimizer")}


def load_model(path):
    """Reads a `.keras` file without its optimizer.

    Raises:
        InputError: the file is missing, damaged, or made of layers unknown here.
    """
    if not pathlib.Path(path).is_file():
        raise InputError(f"There is no model file {path}: give the path of a .keras file.")
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:  # zip, JSON, HDF5 and class look-ups fail each in their own way
        raise InputError(f"The model file {path} cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def with_new_head(pretrained, num_classes, *, seed=None):
    """A copy of a pre-trained classifier with a new, random last layer of logits.

    The layers after the last weighted one (a softmax, say) go too. If the last weighted
    layer is not Dense, the model is taken for a backbone without a head, and gets global
    average pooling (where its output is an image) and the new layer on top. The copy keeps
    layer names and weights and shares nothing with `pretrained`; the new layer is called
    "new_head", with a number behind it where that name is taken.

    Args:
        pretrained: a built functional or Sequential model with one input and one output.
        num_classes: number of classes of the target task.
        seed: of the head's Glorot uniform initial weights.

    Returns:
        A functional Keras model that returns logits [b, num_classes].

    Raises:
        InputError: the model is subclassed, or has several inputs or outputs.
    """
    if not isinstance(pretrained, keras.Model) or getattr(pretrained, "inputs", None) is None or len(pretrained.inputs) != 1:
        raise InputError(
            f"with_new_head needs a functional or Sequential model with one input, not {type(pretrained).__name__}: "
            "build the new model from its layers, and give it to attach."
        )
    if len(pretrained.outputs) != 1:
        raise InputError(f"The model {pretrained.name!r} has {len(pretrained.outputs)} outputs: with_new_head needs one.")
    copy = detached_copy(pretrained)
    weighted = [layer for layer in copy.layers if layer.weights]
    head = weighted[-1] if weighted and isinstance(weighted[-1], keras.layers.Dense) else None
    x = head.input if head is not None else copy.outputs[0]
    if head is None and len(x.shape) == 4:
        x = keras.layers.GlobalAveragePooling2D(name="new_pool")(x)
    names, name, number = {layer.name for layer in copy.layers}, "new_head", 1
    while name in names:
        number += 1
        name = f"new_head_{number}"
    layer = keras.layers.Dense(num_classes, name=name, kernel_initializer=keras.initializers.GlorotUniform(seed=seed))
    return keras.Model(copy.inputs, layer(x), name=pretrained.name)


def detached_copy(model):
    """A clone of a functional or Sequential model with the same weights, nothing shared, and no penalties of ours."""
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for weight in keyed_weights(clone).values():
        set_regularizer(weight, None, only=Penalty)
    return clone


def units(model):
    """The units that Fig. 3 counts: the first convolution, then each residual block, as lists of layers.

    Units are told by the layer names of `keras.applications` and `small_resnet`: "conv1_*",
    then "conv<stage>_block<number>_*". Batch norm belongs to its convolution's unit.

    Raises:
        InputError: the model has no layer named so.
    """
    found = {}
    for layer in model._flatten_layers(include_self=False):
        if match := re.match(r"(conv1|conv\d+_block\d+)_", layer.name):
            found.setdefault(match[1], []).append(layer)
    if not found:
        raise InputError(
            f"The model {model.name!r} has no layers named conv1_* or conv<n>_block<n>_*: freeze its layers by hand."
        )
    return sorted(found.values(), key=lambda layers: _unit_number(layers[0].name))


def _unit_number(name):
    match = re.match(r"conv(\d+)(?:_block(\d+))?", name)
    return int(match[1]), int(match[2] or 0)


def freeze_first(model, n):
    """Freezes the first n units of a ResNet (Fig. 3) and unfreezes the others, batch norm included.

    A frozen batch norm runs in inference mode: its statistics stay the source's.

    Args:
        model: a ResNet with the layer names of `units`.
        n: number of units, from 0 (nothing frozen) to all of them.

    Returns:
        The number of units of the model.

    Raises:
        InputError: n is not between 0 and the number of units.
    """
    found = units(model)
    if not isinstance(n, int) or not 0 <= n <= len(found):
        raise InputError(
            f"n is {n!r}, but the model {model.name!r} has {len(found)} units: give a number from 0 to {len(found)}."
        )
    for number, layers in enumerate(found):
        for layer in layers:
            layer.trainable = number >= n
    if getattr(model, "train_function", None) is not None:
        model.train_function = None  # a traced step would go on training what is frozen now
    return len(found)
