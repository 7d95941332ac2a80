"""One small network of each family of keras.applications, with adapted and trained state."""

import functools
import inspect
import sys

import keras
import numpy as np
import pytest

from l2sp_tf.penalties.weights import keyed_weights

CLASSES = 5


def adapted(shape=(5,), invert=False):
    """A Normalization that has seen data."""
    layer = keras.layers.Normalization(invert=invert)
    layer.adapt(np.random.default_rng(0).normal(3, 2, (20, *shape)))
    return layer


def application(name, side=32, **options):
    """A maker of a network by its public name, with a softmax on top."""
    return lambda: getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3), classes=CLASSES, **options)


def smaller(public, base, *arguments, **options):
    """A maker by the general constructor that stands beside a public name in its module."""
    make = getattr(sys.modules[getattr(keras.applications, public).__module__], base)
    options = {"weights": None, "input_shape": (32, 32, 3), "classes": CLASSES, "classifier_activation": "softmax", **options}
    return lambda: make(*arguments, **options)


def resnet(preact):
    """A maker of a ResNet (V2 with `preact`) of two stacks."""
    module = sys.modules[keras.applications.ResNet50.__module__]

    def stacks(x):
        if preact:
            return module.stack_residual_blocks_v2(module.stack_residual_blocks_v2(x, 4, 2, name="conv2"), 8, 2, name="conv3")
        return module.stack_residual_blocks_v1(
            module.stack_residual_blocks_v1(x, 4, 2, stride1=1, name="conv2"), 8, 2, name="conv3"
        )

    return smaller("ResNet50", "ResNet", stacks, preact, True, name="resnet")


MAKERS = {
    "ConvNeXt": smaller("ConvNeXtTiny", "ConvNeXt", (1, 1, 1, 1), (4, 8, 12, 16), name="convnext"),
    "DenseNet": smaller("DenseNet121", "DenseNet", (1, 1, 1, 1), name="densenet"),
    "EfficientNet": smaller("EfficientNetB0", "EfficientNet", 0.1, 0.1, 32, name="efficientnet"),
    "EfficientNetV2": smaller("EfficientNetV2B0", "EfficientNetV2", 0.1, 0.1, 32, name="efficientnetv2-b0"),
    "MobileNet": application("MobileNet", alpha=0.25),
    "MobileNetV2": application("MobileNetV2", alpha=0.35),
    "MobileNetV3": application("MobileNetV3Small", alpha=0.35, minimalistic=True),
    "NASNet": smaller("NASNetMobile", "NASNet", penultimate_filters=96, num_blocks=1, stem_block_filters=8, skip_reduction=False),
    "ResNet": resnet(False),
    "ResNetV2": resnet(True),
}
SLOW = ("NASNet", "MobileNetV2", "EfficientNetV2", "ResNetV2")
SIDES = {"InceptionV3": 75, "InceptionResNetV2": 75, "Xception": 71}
ALL = {
    name: application(name, SIDES.get(name, 32))
    for name in dir(keras.applications)
    if inspect.isfunction(getattr(keras.applications, name))
}


FAMILIES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MAKERS]


@functools.cache
def network(family):
    """The trained network of a family: one for all tests, which leave it as it is."""
    return trained(MAKERS[family]())


def trained(model):
    """Moves all weights off their initial values, keeps variances positive, and adapts Normalization."""
    rng = np.random.default_rng(0)
    for weight in keyed_weights(model).values():
        value = weight.variable.numpy()
        if value.dtype.kind == "f":
            noise = rng.normal(size=value.shape)
            weight.variable.assign(np.abs(value) * (1 + 0.2 * np.tanh(noise)) if (value > 0).all() else value + 0.03 * noise)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.Normalization) and layer.input_mean is None:
            layer.adapt(rng.uniform(0, 1, (4, 32, 32, 3)))
    return model
