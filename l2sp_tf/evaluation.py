"""Accuracy with central crops or ten crops, and what fine-tuning cost on the source task (Table 3)."""

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.data import Task, test_batches
from l2sp_tf.errors import InputError
from l2sp_tf.matching import match
from l2sp_tf.models import detached_copy
from l2sp_tf.variables import keyed_weights

STATISTICS = ("moving_mean", "moving_variance")


def evaluate(model, data, *, batch_size=64, crops=1, from_logits=None, answers=False):
    """Top-1 accuracy over every test image, once each, with central crops (section 4.2) or ten crops.

    With ten crops the class is that of the highest mean probability, 1/10 sum_v softmax(z_v), over the
    corners, the centre and their mirror images.

    Args:
        model: a Keras classifier; logits and probabilities do alike.
        data: a `Task`, or a finite iterable of (images [b, h, w, 3], labels [b]); with ten crops, of
            (images [b, 10, h, w, 3], labels [b]).
        batch_size: crops a step, for a `Task`; ten crops of an image stay together.
        crops: 1 or 10 of each image.
        from_logits: whether the model's output is logits; None takes non-negative outputs that sum to 1
            for probabilities. It counts with ten crops only.
        answers: whether to return which images were right, too.

    Returns:
        {"accuracy": in [0, 1], "correct": count, "total": count}, and with `answers` under "right" a
        bool [n] in the order of the images.

    Raises:
        InputError: there is no image, or `crops` is neither 1 nor 10.
    """
    if crops not in (1, 10):
        raise InputError(f"crops is {crops!r}: it must be 1 or 10.")
    batches = data
    if isinstance(data, Task):
        size = max(1, batch_size // crops)
        batches = test_batches(data.test, data.preprocessing, data.mean, batch_size=size, crops=crops)

    right, is_right = [], None
    for x, y in batches:
        if is_right is None:
            is_right = _judge(model, x, crops, from_logits)
        right.append(is_right(tf.cast(x, tf.float32), tf.cast(y, tf.int64)).numpy())
    if not right:
        raise InputError("There are no test images to evaluate on.")
    right = np.concatenate(right)
    result = {"accuracy": float(right.mean()), "correct": int(right.sum()), "total": len(right)}
    return {**result, "right": right} if answers else result


def _judge(model, x, crops, from_logits):
    """A traced function of images and labels, for any number of them, that tells which answers are right: bool [n]."""

    def judge(images, labels):
        scores = model(tf.reshape(images, [-1, *images.shape[-3:]]), training=False)
        if crops > 1:
            scores = tf.reshape(_probabilities(scores, from_logits), [-1, crops, scores.shape[-1]])
            scores = tf.reduce_mean(scores, axis=1)
        return tf.argmax(scores, axis=-1) == labels

    specs = tf.TensorSpec([None, *x.shape[1:]], tf.float32), tf.TensorSpec([None], tf.int64)
    return tf.function(judge).get_concrete_function(*specs)


def _probabilities(scores, from_logits):
    """The probabilities [b, classes] that a model's output means, in float32."""
    scores = tf.cast(scores, tf.float32)
    if from_logits is None:
        sums = tf.abs(tf.reduce_sum(scores, axis=1) - 1)
        from_logits = tf.reduce_any(scores < 0) | tf.reduce_any(sums > 1e-2)  # half precision sums no better
    return tf.where(from_logits, tf.nn.softmax(scores), scores)


def retention(finetuned, pretrained, source, *, before=None, batch_size=64, crops=1):
    """What a fine-tuned model still knows of its source task (Table 3).

    The fine-tuned backbone gets the original head back, without any retraining. Table 3
    does not say whose batch-norm statistics it takes, so the accuracy is given both ways:
    with those of the fine-tuned model ("target statistics") and of the pre-trained one
    ("source statistics").

    Args:
        finetuned: the fine-tuned model.
        pretrained: the functional or Sequential model it started from, unchanged since.
        source: the source task, as `evaluate` takes it.
        before: what `evaluate(pretrained, source)` returned, if it is known.
        batch_size, crops: as in `evaluate`.

    Returns:
        {"before": ..., "target_statistics": ..., "source_statistics": ...}, accuracies as
        `evaluate` returns them, and under "drop_target_statistics" and
        "drop_source_statistics" the accuracy lost, in [-1, 1].

    Raises:
        InputError: the two models share no weights.
    """
    before = before or evaluate(pretrained, source, batch_size=batch_size, crops=crops)
    result = {"before": before}
    for name in ("target_statistics", "source_statistics"):
        model = transplant(finetuned, pretrained, statistics=name == "target_statistics")
        result[name] = evaluate(model, source, batch_size=batch_size, crops=crops)
        result[f"drop_{name}"] = before["accuracy"] - result[name]["accuracy"]
    return result


def transplant(finetuned, pretrained, *, statistics=True):
    """A copy of `pretrained`, with its head, that has the fine-tuned values of all shared weights.

    Args:
        finetuned, pretrained: two models that share weights by key and shape.
        statistics: whether the moving statistics of batch norm are taken over too.

    Raises:
        InputError: the two models share no weights, or it is not clear which of them.
    """
    model = detached_copy(pretrained)
    weights, tuned = keyed_weights(model), keyed_weights(finetuned)
    found = match(weights, tuned)
    found.refuse()
    shared = found.pairs
    if not shared:
        raise InputError(f"{finetuned.name!r} and {pretrained.name!r} share no weights: give the model that it started from.")
    for key, other in shared.items():
        weight = weights[key]
        is_statistic = isinstance(weight.layer, keras.layers.BatchNormalization) and weight.variable.name in STATISTICS
        if statistics or not is_statistic:
            weight.variable.assign(tuned[other].variable)
    return model
