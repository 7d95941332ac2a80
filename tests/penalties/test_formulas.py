"""The penalties against loops in float64, and against each other where the paper says they agree."""

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.penalties import penalty as reference

import l2sp_tf as l2sp
from l2sp_tf.penalties.formulas import PENALTIES, UnboundPenaltyError

NAMES = list(PENALTIES)
SHAPES = [(3, 3, 4, 5), (7, 2), (6,), (1, 1, 8, 3)]


def arrays(shape, seed=0):
    rng = np.random.default_rng(seed)
    w, w0 = rng.normal(size=(2, *shape)).astype("float32")
    return w, w0, rng.gamma(1.0, size=shape).astype("float32")


def make(name, alpha, w0=None, fisher=None, **kwargs):
    kwargs |= {} if name == "l2" else {"anchor": w0}
    kwargs |= {"fisher": fisher} if name.endswith("fisher") else {}
    return PENALTIES[name](alpha, **kwargs)


def value_and_gradient(penalty, w, traced=False, xla=False):
    variable = keras.Variable(w)

    def compute():
        with tf.GradientTape() as tape:
            value = penalty(variable)
        return value, tape.gradient(value, variable.value)

    value, gradient = (tf.function(compute, jit_compile=xla) if traced or xla else compute)()
    return float(value), gradient.numpy()


def oracle(name, alpha, w, w0, fisher):
    return reference(name, alpha, w, None if name == "l2" else w0, fisher if name.endswith("fisher") else None)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_agree_with_the_loops(name, shape, traced):
    w, w0, fisher = arrays(shape)
    value, gradient = value_and_gradient(make(name, 0.3, w0, fisher), w, traced)
    expected_value, expected_gradient = oracle(name, 0.3, w, w0, fisher)
    np.testing.assert_allclose(value, expected_value, rtol=2e-6)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "l2"])
def test_at_the_anchor_value_and_gradient_are_zero_and_finite(name, shape):
    _, w0, fisher = arrays(shape)
    value, gradient = value_and_gradient(make(name, 2.0, w0, fisher), w0)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("step", [1e-30, 1e-20, 3e-20, 1e-8])  # squares: 0, subnormal, almost normal, normal
@pytest.mark.parametrize("name", [n for n in NAMES if n != "l2"])
def test_near_the_anchor_the_gradient_stays_bounded(name, step, xla):
    _, _, fisher = arrays((4, 3))
    penalty, w = make(name, 1.0, np.zeros((4, 3), "float32"), fisher), np.full((4, 3), step, "float32")
    value, gradient = value_and_gradient(penalty, w, xla=xla)
    assert 0 <= value < 1e-6 and np.all(np.isfinite(gradient))
    assert np.all(np.abs(gradient) <= 2 * np.sqrt(4) * np.sqrt(fisher.max()))


def test_a_group_that_has_not_moved_does_not_spoil_the_others():
    w, w0, _ = arrays((4, 3))
    w[:, 1] = w0[:, 1]
    _, gradient = value_and_gradient(make("gl_sp", 1.0, w0), w)
    np.testing.assert_allclose(gradient, reference("gl_sp", 1.0, w, w0)[1], rtol=1e-5)
    np.testing.assert_array_equal(gradient[:, 1], 0)


def test_l2_is_keras_l2_of_half_the_strength():
    w, _, _ = arrays((5, 4))
    np.testing.assert_allclose(float(l2sp.L2(0.3)(w)), float(keras.regularizers.L2(0.15)(w)), rtol=1e-6)


SPECIAL_CASES = [
    # F = 1 turns the Fisher penalties into the plain ones
    ("l2_sp_fisher", "l2_sp", (3, 3, 2, 4), lambda w0, f: (w0, np.ones_like(f))),
    ("gl_sp_fisher", "gl_sp", (3, 3, 2, 4), lambda w0, f: (w0, np.ones_like(f))),
    # w0 = 0 turns L2-SP into L2
    ("l2_sp", "l2", (3, 3, 2, 4), lambda w0, f: (np.zeros_like(w0), f)),
    # groups of one weight turn GL-SP into L1-SP
    ("gl_sp", "l1_sp", (6,), lambda w0, f: (w0, f)),
    ("gl_sp", "l1_sp", (1, 1, 1, 6), lambda w0, f: (w0, f)),
]


@pytest.mark.parametrize(("general", "special", "shape", "reduce"), SPECIAL_CASES)
def test_special_cases_agree(general, special, shape, reduce):
    w, w0, fisher = arrays(shape)
    w0, fisher = reduce(w0, fisher)
    one = value_and_gradient(make(general, 0.7, w0, fisher), w)
    other = value_and_gradient(make(special, 0.7, w0), w)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("shape", "axes"), [((3, 3, 4, 2), (0, 1)), ((5, 2, 3), (0,)), ((3, 3, 2, 4), (0, 1, 3))])
def test_groups_of_other_kernels(shape, axes):
    w, w0, fisher = arrays(shape)
    for name in ("gl_sp", "gl_sp_fisher"):
        value, gradient = value_and_gradient(make(name, 0.3, w0, fisher, group_axes=axes), w)
        expected = reference(name, 0.3, w, w0, fisher if name.endswith("fisher") else None, axes)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-6)


def test_epsilon_smooths_the_kink_as_the_authors_do():
    w0 = np.zeros((4, 3), "float32")
    np.testing.assert_allclose(float(l2sp.GroupLassoSP(1.0, w0, epsilon=1e-16)(w0)), 3 * np.sqrt(4) * 1e-8, rtol=1e-5)
    np.testing.assert_allclose(float(l2sp.L1SP(1.0, w0, epsilon=1e-16)(w0)), 12 * 1e-8, rtol=1e-5)
    for cls in (l2sp.GroupLassoSP, l2sp.L1SP):
        _, gradient = value_and_gradient(cls(1.0, w0, epsilon=1e-16), w0)
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_every_float_type_is_computed_in_float32_at_least(name, dtype):
    w, w0, fisher = arrays((4, 3))
    penalty = make(name, 0.3, w0, fisher)
    value = penalty(keras.ops.cast(w, dtype))
    assert keras.backend.standardize_dtype(value.dtype) == ("float64" if dtype == "float64" else "float32")
    exact = oracle(name, 0.3, keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.cast(w, dtype), "float64")), w0, fisher)[0]
    np.testing.assert_allclose(float(value), exact, rtol=1e-5)


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), "0.1", None, True])
@pytest.mark.parametrize("name", NAMES)
def test_bad_strengths_are_refused(name, bad):
    with pytest.raises(ValueError, match="alpha is .*give a finite number"):
        PENALTIES[name](bad)


def test_mismatched_shapes_are_both_named():
    with pytest.raises(ValueError, match=r"weight has the shape \(2, 3\), but the anchor has \(3, 2\)"):
        l2sp.L2SP(1.0, np.zeros((3, 2), "float32"))(np.zeros((2, 3), "float32"))
    with pytest.raises(ValueError, match=r"anchor has the shape \(2, 3\), but the fisher has \(1, 3\)"):
        l2sp.L2SPFisher(1.0, np.zeros((2, 3), "float32"), np.zeros((1, 3), "float32"))


def test_a_bad_fisher_diagonal_is_refused():
    w0 = np.zeros(3, "float32")
    with pytest.raises(ValueError, match="negative"):
        l2sp.L2SPFisher(1.0, w0, np.array([1, -1, 0], "float32"))
    with pytest.raises(ValueError, match="not finite"):
        l2sp.L2SPFisher(1.0, w0, np.array([1, np.nan, 0], "float32"))
    with pytest.raises(ValueError, match="not finite"):
        l2sp.L2SP(1.0, np.array([1, np.inf, 0], "float32"))


def test_the_anchor_is_copied_by_value():
    for source in (np.zeros(3, "float32"), keras.Variable(np.zeros(3, "float32")), tf.Variable(tf.zeros(3))):
        penalty = l2sp.L2SP(2.0, source)
        if isinstance(source, np.ndarray):
            source[:] = 5
        else:
            source.assign([5, 5, 5])
        assert float(penalty(np.ones(3, "float32"))) == 3


@pytest.mark.parametrize("name", [n for n in NAMES if n != "l2"])
def test_without_an_anchor_the_value_is_refused_in_a_sentence(name):
    with pytest.raises(UnboundPenaltyError, match="not bound to its anchors"):
        PENALTIES[name](0.1)(np.zeros(3, "float32"))


@pytest.mark.parametrize("name", NAMES)
def test_configuration_survives_serialization_without_arrays(name):
    w, w0, fisher = arrays((4, 3))
    penalty = make(name, 0.3, w0, fisher)
    config = keras.regularizers.serialize(penalty)
    assert len(str(config)) < 500
    loaded = keras.regularizers.deserialize(config)
    assert type(loaded) is type(penalty)
    assert loaded.get_config() == penalty.get_config()
    assert loaded.is_bound == (name == "l2")


@pytest.mark.parametrize("name", NAMES)
def test_used_alone_on_a_layer(name):
    w, w0, fisher = arrays((4, 3))
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_regularizer=make(name, 0.3, w0, fisher))])
    model.layers[0].kernel.assign(w)
    np.testing.assert_allclose(float(sum(model.losses)), oracle(name, 0.3, w, w0, fisher)[0], rtol=1e-5)
    model.compile("sgd", "mse")
    history = model.fit(np.zeros((2, 4)), np.zeros((2, 3)), verbose=0)
    np.testing.assert_allclose(history.history["loss"][0], oracle(name, 0.3, w, w0, fisher)[0], rtol=1e-5)


def test_a_traced_step_captures_the_anchor_instead_of_embedding_it():
    w0 = np.zeros((300, 300), "float32")
    penalty, variable = l2sp.L2SP(1.0, w0), keras.Variable(w0)
    graph = tf.function(lambda: penalty(variable)).get_concrete_function().graph
    assert len(graph.as_graph_def().SerializeToString()) < 20_000


def second_derivative_product(penalty, w, v):
    """The Hessian of a penalty times v, by automatic differentiation of the gradient."""
    variable = keras.Variable(w)
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            value = penalty(variable)
        gradient = inner.gradient(value, variable.value)
    return outer.gradient(gradient, variable.value, output_gradients=tf.constant(v), unconnected_gradients="zero").numpy()


@pytest.mark.parametrize("shape", [(3, 3, 4, 5), (7, 2), (6,)])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_those_of_the_loops(name, shape):
    w, w0, fisher = arrays(shape)
    v = np.random.default_rng(1).normal(size=shape).astype("float32")
    step = 1e-6 * v.astype("float64")
    ahead, behind = (oracle(name, 0.3, w + sign * step, w0, fisher)[1] for sign in (1, -1))
    product = second_derivative_product(make(name, 0.3, w0, fisher), w, v)
    np.testing.assert_allclose(product, (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-5)
    assert np.all(np.isfinite(second_derivative_product(make(name, 0.3, w0, fisher), w0, v)))


@pytest.mark.parametrize(
    ("name", "most"), [("l2", 1), ("l2_sp", 2), ("l2_sp_fisher", 4), ("l1_sp", 5), ("gl_sp", 5), ("gl_sp_fisher", 7)]
)
def test_few_tensors_of_the_size_of_the_weight_are_made(name, most):
    """Each such tensor costs a pass over memory: w - w0, its square, and their gradients."""
    w0 = np.zeros((3, 3, 4, 5), "float32")
    penalty, variable = make(name, 0.1, w0, np.ones_like(w0)), keras.Variable(w0)

    def step():
        with tf.GradientTape() as tape:
            value = penalty(variable)
        return tape.gradient(value, variable.value)

    needed = {tensor.op for tensor in tf.function(step).get_concrete_function().graph.outputs}
    for _ in range(50):  # exceeds the depth of these graphs
        needed |= {tensor.op for op in needed for tensor in op.inputs}
    made = [op.outputs[0] for op in needed if op.type not in ("Identity", "Placeholder", "ReadVariableOp")]
    assert sum(tensor.dtype == "float32" and tensor.shape == w0.shape for tensor in made) <= most


@pytest.mark.parametrize("name", NAMES)
def test_a_traced_step_and_its_anchor_are_freed(name):
    """`tf.custom_gradient` would keep both until the process ends."""

    def references():
        w0 = np.ones((4, 3), "float32")
        penalty, variable = make(name, 0.1, w0, w0), keras.Variable(w0)
        step = tf.function(lambda: tf.gradients(penalty(variable), variable.value))
        return [weakref.ref(thing) for thing in (penalty, step.get_concrete_function().graph)]

    found = references()
    gc.collect()
    assert [reference() for reference in found] == [None, None]
