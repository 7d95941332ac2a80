"""Measures a pass of the Fisher diagonal against one gradient of the same batch.

A gradient is one forward and one backward pass of the cross-entropy with respect to all trainable
weights, in a tf.function, without an optimizer. A pass is all that `fisher_diagonal` does for a
batch, the sums in float64 included. Both take turns in one process; the last lines give the
median of the paired ratios and their spread (10th and 90th percentile).

    python -m benchmarks.fisher --network=cifar --rounds=20
    python -m benchmarks.fisher --network=resnet50 --rounds=8
    python -m benchmarks.fisher --network=cifar --backpack      # needs torch and backpack-for-pytorch
    python -m benchmarks.fisher --network=cifar --memory        # peak memory, measured and by the formula of fisher_diagonal
"""

import argparse
import copy
import math
import multiprocessing
import resource

import keras
import numpy as np
import tensorflow as tf

from benchmarks.common import machine, paired_times
from l2sp_tf.fisher import estimator

TARGETS = {"rademacher": 1.3, "mc": 1.3, "exact": 0.8}


def cifar_resnet(depth=20, classes=10):
    """A ResNet of basic blocks of 16, 32 and 64 channels for images of 32 x 32, with a Dense head that gives logits."""

    def unit(x, filters, strides, relu=True):
        x = keras.layers.Conv2D(filters, 3, strides, "same", use_bias=False)(x)
        x = keras.layers.BatchNormalization()(x)
        return keras.layers.ReLU()(x) if relu else x

    inputs = keras.Input((32, 32, 3))
    x = unit(inputs, 16, 1)
    for filters in (16, 32, 64):
        for block in range((depth - 2) // 6):
            strides = 2 if filters > 16 and block == 0 else 1
            skip = x
            if strides == 2:
                skip = keras.layers.BatchNormalization()(keras.layers.Conv2D(filters, 1, 2, use_bias=False)(x))
            x = unit(unit(x, filters, strides), filters, 1, relu=False)
            x = keras.layers.ReLU()(keras.layers.Add()([x, skip]))
    return keras.Model(inputs, keras.layers.Dense(classes)(keras.layers.GlobalAveragePooling2D()(x)))


def network(name):
    """(model, images of one batch, whether the model gives logits)."""
    if name == "cifar":
        return cifar_resnet(), np.random.default_rng(0).normal(size=(64, 32, 32, 3)).astype("float32"), True
    images = np.random.default_rng(0).normal(size=(8, 224, 224, 3)).astype("float32")
    return keras.applications.ResNet50(weights=None), images, False


def gradient_step(model, images, from_logits):
    """A function that computes one gradient of the batch."""
    weights = [variable.value for variable in model.trainable_variables]
    labels = tf.constant(np.arange(len(images)) % model.output_shape[-1])
    x = tf.constant(images)

    @tf.function(autograph=False)
    def gradient(x, labels):
        with tf.GradientTape() as tape:
            losses = keras.losses.sparse_categorical_crossentropy(labels, model(x, training=False), from_logits=from_logits)
            loss = tf.reduce_mean(losses)
        return tape.gradient(loss, weights)

    return lambda: gradient(x, labels)[-1].numpy()


def fisher_step(model, images, mode, **arguments):
    """A function that does what `fisher_diagonal` does for one batch."""
    one = estimator._Estimator(model, mode, 1, 0, None, False, **arguments)
    sums = estimator._Sums(one.weights)
    x = tf.constant(images)

    def step():
        sums.add(len(images), one(x, 0))
        sums.statistics()

    return step


def predicted_bytes(model, batch, columns):
    """Peak memory of a pass beside the model, by the formula in the docstring of `fisher_diagonal`."""
    outputs = sum(math.prod(layer.output.shape[1:]) * (1 + columns * bool(layer.weights)) for layer in model.layers)
    largest = 0
    for layer in model.layers:
        if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense)):
            *positions, filters = layer.output.shape[1:]
            p, channels = math.prod(positions), layer.input.shape[-1]
            largest = max(largest, p * channels + columns * (2 * p * filters + 2 * channels * filters))
    return 4 * (batch * (outputs + largest) + 4 * model.count_params())


def measure_memory(name, mode, results):
    """Puts (growth of this process's peak memory, prediction) of a pass into `results`; for a process of its own."""
    model, images, from_logits = network(name)
    fisher_step(model, images[:1], mode)()  # what tracing takes is not the pass's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    step = fisher_step(model, images, mode)
    for _ in range(3):
        step()
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    columns = estimator.MOST_COLUMNS if mode == "exact" else 1  # the gradients of these networks fit into GRADIENT_BYTES
    results.put((growth, predicted_bytes(model, len(images), columns)))


def backpack_steps(modes, images, classes=10):
    """The gradient and the passes of BackPACK on the network of `cifar_resnet`, in PyTorch on the same number of threads."""
    import backpack
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, before, filters, strides):
            super().__init__()
            self.body = nn.Sequential(*unit(before, filters, strides), nn.ReLU(), *unit(filters, filters, 1))
            self.skip = nn.Sequential(*unit(before, filters, strides, 1)) if strides == 2 else None
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.body(x) + (x if self.skip is None else self.skip(x)))

    def unit(before, filters, strides, kernel=3):
        return nn.Conv2d(before, filters, kernel, strides, kernel // 2, bias=False), nn.BatchNorm2d(filters)

    blocks = [Block(f // s, f, s) for f in (16, 32, 64) for s in (1 if f == 16 else 2, 1, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)]
    plain = nn.Sequential(*unit(3, 16, 1), nn.ReLU(), *blocks, *head).eval()
    x, labels = torch.tensor(images.transpose(0, 3, 1, 2).copy()), torch.arange(len(images)) % classes
    plain_loss = nn.CrossEntropyLoss()

    def gradient():
        torch.autograd.grad(plain_loss(plain(x), labels), list(plain.parameters()))

    net = backpack.extend(copy.deepcopy(plain), use_converter=True).eval()
    loss = backpack.extend(nn.CrossEntropyLoss())
    extensions = {"mc": lambda: backpack.extensions.DiagGGNMC(mc_samples=1), "exact": backpack.extensions.DiagGGNExact}

    def step(mode):
        def run():
            net.zero_grad()
            with backpack.backpack(extensions[mode]()):
                loss(net(x), labels).backward()

        return run

    return [gradient, *(step(mode) for mode in modes)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=("cifar", "resnet50"), default="cifar")
    parser.add_argument("--modes", default="rademacher,mc,exact")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--backpack", action="store_true", help="also measure BackPACK (PyTorch) on the same architecture")
    parser.add_argument("--memory", action="store_true", help="measure peak memory instead of time")
    arguments = parser.parse_args()
    if arguments.memory:
        for mode in arguments.modes.split(","):
            results = multiprocessing.get_context("spawn").Queue()
            child = multiprocessing.get_context("spawn").Process(target=measure_memory, args=(arguments.network, mode, results))
            child.start()
            growth, prediction = results.get()
            child.join()
            print(f"{mode}: peak grew by {growth / 2**20:.0f} MiB, formula {prediction / 2**20:.0f}: {growth / prediction:.2f}")
        return
    model, images, from_logits = network(arguments.network)
    modes = arguments.modes.split(",")
    if arguments.network == "resnet50" and "exact" in modes:
        modes.remove("exact")  # 999 backward passes
    steps = [gradient_step(model, images, from_logits), *(fisher_step(model, images, mode) for mode in modes)]
    times = paired_times(steps, arguments.rounds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(machine())
    print(f"{arguments.network}, batch {len(images)}, peak memory of the process {peak:.2f} GiB")
    report("l2sp_tf", modes, times, model.output_shape[-1])
    if arguments.backpack:  # after ours, not in turns with it: the two frameworks' thread pools disturb each other
        modes = [mode for mode in modes if mode != "rademacher"]
        report("BackPACK", modes, paired_times(backpack_steps(modes, images), arguments.rounds), model.output_shape[-1])


def report(library, modes, times, classes):
    """Prints the median time of the gradient and of each mode, and the ratios: median [10th, 90th percentile]."""
    print(f"{library} gradient: {1e3 * np.median(times[:, 0]):.1f} ms")
    for mode, column in zip(modes, times.T[1:], strict=True):
        exact = mode == "exact"
        low, middle, high = np.percentile(column / times[:, 0] / (classes if exact else 1), [10, 50, 90])
        unit = "gradients a class" if exact else "gradients"
        spread = f"{middle:.2f} [{low:.2f}, {high:.2f}] {unit}"
        print(f"{library} {mode}: {1e3 * np.median(column):.1f} ms, {spread}, target {TARGETS[mode]}")


if __name__ == "__main__":
    main()
