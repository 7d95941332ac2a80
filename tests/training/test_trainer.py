"""One run: its outputs, that it repeats, and that it follows the penalty."""

import csv
import dataclasses
import pathlib
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference import images as reference
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import l2sp_tf as l2sp
from l2sp_tf.data import Dataset, Images, Split, Task, prepare, test_batches
from l2sp_tf.evaluation.accuracy import transplant
from l2sp_tf.models import keras_files, zoo
from l2sp_tf.models.pixels import PIXELS
from l2sp_tf.models.units import freeze_first
from l2sp_tf.penalties.weights import keyed_weights

RECIPE = l2sp.Recipe(iterations=12, batch_size=8, log_every=5, params="kernels").replace(
    resize=8, crop=6, blur="none", mirror=False
)


def dataset(classes=3, count=20, seed=0):
    rng = np.random.default_rng(seed)

    def split(n):
        labels = np.arange(n, dtype=np.int32) % classes
        pixels = (rng.uniform(0, 60, size=(n, 8, 8, 3)) + 60 * labels[:, None, None, None]).astype("uint8")
        return Split(tuple(map(str, range(n))), labels, pixels=pixels)

    return Dataset("made", tuple("abcdef"[:classes]), split(count), split(17))


def task(classes=3, count=20, seed=0):
    return prepare(dataset(classes, count, seed), RECIPE.images)


def network(widths=(4,)):
    return zoo.small_resnet((6, 6, 3), 4, widths=widths, depths=(1,) * len(widths))


@pytest.fixture(scope="module")
def pretrained():
    """One network for all tests, which leave it as it is."""
    keras.utils.set_random_seed(0)
    return network()


@dataclasses.dataclass
class Finished:
    """A run under `L2SP(0.1)`: its folder, the graphs of its steps, the logs that Keras showed, the rates of its steps."""

    run: l2sp.Run
    folder: pathlib.Path
    graphs: list
    shown: dict
    rates: list


def finished_run(pretrained, recipe, folder):
    graphs, shown, rates, step = [], {}, [], keras.Model.train_step
    seen = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: shown.update(logs),
        on_train_batch_begin=lambda batch, logs: rates.append(float(seen.model.optimizer.learning_rate)),
    )
    with pytest.MonkeyPatch.context() as patch:
        noted = lambda self, data: graphs.append(tf.compat.v1.get_default_graph()) or step(self, data)  # noqa: E731
        patch.setattr(keras.Model, "train_step", noted)
        run = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), recipe, run_dir=folder, callbacks=[seen], verbose=0)
    return Finished(run, folder, graphs, shown, rates)


@pytest.fixture(scope="module")
def finished(pretrained, tmp_path_factory):
    """A finished run by `RECIPE`."""
    return finished_run(pretrained, RECIPE, tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def logged(pretrained, tmp_path_factory):
    """The same run with a row of the log for each step."""
    return finished_run(pretrained, RECIPE.replace(log_every=1, decay_at=8), tmp_path_factory.mktemp("logged"))


@pytest.fixture
def _eagerly():
    """Runs training steps without tracing them, for tests of what a run does around its steps."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


def test_a_run_leaves_log_tensorboard_anchors_and_model(pretrained, finished):
    anchors, run, tmp_path = l2sp.Anchors.of(pretrained), finished.run, finished.folder
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [int(row["step"]) for row in rows] == [5, 10, 12]
    assert set(rows[0]) == {"step", "cross_entropy", "accuracy", "penalty", "learning_rate", "distance"}
    assert float(rows[0]["learning_rate"]) == pytest.approx(0.01) and float(rows[2]["learning_rate"]) == pytest.approx(0.001)
    assert l2sp.Anchors.load(tmp_path / "anchors.safetensors").digest == anchors.digest == l2sp.Anchors.of(pretrained).digest
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["tensors"]
    for tag in ("cross_entropy", "penalty", "accuracy", "learning_rate", "distance", "distance_by_layer/conv1_conv"):
        assert tag in tags
    logged = [float(tf.make_ndarray(e.tensor_proto)) for e in events.Tensors("distance")]
    np.testing.assert_allclose(logged, [float(row["distance"]) for row in rows], rtol=1e-5)
    saved = keras.models.load_model(tmp_path / "model.keras")
    assert not saved.losses
    for one, two in zip(saved.get_weights(), run.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.usefixtures("_eagerly")
@pytest.mark.filterwarnings("ignore:Even though the `tf.config.experimental_run_functions_eagerly`:UserWarning")
@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.parametrize("before", ["units", "model", "weights"])
def test_layers_frozen_in_the_pretrained_model_or_its_file_do_not_count(before, frozen, tmp_path):
    pretrained = network()
    if before == "units":
        freeze_first(pretrained, 2)
    elif before == "model":
        pretrained.trainable = False
    else:
        for weight in pretrained.weights:
            weight.trainable = False
    pretrained.save(tmp_path / "m.keras")
    for start in (pretrained, keras_files.load_model(tmp_path / "m.keras")):
        recipe = RECIPE.replace(iterations=1, log_every=1, params="all")
        run = l2sp.finetune(start, task(), l2sp.L2SP(0.1), recipe, frozen=frozen, verbose=0)
        statistics = {"moving_mean", "moving_variance"}
        for key, weight in keyed_weights(run.model).items():
            free = not (frozen and key.startswith(("conv1_", "conv2_block1_")))
            assert weight.variable.trainable == (free and weight.variable.name not in statistics), key
        weights = [w for w in keyed_weights(run.model).values() if w.variable.name not in statistics]
        assert len(run.coverage.weights) == len(weights)
        assert sum(row.reason == "frozen" for row in run.coverage.weights) == (9 if frozen else 0)


def test_a_model_without_known_units_is_unfrozen_too(small_network):
    pretrained = small_network()
    for layer in pretrained.layers:
        layer.trainable = False
    run = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE.replace(iterations=1, log_every=1), verbose=0)
    assert all(layer.trainable for layer in run.model._flatten_layers())
    with pytest.raises(l2sp.InputError, match="'small' has no layers named as the units"):
        l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, frozen=1, verbose=0)


def test_a_proximal_run_logs_what_stays_at_the_start_and_leaves_a_model_that_needs_no_anchors(pretrained, tmp_path):
    run = l2sp.finetune(pretrained, task(), l2sp.L1SP(0.1), RECIPE.replace(penalty_step="proximal"), run_dir=tmp_path, verbose=0)
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    kernels = [(k, w.variable.numpy()) for k, w in keyed_weights(run.model).items() if k in run.anchors and k.endswith("kernel")]
    equal = [np.ravel(kernel == run.anchors[key]) for key, kernel in kernels]
    assert float(rows[-1]["frozen"]) == run.history[-1]["frozen"] == pytest.approx(np.mean(np.concatenate(equal)))
    assert 0 < run.history[-1]["frozen"] < 1 and float(rows[-1]["penalty"]) > 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"frozen", "frozen_by_layer/conv1_conv"} <= set(events.Tags()["tensors"])
    plain = l2sp.finetune(pretrained, task(), l2sp.L1SP(0.1), RECIPE, verbose=0)
    assert "frozen" not in plain.history[-1] and l2sp.frozen_share(plain.model)["all"] < run.history[-1]["frozen"]
    saved = keras.models.load_model(tmp_path / "model.keras")
    saved.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    saved.fit(np.zeros((2, 6, 6, 3)), np.zeros(2), verbose=0)


def test_adam_with_a_decoupled_pull_ends_nearer_to_the_start_than_without(pretrained):
    recipe = RECIPE.replace(solver="adam", penalty_step="decoupled", iterations=40)
    weak, strong = (l2sp.finetune(pretrained, task(), l2sp.L2SP(a), recipe, verbose=0) for a in (0.0, 30.0))
    assert type(strong.model.optimizer.inner_optimizer) is keras.optimizers.Adam
    assert strong.history[-1]["distance"] < weak.history[-1]["distance"]


def test_penalty_and_distance_of_the_log_are_those_of_the_weights(pretrained):
    run = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.3), RECIPE.replace(beta=0.0, params="all"), verbose=0)
    squares = sum(
        float(np.sum((w.variable.numpy() - run.anchors[key]) ** 2))
        for key, w in keyed_weights(run.model).items()
        if w.variable.trainable and key in run.anchors
    )
    np.testing.assert_allclose(run.history[-1]["distance"], squares**0.5, rtol=1e-5)
    np.testing.assert_allclose(run.history[-1]["penalty"], 0.3 / 2 * squares, rtol=1e-4)
    assert squares > 0


def test_each_logged_rate_is_the_one_that_its_step_took(logged):
    """Compares each logged rate with the optimizer's rate just before the step."""
    assert [row["learning_rate"] for row in logged.run.history] == logged.rates
    assert logged.rates == pytest.approx([0.01] * 8 + [0.001] * 4)


def test_losses_on_layer_outputs_are_in_the_loss_and_not_in_the_penalty():
    layers = [keras.Input((6, 6, 3)), keras.layers.Rescaling(1 / 255), keras.layers.Conv2D(4, 1)]
    layers += [keras.layers.Dense(4, activity_regularizer="l2"), keras.layers.Conv2D(4, 1, activity_regularizer="l2")]
    layers += [keras.layers.ActivityRegularization(l2=0.1)]
    model = keras.Sequential([*layers, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)])
    model(np.ones((1, 6, 6, 3)))
    assert len(model.losses) == 3 and all(float(loss) > 0 for loss in model.losses)
    run = l2sp.finetune(model, task(), l2sp.L2SP(0.3), RECIPE.replace(beta=0.01, mean="training"), verbose=0)
    w = {key: weight.variable.numpy() for key, weight in keyed_weights(run.model).items() if key.endswith("kernel")}
    shared = sum(np.sum((value - run.anchors[key]) ** 2) for key, value in w.items() if key in run.anchors)
    head = sum(np.sum(value**2) for key, value in w.items() if key not in run.anchors)
    np.testing.assert_allclose(run.history[-1]["penalty"], 0.3 / 2 * shared + 0.01 / 2 * head, rtol=1e-4)


def test_cross_entropy_is_logged_without_the_penalty(pretrained):
    rates = RECIPE.replace(learning_rate=1e-12, iterations=1)
    strong = l2sp.finetune(pretrained, task(), l2sp.L2(100.0), rates, verbose=0).history[-1]
    weak = l2sp.finetune(pretrained, task(), l2sp.L2(0.0), rates, verbose=0).history[-1]
    assert strong["cross_entropy"] == pytest.approx(weak["cross_entropy"], rel=1e-6)
    assert strong["penalty"] > 100 * weak["penalty"]


def test_a_stronger_pull_stays_closer(pretrained, finished):
    none, strong = (l2sp.finetune(pretrained, task(), l2sp.L2SP(alpha), RECIPE, verbose=0) for alpha in (0.0, 3.0))
    distances = [run.history[-1]["distance"] for run in (none, finished.run, strong)]
    assert distances[0] > distances[1] > distances[2] > 0


def test_a_seed_repeats_a_run_and_another_does_not(pretrained, finished):
    others = [l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, seed=s, verbose=0) for s in (0, 4)]
    weights = [run.model.get_weights() for run in (finished.run, *others)]
    for one, two in zip(weights[0], weights[1], strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    assert not np.allclose(weights[0][0], weights[2][0])


def test_a_loss_that_is_not_finite_stops_the_run(pretrained):
    with pytest.raises(FloatingPointError, match="loss is (nan|inf) after step"):
        l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE.replace(learning_rate=1e20), verbose=0)


def test_the_penalty_pulls_to_the_given_anchors(pretrained):
    zero = l2sp.Anchors({key: np.zeros_like(a) for key, a in l2sp.Anchors.of(pretrained).items()})
    run = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, anchors=zero, verbose=0)
    same = l2sp.finetune(pretrained, task(), l2sp.L2(0.1), RECIPE, verbose=0)
    for one, two in zip(run.model.get_weights(), same.model.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-5)


def test_evaluation_counts_every_image_once(pretrained):
    t = task(classes=4)
    result = l2sp.evaluate(pretrained, t, batch_size=5)
    central = t.test.pixels[:, 1:7, 1:7].astype("float32") - t.mean
    expected = int(np.sum(np.argmax(pretrained.predict(central, verbose=0), axis=-1) == t.test.labels))
    assert result == {"accuracy": expected / 17, "correct": expected, "total": 17}
    with pytest.raises(l2sp.InputError, match="no test images"):
        l2sp.evaluate(pretrained, [])


@pytest.fixture(scope="module")
def votes_of_ten_crops():
    """A network of large logits, a task, and the votes for its test images by mean probability."""
    keras.utils.set_random_seed(0)
    # large logits: averaging them differs from averaging probabilities, and a second softmax would change the result
    pretrained, t = network((4, 8)), task(classes=4)
    pretrained.layers[-1].set_weights([40 * weight for weight in pretrained.layers[-1].get_weights()])
    crops = np.stack([reference.ten_crops(image.astype("float32") - t.mean, 6) for image in t.test.pixels])
    means, means_of_logits = [], []
    for z in pretrained.predict(crops.reshape(-1, 6, 6, 3), verbose=0).astype(np.float64).reshape(17, 10, 4):
        p = np.exp(z - z.max(axis=1, keepdims=True))
        means.append((p / p.sum(axis=1, keepdims=True)).mean(axis=0))
        means_of_logits.append(z.mean(axis=0))
    votes = np.argmax(means, axis=1)
    assert not np.array_equal(votes, np.argmax(means_of_logits, axis=1))  # else the test could not fail
    return pretrained, t, votes


@pytest.mark.parametrize("output", ["logits", "softmax", "half", "given"])
def test_ten_crops_vote_by_their_mean_probability(votes_of_ten_crops, output):
    pretrained, t, votes = votes_of_ten_crops
    probabilities = keras.layers.Softmax(dtype="float16" if output == "half" else "float32")(pretrained.output)
    model = keras.Model(pretrained.input, probabilities) if output in ("softmax", "half") else pretrained
    expected = int(np.sum(votes == t.test.labels))
    given = {"from_logits": True} if output == "given" else {}
    assert l2sp.evaluate(model, t, batch_size=30, crops=10, **given)["correct"] == expected
    right = Task(t.name, t.classes, t.digest, t.train, Images(t.test.pixels, np.int32(votes)), t.mean, t.preprocessing)
    assert l2sp.evaluate(model, right, crops=10, **given)["accuracy"] == 1.0  # checks every vote, not only their count


def test_crops_are_one_or_ten(pretrained):
    t = task(classes=4)
    result = l2sp.retention(l2sp.with_new_head(pretrained, 2), pretrained, t, crops=10)
    assert result["before"] == result["source_statistics"] == l2sp.evaluate(pretrained, t, crops=10)
    with pytest.raises(l2sp.InputError, match="crops is 5"):
        l2sp.evaluate(pretrained, t, crops=5)


def test_retention_of_an_untouched_copy_loses_nothing(pretrained):
    t = task(classes=4)
    copy = l2sp.with_new_head(pretrained, 2)
    result = l2sp.retention(copy, pretrained, t)
    assert result["before"] == result["target_statistics"] == result["source_statistics"] == l2sp.evaluate(pretrained, t)
    assert result["drop_target_statistics"] == 0


def test_transplant_takes_the_backbone_and_keeps_the_head(pretrained):
    tuned = l2sp.with_new_head(pretrained, 2)
    for weight in tuned.weights:
        weight.assign(weight + 1)
    start = l2sp.Anchors.of(pretrained)
    for statistics in (True, False):
        model = l2sp.Anchors.of(transplant(tuned, pretrained, statistics=statistics))
        for key in start:
            moves = not key.startswith("predictions") and (statistics or "moving" not in key)
            np.testing.assert_allclose(model[key], start[key] + (1 if moves else 0), rtol=1e-6)
    with pytest.raises(l2sp.InputError, match="share no weights"):
        transplant(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="other")]), pretrained)


def test_source_training_penalises_everything_with_l2():
    run = l2sp.train_source(network(), task(classes=4), RECIPE, verbose=0)
    assert run.anchors is None
    assert {row.penalty["config"]["alpha"] for row in run.coverage.group("S-bar")} == {1e-4}
    assert run.coverage.counts["S"] == (0, 0)


def test_data_of_another_kind_is_refused(pretrained):
    with pytest.raises(l2sp.InputError, match="data is a list"):
        l2sp.finetune(pretrained, [1, 2], l2sp.L2SP(0.1))


def test_a_folder_with_other_anchors_stops_the_run(finished, tmp_path):
    first = finished.run
    shutil.copytree(finished.folder, tmp_path, dirs_exist_ok=True)
    with pytest.raises(l2sp.InputError, match="holds other anchors"):
        l2sp.finetune(first.model, task(), l2sp.L2SP(0.1), RECIPE, run_dir=tmp_path, verbose=0)
    again = l2sp.Anchors.load(tmp_path / "anchors.safetensors")
    again.save(tmp_path / "b/anchors.safetensors")
    l2sp.finetune(first.model, task(), l2sp.L2SP(0.1), RECIPE, anchors=again, run_dir=tmp_path / "b", verbose=0)


def test_the_last_metrics_that_keras_shows_are_those_of_the_last_row(finished):
    shown, last = finished.shown, finished.run.history[-1]
    assert shown["cross_entropy"] == pytest.approx(last["cross_entropy"]) and shown["loss"] > 0


def test_a_data_set_is_prepared_as_the_weights_see_pixels(pretrained, tmp_path):
    recipe = RECIPE.replace(mean="weights")
    l2sp.finetune(pretrained, dataset(), l2sp.L2SP(0.1), recipe, pixels="torch", run_dir=tmp_path / "a", verbose=0)
    assert keras_files.stored_pixels(tmp_path / "a/model.keras") == zoo.pixels_of(tmp_path / "a/model.keras") == PIXELS["torch"]
    prepared = prepare(dataset(), recipe.images.with_pixels(PIXELS["torch"]), mean=PIXELS["torch"].mean)
    l2sp.finetune(pretrained, prepared, l2sp.L2SP(0.1), recipe, run_dir=tmp_path / "b", verbose=0)
    one, two = (keras.models.load_model(tmp_path / name / "model.keras").get_weights() for name in "ab")
    for a, b in zip(one, two, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    with pytest.raises(l2sp.InputError, match="pixels was not given"):
        l2sp.finetune(pretrained, dataset(), l2sp.L2SP(0.1), RECIPE)
    with pytest.raises(l2sp.InputError, match="pixels is bgr.* but the task was prepared for rgb"):
        l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, pixels="bgr")


def test_frozen_units_stay_where_they_were(pretrained):
    run = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, frozen=1, verbose=0)
    before = keyed_weights(pretrained)
    for key, weight in keyed_weights(run.model).items():
        moved = key not in before or not np.array_equal(weight.variable, before[key].variable)
        assert moved != key.startswith("conv1"), key


def test_evaluate_returns_which_images_are_right(finished):
    run, made = finished.run, task()
    result = l2sp.evaluate(run.model, made, answers=True)
    x = np.concatenate([x for x, _ in test_batches(made.test, made.preprocessing, made.mean, batch_size=5)])
    np.testing.assert_array_equal(result["right"], np.argmax(run.model.predict(x, verbose=0), 1) == made.test.labels)
    assert result["correct"] == result["right"].sum() and "right" not in l2sp.evaluate(run.model, made)


def test_xla_changes_a_run_by_rounding_only(pretrained):
    plain, compiled = (
        l2sp.finetune(pretrained, task(), l2sp.GroupLassoSP(0.01), RECIPE, verbose=0, jit_compile=jit) for jit in (False, True)
    )
    assert (plain.model.jit_compile, compiled.model.jit_compile) == (False, True)
    for one, two in zip(plain.model.get_weights(), compiled.model.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-4)


def test_the_step_of_a_run_is_traced_once_and_fused(finished):
    (graph,) = finished.graphs
    assert "FusedBatchNormGradV3" in {operation.type for operation in graph.get_operations()}


class StopAt(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        self.model.stop_training |= batch + 1 == self.step


@pytest.mark.parametrize("step", [1, 5, 9])
def test_a_run_that_a_callback_stops_has_its_log_its_checkpoint_and_its_model(step, pretrained, logged, tmp_path):
    options = {"run_dir": tmp_path, "verbose": 0}
    run = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, callbacks=[StopAt(step)], **options)
    assert [row["step"] for row in run.history] == [s for s in (5, 10) if s < step] + [step]
    assert run.stopped_at == step
    whole = logged.run.history[step - 1]
    assert whole["step"] == step and run.history[-1]["distance"] == pytest.approx(whole["distance"], rel=1e-4)
    assert run.history[-1]["learning_rate"] == whole["learning_rate"]
    rows = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert int(rows[-1]["step"]) == step
    again = l2sp.finetune(pretrained, task(), l2sp.L2SP(0.1), RECIPE, **options)  # the run is over, with or without the callback
    assert again.history == run.history and again.stopped_at == run.stopped_at
    for one, two in zip(again.model.get_weights(), run.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)
    saved = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(saved.get_weights()[0], run.model.get_weights()[0])
