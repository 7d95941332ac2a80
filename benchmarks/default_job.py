"""Measures where the time of the default `python train.py` goes.

The job runs once, in a fresh folder and a fresh process, as the command does; each part is timed where it is
called, without the parts that it calls itself. "Tracing and the first step" is from the start of a training
to the end of its first step, for the source model and all runs together. The first table is of the whole job; the
second shows, in a process each, how long the command takes to answer --help and to import what it needs.

    python -m benchmarks.default_job
    python -m benchmarks.default_job -- --jit_compile=on     # with other flags of train.py
"""

import argparse
import collections
import contextlib
import functools
import io
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from benchmarks.common import machine, table

TARGET = 180
ROOT = pathlib.Path(__file__).parents[1]
# Parts of the job: the module that calls, and the name by which it does.
PARTS = {
    "data: loading, decoding": [("starts", "load_dataset"), ("starts", "prepare")],
    "models: building, copying, attaching": [
        ("starts.zoo", "backbone"),
        ("training", "with_new_head"),
        ("training", "attach"),
        ("starts", "detached_copy"),
    ],
    "steps after the first": [("starts", "train_source"), ("runs", "finetune")],
    "accuracies": [("experiments", "evaluate"), ("experiments", "retention"), ("starts", "evaluate")],
    "R² of activations": [("experiments", "activation_r2")],
    "models: saving": [("training", "save_model"), ("starts", "_stored_anchors")],
}


class Clock:
    """Adds up the seconds of named parts; what runs inside another part counts for itself alone."""

    def __init__(self):
        self.seconds = collections.Counter()
        self._open, self._last = ["other"], time.perf_counter()

    def _turn(self):
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._last
        self._last = now

    def enter(self, part):
        """Begins a part inside the one that runs."""
        self._turn()
        self._open.append(part)

    def leave(self):
        """Ends the part that was begun last."""
        self._turn()
        self._open.pop()

    def timed(self, part, function):
        """The function, timed as a part."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return call


def profile(arguments):
    """Runs train.py with some flags in this process; a dict from part to seconds."""
    clock = Clock()
    clock.enter("imports")
    from l2sp_tf.cli import train
    from l2sp_tf.experiments import runner, runs, starts
    from l2sp_tf.training import trainer

    clock.leave()
    modules = {"experiments": runner, "runs": runs, "starts": starts, "starts.zoo": starts.zoo, "training": trainer}
    for part, places in PARTS.items():
        for module, name in places:
            setattr(modules[module], name, clock.timed(part, getattr(modules[module], name)))
    _time_first_steps(clock, trainer.Monitor)
    with contextlib.redirect_stdout(io.StringIO()):
        if status := train.main(arguments):
            raise SystemExit(status)
    clock.enter("end")
    return dict(clock.seconds)


def _time_first_steps(clock, monitor):
    """Times each training from its start to the end of its first step."""
    begin, end = monitor.on_train_begin, monitor.on_train_batch_end

    def on_train_begin(self, logs=None):
        clock.enter("tracing and the first step")
        self.is_first = True
        begin(self, logs)

    def on_train_batch_end(self, batch, logs=None):
        if self.is_first:
            clock.leave()
            self.is_first = False
        end(self, batch, logs)

    monitor.on_train_begin, monitor.on_train_batch_end = on_train_begin, on_train_batch_end


def seconds_of(*command):
    """How long a Python process takes."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}
    began = time.perf_counter()
    subprocess.run([sys.executable, *command], check=False, capture_output=True, env=environment, cwd=ROOT)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("flags", nargs="*", help="of train.py")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        found = profile([f"--workdir={folder}", *arguments.flags])
        total = time.perf_counter() - began
    print(machine())
    rows = [[part, f"{seconds:.1f}", f"{seconds / total:.0%}"] for part, seconds in sorted(found.items(), key=lambda x: -x[1])]
    print(table(["part of the job", "s", "share"], [*rows, [f"all, goal at most {TARGET} s", f"{total:.1f}", "100%"]]))
    starts = {
        "train.py --help": ("train.py", "--help"),
        "import keras": ("-c", "import keras"),
        "import all that a run needs": ("-c", "import l2sp_tf.experiments.runner, l2sp_tf.reports.tables"),
    }
    print("\n" + table(["process", "s"], [[name, f"{seconds_of(*command):.2f}"] for name, command in starts.items()]))


if __name__ == "__main__":
    main()
