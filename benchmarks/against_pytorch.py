"""Measures fine-tuning ResNet-50 with L2-SP against the usual loop in PyTorch on torchvision's ResNet-50.

The architecture is the same (`resnet50_torch`), and so are batch, cores and optimizer (SGD with momentum).
PyTorch's loss is the cross-entropy and the sum over all parameters but the head's of alpha / 2 ||w - w0||^2,
written as it usually is, with the tensors in either layout; the faster one of each round counts. Each
contestant lives in a process of its own; they take turns on one batch, so that reading images, which
benchmarks.input_pipeline measures, is left out. The last lines give the median of the paired ratios and
their spread (10th and 90th percentile).

    python -m benchmarks.against_pytorch
    python -m benchmarks.against_pytorch --settings      # ours under other threads, without oneDNN, ...

The first step, from the start of the process with imports, building and tracing, is measured separately.
"""

import argparse
import multiprocessing
import os
import time

import numpy as np

from benchmarks.common import machine, spread, table

TARGET = 1.0
CLASSES, ALPHA = 120, 0.1
# The environment of each way to run ours, and the arguments of `our_step`.
OURS = {
    "l2sp_tf": ({}, {}),
    "l2sp_tf, one thread between operations": ({"TF_NUM_INTEROP_THREADS": "1"}, {}),
    "l2sp_tf, without oneDNN": ({"TF_ENABLE_ONEDNN_OPTS": "0"}, {}),
    "l2sp_tf, XLA": ({}, {"jit_compile": True}),
    "l2sp_tf, Keras' batch norm": ({}, {"fused": False}),
}
PYTORCH = {"PyTorch, channels first": False, "PyTorch, channels last": True}


def images_and_labels(batch):
    """A random batch: float32 [b, 224, 224, 3] and int64 [b]."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(batch, 224, 224, 3)).astype("float32"), rng.integers(CLASSES, size=batch)


def our_step(batch, jit_compile="auto", fused=True):
    """A function that runs a step of ours."""
    import keras

    import l2sp_tf as l2sp
    from benchmarks.penalties import step_of
    from l2sp_tf.models.zoo import backbone

    pretrained = backbone("resnet50_torch", 1000)
    model = l2sp.with_new_head(pretrained, CLASSES, say=lambda line: None)
    l2sp.attach(model, l2sp.L2SP(ALPHA), l2sp.Anchors.of(pretrained), beta=0.0, params="all")
    if fused:
        l2sp.fuse_batch_norm(model)  # as finetune does
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-4, momentum=0.9), loss, jit_compile=jit_compile)
    return step_of(model, *map(keras.ops.convert_to_tensor, images_and_labels(batch)))


def pytorch_step(batch, channels_last):
    """A function that runs a step of the usual loop in PyTorch."""
    import torch
    import torchvision

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = torchvision.models.resnet50(weights=None)
    model.fc = torch.nn.Linear(model.fc.in_features, CLASSES)
    images, labels = images_and_labels(batch)
    images, labels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels)
    if channels_last:
        model, images = (thing.to(memory_format=torch.channels_last) for thing in (model, images))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("fc.")}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    model.train()

    def step():
        optimizer.zero_grad()
        distance = sum(((p - start[name]) ** 2).sum() for name, p in model.named_parameters() if name in start)
        loss = torch.nn.functional.cross_entropy(model(images), labels) + ALPHA / 2 * distance
        loss.backward()
        optimizer.step()
        return loss.item()

    step()
    return step


def serve(name, batch, pipe, began):
    """Runs a step and answers with its seconds whenever it is asked to; for a process of its own."""
    environment, options = OURS.get(name, ({}, {}))
    os.environ.update(environment)
    step = our_step(batch, **options) if name in OURS else pytorch_step(batch, PYTORCH[name])
    pipe.send(time.time() - began)
    while pipe.recv():
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)


class Contestant:
    """A contestant in its process: call it for the seconds of a step."""

    def __init__(self, name, batch):
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=serve, args=(name, batch, other, time.time()), daemon=True)
        self._process.start()
        self.first = self._pipe.recv()  # seconds from the start of the process to the end of its first step

    def __call__(self):
        self._pipe.send(True)
        return self._pipe.recv()

    def stop(self):
        """Ends the process."""
        self._pipe.send(False)
        self._process.join()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--settings", action="store_true", help="ours under other settings, without PyTorch")
    arguments = parser.parse_args()
    names = list(OURS) if arguments.settings else ["l2sp_tf", *PYTORCH]
    contestants = [Contestant(name, arguments.batch) for name in names]
    seconds = np.array([[contestant() for contestant in contestants] for _ in range(arguments.rounds + 2)])[2:]
    for contestant in contestants:
        contestant.stop()
    print(f"{machine()}\nResNet-50, 224 pixels, batch {arguments.batch}, {arguments.rounds} rounds")
    rows = [
        [name, f"{arguments.batch / np.median(column):.2f}", f"{contestant.first:.1f}"]
        for name, column, contestant in zip(names, seconds.T, contestants, strict=True)
    ]
    print(table(["", "images a second", "first step after, s"], rows))
    if arguments.settings:
        for name, column in zip(names[1:], seconds.T[1:], strict=True):
            print(f"{name}: {spread(seconds[:, 0] / column, 2)} times the speed of the default")
    else:
        print(f"ours over the better PyTorch: {spread(seconds[:, 1:].min(axis=1) / seconds[:, 0], 2)}, goal at least {TARGET}")


if __name__ == "__main__":
    main()
