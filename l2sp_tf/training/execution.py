"""How a run is executed: its folder, its devices and its output. None of it changes the result."""

import dataclasses
import functools
import pathlib

from l2sp_tf.files import fields
from l2sp_tf.training.checkpoints import Checkpoints
from l2sp_tf.training.devices import Devices

CHECKPOINT_EVERY = 500  # steps


@dataclasses.dataclass(frozen=True, eq=False)
class Execution:
    """How a run is executed.

    Attributes:
        run_dir: a folder for the log, TensorBoard, checkpoints, `anchors.safetensors` and `model.keras`;
            None writes nothing.
        save: whether to write `model.keras` to `run_dir`.
        checkpoint_every: steps between two checkpoints; 0 saves after the last step only.
        strategy: the devices to train on, from `devices.make_strategy`; None for one device. On several machines, call the
            function on each; the first writes `run_dir`.
        jit_compile: whether XLA compiles the step, as in Keras' `compile`: True, False or "auto".
        callbacks: more Keras callbacks; checkpoints do not hold their state. If one of them stops a run, the run is over:
            it has its log, its checkpoint and its model, and the same call does not resume it.
        verbose: as in Keras' `fit`: 1 shows a progress bar with the time left.

    Raises:
        InputError: `checkpoint_every` is not a whole number from 0 on.
    """

    run_dir: pathlib.Path | str | None = None
    save: bool = True
    checkpoint_every: int = CHECKPOINT_EVERY
    strategy: object = None
    jit_compile: bool | str = "auto"
    callbacks: tuple = ()
    verbose: int = 1

    def __post_init__(self):
        fields.whole("checkpoint_every", self.checkpoint_every, 0)
        object.__setattr__(self, "callbacks", tuple(self.callbacks))
        object.__setattr__(self, "run_dir", None if self.run_dir is None else pathlib.Path(self.run_dir))

    def for_head(self):
        """Returns the execution of the phase that trains the head alone: in a folder of its own, without the callbacks."""
        folder = None if self.run_dir is None else self.run_dir / "head"
        return dataclasses.replace(self, run_dir=folder, save=False, callbacks=())

    @functools.cached_property
    def devices(self):
        """The `Devices` to train on."""
        return Devices(self.strategy)

    @functools.cached_property
    def checkpoints(self):
        """The `Checkpoints` in the folder; None if nothing is written."""
        return None if self.run_dir is None else Checkpoints(self.run_dir / "checkpoints")

    @property
    def writes(self):
        """Whether this process writes to the folder: on several machines only the first does."""
        return self.run_dir is not None and self.devices.is_chief

    @property
    def may_stop(self):
        """Whether one of the callbacks may stop the training."""
        return any(getattr(callback, "may_stop", True) for callback in self.callbacks)

    def say(self, line):
        """Prints a line unless the run is quiet."""
        if self.verbose:
            print(line)
