"""Where a result comes from: the code, the machine, the command and the time."""

import datetime
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import sys
from importlib import metadata

import tensorflow as tf

# Part of the keys of runs, source models and Fisher diagonals. Raise it with every change after which equal settings may
# give other results, such as a bug fix: then no older result is reused in place of a new one.
RESULTS_VERSION = 2


def provenance():
    """Returns code, versions, machine, command and time as a dict for a record."""
    return {
        "code": {"version": _version(), "results": RESULTS_VERSION, "digest": source_digest()},
        "versions": versions(),
        "machine": machine(),
        "command": shlex.join([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version():
    try:
        return metadata.version("l2sp-tf")
    except metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def source_digest():
    """Returns sixteen hexadecimal digits of a hash of the package's source: equal digests, equal code."""
    root = pathlib.Path(__file__).parents[1]
    sha = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        sha.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes() + b"\0")
    return sha.hexdigest()[:16]


def versions():
    """Returns the versions of the libraries that a result depends on."""
    found = {name: metadata.version(name) for name in ("keras", "numpy", "tensorflow")}
    return {**found, "python": platform.python_version()}


def machine():
    """Returns the device that computes, the number of processors and the architecture."""
    gpus = tf.config.list_physical_devices("GPU")
    names = [tf.config.experimental.get_device_details(gpu).get("device_name", "GPU") for gpu in gpus]
    return {"device": ", ".join(names) or "CPU", "processors": os.cpu_count(), "architecture": platform.machine()}
