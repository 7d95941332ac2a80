"""Residual networks with the layer names of `keras.applications`: for small images, and as TF-slim and torchvision build them."""

import keras

from l2sp_tf.files.errors import InputError

WIDTHS = (64, 128, 256, 512)
DEPTHS = {  # number of blocks in each stage, and their kind
    "resnet18": ((2, 2, 2, 2), "basic"),
    "resnet26": ((2, 2, 2, 2), "bottleneck"),  # timm's
    "resnet34": ((3, 4, 6, 3), "basic"),
    "resnet50": ((3, 4, 6, 3), "bottleneck"),
    "resnet101": ((3, 4, 23, 3), "bottleneck"),
    "resnet152": ((3, 8, 36, 3), "bottleneck"),
}
SLIM = tuple(f"{name}_slim" for name in ("resnet50", "resnet101", "resnet152"))
TORCH = tuple(f"{name}_torch" for name in DEPTHS)


def small_resnet(input_shape, num_classes, widths=(16, 32, 64), depths=(1, 1, 1), block="basic", name="small_resnet"):
    """Builds a residual network for small images: a 3x3 convolution, then stages of residual blocks.

    Layers are named as in `keras.applications.ResNet50`. Convolutions have no bias, because batch norm
    follows each. Every stage after the first halves the image.

    Args:
        input_shape: (height, width, channels) of the images.
        num_classes: number of logits.
        widths: channels of each stage; in bottleneck blocks, of the 3x3 convolutions.
        depths: number of blocks in each stage, as long as `widths`.
        block: "basic" (two 3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1 with 4 times the channels).

    Raises:
        InputError: the block is unknown, or widths and depths differ in length.
    """
    if block not in ("basic", "bottleneck"):
        raise InputError(f'The block {block!r} is unknown: give "basic" or "bottleneck".')
    if len(widths) != len(depths):
        raise InputError(f"There are {len(widths)} widths but {len(depths)} depths: give one of each for every stage.")
    inputs = keras.Input(input_shape)
    x = _convolution(inputs, widths[0], 3, 1, "conv1")
    x = keras.layers.Activation("relu", name="conv1_relu")(x)
    strides = [1] + [2] * (len(widths) - 1)
    x = _stages(x, widths, depths, block, strides)
    return _classifier(inputs, x, num_classes, name)


def imagenet_resnet(name, num_classes, image_size=224):
    """Builds a ResNet with a 7x7 convolution in front, to fit weights of another framework.

    Both kinds stride in the 3x3 convolution of a bottleneck. Before a convolution with a stride they pad every side
    by half the kernel size. They differ in where a stage strides:

    * torchvision and timm: in the first block of stages 2 to 4; max-pooling pads every side by 1;
    * TF-slim's resnet_v1: in the last block of stages 1 to 3, whose shortcut is subsampled without a
      convolution; max-pooling pads as TensorFlow's "SAME".

    Args:
        name: one of SLIM or TORCH, such as "resnet50_slim".
        num_classes: number of logits.
        image_size: height and width of the images, in pixels.

    Raises:
        InputError: the name is unknown.
    """
    if name not in SLIM + TORCH:
        raise InputError(f"The ResNet {name!r} is unknown: give one of {', '.join(SLIM + TORCH)}.")
    style = "slim" if name in SLIM else "torch"
    depths, block = DEPTHS[name.split("_")[0]]
    inputs = keras.Input((image_size, image_size, 3))
    x = _convolution(inputs, 64, 7, 2, "conv1", style)
    x = keras.layers.Activation("relu", name="conv1_relu")(x)
    if style == "torch":
        x = keras.layers.ZeroPadding2D(1, name="pool1_pad")(x)  # zeros never win: the relu leaves nothing below them
    x = keras.layers.MaxPooling2D(3, 2, padding="same" if style == "slim" else "valid", name="pool1_pool")(x)
    x = _stages(x, WIDTHS, depths, block, (2, 2, 2, 1) if style == "slim" else (1, 2, 2, 2), style)
    return _classifier(inputs, x, num_classes, name)


def _stages(x, widths, depths, block, strides, style="small"):
    """Adds residual blocks; each stage strides once, in its first block, or in its last for TF-slim."""
    for stage, (width, depth, stride) in enumerate(zip(widths, depths, strides, strict=True), start=2):
        for number in range(1, depth + 1):
            strided = number == (depth if style == "slim" else 1)
            x = _block(x, width, stride if strided else 1, block, f"conv{stage}_block{number}", style)
    return x


def _block(x, width, stride, block, name, style):
    """Adds one residual block: x -> relu(shortcut(x) + branch(x))."""
    layers = [(width, 3), (width, 3)] if block == "basic" else [(width, 1), (width, 3), (4 * width, 1)]
    strided = 2 if block == "bottleneck" and style != "small" else 1
    shortcut = x
    if x.shape[-1] != layers[-1][0] or (stride != 1 and style != "slim"):
        shortcut = _convolution(x, layers[-1][0], 1, stride, f"{name}_0", style)
    elif stride != 1:
        shortcut = keras.layers.MaxPooling2D(1, stride, name=f"{name}_0_pool")(x)  # every other pixel
    for number, (filters, size) in enumerate(layers, start=1):
        x = _convolution(x, filters, size, stride if number == strided else 1, f"{name}_{number}", style)
        if number < len(layers):
            x = keras.layers.Activation("relu", name=f"{name}_{number}_relu")(x)
    x = keras.layers.Add(name=f"{name}_add")([shortcut, x])
    return keras.layers.Activation("relu", name=f"{name}_out")(x)


def _convolution(x, filters, size, stride, name, style="small"):
    """Adds a convolution and batch norm; TF-slim and torchvision pad all sides equally before a stride."""
    evenly = style != "small" and stride > 1 and size > 1
    if evenly:
        x = keras.layers.ZeroPadding2D(size // 2, name=f"{name}_pad")(x)
    padding = "valid" if evenly else "same"
    convolution = keras.layers.Conv2D(
        filters, size, stride, padding=padding, use_bias=False, kernel_initializer="he_normal", name=f"{name}_conv"
    )
    return keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=f"{name}_bn")(convolution(x))


def _classifier(inputs, x, num_classes, name):
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    return keras.Model(inputs, keras.layers.Dense(num_classes, name="predictions")(x), name=name)
