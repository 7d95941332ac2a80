"""The Fisher diagonal against brute force, its sampled modes and its numerics."""

import os
import pathlib
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from fisher_models import assert_close, images, policy, randomise, sequence, small, spatial
from keras import layers
from reference import fisher as reference_fisher

from l2sp_tf.files.errors import InputError
from l2sp_tf.fisher import estimator as fisher_module
from l2sp_tf.fisher.estimator import fisher_diagonal


@keras.saving.register_keras_serializable("test_fisher")
class Subclassed(keras.Model):
    """Layers in a list and in a nested model, called in a `call` of its own, with a residual."""

    def __init__(self):
        super().__init__()
        self.stem = layers.Conv2D(4, 3, padding="same")
        self.blocks = [layers.Conv2D(4, 3, padding="same", activation="tanh"), layers.BatchNormalization()]
        self.inner = keras.Sequential([layers.Flatten(), layers.Dense(5, activation="tanh")])
        self.head = layers.Dense(3)

    def call(self, x, training=None):
        x = y = self.stem(x)
        for block in self.blocks:
            y = block(y)
        return self.head(self.inner(x + y))


@keras.saving.register_keras_serializable("test_fisher")
class Gate(layers.Layer):
    """A layer with weights of its own and a layer inside, whose output they multiply and shift."""

    def build(self, shape):
        self.inner = layers.Dense(shape[-1], activation="tanh")
        self.inner.build(shape)
        self.scale = self.add_weight(shape=(shape[1], 1), name="scale")
        self.shift = self.add_weight(shape=(), name="shift")

    def call(self, x):
        return self.inner(x) * keras.ops.exp(self.scale) + x * self.shift


@keras.saving.register_keras_serializable("test_fisher")
class Standardised(layers.Dense):
    def call(self, inputs):
        return keras.ops.matmul(inputs, self.kernel / keras.ops.norm(self.kernel)) + self.bias


@keras.saving.register_keras_serializable("test_fisher")
class Mixed(layers.Layer):
    """Two inputs, one of them by keyword."""

    def build(self, x_shape, other_shape=None):
        self.kernel = self.add_weight(shape=(x_shape[-1],), name="kernel")

    def call(self, x, other=None):
        return x * self.kernel + keras.ops.square(self.kernel) * other


def two_inputs():
    inputs = keras.Input((5, 4))
    x = Mixed()(inputs, other=layers.Dense(4, activation="tanh")(inputs))
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x)))


def layer_scale():
    """The layer of keras.applications that ConvNeXt has, under no public name."""
    return sys.modules[keras.applications.ConvNeXtTiny.__module__].LayerScale(0.5, 4)


def tokens():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Dense(4, activation="tanh")(layers.Embedding(7, 5, name="words")(inputs))
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x)))


def nested():
    inner = keras.Sequential([layers.Conv2D(4, 3, name="a"), layers.BatchNormalization(name="b"), layers.ReLU()], name="inner")
    inputs = keras.Input((6, 6, 3))
    x = layers.GlobalAveragePooling2D()(inner(inputs))
    return keras.Model(inputs, layers.Dense(3)(x))


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 6, 6, 3)))
    return model


GRID = {
    "conv": lambda: spatial(layers.Conv2D(5, 3)),
    "conv_same_stride": lambda: spatial(layers.Conv2D(5, 3, strides=2, padding="same")),
    "conv_valid_stride": lambda: spatial(layers.Conv2D(5, (3, 2), strides=(2, 1))),
    "conv_stride_beyond_kernel": lambda: spatial(layers.Conv2D(5, 1, strides=2, use_bias=False)),
    "conv_even_kernel": lambda: spatial(layers.Conv2D(5, (2, 4), padding="same")),
    "conv_dilation": lambda: spatial(layers.Conv2D(5, 3, dilation_rate=2, padding="same")),
    "conv_dilation_valid": lambda: spatial(layers.Conv2D(5, 2, dilation_rate=(2, 3))),
    "conv_groups": lambda: spatial(layers.Conv2D(6, 3, groups=2, padding="same")),
    "conv_groups_stride": lambda: spatial(layers.Conv2D(4, 2, groups=4, strides=2)),
    "conv_pointwise": lambda: spatial(layers.Conv2D(5, 1)),
    "conv_one_position": lambda: spatial(layers.Conv2D(5, 6)),
    "conv_1d": lambda: sequence(layers.Conv1D(3, 2, strides=2, padding="same")),
    "conv_1d_causal": lambda: sequence(layers.Conv1D(3, 2, dilation_rate=2, padding="causal")),
    "depthwise": lambda: spatial(layers.DepthwiseConv2D(3, padding="same")),
    "depthwise_multiplier": lambda: spatial(layers.DepthwiseConv2D(3, strides=2, depth_multiplier=2, padding="same")),
    "depthwise_dilation": lambda: spatial(layers.DepthwiseConv2D(2, dilation_rate=2, depth_multiplier=3, activation="tanh")),
    "separable": lambda: spatial(layers.SeparableConv2D(5, 3, strides=2, padding="same", depth_multiplier=2, activation="tanh")),
    "batch_normalization": lambda: spatial(layers.BatchNormalization()),
    "batch_normalization_no_gamma": lambda: spatial(layers.BatchNormalization(scale=False)),
    "batch_normalization_axis": lambda: spatial(layers.BatchNormalization(axis=1)),
    "layer_normalization": lambda: spatial(layers.LayerNormalization()),
    "layer_normalization_axes": lambda: spatial(layers.LayerNormalization(axis=(-3, -1))),
    "dense": lambda: spatial(layers.GlobalAveragePooling2D(keepdims=True), layers.Dense(5)),
    "dense_flat": lambda: keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            layers.Flatten(),
            layers.Dense(5, activation="gelu"),
            layers.BatchNormalization(),
            layers.Dense(3),
        ]
    ),
    "dense_tokens": lambda: sequence(layers.Dense(3, activation="tanh"), layers.LayerNormalization()),
    "einsum": lambda: sequence(layers.EinsumDense("abc,cd->abd", output_shape=(None, 3), bias_axes="d", activation="tanh")),
    "einsum_dots": lambda: sequence(layers.EinsumDense("...x,xy->...y", output_shape=3, bias_axes="y")),
    "einsum_heads": lambda: sequence(
        layers.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3), bias_axes="de"), layers.Reshape((5, 6))
    ),
    "einsum_positions": lambda: sequence(layers.EinsumDense("abc,bcd->abd", output_shape=(5, 3), bias_axes="bd")),
    "prelu": lambda: spatial(layers.PReLU()),
    "group_normalization": lambda: spatial(layers.GroupNormalization(2)),
    "rms_normalization": lambda: sequence(layers.RMSNormalization()),
    "transposed": lambda: spatial(layers.Conv2DTranspose(3, 3, strides=2)),
    "layer_scale": lambda: spatial(layer_scale()),
    "embedding": lambda: tokens(),
    "weights_around_layers": lambda: sequence(Gate(name="gate"), layers.Dense(3)),
    "standardised": lambda: sequence(Standardised(3)),
    "two_inputs": lambda: two_inputs(),
    "attention": lambda: sequence_with_attention(),
    "softmax": lambda: spatial_softmax(),
    "softmax_layer": lambda: keras.Sequential([keras.Input((6, 6, 3)), layers.Flatten(), layers.Dense(4), layers.Softmax()]),
    "convolutional_head": lambda: convolutional_head(),
    "nested": nested,
    "subclassed": subclassed,
}


def sequence_with_attention():
    inputs = keras.Input((5, 4))
    x = layers.MultiHeadAttention(2, 3, name="attention")(inputs, inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling1D()(x)))


def spatial_softmax():
    inputs = keras.Input((6, 6, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3, activation="relu")(inputs))
    return keras.Model(inputs, layers.Dense(3, activation="softmax")(x))


def convolutional_head():
    inputs = keras.Input((6, 6, 3))
    x = layers.GlobalAveragePooling2D(keepdims=True)(layers.Conv2D(4, 3, activation="relu")(inputs))
    return keras.Model(inputs, layers.Softmax()(layers.Reshape((3,))(layers.Conv2D(3, 1)(x))))


@pytest.mark.parametrize("kind", GRID)
def test_exact_equals_brute_force(kind):
    with policy("float64"):
        model = randomise(GRID[kind]())
    x = images(model.input_shape[1:] if kind != "subclassed" else (6, 6, 3), n=3)  # batches of 2 and of 1
    if kind == "embedding":
        x = np.random.default_rng(0).integers(0, 5, size=(3, 6))  # words repeat, and two are never met
    before = [variable.numpy() for variable in model.variables]
    expected = reference_fisher.fisher_diagonal(model, x, softmax="softmax" in kind or kind == "convolutional_head")
    assert_close(fisher_diagonal(model, x, "exact", batch_size=2), expected)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_more_classes_than_go_side_by_side():
    with policy("float64"):
        inputs = keras.Input((5, 5, 2))
        x = layers.GlobalAveragePooling2D()(layers.Conv2D(3, 2, activation="tanh")(inputs))
        model = randomise(keras.Model(inputs, layers.Dense(13)(x)))
    x = images((5, 5, 2))
    assert_close(fisher_diagonal(model, x, "exact", batch_size=3), reference_fisher.fisher_diagonal(model, x))


@pytest.mark.parametrize("kind", ["conv_same_stride", "batch_normalization", "einsum_heads", "subclassed"])
def test_slow_path_equals_brute_force(kind):
    with policy("float64"):
        model = randomise(GRID[kind]())
    x = images(model.input_shape[1:] if kind != "subclassed" else (6, 6, 3))
    assert_close(fisher_diagonal(model, x, "exact", slow_fallback=True), reference_fisher.fisher_diagonal(model, x))


@pytest.mark.parametrize("name", ["float32", "float16", "mixed_float16", "bfloat16"])
def test_computes_in_float32(name):
    def build():
        conv = layers.Conv2D(5, 3, strides=2, activation="relu", name="conv")
        return spatial(layers.BatchNormalization(name="bn"), conv, layers.PReLU(name="prelu"))

    with policy(name):
        model = randomise(build())
    with policy("float64"):
        exact = build()
    exact.set_weights([value.astype("float64") for value in model.get_weights()])
    x = images(dtype="float32")
    expected = reference_fisher.fisher_diagonal(exact, x)
    policies = [layer.dtype_policy.name for layer in model._flatten_layers()]
    for slow in (False, True):
        assert_close(fisher_diagonal(model, x, "exact", slow_fallback=slow), expected, rtol=2e-5)
    assert [layer.dtype_policy.name for layer in model._flatten_layers()] == policies
    assert not any("call" in vars(layer) for layer in model._flatten_layers())


def test_softmax_regression_in_closed_form():
    """For z = W h + b: F_W[c, k] = mean h_c^2 p_k (1 - p_k), F_b[k] = mean p_k (1 - p_k)."""
    model = randomise(keras.Sequential([keras.Input((5,)), layers.Dense(4, name="head")]))
    h = images((5,), n=50, dtype="float32")
    z = h.astype("float64") @ model.get_weights()[0] + model.get_weights()[1]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    expected = {"head/kernel": (h**2).T @ (p * (1 - p)) / 50, "head/bias": (p * (1 - p)).mean(0)}
    for mode in fisher_module.MODES:
        assert_close(fisher_diagonal(model, h, mode), expected, rtol=1e-5)


@pytest.mark.parametrize("mode", fisher_module.MODES)
def test_batches_and_parts_change_nothing(mode):
    model = randomise(spatial(layers.BatchNormalization()))
    x = images(n=11, dtype="float32")
    arguments = {"samples": 1 if mode == "exact" else 4}  # more than `COLUMNS`
    whole = fisher_diagonal(model, x, mode, **arguments, batch_size=11)
    for other in (
        fisher_diagonal(model, x, mode, **arguments, batch_size=4),
        fisher_diagonal(model, tf.data.Dataset.from_tensor_slices((x, np.zeros(11))).batch(3), mode, **arguments),
        fisher_diagonal(model, tf.data.Dataset.from_tensor_slices(x).batch(3), mode, **arguments, batch_size=2),
        fisher_diagonal(model, x[:5], mode, **arguments) + fisher_diagonal(model, x[5:], mode, **arguments, first=5),
    ):
        assert_close(other, whole, rtol=1e-5)
    fast, slow = whole, fisher_diagonal(model, x, mode, **arguments, slow_fallback=True)
    fast, slow = ({key: f[key] for key in f if not key.startswith("head")} for f in (fast, slow))
    assert_close(slow, fast, rtol=1e-5)  # the slow path samples the head too


def test_order_changes_nothing():
    model = randomise(spatial(layers.Conv2D(5, 3)))
    x = images(n=9, dtype="float32")
    assert_close(
        fisher_diagonal(model, x[::-1], "exact", batch_size=4), fisher_diagonal(model, x, "exact", batch_size=2), rtol=1e-5
    )


def test_same_padding_is_zero_padding():
    same = spatial(layers.Conv2D(5, 3, padding="same", name="a"))
    padded = spatial(layers.ZeroPadding2D(1), layers.Conv2D(5, 3, name="a"))
    padded.set_weights(randomise(same).get_weights())
    x = images(dtype="float32")
    assert_close(fisher_diagonal(padded, x, "exact"), fisher_diagonal(same, x, "exact"), rtol=1e-5)


def test_two_classes_have_no_variance_with_signs():
    with policy("float64"):
        model = randomise(spatial(layers.Conv2D(5, 3), classes=2))
    expected = reference_fisher.fisher_diagonal(model, images())
    for mode in ("rademacher", "exact"):
        assert_close(fisher_diagonal(model, images(), mode), expected)


@pytest.mark.parametrize("mode", ["rademacher", "mc"])
def test_sampled_modes_have_the_variance_of_the_formula(mode):
    """Over R passes the mean estimate is F within sd / sqrt(R), and its variance that of reference.one_draw_variances."""
    with policy("float64"):
        model = randomise(spatial(layers.BatchNormalization(), classes=4), scale=0.8)
    x, passes = images(n=6), 1000
    expected = reference_fisher.fisher_diagonal(model, x)
    variances = reference_fisher.one_draw_variances(model, x)[mode == "mc"]
    estimator = fisher_module._Estimator(model, mode, 1, 0, None, False)
    draws = [estimator(x, 6 * r) for r in range(passes)]
    for key in ("stem/kernel", "stem/bias", "batch_normalization/gamma", "batch_normalization/beta"):
        key = next(k for k in expected if k.split("/")[0].startswith(key.split("/")[0]) and k.endswith(key.split("/")[1]))
        estimates = np.stack([draw[key].numpy() for draw in draws]) / len(x)
        z = (estimates.mean(0) - expected[key]) / np.sqrt(variances[key] / passes)
        assert np.abs(z).max() < 4.5 and np.sqrt((z**2).mean()) < 2.5, key
        ratio = estimates.var(0, ddof=1) / variances[key]
        assert 0.8 < ratio.mean() < 1.25, key


def test_signs_beat_labels_where_the_model_is_confident():
    with policy("float64"):
        model = randomise(spatial(classes=4))
        model.get_layer("head").bias.assign([6.0, 0, 0, 0])
    signs, labels = reference_fisher.one_draw_variances(model, images())
    assert all(np.all(signs[key] <= labels[key]) for key in signs)


@pytest.mark.parametrize("mode", fisher_module.MODES)
@pytest.mark.parametrize("softmax", [False, True])
def test_logit_gaps_of_100(mode, softmax):
    model = randomise(spatial_softmax() if softmax else spatial())
    model.layers[-1].bias.assign([100.0, 0, -100])
    f = fisher_diagonal(model, images(dtype="float32"), mode)
    assert all(np.all(np.isfinite(array)) and np.all(array >= 0) for array in f.values())


def test_confident_predictions_keep_their_digits():
    with policy("float64"):
        exact = randomise(spatial())
        exact.get_layer("head").bias.assign([20.0, 0, 1])
    model = spatial()
    model.set_weights(exact.get_weights())
    x = images(dtype="float32")
    assert_close(fisher_diagonal(model, x, "exact"), reference_fisher.fisher_diagonal(exact, x), rtol=1e-4)


@pytest.mark.parametrize("kind", [layers.BatchNormalization, layers.LayerNormalization])
def test_gamma_zero(kind):
    with policy("float64"):
        model = randomise(spatial(kind(name="norm")))
    model.get_layer("norm").gamma.assign(np.zeros(4))
    expected = reference_fisher.fisher_diagonal(model, images())
    assert_close(fisher_diagonal(model, images(), "exact"), expected)
    assert expected["norm/gamma"].any()


def shared():
    layer = layers.Conv2D(4, 3, padding="same", name="twin")
    return spatial(layer, layer)


def tied():
    class Tied(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.head = layers.Dense(5, name="first"), layers.Dense(3, name="head")

        def call(self, x):
            h = self.first(x)
            return self.head(keras.ops.matmul(keras.ops.tanh(h), keras.ops.transpose(self.first.kernel)))

    model = Tied()
    model(np.zeros((1, 7)))
    return model


def recurrent():
    return sequence(layers.LSTM(3, return_sequences=True, name="memory"))


def over_time():
    return sequence(layers.TimeDistributed(layers.Dense(3, name="each"), name="time"))


@pytest.mark.parametrize(
    ("build", "name"), [(shared, "twin"), (tied, "first/kernel"), (recurrent, "lstm_cell"), (over_time, "each")]
)
def test_shared_and_looped_layers_are_refused_and_the_slow_path_is_right(build, name):
    with policy("float64"):
        model = randomise(build())
    x = images(model.input_shape[1:] if build is not tied else (7,))
    with pytest.raises(InputError, match=name):
        fisher_diagonal(model, x)
    assert not any("call" in vars(layer) for layer in model._flatten_layers())
    assert_close(fisher_diagonal(model, x, "exact", slow_fallback=True), reference_fisher.fisher_diagonal(model, x))


def test_a_layer_without_examples_is_named():
    class Halves(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=shape[1:], name="kernel")

        def call(self, x):
            return x * self.kernel, x

    inputs = keras.Input((4,))
    first, second = Halves(name="odd")(inputs)
    model = keras.Model(inputs, layers.Dense(2)(first + second))
    with pytest.raises(InputError, match=r"The layer odd \(Halves\) does not give one tensor"):
        fisher_diagonal(model, images((4,)))
    fisher_diagonal(model, images((4,)), slow_fallback=True)


def test_lora_is_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(5, name="low"), layers.Dense(2)])
    model.layers[0].enable_lora(2)
    with pytest.raises(InputError, match="low"):
        fisher_diagonal(model, images((4,)))


def test_frozen_weights_have_no_entry():
    model = spatial(layers.PReLU(name="strange"))
    model.get_layer("strange").trainable = False
    assert set(fisher_diagonal(model, images(dtype="float32"))) == {"stem/kernel", "stem/bias", "head/kernel", "head/bias"}


def test_standard_error_is_honest():
    """Over many passes on fresh images, the error in units of the standard error has a variance near 1."""
    model, _ = small()
    x = images((4,), n=4000, dtype="float32", seed=7)
    truth = fisher_diagonal(model, x, "exact", batch_size=500)["a/kernel"].mean()
    estimator = fisher_module._Estimator(model, "rademacher", 1, 0, None, False)
    z = []
    for r in range(40):
        sums = fisher_module._Sums(estimator.weights)
        for b in range(20):
            sums.add(5, estimator(x[100 * r + 5 * b : 100 * r + 5 * b + 5], 100 * r + 5 * b))
        mean = np.concatenate([sums.means()["a/kernel"].ravel(), sums.means()["a/bias"]]).mean()
        z.append((mean, sums.standard_error()["a"] * mean))
    means, errors = np.array(z).T
    assert 0.6 < means.std(ddof=1) / errors.mean() < 1.6 and truth > 0


def test_tolerance_stops_early():
    model, _ = small()
    x = images((4,), n=400, dtype="float32")
    f = fisher_diagonal(model, x, batch_size=4, tolerance=0.2)
    assert 8 * 4 <= f.provenance["images"] < 400 and max(f.standard_error().values()) <= 0.2
    assert fisher_diagonal(model, x[:100], batch_size=4, tolerance=1e-9).provenance["images"] == 100


def test_a_batch_that_does_not_fit_is_split(monkeypatch):
    model, x = small()
    whole = fisher_diagonal(model, x, samples=3, batch_size=12)
    run, sizes = fisher_module._Estimator._run, []

    def cramped(self, x, first):
        sizes.append(len(x))
        if len(x) > 4:
            raise tf.errors.ResourceExhaustedError(None, None, "no memory")
        return run(self, x, first)

    monkeypatch.setattr(fisher_module._Estimator, "_run", cramped)
    split = fisher_diagonal(model, x, samples=3, batch_size=12)
    assert_close(split, whole, rtol=1e-5)
    assert split.provenance == whole.provenance and sizes == [12, 6, 3, 3, 3, 3]
    monkeypatch.setattr(fisher_module._Estimator, "_run", lambda *_: cramped(None, np.zeros(9), 0))
    with pytest.raises(tf.errors.ResourceExhaustedError):
        fisher_diagonal(model, x[:1])


def test_probabilities_without_a_softmax_operation():
    inputs = keras.Input((4,))
    x = layers.Dense(3, name="head", activation=lambda z: keras.ops.exp(z) / keras.ops.sum(keras.ops.exp(z), -1, keepdims=True))(
        inputs
    )
    model = randomise(keras.Model(inputs, x))
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(3, name="head")])
    plain.set_weights(model.get_weights())
    x = images((4,), dtype="float32")
    with pytest.raises(InputError, match="from_logits"):
        fisher_diagonal(model, x)
    assert_close(fisher_diagonal(model, x, "exact", from_logits=False), fisher_diagonal(plain, x, "exact"), rtol=1e-4)
    assert fisher_diagonal(model, x, "exact", from_logits=True)


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "empirical"},
        {"samples": 0},
        {"samples": 2, "mode": "exact"},
        {"seed": -1},
        {"seed": 0.5},
        {"tolerance": 0},
        {"images": np.zeros((0, 4), "float32")},
        {"images": [1, 2]},
    ],
)
def test_bad_arguments_are_refused(arguments):
    model, x = small()
    with pytest.raises(InputError):
        fisher_diagonal(model, **{"images": x, **arguments})


def test_a_model_that_is_not_a_classifier_is_refused():
    model = keras.Sequential([keras.Input((4,)), layers.Reshape((2, 2)), layers.Dense(3)])
    with pytest.raises(InputError, match="classes"):
        fisher_diagonal(model, images((4,)))
    model.trainable = False
    with pytest.raises(InputError, match="trainable"):
        fisher_diagonal(model, images((4,)))


def test_non_finite_results_are_refused():
    model, x = small()
    x[0] = np.nan
    with pytest.raises(InputError, match="not finite"):
        fisher_diagonal(model, x)


def test_progress_bar(capsys):
    model, x = small()
    fisher_diagonal(model, x, batch_size=4, progress=True)
    assert "3/3" in capsys.readouterr().out


def test_agrees_with_backpack():
    """BackPACK's DiagGGNExact on identical weights; skipped where PyTorch and BackPACK are not installed."""
    backpack = pytest.importorskip("backpack", reason="needs torch and backpack-for-pytorch")
    import torch

    model = randomise(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(4, 3, activation="relu", name="a"),
                layers.Conv2D(5, 3, strides=2, activation="relu", name="b"),
                layers.GlobalAveragePooling2D(),
                layers.Dense(4, name="head"),
            ]
        )
    )
    x = images((8, 8, 3), n=6, dtype="float32")
    f = fisher_diagonal(model, x, "exact")
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 5, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(5, 4),
    )
    with torch.no_grad():
        for module, name in ((net[0], "a"), (net[2], "b"), (net[6], "head")):
            kernel, bias = model.get_layer(name).get_weights()
            module.weight.copy_(torch.tensor(kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T))
            module.bias.copy_(torch.tensor(bias))
    net, loss = backpack.extend(net), backpack.extend(torch.nn.CrossEntropyLoss())
    with backpack.backpack(backpack.extensions.DiagGGNExact()):
        loss(net(torch.tensor(x.transpose(0, 3, 1, 2))), torch.zeros(6, dtype=torch.long)).backward()
    for module, name in ((net[0], "a"), (net[2], "b"), (net[6], "head")):
        kernel = module.weight.diag_ggn_exact.numpy()
        kernel = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
        np.testing.assert_allclose(f[f"{name}/kernel"], kernel, rtol=1e-3, atol=1e-5 * kernel.max())
        np.testing.assert_allclose(f[f"{name}/bias"], module.bias.diag_ggn_exact.numpy(), rtol=1e-3)


@pytest.mark.slow
def test_peak_memory_stays_below_the_formula():
    root = pathlib.Path(__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks.fisher", "--memory", "--modes=rademacher,exact"]
    printed = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=True
    )
    ratios = [float(line.rpartition(" ")[2]) for line in printed.stdout.splitlines() if "formula" in line]
    assert len(ratios) == 2 and all(0.1 < ratio <= 1 for ratio in ratios)
