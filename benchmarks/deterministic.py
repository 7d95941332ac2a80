"""Measures what --deterministic costs: a training step with TensorFlow's deterministic operations against one without.

A process that has asked for them cannot go back, so each of the two is timed in a fresh process, one right
after the other; the last line gives the median of the paired ratios and their spread (10th and 90th percentile).

    python -m benchmarks.deterministic --network=small --image_size=8 --batch=64
    python -m benchmarks.deterministic --network=resnet50 --batch=8 --steps=5
"""

import argparse
import subprocess
import sys
import time

import numpy as np

from benchmarks.common import machine, spread


def seconds_a_step(arguments):
    """The median time of a step under L2-SP in this process, after two to warm up."""
    import keras
    import tensorflow as tf

    import l2sp_tf as l2sp
    from benchmarks.penalties import batch_of, compiled, step_of
    from l2sp_tf.models.zoo import backbone

    if arguments.contestant == "deterministic":
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(0)
    model = backbone(arguments.network, 100, image_size=arguments.image_size)
    l2sp.attach(model, l2sp.L2SP(0.1), l2sp.Anchors.of(model), params="all")
    step = step_of(compiled(model, jit_compile=False), *batch_of(model, arguments.batch))
    times = []
    for _ in range(arguments.steps + 2):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return float(np.median(times[2:]))


def measured(contestant, arguments):
    """What a fresh process measures."""
    options = [f"--{name}={value}" for name, value in vars(arguments).items() if name != "contestant"]
    command = [sys.executable, "-m", "benchmarks.deterministic", f"--contestant={contestant}", *options]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="small")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", choices=["deterministic", "default"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(seconds_a_step(arguments))
        return
    pairs = np.array([[measured(name, arguments) for name in ("default", "deterministic")] for _ in range(arguments.rounds)])
    print(f"{machine()}\n{arguments.network}, {arguments.image_size} pixels, batch {arguments.batch}, {arguments.rounds} pairs")
    print(f"deterministic over default: {spread(pairs[:, 1] / pairs[:, 0])}")


if __name__ == "__main__":
    main()
