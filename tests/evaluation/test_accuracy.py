"""Checks `evaluate` on every form of data and every kind of output, against a loop over the results of `model.predict`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from fisher_models import policy
from keras import layers, losses, ops

import l2sp_tf as l2sp
from l2sp_tf.data.batches import labelled_batches

N, SHAPE = 13, (4, 4, 3)


def network(classes, *behind, loss=None, precision="float32", name="head"):
    """A model with random weights whose answers on `images` are spread over the classes."""
    with policy(precision):
        inputs = keras.Input(SHAPE, name="image")
        x = layers.Dense(classes, name=name)(layers.Flatten()(inputs))
        for layer in behind:
            x = layer(x)
        model = keras.Model(inputs, x, name="net")
    for variable in model.weights:
        variable.assign(np.random.default_rng(3).normal(size=variable.shape))
    if loss is not None:
        model.compile("sgd", loss)
    return model


class Subclassed(keras.Model):
    def __init__(self, classes, activation):
        super().__init__(name="net")
        self.flat, self.head = layers.Flatten(), layers.Dense(classes, activation)
        self(np.zeros((1, *SHAPE)))

    def call(self, x):
        return self.head(self.flat(x))


# name -> (model, options, the oracle's function from a row of predict to probabilities)
def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def same(p):
    return p


BINARY_LOGITS = losses.BinaryCrossentropy(from_logits=True)
OUTPUTS = {
    "logits": (lambda: network(3), {}, softmax),
    "logits by loss": (
        lambda: network(3, layers.Activation("tanh"), loss=losses.SparseCategoricalCrossentropy(from_logits=True)),
        {},
        softmax,
    ),
    "logits given": (lambda: network(3, layers.Activation("tanh")), {"from_logits": True}, softmax),
    "softmax": (lambda: network(3, layers.Softmax()), {}, same),
    "softmax at a position": (lambda: network(3, layers.Reshape((1, 1, 3)), layers.Softmax()), {}, same),
    "softmax by hand": (
        lambda: network(3, layers.Lambda(lambda z: ops.exp(z) / ops.sum(ops.exp(z), -1, keepdims=True))),
        {"from_logits": False},
        same,
    ),
    "softmax mixed": (lambda: network(3, layers.Softmax(dtype="float32"), precision="mixed_float16"), {}, same),
    "softmax bfloat16": (lambda: network(3, layers.Softmax(), precision="bfloat16"), {}, same),
    "log softmax": (lambda: network(3, layers.Activation("log_softmax")), {}, np.exp),
    "sigmoids": (lambda: network(3, layers.Activation("sigmoid")), {}, same),
    "logits of sigmoids": (lambda: network(3, loss=BINARY_LOGITS), {}, sigmoid),
    "sigmoid": (lambda: network(1, layers.Activation("sigmoid")), {}, same),
    "sigmoid at a position": (lambda: network(1, layers.Activation("sigmoid"), layers.Reshape((1, 1, 1))), {}, same),
    "sigmoid without axis": (lambda: network(1, layers.Activation("sigmoid"), layers.Reshape(())), {}, same),
    "sigmoid half": (lambda: network(1, layers.Activation("sigmoid"), precision="mixed_float16"), {}, same),
    "logit by loss": (lambda: network(1, loss=BINARY_LOGITS), {}, sigmoid),
    "logit given": (lambda: network(1), {"from_logits": True}, sigmoid),
    "probability by loss": (lambda: network(1, layers.Lambda(lambda z: 1 / (1 + ops.exp(-z))), loss="bce"), {}, same),
    "subclassed": (lambda: Subclassed(3, "softmax"), {}, same),
    "subclassed sigmoid": (lambda: Subclassed(1, "sigmoid"), {}, same),
}


def data_for(classes, crops=1, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(N, *([10] if crops > 1 else []), *SHAPE)) if dtype != "uint8" else rng.integers(3, size=(N, *SHAPE))
    return x.astype(dtype), rng.integers(max(classes, 2), size=N), rng.uniform(0.1, 2, size=N)


def oracle(model, means, x, labels, crops=1):
    """Finds the right answers, image by image, from model.predict alone."""
    right, outputs = [], model.predict(x.reshape(-1, *SHAPE), verbose=0).astype("float64")
    for rows, label in zip(outputs.reshape(len(x), crops, -1), labels, strict=True):
        p = means(rows).mean(0)
        right.append((int(p[0] > 0.5) if len(p) == 1 else int(np.argmax(p))) == label)
    return np.array(right)


def label_forms(y, classes):
    yield from (("int64", y), ("int32 column", y[:, None].astype("int32")), ("float", y.astype("float32")), ("list", y.tolist()))
    yield "uint8", y.astype("uint8")
    if classes <= 2 and set(y) <= {0, 1}:
        yield "bool", y.astype(bool)
    if classes > 1:
        yield "one-hot", np.eye(classes, dtype="float32")[y]
        yield "one-hot ints", np.eye(classes, dtype="int64")[y]
        yield "weighted one-hot", np.eye(classes)[y] * 0.9


class Batches(keras.utils.PyDataset):
    def __init__(self, *arrays, size):
        super().__init__()
        self.arrays, self.size = arrays, size

    def __len__(self):
        return -(-N // self.size)

    def __getitem__(self, index):
        return tuple(a[index * self.size : (index + 1) * self.size] for a in self.arrays)


def unshaped(dataset):
    """The same data set, with image shapes unknown to TensorFlow."""
    return dataset.map(lambda x, *rest: (tf.numpy_function(lambda a: a, [x], x.dtype, stateful=False), *rest))


def data_forms(*arrays, few=False):
    """Every form of the same data; the last batch is smaller, and batches differ in size."""
    arrays = tuple(np.asarray(a) for a in arrays)
    yield "arrays", arrays
    unbatched = tf.data.Dataset.from_tensor_slices(arrays)
    yield "batched", unbatched.batch(5)
    if few:
        return
    yield "tensors", tuple(map(tf.constant, arrays))
    yield "unbatched", unbatched
    yield "unbatched of unknown sizes", unshaped(unbatched)
    yield "batched of unknown sizes", unshaped(unbatched.batch(5))
    yield "batched with known sizes", unbatched.batch(13, drop_remainder=True)
    yield "PyDataset", Batches(*arrays, size=4)
    parts = [tuple(a[i:j] for a in arrays) for i, j in ((0, 1), (1, 8), (8, 8), (8, 13))]
    yield "list of batches", parts
    yield "tuple of batches", tuple(parts)
    yield "lists as batches", [list(part) for part in parts]
    yield "generator", (part for part in parts)
    yield "NumPy iterator", unbatched.batch(5).as_numpy_iterator()


THOROUGH = ("logits", "sigmoid")  # tried on all forms of data; the others only in the slow run


def crossed():
    """Pairs (name of an output, whether to use few forms of data)."""
    yield from (pytest.param(name, name not in THOROUGH, id=name) for name in OUTPUTS)
    slow = pytest.mark.slow
    yield from (pytest.param(name, False, id=f"{name}, all forms", marks=slow) for name in OUTPUTS if name not in THOROUGH)


@pytest.mark.parametrize(("name", "few"), list(crossed()))
def test_every_form_of_data_and_labels_is_judged_alike(name, few):
    build, options, means = OUTPUTS[name]
    model = build()
    output = model(np.zeros((1, *SHAPE), "float32"))
    classes = int(np.prod(output.shape[1:]))
    x, y, w = data_for(classes)
    right = oracle(model, means, x, y)
    assert 0 < right.sum() < N
    expected = {"accuracy": right.mean(), "correct": right.sum(), "total": N}
    for form, data in data_forms(x, y, few=few):
        result = l2sp.evaluate(model, data, batch_size=4, answers=True, **options)
        np.testing.assert_array_equal(result.pop("right"), right, err_msg=form)
        assert result == expected, form
    for form, labels in label_forms(y, classes):
        if few and form not in ("int32 column", "one-hot"):
            continue  # of the output, labels see only the number of classes
        assert l2sp.evaluate(model, (x, labels), batch_size=6, **options) == expected, form
        if form in ("int32 column", "one-hot"):
            assert l2sp.evaluate(model, [(x[:7], labels[:7]), (x[7:], labels[7:])], **options) == expected, form
    weighted = {**expected, "accuracy": pytest.approx(w[right].sum() / w.sum(), rel=1e-12)}
    for form, data in data_forms(x, y, w, few=few):
        assert l2sp.evaluate(model, data, batch_size=4, **options) == weighted, form
    assert l2sp.evaluate(model, (x, y, w[:, None]), **options) == weighted


@pytest.mark.parametrize(("name", "few"), list(crossed()))
def test_ten_crops_vote_by_the_mean_probability(name, few):
    build, options, means = OUTPUTS[name]
    model = build()
    classes = int(np.prod(model(np.zeros((1, *SHAPE), "float32")).shape[1:]))
    x, y, w = data_for(classes, crops=10)
    right = oracle(model, means, x, y, crops=10)
    for form, data in data_forms(x, y, w, few=few):
        result = l2sp.evaluate(model, data, batch_size=40, crops=10, answers=True, **options)
        np.testing.assert_array_equal(result["right"], right, err_msg=form)
        assert result["accuracy"] == pytest.approx(w[right].sum() / w.sum())


def test_a_perfect_sigmoid_is_right():
    model = network(1, layers.Activation("sigmoid"))
    x, _, _ = data_for(1)
    y = model.predict(x, verbose=0) > 0.5
    assert 0 < y.sum() < N
    assert l2sp.evaluate(model, (x, y)) == l2sp.evaluate(model, (x, y[:, 0])) == {"accuracy": 1.0, "correct": N, "total": N}
    assert l2sp.evaluate(model, (x, ~y))["correct"] == 0


def test_scores_that_are_not_probabilities_still_have_a_highest():
    """With K scores only the highest counts, whatever the scores mean."""
    x, y, _ = data_for(3)
    for model in (network(3, layers.Activation("tanh")), network(3, layers.ReLU(), loss="mse")):
        assert l2sp.evaluate(model, (x, y))["correct"] == oracle(model, same, x, y).sum()


def test_pixels_become_floats_and_other_numbers_stay():
    x, y, _ = data_for(3, dtype="uint8")
    for model in (network(3), Subclassed(3, "softmax")):
        result = l2sp.evaluate(model, (x, y))
        assert result == l2sp.evaluate(model, (x.astype("float32"), y)) == l2sp.evaluate(model, (x.astype("float64"), y))
        assert result == l2sp.evaluate(model, tf.data.Dataset.from_tensor_slices((x, y)))
    kinds = {"uint8": "float32", "int32": "int32", "int64": "int64", "float16": "float16", "float64": "float64", "bool": "bool"}
    for given, kept in kinds.items():
        [(found, _, _)] = labelled_batches((np.ones((2, 3), given), [0, 1]), model, size=5)
        assert found.dtype == kept


def remainders():
    """A model whose highest score is at the number modulo 3, for numbers that float32 would round."""
    inputs = keras.Input((5,), dtype="int64")
    return keras.Model(inputs, layers.Lambda(lambda x: ops.one_hot(x[:, 0] % 3, 3))(inputs))


def test_integers_and_strings_are_not_rounded():
    model, x = remainders(), np.full((N, 5), 2**24 + 1) + np.arange(N)[:, None]
    for form, data in data_forms(x, x[:, 0] % 3):
        assert l2sp.evaluate(model, data, batch_size=4)["correct"] == N, form
    words = np.array(["a", "b", "c", "d"] * 3 + ["a"])
    table = keras.Sequential([keras.Input((1,), dtype="string"), layers.StringLookup(vocabulary=["a", "b", "c", "d"])])
    table.add(layers.CategoryEncoding(5, output_mode="one_hot"))
    table.add(layers.Dense(3))
    y = np.argmax(table(tf.constant(words[:, None])), 1)
    for column in (words, words[:, None]):
        for form, data in data_forms(column, y, few=column.ndim == 2):
            assert l2sp.evaluate(table, data, batch_size=4)["accuracy"] == 1, form


def two_inputs(names=("a", "b")):
    inputs = {name: keras.Input((2,), name=name) for name in names}
    joined = layers.Concatenate()(list(inputs.values()))
    return inputs, layers.Dense(3, name="head")(joined)


@pytest.mark.parametrize("kind", ["dict", "tuple"])
def test_inputs_may_be_many(kind):
    inputs, output = two_inputs()
    model = keras.Model(inputs if kind == "dict" else list(inputs.values()), output)
    rng = np.random.default_rng(0)
    parts, y = {name: rng.normal(size=(N, 2)).astype("float32") for name in "ab"}, rng.integers(3, size=N)
    x = parts if kind == "dict" else tuple(parts.values())
    expected = np.sum(np.argmax(model.predict(x, verbose=0), 1) == y)
    unbatched = tf.data.Dataset.from_tensor_slices((x, y))
    batches = [(keras.tree.map_structure(lambda a, s=s: a[s], x), y[s]) for s in (slice(0, 8), slice(8, 13))]
    forms = [(x, y), unbatched, unbatched.batch(5), batches, tuple(batches), iter(batches)]
    for data in [*forms, ([*x], y)] if kind == "tuple" else forms:
        assert l2sp.evaluate(model, data, batch_size=4)["correct"] == expected
    with pytest.raises(l2sp.InputError, match=r"takes \(None, 10, 2\)"):
        l2sp.evaluate(model, (x, y), crops=10)


def test_a_list_of_images_is_one_input():
    model, (x, y, _) = network(3), data_for(3)
    expected = l2sp.evaluate(model, (x, y))
    assert l2sp.evaluate(model, (list(x), y)) == l2sp.evaluate(model, ([x], y)) == expected
    assert l2sp.evaluate(model, (x.tolist(), y.tolist())) == expected


def many_outputs(kind):
    inputs = keras.Input(SHAPE)
    flat = layers.Flatten()(inputs)
    parts = {
        "colour": layers.Dense(3, "softmax", name="colour")(flat),
        "big": layers.Dense(1, "sigmoid", name="big")(flat),
        "age": layers.Dense(4, name="age")(flat),
    }
    model = keras.Model(inputs, parts if kind == "dict" else list(parts.values()))
    for variable in model.weights:
        variable.assign(np.random.default_rng(3).normal(size=variable.shape))
    return model


@pytest.mark.parametrize("kind", ["dict", "list"])
@pytest.mark.parametrize("crops", [1, 10])
def test_many_outputs_are_judged_each_by_itself(kind, crops):
    model, names = many_outputs(kind), ("colour", "big", "age")
    x, _, w = data_for(3, crops)
    rng = np.random.default_rng(5)
    labels = {name: rng.integers(high, size=N) for name, high in zip(names, (3, 2, 4), strict=True)}
    single = {name: keras.Model(model.inputs, model.get_layer(name).output) for name in names}
    means = {"colour": same, "big": same, "age": softmax}
    right = {name: oracle(single[name], means[name], x, labels[name], crops) for name in names}
    order = sorted(names) if kind == "dict" else names
    y = labels if kind == "dict" else tuple(labels.values())
    unbatched = tf.data.Dataset.from_tensor_slices((x, y))
    cut = keras.tree.map_structure
    batches = [(x[s], cut(lambda a, s=s: a[s], y)) for s in (slice(0, 8), slice(8, 13))]
    for data in ((x, y), (x, labels), unbatched) if crops == 10 else ((x, y), (x, labels), unbatched.batch(5), iter(batches)):
        result = l2sp.evaluate(model, data, batch_size=40, crops=crops, answers=True)
        assert list(result["outputs"]) == list(order)
        np.testing.assert_array_equal(result["right"], np.stack([right[name] for name in order], 1))
        for name in names:
            np.testing.assert_array_equal(result["outputs"][name]["right"], right[name])
            assert result["outputs"][name]["accuracy"] == right[name].mean() and result["outputs"][name]["total"] == N
        assert result["correct"] == sum(map(sum, right.values())) and result["total"] == 3 * N
        assert result["accuracy"] == pytest.approx(result["correct"] / result["total"])
    result = l2sp.evaluate(model, (x, y, w), crops=crops)
    assert result["accuracy"] == pytest.approx(sum(w[right[name]].sum() for name in names) / (3 * w.sum()))
    own = {name: w * (1 + i) for i, name in enumerate(names)}
    result = l2sp.evaluate(model, (x, y, own if kind == "dict" else tuple(own.values())), crops=crops)
    total = sum(own[name].sum() for name in names)
    assert result["accuracy"] == pytest.approx(sum(own[name][right[name]].sum() for name in names) / total)
    for name in names:
        assert result["outputs"][name]["accuracy"] == pytest.approx(w[right[name]].sum() / w.sum())


def test_each_of_many_outputs_means_what_its_own_loss_says():
    inputs = keras.Input(SHAPE)
    flat = layers.Flatten()(inputs)
    model = keras.Model(inputs, [layers.Dense(1, name="a")(flat), layers.Dense(1, layers.Activation("tanh"), name="b")(flat)])
    x, y, _ = data_for(1)
    with pytest.raises(l2sp.InputError, match="the output 'a' of the model|The output 'a' of the model"):
        l2sp.evaluate(model, (x, (y, y)))
    for loss in (
        [BINARY_LOGITS, BINARY_LOGITS],
        {"a": BINARY_LOGITS, "b": losses.BinaryFocalCrossentropy(from_logits=True)},
        BINARY_LOGITS,
    ):
        model.compile("sgd", loss)
        result = l2sp.evaluate(model, (x, (y, y)), answers=True)
        answers = np.concatenate(model.predict(x, verbose=0), axis=1) > 0
        np.testing.assert_array_equal(result["right"], answers == y[:, None].astype(bool))
    model.compile("sgd", {"a": BINARY_LOGITS, "b": "mse"})
    with pytest.raises(l2sp.InputError, match="The output 'b' of the model.*mse"):
        l2sp.evaluate(model, (x, (y, y)))


@pytest.mark.parametrize("name", ["logits", "softmax", "sigmoids", "sigmoid", "logit by loss"])
@pytest.mark.parametrize("crops", [1, 10])
def test_nan_is_never_right(name, crops):
    build, options, means = OUTPUTS[name]
    model = build()
    classes = model.output_shape[-1]
    x, y, _ = data_for(classes, crops)
    before = l2sp.evaluate(model, (x, y), crops=crops, answers=True, **options)["right"]
    x[3:6].reshape(3, -1)[:, 0] = np.nan
    for labels in range(max(classes, 2)):
        with pytest.warns(UserWarning, match=f"gives NaN in 3 of {N} answers"):
            found = l2sp.evaluate(model, (x, np.full(N, labels)), crops=crops, answers=True, **options)
        assert not found["right"][3:6].any()
    with pytest.warns(UserWarning, match=f"gives NaN in 3 of {N} answers"):
        after = l2sp.evaluate(model, (x, y), crops=crops, answers=True, **options)
    assert after["nan"] == 3
    np.testing.assert_array_equal(np.delete(after["right"], [3, 4, 5]), np.delete(before, [3, 4, 5]))


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return data_for(3)[:2]


X, Y, W = data_for(3)
HOT = np.eye(3)[Y]
REFUSED = {
    "labels out of range": (3, (X, Y + 1), "The labels of the output contain 3, but it has 3 classes"),
    "negative labels": (3, (X, Y - 1), "contain -1"),
    "halves": (3, (X, Y + 0.5), r"contain \d.5"),
    "NaN labels": (3, (X, np.where(Y == 0, np.nan, Y)), "not all finite"),
    "words": (3, (X, Y.astype(str)), "of the kind"),
    "multi-hot": (3, (X, np.minimum(HOT + HOT[::-1], 1)), "several classes, which top-1 accuracy cannot judge"),
    "soft": (3, (X, HOT * 0.7 + 0.1), "shares of several classes"),
    "no class": (3, (X, HOT * 0), "no class"),
    "too wide": (3, (X, np.eye(4)[Y]), r"have the shape \(13, 4\): give them as \[n\], \[n, 1\] or one-hot \[n, 3\]"),
    "a grid of labels": (3, (X, np.zeros((N, 3, 3))), "have the shape"),
    "fewer labels": (3, (X, Y[:-1]), "The data have 13 images but 12 labels"),
    "more labels": (3, (X, np.concatenate([Y, Y])), "The data have 13 images but 26 labels"),
    "fewer labels in a batch": (3, [(X, Y[:-1])], "have 12 rows, but there are 13 images"),
    "fewer weights": (3, (X, Y, W[:-1]), "12 sample weights"),
    "fewer weights in a batch": (3, [(X, Y, W[:-1])], "sample weights of the output have the shape"),
    "negative weights": (3, (X, Y, -W), "at least 0"),
    "no weights": (3, (X, Y, 0 * W), "all 0"),
    "two for one": (1, (X, Y), "contain 2, but it has 2 classes"),
    "one-hot for one": (1, (X, np.eye(2)[Y % 2]), r"have the shape \(13, 2\): give them as \[n\] or \[n, 1\]"),
    "signs for one": (1, (X, 2.0 * (Y % 2) - 1), "contain -1"),
    "no labels": (3, X, "The data are a ndarray of shape"),
    "a dataset without labels": (3, tf.data.Dataset.from_tensor_slices(X).batch(5), "not images with their labels"),
    "a dataset of dicts": (3, tf.data.Dataset.from_tensor_slices({"image": X, "label": Y}), "not images with their labels"),
    "batches without labels": (3, [X], "A batch is a ndarray"),
    "an endless dataset": (3, tf.data.Dataset.from_tensor_slices((X, Y)).batch(5).repeat(), "never end"),
    "an endless PyDataset": (3, Endless(), "never end"),
    "nothing": (3, [], "no test images"),
    "an empty batch": (3, [(X[:0], Y[:0])], "no test images"),
    "a number": (3, 7, "The data are a int"),
    "one image": (3, [(X[0], Y[0])], r"x has the shape \(4, 4, 3\), but the model 'net' takes \(None, 4, 4, 3\)"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_data_that_cannot_be_judged_give_one_sentence(name):
    classes, data, match = REFUSED[name]
    model = network(classes, layers.Activation("sigmoid" if classes == 1 else "softmax"))
    with pytest.raises(l2sp.InputError, match=match) as caught:
        l2sp.evaluate(model, data)
    assert "\n" not in str(caught.value)


def test_outputs_that_cannot_be_judged_give_one_sentence():
    for model, match in (
        (network(1), "is one number, and nothing says what it means"),
        (network(1, layers.Activation("tanh")), r"comes from the operation Tanh \(net.*activation.*does not say whether"),
        (network(1, loss="mse"), "has the loss mse, which does not say whether it is logits"),
        (network(1, loss="binary_crossentropy"), "taken for probabilities, because .* some are negative or above 1"),
        (network(6, layers.Reshape((2, 3))), r"is \(None, 2, 3\): give a classifier"),
        (network(6, layers.Reshape((6, 1))), r"is \(None, 6, 1\): give a classifier"),
    ):
        with pytest.raises(l2sp.InputError, match=match) as caught:
            l2sp.evaluate(model, (X, Y % 2))
        assert "\n" not in str(caught.value)
    model = network(3, layers.Activation("tanh"))
    with pytest.raises(l2sp.InputError, match="Tanh"):  # the mean over crops needs the output's meaning
        l2sp.evaluate(model, (np.stack([X] * 10, 1), Y), crops=10)
    model = many_outputs("dict")
    with pytest.raises(l2sp.InputError, match="has the outputs age, big, colour: give the labels in a dict or list"):
        l2sp.evaluate(model, (X, Y))
    with pytest.raises(l2sp.InputError, match="no entry for the output 'age'"):
        l2sp.evaluate(model, (X, {"colour": Y, "big": Y % 2}))
    for size in (0, -1, 2.5, True):
        with pytest.raises(l2sp.InputError, match="batch_size is"):
            l2sp.evaluate(model, (X, Y), batch_size=size)


def test_retention_reads_every_form_three_times(small_network):
    for classes, loss in ((1, BINARY_LOGITS), (3, None)):
        pretrained = small_network(classes)
        if loss is not None:
            pretrained.compile("sgd", loss)
        tuned = l2sp.with_new_head(pretrained, 2)
        x, y = np.random.default_rng(0).normal(size=(N, 6, 6, 3)).astype("float32"), np.arange(N) % max(classes, 2)
        expected = l2sp.evaluate(pretrained, (x, y))
        for form, data in data_forms(x, y, few=classes == 1):
            if form in (
                "tensors",
                "batched with known sizes",
                "batched of unknown sizes",
                "tuple of batches",
                "lists as batches",
            ):
                continue  # these forms take the same path as others by now
            if hasattr(data, "__next__"):
                with pytest.raises(l2sp.InputError, match="can be read only once, but they are needed several times"):
                    l2sp.retention(tuned, pretrained, data)
                continue
            result = l2sp.retention(tuned, pretrained, data)
            assert result["before"] == result["target_statistics"] == result["source_statistics"] == expected, form
    report = l2sp.retention_report(pretrained, l2sp.Anchors.of(pretrained), source=(x, y))
    assert report.accuracies["before"] == expected and report.r2


def test_a_generator_that_was_read_is_not_an_empty_data_set():
    model, batches = network(3), iter([(X, Y)])
    assert l2sp.evaluate(model, batches)["total"] == N
    with pytest.raises(l2sp.InputError, match="read again if they have been read before"):
        l2sp.evaluate(model, batches)
