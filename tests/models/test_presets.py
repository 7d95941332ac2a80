"""A preset of KerasHub computes what KerasHub's own `predict` computes of the same pixels, or is refused by one sentence."""

import importlib.util
import json

import keras
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.experiments.configuration import plans_of
from l2sp_tf.models import keras_files, presets, zoo
from l2sp_tf.models.pixels import PIXELS

HUB = importlib.util.find_spec("keras_hub") is not None
needs_hub = pytest.mark.skipif(not HUB, reason="KerasHub is not installed: its presets cannot be made")
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TORCH = {"scale": [1 / (255 * d) for d in DEVIATION], "offset": [-m / d for m, d in zip(MEAN, DEVIATION, strict=True)]}
RESNET = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [3],
    "stackwise_num_filters": [64, 64],
    "block_type": "basic_block",
}
RESNET |= {"stackwise_num_blocks": [1, 1], "stackwise_num_strides": [1, 2]}
TRANSFORMER = {"image_shape": (16, 16, 3), "patch_size": 8, "num_layers": 1, "num_heads": 2, "hidden_dim": 8}
TEXT = {"vocabulary_size": 9, "num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8, "max_sequence_length": 8}
# of each preset: its family, the options of its backbone, and of its image converter (None for none)
CLASSIFIERS = {
    "of any size": ("ResNet", RESNET, {"image_size": (32, 32), **TORCH}),
    "of one size": (
        "ResNet",
        {**RESNET, "image_shape": (24, 24, 3)},
        {"image_size": (24, 24), "scale": 1 / 127.5, "offset": -1.0},
    ),
    "of raw pixels": ("ResNet", RESNET, {"image_size": (24, 32)}),
    "without a converter": ("ResNet", RESNET, None),
    "ViT": ("ViT", {**TRANSFORMER, "mlp_dim": 8}, {"image_size": (16, 16), "scale": 1 / 127.5, "offset": -1.0}),
    "DeiT": ("DeiT", {**TRANSFORMER, "intermediate_dim": 8}, {"image_size": (16, 16), **TORCH}),
}


def classifier(kind):
    import keras_hub

    family, options, converter = CLASSIFIERS[kind]
    backbone = getattr(keras_hub.models, f"{family}Backbone")(**options)
    preprocessor = None
    if converter is not None:
        preprocessor = getattr(keras_hub.models, f"{family}ImageClassifierPreprocessor")(
            image_converter=getattr(keras_hub.layers, f"{family}ImageConverter")(**converter)
        )
    made = getattr(keras_hub.models, f"{family}ImageClassifier")(backbone=backbone, num_classes=5, preprocessor=preprocessor)
    rng = np.random.default_rng(0)
    for weight in made.weights:
        weight.assign(np.abs(weight.numpy()) + 0.1 * rng.random(weight.shape))
    return made


@needs_hub
@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_preset_computes_what_its_own_predict_does(kind, tmp_path):
    made = classifier(kind)
    made.save_to_preset(tmp_path / "p")
    folder, converter = str(tmp_path / "p"), CLASSIFIERS[kind][2]
    sides = (converter or {"image_size": (20, 20)})["image_size"]
    x = np.random.default_rng(1).integers(0, 256, (3, *sides, 3)).astype("float32")
    expected, model = made.predict(x, verbose=0), l2sp.load_pretrained(folder)
    assert np.abs(model.predict(x, verbose=0) - expected).max() <= 1e-5 * np.abs(expected).max()
    assert zoo.is_whole_model(folder) and zoo.whole_shape(folder) == model.input_shape[1:]
    assert zoo.side_of(folder) == (sides[0] if converter and sides[0] == sides[1] else None)
    if converter is None:
        with pytest.raises(l2sp.InputError, match="The preset .* does not say how its weights see pixels"):
            zoo.pixels_of(folder)
    else:
        assert zoo.pixels_of(folder) == PIXELS["raw"]
    new = l2sp.with_new_head(model, 4, say=lambda line: None)
    new.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(keras_files.load_model(tmp_path / "m.keras")(x), new(x))
    coverage = l2sp.attach(new, l2sp.L2SP(0.1), l2sp.Anchors.of(model))
    assert [w.key for w in coverage.group("S-bar")] == ["new_head/kernel", "new_head/bias"]


@needs_hub
def test_the_size_of_images_is_that_of_the_preset(tmp_path):
    classifier("of any size").save_to_preset(tmp_path / "any")
    assert l2sp.load_pretrained(str(tmp_path / "any"), image_size=48).input_shape == (None, 48, 48, 3)
    classifier("of one size").save_to_preset(tmp_path / "one")
    with pytest.raises(l2sp.InputError, match="one takes images of 24x24 pixels, not of 48: give that size"):
        l2sp.load_pretrained(str(tmp_path / "one"), image_size=48)
    for name, side in (("any", 32), ("one", 24)):
        (plan,) = plans_of({"target": ["digits/target"], "weights": [str(tmp_path / name)], "seeds": [0]})
        assert plan.setup.is_whole_model and plan.setup.recipe.images.crop == side
    with pytest.raises(l2sp.InputError, match="is a preset of KerasHub, which brings its own weights: give it to --weights"):
        zoo.known_name(str(tmp_path / "any"))


@needs_hub
def test_presets_that_are_no_image_classifiers_are_refused(tmp_path):
    from keras_hub import models

    text, tokens = models.BertBackbone(**TEXT), models.ViTBackbone(**TRANSFORMER, mlp_dim=8)
    models.BertTextClassifier(backbone=text, num_classes=3).save_to_preset(tmp_path / "words")
    text.save_to_preset(tmp_path / "text")
    tokens.save_to_preset(tmp_path / "tokens")
    models.ResNetBackbone(**{**RESNET, "image_shape": (8, 8, 1)}).save_to_preset(tmp_path / "grey")
    classifier("ViT").save_to_preset(tmp_path / "headless")
    (tmp_path / "headless" / "task.weights.h5").unlink()
    for name, words in {
        "words": "is a BertTextClassifier, not an image classifier",
        "text": "takes inputs of shape .*, not RGB images",
        "tokens": r"is the backbone ViTBackbone with outputs of shape \(None, 5, 8\), not one vector",
        "grey": r"takes inputs of shape \(None, 8, 8, 1\), not RGB images",
        "headless": "has no task.weights.h5, so that its head would be random",
    }.items():
        with pytest.raises(l2sp.InputError, match=words):
            l2sp.load_pretrained(str(tmp_path / name))
    models.ResNetBackbone(**RESNET).save_to_preset(tmp_path / "body")
    model = l2sp.with_new_head(l2sp.load_pretrained(str(tmp_path / "body")), 4, say=lambda line: None)
    assert model.output_shape == (None, 4)


@needs_hub
def test_a_converter_that_does_more_than_rescale_is_refused(tmp_path):
    import keras_hub

    class Swapping(keras_hub.layers.ResNetImageConverter):
        def call(self, inputs):
            return super().call(inputs)[..., ::-1]

    made = classifier("of any size")
    with pytest.raises(l2sp.InputError, match="image converter Swapping of the preset p does more than rescale pixels"):
        presets._with_rescaling(made, Swapping(image_size=(8, 8), scale=[0.1, 0.2, 0.3]), "p", None)


@needs_hub
def test_a_named_preset_is_the_folder_that_kagglehub_gives(tmp_path, monkeypatch):
    made = classifier("of any size")
    made.save_to_preset(tmp_path / "p")
    asked = []
    monkeypatch.setattr("kagglehub.model_download", lambda handle: asked.append(handle) or str(tmp_path / "p"))
    x = np.random.default_rng(1).integers(0, 256, (2, 32, 32, 3)).astype("float32")
    model = l2sp.load_pretrained("resnet_50_imagenet")
    np.testing.assert_allclose(model(x), made.predict(x, verbose=0), rtol=1e-5)
    assert model.name == "resnet_50_imagenet" and "resnet_50_imagenet" in asked[0] and "://" not in asked[0]

    def fail(handle):
        raise OSError("no\nnetwork")

    monkeypatch.setattr("kagglehub.model_download", fail)
    with pytest.raises(
        l2sp.InputError, match=r"resnet_18_imagenet could not be downloaded \(no network\): connect to the network"
    ):
        l2sp.load_pretrained("resnet_18_imagenet")


def test_without_kerashub_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    def missing(name, package=None, real=importlib.import_module):
        if name == "keras_hub":
            raise ImportError("No module named 'keras_hub'")
        return real(name, package)

    (tmp_path / "config.json").write_text(json.dumps({"registered_name": "keras_hub>ResNetBackbone"}))
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="keras_hub>")]).save(tmp_path / "m.keras")
    monkeypatch.setattr(presets.importlib, "import_module", missing)
    monkeypatch.setattr(presets.importlib.util, "find_spec", lambda name: None)
    words = r"needs KerasHub, which cannot be imported .*: pip install \"l2sp-tf\[hub\]\""
    with pytest.raises(l2sp.InputError, match=words):
        l2sp.load_pretrained(str(tmp_path))
    with pytest.raises(l2sp.InputError, match=words):
        keras_files.load_model(tmp_path / "m.keras")
    assert not presets.is_preset("resnet_50_imagenet") and not presets.is_preset(tmp_path / "m.keras")
    with pytest.raises(
        l2sp.InputError, match=r"no weights file resnet_50_imagenet: .*, or install KerasHub for its presets: pip inst"
    ):
        keras_files.existing("resnet_50_imagenet")
