"""The proximal map against minimisation in float64, and the optimizer against the minimisers of loss + penalty."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.penalties import penalty as reference
from reference.proximal import proximal as brute_force

import l2sp_tf as l2sp
from l2sp_tf.penalties.formulas import PENALTIES

NAMES = list(PENALTIES)
KINKED = ["l1_sp", "gl_sp", "gl_sp_fisher"]
OPTIMIZERS = {
    "SGD": lambda rate: keras.optimizers.SGD(rate),
    "momentum": lambda rate: keras.optimizers.SGD(rate / 10, momentum=0.9),
    "Nesterov": lambda rate: keras.optimizers.SGD(rate / 10, momentum=0.9, nesterov=True),
    "Adam": lambda rate: keras.optimizers.Adam(rate / 10, beta_2=0.99),
    "amsgrad": lambda rate: keras.optimizers.Adam(rate, amsgrad=True),
    "AdamW": lambda rate: keras.optimizers.AdamW(rate / 10, beta_2=0.99, weight_decay=0.0),
    "Nadam": lambda rate: keras.optimizers.Nadam(rate / 10, beta_2=0.99),
    "Adamax": lambda rate: keras.optimizers.Adamax(rate / 10, beta_2=0.99),
}


def arrays(shape, seed=0):
    rng = np.random.default_rng(seed)
    w, w0 = rng.normal(size=(2, *shape)).astype("float32")
    w = w0 + w * 10 ** rng.uniform(-2, 0, size=shape[-1:]).astype("float32")  # near the anchor in some channels
    step = 10 ** rng.uniform(-2, 0, size=shape).astype("float32")
    return w, w0, (10 ** rng.uniform(-3, 1, size=shape)).astype("float32"), step


def proximal_map(penalty, w, step):
    return penalty.proximal_map(tf.constant(w), step)


def make(name, alpha, w0, fisher, **kwargs):
    kwargs |= {} if name == "l2" else {"anchor": w0}
    return PENALTIES[name](alpha, **kwargs, **({"fisher": fisher} if name.endswith("fisher") else {}))


@pytest.mark.parametrize("sizes", ["one step size", "a step size for each weight"])
@pytest.mark.parametrize("alpha", [0.02, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_the_map_is_the_minimiser(name, alpha, sizes):
    w, w0, fisher, step = arrays((2, 3, 4))
    step = np.float32(0.3) if sizes.startswith("one") else step
    w0 = np.zeros_like(w0) if name == "l2" else w0
    fisher = fisher if name.endswith("fisher") else np.ones_like(fisher)
    found = proximal_map(make(name, alpha, w0, fisher), w, step).numpy()
    expected = brute_force(name, alpha, w, w0, fisher, step)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
    if name in KINKED:
        np.testing.assert_array_equal(found == w0, expected == w0)


def test_the_cases_above_hold_frozen_groups_and_moving_ones():
    w, w0, fisher, step = arrays((2, 3, 4))
    for name in KINKED:
        shares = [np.mean(proximal_map(make(name, a, w0, fisher), w, step).numpy() == w0) for a in (0.02, 1.0)]
        assert shares[0] < shares[1] < 1 and shares[1] > 0.2, (name, shares)


def test_special_cases_agree():
    w, w0, fisher, step = arrays((3, 5))
    ones = np.ones_like(w)
    plain = proximal_map(make("gl_sp", 0.4, w0, None), w, 0.3)
    for one, other in (
        (proximal_map(make("gl_sp_fisher", 0.4, w0, ones), w, 0.3), plain),
        (proximal_map(make("gl_sp", 0.4, w0, None), w, 0.3 * ones), plain),  # an s per weight, all equal
        # a constant F multiplies the strength by its root
        (proximal_map(make("gl_sp_fisher", 0.2, w0, 4 * ones), w, 0.3), plain),
        (proximal_map(make("l2_sp_fisher", 0.4, w0, ones), w, step), proximal_map(make("l2_sp", 0.4, w0, None), w, step)),
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    row, row0, row_step = w[:1], w0[:1], step[:1]  # groups of one weight
    one = proximal_map(make("gl_sp", 0.4, row0, None), row, row_step)
    np.testing.assert_allclose(one, proximal_map(make("l1_sp", 0.4, row0, None), row, row_step), rtol=1e-5, atol=1e-6)


def test_groups_of_other_kernels():
    w, w0, fisher, step = arrays((2, 2, 3, 2))
    for name, axes in (("gl_sp", (0, 1)), ("gl_sp_fisher", (0, 1, 3))):
        f = fisher if name.endswith("fisher") else np.ones_like(fisher)
        found = proximal_map(make(name, 0.3, w0, f, group_axes=axes), w, step)
        np.testing.assert_allclose(found, brute_force(name, 0.3, w, w0, f, step, axes), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", [1, 7, 300, 10_000])
def test_hostile_groups_satisfy_the_condition_of_a_minimum(size):
    rng = np.random.default_rng(size)
    for _ in range(8):
        spread = rng.uniform(0, 12)
        f = (10 ** rng.uniform(-spread, 0, (size, 3)) * 10 ** rng.uniform(-8, 3)).astype("float32")
        f[rng.random(f.shape) < 0.2] = 0
        s = (10 ** rng.uniform(-6, 0, f.shape)).astype("float32")
        d = (rng.normal(size=f.shape) * 10 ** rng.uniform(-6, 0, f.shape)).astype("float32")
        alpha = float(10 ** rng.uniform(-5, 3))
        x = proximal_map(make("gl_sp_fisher", alpha, np.zeros_like(d), f), d, s).numpy().astype("float64")
        assert np.all(np.isfinite(x)) and np.all(np.abs(x) <= np.abs(d)) and np.array_equal(x[f == 0], d[f == 0])
        for g in range(3):
            _check_minimum(alpha * np.sqrt(size), *(a[:, g].astype("float64") for a in (f, s, d, x)))


def _check_minimum(strength, f, s, d, x):
    """Asserts stationarity if x is not 0, else that the force lies in the dual ball; in float64."""
    norm = np.sqrt(np.sum(f * x * x))
    if norm == 0:
        positive = f > 1e-19 * f.max()
        assert np.sqrt(np.sum((d / s)[positive] ** 2 / f[positive])) <= strength * (1 + 1e-5)
    else:
        shrunk = d / (1 + strength * s * f / norm)
        np.testing.assert_allclose(x, shrunk, rtol=1e-3, atol=3e-7 * np.abs(d).max())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", KINKED)
def test_frozen_weights_equal_the_anchor_bit_by_bit(name, dtype):
    w0 = keras.ops.convert_to_numpy(keras.ops.cast(np.random.default_rng(0).normal(size=(4, 3)), dtype))
    w0[0] = -0.0
    w = (w0.astype("float32") * 1.001 + 1e-3).astype(w0.dtype)
    x = proximal_map(make(name, 100.0, w0, np.ones(w0.shape, "float32")), w, 1.0)
    assert keras.ops.convert_to_numpy(keras.ops.cast(x, dtype)).tobytes() == w0.tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_strength_or_step_of_zero_leaves_the_weight_as_it_is(name):
    w, w0, fisher, step = arrays((4, 3))
    w[0], w[:, 1] = w0[0], w0[:, 1]
    np.testing.assert_array_equal(proximal_map(make(name, 0.0, w0, fisher), w, step), w)
    np.testing.assert_array_equal(proximal_map(make(name, 1.0, w0, fisher), w, 0.0), w)
    if name.endswith("fisher"):
        np.testing.assert_array_equal(proximal_map(make(name, 1.0, w0, np.zeros_like(w)), w, step), w)


def optimise(optimizer, penalty, w0, curvature, target, steps, start=None):
    """Minimises curvature / 2 (w - target)^2 + penalty; returns the weights after each step."""
    w = keras.Variable(w0 if start is None else start)
    w.regularizer = penalty
    step = tf.function(lambda: optimizer.apply([curvature * (w.value - target)], [w]))
    path = []
    for _ in range(steps):
        step()
        path.append(w.numpy())
    return path


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_every_optimizer_ends_at_the_minimiser_of_loss_and_penalty(kind):
    target, w0, fisher, _ = arrays((3, 4))
    curvature = np.float32(10) ** np.random.default_rng(1).uniform(-0.5, 0, size=w0.shape).astype("float32")
    # the minimiser of curvature / 2 (x - target)^2 + penalty(x) is a proximal map with the step 1 / curvature
    alphas = {"l1_sp": 0.4, "gl_sp": 0.5, "gl_sp_fisher": 0.5}
    weights = {name: keras.Variable(w0) for name in alphas}  # the three are stepped side by side: no step depends on another
    for name, w in weights.items():
        w.regularizer = make(name, alphas[name], w0, fisher if name.endswith("fisher") else np.ones_like(fisher))
    optimizer = l2sp.Proximal(OPTIMIZERS[kind](0.3))
    optimizer.build(list(weights.values()))

    @tf.function
    def steps():
        for _ in tf.range(400):
            optimizer.apply([curvature * (w.value - target) for w in weights.values()], list(weights.values()))

    steps()
    assert int(optimizer.iterations) == 400
    for name, w in weights.items():
        f = fisher if name.endswith("fisher") else np.ones_like(fisher)
        found, expected = w.numpy(), brute_force(name, alphas[name], target, w0, f, 1 / curvature)
        np.testing.assert_allclose(found, expected, atol=3e-3, err_msg=name)
        np.testing.assert_array_equal(found == w0, expected == w0, err_msg=name)
        assert 0 < np.mean(found == w0) < 1, name


def test_under_momentum_the_path_off_the_kink_is_that_of_heavy_ball_on_loss_and_penalty():
    w0, target = np.zeros((6,), "float32"), np.linspace(4, 9, 6, dtype="float32")
    rate, momentum, alpha, w = 0.02, 0.9, 0.5, np.full((6,), 2.0)
    optimizer = l2sp.Proximal(keras.optimizers.SGD(rate, momentum=momentum))
    found = optimise(optimizer, make("l1_sp", alpha, w0, None), w0, 0.7, target, 25, start=w.astype("float32"))
    velocity = np.full((6,), -rate * alpha / (1 - momentum))  # the stationary velocity of the penalty's constant pull
    for x in found:
        velocity = momentum * velocity - rate * (0.7 * (w - target) + alpha)
        w = w + velocity
        np.testing.assert_allclose(x, w, rtol=1e-5)
    assert np.all(w > 0)


def test_the_subgradient_alone_freezes_nothing_where_proximal_steps_do():
    target, w0, fisher, _ = arrays((3, 4))
    target = w0 + np.float32(0.1) * target
    penalty = l2sp.L1SP(0.4, w0)
    assert np.array_equal(optimise(l2sp.Proximal("sgd"), penalty, w0, 1.0, target, 50)[-1], w0)
    w = keras.Variable(w0)
    plain = keras.optimizers.SGD(0.01)
    for _ in range(50):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((w.value - target) ** 2) / 2 + penalty(w)
        plain.apply([tape.gradient(loss, w.value)], [w])
    assert np.mean(w.numpy() == w0) < 0.5 and np.abs(w.numpy() - w0).max() < 0.02


def test_accumulated_gradients_are_stepped_when_they_are_applied():
    w0 = np.zeros((3,), "float32")
    optimizer = l2sp.Proximal(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    path = optimise(optimizer, l2sp.L1SP(0.5, w0), w0, 1.0, np.float32([0.2, 1, 3]), 4, start=np.float32([1, 1, 1]))
    np.testing.assert_array_equal(path[0], 1)
    np.testing.assert_allclose(path[1], 1 - 0.1 * (1 - np.float32([0.2, 1, 3])) - 0.05, rtol=1e-6)
    np.testing.assert_array_equal(path[2], path[1])


@pytest.mark.parametrize("change", [{"clipnorm": 0.1}, {"global_clipnorm": 0.1}, {"clipvalue": 0.05}])
def test_clipping_is_of_the_gradient_of_the_loss(change):
    w0, target = np.zeros((4,), "float32"), np.full((4,), 5.0, "float32")
    one = optimise(l2sp.Proximal(keras.optimizers.SGD(0.1, **change)), l2sp.L1SP(0.02, w0), w0, 1.0, target, 1)[0]
    np.testing.assert_allclose(one, 0.1 * (0.05 - 0.02), rtol=1e-5)


def network(dtype="float32"):
    keras.utils.set_random_seed(1)
    layers = [keras.Input((4,)), keras.layers.Dense(8, "relu", name="a", dtype=dtype), keras.layers.Dense(2, name="b")]
    return keras.Sequential(layers)


X, Y = np.random.default_rng(0).normal(size=(32, 4)).astype("float32"), np.arange(32) % 2
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def attached(model, anchors, alpha=0.02, optimizer="sgd", name="l1_sp", params="all"):
    coverage = l2sp.attach(model, PENALTIES[name](alpha), anchors, 0.01, new=("b",), params=params)
    model.compile(l2sp.Proximal.of(optimizer, model), LOSS)
    return coverage


def fit(model, coverage, epochs=1, **kwargs):
    callbacks = [l2sp.AnchorGuard(coverage)]
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks, **kwargs).history


def test_a_model_keeps_weights_at_the_start_and_reports_its_penalty():
    model = network()
    anchors = l2sp.Anchors.of(model)
    coverage = attached(model, anchors, optimizer=keras.optimizers.SGD(0.05, momentum=0.9), params="kernels")
    assert l2sp.frozen_share(model) == {"a": 1.0, "all": 1.0}
    fit(model, coverage, epochs=4)
    kernel, start = model.get_layer("a").kernel.numpy(), anchors["a/kernel"]
    share = l2sp.frozen_share(model)
    assert 0 < share["all"] < 1 and share == {"a": np.mean(kernel == start), "all": np.mean(kernel == start)}
    head = np.sum(model.get_layer("b").kernel.numpy() ** 2)
    value = 0.02 * np.abs(kernel - start).sum() + 0.01 / 2 * head
    np.testing.assert_allclose(float(sum(model.losses)), value, rtol=1e-5)
    cross_entropy = float(LOSS(Y, model(X)))
    np.testing.assert_allclose(model.evaluate(X, Y, verbose=0), cross_entropy + value, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_of_the_loss_alone_and_the_step_is_the_map(name):
    one, other = network(), network()
    start = l2sp.Anchors.of(one)
    anchors = l2sp.Anchors({key: a + np.float32(0.3) for key, a in start.items()})
    fisher = {key: np.full(a.shape, 0.5, "float32") for key, a in start.items()} if "fisher" in name else None
    l2sp.attach(one, PENALTIES[name](0.7), anchors, 0.1, fisher=fisher, new=("b",))
    one.compile(l2sp.Proximal.of(keras.optimizers.SGD(0.1), one), LOSS)
    other.compile(keras.optimizers.SGD(0.1), LOSS)
    for model in (one, other):
        model.fit(X, Y, batch_size=32, shuffle=False, verbose=0)
    for stepped, plain in zip(one.trainable_variables, other.trainable_variables, strict=True):
        np.testing.assert_allclose(stepped.numpy(), proximal_map(stepped.regularizer, plain.numpy(), 0.1), atol=1e-6)
    assert len(one.trainable_variables) == 4


@pytest.mark.parametrize("kind", ["momentum", "Adam"])
def test_a_saved_model_resumes_as_if_it_had_not_stopped(kind, tmp_path):
    model = network()
    anchors = l2sp.Anchors.of(model)
    coverage = attached(model, anchors, optimizer=OPTIMIZERS[kind](0.3))
    fit(model, coverage, epochs=2)
    model.save(tmp_path / "model.keras")
    fit(model, coverage, epochs=2)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is l2sp.Proximal and type(loaded.optimizer.inner_optimizer) is type(OPTIMIZERS[kind](0.3))
    with pytest.raises(l2sp.UnboundPenaltyError, match="not bound to its anchors"):
        loaded.fit(X, Y, verbose=0)
    coverage = l2sp.attach(loaded, l2sp.L1SP(0.02), anchors, 0.01, new=("b",))
    with pytest.raises(l2sp.InputError, match="would count twice"):
        loaded.fit(X, Y, verbose=0)
    assert l2sp.Proximal.of(loaded.optimizer, loaded) is loaded.optimizer
    fit(loaded, coverage, epochs=2)
    for one, two in zip(loaded.weights + loaded.optimizer.variables, model.weights + model.optimizer.variables, strict=True):
        np.testing.assert_allclose(one.numpy(), two.numpy(), atol=1e-6)


def test_a_detached_model_stops():
    model = network()
    attached(model, l2sp.Anchors.of(model))
    l2sp.detach(model)
    with pytest.raises(l2sp.InputError, match="finds no penalty"):
        model.fit(X, Y, verbose=0)
    with pytest.raises(l2sp.InputError, match="no penalty to step"):
        l2sp.Proximal.of("sgd", model)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_another_optimizer_puts_the_penalty_back_into_the_gradient(run_eagerly):
    """Plain steps after a proximal run equal those of a model without one."""
    models = [network(), network()]
    anchors = l2sp.Anchors({key: a + np.float32(0.3) for key, a in l2sp.Anchors.of(models[0]).items()})
    coverages = [l2sp.attach(model, l2sp.L2SP(0.7), anchors, 0.1, new=("b",)) for model in models]
    models[0].compile(l2sp.Proximal.of(keras.optimizers.SGD(0.1), models[0]), LOSS, run_eagerly=run_eagerly)
    fit(models[0], coverages[0])
    models[1].set_weights(models[0].get_weights())
    for model, coverage in zip(models, coverages, strict=True):
        model.compile(keras.optimizers.SGD(0.1), LOSS, run_eagerly=run_eagerly)
        fit(model, coverage)
    for one, two in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_plain_run_before_does_not_count_as_the_same_step(run_eagerly):
    """Proximal steps after a plain run equal those of a model without one."""
    models = [network(), network()]
    anchors = l2sp.Anchors({key: a + np.float32(0.3) for key, a in l2sp.Anchors.of(models[0]).items()})
    coverages = [l2sp.attach(model, l2sp.L1SP(0.1), anchors, 0.1, new=("b",)) for model in models]
    models[0].compile(keras.optimizers.SGD(0.1), LOSS, run_eagerly=run_eagerly)
    fit(models[0], coverages[0])
    models[1].set_weights(models[0].get_weights())
    for model, coverage in zip(models, coverages, strict=True):
        model.compile(l2sp.Proximal.of(keras.optimizers.SGD(0.1), model), LOSS, run_eagerly=run_eagerly)
        fit(model, coverage)
    for one, two in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_a_penalty_that_would_count_twice_is_refused(run_eagerly):
    """A stepping optimizer without `of`, in the attached model and in a model around it."""
    part = network()
    l2sp.attach(part, l2sp.L1SP(0.1), l2sp.Anchors.of(part), new=("b",))
    whole = keras.Sequential([keras.Input((4,)), part])
    for model in (part, whole):
        model.compile(l2sp.Proximal(keras.optimizers.SGD(0.1)), LOSS, run_eagerly=run_eagerly)
        with pytest.raises(l2sp.InputError, match=r"would count twice: call l2sp_tf.Proximal.of\(model.optimizer, model\)"):
            model.fit(X, Y, verbose=0)
    l2sp.Proximal.of(whole.optimizer, whole)
    whole.fit(X, Y, verbose=0)


def test_a_custom_loop_leaves_the_penalties_out_of_its_loss():
    model = network()
    anchors = l2sp.Anchors({key: a + np.float32(0.3) for key, a in l2sp.Anchors.of(model).items()})
    l2sp.attach(model, l2sp.L2SP(0.7), anchors, new=("b",))
    optimizer, kernel = l2sp.Proximal.of(keras.optimizers.SGD(0.1), model), model.get_layer("a").kernel
    for include in (False, True):
        with tf.GradientTape() as tape:
            loss = LOSS(Y, model(X, training=True)) + (sum(model.losses) if include else 0)
        gradients = tape.gradient(loss, model.trainable_variables)
        if include:
            with pytest.raises(l2sp.InputError, match="leave model.losses out of your own loss"):
                optimizer.apply(gradients, model.trainable_variables)
        else:
            moved = kernel.numpy() - 0.1 * gradients[0].numpy()
            optimizer.apply(gradients, model.trainable_variables)
            np.testing.assert_allclose(kernel.numpy(), proximal_map(kernel.regularizer, moved, 0.1), atol=1e-6)


def test_a_step_with_non_finite_gradients_is_skipped_entirely():
    model = network()
    anchors = l2sp.Anchors({key: a + np.float32(0.3) for key, a in l2sp.Anchors.of(model).items()})
    l2sp.attach(model, l2sp.L1SP(0.1), anchors, 0.01, new=("b",))
    optimizer = keras.optimizers.LossScaleOptimizer(l2sp.Proximal.of("sgd", model))
    assert l2sp.Proximal.of(optimizer, model) is optimizer
    variables = model.trainable_variables
    optimizer.build(variables)
    before = [v.numpy() for v in variables]
    optimizer.apply([v.value * np.float32("nan") for v in variables])
    for variable, value in zip(variables, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)
    scale = float(optimizer.scale_loss(1.0))
    optimizer.apply([v.value * 0 for v in variables])
    assert scale == 2.0**14 and int(optimizer.iterations) == 1
    np.testing.assert_allclose(variables[0].numpy() - before[0], 0.1 * 0.01, rtol=1e-4)


@pytest.mark.parametrize("name", ["l2_sp", "gl_sp", "gl_sp_fisher"])
def test_mixed_precision_trains_with_scaled_losses(name):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        model = network()
        anchors = l2sp.Anchors.of(model)
        fisher = {key: np.ones(a.shape, "float32") for key, a in anchors.items()} if "fisher" in name else None
        coverage = l2sp.attach(model, PENALTIES[name](0.05), anchors, 0.01, fisher=fisher, new=("b",))
        model.compile(l2sp.Proximal.of(keras.optimizers.SGD(0.05, momentum=0.9), model), LOSS)
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        fit(model, coverage)
    finally:
        keras.config.set_dtype_policy("float32")
    assert model.get_layer("a").kernel.dtype == "float32"
    if name == "gl_sp":
        assert l2sp.frozen_share(model)["all"] > 0


@pytest.mark.parametrize("scaled", [False, True])
def test_two_devices_step_as_one(mirrored, scaled):
    def train():
        model = network()
        anchors = l2sp.Anchors.of(model)
        coverage = l2sp.attach(model, l2sp.GroupLassoSP(0.02), anchors, 0.01, new=("b",))
        optimizer = l2sp.Proximal.of(keras.optimizers.SGD(0.05, momentum=0.9), model)
        model.compile(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, LOSS)
        fit(model, coverage)
        return model

    one = train()
    with mirrored.scope():
        two = train()
    for a, b in zip(one.get_weights(), two.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert l2sp.frozen_share(two) == l2sp.frozen_share(one) and l2sp.frozen_share(one)["all"] > 0


def test_what_cannot_be_stepped_is_refused_in_a_sentence():
    model = network()
    l2sp.attach(model, l2sp.L1SP(0.1, epsilon=1e-16), l2sp.Anchors.of(model), new=("b",))
    with pytest.raises(l2sp.InputError, match="epsilon=1e-16, which smooths the kink"):
        l2sp.Proximal.of("sgd", model)
    used = keras.optimizers.SGD(0.1)
    l2sp.Proximal(used)
    for optimizer, message in (
        (keras.optimizers.RMSprop(), "step sizes of RMSprop are not known: wrap one of SGD, Adam"),
        (keras.optimizers.SGD(momentum=1.0), "SGD with momentum 1 are not known"),
        (keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()), "goes outside"),
        (keras.optimizers.Ftrl(), "Ftrl cannot be wrapped"),
        (used, "This SGD is wrapped already"),
        ("sdg", "Keras does not know"),
        (None, "Keras does not know"),
    ):
        with pytest.raises(l2sp.InputError, match=message):
            l2sp.Proximal(optimizer)


def test_a_weight_that_the_loss_does_not_reach_is_still_pulled():
    w = [keras.Variable(np.ones(2, "float32")) for _ in range(2)]
    for variable in w:
        variable.regularizer = l2sp.L1SP(1.0, np.zeros(2, "float32"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        l2sp.Proximal(keras.optimizers.SGD(0.1)).apply([None, tf.ones(2)], w)
    np.testing.assert_allclose(w[0].numpy(), 0.9, rtol=1e-6)
    np.testing.assert_allclose(w[1].numpy(), 0.8, rtol=1e-6)


def test_quadratic_penalties_do_not_diverge_however_strong():
    w0 = np.zeros((3,), "float32")
    fisher = np.float32([1e6, 1, 1e-6])
    path = optimise(
        l2sp.Proximal(keras.optimizers.SGD(0.1)), make("l2_sp_fisher", 1.0, w0, fisher), w0, 1.0, np.ones(3, "f"), 300
    )
    expected = brute_force("l2_sp_fisher", 1.0, np.ones(3), w0, fisher, 1.0)
    np.testing.assert_allclose(path[-1], expected, atol=1e-5)
    assert reference("l2_sp_fisher", 1.0, path[-1], w0, fisher)[0] < 1
