"""Backbones and new heads."""

import keras
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.models import zoo
from l2sp_tf.models.pixels import PIXELS


def tiny(classes=3, **kwargs):
    return zoo.small_resnet((8, 8, 3), classes, **{"widths": (4, 8), "depths": (1, 2), **kwargs})


@pytest.mark.parametrize(("block", "kernels"), [("basic", 1 + 2 + 3 + 2 + 1), ("bottleneck", 1 + 4 + 4 + 3 + 1)])
def test_small_resnet_has_the_layers_it_should(block, kernels):
    model = tiny(block=block)
    assert sum(w.name == "kernel" for w in model.weights) == kernels
    assert model(np.zeros((2, 8, 8, 3))).shape == (2, 3)
    assert model.layers[-1].activation is keras.activations.linear
    assert model.get_layer("conv3_block2_out").output.shape == (None, 4, 4, 8 if block == "basic" else 32)


def test_bad_small_resnets_are_refused():
    with pytest.raises(l2sp.InputError, match="block 'wide' is unknown"):
        tiny(block="wide")
    with pytest.raises(l2sp.InputError, match="2 widths but 1 depths"):
        tiny(depths=(1,))
    with pytest.raises(l2sp.InputError, match="backbone 'vgg' is unknown"):
        zoo.backbone("vgg", 3)


def test_resnet50_returns_logits():
    model = zoo.backbone("resnet50", 10, image_size=32)
    assert model.layers[-1].activation is keras.activations.linear


def test_imagenet_weights_need_1000_classes_at_224():
    with pytest.raises(l2sp.InputError, match="1000 classes"):
        zoo.backbone("resnet50", 10, weights="imagenet")
    for name in ("small", "resnet50_slim"):
        with pytest.raises(l2sp.InputError, match=f"no ImageNet weights to download for the backbone {name}"):
            zoo.backbone(name, 10, weights="imagenet")


def test_a_new_head_shares_nothing_and_keeps_the_features(small_network):
    pretrained = small_network()
    model = l2sp.with_new_head(pretrained, 7, seed=1)
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3))
    assert model(x).shape == (2, 7)
    features = [keras.Model(m.inputs, m.get_layer("pool").output)(x) for m in (pretrained, model)]
    np.testing.assert_array_equal(*features)
    before = pretrained.get_weights()
    for weight in model.weights:
        weight.assign(weight + 1)
    for one, two in zip(before, pretrained.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_head_follows_its_seed(small_network):
    heads = [l2sp.with_new_head(small_network(), 7, seed=s).get_layer("new_head").kernel.numpy() for s in (1, 1, 2)]
    np.testing.assert_array_equal(heads[0], heads[1])
    assert not np.allclose(heads[0], heads[2])


def test_a_head_of_as_many_classes_is_still_new(small_network):
    pretrained = small_network()
    once = l2sp.with_new_head(pretrained, 3)
    twice = l2sp.with_new_head(once, 3)
    for start, model, name in ((pretrained, once, "new_head"), (once, twice, "new_head_2")):
        coverage = l2sp.attach(model, l2sp.L2SP(0.1), l2sp.Anchors.of(start))
        assert [w.key for w in coverage.group("S-bar")] == [f"{name}/kernel", f"{name}/bias"]
        l2sp.detach(model)


def test_heads_of_other_shapes():
    x = np.zeros((2, 8, 8, 3))
    no_top = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3)])
    assert l2sp.with_new_head(no_top, 5)(x).shape == (2, 5)
    base = tiny()
    softmax_after = keras.Model(base.inputs, keras.layers.Softmax()(base.outputs[0]))
    new = l2sp.with_new_head(softmax_after, 5)
    assert new(x).shape == (2, 5)
    assert not any(isinstance(layer, keras.layers.Softmax) for layer in new.layers)
    attached = tiny()
    l2sp.attach(attached, l2sp.L2SP(0.1), l2sp.Anchors.of(attached))
    assert not l2sp.with_new_head(attached, 5).losses


def test_models_that_cannot_get_a_head_are_refused():
    class Net(keras.Model):
        pass

    with pytest.raises(l2sp.InputError, match="functional or Sequential model, not Net"):
        l2sp.with_new_head(Net(), 3)


def test_weights_of_known_origin_have_a_pixel_format():
    assert zoo.pixels_of(None) == zoo.pixels_of(None, "rgb") == PIXELS["rgb"]
    assert zoo.pixels_of("imagenet") == zoo.pixels_of("imagenet", "bgr") == PIXELS["bgr"]
    for weights, given in ((None, "torch"), ("imagenet", "rgb")):
        with pytest.raises(l2sp.InputError, match=f"--pixels says {PIXELS[given]}"):
            zoo.pixels_of(weights, given)
