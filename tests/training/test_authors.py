"""Differences of the authors' code from the paper: each row of the table in BUILD_NOTES.md, by what a run really does."""

import keras
import numpy as np
import pytest
from test_trainer import RECIPE, task

import l2sp_tf as l2sp
from l2sp_tf.models import zoo
from l2sp_tf.models.batch_norm import set_moving_statistics
from l2sp_tf.penalties.formulas import PENALTIES, smoothed
from l2sp_tf.training.recipe import Recipe

OWN = ("beta", "head_bias", "smoothing", "moving_statistics", "batch_norm_decay")
AUTHORS = RECIPE.replace(**{name: getattr(Recipe.authors(), name) for name in OWN}, iterations=1, log_every=1)


@pytest.fixture
def pretrained():
    model = zoo.small_resnet((6, 6, 3), 4, widths=(4,), depths=(1,))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.99
            layer.moving_mean.assign(rng.normal(size=layer.moving_mean.shape))
            layer.moving_variance.assign(rng.uniform(2, 3, size=layer.moving_variance.shape))
    return model


def norms_of(model):
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


def test_the_numbers_are_those_of_the_authors_code():
    r = Recipe.authors()
    assert {symbol: r.beta_for(symbol) for symbol in PENALTIES} == {s: 1e-3 if s == "l2" else 1e-2 for s in PENALTIES}
    assert (r.head_bias, r.smoothing, r.moving_statistics, r.batch_norm_decay) == (0.01, 1e-16, "fresh", 0.9)
    assert {Recipe.paper().beta_for(symbol) for symbol in PENALTIES} == {0.01}
    assert r.replace(beta=0.5).beta_for("l2") == 0.5
    digits = Recipe.digits(r)
    assert (digits.iterations, digits.decay_step, digits.params) == (200, 133, "kernels")
    assert (digits.images.crop, digits.images.blur) == (8, "none")
    assert {name: getattr(digits, name) for name in OWN} == {name: getattr(r, name) for name in OWN}


def test_records_leave_out_the_papers_values_and_both_protocols_train_source_models_alike():
    old = set(Recipe().record())
    assert not {*OWN[1:]} & old and "beta" in old
    assert set(Recipe.authors().record()) == old - {"blur_kernel", "blur_sigma"} | {*OWN[1:]}
    assert Recipe.source(Recipe().replace(**{name: getattr(Recipe.authors(), name) for name in OWN})) == Recipe.source(Recipe())


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta", {"l3": 1.0}), ("beta", {"l2": -1.0}), ("smoothing", -1e-16), ("smoothing", float("nan"))]
    + [("head_bias", float("inf")), ("moving_statistics", "old"), ("batch_norm_decay", 1.0)],
)
def test_bad_numbers_are_refused(name, value):
    with pytest.raises(l2sp.InputError, match=f"{name}( of l2)? is"):
        Recipe(**{name: value})


@pytest.mark.parametrize("symbol", ["l2", "l2_sp", "gl_sp"])
def test_the_head_has_the_beta_of_its_penalty_and_begins_with_its_bias(symbol, pretrained):
    run = l2sp.finetune(pretrained, task(), PENALTIES[symbol](0.1), AUTHORS.replace(learning_rate=1e-30), verbose=0)
    (head,) = run.coverage.group("S-bar")
    assert head.penalty["config"]["alpha"] == (1e-3 if symbol == "l2" else 0.01)
    np.testing.assert_array_equal(run.model.get_layer("new_head").bias, np.full(3, 0.01, "float32"))
    kernel = run.model.get_layer("new_head").kernel.numpy()
    assert abs(kernel).max() <= np.sqrt(6 / sum(kernel.shape))  # Glorot (Xavier) uniform


def float64_value(symbol, w, w0, fisher, epsilon):
    """Eqs. (5)-(7) with epsilon inside each root, weight by weight, for alpha = 1."""
    d = w.astype("float64") - w0.astype("float64")
    if symbol == "l1_sp":
        return sum(np.sqrt(x**2 + epsilon) for x in d.ravel())
    d2 = d**2 * (fisher.astype("float64") if symbol == "gl_sp_fisher" else 1)
    p_g = np.prod(w.shape[:-1])
    return sum(np.sqrt(p_g) * np.sqrt(d2[..., k].sum() + epsilon) for k in range(w.shape[-1]))


@pytest.mark.parametrize("epsilon", [1e-16, 1e-3])
@pytest.mark.parametrize("distance", [0.0, 1e-8, 0.3])
@pytest.mark.parametrize("symbol", ["l1_sp", "gl_sp", "gl_sp_fisher"])
def test_epsilon_stands_inside_the_roots(symbol, distance, epsilon):
    import tensorflow as tf

    rng = np.random.default_rng(0)
    w0 = np.zeros((3, 2, 4), "float32")  # so that w - w0 has no rounding of its own
    w = (distance * rng.normal(size=w0.shape)).astype("float32")
    fisher = rng.uniform(0.5, 2, size=w0.shape).astype("float32") ** 2
    given = (w0, fisher) if symbol == "gl_sp_fisher" else (w0,)
    penalty = smoothed(PENALTIES[symbol](1.0, *given), epsilon)
    expected = float64_value(symbol, w, w0, fisher, epsilon)
    np.testing.assert_allclose(float(penalty(w)), expected, rtol=1e-5)
    assert distance or expected > 0
    x = tf.Variable(w)
    with tf.GradientTape() as tape:
        value = penalty(x)
    gradient = tape.gradient(value, x).numpy()
    step = 1e-3 * max(np.sqrt(epsilon), distance)
    at = (1, 1, 2)
    ends = []
    for sign in (1, -1):
        moved = w.astype("float64")
        moved[at] += sign * step
        ends.append(float64_value(symbol, moved, w0, fisher, epsilon))
    np.testing.assert_allclose(gradient[at], (ends[0] - ends[1]) / (2 * step), rtol=2e-3, atol=1e-6)


def test_only_kinked_penalties_are_smoothed_and_an_own_epsilon_stays(pretrained):
    for symbol in ("l2", "l2_sp", "l2_sp_fisher"):
        penalty = PENALTIES[symbol](0.1)
        assert smoothed(penalty, 1e-16) is penalty
    penalty = l2sp.L1SP(0.1)
    assert smoothed(penalty, 0.0) is penalty and smoothed(penalty, 1e-16).epsilon == 1e-16 and penalty.epsilon == 0
    assert smoothed(l2sp.GroupLassoSP(0.1, epsilon=1e-4), 1e-16).epsilon == 1e-4
    for step, expected in (("gradient", 1e-16), ("proximal", 0.0)):
        run = l2sp.finetune(pretrained, task(), l2sp.L1SP(0.1), AUTHORS.replace(penalty_step=step), verbose=0)
        assert {w.penalty["config"]["epsilon"] for w in run.coverage.group("S")} == {expected}


@pytest.mark.parametrize("frozen", [0, 1])
def test_moving_statistics_begin_afresh_unless_units_are_frozen(frozen, pretrained):
    """One step by hand: moving = 0.9 moving + 0.1 batch, from 0 and 1, or from the pre-trained model's statistics."""
    data, recipe = task(), AUTHORS.replace(learning_rate=1e-30, batch_size=20)
    run = l2sp.finetune(pretrained, data, l2sp.L2SP(0.1), recipe, frozen=frozen, verbose=0)
    plain = l2sp.finetune(pretrained, data, l2sp.L2SP(0.1), RECIPE.replace(iterations=1), frozen=frozen, verbose=0)
    assert {norm.momentum for norm in norms_of(run.model)} == {0.9}
    assert {norm.momentum for norm in norms_of(plain.model)} == {norm.momentum for norm in norms_of(pretrained)} == {0.99}
    x = np.concatenate(
        [x for x, _ in l2sp.data.training_batches(data.train, data.preprocessing, data.mean, batch_size=20, seed=0, iterations=1)]
    )
    inner = keras.Model(pretrained.inputs, pretrained.get_layer("conv1_conv").output)([x]).numpy().astype("float64")
    first, start = run.model.get_layer("conv1_bn"), pretrained.get_layer("conv1_bn")
    means = np.zeros(4) if not frozen else start.moving_mean.numpy()
    variances = np.ones(4) if not frozen else start.moving_variance.numpy()
    if not frozen:
        means, variances = (0.9 * old + 0.1 * f(inner, axis=(0, 1, 2)) for old, f in ((means, np.mean), (variances, np.var)))
    np.testing.assert_allclose(first.moving_mean, means, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(first.moving_variance, variances, rtol=1e-4, atol=1e-4)
    last = run.model.get_layer("conv2_block1_2_bn")
    is_source = np.allclose(last.moving_variance, pretrained.get_layer("conv2_block1_2_bn").moving_variance, rtol=0.2)
    assert is_source == bool(frozen)


def test_setting_statistics_leaves_other_layers_alone():
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Conv2D(2, 3), keras.layers.BatchNormalization()])
    model.layers[1].moving_mean.assign([3.0, 4.0])
    before = [w.numpy() for w in model.weights]
    set_moving_statistics(model)
    assert model.layers[1].momentum == 0.99
    for one, two in zip(before, model.weights, strict=True):
        np.testing.assert_array_equal(one, two)
    set_moving_statistics(model, fresh=True, decay=0.5)
    assert model.layers[1].momentum == 0.5 and not np.any(model.layers[1].moving_mean)
    np.testing.assert_array_equal(model.layers[0].kernel, before[0])
