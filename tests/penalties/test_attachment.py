"""Eq. (3): the weights in S and in S-bar, and that no training runs un-anchored, on every kind of model."""

import inspect
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference.penalties import penalty as reference

import l2sp_tf as l2sp
from l2sp_tf.penalties.formulas import PENALTIES
from l2sp_tf.penalties.weights import keyed_weights


def dense(units, name):
    return keras.layers.Dense(units, name=name)


def subclassed():
    class Net(keras.Model):
        def __init__(self):
            super().__init__(name="net")
            self.flatten = keras.layers.Flatten()
            self.a, self.b = dense(4, "a"), dense(3, "new")

        def call(self, x):
            return self.b(self.a(self.flatten(x)))

    model = Net()
    model(np.zeros((1, 6, 6, 3)))
    return model


def sequential():
    return keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Flatten(), dense(4, "a"), dense(3, "new")])


def nested():
    base = keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Flatten(), dense(4, "a")], name="base")
    inputs = keras.Input((6, 6, 3))
    return keras.Model(inputs, dense(3, "new")(base(inputs)))


def shared():
    inputs, layer = keras.Input((6, 6, 3)), dense(108, "a")
    x = keras.layers.Flatten()(inputs)
    return keras.Model(inputs, dense(3, "new")(layer(layer(x))))


def mixed():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        return sequential()
    finally:
        keras.config.set_dtype_policy("float32")


KINDS = {f.__name__: f for f in (subclassed, sequential, nested, shared, mixed)}


def anchors_and_key(model):
    """Anchors off the weights, without the layer called new; and the key of the kernel in S."""
    rng = np.random.default_rng(0)
    weights = l2sp.Anchors.of(model)
    known = {key: (a + rng.normal(size=a.shape)).astype(a.dtype) for key, a in weights.items() if "new" not in key}
    return l2sp.Anchors(known), next(key for key in known if key.endswith("a/kernel"))


def batch():
    rng = np.random.default_rng(1)
    return rng.normal(size=(4, 6, 6, 3)).astype("float32"), rng.integers(3, size=4)


def train(model, *callbacks, optimizer="sgd", **kwargs):
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model.fit(*batch(), verbose=0, callbacks=list(callbacks), **kwargs)


@pytest.mark.parametrize("params", ["kernels", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_penalty_of_a_model_is_eq_3(kind, params):
    model = KINDS[kind]()
    anchors, _ = anchors_and_key(model)
    coverage = l2sp.attach(model, l2sp.L2SP(0.3), anchors, beta=0.05, params=params)
    expected = 0.0
    for key, w in l2sp.Anchors.of(model).items():
        if params == "all" or key.endswith("kernel"):
            w0 = None if "new" in key else anchors[key]
            expected += reference("l2", 0.05, w)[0] if w0 is None else reference("l2_sp", 0.3, w, w0)[0]
    np.testing.assert_allclose(float(sum(model.losses)), expected, rtol=1e-5)
    each = 1 if params == "kernels" else 2
    assert {name: n for name, (n, _) in coverage.counts.items()} == {"S": each, "S-bar": each, "left out": 4 - 2 * each}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_towards_its_anchors(kind):
    model = KINDS[kind]()
    anchors, key = anchors_and_key(model)
    coverage = l2sp.attach(model, l2sp.L2SP(100.0), anchors)
    kernel = keyed_weights(model)[key].variable
    before = np.linalg.norm(kernel.numpy() - anchors[key])
    train(model, l2sp.AnchorGuard(coverage), optimizer=keras.optimizers.SGD(0.005))
    assert np.linalg.norm(kernel.numpy() - anchors[key]) < 0.8 * before


@pytest.mark.parametrize("name", list(PENALTIES))
def test_one_step_of_sgd_is_the_step_of_the_reference(name):
    """The step differs from that of a model without penalty by -rate * gradient of the penalty."""
    rng = np.random.default_rng(2)
    model = sequential()
    start = model.get_weights()
    anchors, key = anchors_and_key(model)
    fisher = {k: rng.gamma(1.0, size=a.shape).astype("float32") for k, a in anchors.items()}
    train(model, optimizer=keras.optimizers.SGD(0.1))
    plain = keyed_weights(model)[key].variable.numpy()
    model.set_weights(start)
    w = keyed_weights(model)[key].variable.numpy()
    l2sp.attach(model, PENALTIES[name](0.02), anchors, fisher=fisher if name.endswith("fisher") else None)
    train(model, optimizer=keras.optimizers.SGD(0.1))
    _, gradient = reference(name, 0.02, w, None if name == "l2" else anchors[key], fisher[key] if "fisher" in name else None)
    np.testing.assert_allclose(keyed_weights(model)[key].variable.numpy() - plain, -0.1 * gradient, atol=2e-6)


def test_mirrored_training_equals_training_on_one_device(mirrored):
    results = []
    for strategy in (tf.distribute.OneDeviceStrategy("CPU:0"), mirrored):
        with strategy.scope():
            keras.utils.set_random_seed(3)
            model = sequential()
            anchors, _ = anchors_and_key(model)
            coverage = l2sp.attach(model, l2sp.L2SP(0.5), anchors)
            train(model, l2sp.AnchorGuard(coverage), batch_size=4, epochs=3, shuffle=False)
        results.append(model.get_weights())
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_the_coverage_prints_every_trainable_weight_and_the_counts(small_network):
    pretrained = small_network()
    anchors = l2sp.Anchors.of(pretrained)
    text = str(l2sp.attach(l2sp.with_new_head(pretrained, 7), l2sp.L2SP(0.1), anchors, params="kernels"))
    for word in ("conv1_conv/kernel", "3x3x3x4", "L2SP alpha=0.1", "new_head/kernel", "L2 beta=0.01", "not a kernel"):
        assert word in text
    assert "S: 2 tensors, 288 numbers, S-bar: 1 tensors, 35 numbers, left out: 5 tensors" in text
    assert text.endswith("distance to the anchors when attached: 0")


@pytest.mark.slow
def test_resnet101_has_104_kernels_in_s_and_one_in_s_bar():
    pretrained = keras.applications.ResNet101(weights=None)
    coverage = l2sp.attach(l2sp.with_new_head(pretrained, 120), l2sp.L2SP(0.1), l2sp.Anchors.of(pretrained))
    assert coverage.counts["S"][0] == 104
    assert coverage.counts["S-bar"][0] == 1


def test_a_weight_whose_anchor_has_another_shape_is_new(small_network):
    coverage = l2sp.attach(small_network(classes=5), l2sp.L2SP(0.1), l2sp.Anchors.of(small_network()))
    row = next(w for w in coverage.weights if w.key == "predictions/kernel")
    assert row.group == "S-bar"
    assert "(5, 3)" in row.reason


def test_all_trainable_weights_are_penalised_by_default(small_network):
    """The default of `attach` agrees with `Recipe()` and the paper."""
    for options, expected in (({}, 8), ({"params": "all"}, 8), ({"params": "kernels"}, 3)):
        model = small_network()
        assert len(l2sp.attach(model, l2sp.L2SP(0.1), l2sp.Anchors.of(model), **options).group("S")) == expected
    assert inspect.signature(l2sp.attach).parameters["params"].default == l2sp.Recipe().params == "all"


def test_a_layer_named_new_is_new_though_its_shape_fits(small_network):
    model = small_network()
    coverage = l2sp.attach(model, l2sp.L2SP(0.1), l2sp.Anchors.of(model), new=["predictions"])
    assert [w.key for w in coverage.group("S-bar")] == ["predictions/kernel", "predictions/bias"]
    with pytest.raises(l2sp.InputError, match="does not have"):
        l2sp.attach(model, l2sp.L2SP(0.1), l2sp.Anchors.of(model), new=["missing"])


def test_frozen_weights_are_left_out_with_the_reason(small_network):
    model = small_network()
    model.get_layer("conv1_conv").trainable = False
    coverage = l2sp.attach(model, l2sp.L2SP(0.1), l2sp.Anchors.of(model))
    assert {w.key for w in coverage.group("S")} == {w.key for w in coverage.weights if not w.key.startswith("conv1_conv/")}
    frozen = [w.key for w in coverage.group("left out") if w.reason == "frozen"]
    assert frozen == ["conv1_conv/kernel", "conv1_conv/bias"]


def test_a_frozen_backbone_has_l2_on_its_head_and_one_call_when_it_is_unfrozen(small_network):
    """A common schedule: the head alone first, then all weights."""
    pretrained = small_network()
    anchors = l2sp.Anchors.of(pretrained)
    model = l2sp.with_new_head(pretrained, 3)
    backbone = [layer for layer in model.layers if layer.name != "new_head"]
    for layer in backbone:
        layer.trainable = False
    for phase in ("head", "all"):
        coverage = l2sp.attach(model, l2sp.L2SP(0.1), anchors, beta=0.01, params="kernels")
        kinds = {"S": 0 if phase == "head" else 2, "S-bar": 1}
        assert {name: coverage.counts[name][0] for name in kinds} == kinds
        assert all((w.reason == "frozen") == (phase == "head") for w in coverage.weights if not w.key.startswith("new_head"))
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        guard = l2sp.AnchorGuard(coverage)
        model.fit(*batch(), verbose=0, callbacks=[guard])
        for layer in backbone:
            layer.trainable = True
        if phase == "head":
            assert all(np.array_equal(anchors[k], v) for k, v in l2sp.Anchors.of(model).items() if "new_head" not in k)
            model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            with pytest.raises(l2sp.UnboundPenaltyError, match="was frozen when the penalty was attached"):
                model.fit(*batch(), verbose=0, callbacks=[guard])


def test_a_weight_that_keras_does_not_train_is_frozen_whatever_its_flag_says():
    model = nested()
    model.trainable = False
    model.layers[1].get_layer("a").trainable = True  # inside a frozen model
    coverage = l2sp.attach(model, l2sp.L2SP(0.1), l2sp.Anchors.of(model), new=["new"])
    assert not model.trainable_variables and {w.reason for w in coverage.weights} == {"frozen"}


BAD_CALLS = [
    (lambda m, a: l2sp.attach(m, "l2", a), "penalty is 'l2'"),
    (lambda m, a: l2sp.attach(m, l2sp.L2SP(0.1)), "needs anchors"),
    (lambda m, a: l2sp.attach(m, l2sp.L2SPFisher(0.1), a), "needs the Fisher diagonal"),
    (lambda m, a: l2sp.attach(m, l2sp.L2SPFisher(0.1), a, fisher={}), "no entry for conv1_conv/kernel"),
    (lambda m, a: l2sp.attach(m, l2sp.L2SPFisher(0.1), a, fisher={**a, "conv1_conv/kernel": np.ones(3)}), r"\(3,\)|negative"),
    (lambda m, a: l2sp.attach(m, l2sp.L2SP(0.1), a, beta=-1), "beta is -1"),
    (lambda m, a: l2sp.attach(m, l2sp.L2SP(0.1), a, params="some"), "params is 'some'"),
    (
        lambda m, a: l2sp.attach(m, l2sp.L2SP(0.1), {"x/kernel": np.ones(3)}),
        r"No trainable weight .*\(conv1_conv/kernel.*\(x/kernel",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS)
def test_bad_calls_say_what_is_wrong_and_change_nothing(small_network, call, message):
    model = small_network()
    with pytest.raises(l2sp.InputError, match=message):
        call(model, l2sp.Anchors.of(model))
    assert not model.losses


def test_lora_and_quantized_layers_are_refused_by_name():
    lora, quantized = sequential(), sequential()
    anchors = l2sp.Anchors.of(lora)
    lora.get_layer("a").enable_lora(2)
    quantized.get_layer("a").quantize("int8")
    with pytest.raises(l2sp.InputError, match="'a' is LoRA-enabled"):
        l2sp.attach(lora, l2sp.L2SP(0.1), anchors)
    with pytest.raises(l2sp.InputError, match="'a' is quantized"):
        l2sp.attach(quantized, l2sp.L2SP(0.1), anchors)


def test_groups_follow_the_fan_in_of_each_kind_of_layer():
    inputs = keras.Input((6, 6, 4))
    x = keras.layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(inputs)
    x = keras.layers.Conv2DTranspose(5, 3, name="transposed")(x)
    x = keras.layers.EinsumDense("abcd,def->abcef", (6, 6, 2, 3), name="einsum")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="top")(keras.layers.Flatten()(x)))
    rng = np.random.default_rng(0)
    anchors = l2sp.Anchors({k: (a + rng.normal(size=a.shape)).astype("float32") for k, a in l2sp.Anchors.of(model).items()})
    l2sp.attach(model, l2sp.GroupLassoSP(0.1), anchors)
    axes = {"depthwise/kernel": (0, 1), "transposed/kernel": (0, 1, 3), "einsum/kernel": (0,), "top/kernel": (0,)}
    for key, expected in axes.items():
        variable = keyed_weights(model)[key].variable
        value = reference("gl_sp", 0.1, variable.numpy(), anchors[key], group_axes=expected)[0]
        np.testing.assert_allclose(float(variable.regularizer(variable)), value, rtol=1e-5)


def test_attaching_to_a_compiled_model_traces_its_step_again():
    model = sequential()
    anchors, _ = anchors_and_key(model)
    plain = train(model, optimizer=keras.optimizers.SGD(0.0)).history["loss"][0]
    l2sp.attach(model, l2sp.L2SP(1.0), anchors)
    penalised = model.fit(*batch(), verbose=0).history["loss"][0]
    np.testing.assert_allclose(penalised - plain, float(sum(model.losses)), rtol=1e-4)
    assert l2sp.detach(model) == 4
    np.testing.assert_allclose(model.fit(*batch(), verbose=0).history["loss"][0], plain, rtol=1e-5)


def test_other_regularizers_are_replaced_or_kept_and_reported():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_regularizer="l2", bias_regularizer="l1", name="a")])
    coverage = l2sp.attach(model, l2sp.L2SP(0.1), l2sp.Anchors.of(model), params="kernels")
    assert "replaces L2" in str(coverage)
    assert "keeps L1" in str(coverage)
    l2sp.detach(model)
    assert [type(v.regularizer).__name__ for v in model.trainable_weights] == ["NoneType", "L1"]


@pytest.mark.parametrize("kind", ["sequential", "nested", "mixed"])
def test_a_saved_model_predicts_but_does_not_train_until_bound_again(kind, tmp_path):
    model = KINDS[kind]()
    anchors, _ = anchors_and_key(model)
    coverage = l2sp.attach(model, l2sp.L2SP(0.3), anchors)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.save(tmp_path / "model.keras")
    assert (tmp_path / "model.keras").stat().st_size < 100_000
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x, y = batch()
    np.testing.assert_allclose(loaded.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-5)
    with pytest.raises(l2sp.UnboundPenaltyError, match="not bound to its anchors"):
        loaded.fit(x, y, verbose=0)
    with pytest.raises(l2sp.InputError, match="attached to anchors of digest"):
        l2sp.attach(loaded, l2sp.L2SP(0.3), l2sp.Anchors.of(loaded))
    assert l2sp.attach(loaded, l2sp.L2SP(0.3), anchors).digest == coverage.digest
    loaded.fit(x, y, verbose=0, callbacks=[l2sp.AnchorGuard(coverage)])


def test_a_cloned_model_does_not_train_un_anchored():
    model = sequential()
    anchors, _ = anchors_and_key(model)
    coverage = l2sp.attach(model, l2sp.L2SP(0.3), anchors)
    with pytest.raises(l2sp.UnboundPenaltyError):
        train(keras.models.clone_model(model), l2sp.AnchorGuard(coverage))


def lose_penalty(model):
    keyed_weights(model)["a/kernel"].variable.regularizer = None


def weaken(model):
    keyed_weights(model)["a/kernel"].variable.regularizer = l2sp.L2(0.3, key="a/kernel")


@pytest.mark.parametrize("harm", [lose_penalty, weaken, lambda m: m.get_layer("a").enable_lora(2)])
def test_the_guard_stops_training_that_would_run_un_anchored(harm):
    model = sequential()
    anchors, _ = anchors_and_key(model)
    coverage = l2sp.attach(model, l2sp.L2SP(0.3), anchors)
    harm(model)
    before = model.get_weights()
    with pytest.raises(l2sp.UnboundPenaltyError, match="a/kernel|'a' is LoRA"):
        train(model, l2sp.AnchorGuard(coverage))
    for one, two in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


class Stepper(keras.Sequential):
    """A model with several custom train steps; `losses_of` picks the penalties that they add."""

    def __init__(self, layers, losses_of, style):
        super().__init__(layers)
        self.losses_of, self.style = losses_of, style

    def train_step(self, data):
        x, y = data
        loss_of = tf.function(self.loss_of) if self.style == "function" else self.loss_of
        with tf.GradientTape() as tape:
            loss = loss_of(x, y)
        gradients = tape.gradient(loss, self.trainable_variables)
        if self.style == "by hand":
            for variable, gradient in zip(self.trainable_variables, gradients, strict=True):
                variable.assign_sub(0.1 * gradient)
        else:
            self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss, "penalty": tf.add_n(self.losses)}

    def loss_of(self, x, y):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(y, self(x, training=True))
        return tf.add_n([loss, *self.losses_of(self.losses)])


TRAIN_STEPS = [(style, {}) for style in ("optimizer", "by hand", "function")]
TRAIN_STEPS += [("optimizer", how) for how in ({"run_eagerly": True}, {"jit_compile": True}, {"steps_per_execution": 2})]


@pytest.mark.parametrize(("style", "how"), TRAIN_STEPS)
@pytest.mark.parametrize("added", ["all", "none", "first"])
def test_the_guard_stops_a_train_step_that_ignores_a_penalty(added, how, style):
    losses_of = {"all": list, "none": lambda losses: [], "first": lambda losses: losses[:1]}[added]
    model = Stepper([keras.Input((6, 6, 3)), keras.layers.Flatten(), dense(4, "a"), dense(3, "new")], losses_of, style)
    anchors, _ = anchors_and_key(model)
    coverage = l2sp.attach(model, l2sp.L2SP(0.3), anchors)
    model.compile(keras.optimizers.SGD(0.1), **{"jit_compile": False, **how})
    before = model.get_weights()
    if added == "all":
        model.fit(*batch(), verbose=0, callbacks=[l2sp.AnchorGuard(coverage)])
        assert not np.array_equal(before[0], model.get_weights()[0])
        return
    with pytest.raises(l2sp.UnboundPenaltyError, match="takes no part in the steps of Stepper"):
        model.fit(*batch(), verbose=0, callbacks=[l2sp.AnchorGuard(coverage)])
    for one, two in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
def test_the_guard_of_a_part_watches_the_model_around_it(kind):
    """The outer model traced its step before `attach`."""
    part = KINDS[kind]()
    inputs = keras.Input((6, 6, 3))
    outer = keras.Model(inputs, keras.layers.Dense(3, name="outer_head", dtype="float32")(part(inputs)))
    plain = train(outer, optimizer=keras.optimizers.SGD(0.0)).history["loss"][0]
    anchors, _ = anchors_and_key(part)
    coverage = l2sp.attach(part, l2sp.L2SP(0.3), anchors)
    penalised = outer.fit(*batch(), verbose=0, callbacks=[l2sp.AnchorGuard(coverage)]).history["loss"][0]
    np.testing.assert_allclose(penalised - plain, float(sum(part.losses)), rtol=1e-3)
    assert float(sum(part.losses)) > 0
    part.trainable = False
    with pytest.raises(l2sp.UnboundPenaltyError, match="is frozen now"):
        outer.fit(*batch(), verbose=0, callbacks=[l2sp.AnchorGuard(coverage)])


def test_attaching_in_the_middle_of_a_training_takes_effect_at_the_next_step():
    model = sequential()
    anchors, _ = anchors_and_key(model)

    class Attach(keras.callbacks.Callback):
        def on_train_batch_end(self, step, logs=None):
            if step == 0:
                l2sp.attach(model, l2sp.L2SP(1.0), anchors)

    losses = []
    record = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: losses.append(logs["loss"]))
    train(model, Attach(), record, optimizer=keras.optimizers.SGD(0.0), epochs=2)
    np.testing.assert_allclose(losses[1] - losses[0], float(sum(model.losses)), rtol=1e-4)


@pytest.mark.parametrize("params", ["kernels", "all"])
def test_attach_removes_earlier_penalties(params):
    model = sequential()
    anchors, _ = anchors_and_key(model)
    l2sp.attach(model, l2sp.L1SP(0.7), anchors, params="all")
    model.get_layer("a").trainable = False
    coverage = l2sp.attach(model, l2sp.L2SP(0.3), anchors, params=params)
    carried = {key: w.variable.regularizer for key, w in keyed_weights(model).items() if w.variable.regularizer is not None}
    assert set(carried) == {row.key for row in coverage.weights if row.penalty is not None}
    assert not any(key.startswith("a/") for key in carried)
    l2sp.attach(model, l2sp.L2(0.1), None, 0.2)
    assert {type(v.regularizer) for v in model.trainable_variables} == {l2sp.L2}


def test_an_attach_that_fails_changes_nothing():
    model = sequential()
    anchors, _ = anchors_and_key(model)
    l2sp.attach(model, l2sp.L1SP(0.7), anchors, params="all")
    before = {key: w.variable.regularizer for key, w in keyed_weights(model).items()}
    fisher = {key: -np.ones_like(a) for key, a in anchors.items()}
    with pytest.raises(l2sp.InputError, match="negative"):
        l2sp.attach(model, l2sp.L2SPFisher(0.7), anchors, fisher=fisher)
    assert before == {key: w.variable.regularizer for key, w in keyed_weights(model).items()}


def test_the_guard_warns_of_a_hidden_decay_to_zero():
    model = sequential()
    anchors, _ = anchors_and_key(model)
    guard = l2sp.AnchorGuard(l2sp.attach(model, l2sp.L2SP(0.3), anchors))
    with pytest.warns(UserWarning, match="AdamW has weight_decay=0.004"):
        train(model, guard, optimizer="adamw")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, guard, optimizer="sgd")


def shared_with(tensor, array):
    return np.shares_memory(np.asarray(memoryview(tensor)), array)


def test_the_penalty_shares_the_memory_of_the_anchors_and_never_writes_to_it():
    pretrained = sequential()
    anchors = l2sp.Anchors.of(pretrained)
    fisher = {key: np.ones_like(anchor) for key, anchor in anchors.items()}
    for penalty in (l2sp.L2SP(0.1), l2sp.L1SP(0.1), l2sp.GroupLassoSP(0.1), l2sp.GroupLassoSPFisher(0.1)):
        model = l2sp.with_new_head(pretrained, 2)
        l2sp.attach(model, penalty, anchors, fisher=fisher, params="all")
        regularizer = model.get_layer("a").kernel.regularizer
        assert shared_with(regularizer._anchor, anchors["a/kernel"])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(np.ones((4, 6, 6, 3)), np.arange(4) % 2, epochs=2, verbose=0)
    assert l2sp.Anchors(anchors).digest == anchors.digest


def test_anchors_that_could_change_are_copied(small_network):
    model = small_network()
    arrays = {key: np.array(anchor) for key, anchor in l2sp.Anchors.of(model).items()}
    l2sp.attach(model, l2sp.L2SP(1.0), arrays)
    for array in arrays.values():
        array += 1
    assert float(sum(model.losses)) == 0
    kernel = arrays["conv1_conv/kernel"]
    bound = l2sp.L2SP(1.0).bind("k", anchor=kernel, digest="")
    assert not shared_with(bound._anchor, kernel)


def head_of_the_old_name(pretrained):
    """A model with the pre-trained backbone and a random head that has the old head's name and shape."""
    model = keras.models.clone_model(pretrained)
    for layer in model.layers:
        if layer.weights and layer.name != "predictions":
            layer.set_weights(pretrained.get_layer(layer.name).get_weights())
    return model


def test_a_new_head_of_the_old_name_and_weights_never_loaded_bring_a_warning(small_network):
    pretrained = small_network()
    anchors = l2sp.Anchors.of(pretrained)
    with pytest.warns(UserWarning, match=r"The values of predictions/kernel \(.*new=\.\.\."):
        l2sp.attach(head_of_the_old_name(pretrained), l2sp.L2SP(0.1), anchors)
    with pytest.warns(UserWarning, match="conv1_conv/kernel .*conv2_conv/kernel .*have nothing to do with their anchors"):
        l2sp.attach(keras.models.clone_model(pretrained), l2sp.L2SP(0.1), anchors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = head_of_the_old_name(pretrained)
        assert l2sp.attach(model, l2sp.L2SP(0.1), anchors, new=["predictions"]).distance == 0
        l2sp.attach(pretrained, l2sp.L2SP(0.1), anchors)
        for weight in keyed_weights(pretrained).values():  # further training
            value = weight.variable.numpy()
            weight.variable.assign(value + 0.2 * np.std(value) * np.random.default_rng(0).normal(size=value.shape))
        l2sp.attach(pretrained, l2sp.L2SP(0.1), anchors)


def test_layers_numbered_by_keras_match_those_of_an_earlier_model():
    """In a second network Keras gives layers the names of others: by name alone, 94 of 95 kernels would count as new."""

    def numbered():
        layers = [keras.layers.Dense(6) for _ in range(4)]
        return keras.Sequential([keras.Input((6,)), *layers, keras.layers.Dense(2, name="head")])

    keras.backend.clear_session()
    first = numbered()
    anchors = l2sp.Anchors.of(first)
    keras.layers.Dense(1)
    second = numbered()
    second.set_weights(first.get_weights())
    assert {w.name for w in first.layers} & {w.name for w in second.layers} == {"head"}
    keras.backend.clear_session()
    keras.layers.Dense(1), keras.layers.Dense(1)
    third = numbered()  # its dense_2 is dense in the first
    third.set_weights(first.get_weights())
    assert len({w.name for w in first.layers} & {w.name for w in third.layers}) == 3
    for model in (second, third):
        coverage = l2sp.attach(model, l2sp.L2SP(0.1), anchors)
        assert coverage.counts["S"][0] == 10 and coverage.distance == 0 == float(sum(model.losses))


def test_values_under_another_layers_name_stop():
    first, second = (keras.Sequential([keras.Input((8,)), dense(8, "a"), dense(8, "b")]) for _ in range(2))
    second.set_weights(first.get_weights()[2:] + first.get_weights()[:2])
    with pytest.raises(l2sp.InputError, match="a/kernel has the values of b/kernel, but the name of a/kernel"):
        l2sp.attach(second, l2sp.L2SP(0.1), l2sp.Anchors.of(first))
    assert not second.losses


def fisher_of(model, **options):
    return l2sp.fisher_diagonal(model, batch()[0], from_logits=True, **options)


def test_the_fisher_diagonal_belongs_to_the_coverage():
    model = sequential()
    anchors, fisher = l2sp.Anchors.of(model), fisher_of(model)
    digests = set()
    for values in (fisher, fisher.clip(1e-3), fisher_of(model, seed=1), dict(fisher)):
        coverage = l2sp.attach(model, l2sp.L2SPFisher(0.3), anchors, fisher=values)
        digests.add(coverage.digest)
        digest = values.digest if isinstance(values, l2sp.Fisher) else None
        for row in coverage.group("S"):
            assert row.penalty["config"]["fisher_digest"] == (digest or row.penalty["config"]["fisher_digest"])
            np.testing.assert_allclose(keyed_weights(model)[row.key].variable.regularizer.fisher, values[row.key], rtol=1e-5)
    assert len(digests) == 4


@pytest.mark.parametrize("change", ["none", "names", "head", "kernel", "statistics"])
def test_a_fisher_diagonal_of_other_weights_is_refused(change):
    """Other names or another head change the digest, but not the relevant weights."""

    def network(a="a", b="new", units=3):
        layers = [keras.layers.Flatten(), dense(4, a), keras.layers.BatchNormalization(name="bn"), dense(units, b)]
        return keras.Sequential([keras.Input((6, 6, 3)), *layers])

    model = network()
    names = {"names": ("renamed", "new", 3), "head": ("a", "other_head", 5)}
    other = network(*names.get(change, ("a", "new", 3)))
    for one, two in zip(other.layers, model.layers, strict=True):
        if one.name != "other_head":
            one.set_weights(two.get_weights())
    if change == "kernel":
        other.layers[1].kernel.assign(1.01 * other.layers[1].kernel)
    if change == "statistics":  # F depends on them, though they carry no penalty
        other.layers[2].moving_mean.assign(np.arange(4.0))
    anchors, fisher = l2sp.Anchors.of(model), fisher_of(other)
    if change in ("kernel", "statistics"):
        with pytest.raises(l2sp.InputError, match="estimated at other weights than the anchors"):
            l2sp.attach(model, l2sp.L2SPFisher(0.3), anchors, fisher=fisher, new=["new"])
        assert not model.losses
        return
    l2sp.attach(model, l2sp.L2SPFisher(0.3), anchors, fisher=fisher, new=["new"])
    found = model.layers[1].kernel.regularizer.fisher
    np.testing.assert_allclose(found, fisher[f"{other.layers[1].name}/kernel"], rtol=1e-5)
