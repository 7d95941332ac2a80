"""Runs the benchmarks in turn and keeps what they print in benchmarks/RESULTS.md.

    python -m benchmarks.results                      # all of them, about 40 minutes on two quiet cores
    python -m benchmarks.results --only=penalties     # one of them; the other sections stay as they are

A benchmark is a section of the file, with its command, its date and all that it printed, the machine
included. It is written as soon as it has ended, so that --only completes an interrupted call.
"""

import argparse
import datetime
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import time

from l2sp_tf.files.writing import write_text

PATH = pathlib.Path(__file__).with_name("RESULTS.md")
TITLE = """# What the benchmarks measured

Written by `python -m benchmarks.results`; each section says when and on which machine. Ratios are medians of paired
measurements, with the 10th and the 90th percentile.
"""
# The arguments of each run of a benchmark; several are sections of one name.
BENCHMARKS = {
    "penalties": [
        ["penalties", "--network=resnet50", "--batch=16", "--rounds=11"],
        ["penalties", "--network=resnet101", "--batch=16", "--rounds=3", "--penalties=l2_sp,gl_sp_fisher"],
        ["penalties", "--network=resnet50", "--batch=64", "--rounds=3", "--penalties=l2_sp,gl_sp_fisher"],
        ["penalties", "--network=resnet101", "--batch=64", "--rounds=3", "--penalties=l2_sp,gl_sp_fisher"],
        ["penalties", "--network=small", "--image_size=8", "--batch=64", "--rounds=1000"],
    ],
    "batch_norm": [
        ["batch_norm", "--network=resnet50", "--batch=16", "--rounds=9"],
        ["batch_norm", "--network=small", "--image_size=32", "--batch=64", "--rounds=100"],
        ["batch_norm", "--network=small", "--image_size=8", "--batch=64", "--rounds=300"],
    ],
    "memory": [["memory"]],
    "scaling": [
        ["scaling", "--rounds=5"],
        *(["scaling", "--rounds=5", "--sizes=500", f"--penalties={name}"] for name in ("l1_sp", "gl_sp", "gl_sp_fisher")),
    ],
    "against_pytorch": [["against_pytorch"], ["against_pytorch", "--settings", "--rounds=5"]],
    "default_job": [["default_job"]],
    "deterministic": [
        ["deterministic", "--image_size=8"],
        ["deterministic", "--network=resnet50", "--batch=8", "--steps=5", "--rounds=3"],
    ],
    "cost": [["cost"]],
    "fisher": [["fisher", "--network=cifar", "--rounds=8"], ["fisher", "--network=resnet50", "--rounds=4"]],
    "input_pipeline": [["input_pipeline", "--rounds=2", "--copies=5"]],
}
NEEDS = {"against_pytorch": ["torch", "torchvision"]}


def measured(runs):
    """A section's text: each command with what it printed."""
    parts = []
    for name, *arguments in runs:
        command = ["-m", f"benchmarks.{name}", *arguments]
        began = time.monotonic()
        environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
        result = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True, env=environment)
        when = f"{datetime.date.today()}, {time.monotonic() - began:.0f} s"
        parts.append(f"`python {' '.join(command)}` ({when})\n\n{_paragraphs(result.stdout)}\n")
    return "\n".join(parts)


def _paragraphs(text):
    """What a benchmark printed as Markdown: its tables as they are, and each other line a paragraph of its own."""
    blocks = [[]]
    for line in filter(None, text.splitlines()):
        if not (line.startswith("|") and blocks[-1] and blocks[-1][-1].startswith("|")):
            blocks.append([])
        blocks[-1].append(line)
    return "\n\n".join("\n".join(block) for block in blocks if block)


def sections(text):
    """The sections of a results file: a dict from name to text."""
    parts = re.split(r"^## (\w+)\n\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def joined(found):
    """A results file of some sections, in the order of BENCHMARKS."""
    return "\n".join([TITLE, *(f"## {name}\n\n{found[name].rstrip()}\n" for name in BENCHMARKS if name in found)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(BENCHMARKS), help="names of benchmarks, with commas between")
    names = parser.parse_args().only.split(",")
    if unknown := [name for name in names if name not in BENCHMARKS]:
        parser.error(f"unknown benchmark {unknown[0]}: give some of {', '.join(BENCHMARKS)}")
    failed = []
    for name in names:
        if missing := [package for package in NEEDS.get(name, []) if not importlib.util.find_spec(package)]:
            print(f"{name}: skipped, as {missing[0]} is not installed")
            continue
        print(f"{name}: running", flush=True)
        try:
            text = measured(BENCHMARKS[name])
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: failed, {error}")
            continue
        found = sections(PATH.read_text(encoding="utf-8")) if PATH.exists() else {}
        write_text(PATH, joined({**found, name: text}))
    if failed:
        raise SystemExit(f"error: {', '.join(failed)} failed; run them again with --only={','.join(failed)}")


if __name__ == "__main__":
    main()
