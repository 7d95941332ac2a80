"""What `--dry_run` says of the README's command for the paper's data, on dummy images: `python -m benchmarks.dry_run`.

The sets have the paper's numbers of images, as hard links to a few small JPEGs, so that nothing but their number counts;
the weights are random. With --fraction only a part of ImageNet's training images is made.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import tensorflow as tf

ROOT = pathlib.Path(__file__).parents[1]
LINKS = 20_000  # to one file: file systems allow a few ten thousand
# classes, training images and test images of a class
SETS = {"imagenet": (1000, 1281, 50), "dogs": (120, 100, 71), "caltech30": (257, 30, 89), "caltech60": (257, 60, 59)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = pathlib.Path(folder)
        for name, (classes, train, test) in SETS.items():
            count = train if name != "imagenet" else max(1, round(train * options.fraction))
            make_set(root / name, classes, {"train": count, "test": test})
        make_weights(root / "weights.safetensors")
        command = [sys.executable, ROOT / "train.py", f"--workdir={root / 'w'}", "--experiment=all", "--backbone=resnet101_slim"]
        command += [f"--weights={root / 'weights.safetensors'}", f"--source={root / 'imagenet'}", "--dry_run"]
        command += ["--target=" + ",".join(str(root / name) for name in list(SETS)[1:]), f"--batch_size={options.batch_size}"]
        start = time.perf_counter()
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(said.stdout.replace(folder, "") + "".join(said.stderr.splitlines(keepends=True)[-3:] * bool(said.returncode)))
        print(f"{time.perf_counter() - start:.0f} s for the command, batches of {options.batch_size}")


def make_set(folder, classes, counts):
    """Writes <split>/<class>/<image> with so many images a class."""
    image, made = None, 0
    for split, count in counts.items():
        for label in range(classes):
            place = folder / split / f"{label:04}"
            place.mkdir(parents=True)
            for i in range(count):
                if made % LINKS == 0:
                    image = folder / f".image{made}.jpg"
                    pixels = np.random.default_rng(made).integers(0, 256, (32, 32, 3), np.uint8)
                    image.write_bytes(tf.io.encode_jpeg(pixels).numpy())
                os.link(image, place / f"{i:05}.jpg")
                made += 1


def make_weights(path):
    """Random weights of ResNet-101 for 1000 classes, with ImageNet's mean."""
    from l2sp_tf.models import zoo
    from l2sp_tf.models.pixels import PIXELS
    from l2sp_tf.penalties.anchors import Anchors

    pixels = PIXELS["rgb"].with_mean((123.68, 116.78, 103.94))
    Anchors.of(zoo.backbone("resnet101_slim", 1000), {"pixels": pixels.plain()}).save(path)


if __name__ == "__main__":
    main()
