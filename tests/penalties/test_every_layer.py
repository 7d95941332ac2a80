"""Invariant: the traced step applies the coverage to each weight of every Keras layer, before and after saving."""

import keras
import numpy as np
import pytest
from reference.penalties import penalty as reference
from test_copies import ARGUMENTS, STATES, around, inputs_of, maker

import l2sp_tf as l2sp
from l2sp_tf.penalties.formulas import PENALTIES
from l2sp_tf.penalties.weights import keyed_weights

RATE, ALPHA, BETA = 0.1, 0.3, 0.05
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
REFUSED = ("LoRA", "int8", "float8")  # `attach` refuses them: see tests/penalties/test_attachment.py
REFUSED += ("SpectralNormalization", "renormalised")  # overwrite their kernels: a step is not a sum of gradients
REFUSED += ("a stateful LSTM",)  # each step depends on the state after the last one
NOT_SAFE = ("a function for an activation", "a lambda for an activation")  # Keras refuses to load their files
SLOW = ("Bidirectional", "ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D", "GRU", "LSTM", "RNN", "SimpleRNN")
SLOW += ("Conv3DTranspose", "Conv1DTranspose", "SeparableConv1D", "DepthwiseConv1D", "Conv1D", "Conv3D", "Pipeline")
SYMBOLS = {cls.__name__: symbol for symbol, cls in PENALTIES.items()}


def with_top(name):
    """A model of one layer with a Dense layer on top, or None if the layer has no trainable weights."""
    make, shape = maker(name) if name in ARGUMENTS else STATES[name]
    keras.utils.set_random_seed(0)
    core = around(make, shape)
    if not core.trainable_variables:
        return None
    for layer in core._flatten_layers():
        layer.trainable = True  # a file does not store which inner layers are frozen
    output = keras.tree.flatten(core.output)[0]
    flat = keras.ops.mean(output, axis=1) if None in output.shape[1:] else keras.layers.Flatten()(output)
    return keras.Model(core.inputs, keras.layers.Dense(3, name="top")(flat))


def step(model, x, start=None):
    """The weights after one traced step of SGD from `start`."""
    if start is not None:
        for variable, value in zip(model.variables, start, strict=True):
            variable.assign(value)
    model.compile(keras.optimizers.SGD(RATE), LOSS)
    model.train_on_batch(x, np.arange(len(keras.tree.flatten(x)[0])) % 3)
    return l2sp.Anchors.of(model)


def check(name, folder):
    model = with_top(name)
    if model is None:
        return False
    x, start = inputs_of(model), [variable.numpy() for variable in model.variables]
    rng, before = np.random.default_rng(0), l2sp.Anchors.of(model)
    known = {k: (v + rng.normal(0, 0.1, v.shape)).astype(v.dtype) for k, v in before.items() if not k.startswith("top/")}
    anchors, plain = l2sp.Anchors(known), step(model, x)
    for penalty, is_saved in (("l2_sp", False), ("gl_sp", name not in NOT_SAFE)):
        for variable, value in zip(model.variables, start, strict=True):
            variable.assign(value)
        coverage = l2sp.attach(model, PENALTIES[penalty](ALPHA), anchors, BETA, params="all")
        trained = {key for key, weight in keyed_weights(model).items() if weight.variable.trainable}
        assert {row.key for row in coverage.weights if row.penalty is not None} == trained
        compare(step(model, x, start), plain, before, anchors, coverage)
        if is_saved:
            model.save(folder / "m.keras")
            loaded = keras.models.load_model(folder / "m.keras")
            for variable, value in zip(loaded.variables, start, strict=True):
                variable.assign(value)
            with pytest.raises(l2sp.UnboundPenaltyError, match="not bound"):
                step(loaded, x)
            assert l2sp.attach(loaded, PENALTIES[penalty](ALPHA), anchors, BETA, params="all").digest == coverage.digest
            compare(step(loaded, x, start), plain, before, anchors, coverage)
    return True


def compare(after, plain, before, anchors, coverage):
    for row in coverage.weights:
        if row.penalty is not None:
            symbol, config = SYMBOLS[row.penalty["class_name"]], row.penalty["config"]
            w0 = None if symbol == "l2" else anchors[row.key]
            gradient = reference(symbol, config["alpha"], before[row.key], w0, group_axes=config.get("group_axes"))[1]
            np.testing.assert_allclose(after[row.key] - plain[row.key], -RATE * gradient, atol=5e-6, err_msg=row.key)


@pytest.mark.parametrize("name", [n for n in [*ARGUMENTS, *STATES] if n not in REFUSED and n not in SLOW])
def test_the_step_adds_what_the_coverage_says(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_the_step_adds_what_the_coverage_says_in_slow_layers(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.parametrize("name", ["Dense", "Conv2D", "BatchNormalization", "MultiHeadAttention", "Embedding", "PReLU"])
def test_the_walk_meets_layers_with_weights(name):
    assert with_top(name) is not None
