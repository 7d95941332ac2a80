"""Data sets in files: the embedded digits, a folder of images, or a zip of one."""

import collections
import hashlib
import itertools
import os
import pathlib
import shutil
import tempfile
import zipfile

import numpy as np

from l2sp_tf.data.headers import FIRST_BYTES
from l2sp_tf.data.layout import FILE, FOLDER, OTHER, find_layout
from l2sp_tf.data.sets import ACCEPTED, TFDS_NAME, Dataset, Split, default_cache_dir
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import open_zip, refusing

MEMORY = "files.index"  # in the cache folder: the digests of files
# images of each digit in digits/source and digits/target; the test split of digits/target takes the rest
SOURCE_TRAIN, SOURCE_TEST, TARGET_TRAIN = 80, 30, 15


def _digits(name):
    """Splits scikit-learn's 1797 handwritten digits into two fixed tasks that share no image."""
    from sklearn.datasets import load_digits  # half a second to import, and only these two sets need it

    bunch = load_digits()
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.default_rng(0).permutation(len(pixels))
    source = name == "digits/source"
    cuts = np.cumsum([0, SOURCE_TRAIN, SOURCE_TEST, TARGET_TRAIN, len(pixels)])
    train, test = (cuts[0:2], cuts[1:3]) if source else (cuts[2:4], cuts[3:5])

    def split(first, last):
        chosen = np.sort(np.concatenate([order[bunch.target[order] == digit][first:last] for digit in range(10)]))
        labels = bunch.target[chosen] if source else bunch.target[chosen] % 2
        return Split(tuple(f"digits image {i}" for i in chosen), labels.astype(np.int32), pixels=pixels[chosen])

    classes = tuple("0123456789") if source else ("even", "odd")
    return Dataset(name, classes, split(*train), split(*test))


class _Disk:
    """A folder on disk, as `find_layout` looks at it."""

    def __init__(self, root):
        self._root = root

    def children(self, place):
        # scandir needs no stat of each file: class folders may be large
        with os.scandir(self._root / place) as entries:
            return {e.name: FOLDER if e.is_dir() else FILE if e.is_file() else OTHER for e in entries}

    def head(self, place):
        with (self._root / place).open("rb") as file:
            return file.read(FIRST_BYTES)


class _Members:
    """The members of an open zip, as `find_layout` looks at them; zips may leave folders out.

    Args:
        file: the `zipfile.ZipFile`.
        members: its members by their places.
    """

    def __init__(self, file, members):
        self._file, self._members = file, members
        self._children = collections.defaultdict(dict)
        for name in members:
            *folders, last = name.removesuffix("/").split("/")
            place = ""
            for folder in folders + [last] * name.endswith("/"):
                self._children[place][folder] = FOLDER
                place += f"{folder}/"
            if not name.endswith("/"):
                self._children[place].setdefault(last, FILE)

    def children(self, place):
        return self._children.get(place, {})

    def head(self, place):
        with self._file.open(self._members[place]) as file:
            return file.read(FIRST_BYTES)


def _from_files(name, root, layout, shown=None, memory=None):
    """Builds the data set of a `Layout` with files under `root`; messages name the root `shown`."""
    shown = root if shown is None else shown
    classes = tuple(sorted(layout.splits["train"]))

    def split(which):
        found = [(label, place) for label, c in enumerate(classes) for place in layout.splits[which][c]]
        return Split(
            names=tuple(f"{shown}/{place}" for _, place in found),
            labels=np.array([label for label, _ in found], np.int32),
            files=tuple(root / place for _, place in found),
            memory=memory,
        )

    return Dataset(name, classes, split("train"), split("test"), layout.notes)


def _zip(name, archive, path, cache_dir, partial):
    """Builds the data set in the zip `archive`; `path` is the path of the zip, or of a folder in it."""
    inside = path.relative_to(archive).as_posix()
    prefix = "" if inside == "." else f"{inside}/"
    with open_zip(archive) as file:
        members = {m.filename[len(prefix) :]: m for m in file.infolist() if m.filename.startswith(prefix)}
        members.pop("", None)
        if not members:
            raise InputError(f"{archive} has no folder {inside!r}.")
        folder = cache_dir / _cache_name(archive, prefix)
        with refusing(f"{archive} is damaged", "copy it again"):
            layout = find_layout(_Members(file, members), path, partial)
            if not folder.is_dir():
                _extract(file, members, layout, folder)
    return _from_files(name, folder, layout, shown=path, memory=cache_dir / MEMORY)


def _cache_name(archive, prefix):
    status = archive.stat()
    identity = repr((str(archive.resolve()), status.st_size, status.st_mtime_ns, prefix))
    return f"{archive.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _extract(file, members, layout, folder):
    """Unpacks the images of a layout beside `folder`, and renames the result to `folder` once it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        for classes in layout.splits.values():
            for place in itertools.chain(*classes.values()):
                (temporary / place).parent.mkdir(parents=True, exist_ok=True)
                # "x": on some systems two names of a zip are one
                with file.open(members[place]) as source, (temporary / place).open("xb") as target:
                    shutil.copyfileobj(source, target, 2**20)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process has just unpacked the same zip
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_files(spec, cache_dir, partial=False):
    """Loads the digits, or the data set of a folder or zip; returns None if `spec` may be a TFDS name instead.

    If `partial`, one of its splits may lack classes of the other.
    """
    if str(spec) in ("digits/source", "digits/target"):
        return _digits(str(spec))
    if not str(spec):
        raise InputError(f"No data set is named: give {ACCEPTED}.")
    path = pathlib.Path(spec).expanduser()
    if path.is_dir():
        memory = None if cache_dir is None else pathlib.Path(cache_dir) / MEMORY
        return _from_files(str(spec), path, find_layout(_Disk(path), path, partial), memory=memory)
    archive = next((part for part in (*reversed(path.parents), path) if part.is_file()), None)
    if archive is None and TFDS_NAME.fullmatch(str(spec)):
        return None
    if archive is None or not (zipfile.is_zipfile(archive) or archive.suffix.lower() == ".zip"):
        raise InputError(f"There is no data set {str(spec)!r}: give {ACCEPTED}.")
    folder = default_cache_dir() if cache_dir is None else pathlib.Path(cache_dir)
    return _zip(str(spec), archive, path, folder, partial)
