"""Shared set-up: two virtual CPU devices, a seed for each test, and tiny models."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import pytest
import tensorflow as tf

from l2sp_tf.training.devices import make_strategy

_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(autouse=True, scope="module")
def _earlier_objects_are_hidden():
    """Hides objects made before this module from `attach` and the garbage collector, which walk over all objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    keras.utils.set_random_seed(0)


@pytest.fixture(scope="session")
def mirrored():
    """One MirroredStrategy over the two devices for all tests: TensorFlow's collectives hang when several come and go."""
    return make_strategy("mirrored")


@pytest.fixture
def small_network():
    """Returns a maker of small functional networks with a convolution, batch norm and a head of 3 classes."""

    def make(classes=3, name="small"):
        inputs = keras.Input((6, 6, 3))
        x = keras.layers.Conv2D(4, 3, name="conv1_conv")(inputs)
        x = keras.layers.BatchNormalization(name="conv1_bn")(x)
        x = keras.layers.Activation("relu", name="conv1_relu")(x)
        x = keras.layers.Conv2D(5, 3, name="conv2_conv")(x)
        x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
        return keras.Model(inputs, keras.layers.Dense(classes, name="predictions")(x), name=name)

    return make
