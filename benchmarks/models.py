"""Which Keras models can be fine-tuned with l2sp_tf: small ones with random weights go through every step.

The model is copied and a new head put on (where `with_new_head` can), the penalty attached, two steps trained, what the
step adds to the loss compared with Eq. (3), the Fisher diagonal estimated, the model saved as `.keras`, loaded, attached
again and trained on, its delta saved and loaded, and the penalty detached. Outputs are compared after each copy: of random
inputs, in inference mode. The outcome is a row of docs/models.md.

    python -m benchmarks.models            # all, and writes docs/models.md
    python -m benchmarks.models MobileNet  # some; the other rows stay

Models of KerasHub need `pip install keras-hub`; without it their rows stay.
"""

import argparse
import importlib.util
import pathlib
import re
import sys
import tempfile

import keras
import numpy as np
import tensorflow as tf

import l2sp_tf as l2sp
from l2sp_tf.models.copies import detached_copy
from l2sp_tf.penalties.assignment import assign
from l2sp_tf.penalties.matching import match
from l2sp_tf.penalties.weights import keyed_weights

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "models.md"
START, END = "<!-- rows: python -m benchmarks.models -->\n", "<!-- end of rows -->\n"
COLUMNS = ("model", "numbers", "copy", "head", "two steps", "penalty", "Fisher", "saved, loaded", "trained on", "delta", "detach")
CLASSES, BATCH, SEQUENCE, WORDS = 3, 4, 8, 50
CHEAPEST = ("DenseNet, 4 blocks",)


def application(name, side=32, **options):
    """A maker of a model of keras.applications by its public name."""
    return lambda: getattr(keras.applications, name)(
        weights=None, input_shape=(side, side, 3), classes=CLASSES, classifier_activation=None, **options
    )


def smaller(name, base, *arguments, **options):
    """A maker of a model by the general constructor that stands beside a public name in its module."""
    make = getattr(sys.modules[getattr(keras.applications, name).__module__], base)
    options |= {"weights": None, "input_shape": (32, 32, 3), "classes": CLASSES, "classifier_activation": None}
    return lambda: make(*arguments, **options)


def hub(name, classifier, options):
    """A maker of a classifier of KerasHub on a small backbone."""

    def make():
        from keras_hub import models

        backbone = getattr(models, f"{name}Backbone")(**options)
        return getattr(models, f"{name}{classifier}")(backbone=backbone, num_classes=CLASSES, preprocessor=None)

    return make


WIDTHS = {"num_layers": 2, "num_heads": 2, "hidden_dim": 8}
TEXT = {"vocabulary_size": WORDS, **WIDTHS, "intermediate_dim": 16, "max_sequence_length": SEQUENCE}
IMAGE = {"image_shape": (16, 16, 3), **WIDTHS}
MODELS = {
    "ConvNeXt, 4 blocks": smaller("ConvNeXtTiny", "ConvNeXt", (1, 1, 1, 1), (4, 8, 12, 16)),
    "DenseNet, 4 blocks": smaller("DenseNet121", "DenseNet", (1, 1, 1, 1)),
    "EfficientNetB0": application("EfficientNetB0"),
    "EfficientNetV2B0": application("EfficientNetV2B0"),
    "InceptionResNetV2": application("InceptionResNetV2", side=75),
    "InceptionV3": application("InceptionV3", side=75),
    "MobileNet, width 0.25": application("MobileNet", alpha=0.25),
    "MobileNetV2, width 0.35": application("MobileNetV2", alpha=0.35),
    "MobileNetV3Small, width 0.35": application("MobileNetV3Small", alpha=0.35),
    "NASNetMobile": application("NASNetMobile"),
    "ResNet50": application("ResNet50"),
    "ResNet50V2": application("ResNet50V2"),
    "VGG16": application("VGG16"),
    "Xception": application("Xception", side=71),
    "KerasHub ViT": hub("ViT", "ImageClassifier", {**IMAGE, "patch_size": 8, "mlp_dim": 16}),
    "KerasHub DeiT": hub("DeiT", "ImageClassifier", {**IMAGE, "patch_size": 8, "intermediate_dim": 16}),
    "KerasHub BERT": hub("Bert", "TextClassifier", TEXT),
    "KerasHub RoBERTa": hub("Roberta", "TextClassifier", TEXT),
    "KerasHub DistilBERT": hub("DistilBert", "TextClassifier", TEXT),
    "KerasHub ALBERT": hub("Albert", "TextClassifier", {**TEXT, "embedding_dim": 6}),
}


def inputs_of(model):
    """Random inputs of a model as it takes them: images, or words and their masks by name."""
    rng = np.random.default_rng(0)

    def one(tensor):
        shape = (BATCH, *(side or SEQUENCE for side in tensor.shape[1:]))
        if "mask" in tensor.name:
            return np.ones(shape, "int32")
        if "segment" in tensor.name:
            return np.zeros(shape, "int32")
        return rng.integers(0, WORDS, shape) if "int" in tensor.dtype else rng.normal(size=shape).astype("float32")

    return tf.nest.map_structure(one, model.input)


def check(name):
    """The row of one model: what happened at each step."""
    keras.utils.set_random_seed(0)
    pretrained = moved(MODELS[name]())
    x, y = inputs_of(pretrained), np.arange(BATCH) % CLASSES
    anchors = l2sp.Anchors.of(pretrained)
    numbers = sum(int(np.prod(v.shape)) for v in pretrained.trainable_variables)
    copy, copied = copy_of(pretrained, x)
    model, cut = with_head(copy)
    row = [name, f"{numbers:,}", copied, cut, trained(model, anchors, x, y, 2)]
    row += [penalty_of(model, anchors, x, y), fisher_of(pretrained, x)]
    with tempfile.TemporaryDirectory() as folder:
        model.save(pathlib.Path(folder) / "m.keras")
        loaded = keras.models.load_model(pathlib.Path(folder) / "m.keras")
        row += [same_outputs(model, loaded, x), trained(loaded, anchors, x, y, 1)]
        l2sp.save_delta(loaded, anchors, pathlib.Path(folder) / "d.safetensors")
        l2sp.load_delta(model, anchors, pathlib.Path(folder) / "d.safetensors")
        exact = l2sp.Anchors.of(loaded).digest == l2sp.Anchors.of(model).digest
        row.append(same_outputs(loaded, model, x) if exact else "other weights")
    l2sp.detach(model)
    left = [w.key for w in keyed_weights(model).values() if w.variable.regularizer is not None]
    row.append("yes" if not left else f"left on {left[0]}")
    return row


def copy_of(model, x):
    """A copy and whether its outputs are the same; or where a layer cannot be copied the model itself, and which layer."""
    try:
        copy = detached_copy(model)
    except l2sp.InputError as error:
        return model, "refused: " + re.search(r"of class (\w+)", str(error))[1]
    return copy, same_outputs(model, copy, x)


def moved(model):
    """Moves all weights off their initial values, and gives `Normalization` a mean and a variance."""
    rng = np.random.default_rng(0)
    values = {key: weight.variable.numpy() for key, weight in keyed_weights(model).items()}
    values = {key: value for key, value in values.items() if value.dtype.kind == "f"}
    for key, value in values.items():
        noise = np.tanh(rng.normal(size=value.shape)).astype("float32")
        values[key] = value * (1 + 0.2 * noise) + 0.01 * noise * (value.ndim < 2)
    assign(model, values)
    return model


def same_outputs(model, other, x):
    """Whether two models give the same outputs in inference mode, up to rounding."""
    a, b = (keras.ops.convert_to_numpy(m(x, training=False)).astype("float64") for m in (model, other))
    if not np.isfinite(a).all():
        return "outputs are not finite"
    difference = np.abs(a - b).max() / np.abs(a).max()
    return "yes" if difference <= 1e-5 else f"outputs differ by {difference:.1g}"


def with_head(copy):
    """The model with a new head, and what that replaced; or the model itself, with its own head."""
    said = []
    try:
        model = l2sp.with_new_head(copy, CLASSES + 1, say=said.append)
    except l2sp.InputError:
        return copy, "own"
    cut = said[0].partition(" takes the place of ")[2].partition(" of the model")[0]
    return model, f"for {cut}" if cut else "on top"


def trained(model, anchors, x, y, steps):
    """Attaches L2-SP, trains some steps under the guard, and says whether weights moved and are finite."""
    coverage = l2sp.attach(model, l2sp.L2SP(0.1), anchors)
    before = l2sp.Anchors.of(model).digest
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    cross_entropy = keras.metrics.SparseCategoricalCrossentropy(from_logits=True, name="cross_entropy")
    model.compile(keras.optimizers.SGD(1e-3), loss, metrics=[cross_entropy])
    batch = tf.data.Dataset.from_tensors((x, y)).repeat(steps)
    history = model.fit(batch, verbose=0, callbacks=[l2sp.AnchorGuard(coverage)])
    moved = l2sp.Anchors.of(model).digest != before
    return "yes" if moved and np.isfinite(history.history["loss"][0]) else "no"


def penalty_of(model, anchors, x, y):
    """Whether the traced step adds Eq. (3) to the loss: alpha / 2 ||w - w0||^2 on S and beta / 2 ||w||^2 on S-bar."""
    values = {
        key: value * np.float32(1.05 if value.ndim > 1 else 1)  # a shift of all would grow from layer to layer
        for key, value in l2sp.Anchors.of(model).items()
        if value.dtype.kind == "f"
    }
    assign(model, values)
    coverage, pairs, expected = l2sp.attach(model, l2sp.L2SP(0.1), anchors, 0.01), match(values, anchors).pairs, 0.0
    for weight in coverage.group("S") + coverage.group("S-bar"):
        w0 = anchors[pairs[weight.key]] if weight.group == "S" else 0.0
        strength = 0.1 if weight.group == "S" else 0.01
        expected += strength / 2 * np.sum(np.square(values[weight.key].astype("float64") - w0))
    logs = model.fit(tf.data.Dataset.from_tensors((x, y)), verbose=0).history
    added = logs["loss"][0] - logs["cross_entropy"][0]
    error = abs(added - expected) / (abs(expected) + 1e-4 * logs["loss"][0])  # the loss is in float32
    return "yes" if error <= 1e-3 else f"{added:.4g}, not {expected:.4g}"


def fisher_of(model, x):
    """How the Fisher diagonal can be estimated: in one batched pass, or example by example and why."""
    images = tf.data.Dataset.from_tensor_slices(x).batch(BATCH)
    try:
        l2sp.fisher_diagonal(model, images)
    except l2sp.InputError as error:
        l2sp.fisher_diagonal(model, images, slow_fallback=True)
        reasons = {"does not give one tensor": "a weight enters without examples", "more than once": "a layer is called twice"}
        reason = next((words for part, words in reasons.items() if part in str(error)), "other")
        return f"`slow_fallback`: {reason}"
    return "yes"


def rows_of_page():
    """The rows of docs/models.md by the name of the model."""
    lines = PAGE.read_text().split(START)[1].split(END)[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.strip()]
    return {row[0]: row for row in rows}


def write_page(rows):
    """Puts rows into docs/models.md, in the order of `MODELS`."""
    head, rest = PAGE.read_text().split(START)
    table = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
    table += ["| " + " | ".join(rows[name]) + " |" for name in MODELS if name in rows]
    PAGE.write_text(head + START + "\n".join(table) + "\n" + END + rest.split(END)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="models; by default all")
    names = parser.parse_args().names or list(MODELS)
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r}: give some of {', '.join(map(repr, MODELS))}")
    for name in names:
        if name.startswith("KerasHub") and importlib.util.find_spec("keras_hub") is None:
            print(f"{name}: left out, keras-hub is not installed")
            continue
        row = check(name)
        print(" | ".join(row), flush=True)
        write_page(rows_of_page() | {name: row})


if __name__ == "__main__":
    main()
