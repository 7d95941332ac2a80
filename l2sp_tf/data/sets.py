"""A data set: the images and labels of its two splits (Table 1)."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import tempfile
import unicodedata
import warnings

import numpy as np

from l2sp_tf.data.digests import file_digests
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import MAX_IMAGE_BYTES

ACCEPTED = (
    "digits/source, digits/target, a folder <split>/<class>/<image> with the splits train and test (or val), "
    "a zip of such a folder, with or without the path of a folder in it (objects.zip/target), "
    "or the name of one of stanford_dogs, caltech256, mit_indoors67, imagenet2012, places365_small "
    "and the other image classification sets of TensorFlow Datasets"
)
TFDS_NAME = re.compile(r"(?:tfds:)?([a-z]\w*(?:/[\w.-]+)?)")


def one_form(name):
    """Returns a name in the Unicode form NFC: macOS may write the same letters in another."""
    return unicodedata.normalize("NFC", name)


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The images of one split and their labels.

    Attributes:
        names: the name of each image in messages: its path, or a label.
        labels: int32 [n].
        pixels: uint8 [n, h, w, c] of a set in memory, otherwise None.
        files: the paths of a set on disk, otherwise None.
        records: the image records of a TFDS set (`tfds_sets.Records`), otherwise None.
        memory: the file that remembers the digests of `files`, as in `file_digests`, or None.
    """

    names: tuple
    labels: np.ndarray
    pixels: np.ndarray | None = None
    files: tuple | None = None
    records: object | None = None
    memory: pathlib.Path | None = None

    def __post_init__(self):
        given = [images for images in (self.pixels, self.files, self.records) if images is not None]
        if len(given) != 1:
            raise InputError("A split has either pixels or files or records.")
        images = given[0]
        if not len(self.names) == len(self.labels) == len(images):
            raise InputError(f"A split has {len(self.names)} names, {len(self.labels)} labels and {len(images)} images.")

    def __len__(self):
        return len(self.names)

    def take(self, positions):
        """Returns the split of the images at `positions` alone, in that order."""
        return Split(
            names=tuple(self.names[i] for i in positions),
            labels=self.labels[positions],
            pixels=None if self.pixels is None else self.pixels[positions],
            files=None if self.files is None else tuple(self.files[i] for i in positions),
            records=None if self.records is None else self.records.take(positions),
            memory=self.memory,
        )

    def read(self, i):
        """Reads the bytes of the i-th image file; of an oversized file only the beginning."""
        if self.records is not None:
            return self.records.read(i)
        with self.files[i].open("rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)

    @functools.cached_property
    def digests(self):
        """The (size, digest, reading) of each file as in `file_digests`, read on first use."""
        return file_digests(self.files, self.memory)

    @functools.cached_property
    def keys(self):
        """16 bytes for each image that identify its content."""
        if self.files is not None:
            return [digest[:16] for _, digest, _ in self.digests]
        kind, images = ("array", self.pixels) if self.records is None else ("record", self.records.prints)
        return [hashlib.sha256(repr((kind, image.shape)).encode() + image.tobytes()).digest()[:16] for image in images]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A classification task.

    Attributes:
        name: its name in messages.
        classes: the names of its classes.
        train, test: its splits, a `Split` each.
        notes: what was left out of its folder or taken for something else, in words.
    """

    name: str
    classes: tuple
    train: Split
    test: Split
    notes: tuple = ()

    @functools.cached_property
    def digest(self):
        """The sha256 of classes, labels and images, in hexadecimal: equal digests mean equal data, in any place.

        Images on disk count by their bytes, how they are read, and their places <class>/<file>. They are read on first
        use, unless they were read before (`digests.file_digests`). Records count by 64 bits of a hash of their bytes,
        computed when the set was first loaded.

        Warns if files for training are files for test too.
        """
        sha = hashlib.sha256(repr(self.classes).encode())
        for split in (self.train, self.test):
            sha.update(f"{len(split)}".encode() + np.asarray(split.labels, "<i4").tobytes())
            if split.pixels is not None:
                sha.update(repr(split.pixels.shape).encode() + np.ascontiguousarray(split.pixels).tobytes())
            elif split.records is not None:
                sha.update(split.records.prints.tobytes())
            else:
                for path, (size, content, _) in zip(split.files, split.digests, strict=True):
                    sha.update(repr(((one_form(path.parts[-2]), path.name), size, content.hex())).encode())
        self._warn_of_shared_images()
        return sha.hexdigest()

    def _warn_of_shared_images(self):
        if self.train.files is None or self.test.files is None:
            return
        train = dict(zip(self.train.keys, self.train.names, strict=True))
        shared = [(train[key], name) for key, name in zip(self.test.keys, self.test.names, strict=True) if key in train]
        if shared:
            warnings.warn(
                f"{len(shared)} of the {len(self.test)} test images of {self.name} are training images too, such as "
                f"{shared[0][1]}, which is {shared[0][0]}: the test accuracy says too much.",
                stacklevel=3,
            )

    @functools.cached_property
    def changes(self):
        """What is done to the pixels of its files, in words; reads them as `digest` does."""
        splits = [split for split in (self.train, self.test) if split.files is not None]
        readings = np.array([reading for split in splits for _, _, reading in split.digests], int)
        counts = {
            "turned upright by Exif": (readings & 7 > 0).sum(),
            "with transparency drawn on white": (readings & 8 > 0).sum(),
        }
        return tuple(f"{count} {what}" for what, count in counts.items() if count)

    def remarks(self):
        """Returns `notes` and `changes` as one line, or an empty one if there are none."""
        count = len(self.train) + len(self.test)
        return "; ".join((f"{self.name}: {count} images", *self.notes, *self.changes)) if self.notes + self.changes else ""

    def characteristics(self):
        """Returns Table 1's row as a dict: name, classes, and numbers of images in all and per class.

        "train" and "test" are numbers of images; "train_per_class" and "test_per_class" are pairs of the smallest
        and the largest number in a class. Reads no image.
        """
        row = {"name": self.name, "classes": len(self.classes)}
        for name, split in (("train", self.train), ("test", self.test)):
            counts = np.bincount(split.labels, minlength=len(self.classes))
            row |= {name: len(split), f"{name}_per_class": (int(counts.min()), int(counts.max()))}
        return row

    def among(self, classes):
        """Returns the same images with labels that count `classes`, of which the set has all or a part.

        Args:
            classes: the names of all classes, in the order of a network's outputs.

        Raises:
            InputError: a class of the set is not among them.
        """
        labels = {name: label for label, name in enumerate(classes)}
        lost = [name for name in self.classes if name not in labels]
        if lost:
            listed = ", ".join(map(repr, lost[:3])) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
            raise InputError(
                f"{self.name} has classes that are not among the {len(labels)} of the network's outputs ({listed}): rename "
                "its folders, or give other classes."
            )
        moved = np.array([labels[name] for name in self.classes], np.int32)
        train, test = (dataclasses.replace(split, labels=moved[split.labels]) for split in (self.train, self.test))
        return dataclasses.replace(self, classes=tuple(classes), train=train, test=test)

    def subset(self, per_class, seed=None):
        """Returns the task with `per_class` training images of each class; the test split stays whole.

        Args:
            per_class: the number.
            seed: None for the first images in sorted order. A number draws them at random: the draw of a class
                depends only on the seed and that class, and a larger subset contains the smaller one.

        Raises:
            InputError: a class has fewer training images.
        """
        return dataclasses.replace(self, train=self.train.take(self.draw(per_class, seed)))

    def draw(self, per_class, seed=None):
        """Returns the sorted positions in the training split that `subset` takes: int64 [classes * per_class]."""
        if per_class < 1:
            raise InputError(f"per_class is {per_class}: give at least 1.")
        chosen = []
        for label, name in enumerate(self.classes):
            positions = np.flatnonzero(self.train.labels == label)
            if len(positions) < per_class:
                raise InputError(
                    f"per_class is {per_class}, but class {name!r} of {self.name} has {len(positions)} training images: "
                    "give fewer."
                )
            if seed is not None:
                positions = np.random.default_rng([seed, *name.encode()]).permutation(positions)
            chosen.append(positions[:per_class])
        return np.sort(np.concatenate(chosen))


def default_cache_dir():
    """Creates the user's own folder among the temporary files, and returns its path."""
    user = os.getuid() if hasattr(os, "getuid") else None  # None on Windows, where each user has a folder for temporary files
    folder = pathlib.Path(tempfile.gettempdir()) / f"l2sp_tf-cache-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if user is not None and folder.stat().st_uid != user:
        raise InputError(f"{folder} belongs to another user: give a cache folder of your own.")
    return folder
