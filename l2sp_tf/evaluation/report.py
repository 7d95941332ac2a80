"""Reports what a fine-tuned model kept of its pre-training: distances and R² by layer, and accuracy on the source task."""

import collections
import dataclasses
import math
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.data.batches import labelled_batches
from l2sp_tf.data.pipeline import Task, test_batches
from l2sp_tf.evaluation import report_page
from l2sp_tf.evaluation.accuracy import retention
from l2sp_tf.evaluation.activations import activation_r2, box
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.types import Path, Weights
from l2sp_tf.files.writing import write_text
from l2sp_tf.models.batch_norm import is_statistic
from l2sp_tf.models.copies import detached_copy
from l2sp_tf.models.heads import head_of, inputs_of
from l2sp_tf.models.units import units
from l2sp_tf.penalties.assignment import assign
from l2sp_tf.penalties.matching import match
from l2sp_tf.penalties.weights import keyed_weights

R2_IMAGES = 512
R2_BATCH = 16  # the outputs of all compared layers are in memory at once


@dataclasses.dataclass(frozen=True)
class LayerDistance:
    """The distance that one layer moved. Counts its kernel, biases, gamma and beta, but not the statistics of batch norm.

    Attributes:
        layer: the key of the layer.
        numbers: how many numbers its weights have.
        distance: ||w - w0||.
        norm: ||w0||.
    """

    layer: str
    numbers: int
    distance: float
    norm: float

    @property
    def relative(self):
        """||w - w0|| / ||w0||; None if w0 = 0."""
        return self.distance / self.norm if self.norm else None


@dataclasses.dataclass(frozen=True)
class RetentionReport:
    """What a fine-tuned model kept. `save` writes it as a page, `log` for TensorBoard.

    Attributes:
        title: the name of the model or the run.
        facts: a dict from label to text: what else is known about the run.
        layers: a list of `LayerDistance`, from the input to the output.
        new: the keys of weights without an anchor, such as the new head's.
        accuracies: what `retention` returns, or None without source images.
        source: the name of the source task, or "".
        r2: a dict from layer to what `activations.box` returns; empty without images.
    """

    title: str
    facts: dict
    layers: list
    new: list
    accuracies: dict | None
    source: str
    r2: dict

    def __str__(self):
        moved = ", ".join(f"{layer.layer} {layer.relative:.2%}" for layer in self.most_moved())
        lines = [f"{self.title}: ||w - w0|| / ||w0|| = {self.relative:.2%}; moved most: {moved or 'none'}"]
        if self.accuracies:
            before, after = (self.accuracies[name]["accuracy"] for name in ("before", "target_statistics"))
            lines.append(f"source accuracy {before:.1%} before, {after:.1%} after")
        return "\n".join(lines)

    @property
    def distance(self) -> float:
        """||w - w0|| over all layers."""
        return math.sqrt(sum(layer.distance**2 for layer in self.layers))

    @property
    def relative(self) -> float:
        """||w - w0|| / ||w0|| over all layers."""
        return self.distance / (math.sqrt(sum(layer.norm**2 for layer in self.layers)) or math.nan)

    def most_moved(self, count: int = 5) -> list[LayerDistance]:
        """Returns the layers that moved, sorted by relative distance: NaN first, then the largest."""
        moved = [layer for layer in self.layers if layer.relative]
        return sorted(moved, key=lambda x: math.inf if math.isnan(x.relative) else x.relative, reverse=True)[:count]

    def html(self) -> str:
        """Returns the page that `save` writes."""
        return report_page.page(self)

    def markdown(self) -> str:
        """Returns the distances by layer as a Markdown table."""
        return report_page.markdown(self)

    def save(self, path: Path) -> None:
        """Writes one HTML page, atomically. It needs no other file.

        Raises:
            OSError: the file cannot be written.
        """
        write_text(path, self.html())

    def log(self, folder: Path) -> None:
        """Writes TensorBoard scalars: totals at step 0, and curves over the layers, whose steps are the layers' positions."""
        writer = tf.summary.create_file_writer(str(folder))
        with writer.as_default(step=0):
            tf.summary.scalar("retention/distance", self.distance)
            tf.summary.scalar("retention/relative_distance", self.relative)
            for name in ("before", "target_statistics", "source_statistics"):
                if self.accuracies:
                    tf.summary.scalar(f"retention/source_accuracy/{name}", self.accuracies[name]["accuracy"])
            tf.summary.text("retention/layers", self.markdown())
            for position, layer in enumerate(self.layers):
                tf.summary.scalar("retention/relative_distance_by_depth", layer.relative or 0.0, step=position)
            for position, values in enumerate(self.r2.values()):
                if values["med"] is not None:
                    tf.summary.scalar("retention/median_r2_by_depth", values["med"], step=position)
        writer.close()


def retention_report(
    model: keras.Model,
    anchors: Weights,
    *,
    source: Any = None,
    pretrained: keras.Model | None = None,
    title: str | None = None,
    crops: int = 1,
) -> RetentionReport:
    """Measures what a fine-tuned model kept of its pre-training.

    Args:
        model: the fine-tuned model; a functional or Sequential one if `source` is given.
        anchors: the `Anchors` that it started from.
        source: the source task, as `evaluate` takes it. It is read several times. None leaves accuracies and R² out.
        pretrained: the model that it started from; by default `pretrained_of(model, anchors)`.
        title: of the report; by default the model's name.
        crops: 1 or 10 of each source image, as in `evaluate`.

    Returns:
        A `RetentionReport`.

    Raises:
        InputError: the model shares no weights with the anchors, or the pre-trained model cannot be rebuilt from the two.
    """
    layers, new = distances(model, anchors)
    accuracies, r2 = None, {}
    if source is not None:
        pretrained = pretrained_of(model, anchors) if pretrained is None else pretrained
        accuracies = retention(model, pretrained, source, crops=crops)
        values = activation_r2(model, pretrained, _some_images(source, pretrained, crops), layers=_compared(model, pretrained))
        r2 = {name: box(layer) for name, layer in values.items()}
    name = source.name if isinstance(source, Task) else ""
    return RetentionReport(title or model.name, {}, layers, new, accuracies, name, r2)


def distances(model, anchors):
    """Measures ||w - w0|| of each layer of a model that has anchors, and lists the keys of the weights that have none.

    Returns:
        (a list of `LayerDistance`, a list of keys).

    Raises:
        InputError: the model shares no weights with the anchors, or the match is unclear.
    """
    weights = keyed_weights(model)
    pairs = _matched(weights, anchors)
    sums, new = collections.defaultdict(lambda: np.zeros(3)), []
    for key, weight in weights.items():
        if is_statistic(weight):
            continue
        if key not in pairs:
            new.append(key)
            continue
        w, w0 = weight.variable.numpy().astype("float64"), anchors[pairs[key]].astype("float64")
        sums[key.rpartition("/")[0]] += [w.size, np.sum((w - w0) ** 2), np.sum(w0**2)]
    if not sums:
        raise InputError(
            f"The model {model.name!r} shares no weights with the anchors ({', '.join(list(anchors)[:3])}, ...): "
            "give the anchors of the model that it started from."
        )
    return [LayerDistance(layer, int(n), math.sqrt(d), math.sqrt(s)) for layer, (n, d, s) in sums.items()], new


def _matched(weights, anchors):
    """Returns the key of the anchor of each weight that has one, or raises InputError if the match is unclear."""
    found = match(weights, anchors)
    found.refuse()
    return found.pairs


def pretrained_of(model, anchors):
    """Rebuilds the classifier that a fine-tuned one started from: its layers at their anchors, and the anchors' head.

    Args:
        model: a functional or Sequential model. At most its last layer, a Dense one, is new.
        anchors: the `Anchors`. At most a Dense layer, or a 1x1 convolution of features without image axes, is left over.

    Raises:
        InputError: more than that is new in the model or left over in the anchors, or the difference is unclear.
    """
    copy = detached_copy(model)
    weights = keyed_weights(copy)
    pairs = _matched(weights, anchors)
    assign(copy, {key: anchors[other] for key, other in pairs.items()})
    new = weights.keys() - pairs.keys()
    unused = [key for key in anchors if key not in pairs.values()]
    left = {key.rpartition("/")[2]: anchors[key] for key in unused}
    if not new and not left:
        return copy
    head = next((weights[key].layer for key in new), None)
    is_head = isinstance(head, keras.layers.Dense) and new == set(head_of(copy).keys)
    if not is_head or len(left) < len(unused) or not _fits(head, left):
        raise InputError(
            f"The pre-trained classifier cannot be rebuilt from {model.name!r} and its anchors, which differ in more than one "
            "last Dense layer: give the model that it started from, too."
        )
    left["kernel"] = left["kernel"].reshape(-1, left["kernel"].shape[-1])
    old = keras.layers.Dense(left["kernel"].shape[1], use_bias="bias" in left, name="pretrained_head")
    restored = keras.Model(inputs_of(copy), old(head.input), name=model.name)
    old.set_weights([left[name] for name in ("kernel", "bias") if name in left])
    return restored


def _fits(head, left):
    """Whether the anchors left over are a kernel, and perhaps a bias, of a layer on the features of a Dense layer."""
    if set(left) not in ({"kernel"}, {"kernel", "bias"}) or left["kernel"].shape[-2:-1] != tuple(head.kernel.shape[:1]):
        return False
    is_pooled = head.input._keras_history.operation.name.startswith("new_pool")  # an activation may have come before it
    return left["kernel"].ndim == 2 or (set(left["kernel"].shape[:-2]) == {1} and not is_pooled)


def _compared(model, pretrained):
    """Returns the layers whose activations are compared: the last of each unit, or without units all that both models have."""
    try:
        return [unit[-1].name for unit in units(pretrained)]
    except InputError:
        both = {layer.name for layer in pretrained.layers} & {layer.name for layer in model.layers if layer.weights}
        names = [layer.name for layer in pretrained.layers if layer.name in both]
        return [name for name in names if model.get_layer(name).output.shape == pretrained.get_layer(name).output.shape]


def _some_images(source, pretrained, crops):
    """Yields batches of in all at most `R2_IMAGES` source images; of ten crops the central one."""
    if isinstance(source, Task):
        order = np.random.default_rng(0).permutation(len(source.test))[:R2_IMAGES]
        batches = test_batches(source.test, source.preprocessing, source.mean, batch_size=R2_BATCH, order=order)
    else:
        batches = labelled_batches(source, pretrained, size=R2_BATCH, crops=crops)
    count = 0
    for batch in batches:
        x = batch[0] if crops == 1 or isinstance(source, Task) else batch[0][:, 4]
        for start in range(0, len(x), R2_BATCH):
            if count < R2_IMAGES:
                part = x[start : start + R2_BATCH]
                yield part
                count += len(part)
