"""Measures the value and the gradient of each penalty alone, from a million weights to hundreds of millions.

The weights are kernels of 3 x 3 x 512 x 512 as in the last stage of a ResNet (one smaller one for the smallest size). Bytes are
counted as the least that must move: w, w0 and F_jj read once each, and the gradient written once. Their
rate is given as a share of the rate at which this machine copies memory (bytes read and written, NumPy, a
thread a core). Sizes that do not fit into the free memory are left out.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --sizes=1,10,100,500 --penalties=l2_sp
"""

import argparse
import concurrent.futures
import math
import os
import pathlib
import time

import keras
import numpy as np
import tensorflow as tf

from benchmarks.common import machine, paired_times, table
from l2sp_tf.penalties.formulas import PENALTIES, AnchoredPenalty, FisherPenalty

TARGET = 0.6
KERNEL = (3, 3, 512, 512)


def copy_rate(megabytes=512, rounds=7):
    """Bytes a second that all cores together read and write when they copy memory: the best of some rounds."""
    source, target = np.ones(megabytes * 2**17), np.zeros(megabytes * 2**17)
    cores = len(os.sched_getaffinity(0))
    parts = list(zip(np.array_split(target, cores), np.array_split(source, cores), strict=True))
    times = []
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for _ in range(rounds):
            began = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), parts))
            times.append(time.perf_counter() - began)
    return 2 * source.nbytes / min(times)


def shapes_of(millions):
    """Shapes of kernels that hold about so many million weights."""
    count = round(millions * 1e6 / math.prod(KERNEL))
    return [KERNEL] * count if count else [(3, 3, 512, round(millions * 1e6 / (9 * 512)))]


def penalty_step(symbol, weights):
    """A function that computes the value and the gradients of a penalty on some variables; and the least bytes that takes."""
    cls = PENALTIES[symbol]
    penalties = []
    for weight in weights:
        arrays = {"anchor": np.zeros(weight.shape, "float32")} if issubclass(cls, AnchoredPenalty) else {}
        arrays |= {"fisher": np.ones(weight.shape, "float32")} if issubclass(cls, FisherPenalty) else {}
        penalties.append(cls(0.1, **arrays))

    @tf.function(autograph=False)
    def step():
        with tf.GradientTape() as tape:
            value = tf.add_n([penalty(weight) for penalty, weight in zip(penalties, weights, strict=True)])
        return value, tape.gradient(value, [weight.value for weight in weights])

    tensors = 2 + len(arrays)  # w and its gradient, w0, F_jj
    return lambda: float(step()[0]), 4 * tensors * sum(math.prod(weight.shape) for weight in weights)


def tensors_of(symbol):
    """How many tensors like the weights a penalty's step may hold beside them: w0, F_jj, the gradient and what lies between."""
    return 3 + issubclass(PENALTIES[symbol], AnchoredPenalty) + issubclass(PENALTIES[symbol], FisherPenalty)


def free_bytes():
    """Memory that this process could still take."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="1,10,100,250,500", help="millions of weights")
    parser.add_argument("--penalties", default=",".join(PENALTIES))
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rate = copy_rate()
    print(f"{machine()}\ncopying memory: {rate / 1e9:.1f} GB/s, {arguments.rounds} rounds")
    symbols, rows = arguments.penalties.split(","), []
    for millions in map(float, arguments.sizes.split(",")):
        if 2 * 4e6 * millions > free_bytes():
            print(f"{millions:g} million weights: left out, as they do not fit into the free memory")
            continue
        weights = [keras.Variable(np.full(shape, 0.01, "float32")) for shape in shapes_of(millions)]
        number = sum(math.prod(weight.shape) for weight in weights)
        for symbol in symbols:
            if tensors_of(symbol) * 4 * number > 0.8 * free_bytes():
                print(f"{symbol}, {millions:g} million weights: left out, as it does not fit into the free memory")
                continue
            step, moved = penalty_step(symbol, weights)
            seconds = np.median(paired_times([step], arguments.rounds))
            share = moved / seconds / rate
            rows.append([symbol, f"{number / 1e6:.1f}", f"{1e3 * seconds:.2f}", f"{1e9 * seconds / number:.2f}", f"{share:.0%}"])
    header = ["penalty", "million weights", "ms", "ns a weight", f"share of the copying rate, goal {TARGET:.0%}"]
    print(table(header, sorted(rows, key=lambda row: symbols.index(row[0]))))


if __name__ == "__main__":
    main()
