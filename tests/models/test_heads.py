"""The head is found by the graph and cut off with what is behind it; retention tests the original head, not the new one."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from networks import ALL, CLASSES, MAKERS, adapted, network, trained

import l2sp_tf as l2sp
from l2sp_tf.evaluation.accuracy import transplant
from l2sp_tf.evaluation.report import pretrained_of
from l2sp_tf.models.heads import head_of
from l2sp_tf.penalties.assignment import assign
from l2sp_tf.penalties.weights import keyed_weights

IMAGE = (8, 8, 3)


def silent(line):
    """Discards the line of with_new_head."""


def on_image(*stack, shape=IMAGE):
    return keras.Sequential([keras.Input(shape), *stack])


def branches(merge, *heads):
    """A model that merges the outputs of several heads on the same features."""
    inputs = keras.Input((6,))
    x = layers.Dense(5, "relu", name="features")(inputs)
    return keras.Model(inputs, merge([head(x) for head in heads]))


def with_op(operation, head=None):
    inputs = keras.Input((6,))
    x = layers.Dense(5, "relu", name="features")(inputs)
    return keras.Model(inputs, operation((head or layers.Dense(4, name="head"))(x)))


def conv(filters=4, **options):
    return layers.Conv2D(filters, 1, **{"name": "head", **options})


def pooled(**options):
    return layers.GlobalAveragePooling2D(**options)


def nested(inner, *around, training=None):
    inputs = keras.Input(inner.input_shape[1:])
    x = inputs
    for layer in around:
        x = layer(x)
    return keras.Model(inputs, inner(x, training=training))


def classifier():
    return on_image(layers.Conv2D(4, 3, name="conv"), pooled(), layers.Dropout(0.3), layers.Dense(3, "softmax", name="head"))


def embedding():
    inputs = keras.Input((None,), dtype="int32")
    x = layers.Embedding(9, 4, name="words")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.LSTM(5)(x)))


def text():
    words = layers.TextVectorization(output_sequence_length=4, vocabulary=["cat", "dog"])
    inputs = keras.Input((), dtype="string")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(9, 4)(words(inputs)))
    return keras.Model(inputs, layers.Dense(3, "sigmoid", name="head")(x))


def two_inputs():
    a, b = keras.Input((4,), name="a"), keras.Input((2,), name="b")
    x = layers.Concatenate()([layers.Dense(3, "relu")(a), layers.Dense(3, "relu")(b)])
    return keras.Model({"a": a, "b": b}, layers.Dense(3, "softmax", name="head")(x))


def normalised(z):
    e = ops.exp(z)
    return e / ops.sum(e, axis=-1, keepdims=True)


# For each model the layers that are cut off, and the width of the features below the new head.
HEADS = {
    "Dense": (lambda: on_image(pooled(), layers.Dense(4, name="head")), ["head"], 3),
    "softmax inside": (lambda: on_image(pooled(), layers.Dense(4, "softmax", name="head")), ["head"], 3),
    "sigmoid of one": (lambda: on_image(layers.Flatten(), layers.Dense(1, "sigmoid", name="head")), ["head"], 192),
    "softmax behind": (lambda: on_image(pooled(), layers.Dense(4, name="head"), layers.Softmax(name="s")), ["head", "s"], 3),
    "Activation behind": (
        lambda: on_image(pooled(), layers.Dense(4, name="head"), layers.Activation("softmax", name="s")),
        ["head", "s"],
        3,
    ),
    "relu and softmax": (
        lambda: on_image(pooled(), layers.Dense(4, "relu", name="head"), layers.Softmax(name="s")),
        ["head", "s"],
        3,
    ),
    "Lambda behind": (lambda: with_op(layers.Lambda(lambda z: z / 2, name="l")), ["head", "l"], 5),
    "operations behind": (lambda: with_op(lambda z: ops.softmax(z * 2.0)), ["head", "multiply", "softmax"], 5),
    "a softmax of operations": (lambda: with_op(normalised), None, 5),
    "Dropout behind": (lambda: with_op(layers.Dropout(0.5, name="d")), ["head", "d"], 5),
    "batch norm before the softmax": (
        lambda: on_image(pooled(), layers.Dense(4, name="head"), layers.BatchNormalization(name="n"), layers.Softmax(name="s")),
        ["head", "n", "s"],
        3,
    ),
    "1x1 convolution": (
        lambda: on_image(
            pooled(keepdims=True), layers.Dropout(0.2), conv(), layers.Reshape((4,), name="r"), layers.Softmax(name="s")
        ),
        ["head", "r", "s"],
        3,
    ),
    "1x1 convolution, Flatten": (
        lambda: on_image(pooled(keepdims=True), conv(), layers.Flatten(name="f")),
        ["head", "f"],
        3,
    ),
    "1x1 convolution, pooled": (
        lambda: on_image(layers.Conv2D(6, 3), conv(activation="relu"), pooled(name="p"), layers.Softmax(name="s")),
        ["head", "p", "s"],
        6,
    ),
    "1x1 convolution, pooled logits": (lambda: on_image(layers.Conv2D(6, 3), conv(), pooled(name="p")), ["head", "p"], 6),
    "1D": (
        lambda: keras.Sequential(
            [keras.Input((9, 2)), layers.Conv1D(6, 3), layers.Conv1D(4, 1, name="head"), layers.GlobalMaxPooling1D(name="p")]
        ),
        ["head", "p"],
        6,
    ),
    "wrapped": (
        lambda: on_image(pooled(), layers.SpectralNormalization(layers.Dense(4, "softmax"), name="head")),
        ["head"],
        3,
    ),
    "nested": (lambda: nested(classifier(), layers.Rescaling(2.0)), ["sequential/head"], 4),
    "nested twice": (lambda: on_image(layers.Rescaling(2.0), nested(classifier())), ["functional/sequential/head"], 4),
    "softmax around": (
        lambda: on_image(on_image(pooled(), layers.Dense(3, name="head")), layers.Softmax(name="s")),
        ["sequential/head", "s"],
        3,
    ),
    "words": (embedding, ["head"], 5),
    "strings": (text, ["head"], 4),
    "several inputs": (two_inputs, ["head"], 6),
}
BACKBONES = {
    "relu features": (lambda: on_image(pooled(), layers.Dense(4, "relu")), 4),
    "tanh behind": (lambda: on_image(pooled(), layers.Dense(4), layers.Activation("tanh")), 4),
    "gelu operation": (lambda: with_op(ops.gelu), 4),
    "image": (lambda: on_image(layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()), 4),
    "one position": (lambda: on_image(layers.Conv2D(4, 8)), 4),
    "1x1 convolution of an image": (lambda: on_image(layers.Conv2D(4, 3), layers.Conv2D(5, 1)), 5),
    "LSTM": (lambda: keras.Sequential([keras.Input((5, 3)), layers.LSTM(4)]), 4),
    "batch norm": (lambda: on_image(pooled(), layers.Dense(4), layers.BatchNormalization()), 4),
    "residual": (lambda: branches(layers.Add(), layers.Dense(5), layers.Identity()), 5),
    "two towers": (lambda: branches(layers.Concatenate(), layers.Dense(3, "relu"), layers.Dense(2, "relu")), 5),
    "no weights": (lambda: on_image(layers.Flatten()), 192),
    "volume": (lambda: on_image(layers.Conv3D(4, 3), shape=(4, 4, 4, 2)), 4),
}


class Gate(layers.Layer):
    def build(self, shape):
        self.w = self.add_weight(shape=(shape[-1], 4), name="w")

    def call(self, x):
        return ops.matmul(x, self.w)


class Scores(Gate):
    def call(self, x):
        return ops.softmax(super().call(x))


REFUSED = {
    "an average of classifiers": lambda: branches(
        layers.Average(), layers.Dense(4, "softmax", name="one"), layers.Dense(4, "softmax", name="two")
    ),
    "a sum of logits": lambda: branches(layers.Add(), layers.Dense(4, name="one"), layers.Dense(4, name="two")),
    "a mean by operations": lambda: branches(
        lambda x: (x[0] + x[1]) / 2, layers.Dense(4, name="one"), layers.Dense(4, name="two")
    ),
    "softmax on a sum": lambda: branches(
        lambda x: ops.softmax(x[0] + x[1]), layers.Dense(4, name="one"), layers.Dense(4, name="two")
    ),
    "a custom layer before a softmax": lambda: on_image(pooled(), Gate(name="one"), layers.Softmax()),
    "a custom layer with a softmax": lambda: on_image(pooled(), Scores(name="one")),
    "stacked scores": lambda: on_image(pooled(), layers.Dense(4, "softmax", name="one"), layers.Dense(4, name="two")),
}


@pytest.mark.parametrize("name", list(HEADS))
def test_the_head_is_cut_off_with_all_behind_it(name):
    make, cut, width = HEADS[name]
    pretrained, said = make(), []
    keys, head = list(keyed_weights(pretrained)), head_of(pretrained)
    model = l2sp.with_new_head(pretrained, 2, seed=1, say=said.append)
    assert list(keyed_weights(model)) == [key for key in keys if key not in head.keys] + ["new_head/kernel", "new_head/bias"]
    assert model.get_layer("new_head").kernel.shape == (width, 2) and model.output_shape == (None, 2)
    assert 0 < len(head.keys) < 9
    if cut is not None:
        assert [path.rstrip("_0123456789") for path in "|".join(head.layers).replace("_1/", "/").split("|")] == [
            path.rstrip("_0123456789") for path in cut
        ] or [path.split("/")[-1] for path in head.layers] == [path.split("/")[-1] for path in cut]
        (line,) = said
        assert line.startswith(f"The new head (2 classes) takes the place of {', '.join(head.layers)} of the model")
    assert_features_are_kept(pretrained, model)
    assert head_of(model).layers == ("new_head",)


def assert_features_are_kept(pretrained, model):
    """Compares the features by putting the original head's weights on the new head."""
    for key, weight in keyed_weights(model).items():
        if not key.startswith("new_head"):
            np.testing.assert_array_equal(weight.variable, keyed_weights(pretrained)[key].variable)


@pytest.mark.parametrize("name", list(BACKBONES))
def test_a_backbone_without_a_head_stays_whole(name):
    make, width = BACKBONES[name]
    pretrained, said = make(), []
    model = l2sp.with_new_head(pretrained, 2, say=said.append)
    assert head_of(pretrained).keys == () and said[0].endswith("nothing was cut off.")
    assert model.get_layer("new_head").kernel.shape == (width, 2) and model.output_shape == (None, 2)
    assert set(keyed_weights(pretrained) if pretrained.weights else {}) < set(keyed_weights(model))


@pytest.mark.parametrize("name", list(REFUSED))
def test_class_scores_are_not_features(name):
    model = REFUSED[name]()
    with pytest.raises(l2sp.InputError, match="class scores of .*(one|two)"):
        l2sp.with_new_head(model, 2, say=silent)


def test_a_new_head_on_a_linear_stack_computes_the_features_by_hand():
    pretrained = nested(classifier(), layers.Rescaling(2.0), training=False)
    model = l2sp.with_new_head(pretrained, 3, say=silent)
    inner = next(layer for layer in model.layers if layer.name == pretrained.layers[-1].name)
    assert inner._inbound_nodes[0].arguments.kwargs["training"] is False
    head = pretrained.layers[-1].get_layer("head")
    model.get_layer("new_head").set_weights(head.get_weights())
    x = np.random.default_rng(0).random((4, *IMAGE))
    np.testing.assert_allclose(ops.softmax(model(x)), pretrained(x), rtol=1e-5)


def test_the_flags_and_the_adapted_state_of_the_backbone_stay():
    inner = on_image(adapted((8, 8, 3)), layers.Conv2D(4, 3), pooled(), layers.Dense(3, "softmax"))
    inner.layers[1].trainable = False
    pretrained = nested(inner)
    model = l2sp.with_new_head(pretrained, 3, say=silent)
    assert [w.variable.trainable for k, w in keyed_weights(model).items() if "conv" in k] == [False, False]
    assert model.get_layer(inner.name).layers[-1].name == pretrained.get_layer(inner.name).layers[-2].name
    model.get_layer("new_head").set_weights(inner.layers[-1].get_weights())
    x = np.random.default_rng(0).random((4, *IMAGE))
    np.testing.assert_allclose(ops.softmax(model(x)), pretrained(x), rtol=1e-5)


def test_several_outputs_and_a_nested_model_called_twice():
    inputs = keras.Input((4,))
    two = keras.Model(inputs, [layers.Dense(2, name="a")(inputs), layers.Dense(3, name="b")(inputs)])
    with pytest.raises(l2sp.InputError, match="has 2 outputs"):
        l2sp.with_new_head(two, 2)
    assert head_of(two).keys == ("a/kernel", "a/bias", "b/kernel", "b/bias")
    square = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="square")])
    with pytest.raises(l2sp.InputError, match="called more than once"):
        l2sp.with_new_head(keras.Model(inputs, square(ops.relu(square(inputs)))), 2)


def test_the_line_is_printed_unless_the_run_is_quiet(capsys, small_network):
    l2sp.with_new_head(small_network(), 1)
    assert capsys.readouterr().out == "The new head (1 class) takes the place of predictions of the model small.\n"
    l2sp.with_new_head(small_network(), 1, say=silent)
    assert capsys.readouterr().out == ""


def check_original_head(pretrained):
    """Perturbs the new head alone, then everything: retention uses the original head, and a rebuild by hand agrees."""
    x, head = np.random.default_rng(3).random((2, *pretrained.input_shape[1:])), head_of(pretrained)
    kernel = keyed_weights(pretrained)[head.keys[0]].variable
    while np.max(pretrained(x, training=False)) > 0.99:  # random weights of a deep network saturate its softmax
        kernel.assign(kernel * 0.1)
    anchors, before = l2sp.Anchors.of(pretrained), pretrained(x, training=False)
    model = l2sp.with_new_head(pretrained, CLASSES, seed=3, say=silent)
    assert len(head.keys) == 2 and not set(head.keys) & set(keyed_weights(model))
    asked = transplant(model, pretrained)
    np.testing.assert_array_equal(asked(x, training=False), before)

    rng, own = np.random.default_rng(0), keyed_weights(model)
    moved = {key: w.variable.numpy() for key, w in own.items() if "float" in w.variable.dtype and "variance" not in key}
    assign(model, {key: value + rng.normal(0, 0.03, value.shape) for key, value in moved.items()})
    assign(asked, {key: own[key].variable.numpy() for key in keyed_weights(asked) if key not in head.keys})
    by_hand = asked(x, training=False)
    assert not np.allclose(by_hand, before)
    np.testing.assert_array_equal(transplant(same_names(model, pretrained), pretrained)(x, training=False), by_hand)

    found = ops.softmax(pretrained_of(model, anchors)(x, training=False))
    np.testing.assert_allclose(found, ops.reshape(before, found.shape), rtol=1e-4, atol=1e-6)


# heads of a Dense layer, of a 1x1 convolution, and of a Dense layer behind a norm: the other families repeat these
QUICK = ("ResNet", "MobileNet", "ConvNeXt")


@pytest.mark.parametrize("family", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in MAKERS])
def test_retention_uses_the_original_head(family):
    check_original_head(network(family))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_retention_uses_the_original_head_of_every_network(name):
    check_original_head(trained(ALL[name]()))


def test_retention_never_uses_the_new_head():
    rng = np.random.default_rng(3)
    stack = layers.Conv2D(6, 3, activation="relu"), pooled(keepdims=True), conv(CLASSES), layers.Reshape((CLASSES,))
    pretrained = on_image(*stack, layers.Softmax())  # a head as that of MobileNet
    x = rng.random((24, *pretrained.input_shape[1:])).astype("float32")
    y = np.argmax(pretrained(x), -1).reshape(-1)
    source = [(x, np.where(np.arange(24) % 3 == 0, (y + 1) % CLASSES, y))]
    model = l2sp.with_new_head(pretrained, CLASSES, say=silent)
    for finetuned in (model, same_names(model, pretrained)):
        result = l2sp.retention(finetuned, pretrained, source)
        assert result["before"]["correct"] == 16
        assert result["before"] == result["target_statistics"] == result["source_statistics"]


def same_names(model, pretrained):
    """Renames the new head as the original one, with the same shape if that is a Dense layer."""
    name = next(key for key in head_of(pretrained).keys).split("/")[0]
    old = model.get_layer("new_head")
    new = layers.Dense(CLASSES, name=name)
    renamed = keras.Model(model.inputs[0], new(old.input))
    new.set_weights(old.get_weights())
    return renamed


def test_the_report_asks_for_a_head_behind_new_pooling():
    pretrained = on_image(layers.Conv2D(6, 3, name="c"), conv(activation="relu"), pooled(name="p"), layers.Softmax(name="s"))
    model = l2sp.with_new_head(pretrained, 2, say=silent)
    with pytest.raises(l2sp.InputError, match="give the model that it started from"):
        pretrained_of(model, l2sp.Anchors.of(pretrained))
