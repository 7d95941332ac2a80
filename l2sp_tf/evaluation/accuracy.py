"""Accuracy with central crops or ten crops, and the accuracy lost on the source task by fine-tuning (Table 3)."""

import warnings
from typing import Any

import keras
import numpy as np

from l2sp_tf.data.batches import check_readable_again, labelled_batches
from l2sp_tf.data.given import GivenArrays
from l2sp_tf.data.pipeline import Task
from l2sp_tf.evaluation.answers import Judge
from l2sp_tf.files.errors import InputError
from l2sp_tf.models.batch_norm import is_statistic
from l2sp_tf.models.copies import detached_copy
from l2sp_tf.models.heads import head_of
from l2sp_tf.penalties.assignment import assign
from l2sp_tf.penalties.matching import match
from l2sp_tf.penalties.weights import keyed_weights


def evaluate(
    model: keras.Model,
    data: Any,
    *,
    batch_size: int = 64,
    crops: int = 1,
    from_logits: bool | None = None,
    answers: bool = False,
) -> dict[str, Any]:
    """Computes top-1 accuracy over every test image, once each, with central crops (section 4.2) or ten crops.

    The answer is the class of the highest score. With one output, a sigmoid or its logit, it is 1 if the probability is
    above 1/2. With ten crops it is the class of the highest mean probability, 1/10 sum_v p(x_v), over the corners, the
    centre and their mirror images. A row of scores with a NaN counts as wrong.

    With sample weights the accuracy is sum_i w_i right_i / sum_i w_i; the counts ignore the weights. With several outputs each
    output is judged by itself; the accuracy and counts cover the answers of all outputs.

    Args:
        model: a Keras classifier with outputs [B, K], [B, 1, 1, K] or [B, 1], either logits or probabilities.
        data: a `Task`; arrays (x, y) or (x, y, weights) in a tuple; a `tf.data.Dataset` or `keras.utils.PyDataset` of
            such elements, batched or not; or an iterable of batches. With ten crops x is [b, 10, h, w, 3]. x may be a
            dict or tuple of inputs. Labels are integers [b] or [b, 1], also as booleans or whole floats, or one-hot
            [b, K]; for several outputs, a dict or list of these in the structure of the outputs.
        batch_size: crops per step, if the data are not batched; ten crops of an image stay together.
        crops: 1 or 10 of each image.
        from_logits: whether the model's output is logits, as in `fisher_diagonal`. It matters with ten crops, and for
            one output.
        answers: whether to return which images were right, too.

    Returns:
        {"accuracy": in [0, 1], "correct": count, "total": count}, and with `answers` under "right" a
        bool [n] in the order of the images. With several outputs also "outputs", a dict from the name of each output to
        such a dict; then "right" is bool [n, outputs]. If any answer has a NaN among its scores, a warning says so and
        "nan" counts them.

    Raises:
        InputError: there is no image; data, labels or outputs have a form that cannot be judged; the meaning of an output
            matters but is unknown; or `crops` is neither 1 nor 10.
    """
    return _accuracy(model, data, Judge(model, model, crops, from_logits), batch_size, answers)


def _accuracy(model, data, judge, batch_size, answers=False):
    """Returns the result of `evaluate` from the answers of a `Judge`."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}: give an integer that is at least 1.")
    size = max(1, batch_size // judge.crops)
    if isinstance(data, (Task, GivenArrays)):
        data = data.test_data(size, judge.crops)
    judged = [judge(*batch) for batch in labelled_batches(data, model, size=size, crops=judge.crops)]
    if not judged:
        again = ", in data that can be read again if they have been read before" if hasattr(data, "__next__") else ""
        raise InputError(f"There are no test images to evaluate on: give at least one{again}.")
    right, weights = (np.concatenate([part[i] for part in judged]) for i in (0, 1))
    nan = {"nan": judge.nan} if judge.nan else {}
    if nan:
        warnings.warn(f"{model.name!r} gives NaN in {judge.nan} of {right.size} answers, which count as wrong.", stacklevel=3)
    if judge.names == [None]:
        return {**_summary(right[:, 0], weights[:, 0], answers), **nan}
    each = {name: _summary(right[:, i], weights[:, i], answers) for i, name in enumerate(judge.names)}
    return {**_summary(right, weights, answers), **nan, "outputs": each}


def _summary(right, weights, answers):
    total = weights.sum()
    if not total > 0:
        raise InputError("The sample weights are all 0: give at least one image a weight.")
    accuracy = float(right.mean()) if (weights == 1).all() else float(weights[right].sum() / total)
    result = {"accuracy": accuracy, "correct": int(right.sum()), "total": right.size}
    return {**result, "right": right} if answers else result


def retention(
    finetuned: keras.Model,
    pretrained: keras.Model,
    source: Any,
    *,
    before: dict[str, Any] | None = None,
    batch_size: int = 64,
    crops: int = 1,
) -> dict[str, Any]:
    """Measures how much a fine-tuned model has kept of its source task (Table 3).

    The fine-tuned backbone gets the original head back, without any retraining, whatever the heads are called. Table 3
    does not say whose batch-norm statistics it uses. So the accuracy is given with those of the fine-tuned model
    ("target statistics") and with those of the pre-trained model ("source statistics").

    Args:
        finetuned: the fine-tuned model.
        pretrained: the functional or Sequential model it started from, unchanged since.
        source: the source task, as in `evaluate`.
        before: the result of `evaluate(pretrained, source)`, if known.
        batch_size, crops: as in `evaluate`.

    Returns:
        {"before": ..., "target_statistics": ..., "source_statistics": ...}, each a result of `evaluate`; and under
        "drop_target_statistics" and "drop_source_statistics" the accuracy lost, in [-1, 1].

    Raises:
        InputError: the two models share no weights.
    """
    check_readable_again(source)
    before = before or evaluate(pretrained, source, batch_size=batch_size, crops=crops)
    result = {"before": before}
    for name in ("target_statistics", "source_statistics"):
        model = transplant(finetuned, pretrained, statistics=name == "target_statistics")
        # the copy is not compiled: the pre-trained model's loss gives the meaning of its outputs
        result[name] = _accuracy(model, source, Judge(model, pretrained, crops, None), batch_size)
        result[f"drop_{name}"] = before["accuracy"] - result[name]["accuracy"]
    return result


def transplant(finetuned, pretrained, *, statistics=True):
    """Copies `pretrained`, with its head, and gives the copy the fine-tuned values of all other weights that the two share.

    Args:
        finetuned, pretrained: two models that share weights by key and shape.
        statistics: whether to take the moving statistics of batch norm from `finetuned` too.

    Raises:
        InputError: the two models share no weights, or the match is ambiguous.
    """
    model = detached_copy(pretrained)
    weights, tuned = keyed_weights(model), keyed_weights(finetuned)
    head = head_of(model).keys  # never taken from the new head, even if name and shape agree
    found = match(weights, tuned)
    found.refuse([key for key in weights if key not in head])
    shared = {key: other for key, other in found.pairs.items() if key not in head}
    if not shared:
        raise InputError(f"{finetuned.name!r} and {pretrained.name!r} share no weights: give the model that it started from.")
    values = {}
    for key, other in shared.items():
        if statistics or not is_statistic(weights[key]):
            values[key] = tuned[other].variable.numpy()
    assign(model, values)
    return model
