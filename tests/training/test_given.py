"""Training on what Keras' `fit` takes: arrays, `tf.data` and `PyDataset`, against Keras' own `fit` and `evaluate`."""

import csv
import dataclasses
import math
import re
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_trainer import task

import l2sp_tf as l2sp
from l2sp_tf.data.given import collected, given
from l2sp_tf.training.inputs import taken_as_given, validation_of
from l2sp_tf.training.objective import Objective, Validation

N, SIZE, CLASSES = 20, 8, 3  # three batches an epoch, the last one smaller
RECIPE = l2sp.Recipe(iterations=4, decay_at=3, learning_rate=0.05, batch_size=SIZE, log_every=2, beta=0.02)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, 6, 6, 3)).astype("float32")
Y = np.arange(N) % CLASSES
WEIGHTS = RNG.uniform(0.2, 2, N).astype("float32")
SHARES = RNG.dirichlet(np.ones(CLASSES), N).astype("float32")
ONE_HOT = np.eye(CLASSES, dtype="float32")[Y]


class Batches(keras.utils.PyDataset):
    """The arrays in batches, the last one smaller; `events` lists the ends of epochs."""

    def __init__(self, *arrays, **options):
        super().__init__(**options)
        self.arrays, self.events = arrays, []

    def __len__(self):
        return math.ceil(len(self.arrays[0]) / SIZE)

    def __getitem__(self, index):
        return tuple(a[index * SIZE : (index + 1) * SIZE] for a in self.arrays)

    def on_epoch_begin(self):
        self.events.append("begin")

    def on_epoch_end(self):
        self.events.append("end")


def network():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((6, 6, 3))
    x = keras.layers.Conv2D(4, 3, name="conv1_conv")(inputs)
    x = keras.layers.BatchNormalization(momentum=0.9, name="conv1_bn")(x)
    x = keras.layers.Conv2D(4, 2, name="conv2_block1_1_conv")(keras.layers.ReLU(name="conv1_relu")(x))
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, keras.layers.Dense(4, name="predictions")(x), name="tiny")


@pytest.fixture(scope="module")
def pretrained():
    return network()


def slices(*arrays):
    return tf.data.Dataset.from_tensor_slices(arrays)


FORMS = {
    "arrays": lambda *a: a,
    "batched": lambda *a: slices(*a).batch(SIZE),
    "unbatched": slices,
    "endless": lambda *a: slices(*a).batch(SIZE).repeat(),
    "PyDataset": Batches,
}


def permutation(epoch, count, seed=0):
    return np.random.default_rng([seed, epoch]).permutation(count)


def batches_of(form, steps, *arrays, seed=0):
    """The batches that a form gives, by a loop over single places."""
    count = math.ceil(N / SIZE)
    for step in range(steps):
        places = range(step * SIZE, (step + 1) * SIZE)
        if form == "arrays":
            rows = [permutation(place // N, N, seed)[place % N] for place in places]
        elif form == "unbatched":
            rows = [place % N for place in places]
        else:
            batch = step % count
            batch = permutation(step // count, count, seed)[batch] if form == "PyDataset" else batch
            rows = list(range(N))[batch * SIZE : (batch + 1) * SIZE]
        yield tuple(a[rows] for a in arrays)


def by_keras(model, batches, recipe, loss, class_weight=None):
    """Trains an attached model by Keras' own `fit`, one call for each batch, with the class weights of Keras."""
    optimizer = recipe.optimizer()
    around = {"proximal": l2sp.Proximal.of, "decoupled": l2sp.Decoupled.of}.get(recipe.penalty_step)
    model.compile(around(optimizer, model) if around else optimizer, loss)
    for x, y, *w in batches:
        w = w[0] if w else None
        model.fit(x, y, batch_size=len(x), sample_weight=w, class_weight=class_weight, shuffle=False, verbose=0)


def expected(pretrained, form, recipe, arrays, loss, class_weight=None, frozen=0):
    """The weights of `finetune`, with the phases of the recipe, by Keras' `fit` on an attached model."""
    model = l2sp.with_new_head(pretrained, CLASSES, seed=0, say=str)
    anchors = l2sp.Anchors.of(pretrained)
    if recipe.batch_norm == "source":
        l2sp.keep_statistics(model)
    if recipe.head_steps:
        for layer in model.layers:
            layer.trainable = layer.name == "new_head"
        l2sp.attach(model, l2sp.L2SP(0.3), anchors, recipe.beta)
        by_keras(model, batches_of(form, recipe.head_steps, *arrays), recipe.for_head(), loss, class_weight)
        for layer in model.layers:
            layer.trainable = True
    if frozen:
        l2sp.freeze_first(model, frozen)
    l2sp.attach(model, l2sp.L2SP(0.3), anchors, recipe.beta)
    by_keras(model, batches_of(form, recipe.iterations, *arrays), recipe, loss, class_weight)
    return model


def finetune(pretrained, data, recipe=RECIPE, **options):
    options = {"verbose": 0, "num_classes": CLASSES, **options}
    return l2sp.finetune(pretrained, data, l2sp.L2SP(0.3), recipe, **options)


def assert_same(found, expected, **tolerance):
    for one, two in zip(found.get_weights(), expected.get_weights(), strict=True):
        if one.dtype.kind == "f":
            np.testing.assert_allclose(one, two, **tolerance)


SPARSE = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CATEGORICAL = keras.losses.CategoricalCrossentropy(from_logits=True)
ALL = {"head_steps": 3, "iterations": 4, "batch_norm": "source", "penalty_step": "proximal"}
TRAININGS = {
    "plain": {},
    "all": {"recipe": ALL, "frozen": 1, "class_weight": {1: 0.5}},
    "head_steps": {"recipe": {"head_steps": 3}},
    "frozen": {"frozen": 1},
    "proximal": {"recipe": {"penalty_step": "proximal"}},
    "decoupled": {"recipe": {"penalty_step": "decoupled"}},
    "source statistics": {"recipe": {"batch_norm": "source"}},
    "sample weights": {"arrays": (X, Y, WEIGHTS)},
    "class weights": {"class_weight": {0: 0.3, 2: 2.0}},
    "class weights of shares": {"class_weight": {0: 0.3, 2: 2.0}, "arrays": (X, SHARES)},
    "one-hot and smoothed": {"arrays": (X, ONE_HOT), "recipe": {"label_smoothing": 0.2}},
    "smoothed": {"recipe": {"label_smoothing": 0.2}},
    "one-hot, weighted and smoothed": {"arrays": (X, ONE_HOT, WEIGHTS), "recipe": {"label_smoothing": 0.2}},
}
# "all" has the others' settings, and the formula of the loss has a test of its own
QUICK = {("all", "batched"), ("one-hot, weighted and smoothed", "arrays")}


def slow_unless(quick, *values):
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow)


CASES = [slow_unless((name, form) in QUICK, name, form) for name in TRAININGS for form in FORMS]


@pytest.fixture
def _eagerly():
    """Runs training steps without tracing them, for tests of what is trained on."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


eagerly = pytest.mark.usefixtures("_eagerly")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run_functions_eagerly`:UserWarning"),
    pytest.mark.filterwarnings("ignore:The recipe's batch_size have no effect:UserWarning"),
]


@eagerly
@pytest.mark.parametrize(("name", "form"), CASES)
def test_each_form_trains_as_keras_fit_does(name, form, pretrained):
    case = TRAININGS[name]
    recipe = RECIPE.replace(**case.get("recipe", {}))
    arrays = by_hand = case.get("arrays", (X, Y))
    options = {key: case[key] for key in ("class_weight", "frozen") if key in case}
    if recipe.label_smoothing:
        by_hand = (X, (0.8 * ONE_HOT + 0.2 / CLASSES).astype("float32"), *arrays[2:])
    run = finetune(pretrained, FORMS[form](*arrays), recipe, **options)
    loss = CATEGORICAL if by_hand[1].ndim == 2 else SPARSE
    model = expected(pretrained, form, recipe, by_hand, loss, **options)
    assert_same(run.model, model, rtol=1e-4, atol=2e-6)
    assert run.interface is None and run.history[-1]["step"] == recipe.iterations


@eagerly
@pytest.mark.parametrize("labels", [Y[:, None], Y.astype("float64"), Y.astype("uint8"), Y.tolist(), tf.constant(Y)], ids=str)
def test_labels_of_every_type_are_the_same_classes(labels, pretrained):
    made = given((X, labels), pretrained, batch_size=8, num_classes=3)
    assert made.digest == given((X, Y), pretrained, batch_size=8, num_classes=3).digest
    assert made.targets.dtype == np.int32 and list(made.targets) == list(Y)


@eagerly
def test_inputs_may_be_many_and_pixels_whole():
    one, two = keras.Input((2,), name="one"), keras.Input((3,), name="two")
    x = keras.layers.Dense(4, name="hidden")(keras.layers.Concatenate()([one, two]))
    pretrained = keras.Model([one, two], keras.layers.Dense(5, name="predictions")(x))
    x = {"one": RNG.integers(0, 9, (N, 2)).astype("uint8"), "two": RNG.normal(size=(N, 3)).astype("float32")}
    recipe = RECIPE.replace(iterations=1, decay_at=None)
    found = [finetune(pretrained, data, recipe).model for data in ((x, Y), ((x["one"].astype("float32"), x["two"]), Y))]
    assert_same(*found, rtol=0)
    found = [finetune(pretrained, slices(x, y), recipe).model for y in (Y, Y[:, None])]
    assert_same(*found, rtol=0)


@eagerly
def test_inputs_may_be_whole_numbers():
    words = keras.Input((4,), dtype="int32")
    x = keras.layers.GlobalAveragePooling1D(name="pool")(keras.layers.Embedding(9, 5, name="words")(words))
    pretrained = keras.Model(words, keras.layers.Dense(5, name="predictions")(x))
    x = RNG.integers(0, 9, (16, 4)).astype("int32")
    recipe = RECIPE.replace(iterations=2, decay_at=None)
    one, two = (finetune(pretrained, data, recipe) for data in (slices(x, Y[:16]), slices(x, ONE_HOT[:16])))
    assert_same(one.model, two.model, atol=1e-6)


class CutOffError(Exception):
    pass


def cut_off(step):
    """A callback that raises after a step of its process."""

    def act(batch, logs):
        if batch + 1 == step:
            raise CutOffError

    return keras.callbacks.LambdaCallback(on_train_batch_end=act)


@eagerly
@pytest.mark.parametrize("form", FORMS)
def test_batches_from_a_step_on_are_the_rest_of_those_from_the_first(form, pretrained):
    made = given(FORMS[form](X, Y, WEIGHTS), pretrained, batch_size=SIZE, num_classes=CLASSES)
    order = {"batch_size": SIZE, "seed": 4, "iterations": 8}
    for first in (0, 3, 5):
        batches = list(made.train_batches(first_step=first, **order))
        expected = list(batches_of(form, 8, X, Y, WEIGHTS, seed=4))[first:]
        for batch, parts in zip(batches, expected, strict=True):
            for found, part in zip(batch, parts, strict=True):
                np.testing.assert_array_equal(found, part)


@eagerly
@pytest.mark.parametrize("form", [slow_unless(form == "unbatched", form) for form in FORMS])
def test_an_interrupted_run_on_data_that_repeat_ends_in_the_same_bits(form, pretrained, tmp_path, capsys):
    options = {"checkpoint_every": 2, "validation_data": (X, Y)}
    recipe = RECIPE.replace(iterations=4, log_every=2)
    whole = finetune(pretrained, FORMS[form](X, Y), recipe, run_dir=tmp_path / "whole", **options)
    options["run_dir"] = tmp_path / "cut"
    with pytest.raises(CutOffError):
        finetune(pretrained, FORMS[form](X, Y), recipe, callbacks=[cut_off(3)], **options)
    run = finetune(pretrained, FORMS[form](X, Y), recipe, **{**options, "verbose": 2})
    assert run.resumed_at == 2 and run.history == whole.history
    assert_same(run.model, whole.model, rtol=0)
    assert ("skips the batches before it" in capsys.readouterr().out) == (form != "arrays")
    again = finetune(pretrained, FORMS[form](X, Y), recipe, **options)
    assert again.resumed_at == 4
    with pytest.raises(l2sp.InputError, match="is of another run .*data.digest was"):
        finetune(pretrained, FORMS[form](X[::-1], Y), recipe, **options)
    with pytest.raises(l2sp.InputError, match="is of another run .*validation.digest was"):
        finetune(pretrained, FORMS[form](X, Y), recipe, **options | {"validation_data": (-X, Y)})
    with pytest.raises(l2sp.InputError, match="is of another run .*class_weight was"):
        finetune(pretrained, FORMS[form](X, Y), recipe, **options, class_weight={0: 2})


@eagerly
def test_a_stream_that_does_not_repeat_is_known_by_its_name_alone(pretrained, tmp_path):
    shuffled = slices(X, Y).shuffle(N).batch(SIZE)
    once = RECIPE.replace(iterations=1, decay_at=None)
    with pytest.raises(l2sp.InputError, match="gives another first batch each time .* data_name="):
        finetune(pretrained, shuffled, once, run_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    finetune(pretrained, shuffled, once)  # without a folder nothing has to be known again
    finetune(pretrained, shuffled, once, run_dir=tmp_path, data_name="one")
    assert finetune(pretrained, shuffled, once, run_dir=tmp_path, data_name="one").resumed_at == 1
    options = {"run_dir": tmp_path / "arrays", "validation_data": shuffled}
    with pytest.raises(l2sp.InputError, match="gives another first batch"):
        finetune(pretrained, (X, Y), once, **options)
    assert "val_accuracy" in finetune(pretrained, (X, Y), once, **options, data_name="validation").history[-1]
    with pytest.raises(l2sp.InputError, match='is of another run .*data.digest was "named one" and is "named two"'):
        finetune(pretrained, shuffled, once, run_dir=tmp_path, data_name="two")


@eagerly
def test_a_py_dataset_hears_of_its_epochs_and_of_those_that_are_skipped(pretrained):
    data = Batches(X, Y)
    stream = given(data, pretrained, batch_size=1, num_classes=3)
    for first_step, events in (
        (0, ["begin", "end", "begin"]),
        (4, ["begin", "end", "begin"]),
        (6, ["begin", "end"] * 2 + ["begin"]),
    ):
        data.events.clear()
        list(stream.train_batches(batch_size=1, seed=0, first_step=first_step, iterations=max(5, first_step + 1)))
        assert data.events == events


def measured(model, x, y, weights=None):
    """Cross-entropy and accuracy by Keras' own `evaluate`."""
    kind = "Categorical" if y.ndim == 2 else "SparseCategorical"
    metrics = [getattr(keras.metrics, f"{kind}Crossentropy")(from_logits=True), getattr(keras.metrics, f"{kind}Accuracy")()]
    model.compile(loss=CATEGORICAL if y.ndim == 2 else SPARSE, weighted_metrics=metrics)
    return model.evaluate(x, y, sample_weight=weights, verbose=0)[1:]


ARRAYS = {"plain": (X, Y), "weights": (X, Y, WEIGHTS), "shares": (X, SHARES)}
VALIDATIONS = [
    slow_unless((name, form) in {("weights", "PyDataset"), ("weights", "batched"), ("shares", "arrays")}, name, form)
    for name in ARRAYS
    for form in FORMS
    if form != "endless"
]


@eagerly
@pytest.mark.parametrize(("name", "form"), VALIDATIONS)
def test_validation_data_are_measured_as_keras_does(name, form, pretrained, tmp_path):
    x, y, *weights = (a[::-1][:13] for a in ARRAYS[name])
    recipe = RECIPE.replace(iterations=3, decay_at=None)
    run = finetune(pretrained, (X, Y), recipe, validation_data=FORMS[form](x, y, *weights), run_dir=tmp_path)
    found = [run.history[-1][name] for name in ("val_cross_entropy", "val_accuracy")]
    np.testing.assert_allclose(found, measured(run.model, x, y, *weights), rtol=1e-5)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(row["val_accuracy"]) for row in rows] == [row["val_accuracy"] for row in run.history] and len(rows) == 2


BAD_LATER = {
    "NaN image": (X.copy(), Y, WEIGHTS, "NaN or infinite"),
    "negative weight": (X, Y, WEIGHTS.copy(), "not all finite and at least 0"),
    "no weight": (X, Y, 0 * WEIGHTS, "no image with a weight above 0"),
}
BAD_LATER["NaN image"][0][17] = np.nan
BAD_LATER["negative weight"][2][18] = -1


@eagerly
@pytest.mark.parametrize("name", BAD_LATER)
def test_a_bad_batch_of_validation_data_is_not_averaged(name, pretrained):
    *arrays, message = BAD_LATER[name]
    made = given(slices(*arrays).batch(SIZE), pretrained, batch_size=SIZE, num_classes=4)  # as many as the network has
    with pytest.raises(l2sp.InputError, match=message):
        Validation(made, SIZE)(pretrained)


@eagerly
def test_validation_data_of_other_pixels_or_another_scale_are_noticed(pretrained):
    made = task()
    bgr = made.preprocessing.with_pixels(dataclasses.replace(made.pixels, channel_order="bgr"))
    for other in ({"mean": made.mean + 1}, {"preprocessing": bgr}):
        with pytest.raises(l2sp.InputError, match="validation_data has the pixels .*, but the training images have"):
            finetune(pretrained, made, num_classes=None, validation_data=dataclasses.replace(made, **other))
    bright = np.uint8(RNG.integers(0, 256, X.shape))
    for train, validation in ((bright, bright / 255), (bright / 255, bright)):
        with pytest.warns(UserWarning, match="of the first training images reach .*, and those of validation_data"):
            validation_of(pretrained, slices(validation, Y).batch(SIZE), given((train, Y), pretrained, batch_size=SIZE), SIZE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validation_of(pretrained, (bright, Y), given((bright[::-1] // 2, Y), pretrained, batch_size=SIZE), SIZE)


@eagerly
def test_measuring_leaves_the_training_as_it_is(pretrained):
    recipe = RECIPE.replace(iterations=3)
    one, two = (finetune(pretrained, (X, Y), recipe, validation_data=data) for data in (None, (X, Y)))
    assert_same(one.model, two.model, rtol=0)
    for row, other in zip(one.history, two.history, strict=True):
        assert row == {name: value for name, value in other.items() if not name.startswith("val_")}


@eagerly
def test_the_test_images_of_a_task_may_validate(pretrained):
    made = task()
    recipe = RECIPE.replace(iterations=1, decay_at=None)
    run = finetune(pretrained, made, recipe, num_classes=None, validation_data=made)
    assert run.history[-1]["val_accuracy"] == pytest.approx(l2sp.evaluate(run.model, made)["accuracy"])
    x, y = np.concatenate([x for x, _ in made.test_data(5)]), made.test.labels
    arrays = finetune(pretrained, made, recipe, num_classes=None, validation_data=(x, y))
    assert [row["val_cross_entropy"] for row in arrays.history] == pytest.approx([r["val_cross_entropy"] for r in run.history])
    with pytest.raises(l2sp.InputError, match="validation_data has the classes"):
        finetune(pretrained, made, num_classes=None, validation_data=task(classes=2))


@eagerly
def test_logged_numbers_are_those_of_the_labels_as_they_are(pretrained):
    recipe = RECIPE.replace(iterations=1, decay_at=None, batch_size=N, label_smoothing=0.3)
    kept = recipe.replace(batch_norm="source")
    model = l2sp.with_new_head(pretrained, CLASSES, seed=0, say=str)
    for data, options in (((X, Y), {"class_weight": {0: 5.0}}), ((X, Y, WEIGHTS), {})):
        row = finetune(pretrained, data, kept, **options).history[-1]
        found = [row["cross_entropy"], row["accuracy"]]
        np.testing.assert_allclose(found, measured(model, *data), rtol=1e-5)


def wrong(*arrays, **options):
    return lambda form: FORMS[form](*arrays), options


def changed(array, place, value):
    array = np.array(array)
    array[place] = value
    return array


WRONG = {  # data, options, the message, and the forms in which only a later batch is wrong
    "other size": (*wrong(X[:, :5], Y), "x has the shape .*but the model 'tiny' takes"),
    "label out of range": (*wrong(X, changed(Y, 19, 3)), "contain 3, but it has 3 classes"),
    "negative label": (*wrong(X, changed(Y, 0, -1)), "contain -1"),
    "NaN label": (*wrong(X, changed(Y.astype("float32"), 0, np.nan)), "are not all finite"),
    "half a label": (*wrong(X, changed(Y.astype("float32"), 0, 0.5)), "contain 0.5"),
    "labels of words": (*wrong(X, np.array(["a"] * N)), "of the kind"),
    "several classes": (*wrong(X, changed(ONE_HOT, 18, 1)), "sum to 3"),
    "other width": (*wrong(X, ONE_HOT[:, :2]), r"have the shape \(\d+, 2\)"),
    "NaN image": (*wrong(changed(X, 17, np.nan), Y), "NaN or infinite"),
    "negative weight": (*wrong(X, Y, changed(WEIGHTS, 18, -1)), "not all finite and at least 0"),
    "no image": (*wrong(X[:0], Y[:0]), "hold no images|is empty"),
    "unknown class": (*wrong(X, Y, class_weight={3: 1.0}), "class_weight names the class 3: give .* 0 to 2"),
    "class by name": (*wrong(X, Y, class_weight={"a": 1.0}), "class_weight names the class 'a'"),
    "negative class weight": (*wrong(X, Y, class_weight={0: -1.0}), "class_weight of 0 is -1.0"),
    "class weights as a list": (*wrong(X, Y, class_weight=[1, 2, 3]), "class_weight is a list"),
    "both weights": (*wrong(X, Y, WEIGHTS, class_weight={0: 2.0}), "class_weight is given, but the data have sample weights"),
    "pixels": (*wrong(X, Y, pixels="rgb"), "pixels is 'rgb', but"),
    "one class": (*wrong(X, Y, num_classes=1), "num_classes is 1"),
}


@eagerly
@pytest.mark.parametrize("form", ["arrays", "batched", "PyDataset"])
@pytest.mark.parametrize("name", WRONG)
def test_data_that_cannot_be_trained_on_give_one_sentence(name, form, pretrained, tmp_path):
    make, options, message = WRONG[name]
    with pytest.raises(l2sp.InputError, match=message) as found:
        finetune(pretrained, make(form), run_dir=tmp_path, checkpoint_every=1, **options)
    assert "\n" not in str(found.value)
    late = form != "arrays" and name in ("label out of range", "several classes", "NaN image", "negative weight")
    assert bool(list(tmp_path.iterdir())) == late  # arrays are checked before anything is trained or written


class WithoutLabels(Batches):
    def __getitem__(self, index):
        x, weights = super().__getitem__(index)
        return x, None, weights


OTHERS = {
    "differing lengths": (lambda: (X, Y[:-1]), {}, "20 images but 19 labels"),
    "no labels": (lambda: X, {}, "data is a ndarray"),
    "labels that are None": (lambda: (X, None), {}, "labels are None"),
    "weights in place of labels": (lambda: (X, None, Y), {}, "labels are None"),
    "a PyDataset with weights in place of labels": (lambda: WithoutLabels(X, Y), {}, "labels are None"),
    "no arrays": (lambda: [X, Y], {}, "data is a list of 2"),
    "labels for two outputs": (lambda: (X, {"a": Y, "b": Y}), {}, "labels are a dict"),
    "a dataset without labels": (lambda: slices(X, Y).map(lambda x, y: x).batch(2), {}, "not images with their labels"),
    "a number of classes that is unknown": (lambda: slices(X, Y).batch(8), {"num_classes": None}, "give num_classes"),
    "a name for arrays": (lambda: (X, Y), {"data_name": "a"}, "data_name is 'a', but there is no stream"),
    "classes of a task": (task, {}, "num_classes is 3, but a Task has its own"),
    "validation without end": (lambda: (X, Y), {"validation_data": slices(X, Y).repeat()}, "validation_data never ends"),
    "validation of other classes": (lambda: (X, Y), {"validation_data": (X, Y + 1)}, "contain 3, but it has 3 classes"),
    "weights that are all 0": (lambda: (X, Y, 0 * WEIGHTS), {}, "sample weights are all 0"),
    "class weights that are all 0": (lambda: (X, Y), {"class_weight": {0: 0, 1: 0, 2: 0}}, "class weights are all 0"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_data_that_cannot_be_trained_on_give_one_sentence(name, pretrained):
    make, options, message = OTHERS[name]
    with pytest.raises(l2sp.InputError, match=message) as found:
        finetune(pretrained, make(), **options)
    assert "\n" not in str(found.value)


@eagerly
def test_a_stream_that_fails_or_ends_stops_the_run_with_its_own_error_and_keeps_the_checkpoint(pretrained, tmp_path):
    class Broken(Batches):
        def __getitem__(self, index):
            if index == 2:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    with pytest.raises(OSError, match="the disk is gone"):
        finetune(pretrained, Broken(X, Y))
    once = iter(slices(X, Y).batch(SIZE, drop_remainder=True))  # the first batch is read to look at it
    data = tf.data.Dataset.from_generator(lambda: once, output_signature=once.element_spec)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(l2sp.InputError, match="The data ended after step 1 of 4"):
            finetune(pretrained, data, run_dir=tmp_path, data_name="once", checkpoint_every=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-0000000001"]


def test_what_is_inferred_or_has_no_effect_is_said(pretrained, capsys):
    lines = []
    made = given((X, Y), pretrained, batch_size=8, say=lines.append)
    assert made.classes == ("0", "1", "2") and lines == [
        "The largest label is 2, so the new head has 3 classes: give num_classes if there are more."
    ]
    assert given((X, ONE_HOT), pretrained, batch_size=8, say=lines.append).classes == made.classes and len(lines) == 1
    for labels, count, first in ((Y + 1, 1, 0), (2 * Y, 2, 1), (0 * Y, 1, 1)):
        with pytest.warns(UserWarning, match=f"{count} of the .* classes have no image, first class {first}:"):
            given((X, labels), pretrained, batch_size=8, say=str)
    recipe = l2sp.Recipe.authors().replace(crop=100, crops=10)
    with pytest.warns(UserWarning, match="recipe's crop, blur, resize_filter, mean, crops have no effect"):
        _, kept = taken_as_given(pretrained, (X, Y), recipe, None, num_classes=3)
    assert kept == recipe.replace(images=RECIPE.images, mean=None, crops=1) and kept.record(images=False) == {
        name: value for name, value in recipe.record().items() if name not in (*recipe.images.plain(), "mean", "crops")
    }
    with pytest.warns(UserWarning, match="batch_size have no effect"):
        taken_as_given(pretrained, slices(X, Y).batch(4), RECIPE, None, num_classes=3)
    scaled = keras.Sequential([keras.Input((6, 6, 3)), keras.layers.Rescaling(1 / 255), *pretrained.layers[1:]])
    with pytest.warns(UserWarning, match="expects them from 0 to 255, but the first images lie within -1 and 1"):
        taken_as_given(scaled, (np.clip(X, 0, 1), Y), l2sp.Recipe(), None, num_classes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        taken_as_given(scaled, (X * 50, Y), l2sp.Recipe(), None, num_classes=3)
        taken_as_given(pretrained, (np.clip(X, 0, 1), Y), l2sp.Recipe(), None, num_classes=3)


@eagerly
def test_a_saved_model_does_not_claim_to_know_its_images(pretrained, tmp_path):
    run = finetune(pretrained, (X, Y), RECIPE.replace(iterations=1, decay_at=None), run_dir=tmp_path)
    assert "pixels" not in l2sp.Anchors.load(tmp_path / "anchors.safetensors").metadata
    assert_same(keras.models.load_model(tmp_path / "model.keras"), run.model, rtol=0)
    tf.keras.utils.save_img(tmp_path / "a.png", np.zeros((6, 6, 3)))
    with pytest.raises(l2sp.InputError, match="does not say how its weights see pixels"):
        l2sp.predict_images(tmp_path, [tmp_path / "a.png"])


@pytest.mark.parametrize("form", [slow_unless(form == "batched", form) for form in ("arrays", "batched")])
def test_each_form_on_two_devices_is_that_of_one(form, pretrained, mirrored):
    data = (X[:16], Y[:16], WEIGHTS[:16])
    data = data if form == "arrays" else slices(*data).batch(SIZE, drop_remainder=True)
    options = {"validation_data": (X, Y)}
    recipe = RECIPE.replace(iterations=2, decay_at=None, label_smoothing=0.1)
    one, two = (finetune(pretrained, data, recipe, strategy=strategy, **options) for strategy in (None, mirrored))
    assert_same(two.model, one.model, atol=1e-5)
    for row, other in zip(two.history, one.history, strict=True):
        assert row == pytest.approx(other, abs=1e-4)


def test_streams_that_devices_cannot_share_are_refused(pretrained, mirrored):
    for form, message in (("batched", "may have any size, which 2 replicas"), ("PyDataset", "A PyDataset|of a PyDataset")):
        with pytest.raises(l2sp.InputError, match=message):
            finetune(pretrained, FORMS[form](X, Y), strategy=mirrored)
    with pytest.raises(l2sp.InputError, match="have 5 images, which 2 replicas"):
        finetune(pretrained, slices(X, Y).batch(5, drop_remainder=True), strategy=mirrored)
    stream = given(slices(X, Y), pretrained, batch_size=2, num_classes=3)
    with pytest.raises(l2sp.InputError, match="cannot be shared by several machines"):
        stream.train_batches(batch_size=2, seed=0, first_step=0, iterations=1, part=(0, 2))


def test_the_parts_of_several_machines_make_the_batch(pretrained):
    made = given((X, Y, WEIGHTS), pretrained, batch_size=SIZE)
    order = {"batch_size": SIZE, "seed": 4, "first_step": 1, "iterations": 4}
    whole, one, two = (list(made.train_batches(**order, part=part)) for part in ((0, 1), (0, 2), (1, 2)))
    for batch, *halves in zip(whole, one, two, strict=True):
        for part, first, second in zip(batch, *halves, strict=True):
            np.testing.assert_array_equal(part, np.concatenate([first, second]))


@eagerly
@pytest.mark.parametrize("form", [slow_unless(form == "batched", form) for form in ("arrays", "batched")])
def test_folds_of_each_form_are_those_of_arrays(form, pretrained, tmp_path):
    grid = {"alphas": (1.0,), "betas": (0.1,), "learning_rates": (0.05,), "folds": 2, "num_classes": CLASSES}
    recipe = RECIPE.replace(iterations=1, decay_at=None)
    asked = recipe if form == "arrays" else recipe.replace(batch_size=5)  # which is not the size of the stream's batches
    found = l2sp.cross_validate(pretrained, FORMS[form](X, Y), l2sp.L2SP, asked, **grid, class_weight={0: 2}, run_dir=tmp_path)
    assert found.best_recipe.batch_size == SIZE
    from sklearn.model_selection import StratifiedKFold

    for fold, (train, held) in enumerate(StratifiedKFold(2, shuffle=True, random_state=0).split(Y, Y)):
        options = {"seed": fold, "class_weight": {0: 2}, "num_classes": CLASSES, "verbose": 0}
        run = l2sp.finetune(pretrained, (X[train], Y[train]), l2sp.L2SP(1.0), recipe.replace(beta=0.1), **options)
        right = run.model.predict(X[held], verbose=0).argmax(axis=1) == Y[held]
        assert found.best.accuracies[fold] == pytest.approx(right.mean())


def test_what_cannot_be_split_is_refused_and_what_is_read_is_said(pretrained, monkeypatch):
    def split(data, **options):
        l2sp.cross_validate(pretrained, data, l2sp.L2SP, RECIPE, num_classes=CLASSES, **options)

    with pytest.raises(l2sp.InputError, match="The data never end"):
        split(FORMS["endless"](X, Y))
    with pytest.raises(l2sp.InputError, match="shares of several classes"):
        split((X, SHARES))
    with pytest.raises(l2sp.InputError, match="the smallest class of arrays has 6 training images"):
        split((X, Y), folds=7)
    lines = []
    stream = given(slices(X, Y).batch(3), pretrained, batch_size=8, num_classes=4)
    made = collected(stream, lines.append)
    np.testing.assert_array_equal(made.x, X)
    assert list(made.targets) == list(Y) and len(made.classes) == 4
    assert re.search(
        r"20 images in 0\.00\d+ MiB for batches of 3: .* augmentation, is fixed, and is in the held-out images", lines[0]
    )
    monkeypatch.setattr("l2sp_tf.data.given.physical_memory", lambda: 4000)
    with pytest.raises(l2sp.InputError, match="more than the .* GiB that folds in memory may take"):
        collected(stream, str)


@eagerly
def test_a_source_model_trains_on_arrays_too():
    model = network()
    start = [w.copy() for w in model.get_weights()]
    recipe = RECIPE.replace(iterations=2, decay_at=None, alpha={"l2": 0.1})
    run = l2sp.train_source(model, (X, Y), recipe, verbose=0)
    other = keras.models.clone_model(model)
    other.set_weights(start)
    l2sp.attach(other, l2sp.L2(0.1), None, 0.1)
    by_keras(other, batches_of("arrays", 2, X, Y), recipe, SPARSE)
    assert_same(run.model, other, rtol=1e-4, atol=2e-6)


def test_smoothing_is_part_of_the_record_only_where_it_is_set():
    assert "label_smoothing" not in l2sp.Recipe().record()
    assert l2sp.Recipe(label_smoothing=0.1).record()["label_smoothing"] == 0.1
    source = l2sp.Recipe.source(l2sp.Recipe(label_smoothing=0.1))
    assert source.record() == l2sp.Recipe.source(l2sp.Recipe()).record()


@pytest.mark.parametrize("has_shares", [False, True])
def test_the_loss_is_the_formula_of_its_docstring(has_shares):
    made = Objective(CLASSES, has_shares, False, 0.25, (0.5, 2.0, 1.0))
    z, y = RNG.normal(size=(6, CLASSES)), Y[:6]
    q = RNG.dirichlet(np.ones(CLASSES), 6) if has_shares else np.eye(CLASSES)[y]
    labels = q.astype("float32") if has_shares else y.astype("int32")
    [(_, targets, weights)] = made.feed(slices(z.astype("float32"), labels).batch(6))
    w = np.array([0.5, 2.0, 1.0])[q.argmax(axis=1)]
    smoothed = 0.75 * q + 0.25 / CLASSES
    total = sum(-w[i] * (smoothed[i] * (z[i] - np.log(np.exp(z[i]).sum()))).sum() for i in range(6)) / 6
    assert float(made.loss()(targets, tf.constant(z, tf.float32), sample_weight=weights)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("form", ["arrays", "batched", "PyDataset"])
def test_fractions_for_a_network_of_whole_numbers_are_refused_and_whole_numbers_are_not(form):
    image = keras.Input(X.shape[1:], dtype="uint8")
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(image))
    model = keras.Model(image, keras.layers.Dense(CLASSES)(x), name="of_bytes")
    whole = np.random.default_rng(0).integers(0, 256, X.shape)
    for good in (whole.astype("uint8"), whole.astype("float32")):
        given(FORMS[form](good, Y), model, batch_size=4, num_classes=CLASSES)
        assert l2sp.evaluate(model, FORMS[form](good, Y))["total"] == len(Y)
    for judge in (l2sp.evaluate, lambda model, data: finetune(model, data, num_classes=CLASSES)):
        with pytest.raises(l2sp.InputError, match=r"x has fractions, but the model 'of_bytes' takes whole numbers \(uint8\)"):
            judge(model, FORMS[form]((whole / 255).astype("float32"), Y))
