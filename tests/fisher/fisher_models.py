"""Small models with random weights, images for them, and a comparison of Fisher diagonals."""

import contextlib

import keras
import numpy as np
from keras import layers


@contextlib.contextmanager
def policy(name):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def randomise(model, seed=0, scale=0.5):
    """Gives each weight random values, the moving statistics and gamma included; variances are positive."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if "seed" in variable.name:
            continue
        value = rng.normal(size=variable.shape) * scale
        variable.assign(np.abs(value) + 0.3 if "variance" in variable.name else value)
    return model


def images(shape=(6, 6, 3), n=4, seed=1, dtype="float64"):
    return np.random.default_rng(seed).normal(size=(n, *shape)).astype(dtype)


def spatial(*middle, shape=(6, 6, 3), classes=3):
    """A model: a small convolution, the layers under test, global pooling, a Dense head."""
    inputs = keras.Input(shape)
    x = layers.Conv2D(4, 2, padding="same", activation="tanh", name="stem")(inputs)
    for layer in middle:
        x = layer(x)
    x = layers.GlobalAveragePooling2D()(layers.Activation("tanh")(x))
    return keras.Model(inputs, layers.Dense(classes, name="head")(x))


def sequence(*middle):
    inputs = keras.Input((5, 4))
    x = inputs
    for layer in middle:
        x = layer(x)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(layers.Activation("tanh")(x))))


def small():
    model = randomise(
        keras.Sequential([keras.Input((4,)), layers.Dense(5, activation="tanh", name="a"), layers.Dense(3, name="b")])
    )
    return model, images((4,), n=12, dtype="float32")


def assert_close(actual, expected, rtol=1e-6):
    """Equal within rtol of each entry and of the largest entry of its array.

    The bias of attention keys has F = 0 but for rounding.
    """
    assert list(actual) == [key for key in actual if key in expected] and len(actual) == len(expected)
    for key, value in actual.items():
        np.testing.assert_allclose(value, expected[key], rtol=rtol, atol=rtol * np.abs(expected[key]).max() + 1e-25, err_msg=key)
