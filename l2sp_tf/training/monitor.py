"""Logs of a training: TensorBoard scalars and a CSV file, separate from the loss."""

import contextlib
import csv
import math
import pathlib
import warnings

import keras
import numpy as np
import tensorflow as tf

from l2sp_tf.optimizers.proximal import Proximal, frozen_share
from l2sp_tf.optimizers.stepping import unscaled
from l2sp_tf.penalties.matching import match
from l2sp_tf.penalties.weights import first_not_finite, keyed_weights


class Monitor(keras.callbacks.Callback):
    """Logs cross-entropy, penalty, accuracy, learning rate and the distance to the anchors.

    Every `log_every` steps it writes one row to `<folder>/log.csv`. It writes the same scalars, and the distance of each
    layer, to `<folder>/tensorboard`. Cross-entropy and accuracy are means over the steps since the last row. The learning
    rate is that of the logged step. Penalty and distances are those of the weights after the step; so is, under `Proximal`,
    the share of anchored weights that are exactly on w0. The penalty is the sum of the regularizers of all trained
    weights, without losses that layers add for their outputs. If the log cannot be written, it warns once and training continues.

    Args:
        folder: where to write, replacing the log of an earlier run; None writes nothing and keeps the rows in `rows`.
        anchors: the pre-trained weights, or None for a training from scratch.
        log_every: steps between two rows.
        iterations: the last step, which is always logged.
        may_stop: whether other callbacks may stop the training at any step, which is then logged; reading each step's
            learning rate for this costs some milliseconds per step.
        validation: called with the model for each row, returns more numbers for it, such as "val_accuracy"; or None.
        metrics: those to read themselves, because they are weighted: Keras' logs average the means of several replicas.
    """

    def __init__(self, folder, anchors, *, log_every, iterations, may_stop=True, validation=None, metrics=()):
        super().__init__()
        self.folder = None if folder is None else pathlib.Path(folder)
        self.anchors, self.log_every, self.iterations, self.may_stop = anchors, log_every, iterations, may_stop
        self.validation, self.metrics = validation, metrics
        self._logged, self._step, self._learning_rate = [], 0, None
        self._writer = None

    @property
    def rows(self):
        """The rows so far, as dicts."""
        return [row for row, _ in self._logged]

    def state(self):
        """Returns the state for `restore`, as JSON values."""
        return {"logged": self._logged}

    def restore(self, step, state):
        """Restores the rows that were logged up to `step`, and continues from there."""
        self._step, self._logged = step, [tuple(pair) for pair in state["logged"]]

    def on_train_begin(self, logs=None):
        weights = {key: weight for key, weight in keyed_weights(self.model).items() if weight.variable.trainable}
        matches = match(weights, self.anchors or {}).pairs
        self._anchored = {key: (weights[key].variable, self.anchors[other]) for key, other in matches.items()}
        if self.folder is not None:
            with self._warned():
                self._open()
                for entry in self._logged:
                    self._write(*entry)

    def _is_logged(self, step):
        return step % self.log_every == 0 or step == self.iterations

    def on_train_batch_begin(self, batch, logs=None):
        if self.may_stop or self._is_logged(self._step + 1):
            self._learning_rate = float(self.model.optimizer.learning_rate)  # after the step it is the next step's rate

    def on_train_batch_end(self, batch, logs=None):
        self._step += 1
        if self._is_logged(self._step):
            self._log(logs)
            if self._step != self.iterations:  # Keras shows the metrics again at the end
                self.model.reset_metrics()

    def _log(self, logs):
        layers = {"distance_by_layer": self._distances()}
        logs = {**(logs or {}), **{metric.name: metric.result() for metric in self.metrics}}
        row = {
            "step": self._step,
            **{name: float(value) for name, value in logs.items() if name != "loss" and not name.startswith("val_")},
            **({} if self.validation is None else self.validation(self.model)),
            "penalty": float(sum(v.regularizer(v) for v in self.model.trainable_variables if v.regularizer is not None)),
            "learning_rate": self._learning_rate,
            "distance": math.sqrt(sum(d * d for d in layers["distance_by_layer"].values())),
        }
        shares = frozen_share(self.model) if isinstance(unscaled(self.model.optimizer), Proximal) else {}
        if shares:  # empty if no weight that is trained has an anchor
            row["frozen"] = shares.pop("all")
            layers["frozen_by_layer"] = shares
        self._logged.append((row, layers))
        if self._writer is not None:
            with self._warned():
                self._write(row, layers)

    def on_train_end(self, logs=None):
        is_logged = self._logged and self._logged[-1][0]["step"] == self._step
        if self._learning_rate is not None and not is_logged:  # a callback stopped the training
            self._log(logs)
        if self._writer is not None:
            self._file.close()
            self._writer.close()

    def rewrite(self, model):
        """Writes the restored rows if no training follows."""
        self.set_model(model)
        self.on_train_begin()
        self.on_train_end()

    @contextlib.contextmanager
    def _warned(self):
        """Turns a failed write into a warning, and stops logging to files."""
        try:
            yield
        except (OSError, tf.errors.OpError) as error:
            self._writer = None
            warnings.warn(f"The log in {self.folder} cannot be written ({error}); training continues without it.", stacklevel=3)

    def _open(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (self.folder / "tensorboard").glob("events.out.tfevents.*"):
            path.unlink()  # TensorBoard would show old points beside those of this run
        self._file = (self.folder / "log.csv").open("w", newline="", encoding="utf-8")
        self._csv = None
        self._writer = tf.summary.create_file_writer(str(self.folder / "tensorboard"))

    def _write(self, row, layers):
        if self._csv is None:
            self._csv = csv.DictWriter(self._file, list(row))
            self._csv.writeheader()
        self._csv.writerow(row)
        self._file.flush()
        with self._writer.as_default(step=row["step"]):
            for name, value in row.items():
                if name != "step":
                    tf.summary.scalar(name, value)
            for kind, values in layers.items():
                for layer, value in values.items():
                    tf.summary.scalar(f"{kind}/{layer}", value)
        self._writer.flush()

    def _distances(self):
        """Returns ||w - w0|| of each layer."""
        squares = {}
        for key, (variable, anchor) in self._anchored.items():
            layer = key.rsplit("/", 1)[0]
            squares[layer] = squares.get(layer, 0.0) + float(np.sum(np.square(variable.numpy() - anchor), dtype="float64"))
        return {layer: math.sqrt(square) for layer, square in squares.items()}


def write_histograms(folder, arrays):
    """Writes a TensorBoard histogram of log10 of each array's positive entries, named "fisher/<key>".

    Args:
        folder: where to write.
        arrays: a mapping from key to non-negative array, such as a `Fisher`.
    """
    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default(step=0):
        for key, array in arrays.items():
            tf.summary.histogram(f"fisher/{key}", np.log10(array[array > 0]))
    writer.close()


class FiniteLoss(keras.callbacks.Callback):
    """Stops a training if the loss is not finite, and names the step and the first weight that is not finite.

    Args:
        first_step: the number of steps before this training.

    Raises:
        FloatingPointError: the loss is not finite.
    """

    def __init__(self, first_step=0):
        super().__init__()
        self.first_step = first_step

    def on_train_batch_end(self, batch, logs=None):
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            key = first_not_finite(self.model)
            where = f"{key} is the first weight that is not finite" if key else "all weights are still finite"
            raise FloatingPointError(
                f"The loss is {float(loss)} after step {self.first_step + batch + 1}, and {where}: "
                "lower the learning rate or the strength."
            )
