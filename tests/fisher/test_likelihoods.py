"""The meaning of an output, for any operation and any compiled loss, and its Fisher diagonal."""

import functools

import fisher_models
import keras
import numpy as np
import pytest
import tensorflow as tf
from fisher_models import assert_close, images, policy
from keras import layers, losses, ops
from reference import fisher as reference_fisher, likelihoods as bernoulli_oracle

from l2sp_tf.files.errors import InputError
from l2sp_tf.fisher import estimator as fisher_module, likelihoods
from l2sp_tf.fisher.estimator import fisher_diagonal
from l2sp_tf.fisher.likelihoods import likelihood_of


def dense(classes, *behind, hidden=True):
    """A model: two Dense layers and the layers behind them."""
    inputs = x = keras.Input((4,))
    if hidden:
        x = layers.Dense(5, activation="tanh", name="hidden")(x)
    x = layers.Dense(classes, name="head")(x)
    for layer in behind:
        x = layer(x)
    return keras.Model(inputs, x, name="net")


def convolutional(classes, *behind):
    inputs = keras.Input((4, 4, 3))
    x = layers.Conv2D(classes, 3, name="scores")(inputs)
    for layer in behind:
        x = layer(x)
    return keras.Model(inputs, x, name="net")


class Subclassed(keras.Model):
    def __init__(self, classes, activation):
        super().__init__(name="net")
        self.inner = keras.Sequential([layers.Dense(5, activation="tanh"), layers.Dense(classes)])
        self.last = layers.Activation(activation, dtype="float32")
        self(np.zeros((1, 4)))

    def call(self, x):
        return self.last(self.inner(x))


def nested(activation):
    inputs = keras.Input((4,))
    return keras.Model(inputs, dense(3, layers.Activation(activation))(inputs), name="net")


def mean_of(first, second):
    inputs = keras.Input((4,))
    return keras.Model(inputs, layers.Average()([layers.Dense(3, first)(inputs), layers.Dense(3, second)(inputs)]), name="net")


def scaled():
    class Temperature(layers.Layer):
        def build(self, shape):
            self.log_t = self.add_weight(shape=(), name="log_t")

        def call(self, x):
            return x * ops.exp(-self.log_t)

    return dense(3, Temperature())


def traced(model):
    """The output of a model, traced."""
    shape = model.inputs[0].shape[1:] if getattr(model, "inputs", None) else (4,)
    call = tf.function(lambda x: model(x, training=False), autograph=False)
    return call.get_concrete_function(tf.TensorSpec([None, *shape], tf.float32)).graph.structured_outputs


def meant(model, from_logits=None):
    """The likelihood of a model's output."""
    return likelihood_of(traced(model), model, from_logits)


SOFTMAX, SIGMOIDS, LOGITS = ("categorical", True), ("bernoulli", True), ("categorical", False)
BY_OPERATION = {
    "dense": (lambda: dense(3), LOGITS),
    "dense without bias": (lambda: keras.Sequential([keras.Input((4,)), layers.Dense(2, use_bias=False)]), LOGITS),
    "einsum": (lambda: dense(3, layers.EinsumDense("ab,bc->ac", output_shape=3, bias_axes="c")), LOGITS),
    "batch norm": (lambda: dense(3, layers.BatchNormalization()), LOGITS),
    "temperature": (lambda: dense(3, layers.Rescaling(1 / 3)), LOGITS),
    "quotient": (lambda: dense(3, layers.Lambda(lambda z: z / 2.5)), LOGITS),
    "learned temperature": (scaled, LOGITS),
    "dropout": (lambda: dense(3, layers.Dropout(0.5)), LOGITS),
    "linear": (lambda: dense(3, layers.Activation("linear"), layers.Reshape((1, 1, 3)), layers.Flatten()), LOGITS),
    "pooled": (lambda: convolutional(3, layers.GlobalAveragePooling2D()), LOGITS),
    "pooled and normalised": (lambda: convolutional(3, layers.BatchNormalization(), layers.GlobalAveragePooling2D()), LOGITS),
    "average pooling": (lambda: convolutional(3, layers.AveragePooling2D(2), layers.Flatten()), LOGITS),
    "average of scores": (lambda: mean_of(None, None), LOGITS),
    "mixed": (lambda: Subclassed(3, "linear"), LOGITS),
    "softmax": (lambda: dense(3, layers.Activation("softmax")), SOFTMAX),
    "softmax layer": (lambda: dense(3, layers.Softmax()), SOFTMAX),
    "softmax axes": (lambda: dense(3, layers.Softmax(axis=(1,))), SOFTMAX),
    "softmax function": (lambda: dense(3, layers.Lambda(ops.softmax)), SOFTMAX),
    "softmax reshaped": (lambda: dense(3, layers.Softmax(), layers.Reshape((1, 1, 3)), layers.Flatten()), SOFTMAX),
    "softmax first": (lambda: dense(3, layers.Reshape((3, 1, 1)), layers.Softmax(axis=1), layers.Flatten()), SOFTMAX),
    "softmax squeezed": (
        lambda: dense(3, layers.Reshape((1, 3)), layers.Softmax(), layers.Lambda(lambda p: ops.squeeze(p, 1))),
        SOFTMAX,
    ),
    "softmax cast": (lambda: dense(3, layers.Softmax(dtype="float16"), layers.Lambda(lambda p: ops.cast(p, "float32"))), SOFTMAX),
    "softmax of position": (lambda: dense(3, layers.Reshape((1, 1, 3)), layers.Softmax()), SOFTMAX),
    "softmax subclassed": (lambda: Subclassed(3, "softmax"), SOFTMAX),
    "softmax nested": (lambda: nested("softmax"), SOFTMAX),
    "log softmax": (lambda: dense(3, layers.Activation("log_softmax")), LOGITS),
    "sigmoid": (lambda: dense(1, layers.Activation("sigmoid")), SIGMOIDS),
    "sigmoids": (lambda: dense(3, layers.Activation("sigmoid")), SIGMOIDS),
    "sigmoid function": (lambda: dense(3, layers.Lambda(ops.sigmoid)), SIGMOIDS),
    "sigmoids subclassed": (lambda: Subclassed(3, "sigmoid"), SIGMOIDS),
    "sigmoids nested": (lambda: nested("sigmoid"), SIGMOIDS),
    "sigmoid of position": (lambda: dense(1, layers.Reshape((1, 1, 1)), layers.Activation("sigmoid")), SIGMOIDS),
    "sigmoid without axis": (lambda: dense(1, layers.Activation("sigmoid"), layers.Reshape(())), SIGMOIDS),
}
NON_LINEAR = ("tanh", "relu", "relu6", "elu", "selu", "softplus", "softsign", "silu", "gelu", "mish", "hard_sigmoid", "hard_silu")
NON_LINEAR += ("exponential", "log_sigmoid", "leaky_relu", "celu", "sparse_plus", "squareplus", "hard_tanh", "sparsemax")
NON_LINEAR += ("glu", "soft_shrink", "tanh_shrink", "sparse_sigmoid", "hard_shrink")
UNKNOWN = {name: (lambda name=name: dense(4, layers.Activation(name))) for name in NON_LINEAR}
UNKNOWN |= {
    "average of softmaxes": lambda: mean_of("softmax", "softmax"),
    "average with a sigmoid": lambda: mean_of(None, "sigmoid"),
    "scaled sigmoid": lambda: dense(3, layers.Activation("sigmoid"), layers.Rescaling(5.0)),
    "pooled features": lambda: convolutional(3, layers.ReLU(), layers.GlobalAveragePooling2D()),
    "pooled softmaxes": lambda: convolutional(3, layers.Softmax(), layers.GlobalAveragePooling2D()),
    "maxima": lambda: convolutional(3, layers.GlobalMaxPooling2D()),
    "unit length": lambda: dense(3, layers.UnitNormalization()),
    "layer norm": lambda: dense(3, layers.LayerNormalization()),
    "prelu": lambda: dense(3, layers.PReLU()),
    "product": lambda: dense(3, layers.Lambda(lambda z: z * z)),
    "quotient of a score": lambda: dense(3, layers.Lambda(lambda z: 1 / z)),
    "softmax by hand": lambda: dense(3, layers.Lambda(lambda z: ops.exp(z) / ops.sum(ops.exp(z), -1, keepdims=True))),
    "recurrent": lambda: dense(3, layers.Reshape((3, 1)), layers.LSTM(2)),
}


@pytest.mark.parametrize("name", list(BY_OPERATION))
def test_the_operation_decides(name):
    build, expected = BY_OPERATION[name]
    for precision in ("mixed_float16", "bfloat16", "float32"):
        with policy(precision):
            model = build()
        output = traced(model)
        found = likelihood_of(output, model)
        assert (found.family, found.is_probability) == expected
        assert found.assumed == (expected == LOGITS and name != "log softmax")
    if not found.assumed:  # neither the loss nor from_logits counts
        model.compile("sgd", "mse")
        assert [likelihood_of(output, model, given).family for given in (None, True, False)] == [expected[0]] * 3


@pytest.mark.parametrize("name", list(UNKNOWN))
def test_other_operations_are_named_and_refused(name):
    model = UNKNOWN[name]()
    output = traced(model)
    with pytest.raises(InputError, match=r"comes from the operation \w+ \(.*\), which does not say .*: pass from_logits"):
        likelihood_of(output, model)
    assert [likelihood_of(output, model, given).is_probability for given in (True, False)] == [False, True]
    model.compile("sgd", losses.BinaryCrossentropy(from_logits=True))
    found = likelihood_of(output, model)
    assert (found.family, found.is_probability) == ("bernoulli", False)


def both(*names):
    return [(getattr(losses, name), getattr(losses, keras.src.utils.naming.to_snake_case(name))) for name in names]


def spellings(family, cls, function):
    """Each way of writing a loss, with its family and its from_logits."""
    for from_logits in (True, False):
        yield cls(from_logits=from_logits), family, from_logits
        yield functools.partial(function, from_logits=from_logits), family, from_logits
        yield functools.partial(functools.partial(function), from_logits=from_logits), family, from_logits
    yield from ((loss, family, False) for loss in (function, function.__name__, cls.__name__, cls()))


LOSSES = [
    row
    for family, names in (
        ("categorical", ("CategoricalCrossentropy", "SparseCategoricalCrossentropy", "CategoricalFocalCrossentropy")),
        ("bernoulli", ("BinaryCrossentropy", "BinaryFocalCrossentropy")),
    )
    for cls, function in both(*names)
    for row in (spellings(family, cls, function) if "Focal" not in cls.__name__ or family == "bernoulli" else ())
]
LOSSES += [(losses.CategoricalFocalCrossentropy(from_logits=given), "categorical", given) for given in (True, False)]
LOSSES += [(loss, "categorical", False) for loss in ("kl_divergence", losses.KLDivergence(), "kld", "crossentropy", "ce")]
LOSSES += [(losses.CategoricalGeneralizedCrossEntropy(), "categorical", False)]
LOSSES += [(tf.nn.sparse_softmax_cross_entropy_with_logits, "categorical", True)]


def test_the_compiled_loss_decides_where_no_operation_does():
    model = dense(3, layers.Activation("tanh"))
    output = traced(model)
    for loss, family, from_logits in LOSSES:
        for form in (loss, [loss], {model.output_names[0]: loss}):
            model.compile("sgd", form)
            found = likelihood_of(output, model)
            assert (found.family, found.is_probability, found.assumed) == (family, not from_logits, False), loss
            assert [likelihood_of(output, model, given).is_probability for given in (True, False)] == [
                False,
                True,
            ]  # from_logits has priority
            assert likelihood_of(output, model, True).family == family
    model.compile("sgd", [losses.MeanSquaredError(), losses.BinaryCrossentropy(from_logits=True)])
    assert likelihood_of(output, model).family == "bernoulli"


def test_a_loss_that_says_nothing_is_named():
    for model in (dense(3), dense(1), dense(3, layers.Activation("tanh"))):
        for loss in ("mse", losses.Hinge(), losses.CategoricalHinge(), lambda y, z: z, ["mae"], losses.Dice(), "huber"):
            model.compile("sgd", loss)
            with pytest.raises(InputError, match="has the loss .*, which does not say .*: pass from_logits"):
                meant(model)
            assert meant(model, True).family == ("bernoulli" if model.output_shape[-1] == 1 else "categorical")


def test_a_single_number_needs_from_logits_or_a_loss():
    with pytest.raises(InputError, match="is one number, and nothing says what it means"):
        meant(dense(1))
    with pytest.raises(InputError, match="a softmax is always 1"):
        meant(dense(1, layers.Softmax()))
    model = dense(1)
    for loss, expected in (("binary_crossentropy", True), (losses.BinaryCrossentropy(from_logits=True), False), ("ce", True)):
        model.compile("sgd", loss)
        assert (meant(model).family, meant(model).is_probability) == ("bernoulli", expected)
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(InputError, match="a softmax is always 1"):
        meant(model)
    with pytest.raises(InputError, match="from_logits is 'yes'"):
        meant(model, "yes")


def test_shapes_that_are_not_class_scores_are_refused():
    for model in (dense(6, layers.Reshape((2, 3))), dense(6, layers.Reshape((6, 1))), convolutional(3)):
        with pytest.raises(InputError, match=r"give a classifier with one output of shape \(batch, classes\)"):
            meant(model)
    for axis in (1, 2):
        with pytest.raises(InputError, match="its softmax is over values of the shape"):
            meant(dense(6, layers.Reshape((2, 3)), layers.Softmax(axis=axis), layers.Flatten()))
    with pytest.raises(InputError, match="its softmax is over values"):
        meant(dense(3, layers.Softmax(axis=0)))


def test_weights_of_another_graph_are_not_the_image():
    """A product with what depends on the image is not linear, though its other factor is a weight's."""

    class Gate(layers.Layer):
        def build(self, shape):
            self.gate = layers.Dense(shape[-1], activation="sigmoid")
            self.gate.build(shape)

        def call(self, z):
            return z * self.gate(z)

    with pytest.raises(InputError, match=r"Mul \(.*gate"):
        meant(dense(3, Gate(name="gate")))


# The Fisher diagonal.


randomise, vectors = functools.partial(fisher_models.randomise, scale=0.7), functools.partial(images, (4,))


def compiled(model, loss):
    model.compile("sgd", loss)
    return model


def logistic(z):
    return 1 / (1 + ops.exp(-z))


# name -> (model, options, the oracle, whether its outputs are logits)
MODELS = {
    "softmax": (lambda: dense(3, layers.Softmax()), {}, reference_fisher, False),
    "log softmax": (lambda: dense(3, layers.Activation("log_softmax")), {}, reference_fisher, True),
    "logits": (lambda: dense(4), {}, reference_fisher, True),
    "two logits": (lambda: dense(2), {}, reference_fisher, True),
    "scores pooled": (lambda: convolutional(3, layers.GlobalAveragePooling2D()), {}, reference_fisher, True),
    "softmax of position": (
        lambda: dense(3, layers.Reshape((1, 1, 3)), layers.Softmax(), layers.Flatten()),
        {},
        reference_fisher,
        False,
    ),
    "classes given": (lambda: dense(3, layers.Activation("tanh")), {"from_logits": True}, reference_fisher, True),
    "sigmoid": (lambda: dense(1, layers.Activation("sigmoid")), {}, bernoulli_oracle, False),
    "sigmoids": (lambda: dense(3, layers.Activation("sigmoid")), {}, bernoulli_oracle, False),
    "sigmoids moved": (
        lambda: dense(4, layers.Reshape((2, 2)), layers.Activation("sigmoid"), layers.Permute((2, 1)), layers.Flatten()),
        {},
        bernoulli_oracle,
        False,
    ),
    "sigmoids at positions": (
        lambda: dense(2, layers.Reshape((1, 1, 2)), layers.Activation("sigmoid")),
        {},
        bernoulli_oracle,
        False,
    ),
    "one logit by loss": (
        lambda: compiled(dense(1), losses.BinaryCrossentropy(from_logits=True)),
        {},
        bernoulli_oracle,
        True,
    ),
    "logits by loss": (lambda: compiled(dense(3), losses.BinaryCrossentropy(from_logits=True)), {}, bernoulli_oracle, True),
    "one logit given": (lambda: dense(1), {"from_logits": True}, bernoulli_oracle, True),
    "by hand": (lambda: dense(1, layers.Lambda(logistic)), {"from_logits": False}, bernoulli_oracle, False),
    "by hand and loss": (lambda: compiled(dense(3, layers.Lambda(logistic)), "binary_crossentropy"), {}, bernoulli_oracle, False),
    "subclassed": (lambda: Subclassed64(3), {}, bernoulli_oracle, False),
}


class Subclassed64(keras.Model):
    def __init__(self, classes):
        super().__init__()
        self.first, self.second = layers.Dense(5, activation="tanh", name="hidden"), layers.Dense(classes, name="head")
        self(np.zeros((1, 4)))

    def call(self, x):
        return ops.sigmoid(self.second(self.first(x)))


def oracle(module, model, x, logits):
    if module is reference_fisher:
        return module.fisher_diagonal(model, x, softmax=not logits)
    return module.fisher_diagonal(model, x, logits=logits)


@pytest.mark.parametrize("name", list(MODELS))
def test_exact_equals_brute_force(name):
    build, options, module, logits = MODELS[name]
    with policy("float64"):
        model = randomise(build())
    x = images(shape=model.input_shape[1:] if name != "subclassed" else (4,))
    expected = oracle(module, model, x, logits)
    for slow in (False, True):
        assert_close(fisher_diagonal(model, x, "exact", **options, slow_fallback=slow), expected, rtol=1e-6)
    outputs = expected["scores/bias" if "scores/bias" in expected else "head/bias"].size
    if outputs == (1 if module is bernoulli_oracle else 2):  # H has rank 1
        assert_close(fisher_diagonal(model, x, "rademacher", **options, slow_fallback=True), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "precision"),
    [("softmax", "mixed_float16"), ("sigmoid", "float16"), ("sigmoids", "mixed_bfloat16"), ("logits by loss", "mixed_float16")]
    + [("by hand and loss", "bfloat16")],
)
def test_half_precision_is_computed_in_float32(name, precision):
    build, options, module, logits = MODELS[name]
    with policy(precision):
        model = randomise(build())
    with policy("float64"):
        exact = build()
    exact.set_weights([value.astype("float64") for value in model.get_weights()])
    x = vectors(dtype="float32")
    assert_close(fisher_diagonal(model, x, "exact", **options), oracle(module, exact, x, logits), rtol=2e-5)


DRAWN = [("sigmoid", False), ("sigmoids", False), ("logits by loss", True), ("softmax", False)]
DRAWN = [pair if pair[0] == "sigmoids" else pytest.param(*pair, marks=pytest.mark.slow) for pair in DRAWN]


@pytest.mark.parametrize("mode", ["rademacher", "mc"])
@pytest.mark.parametrize(("name", "slow"), DRAWN)
def test_draws_have_the_mean_and_the_variance_of_the_formulas(name, slow, mode):
    """Over R passes the mean estimate is F within sd / sqrt(R), and its variance that of the oracle."""
    build, options, module, logits = MODELS[name]
    with policy("float64"):
        model = randomise(build())
    x, passes = vectors(n=5), 120 if slow else 400
    expected = oracle(module, model, x, logits)
    estimator = fisher_module._Estimator(model, mode, 1, 0, None, slow)
    draws = [estimator(x, 5 * r) for r in range(passes)]
    if module is bernoulli_oracle:
        variances = module.one_draw_variances(model, x, logits)[mode == "mc"]
    else:
        with policy("float64"):
            bare = dense(3)
        bare.set_weights(model.get_weights())
        variances = module.one_draw_variances(bare, x)[mode == "mc"]
    for key in ("hidden/kernel", "hidden/bias"):
        estimates = np.stack([draw[key].numpy() for draw in draws]) / len(x)
        if name == "sigmoid" and mode == "rademacher":
            np.testing.assert_allclose(estimates, np.broadcast_to(expected[key], estimates.shape), rtol=1e-9)
            assert np.all(variances[key] < 1e-20)
            continue
        z = (estimates.mean(0) - expected[key]) / np.sqrt(variances[key] / passes)
        assert np.abs(z).max() < 4.5 and np.sqrt((z**2).mean()) < 2.5, key
        assert 0.75 < (estimates.var(0, ddof=1) / variances[key]).mean() < 1.3, key
    for key in ("head/kernel", "head/bias"):  # in closed form, but for the slow path
        if not slow:
            np.testing.assert_allclose(draws[0][key] / len(x), expected[key], rtol=1e-9)


@pytest.mark.parametrize("mode", fisher_module.MODES)
@pytest.mark.parametrize("name", [pytest.param("sigmoid", marks=pytest.mark.slow), "sigmoids"])
def test_batches_order_and_parts_change_nothing(name, mode):
    model, x = randomise(MODELS[name][0]()), vectors(n=11, dtype="float32")
    many = {} if mode == "exact" else {"samples": 5}
    whole = fisher_diagonal(model, x, mode, **many, batch_size=11)
    parts = fisher_diagonal(model, x[:5], mode, **many) + fisher_diagonal(model, x[5:], mode, **many, first=5)
    for other in (fisher_diagonal(model, x, mode, **many, batch_size=4), parts):
        assert_close(other, whole, rtol=1e-5)
    slow = fisher_diagonal(model, x, mode, **many, slow_fallback=True)
    assert_close({k: slow[k] for k in slow if "hidden" in k}, {k: whole[k] for k in whole if "hidden" in k}, rtol=1e-5)
    if mode == "exact":
        assert_close(fisher_diagonal(model, x[::-1], mode), whole, rtol=1e-5)
    assert fisher_diagonal(model, x, mode, **many, batch_size=11).digest == whole.digest


@pytest.mark.parametrize("classes", [2, 5])
def test_cotangents_factor_the_covariance(classes):
    p = np.random.default_rng(0).dirichlet(np.ones(classes) / 3, size=7)
    p[0] = np.eye(classes)[1]
    h = p[:, :, None] * np.eye(classes) - p[:, :, None] * p[:, None]
    found = likelihoods.Categorical(tf.math.log(tf.constant(p)))
    columns = np.stack([found.column(i).numpy() for i in range(classes)])
    np.testing.assert_allclose(np.einsum("ibk,ibl->bkl", columns, columns), h, atol=1e-14)
    assert not columns[-1].any() and found.rank == classes - 1
    many = likelihoods.Categorical(tf.math.log(tf.constant(np.tile(p, (4000, 1)))))
    for u in (
        many.by_signs(likelihoods.random_signs(3, 0, 0, 28000, classes)),
        many.by_labels(likelihoods.random_uniforms(3, 0, 0, 28000, 1)),
    ):
        np.testing.assert_allclose(np.einsum("bk,bl->kl", u, u) / len(u), h.mean(0), atol=0.02)


def test_random_numbers_belong_to_the_image():
    whole = likelihoods.random_signs(1, 2, 0, 20, 300)
    np.testing.assert_array_equal(likelihoods.random_signs(1, 2, 7, 20, 300), whole[7:])
    assert set(np.unique(whole)) == {-1, 1} and abs(whole.mean()) < 0.06
    assert not np.array_equal(whole, likelihoods.random_signs(1, 3, 0, 20, 300))
    assert not np.array_equal(whole, likelihoods.random_signs(2, 2, 0, 20, 300))
    np.testing.assert_array_equal(likelihoods.random_uniforms(1, 2, 7, 20, 1), likelihoods.random_uniforms(1, 2, 0, 20, 1)[7:])


def test_uniforms_belong_to_the_image():
    whole = likelihoods.random_uniforms(1, 2, 0, 20, 7)
    assert whole.shape == (20, 7) and len(np.unique(whole)) == 140 and 0 <= whole.min() < whole.max() < 1
    np.testing.assert_array_equal(likelihoods.random_uniforms(1, 2, 7, 20, 7), whole[7:])
    assert not np.array_equal(likelihoods.random_uniforms(1, 3, 0, 20, 7), whole)


def test_bernoulli_cotangents_factor_the_covariance():
    z = np.random.default_rng(0).normal(size=(7, 3)) * 2
    z[0] = [800, -800, 45]
    found = likelihoods.Bernoulli(tf.constant(z))
    h = np.exp(-np.abs(z)) / (1 + np.exp(-np.abs(z))) ** 2
    columns = np.stack([found.column(i).numpy() for i in range(3)])
    np.testing.assert_allclose(np.einsum("ibk,ibl->bkl", columns, columns), h[:, :, None] * np.eye(3), rtol=1e-12)
    assert h[0, 2] > 1e-20 and found.rank == 3  # where 1 - p is 0 in float64
    many = likelihoods.Bernoulli(tf.constant(np.tile(z, (4000, 1))))
    for u in (
        many.by_signs(likelihoods.random_signs(3, 0, 0, 28000, 3)),
        many.by_labels(tf.constant(likelihoods.random_uniforms(3, 0, 0, 28000, 3))),
    ):
        u = u.numpy().reshape(4000, 7, 3)
        np.testing.assert_allclose(np.einsum("rbk,rbl->bkl", u, u) / 4000, h[:, :, None] * np.eye(3), atol=0.02)


@pytest.mark.parametrize("mode", fisher_module.MODES)
@pytest.mark.parametrize("name", ["sigmoids", "one logit by loss", "by hand"])
def test_logits_of_100_are_finite(mode, name):
    build, options, _, _ = MODELS[name]
    model = randomise(build())
    model.get_layer("head").bias.assign([100.0, -100, 0][: model.get_layer("head").units])
    for slow in (False, True):
        f = fisher_diagonal(model, vectors(dtype="float32"), mode, **options, slow_fallback=slow)
        assert all(np.all(np.isfinite(array)) and np.all(array >= 0) for array in f.values())


@pytest.mark.parametrize("slow", [False, True])
def test_values_that_contradict_what_the_loss_says_are_refused(slow):
    x = vectors(n=8, dtype="float32")
    for loss, classes in (("sparse_categorical_crossentropy", 3), ("binary_crossentropy", 1), ("binary_crossentropy", 3)):
        model = compiled(randomise(dense(classes)), loss)
        with pytest.raises(InputError, match="taken for probabilities, because .*: pass from_logits=True"):
            fisher_diagonal(model, x, slow_fallback=slow)
        assert fisher_diagonal(model, x, from_logits=True, slow_fallback=slow)
    model = randomise(dense(3, layers.Activation("softplus")))
    with pytest.raises(InputError, match="of another sum than 1"):
        fisher_diagonal(model, x, from_logits=False, slow_fallback=slow)
