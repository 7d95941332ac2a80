"""Measures the input pipeline against PyTorch's DataLoader and Keras' `image_dataset_from_directory`.

All three read the same JPEG files and make batches of 64: resize to 256 x 256, Gaussian blur (5 pixels,
sigma 0.1 to 2), mirror, crop of 224, mean subtracted. They take turns on the same cores, each time in a
process of their own, so that no library disturbs another; its start and imports are not counted.
A first epoch is all from the files to the batches, with nothing prepared: for `l2sp_tf` decoding, the
mean of the channels, compiling and streaming; for Keras building the data set and its layers; for
PyTorch making the DataLoader and its workers. Later epochs are the ones after it on the same objects.
Keras is taken without and with `.cache()`, with layers that hold no weights mapped in parallel, and
PyTorch with both of torchvision's interfaces, persistent workers, one a core, and its tensors in
channels-first order. The best of the peers of each round counts. The last lines give the median of the paired
ratios and their spread (10th and 90th percentile).

    python -m benchmarks.input_pipeline --photos=photos.zip     # a folder or a zip of JPEG files
    python -m benchmarks.input_pipeline                         # random images of 500 x 375

The list of files is repeated by name (--copies) so that an epoch lasts seconds. Without torch and
torchvision that peer is skipped.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import zipfile

import numpy as np

from benchmarks.common import machine, spread

TARGETS = {"first": 1.5, "later": 4.0}
BATCH, MEAN, SD = 64, (120.0, 115.0, 98.0), 58.0


def photographs(source, copies, folder):
    """Fills `folder`/train/{0,1} with the JPEG files of a zip or a folder, each under several names; returns their paths."""
    if source is None:
        import tensorflow as tf

        rng = np.random.default_rng(0)
        coarse = [rng.integers(0, 256, (25, 34, 3)).astype(np.uint8) for _ in range(120)]
        contents = [tf.io.encode_jpeg(tf.cast(tf.image.resize(image, (375, 500)), tf.uint8)).numpy() for image in coarse]
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as file:
            contents = [file.read(name) for name in sorted(file.namelist()) if is_jpeg(name)]
    else:
        contents = [path.read_bytes() for path in sorted(pathlib.Path(source).rglob("*")) if is_jpeg(path.name)]
    if not contents:
        raise SystemExit(f"error: {source} holds no JPEG file: give a folder or a zip of some with --photos.")
    paths = [folder / "train" / str(i % 2) / f"{copy}-{i}.jpg" for copy in range(copies) for i in range(len(contents))]
    for place, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[place % len(contents)])
    return paths


def is_jpeg(name):
    """Whether a file's name says that it is a JPEG."""
    return name.lower().endswith((".jpg", ".jpeg"))


def ours(paths, epochs):
    """Yields the images seen in each epoch, after a first None once all is imported."""
    from l2sp_tf.data import Preprocessing, Split, channel_mean, decode, training_batches

    yield None
    split = Split(tuple(map(str, paths)), np.array([int(path.parent.name) for path in paths], np.int32), files=tuple(paths))
    with tempfile.TemporaryDirectory() as cache:
        images = decode(split, 256, cache_dir=cache)
        steps = len(paths) // BATCH
        batches = training_batches(
            images, Preprocessing(), channel_mean(images), batch_size=BATCH, seed=0, iterations=steps * epochs
        )
        seen = 0
        for x, _ in batches:
            seen += len(x)
            if seen == steps * BATCH:
                yield seen
                seen = 0


def keras_layers(paths, epochs, cached):
    """Yields the images seen in each epoch, after a first None once all is imported."""
    import keras
    import tensorflow as tf

    yield None
    options = {"image_size": (256, 256), "batch_size": BATCH, "seed": 0, "verbose": False}
    dataset = keras.utils.image_dataset_from_directory(paths[0].parents[1], **options)
    if cached:
        dataset = dataset.cache()
    layers = [
        keras.layers.RandomGaussianBlur(factor=1.0, kernel_size=5, sigma=(0.1, 2.0), value_range=(0, 255)),
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandomCrop(224, 224),
        keras.layers.Normalization(mean=MEAN, variance=[SD**2] * 3),
    ]

    def augment(x, labels):
        for layer in layers:
            x = layer(x, training=True)
        return x, labels

    dataset = dataset.map(augment, num_parallel_calls=tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)
    for _ in range(epochs):
        yield sum(len(x) for x, _ in dataset)


def torch_loader(paths, epochs, interface):
    """Yields the images seen in each epoch, after a first None once all is imported."""
    import torch

    photographs = TorchPhotographs(paths, interface)
    yield None
    loader = torch.utils.data.DataLoader(photographs, BATCH, shuffle=True, num_workers=os.cpu_count(), persistent_workers=True)
    for _ in range(epochs):
        yield sum(len(x) for x, _ in loader)


class TorchPhotographs:
    """A map-style data set of PyTorch: torchvision's transforms of one photograph."""

    def __init__(self, paths, interface):
        import torch
        from torchvision import transforms as v1
        from torchvision.transforms import v2

        t = v1 if interface == "v1" else v2
        random = [t.GaussianBlur(5, (0.1, 2.0)), t.RandomHorizontalFlip(), t.RandomCrop(224)]
        statistics = [m / 255 for m in MEAN], [SD / 255] * 3
        if interface == "v1":  # on Pillow's images
            steps = [v1.Resize((256, 256)), *random, v1.ToTensor()]
        else:  # on tensors, as its documentation advises
            steps = [v2.PILToTensor(), v2.Resize((256, 256), antialias=True), *random, v2.ToDtype(torch.float32, scale=True)]
        self._paths, self._transform = paths, t.Compose([*steps, t.Normalize(*statistics)])

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        from PIL import Image

        with Image.open(self._paths[index]) as image:
            return self._transform(image.convert("RGB")), int(self._paths[index].parent.name)


CONTESTANTS = {
    "l2sp_tf": ours,
    "Keras": lambda paths, epochs: keras_layers(paths, epochs, False),
    "Keras, cached": lambda paths, epochs: keras_layers(paths, epochs, True),
    "PyTorch, v1": lambda paths, epochs: torch_loader(paths, epochs, "v1"),
    "PyTorch, v2": lambda paths, epochs: torch_loader(paths, epochs, "v2"),
}


def rates(name, folder, epochs):
    """Images per second of the first epoch and of the later ones together."""
    run = CONTESTANTS[name](sorted(pathlib.Path(folder).glob("train/*/*")), epochs)
    next(run)
    counts, times, start = [], [], time.perf_counter()
    for count in run:
        counts.append(count)
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return counts[0] / times[0], sum(counts[1:]) / sum(times[1:])


def rates_in_a_process(name, folder, epochs):
    """`rates` from a fresh process."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.input_pipeline",
        f"--contestant={name}",
        f"--photos={folder}",
        f"--epochs={epochs}",
    ]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", help="a folder or a zip of JPEG files; by default random images")
    parser.add_argument("--copies", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of each round, the first one included")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        print(json.dumps(rates(arguments.contestant, arguments.photos, arguments.epochs)))
        return
    names = list(CONTESTANTS)
    if not importlib.util.find_spec("torch") or not importlib.util.find_spec("torchvision"):
        print("PyTorch: skipped, as torch and torchvision are not installed")
        names = [name for name in names if not name.startswith("PyTorch")]
    with tempfile.TemporaryDirectory() as folder:
        count = len(photographs(arguments.photos, arguments.copies, pathlib.Path(folder)))
        rounds = range(arguments.rounds)
        measured = np.array([[rates_in_a_process(name, folder, arguments.epochs) for name in names] for _ in rounds])
    print(machine())
    print(f"{count} images an epoch, {os.cpu_count()} cores, {arguments.rounds} rounds of {arguments.epochs} epochs")
    for name, column in zip(names, measured.transpose(1, 2, 0), strict=True):
        print(f"{name}: {np.median(column[0]):.0f} images/s in the first epoch, {np.median(column[1]):.0f} in later ones")
    for i, epoch in enumerate(TARGETS):
        ratios = measured[:, 0, i] / measured[:, 1:, i].max(axis=1)
        print(f"{epoch} epoch: {spread(ratios, 2)} times the better peer, target {TARGETS[epoch]}")


if __name__ == "__main__":
    main()
