"""Every network of keras.applications on its whole way: head, penalty, step, Fisher, copy, save and load, by equal numbers."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from networks import ALL, MAKERS, trained

import l2sp_tf as l2sp
from l2sp_tf.models.copies import copy_of, detached_copy
from l2sp_tf.models.heads import head_of
from l2sp_tf.models.keras_files import load_model
from l2sp_tf.penalties.weights import keyed_weights, values_of

ALPHA, BETA, RATE, NEW = 0.3, 0.2, 0.01, 3
SLOW = [pytest.param(make, id=name, marks=pytest.mark.slow) for name, make in ALL.items()]
SMALL = pytest.param(MAKERS["MobileNet"], id="small MobileNet")


def images(model):
    return np.random.default_rng(1).uniform(0, 255, (4, *model.input_shape[1:])).astype("float32")


def assert_close(found, expected, tolerance, what, rounding=1e-12):
    """Asserts that two arrays agree, relative to the largest number of the expected one."""
    atol = tolerance * np.abs(expected).max() + rounding
    np.testing.assert_allclose(found, expected, rtol=0, atol=atol, err_msg=str(what))


def stepped_by_hand(model, x, y, anchors):
    """The weights after one step of SGD on the cross-entropy and Eq. (3), written out on a copy of a model without penalties."""
    copy = copy_of(model, seeds=True)
    variables = {key: weight.variable for key, weight in keyed_weights(copy).items()}
    trained_keys = [key for key, weight in variables.items() if weight.trainable]
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(y, copy(x, training=True)))
    gradients = tape.gradient(loss, [variables[key].value for key in trained_keys])
    after = values_of(copy)  # the moving statistics have moved
    for key, gradient in zip(trained_keys, gradients, strict=True):
        w = after[key].astype("float64")
        pull = ALPHA * (w - anchors[key]) if key in anchors else BETA * w
        after[key] = w - RATE * (np.float64(gradient) + pull)
    return after


@pytest.mark.parametrize("make", [SMALL, *SLOW])
def test_a_network_keeps_its_promises_on_the_whole_way(make, tmp_path):
    pretrained = trained(make())
    x, y = images(pretrained), np.int32([0, 2, 1, 2])
    before = pretrained.predict(x, verbose=0)

    # head: the features are those of the old head
    model = l2sp.with_new_head(pretrained, NEW, say=lambda line: None)
    old, new = (one.get_layer(head_of(one).layers[0]) for one in (pretrained, model))
    features = keras.Model(pretrained.inputs, old.input).predict(x, verbose=0).reshape(len(x), -1)
    kernel, bias = (weight.numpy() for weight in new.weights)
    expected = features.astype("float64") @ kernel.reshape(-1, NEW) + bias
    assert_close(model.predict(x, verbose=0), expected, 1e-5, "head")

    # penalty and step: all weights, those of batch norm's statistics too
    anchors = l2sp.Anchors.of(pretrained)
    for weight in keyed_weights(model).values():
        if weight.variable.trainable:  # away from the anchors, so that the penalty pulls
            weight.variable.assign(weight.variable * 1.01)
    by_hand = stepped_by_hand(model, x, y, anchors)
    start = values_of(model)
    coverage = l2sp.attach(model, l2sp.L2SP(ALPHA), anchors, BETA)
    penalty = sum(
        (ALPHA if key in anchors else BETA) / 2 * np.sum((value.astype("float64") - anchors.get(key, 0)) ** 2)
        for key, value in start.items()
        if keyed_weights(model)[key].variable.trainable
    )
    np.testing.assert_allclose(float(sum(model.losses)), penalty, rtol=1e-5)
    model.compile(keras.optimizers.SGD(RATE), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, batch_size=4, shuffle=False, verbose=0, callbacks=[l2sp.AnchorGuard(coverage)])
    for key, value in values_of(model).items():
        rounding = 2**-22 * np.abs(value).max() if value.size else 0  # of float32 weights
        assert_close(value - start[key], by_hand[key] - start[key], 2e-3, key, rounding)

    # copy, save and load: the same outputs, and the pre-trained model is untouched
    outputs = model.predict(x, verbose=0)
    model.save(tmp_path / "model.keras")
    for again in (detached_copy(model), load_model(tmp_path / "model.keras")):
        np.testing.assert_array_equal(again.predict(x, verbose=0), outputs)
    np.testing.assert_array_equal(pretrained.predict(x, verbose=0), before)


@pytest.mark.parametrize("make", SLOW)
def test_a_networks_fisher_diagonal_is_that_of_single_images_and_classes(make):
    pretrained = trained(make())
    x, total = images(pretrained), {}
    found = l2sp.fisher_diagonal(pretrained, x, "exact")
    keys = {weight.variable.path: key for key, weight in keyed_weights(pretrained).items()}
    variables = pretrained.trainable_variables

    @tf.function
    def gradients(image, k):
        with tf.GradientTape() as tape:
            f = pretrained(image, training=False)[0, k]
            log_f = tf.math.log(f)
        return f, tape.gradient(log_f, [variable.value for variable in variables])

    for image in x:
        for k in range(pretrained.output_shape[-1]):
            f, squares = gradients(image[None], tf.constant(k))
            for variable, gradient in zip(variables, squares, strict=True):
                key = keys[variable.path]
                total[key] = total.get(key, 0) + float(f) * np.float64(gradient) ** 2 / len(x)
    largest = max(value.max() for value in total.values())
    for key, value in total.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=max(1e-2 * value.max(), 1e-7 * largest), err_msg=key)
