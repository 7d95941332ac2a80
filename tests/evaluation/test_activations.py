"""Checks R² of activations against NumPy's correlations of stored activations."""

import keras
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.evaluation.activations import BOX, activation_r2, box
from l2sp_tf.models import zoo

LAYERS = ["conv1_relu", "conv2_block1_out", "conv3_block1_out"]


@pytest.fixture
def pretrained():
    model = zoo.small_resnet((8, 8, 3), 4, widths=(4, 6), depths=(1, 1))
    rng = np.random.default_rng(1)
    model.set_weights(
        [
            np.abs(w + rng.normal(0, 0.2, w.shape)) if "var" in v.path else w + rng.normal(0, 0.2, w.shape)
            for v, w in zip(model.weights, model.get_weights(), strict=True)
        ]
    )
    return model


def moved(model, scale, seed=2):
    copy = l2sp.with_new_head(model, 3, seed=0)
    rng = np.random.default_rng(seed)
    for v in copy.trainable_variables:
        v.assign(v + rng.normal(0, scale, v.shape))
    return copy


def batches(n=20, size=7, offset=0.0):
    x = np.random.default_rng(3).normal(offset, 1, (n, 8, 8, 3)).astype("float32")
    return x, [x[i : i + size] for i in range(0, n, size)]


def by_correlation(finetuned, pretrained, x, name):
    a, b = (
        np.asarray(keras.Model(m.input, m.get_layer(name).output)(x, training=False), np.float64) for m in (pretrained, finetuned)
    )
    a, b = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    with np.errstate(all="ignore"):
        return np.array([np.corrcoef(a[:, c], b[:, c])[0, 1] ** 2 for c in range(a.shape[1])])


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_streamed_sums_are_the_correlations_of_stored_activations(pretrained, offset):
    finetuned = moved(pretrained, 0.1)
    x, parts = batches(offset=offset)
    found = activation_r2(finetuned, pretrained, parts)
    assert list(found) == LAYERS
    for name, values in found.items():
        np.testing.assert_allclose(values, by_correlation(finetuned, pretrained, x, name), rtol=1e-6, atol=1e-9)


def test_r2_is_1_if_nothing_moved_or_only_linearly(pretrained):
    finetuned = moved(pretrained, 0.0)
    bn = finetuned.get_layer("conv1_bn")
    before = activation_r2(finetuned, pretrained, batches()[1], layers=["conv1_bn"])["conv1_bn"]
    np.testing.assert_allclose(before, 1)
    bn.gamma.assign(bn.gamma * -3)
    bn.beta.assign(bn.beta + 7)
    after = activation_r2(finetuned, pretrained, batches()[1], layers=["conv1_bn"])["conv1_bn"]
    np.testing.assert_allclose(after, 1, rtol=1e-9)


def test_r2_falls_as_a_model_moves_further(pretrained):
    medians = [
        np.nanmedian(activation_r2(moved(pretrained, scale), pretrained, batches(60)[1])["conv3_block1_out"])
        for scale in (0.01, 0.1, 1.0)
    ]
    assert medians[0] > medians[1] > medians[2]


def test_a_dead_feature_is_undefined_and_batches_make_no_difference(pretrained):
    finetuned = moved(pretrained, 0.1)
    finetuned.get_layer("conv1_bn").gamma.assign([0, 1, 1, 1])
    finetuned.get_layer("conv1_bn").beta.assign([3.3, 0, 0, 0])
    x, parts = batches()
    one, many = (activation_r2(finetuned, pretrained, p, layers=["conv1_bn"])["conv1_bn"] for p in ([(x, None)], parts))
    assert np.isnan(one[0]) and not np.isnan(one[1:]).any()
    np.testing.assert_allclose(one, many, rtol=1e-9)


def test_a_missing_layer_and_missing_images_are_refused(pretrained):
    with pytest.raises(l2sp.InputError, match="no layer 'conv9'"):
        activation_r2(moved(pretrained, 0.1), pretrained, batches()[1], layers=["conv9"])
    with pytest.raises(l2sp.InputError, match="no images"):
        activation_r2(moved(pretrained, 0.1), pretrained, [])


def test_a_box_has_quartiles_and_whiskers_to_the_outermost_values_within_1_5_boxes():
    def drawn(values):
        return [box(values)[name] for name in BOX]

    # the box spans 3 to 7, so its whiskers reach at most 13
    assert drawn([*range(1, 9), 100]) == [1, 3, 5, 7, 8] and drawn([*range(1, 9), 13]) == [1, 3, 5, 7, 13]
    assert drawn([0, 0, 0, 100]) == [0, 0, 0, 25, 25]  # no whisker ends inside the box
    found = box([0.5, np.nan, 0.7, np.nan, np.nan])
    assert (found["med"], found["features"], found["undefined"]) == (pytest.approx(0.6), 5, 3)
    for values in ([np.nan], []):
        assert box(values) == {**dict.fromkeys(BOX), "features": len(values), "undefined": len(values)}
