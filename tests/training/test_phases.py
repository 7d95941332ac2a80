"""Batch norm by the source's statistics, and a first phase that trains the head alone."""

import dataclasses

import keras
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf import data
from l2sp_tf.data.pipeline import training_batches
from l2sp_tf.models.zoo import small_resnet

RECIPE = l2sp.Recipe.digits().replace(iterations=3, batch_size=8)


@pytest.fixture(scope="module")
def start():
    """A network with moving statistics of its own, and a task."""
    keras.utils.set_random_seed(0)
    model = small_resnet((8, 8, 3), 10, widths=(4,), depths=(1,))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    dataset = data.load_dataset("digits/target", per_class=10)
    return model, data.prepare(dataset, RECIPE.images)


def finetune(start, recipe, penalty=None, **more):
    return l2sp.finetune(*start, penalty or l2sp.L2SP(0.3), recipe, verbose=0, **more)


def weights(model):
    return {variable.path: variable.numpy() for variable in model.variables if "seed" not in variable.path}


def by_hand(model, task, recipe, alpha, beta, trained):
    """SGD with momentum on batches of the pipeline, with the model in the mode of inference and the gradient in one tape."""
    import tensorflow as tf

    w0, speed = {v.path: tf.constant(v) for v in model.trainable_variables}, {}
    stream = training_batches(
        task.train, task.preprocessing, task.mean, batch_size=recipe.batch_size, seed=0, iterations=recipe.iterations
    )
    for step, (x, y) in enumerate(stream.take(recipe.iterations)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, model(x, training=False)))
            for v in trained:
                pull = tf.nn.l2_loss(v) * beta if "new_head" in v.path else tf.nn.l2_loss(v - w0[v.path]) * alpha
                loss += pull
        rate = recipe.learning_rate / (10 if step >= recipe.decay_step else 1)
        for v, g in zip(trained, tape.gradient(loss, trained), strict=True):
            speed[v.path] = recipe.momentum * speed.get(v.path, 0.0) - rate * g
            v.assign_add(speed[v.path])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kept_first", [False, True])
def test_kept_statistics_are_those_of_inference_in_either_order(start, kept_first, fused):
    model = l2sp.with_new_head(start[0], 2, seed=0, say=str)
    calls = [l2sp.keep_statistics] + [l2sp.fuse_batch_norm] * fused
    for call in calls if kept_first else reversed(calls):
        call(model)
    x, before = np.random.default_rng(1).uniform(0, 255, (4, 8, 8, 3)), weights(model)
    np.testing.assert_array_equal(model(x, training=True), model(x, training=False))
    model.compile(keras.optimizers.SGD(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, np.array([0, 1, 0, 1]), verbose=0)
    for path, value in weights(model).items():
        assert np.array_equal(value, before[path]) == ("moving" in path), path


def test_subclasses_keep_their_statistics_too():
    class Shifted(keras.layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return super().call(inputs, training=training, mask=mask) + 1

    layer = Shifted()
    model = keras.Sequential([keras.Input((3,)), layer])
    x = np.random.default_rng(0).normal(size=(5, 3))
    assert l2sp.keep_statistics(model) == 1
    np.testing.assert_array_equal(model(x, training=True), model(x, training=False))
    with pytest.raises(l2sp.InputError, match="give a Keras model"):
        l2sp.keep_statistics(layer)


def test_a_run_with_the_sources_statistics_is_that_of_inference_mode(start):
    recipe = RECIPE.replace(batch_norm="source")
    run = finetune(start, recipe)
    model = l2sp.with_new_head(start[0], 2, seed=0, say=str)
    by_hand(model, start[1], recipe, 0.3, 0.01, model.trainable_variables)
    for path, value in weights(model).items():
        np.testing.assert_allclose(weights(run.model)[path], value, rtol=1e-4, atol=2e-6, err_msg=path)
    of_batches = weights(finetune(start, RECIPE).model)
    assert not np.array_equal(of_batches["conv1_bn/moving_mean"], weights(run.model)["conv1_bn/moving_mean"])


def test_the_first_phase_trains_the_head_alone_and_the_second_all(start):
    recipe = RECIPE.replace(head_steps=4, head_learning_rate=0.02, batch_norm="source")
    run = finetune(start, recipe)
    model = l2sp.with_new_head(start[0], 2, seed=0, say=str)
    before = weights(model)
    head = [v for v in model.trainable_variables if "new_head" in v.path]
    by_hand(model, start[1], recipe.for_head(), 0.3, 0.01, head)
    changed = {path for path, value in weights(model).items() if not np.array_equal(value, before[path])}
    assert changed == {v.path for v in head}
    by_hand_all = keras.models.clone_model(model)
    by_hand_all.set_weights(model.get_weights())
    w0 = weights(start[0])
    by_hand(by_hand_all, start[1], recipe.replace(head_steps=0), 0.3, 0.01, by_hand_all.trainable_variables)
    for path, value in weights(by_hand_all).items():
        np.testing.assert_allclose(weights(run.model)[path], value, rtol=1e-4, atol=5e-6, err_msg=path)
    assert any(not np.array_equal(value, w0.get(path)) for path, value in weights(run.model).items() if "conv" in path)


@pytest.mark.parametrize("penalty", [l2sp.L2(0.01), l2sp.L1SP(0.01), l2sp.GroupLassoSP(0.01)], ids=str)
@pytest.mark.parametrize("step", ["gradient", "proximal"])
def test_every_penalty_and_step_leaves_the_frozen_weights_of_the_first_phase(start, penalty, step, monkeypatch):
    from l2sp_tf.training import trainer

    seen, fit = [], trainer._fit
    monkeypatch.setattr(trainer, "_fit", lambda training, how: (seen.append(weights(training.model)), fit(training, how))[1])
    finetune(start, RECIPE.replace(head_steps=2, iterations=1, penalty_step=step), penalty)
    first, second = seen
    assert {path for path in first if not np.array_equal(first[path], second[path])} == {"new_head/kernel", "new_head/bias"}


class Stop(Exception):
    pass


@pytest.mark.parametrize("phase", ["head", "all"])
def test_a_run_resumes_in_either_phase_and_ends_alike(start, phase, tmp_path, monkeypatch):
    from l2sp_tf.training import trainer

    recipe = RECIPE.replace(head_steps=4, iterations=4, learning_rate=1e-3, head_learning_rate=1e-3, batch_norm="source")
    whole = finetune(start, recipe, run_dir=tmp_path / "whole")

    class Cut(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            Cut.steps += 1
            if Cut.steps == {"head": 2, "all": 6}[phase]:
                raise Stop

    fit = trainer.fit
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "fit", lambda *a, callbacks, **kw: fit(*a, callbacks=[*callbacks, Cut()], **kw))
        with pytest.raises(Stop):
            finetune(start, recipe, run_dir=tmp_path / "cut", checkpoint_every=1)
    run = finetune(start, recipe, run_dir=tmp_path / "cut", checkpoint_every=1)
    assert run.resumed_at == (0 if phase == "head" else 2) and run.history == whole.history
    for path, value in weights(whole.model).items():
        np.testing.assert_array_equal(weights(run.model)[path], value)


def test_both_are_part_of_the_record_and_only_where_they_matter():
    plain = l2sp.Recipe().record()
    assert not {"batch_norm", "head_steps", "head_learning_rate"} & plain.keys()
    found = l2sp.Recipe(batch_norm="source", head_steps=5).record()
    assert (found["batch_norm"], found["head_steps"], found["head_learning_rate"]) == ("source", 5, 0.03)
    assert l2sp.Recipe(head_learning_rate=1).record() == plain
    source = l2sp.Recipe.source(l2sp.Recipe(batch_norm="source", head_steps=5))
    assert source.record() == l2sp.Recipe.source(l2sp.Recipe()).record()
    with pytest.raises(l2sp.InputError, match="batch_norm is source, but moving_statistics is fresh"):
        dataclasses.replace(l2sp.Recipe(), batch_norm="source", moving_statistics="fresh")


@pytest.mark.parametrize("mode", ["batch", "source"])
def test_both_phases_on_two_devices_are_those_of_one(start, mode, mirrored):
    """Statistics of the batch differ between devices, so that with them only the head's phase, which has none, must agree."""
    recipe = RECIPE.replace(head_steps=3, iterations=2, learning_rate=1e-3, head_learning_rate=1e-3, batch_norm=mode)
    recipe = recipe if mode == "source" else recipe.replace(iterations=1, learning_rate=1e-12)
    one, two = (weights(finetune(start, recipe, strategy=strategy).model) for strategy in (None, mirrored))
    compared = [path for path in one if mode == "source" or "moving" not in path]
    assert len(compared) > 5
    for path in compared:
        np.testing.assert_allclose(one[path], two[path], rtol=1e-4, atol=1e-6, err_msg=path)
