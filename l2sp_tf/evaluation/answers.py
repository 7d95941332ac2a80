"""Finds a model's right answers: compares the scores of its outputs with labels of any form."""

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.data.labels import classes_of, weights_of
from l2sp_tf.files.errors import InputError
from l2sp_tf.fisher.likelihoods import FAMILIES, count_classes, likelihood_of


class Judge:
    """Finds the right answers in a batch.

    Args:
        model: the model to judge.
        compiled: a model whose loss gives the meaning of the outputs: `model`, or the model that it was copied from.
        crops, from_logits: as in `evaluate`.
        probabilities: whether `probable` will be called, which needs the meaning of every output.

    Attributes:
        names: the names of the outputs after the first batch; [None] for one output.
        nan: the number of answers so far with a NaN among their scores.
    """

    def __init__(self, model, compiled, crops, from_logits, probabilities=False):
        if crops not in (1, 10):
            raise InputError(f"crops is {crops!r}: it must be 1 or 10.")
        self.model, self.compiled, self.crops, self.from_logits = model, compiled, crops, from_logits
        self.probabilities, self.names, self.nan = probabilities, None, 0
        self._traced = {}

    def __call__(self, x, labels, weights):
        """Returns (bool, float64) [b, outputs]: which answers of a batch are right, and their weights."""
        n = _count(x)
        outputs, meanings = self._outputs(x)
        labels = self._of_outputs(labels, "labels")
        weights = [None] * len(self.names) if weights is None else self._of_outputs(weights, "sample weights")
        right, found = [], []
        for output, meaning, y, w, name in zip(outputs, meanings, labels, weights, self.names, strict=True):
            what = "the output" if name is None else f"the output {name!r}"
            scores, threshold = self._scores(output, meaning, n)
            right.append(right_answers(scores, y, threshold=threshold, what=what))
            self.nan += int(np.isnan(scores).any(axis=1).sum())
            found.append(np.ones(n) if w is None else weights_of(w, n, what))
        return np.stack(right, axis=1), np.stack(found, axis=1)

    def probable(self, x):
        """Returns the answer of a model with one output to each image of a batch, and its probability: int64 [n], float64 [n].

        Raises:
            InputError: a score is NaN.
        """
        (output,), (meaning,) = self._outputs(x)
        scores, threshold = self._scores(output, meaning, _count(x))
        if np.isnan(scores).any():
            raise InputError(f"The model {self.model.name!r} gives NaN: use another copy of it, or train it again.")
        chosen = answers_of(scores, threshold)
        p = scores if self.crops > 1 else _probabilities(scores, meaning)  # those of several crops are probabilities already
        p = np.concatenate([1 - p, p], axis=1) if p.shape[1] == 1 else p
        return chosen, p[np.arange(len(p)), chosen]

    def _outputs(self, x):
        """Returns a flat list of the model's outputs, and the `Likelihood` of each, or None where it does not matter."""
        if self.crops > 1:
            if not tf.is_tensor(x) or x.shape.rank < 2 or x.shape[1] != self.crops:
                shape = x.shape if tf.is_tensor(x) else type(x).__name__
                raise InputError(f"x is {shape}, but crops is {self.crops}: give images of {self.crops} crops, [b, 10, ...].")
            x = tf.reshape(x, [-1, *x.shape[2:]])
        spec = keras.tree.map_structure(_relaxed, x)
        key = str(spec)
        if key not in self._traced:
            call = tf.function(self._call).get_concrete_function(spec)
            self._traced[key] = call, self._meanings(call.graph.structured_outputs)
        call, meanings = self._traced[key]
        return _named(call(*tf.nest.flatten(x)), self.model)[1], meanings

    def _call(self, x):
        return self.model(x, training=False)

    def _meanings(self, outputs):
        self.names, parts = _named(outputs, self.model)
        meanings = []
        for index, (name, part) in enumerate(zip(self.names, parts, strict=True)):
            what = f"the output {'' if name is None else repr(name) + ' '}of the model {self.model.name!r}"
            matters = self.probabilities or count_classes(part, what) == 1 or self.crops > 1
            place = (index, len(parts))
            meanings.append(likelihood_of(part, self.compiled, self.from_logits, place=place, name=name) if matters else None)
        return meanings

    def _scores(self, output, meaning, n):
        """Returns the scores [n, K] of a batch in float64, and the threshold if K = 1."""
        scores = tf.cast(tf.reshape(output, [output.shape[0], -1]), tf.float64).numpy()
        if len(scores) != n * self.crops:
            counts = f"{len(scores)} rows of scores for {n * self.crops} images"
            raise InputError(f"The model {self.model.name!r} gives {counts}: give a model with one row for each.")
        if meaning is None:
            return scores, None
        meaning.check(int(meaning.doubtful(output)), len(scores), self.model)
        if self.crops == 1:
            return scores, 0.5 if meaning.is_probability else 0.0
        return _probabilities(scores, meaning).reshape(n, self.crops, -1).mean(axis=1), 0.5

    def _of_outputs(self, values, what):
        """Returns a list of labels or weights, one for each output; one set of weights may serve all outputs."""
        names = self.names
        if isinstance(values, dict):
            if len(values) == 1 and names == [None]:
                return list(values.values())
            missing = [name for name in names if name not in values]
            if missing:
                raise InputError(
                    f"The {what} have no entry for the output {missing[0]!r} of the model {self.model.name!r}: "
                    "give one for each output."
                )
            return [values[name] for name in names]
        if names == [None]:
            one = isinstance(values, (tuple, list)) and len(values) == 1 and getattr(values[0], "shape", ())
            return [values[0] if one else values]
        if isinstance(values, (tuple, list)) and len(values) == len(names):
            return list(values)
        if what == "labels" or isinstance(values, (tuple, list)):
            raise InputError(
                f"The model {self.model.name!r} has the outputs {', '.join(map(str, names))}: "
                f"give the {what} in a dict or list like them."
            )
        return [values] * len(names)


def _named(outputs, model):
    """Returns (the names of a model's outputs, the outputs), both flat; a single output has the name None.

    Raises:
        InputError: the outputs are nested deeper than a dict or list.
    """
    flat = tf.nest.flatten(outputs)
    if len(flat) == 1:
        return [None], flat
    keys = sorted(outputs) if isinstance(outputs, dict) else range(len(outputs))  # sorted, as Keras flattens a dict
    parts = [outputs[key] for key in keys]
    if len(parts) != len(flat):
        raise InputError(f"The outputs of the model {model.name!r} are nested: give a model with a dict or a list of outputs.")
    known = list(getattr(model, "output_names", None) or [])
    by_place = not isinstance(outputs, dict) and len(known) == len(parts)
    return [str(name) for name in (known if by_place else keys)], parts


def _count(x):
    """Returns the number of images in a batch."""
    counts = {leaf.shape[0] if leaf.shape.rank else None for leaf in tf.nest.flatten(x)}
    if len(counts) != 1 or None in counts:
        found = ", ".join(map(str, counts))
        raise InputError(f"The parts of x have different numbers of images ({found}): give as many of each.")
    return counts.pop()


def _relaxed(leaf):
    """Returns the spec of a tensor with any number of images."""
    return tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype) if isinstance(leaf, tf.Tensor) else tf.type_spec_from_value(leaf)


def right_answers(scores, labels, *, threshold=None, what="the output"):
    """Returns which images were answered rightly.

    The answer is the class of the highest score, the first if scores are equal. With one output it is 1 if the score is
    above the threshold. A row with a NaN is wrong.

    Args:
        scores: float [n, K].
        labels: integers [n] or [n, 1], booleans or whole floats; or one-hot [n, K].
        threshold: for K = 1.
        what: the output's name, for messages.

    Returns:
        bool [n].

    Raises:
        InputError: the labels do not fit the scores.
    """
    n, classes = scores.shape
    answers = answers_of(scores, threshold)
    expected = classes_of(labels, n, max(classes, 2), what, one_hot=classes > 1)
    return (answers == expected) & ~np.isnan(scores).any(axis=1)


def answers_of(scores, threshold=None):
    """Returns the answers [n] to scores [n, K]: the first class of the highest score; if K = 1, 1 above the threshold, else 0."""
    return (scores[:, 0] > threshold).astype(np.int64) if scores.shape[1] == 1 else np.argmax(scores, axis=1)


def _probabilities(scores, meaning):
    """Returns the probabilities of scores [n, K] in float64."""
    return scores if meaning.is_probability else FAMILIES[meaning.family](tf.constant(scores)).p.numpy()
