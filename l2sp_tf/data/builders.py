"""Builders for the two data sets of Table 1 that TensorFlow Datasets lacks: Caltech 256 and MIT Indoors 67."""

import itertools
import pathlib
import re
import struct
import tarfile

import tensorflow as tf
import tensorflow_datasets as tfds

from l2sp_tf.data.fetch import Download
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import MAX_IMAGE_BYTES, MAX_PIXELS, refusing


class _Builder(tfds.core.GeneratorBasedBuilder):
    """A data set in one tar file, whose examples keep the order in which they are generated.

    Attributes:
        DOWNLOADS: its files, as Downloads; they are read from the manual folder only.
        CLASSES: its number of classes.
    """

    VERSION = tfds.core.Version("1.0.0")
    skip_registration = True  # of this class; each subclass registers itself
    DOWNLOADS: tuple = ()
    CLASSES = 0

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(
                {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=self.CLASSES)}
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _name_classes(self, names, where):
        if len(names) != self.CLASSES:
            raise InputError(f"{where} has {len(names)} classes, but {self.name} has {self.CLASSES}: download it again.")
        self.info.features["label"].names = names

    def _generate_examples(self, path, places):
        """Yields the images of a tar file in the order of `places`, which are pairs of a member's name and its class."""
        with tarfile.open(path, "r:") as archive:
            members = {member.name: member for member in archive}  # tarfile would search its list again for each name
            for number, (place, label) in enumerate(places):
                content = archive.extractfile(members[place]).read(MAX_IMAGE_BYTES)  # limited: sparse members may claim any size
                yield number, {"image": as_jpeg_or_png(content), "label": label}


class Caltech256(_Builder):
    """Caltech 256: 30,607 images of 256 kinds of objects and of clutter.

    Without a split of its own: all images are in "train", class after class, in the order of
    their numbers.
    """

    skip_registration = False
    CLASSES = 257
    DOWNLOADS = (
        Download(
            "https://data.caltech.edu/records/nyy15-4j048/files/256_ObjectCategories.tar",
            "md5:67b4f42ca05d46448c6bb8ecd2220f6d",
        ),
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = "256_ObjectCategories.tar from https://data.caltech.edu/records/nyy15-4j048"
    # The creators' tar also holds a script and a folder that do not belong to the set.
    IMAGE = re.compile(r"(?:\./)?256_ObjectCategories/(\d{3}\.[^/]+)/(\d{3}_\d{4})\.jpg")

    def _split_generators(self, dl_manager):
        path = pathlib.Path(dl_manager.manual_dir) / self.DOWNLOADS[0].name
        found = sorted((*match.groups(), match.string) for match in map(self.IMAGE.fullmatch, _members(path)) if match)
        self._name_classes(sorted({label for label, _, _ in found}), path)
        return {"train": self._generate_examples(path, [(place, label) for label, _, place in found])}


class MitIndoors67(_Builder):
    """MIT Indoors 67: photographs of 67 kinds of rooms, 5,360 for training and 1,340 for test by their creators' lists."""

    skip_registration = False
    CLASSES = 67
    DOWNLOADS = (
        Download(
            "http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar",
            "sha1:0b252516e746ba428b96af408d2e8162d9b08ac5",
        ),
        Download("http://web.mit.edu/torralba/www/TrainImages.txt"),  # the lists have no published checksum:
        Download("http://web.mit.edu/torralba/www/TestImages.txt"),  # the builder counts their lines and looks them up
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "indoorCVPR_09.tar, TrainImages.txt and TestImages.txt from http://web.mit.edu/torralba/www/indoor.html"
    )
    COUNTS = {"train": 5360, "test": 1340}

    def _split_generators(self, dl_manager):
        path, *lists = (pathlib.Path(dl_manager.manual_dir) / download.name for download in self.DOWNLOADS)
        listed = {split: _lines(file, self.COUNTS[split]) for split, file in zip(self.COUNTS, lists, strict=True)}
        found = {"/".join(pathlib.PurePosixPath(name).parts[-2:]): name for name in _members(path)}
        missing = sorted(set(itertools.chain(*listed.values())) - found.keys())
        if missing:
            raise InputError(f"{path} lacks {len(missing)} images that the lists name, such as {missing[0]}: download it again.")
        self._name_classes(sorted({line.partition("/")[0] for line in listed["train"]}), path)
        return {
            split: self._generate_examples(path, [(found[line], line.partition("/")[0]) for line in sorted(lines)])
            for split, lines in listed.items()
        }


def as_jpeg_or_png(content):
    """Returns the bytes of an image file; a GIF or BMP, which some .jpg files are, becomes a PNG of the same pixels."""
    try:
        if not 0 < _declared_pixels(content) <= MAX_PIXELS:
            return content
        image = tf.io.decode_image(content, channels=3, expand_animations=False)
    except (IndexError, struct.error, tf.errors.OpError):
        return content  # a bad image: decoding the set will name it
    return tf.io.encode_png(image).numpy()


def _declared_pixels(content):
    """Returns how many pixels a BMP or GIF (all its pictures together) declares; 0 for any other file."""
    if content.startswith(b"BM"):
        width, height = struct.unpack_from("<ii", content, 18)
        return abs(width * height)
    if not content.startswith((b"GIF87a", b"GIF89a")):
        return 0
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    pixels, place = width * height, 13 + _colours(flags)
    while content[place] in b"!,":  # an extension or a picture; ";" ends the file
        place += 2
        if content[place - 2 : place - 1] == b",":
            width, height, flags = struct.unpack_from("<HHB", content, place + 3)
            pixels, place = pixels + width * height, place + 9 + _colours(flags)
        while content[place]:  # blocks of up to 255 bytes, each after its length
            place += 1 + content[place]
        place += 1
    return pixels


def _colours(flags):
    """Returns the size of a GIF's colour table in bytes; 0 without a table."""
    return 3 * 2 ** (flags % 8 + 1) if flags & 128 else 0


def _members(path):
    """Lists the names of the files in a tar file."""
    with refusing(f"{path} is damaged or not a tar file", "download it again"):
        with tarfile.open(path, "r:") as archive:
            return [member.name for member in archive if member.isfile()]


def _lines(path, count):
    lines = [line.strip() for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if len(lines) != count:
        raise InputError(f"{path} names {len(lines)} images instead of {count}: download it again.")
    return lines
