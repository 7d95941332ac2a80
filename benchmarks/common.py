"""What the benchmarks share: paired times, their ratios, and the machine they were measured on."""

import os
import pathlib
import platform
import time
from importlib import metadata

import numpy as np


def paired_times(steps, rounds, warm_up=2):
    """The times of each step, in seconds: an array [rounds, steps] after some rounds of warming up.

    Each round runs every step once and starts with another one, so that none always follows the same.
    """
    times = np.empty((warm_up + rounds, len(steps)))
    for row, start in zip(times, range(warm_up + rounds), strict=True):
        for offset in range(len(steps)):
            place = (start + offset) % len(steps)
            began = time.perf_counter()
            steps[place]()
            row[place] = time.perf_counter() - began
    return times[warm_up:]


def spread(ratios, digits=3):
    """The median of some ratios with their 10th and 90th percentile, as text: "1.010 [1.002, 1.020]"."""
    low, middle, high = np.percentile(ratios, [10, 50, 90])
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table(header, rows):
    """A Markdown table, as text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def machine(packages=("tensorflow", "keras", "torch", "torchvision", "jax")):
    """The processor, its cores, and the versions of what is installed here, as one line of text."""
    versions = [f"{name} {metadata.version(name)}" for name in packages if _installed(name)]
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores; Python {platform.python_version()}, {', '.join(versions)}"


def _processor():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _installed(name):
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False
