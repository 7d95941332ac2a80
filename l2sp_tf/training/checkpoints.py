"""Checkpoints of a run: written whole or not at all, and resumed to the bit."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
import signal
import tempfile
import threading
import time
import warnings

import filelock
import keras

from l2sp_tf.files.arrays import load_arrays, save_arrays
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.plain import flat
from l2sp_tf.files.provenance import versions
from l2sp_tf.files.reading import read_json
from l2sp_tf.files.writing import sha256_of_file, sync_folder, write_text
from l2sp_tf.penalties.assignment import finish
from l2sp_tf.penalties.weights import first_not_finite

FORMAT = "l2sp_tf.checkpoint.v1"
ARRAYS, STATE, MANIFEST = "arrays.safetensors", "state.json", "manifest.json"
UNFINISHED = ".part-"


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """The state saved after a step: arrays by name, and a dict with the rest of what the run needs."""

    step: int
    arrays: dict
    state: dict


class Checkpoints:
    """The checkpoints of one run, in folders `step-<number>`; only the newest few are kept.

    `save` writes a checkpoint to a folder of another name: its files one by one, and the manifest with their checksums
    last. Then it renames the folder. A checkpoint that a crash left unfinished is never read, and the next `save`
    removes it. The newest checkpoint is the one with the largest number in its name, whatever the clock says.

    Args:
        folder: where they are; created by the first `save`.
        keep: how many to keep.
    """

    def __init__(self, folder, keep=2):
        self.folder, self.keep = pathlib.Path(folder), keep

    @property
    def newest(self):
        """The step of the newest checkpoint, damaged or not; 0 if there is none."""
        return next(iter(self._steps()), 0)

    def save(self, step, arrays, state):
        """Writes a checkpoint, and removes those older than the last `keep`.

        Args:
            step: the number of finished steps.
            arrays: a mapping from name to NumPy array.
            state: JSON values.

        Raises:
            OSError: the disk is full or cannot be written; earlier checkpoints stay.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        part = pathlib.Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.folder))
        try:
            save_arrays(part / ARRAYS, arrays, FORMAT, {})
            write_text(part / STATE, json.dumps({"format": FORMAT, "step": step, "state": state}))
            write_text(part / MANIFEST, json.dumps({name: sha256_of_file(part / name) for name in (ARRAYS, STATE)}))
            sync_folder(part)
            final = self._path(step)
            _remove(final)  # a damaged one of the same step
            part.replace(final)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        for old in self._steps()[self.keep :]:
            with contextlib.suppress(OSError):  # a failed removal does not harm the new one
                _remove(self._path(old))

    def load(self):
        """Returns the newest checkpoint that agrees with its manifest, or None; warns of damaged ones and skips them."""
        for step in self._steps():
            try:
                return self._read(step)
            except (OSError, InputError) as error:
                warnings.warn(f"The checkpoint {self._path(step)} is skipped: {error}", stacklevel=2)
        return None

    def remove(self, keep=0):
        """Removes unfinished checkpoints and all but the newest `keep`; with keep=0 the folder too."""
        if self.folder.is_dir():
            self._sweep()
            for step in self._steps()[keep:]:
                _remove(self._path(step))
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def _path(self, step):
        return self.folder / f"step-{step:010d}"

    def _steps(self):
        """Lists the steps of the complete checkpoints, the newest first."""
        names = (path.parent.name.removeprefix("step-") for path in self.folder.glob(f"step-*/{MANIFEST}"))
        return sorted((int(name) for name in names if name.isascii() and name.isdigit()), reverse=True)

    def _sweep(self):
        for path in self.folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.folder.glob("step-*"):
            if not (path / MANIFEST).exists():  # its removal was cut off
                shutil.rmtree(path, ignore_errors=True)

    def _read(self, step):
        path = self._path(step)
        manifest = read_json(path / MANIFEST, f"{MANIFEST} is damaged")
        if manifest != {name: sha256_of_file(path / name) for name in (ARRAYS, STATE)}:
            raise InputError("its files differ from the sha256 in the manifest.")
        content = read_json(path / STATE, f"{STATE} is damaged")
        if not isinstance(content, dict) or content.keys() != {"format", "step", "state"}:
            raise InputError(f"{STATE} lacks a part.")
        if content["format"] != FORMAT or content["step"] != step or not isinstance(content["state"], dict):
            raise InputError(f"{STATE} is not that of step {step} in the format {FORMAT}.")
        return Checkpoint(step, load_arrays(path / ARRAYS, FORMAT, "not a checkpoint", "Checkpoints.save")[0], content["state"])


class Checkpointing(keras.callbacks.Callback):
    """Saves everything that a run needs to resume as if it had never stopped, and restores it.

    That is all variables of the model, the optimizer and the metrics, random seeds included, and the log of `monitor`.
    A checkpoint never holds weights that are not finite. If a save fails, training continues with a warning.

    If another callback stops a training, the training is over, and its last checkpoint says so in `stopped_at`.

    Until `keep` is called, it only checks the weights after the last step.

    Args:
        monitor: has `state()` and `restore(step, state)`.
        metrics: those given to `compile`.
        iterations: the last step.

    Raises:
        FloatingPointError: the weights to save are not finite.
        InputError: the data ended before the last step.
    """

    def __init__(self, monitor, metrics, iterations):
        super().__init__()
        self.monitor, self.metrics, self.iterations = monitor, metrics, iterations
        self.checkpoints, self.identity, self.every, self.stops, self.writes = None, {}, 0, (), False
        self.step, self._found = 0, None
        self.stopped_at = None
        self._seconds, self._began = 0.0, None

    def keep(self, checkpoints, identity, every, stops=(), writes=True):
        """Sets where and when to save checkpoints.

        Args:
            checkpoints: a `Checkpoints`.
            identity: a dict that identifies this run; a checkpoint with another identity is refused.
            every: steps between two checkpoints; 0 saves after the last step only.
            stops: a list; training stops after the step in which something is put there (see `deferred_signals`).
            writes: whether this process writes; of several processes that train one model, one does.
        """
        self.checkpoints, self.identity, self.every, self.stops, self.writes = checkpoints, identity, every, stops, writes

    def restore(self, model):
        """Restores the newest checkpoint into a compiled model with a built optimizer, and returns the number of finished steps.

        Raises:
            InputError: the checkpoint is of another run; the message lists all differences.
        """
        found = self.checkpoints and self.checkpoints.load()
        if found is None:
            return 0
        self._refuse_another_run(found)
        variables = _variables(model, self.metrics)
        shapes = {name: array.shape for name, array in found.arrays.items()}
        if shapes != {name: tuple(variable.shape) for name, variable in variables.items()}:
            raise InputError(
                f"The checkpoint of step {found.step} in {self.checkpoints.folder} holds other variables than the model, "
                "its optimizer and metrics have: give another folder, or remove this one."
            )
        for name, variable in variables.items():
            variable.assign(found.arrays[name])
        finish(model._flatten_layers())
        try:
            self.monitor.restore(found.step, found.state["monitor"])
            self._seconds = float(found.state["seconds"])
            self.stopped_at = found.state.get("stopped_at")
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"The checkpoint of step {found.step} in {self.checkpoints.folder} lacks its log: remove that one."
            ) from error
        self.step, self._found = found.step, found
        return found.step

    def _refuse_another_run(self, found):
        if differences := _differences(found.state.get("identity"), self.identity):
            raise InputError(
                f"The checkpoint of step {found.step} in {self.checkpoints.folder} is of another run "
                f"({'; '.join(differences)}): resume with the settings that it began with, give another folder, or remove this "
                "one."
            )
        if changes := "; ".join(_differences(found.state.get("versions"), versions())):
            warnings.warn(f"The run resumes, but may not end in the same bits as without a stop: {changes}.", stacklevel=3)

    @property
    def seconds(self):
        """Training time so far in seconds, summed over all interrupted attempts, without the steps that interruptions lost."""
        return self._seconds + (0.0 if self._began is None else time.monotonic() - self._began)

    def on_train_begin(self, logs=None):
        self._began = time.monotonic()

    def on_train_end(self, logs=None):
        self._seconds, self._began = self.seconds, None
        if self.step < self.iterations and not self.model.stop_training:
            raise InputError(
                f"The data ended after step {self.step} of {self.iterations}, although they are repeated: give a stream that can "
                "be read again, or fewer iterations."
            )
        if 0 < self.step < self.iterations and not self.stops:  # a callback stopped it
            self.stopped_at = self.step
            self._save()

    def on_epoch_begin(self, epoch, logs=None):
        if self._found is not None:  # Keras has just reset the metrics
            for name, variable in _variables(None, self.metrics).items():
                variable.assign(self._found.arrays[name])
            self._found = None

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        if self.step == self.iterations or self.stops or (self.every and self.step % self.every == 0):
            self._save()
        self.model.stop_training |= bool(self.stops)

    def _save(self):
        if (key := first_not_finite(self.model)) is not None:
            raise FloatingPointError(
                f"The weights are not finite after step {self.step}, first {key}: lower the learning rate or the strength."
            )
        if self.checkpoints is None:
            return
        # in every process, because reading a metric sums it over all of them
        arrays = {name: variable.numpy() for name, variable in _variables(self.model, self.metrics).items()}
        if not self.writes:
            return
        state = {
            "identity": self.identity,
            "versions": versions(),
            "monitor": self.monitor.state(),
            "seconds": self.seconds,
            "stopped_at": self.stopped_at,
        }
        try:
            self.checkpoints.save(self.step, arrays, state)
        except OSError as error:
            warnings.warn(f"The checkpoint of step {self.step} could not be saved ({error}); training continues.", stacklevel=2)


@contextlib.contextmanager
def locked(folder):
    """Locks a folder for this process, until the block or the process ends.

    Raises:
        InputError: another process, or another run in this process, holds the lock.
        OSError: the folder cannot be written.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise InputError(f"Another run is at work in {folder}: wait until it ends, or give another folder.") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def deferred_signals():
    """Yields a list that receives the first SIGINT or SIGTERM; the signal takes its usual effect when the block ends.

    A second signal takes effect at once. The list stays empty outside the main thread, where signals cannot be caught, and for
    signals that the process ignores.
    """
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None: not set from Python. Ignored signals stay ignored, such as Ctrl-C in a process that a script starts with &.
    previous = {number: handler for number, handler in previous.items() if handler not in (None, signal.SIG_IGN)}

    def restore():
        for number, handler in previous.items():
            signal.signal(number, handler)

    def remember(number, frame):
        caught.append(signal.Signals(number))
        restore()

    for number in previous:
        signal.signal(number, remember)
    try:
        yield caught
    finally:
        restore()
    if caught:
        signal.raise_signal(caught[0])
        raise SystemExit(128 + caught[0])  # if the handler returns, the partial run must not pass for a whole one


def _variables(model, metrics):
    """Returns all variables by their names in a checkpoint; without a model, only those of the metrics.

    Names are numbers, because Keras names a layer differently after earlier layers of its kind in the same process.
    """
    owners = {"metrics": [variable for metric in metrics for variable in metric.variables]}
    if model is not None:
        owners |= {"model": model.variables, "optimizer": model.optimizer.variables}
    return {f"{owner}/{i}": variable for owner, variables in owners.items() for i, variable in enumerate(variables)}


def _differences(before, now):
    """Lists the differences between two nested dicts, as "recipe.momentum was 0.9 and is 0.5"."""
    before, now = ({name: json.dumps(value) for name, value in flat(side)} for side in (before, now))
    values = {key: (before.get(key, "not given"), now.get(key, "not given")) for key in before | now}
    return [f"{key} was {one} and is {two}" for key, (one, two) in values.items() if one != two]


def _remove(path):
    """Removes a checkpoint; at no moment does a part of it look complete."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
