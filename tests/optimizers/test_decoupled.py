"""The decoupled pull: the penalty's gradient step under SGD, an explicit formula under adaptive optimizers."""

import keras
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.penalties.formulas import PENALTIES

X, Y = np.random.default_rng(0).normal(size=(32, 4)).astype("float32"), np.arange(32) % 2
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
QUADRATIC = ["l2", "l2_sp", "l2_sp_fisher"]


def attached(name, alpha=0.3, beta=0.1):
    """A network and its coverage; its anchors differ from its weights."""
    keras.utils.set_random_seed(1)
    layers = [keras.Input((4,)), keras.layers.Dense(8, "relu", name="a"), keras.layers.Dense(2, name="b", dtype="float32")]
    model = keras.Sequential(layers)
    anchors = l2sp.Anchors({key: a + np.float32(0.2) for key, a in l2sp.Anchors.of(model).items()})
    rng = np.random.default_rng(2)
    fisher = {key: rng.gamma(1.0, size=a.shape).astype("float32") for key, a in anchors.items()}
    fisher = fisher if "fisher" in name else None
    return model, l2sp.attach(model, PENALTIES[name](alpha), anchors, beta, params="all", fisher=fisher, new=("b",))


def fit(model, coverage, epochs=2):
    callbacks = [l2sp.AnchorGuard(coverage)]
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)
    return model.get_weights()


@pytest.mark.parametrize("name", QUADRATIC)
def test_under_sgd_it_is_the_penalty_with_a_schedule_too(name):
    paths = []
    for wrap in (lambda optimizer, model: optimizer, l2sp.Decoupled.of):
        model, coverage = attached(name)
        schedule = keras.optimizers.schedules.PiecewiseConstantDecay([3, 5], [0.1, 0.03, 0.2])
        model.compile(wrap(keras.optimizers.SGD(schedule), model), LOSS)
        paths.append(fit(model, coverage))
    for one, two in zip(*paths, strict=True):
        np.testing.assert_allclose(one, two, atol=5e-7)  # 8 steps, each rounded to about 6e-8


def adam(w, gradients, w0, rate, alpha, fisher):
    """Adam's formula in float64, with the pull before each step."""
    m = v = np.zeros_like(w)
    for t, gradient in enumerate(gradients(), start=1):
        g = gradient(w)
        w = w - rate(t - 1) * alpha * fisher * (w - w0)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - rate(t - 1) * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-7)
    return w


def test_under_adam_it_is_the_formula():
    rng = np.random.default_rng(0)
    w, w0, target = rng.normal(size=(3, 5))
    fisher = rng.gamma(1.0, size=5)
    schedule = keras.optimizers.schedules.ExponentialDecay(0.05, 4, 0.5)
    optimizer = l2sp.Decoupled(keras.optimizers.Adam(schedule))
    variable = keras.Variable(w.astype("float32"))
    variable.regularizer = l2sp.L2SPFisher(0.7, w0.astype("float32"), fisher.astype("float32"))
    for _ in range(12):
        optimizer.apply([variable.value - target.astype("float32")], [variable])
    expected = adam(w, lambda: [lambda w: w - target] * 12, w0, lambda t: 0.05 * 0.5 ** (t / 4), 0.7, fisher)
    np.testing.assert_allclose(variable.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_adam_divides_the_penalty_in_the_gradient_by_its_size_but_not_the_decoupled_pull():
    w0, w = np.zeros(2, "float32"), np.ones(2, "float32")
    moved = {}
    for decoupled in (False, True):
        variable = keras.Variable(w)
        variable.regularizer = l2sp.L2SP(0.1, w0)
        optimizer = keras.optimizers.Adam(0.01)
        optimizer = l2sp.Decoupled(optimizer) if decoupled else optimizer
        for sign in (1, -1) * 50:  # gradients of mean 0, large on the first weight
            noise = sign * np.float32([10.0, 0.1])
            optimizer.apply([noise if decoupled else noise + 0.1 * variable.numpy()], [variable])
        moved[decoupled] = 1 - variable.numpy()
    expected = 1 - (1 - 0.01 * 0.1) ** 100
    assert moved[False][1] > 10 * moved[False][0]  # Adam's pull depends on each weight's noise
    np.testing.assert_allclose(moved[True], expected, atol=0.03)


@pytest.mark.parametrize(
    "kind", ["Adam", "AdamW", "RMSprop", "Lion", "Adagrad", "Adamax", "Nadam", "Adafactor", "Adadelta", "Muon"]
)
def test_any_optimizer_that_steps_weights_can_be_wrapped(kind):
    weights = []
    for alpha in (0.0, 5.0):
        model, coverage = attached("l2_sp", alpha)
        decay = {"weight_decay": 0.0} if kind in ("AdamW", "Muon") else {}
        model.compile(l2sp.Decoupled.of(getattr(keras.optimizers, kind)(0.01, **decay), model), LOSS, run_eagerly=True)
        before = [w + np.float32(0.2) for w in model.get_weights()[:2]]  # the anchors
        weights.append([np.linalg.norm(w - w0) for w, w0 in zip(fit(model, coverage, 1), before, strict=False)])
    assert all(strong < weak for weak, strong in zip(*weights, strict=True))


@pytest.mark.parametrize("name", QUADRATIC)
def test_mixed_precision_does_not_scale_the_pull(name):
    weights = []
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        try:
            model, coverage = attached(name)
        finally:
            keras.config.set_dtype_policy("float32")
        model.compile(l2sp.Decoupled.of(keras.optimizers.SGD(0.1), model), LOSS)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer) == (policy == "mixed_float16")
        weights.append(fit(model, coverage))
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(one, two, atol=2e-3)


def test_two_devices_step_as_one(mirrored):
    def train():
        model, coverage = attached("l2_sp")
        model.compile(l2sp.Decoupled.of(keras.optimizers.Adam(0.01), model), LOSS)
        return fit(model, coverage, 1)

    one = train()
    with mirrored.scope():
        two = train()
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_loss_scale_factor_of_the_inner_optimizer_still_works():
    weights = []
    for factor in (None, 1024.0):
        model, coverage = attached("l2_sp")
        model.compile(l2sp.Decoupled.of(keras.optimizers.SGD(0.1, loss_scale_factor=factor), model), LOSS)
        assert model.optimizer.loss_scale_factor == factor
        weights.append(fit(model, coverage, 1))
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    inner = keras.optimizers.SGD(0.1, loss_scale_factor=1024.0)
    keras.optimizers.LossScaleOptimizer(l2sp.Decoupled(inner))
    assert inner.loss_scale_factor is None


def test_it_survives_a_save_with_its_state_and_its_learning_rate_can_be_set(tmp_path):
    model, coverage = attached("l2_sp")
    model.compile(l2sp.Decoupled.of(keras.optimizers.AdamW(0.01, weight_decay=0.0), model), LOSS)
    fit(model, coverage)
    model.optimizer.learning_rate = 0.002
    assert float(model.optimizer.inner_optimizer.learning_rate) == pytest.approx(0.002)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras").optimizer
    assert type(loaded) is l2sp.Decoupled and type(loaded.inner_optimizer) is keras.optimizers.AdamW
    assert float(loaded.learning_rate) == pytest.approx(0.002) and int(loaded.iterations) == 8
    for one, two in zip(loaded.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(one.numpy(), two.numpy())


def test_a_hidden_decay_to_zero_brings_a_warning():
    for optimizer in (keras.optimizers.AdamW(), keras.optimizers.SGD(weight_decay=0.01)):
        with pytest.warns(UserWarning, match=f"{type(optimizer).__name__} has weight_decay=0.0.*set weight_decay=0"):
            l2sp.Decoupled(optimizer)


def test_what_has_no_decoupled_pull_is_refused():
    model, _ = attached("l1_sp")
    with pytest.raises(l2sp.InputError, match=r"Decoupled cannot step L1SP\(alpha=0.3\): it can step L2, L2SP, L2SPFisher"):
        l2sp.Decoupled.of("adam", model)
    several = keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(keras.optimizers.Adam()))
    for optimizer in (keras.optimizers.Ftrl(), keras.optimizers.ScheduleFreeAdamW(), several):
        with pytest.raises(l2sp.InputError, match="does not step each weight by itself"):
            l2sp.Decoupled(optimizer)
