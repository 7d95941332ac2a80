"""Fused batch norm computes what Keras' own does, and leaves to Keras what it cannot compute."""

import copy

import keras
import numpy as np
import pytest
import tensorflow as tf

import l2sp_tf as l2sp
from l2sp_tf.models.copies import detached_copy

SHAPE = (6, 5, 3)


def network(layer=keras.layers.BatchNormalization, dtype=None, **options):
    keras.utils.set_random_seed(0)
    layers = [keras.Input(SHAPE), keras.layers.Conv2D(4, 3, dtype=dtype), layer(dtype=dtype, name="bn", **options)]
    model = keras.Sequential([*layers, keras.layers.ReLU(), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)])
    rng = np.random.default_rng(1)
    model.set_weights([w + 0.3 * rng.random(w.shape) for w in model.get_weights()])
    return model


def operations(model):
    """Returns the kinds of operations in a training call."""
    inputs = tf.zeros((2, *model.input_shape[1:]))
    graph = tf.function(lambda x: model(x, training=True)).get_concrete_function(inputs).graph
    return {operation.type for operation in graph.get_operations()}


def trained(model, batch=4, jit_compile=False):
    """Returns the losses and the weights after four steps."""
    rng = np.random.default_rng(2)
    images, labels = rng.normal(2, 3, size=(4 * batch, *SHAPE)).astype("float32"), rng.integers(3, size=4 * batch)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, jit_compile=jit_compile)
    losses = [model.train_on_batch(images[i::4], labels[i::4]) for i in range(4)]
    return np.ravel(losses), model.get_weights()


@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"momentum": 0.5, "epsilon": 1e-5}])
def test_training_is_that_of_keras(options):
    plain, fused = network(**options), network(**options)
    start = [variable.numpy() for variable in fused.variables]
    assert l2sp.fuse_batch_norm(fused) == 1
    assert "FusedBatchNormV3" in operations(fused) and "FusedBatchNormV3" not in operations(plain)
    expected_losses, expected = trained(plain)
    for jit_compile in (False, True):
        for variable, value in zip(fused.variables, start, strict=True):
            variable.assign(value)
        losses, weights = trained(fused, jit_compile=jit_compile)
        np.testing.assert_allclose(losses, expected_losses, rtol=2e-5)
        for one, two in zip(weights, expected, strict=True):
            np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-5)


def test_the_statistics_are_those_of_numpy_in_float64():
    fused = keras.Sequential([keras.Input((2, 2, 3)), keras.layers.BatchNormalization(momentum=0.0)])
    l2sp.fuse_batch_norm(fused)
    x = np.random.default_rng(0).normal(1, 2, size=(3, 2, 2, 3))  # 12 numbers per channel: dividing by n - 1 would be off by 9%
    y = fused(x, training=True)
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    np.testing.assert_allclose(fused.layers[0].moving_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(fused.layers[0].moving_variance, variance, rtol=1e-5)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-3), rtol=1e-5, atol=1e-5)


def test_one_value_a_channel_has_no_variance():
    fused = keras.Sequential([keras.Input((1, 1, 2)), keras.layers.BatchNormalization(momentum=0.0)])
    l2sp.fuse_batch_norm(fused)
    assert np.all(np.isfinite(fused(np.ones((1, 1, 1, 2)), training=True)))
    np.testing.assert_array_equal(fused.layers[0].moving_variance, 0)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_is_normalised_in_float32_as_by_keras(dtype):
    plain, fused = network(dtype=dtype), network(dtype=dtype)
    l2sp.fuse_batch_norm(fused)
    x = np.random.default_rng(0).normal(size=(4, *SHAPE))
    outputs = [keras.Model(model.inputs[0], model.get_layer("bn").output)(x, training=True) for model in (plain, fused)]
    assert outputs[0].dtype == outputs[1].dtype == dtype.removeprefix("mixed_")
    np.testing.assert_allclose(*(tf.cast(y, "float32") for y in outputs), rtol=1e-2, atol=1e-2)


class Doubled(keras.layers.BatchNormalization):
    def call(self, inputs, training=None, mask=None):
        return 2 * super().call(inputs, training=training, mask=mask)


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (Doubled, {}),
        (keras.layers.BatchNormalization, {"axis": 1}),
        (keras.layers.BatchNormalization, {"dtype": "float64"}),
        (keras.layers.BatchNormalization, {"synchronized": True}),
        (keras.layers.BatchNormalization, {"trainable": False}),
        (keras.layers.BatchNormalization, {"renorm": True}),
    ],
)
def test_layers_that_cannot_be_fused_are_left_to_keras(layer, options):
    plain, other = network(layer, **options), network(layer, **options)
    l2sp.fuse_batch_norm(other)
    assert operations(other) == operations(plain)
    x = np.random.default_rng(0).normal(size=(4, *SHAPE))
    np.testing.assert_array_equal(other(x, training=True), plain(x, training=True))


def test_inference_and_vectors_are_left_to_keras():
    model = network()
    x = np.random.default_rng(0).normal(size=(2, *SHAPE))
    before = model(x)
    l2sp.fuse_batch_norm(model)
    np.testing.assert_array_equal(model(x), before)
    vectors = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    l2sp.fuse_batch_norm(vectors)
    assert "FusedBatchNormV3" not in operations(vectors)


def test_files_and_clones_are_plain_keras(tmp_path):
    model = network()
    l2sp.fuse_batch_norm(model)
    model.save(tmp_path / "model.keras")
    assert b"fuse" not in (tmp_path / "model.keras").read_bytes()
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for other in (loaded, detached_copy(model)):
        assert "FusedBatchNormV3" not in operations(other)
        assert type(other.get_layer("bn")) is keras.layers.BatchNormalization
    copied = copy.deepcopy(model.get_layer("bn"))
    assert copied.call.__self__ is copied


def test_a_traced_step_is_traced_again_and_nested_models_are_reached():
    outer = keras.Sequential([keras.Input(SHAPE), network()])
    trained(outer)
    traced = outer.train_function
    assert l2sp.fuse_batch_norm(outer) == 1 == l2sp.fuse_batch_norm(outer)
    assert outer.train_function is not traced
    assert "FusedBatchNormV3" in operations(outer)


def test_the_fisher_pass_of_a_fused_model_is_the_same():
    model = network()
    images = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype("float32")
    expected = l2sp.fisher_diagonal(model, images, mode="exact")
    l2sp.fuse_batch_norm(model)
    found = l2sp.fisher_diagonal(model, images, mode="exact")
    assert found.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key])


def test_anything_but_a_model_is_refused():
    with pytest.raises(l2sp.InputError, match="The model is a str: give a Keras model"):
        l2sp.fuse_batch_norm("model.keras")
