"""Invariant: after any calls, a step applies the last coverage, or one clear error is raised.

Each test runs calls in some order, takes one step of `fit`, and compares the change of every weight with the formulas in
float64: -rate (gradient of the cross-entropy + gradient of the penalty in the coverage).
"""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.penalties import penalty as reference

import l2sp_tf as l2sp
from l2sp_tf.models.units import unfreeze
from l2sp_tf.penalties.formulas import PENALTIES
from l2sp_tf.penalties.weights import keyed_weights

RATE = 0.1
X = np.random.default_rng(0).normal(size=(8, 4)).astype("float32")
Y = np.arange(8) % 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
SYMBOLS = {cls.__name__: symbol for symbol, cls in PENALTIES.items()}


class Bench:
    """A small model, the anchors of its first two layers, and the state after the calls so far."""

    def __init__(self, folder):
        keras.utils.set_random_seed(1)
        inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5, "tanh", name="a"), keras.layers.Dense(4, name="b")])
        inputs = keras.Input((4,))
        self.model = keras.Model(inputs, keras.layers.Dense(3, name="c")(inner(inputs)))
        rng = np.random.default_rng(2)
        known = {k: v + rng.normal(0, 0.1, v.shape).astype("float32") for k, v in l2sp.Anchors.of(self.model).items()}
        self.anchors = l2sp.Anchors({key: value for key, value in known.items() if not key.startswith("c/")})
        self.fisher = {key: rng.gamma(1.0, size=value.shape).astype("float32") for key, value in self.anchors.items()}
        self.coverage, self.folder, self.proximal = None, folder, False
        self.plain()

    def attach(self, penalty, anchors=True, **options):
        anchors = self.anchors if anchors else None
        self.coverage = l2sp.attach(self.model, penalty, anchors, 0.05, fisher=self.fisher, **options)

    def layer(self, name):
        return next(layer for layer in self.model._flatten_layers() if layer.name == name)

    # the calls
    def kernels(self):
        self.attach(l2sp.L2SP(0.3))

    def all_weights(self):
        self.attach(l2sp.L2SPFisher(0.5), params="all")

    def weight_decay(self):
        self.attach(l2sp.L2(0.2), anchors=False)

    def detach(self):
        l2sp.detach(self.model)
        self.coverage = None

    def freeze(self):
        self.layer("a").trainable = False
        self.model.compile(self.model.optimizer, LOSS)

    def unfreeze(self):
        unfreeze(self.model)  # `trainable = True` on a model that has it already does not reach the layers of an inner one
        self.model.compile(self.model.optimizer, LOSS)

    def plain(self):
        self.proximal = False
        self.model.compile(keras.optimizers.SGD(RATE), LOSS)

    def step(self):
        self.model.fit(X, Y, verbose=0)

    def proximal_run(self):
        self.model.compile(l2sp.Proximal.of(keras.optimizers.SGD(RATE), self.model), LOSS)
        self.proximal = True
        self.model.fit(X, Y, verbose=0)

    def load(self):
        self.model.save(self.folder / "m.keras")
        self.model = keras.models.load_model(self.folder / "m.keras")
        self.plain()

    def clone(self):
        clone = keras.models.clone_model(self.model)
        clone.set_weights(self.model.get_weights())
        self.model = clone
        self.plain()

    # the oracle
    def expected(self):
        """The weights after the next step, by the formulas."""
        trained = self.model.trainable_variables
        with tf.GradientTape() as tape:
            loss = LOSS(Y, self.model(X, training=True))
        gradients = {id(v): g.numpy().astype("float64") for v, g in zip(trained, tape.gradient(loss, trained), strict=True)}
        rows = {row.key: row for row in self.coverage.weights} if self.coverage else {}
        after = {}
        for key, weight in keyed_weights(self.model).items():
            w = weight.variable.numpy().astype("float64")
            if id(weight.variable) in gradients:
                w = self.stepped(w, gradients[id(weight.variable)], key, rows.get(key))
            after[key] = w
        return after

    def stepped(self, w, gradient, key, row):
        config = None if row is None or row.penalty is None else row.penalty["config"]
        if config is None:
            return w - RATE * gradient
        name = SYMBOLS[row.penalty["class_name"]]
        w0 = self.anchors[key].astype("float64") if name != "l2" else 0
        f = self.fisher[key].astype("float64") if name == "l2_sp_fisher" else 1
        if self.proximal:
            return w0 + (w - RATE * gradient - w0) / (1 + RATE * config["alpha"] * f)
        anchor, fisher = (None if name == "l2" else w0), (f if name == "l2_sp_fisher" else None)
        return w - RATE * (gradient + reference(name, config["alpha"], w, anchor, fisher)[1])

    def check_step(self, guarded):
        expected = self.expected()
        self.model.fit(X, Y, verbose=0, callbacks=[l2sp.AnchorGuard(self.coverage)] if guarded and self.coverage else [])
        for key, weight in keyed_weights(self.model).items():
            np.testing.assert_allclose(weight.variable.numpy(), expected[key], atol=2e-6, err_msg=key)


CALLS = ["kernels", "all_weights", "weight_decay", "detach", "freeze", "unfreeze", "plain", "step", "proximal_run"]
CALLS += ["load", "clone"]
ORDERS = [(first, *pair) for first in ("kernels", "all_weights") for pair in itertools.product(CALLS, repeat=2)]


def refused(calls, guarded):
    """The position of the first call that must raise, the last step included; None if none must."""
    bound, frozen, covered, proximal = "yes", False, False, False
    for number, call in enumerate((*calls, "last")):
        if call in ("kernels", "all_weights", "weight_decay"):
            bound, covered = "yes", frozen
        elif call == "detach":
            bound = "none"
        elif call in ("load", "clone") and bound == "yes":
            bound = "lost"
        elif call in ("freeze", "unfreeze"):
            frozen = call == "freeze"
        proximal = (proximal and call not in ("plain", "load", "clone")) or call == "proximal_run"
        if call in ("step", "proximal_run", "last"):
            changed = call == "last" and guarded and bound == "yes" and frozen != covered
            if bound == "lost" or changed or (proximal and bound == "none"):
                return number
    return None


def check(calls, folder, guarded):
    """Runs the calls and one more step; only the expected call may raise, and only an error of this package."""
    bench, found = Bench(folder), None
    for number, call in enumerate((*calls, "last")):
        try:
            getattr(bench, call)() if call != "last" else bench.check_step(guarded)
        except (l2sp.InputError, l2sp.UnboundPenaltyError):
            found = number
            break
        except AssertionError as error:
            raise AssertionError(f"{calls}, {call}: {error}") from None
    assert found == refused(calls, guarded), calls


@pytest.mark.parametrize("part", range(16))
def test_some_orders_of_calls(part, tmp_path):
    """A sample of the slow test below; every second order ends under the guard."""
    check(ORDERS[np.random.default_rng(part).integers(len(ORDERS))], tmp_path, guarded=part % 2 == 1)


@pytest.mark.slow
@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("part", range(11))
def test_all_orders_of_calls(part, guarded, tmp_path):
    for calls in ORDERS[part::11]:
        check(calls, tmp_path, guarded)
