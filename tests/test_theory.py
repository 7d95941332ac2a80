"""Appendix A against coordinate descent, its limits, and regressions that Keras fits with the penalties."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import l2sp_tf as l2sp
from l2sp_tf import theory


def quadratic(n=5, rank=None, seed=0):
    """H of the given rank, w*, w0 and F_jj."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, rank or n))
    return root @ root.T, *rng.normal(size=(2, n)), rng.gamma(1.0, size=n)


def coordinate_descent(hessian, w_star, w0, alpha, fisher, rounds=3000):
    """Minimises 1/2 (w - w*)^T H (w - w*) + alpha / 2 sum_j F_jj (w_j - w0_j)^2 over one w_j after the other."""
    w, n = np.zeros_like(w0), len(w0)
    for _ in range(rounds):
        for j in range(n):
            pull = sum(hessian[j, k] * (w[k] - w_star[k]) for k in range(n) if k != j)
            w[j] = (hessian[j, j] * w_star[j] - pull + alpha * fisher[j] * w0[j]) / (hessian[j, j] + alpha * fisher[j])
    return w


@pytest.mark.parametrize("rank", [5, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_minimiser_is_where_coordinate_descent_ends(rank, weighted):
    hessian, w_star, w0, fisher = quadratic(rank=rank)
    fisher = fisher if weighted else np.ones(5)
    expected = coordinate_descent(hessian, w_star, w0, 0.3, fisher)
    found = theory.minimiser(hessian, w_star, w0, 0.3, fisher if weighted else None)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    # Eq. (8): H (w - w*) + alpha F (w - w0) = 0
    np.testing.assert_allclose(hessian @ (found - w_star) + 0.3 * fisher * (found - w0), 0, atol=1e-12)


@pytest.mark.parametrize("rank", [5, 2])
def test_eq_9_agrees_with_eq_8(rank):
    hessian, w_star, w0, _ = quadratic(rank=rank)
    alphas = [1e-3, 0.1, 1.0, 50.0]
    found = theory.path(hessian, w_star, w0, alphas)
    for alpha, w in zip(alphas, found, strict=True):
        np.testing.assert_allclose(w, theory.minimiser(hessian, w_star, w0, alpha), atol=1e-10)


def test_along_each_eigenvector_the_minimiser_is_a_convex_combination():
    hessian = np.diag([4.0, 1.0, 0.0])  # the eigenvectors are the axes
    w = theory.path(hessian, [1, 1, 1], [-1, -1, -1], [1.0])[0]
    np.testing.assert_allclose(w, [4 / 5 - 1 / 5, 1 / 2 - 1 / 2, -1], atol=1e-15)
    np.testing.assert_allclose(theory.shrinkage([4, 1, 0], 1.0), [4 / 5, 1 / 2, 0])


def test_from_no_penalty_to_an_infinite_one_the_path_leads_from_w_star_to_w0():
    hessian, w_star, w0, _ = quadratic()
    alphas = np.geomspace(1e-12, 1e12, 200)
    path = theory.path(hessian, w_star, w0, alphas)
    np.testing.assert_allclose(path[0], w_star, atol=1e-9)
    np.testing.assert_allclose(path[-1], w0, atol=1e-9)
    np.testing.assert_allclose(theory.path(hessian, w_star, w0, [0.0])[0], w_star, atol=1e-12)
    along = (path - w0) @ np.linalg.eigh(hessian)[1]  # each component goes to 0 without turning back
    assert np.all(np.diff(np.abs(along), axis=0) <= 1e-12)


def test_flat_directions_end_at_w0_however_small_alpha_is():
    hessian, w_star, w0, _ = quadratic(rank=2)
    flat = np.linalg.eigh(hessian)[1][:, :3]
    w = theory.path(hessian, w_star, w0, [1e-30])[0]
    np.testing.assert_allclose(w @ flat, w0 @ flat, atol=1e-9)
    np.testing.assert_allclose(hessian @ (w - w_star), 0, atol=1e-9)


def test_l2_is_the_case_of_w0_at_the_origin():
    hessian, w_star, _, _ = quadratic()
    ridge = np.linalg.inv(hessian + 0.7 * np.eye(5)) @ hessian @ w_star
    np.testing.assert_allclose(theory.minimiser(hessian, w_star, np.zeros(5), 0.7), ridge, atol=1e-12)


def test_the_minimiser_turns_and_shifts_with_its_coordinates():
    hessian, w_star, w0, _ = quadratic()
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    w = theory.minimiser(hessian, w_star, w0, 0.2)
    turned = theory.minimiser(turn @ hessian @ turn.T, turn @ w_star, turn @ w0, 0.2)
    np.testing.assert_allclose(turned, turn @ w, atol=1e-10)
    np.testing.assert_allclose(theory.minimiser(hessian, w_star + 3, w0 + 3, 0.2), w + 3, atol=1e-10)


def test_a_hessian_in_float32_may_be_as_uneven_as_its_rounding():
    hessian, w_star, w0, _ = quadratic(n=40, rank=10)
    rough = hessian.astype("float32")
    rough[0, 1] += np.float32(1e-5)
    rounding = 40 * np.finfo("float32").eps * np.abs(hessian).sum(axis=1).max()
    found = theory.path(rough, w_star, w0, [1.0])[0]
    np.testing.assert_allclose(found, theory.minimiser(hessian, w_star, w0, 1.0), atol=10 * rounding)
    with pytest.raises(l2sp.InputError, match="not symmetric"):
        theory.path(rough.astype("float64"), w_star, w0, [1.0])


E2 = np.eye(2)
BAD = [
    (lambda: theory.minimiser(E2, [0, 0], [1, 1], -1), "alpha is -1"),
    (lambda: theory.minimiser(E2, [0, 0], [1, 1], float("nan")), "alpha is nan"),
    (lambda: theory.minimiser(E2, [0, 0], [1, 1], "0.1"), "alpha is '0.1'"),
    (lambda: theory.minimiser(E2[:1], [0, 0], [1, 1], 1), "not symmetric"),
    (lambda: theory.minimiser([[1, 2], [0, 1]], [0, 0], [1, 1], 1), "not symmetric"),
    (lambda: theory.minimiser(-E2, [0, 0], [1, 1], 2), "eigenvalue -1"),
    (lambda: theory.minimiser(E2, [0, 0, 0], [1, 1], 1), "w_star has 3 entries"),
    (lambda: theory.minimiser(E2, [0, 0], [[1, 1]], 1), r"w0, of the shape \(1, 2\)"),
    (lambda: theory.minimiser(E2, [0, np.inf], [1, 1], 1), "w_star, .*finite"),
    (lambda: theory.minimiser(E2, [0, 0], [1, 1], 1, [1, -1]), "fisher has 2 entries, the least -1"),
    (lambda: theory.minimiser(E2, [0, 0], [1, 1], 1, [1]), "fisher has 1 entries"),
    (lambda: theory.minimiser(np.diag([1, 0]), [0, 0], [1, 1], 0), "singular at alpha = 0"),
    (lambda: theory.minimiser(np.diag([1, 0]), [0, 0], [1, 1], 1, [1, 0]), "singular at alpha = 1"),
    (lambda: theory.path(np.diag([1, 0]), [0, 0], [1, 1], [1, 0]), "alpha is 0"),
    (lambda: theory.path(E2, [0, 0], [1, 1], [1, -2]), "alpha is .*-2"),
    (lambda: theory.path(E2, [0, 0], [1, 1], []), "alphas"),
    (lambda: theory.shrinkage([-1, 1], 1), "eigenvalues has -1"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused_in_a_sentence(call, message):
    with pytest.raises(l2sp.InputError, match=message):
        call()


def regression(outputs, seed=0):
    """Inputs [60, 4], targets [60, outputs] and an anchor of the kernel [4, outputs], in float32."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 4)) @ np.diag([2.0, 1.0, 0.7, 0.4])
    return (a.astype("float32") for a in (x, rng.normal(size=(60, outputs)), rng.normal(size=(4, outputs))))


def fit(x, y, outputs, loss, regularizer, rate, steps):
    """The kernel of a Dense layer without bias, fitted by full-batch SGD in Keras."""
    layer = keras.layers.Dense(outputs, use_bias=False, kernel_regularizer=regularizer, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((x.shape[1],)), layer])
    model.compile(keras.optimizers.SGD(rate), loss)
    model.fit(tf.data.Dataset.from_tensors((x, y)).repeat(steps), shuffle=False, verbose=0)
    return layer.kernel.numpy().astype("float64")


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("outputs", [1, 3])
def test_linear_regression_fitted_by_keras_meets_the_closed_form(outputs, alpha, weighted):
    x, y, w0 = regression(outputs)
    # Keras' "mse" is J(w) = 1/(m k) sum (x w - y)^2, so H = 2/(m k) x^T x for each of the k columns.
    x64, m = x.astype("float64"), y.size
    hessian = np.kron(2 / m * x64.T @ x64, np.eye(outputs))
    w_star = np.linalg.lstsq(x64, y.astype("float64"), rcond=None)[0].ravel()
    fisher = np.random.default_rng(3).uniform(0.5, 2, size=w0.shape).astype("float32") if weighted else None
    expected = theory.minimiser(hessian, w_star, w0.ravel(), alpha, fisher.ravel() if weighted else None).reshape(w0.shape)
    regularizer = l2sp.L2SPFisher(alpha, w0, fisher) if weighted else l2sp.L2SP(alpha, w0)
    curvature = np.linalg.eigvalsh(hessian)[[0, -1]] + alpha * (np.array([0.5, 2]) if weighted else 1)
    rate = 1 / curvature[1]
    steps = int(np.ceil(18 * curvature[1] / curvature[0]))  # e^-18 of the way is left
    found = fit(x, y, outputs, "mse", regularizer, rate, steps)
    np.testing.assert_allclose(found, expected, atol=rounding(x64, y, w0, expected, alpha, rate, curvature[0]), rtol=0)


def rounding(x, y, w0, w, alpha, rate, least_curvature):
    """How far from the minimum SGD in float32 may stand still: (gradient's rounding + half an ulp / rate) / curvature."""
    unit = np.finfo("float32").eps / 2
    terms = 2 / y.size * np.abs(x).T @ (np.abs(x) @ np.abs(w) + np.abs(y)) + 2 * alpha * (np.abs(w) + np.abs(w0))
    gradient = (len(x) + x.shape[1] + 5) * unit * np.linalg.norm(terms)
    return (gradient + 2 * unit * np.linalg.norm(w) / rate) / least_curvature + np.exp(-18) * np.linalg.norm(w)


def classification():
    """Inputs, labels of overlapping classes, and the softmax regression's w* [4, 3] by Newton's method in float64."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(120, 4))
    labels = np.argmax(x @ rng.normal(size=(4, 3)) + rng.gumbel(size=(120, 3)), axis=1)
    w = np.zeros(12)
    for _ in range(20):
        gradient, hessian = softmax_derivatives(w.reshape(4, 3), x, labels)
        w -= np.linalg.lstsq(hessian, gradient.ravel(), rcond=1e-10)[0]
    return x, labels, w.reshape(4, 3)


def softmax_derivatives(w, x, labels):
    """Gradient [d, k] and Hessian [d k, d k] of the mean cross-entropy, example by example."""
    gradient, hessian = np.zeros_like(w), np.zeros((w.size, w.size))
    for row, label in zip(x, labels, strict=True):
        p = np.exp(row @ w - np.max(row @ w))
        p /= p.sum()
        gradient += np.outer(row, p - np.eye(len(p))[label]) / len(x)
        hessian += np.kron(np.outer(row, row), np.diag(p) - np.outer(p, p)) / len(x)
    return gradient, hessian


def test_softmax_regression_fitted_by_keras_tends_to_the_closed_form_quadratically():
    alpha = 0.2
    x, labels, w_star = classification()
    gradient, hessian = softmax_derivatives(w_star, x, labels)
    np.testing.assert_allclose(gradient, 0, atol=1e-13)
    direction = np.random.default_rng(4).normal(size=w_star.shape)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    errors = []
    for step in (0.8, 0.4, 0.2):
        w0 = w_star + step * direction
        found = fit(x.astype("float32"), labels, 3, loss, l2sp.L2SP(alpha, w0.astype("float32")), 1.0, 150)
        # stationary: the gradient of the loss and that of the penalty cancel
        np.testing.assert_allclose(softmax_derivatives(found, x, labels)[0] + alpha * (found - w0), 0, atol=2e-6)
        closed_form = theory.minimiser(hessian, w_star.ravel(), w0.ravel(), alpha).reshape(w0.shape)
        errors.append(np.linalg.norm(found - closed_form))
        assert errors[-1] < 0.1 * np.linalg.norm(found - w_star)
    # Eq. (8) drops the third derivatives of J: half the displacement leaves a quarter of the error.
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4, rtol=0.2)
