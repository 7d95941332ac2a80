"""Data sets and their splits: the embedded digits, a folder of images, a zip of one, or a prepared set of TFDS."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import zipfile

import numpy as np

from l2sp_tf.data.digests import file_digests
from l2sp_tf.errors import InputError
from l2sp_tf.reading import MAX_IMAGE_BYTES, open_zip, refusing

SPLITS = ("train", "test")
ENDINGS = (".jpg", ".jpeg", ".png")
ACCEPTED = (
    "digits/source, digits/target, a folder <split>/<class>/<image> with the splits train and test, "
    "a zip of such a folder, with or without the path of a folder in it (objects.zip/target), "
    "or the name of one of stanford_dogs, caltech256, mit_indoors67, imagenet2012, places365_small "
    "and the other image classification sets of TensorFlow Datasets"
)
TABLE_1 = ("caltech256/30", "caltech256/60", "stanford_dogs", "mit_indoors67")
PROTOCOLS = ("paper", "authors")
TFDS_NAME = re.compile(r"(?:tfds:)?([a-z]\w*(?:/[\w.-]+)?)")
HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini")

# digits/source and digits/target take these many images of each digit, the second's test split what is left
SOURCE_TRAIN, SOURCE_TEST, TARGET_TRAIN = 80, 30, 15


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The images of one split and their labels.

    Attributes:
        names: what to call each image in a message: its path, or a label.
        labels: int32 [n].
        pixels: uint8 [n, h, w, c] of a set held in memory, otherwise None.
        files: the paths of a set on disk, otherwise None.
        records: the places of the images of a set of TFDS (`tfds_sets.Records`), otherwise None.
        memory: the file that remembers the digests of `files`, as `file_digests` takes it, or None.
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
            raise InputError("a split has either pixels or files or records")
        images = given[0]
        if not len(self.names) == len(self.labels) == len(images):
            raise InputError(f"a split has {len(self.names)} names, {len(self.labels)} labels and {len(images)} images")

    def __len__(self):
        return len(self.names)

    def take(self, positions):
        """The split of the images at `positions` alone, in that order."""
        return Split(
            names=tuple(self.names[i] for i in positions),
            labels=self.labels[positions],
            pixels=None if self.pixels is None else self.pixels[positions],
            files=None if self.files is None else tuple(self.files[i] for i in positions),
            records=None if self.records is None else self.records.take(positions),
            memory=self.memory,
        )

    def read(self, i):
        """The bytes of the i-th image file; of one that is too large for an image only the first."""
        if self.records is not None:
            return self.records.read(i)
        with self.files[i].open("rb") as file:
            return file.read(MAX_IMAGE_BYTES + 1)

    @functools.cached_property
    def digests(self):
        """Of files the size and the sha256 of each one: a list of pairs. They are read when this is first asked for."""
        return file_digests(self.files, self.memory)

    @functools.cached_property
    def keys(self):
        """For each image 16 bytes that tell its content from that of others."""
        if self.files is not None:
            return [digest[:16] for _, digest in self.digests]
        kind, images = ("array", self.pixels) if self.records is None else ("record", self.records.prints)
        return [hashlib.sha256(repr((kind, image.shape)).encode() + image.tobytes()).digest()[:16] for image in images]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A classification task: the names of its classes and its two splits."""

    name: str
    classes: tuple
    train: Split
    test: Split

    @functools.cached_property
    def digest(self):
        """The sha256 of classes, labels and images, in hexadecimal: equal digests mean equal data, wherever it lies.

        Of images on disk their bytes and their places <class>/<file> count. They are read
        when the digest is first asked for, unless they were read before (`digests.file_digests`).
        Of records 64 bits of a hash of their bytes count, which were taken when the set was first loaded.
        """
        sha = hashlib.sha256(repr(self.classes).encode())
        for split in (self.train, self.test):
            sha.update(f"{len(split)}".encode() + np.asarray(split.labels, "<i4").tobytes())
            if split.pixels is not None:
                sha.update(repr(split.pixels.shape).encode() + np.ascontiguousarray(split.pixels).tobytes())
            elif split.records is not None:
                sha.update(split.records.prints.tobytes())
            else:
                for path, (size, content) in zip(split.files, split.digests, strict=True):
                    sha.update(repr((path.parts[-2:], size, content.hex())).encode())
        return sha.hexdigest()

    def characteristics(self):
        """What Table 1 tells of a data set: a dict of its name, its classes and its images, in all and a class.

        "train" and "test" are numbers of images, "train_per_class" and "test_per_class" pairs of
        the smallest and the largest number a class. No image is read.
        """
        row = {"name": self.name, "classes": len(self.classes)}
        for name, split in (("train", self.train), ("test", self.test)):
            counts = np.bincount(split.labels, minlength=len(self.classes))
            row |= {name: len(split), f"{name}_per_class": (int(counts.min()), int(counts.max()))}
        return row

    def subset(self, per_class, seed=None):
        """The same task with `per_class` training images of each class; the test split stays whole.

        Args:
            per_class: how many.
            seed: None for the first ones in sorted order. A number draws them at random: what is
                drawn of a class depends on the seed and on that class alone, and a larger
                subset contains the smaller one.

        Raises:
            InputError: a class has fewer training images.
        """
        return dataclasses.replace(self, train=self.train.take(self.draw(per_class, seed)))

    def draw(self, per_class, seed=None):
        """The sorted positions in the training split of what `subset` takes: int64 [classes * per_class]."""
        if per_class < 1:
            raise InputError(f"{per_class} training images a class were asked for: it must be at least 1")
        chosen = []
        for label, name in enumerate(self.classes):
            positions = np.flatnonzero(self.train.labels == label)
            if len(positions) < per_class:
                raise InputError(
                    f"{per_class} training images a class were asked for, but class {name!r} of {self.name} has {len(positions)}"
                )
            if seed is not None:
                positions = np.random.default_rng([seed, *name.encode()]).permutation(positions)
            chosen.append(positions[:per_class])
        return np.sort(np.concatenate(chosen))


def load_dataset(spec, *, per_class=None, seed=None, protocol="paper", data_dir=None, cache_dir=None):
    """Finds a data set and checks its layout; no image on disk is decoded yet, and nothing is downloaded.

    Args:
        spec: "digits/source" or "digits/target"; the path of a folder <split>/<class>/<image>
            with the splits train and test; the path of a zip of such a folder, followed by
            the folder's path inside the zip where there is one ("objects.zip/target"); or the
            name of a prepared set of TensorFlow Datasets, with its configuration where it has
            several ("name/config"), and with "tfds:" before it where a folder has that name too.
        per_class: how many training images of each class to take, as `Dataset.subset` does;
            None for all. Caltech 256 has no split of its own and needs it, also as "caltech256/30":
            under the paper's protocol all that is left over is for test; under the authors' the training images
            come from the first 60 of each class, and the 61st to the 80th are for test.
        seed: of that drawing. None takes the first images; of Caltech 256 under the paper's
            protocol, which draws them at random, it stands for 0.
        protocol: "paper" or "authors"; they differ in Caltech 256 only.
        data_dir: where TFDS keeps its sets; None for its own default.
        cache_dir: where zips are unpacked and the indices of TFDS sets are kept, once each; by
            default a folder of the user's among the temporary files. If it is given, the digests of a
            folder's files are remembered there too.

    Returns:
        A Dataset. Classes and files are sorted by name, the images of a set of TFDS as they lie there.

    Raises:
        InputError: there is no such data set, it is not prepared, its layout is not the one above,
            a class is too small, or the zip is damaged or unsafe.
        OSError: a file cannot be read, or the cache cannot be written.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol is {protocol!r}: it must be paper or authors")
    seed = drawing_seed(spec, per_class, seed, protocol)
    dataset = _load_files(spec, cache_dir)
    if dataset is None:
        from l2sp_tf.data import tfds_sets  # TensorFlow Datasets takes seconds to import, and the other sets do not need it

        name = TFDS_NAME.fullmatch(str(spec))[1]
        if name.partition("/")[0] == "caltech256":
            return tfds_sets.load_caltech256(name, per_class, seed, protocol, data_dir, cache_dir)
        dataset = tfds_sets.load_tfds(name, data_dir, cache_dir)
    return dataset if per_class is None else dataset.subset(per_class, seed)


def drawing_seed(spec, per_class, seed, protocol):
    """The seed by which `load_dataset` draws training images at random; None where it takes the first, or all."""
    found = TFDS_NAME.fullmatch(str(spec))
    if found is not None and found[1].partition("/")[0] == "caltech256":
        return 0 if seed is None and protocol == "paper" else seed
    return seed if per_class is not None else None


def _load_files(spec, cache_dir):
    """The digits, or the data set of a folder or zip; None where `spec` is no such thing and may be a name of TFDS."""
    if str(spec) in ("digits/source", "digits/target"):
        return _digits(str(spec))
    if not str(spec):
        raise InputError(f"no data set was named: give {ACCEPTED}")
    path = pathlib.Path(spec).expanduser()
    if path.is_dir():
        memory = None if cache_dir is None else pathlib.Path(cache_dir) / "digests.index"
        return _from_files(str(spec), path, _layout(_folder_entries(path), path), memory=memory)
    archive = next((part for part in (*reversed(path.parents), path) if part.is_file()), None)
    if archive is None and TFDS_NAME.fullmatch(str(spec)):
        return None
    if archive is None or not (zipfile.is_zipfile(archive) or archive.suffix.lower() == ".zip"):
        raise InputError(f"no data set {str(spec)!r}: give {ACCEPTED}")
    return _zip(str(spec), archive, path, default_cache_dir() if cache_dir is None else pathlib.Path(cache_dir))


def table_1_rows(*, protocol="paper", data_dir=None, cache_dir=None):
    """The characteristics of the target data sets of Table 1, for `report.table_1`.

    Args:
        protocol, data_dir, cache_dir: as in `load_dataset`.

    Returns:
        A list of dicts, one for each of TABLE_1; of a set that cannot be loaded only "name" and,
        under "missing", why.
    """
    rows = []
    for spec in TABLE_1:
        try:
            row = load_dataset(spec, protocol=protocol, data_dir=data_dir, cache_dir=cache_dir).characteristics()
        except InputError as error:
            row = {"missing": str(error)}
        rows.append(row | {"name": spec})
    return rows


def default_cache_dir():
    """Makes the user's own folder among the temporary files, and returns its path."""
    user = os.getuid() if hasattr(os, "getuid") else None  # None on Windows, where that place is the user's already
    folder = pathlib.Path(tempfile.gettempdir()) / f"l2sp_tf-cache-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if user is not None and folder.stat().st_uid != user:
        raise InputError(f"{folder} belongs to another user: give a cache folder of your own")
    return folder


def _digits(name):
    """scikit-learn's 1797 handwritten digits, cut once and for all into two tasks that share no image."""
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


def _folder_entries(root):
    """The paths below `root`, relative to it, as deep as a layout goes; those of folders end in "/"."""
    for top in root.iterdir():
        if not top.is_dir():
            yield top.name
            continue
        yield f"{top.name}/"
        for path in top.iterdir():
            yield f"{top.name}/{path.name}" + "/" * path.is_dir()
            if path.is_dir() and top.name in SPLITS:
                # a listing without a stat of each file: class folders may be large
                with os.scandir(path) as entries:
                    # a pipe or a device is no image, whatever its name: reading it might never end
                    yield from (f"{top.name}/{path.name}/{e.name}" + "/" * (not e.is_file()) for e in entries)


def _layout(entries, where):
    """Sorts relative paths into {split: {class: [file, ...]}}, or says what is wrong with them."""
    entries = sorted(entry for entry in entries if not _is_hidden(entry))
    _check_splits(entries, where)
    layout = {split: {} for split in SPLITS}
    for entry in entries:
        split, *rest = entry.rstrip("/").split("/")
        if split not in SPLITS or not rest:
            continue
        if len(rest) == 1 and not entry.endswith("/"):
            raise InputError(f"{where}/{entry} lies in no class folder: the layout is <split>/<class>/<image>")
        files = layout[split].setdefault(rest[0], [])
        if len(rest) > 1:
            if len(rest) > 2 or entry.endswith("/") or not entry.lower().endswith(ENDINGS):
                raise InputError(f"{where}/{entry} is not an image: class folders hold {', '.join(ENDINGS)} files only")
            files.append(rest[1])
    _check_classes(layout, where)
    return layout


def _is_hidden(entry):
    return any(part.startswith(".") or part in HIDDEN for part in entry.rstrip("/").split("/"))


def _check_splits(entries, where):
    tops = sorted({entry.split("/")[0] for entry in entries if "/" in entry})
    missing = [split for split in SPLITS if split not in tops]
    if not any(entry.lower().endswith(ENDINGS) or "/" in entry for entry in entries):
        raise InputError(f"{where} holds no images: give {ACCEPTED}")
    if len(missing) == 2 and any(re.fullmatch(r"([^/]+/)?[^/]+", e) and e.lower().endswith(ENDINGS) for e in entries):
        raise InputError(f"{where} has images without splits: put the classes into {where}/train and {where}/test")
    if missing:
        found = f"found there: {_some(tops)}" if tops else "no folder is there"
        raise InputError(f"{where} has no {' and no '.join(f'{split}/' for split in missing)}: {found}")
    others = [top for top in tops if top not in SPLITS]
    if others:
        raise InputError(f"{where} has folders other than train and test: {_some(others)}")


def _check_classes(layout, where):
    train, test = (layout[split] for split in SPLITS)
    for split in SPLITS:
        if not any(layout[split].values()):
            raise InputError(f"{where}/{split} holds no images")
    if train.keys() != test.keys():
        raise InputError(
            f"the classes of {where}/train and {where}/test differ: only in train: {_some(train.keys() - test.keys())}; "
            f"only in test: {_some(test.keys() - train.keys())}"
        )
    for split in SPLITS:
        for name, files in layout[split].items():
            if not files:
                raise InputError(f"{where}/{split}/{name} holds no images: add some, or remove the class from both splits")


def _some(names, limit=5):
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more


def _from_files(name, root, layout, shown=None, memory=None):
    """The data set of a checked layout whose files lie under `root`; messages say `shown` for it."""
    shown = root if shown is None else shown
    classes = tuple(sorted(layout["train"]))

    def split(which):
        places = [(label, c, file) for label, c in enumerate(classes) for file in sorted(layout[which][c])]
        return Split(
            names=tuple(f"{shown}/{which}/{c}/{file}" for _, c, file in places),
            labels=np.array([label for label, _, _ in places], np.int32),
            files=tuple(root / which / c / file for _, c, file in places),
            memory=memory,
        )

    return Dataset(name, classes, split("train"), split("test"))


def _zip(name, archive, path, cache_dir):
    """The data set in the zip `archive`, `path` being its own path or that of a folder in it."""
    inside = path.relative_to(archive).as_posix()
    prefix = "" if inside == "." else f"{inside}/"
    with open_zip(archive) as file:
        members = {m.filename[len(prefix) :]: m for m in file.infolist() if m.filename.startswith(prefix)}
        members.pop("", None)
        if not members:
            raise InputError(f"{archive} has no folder {inside!r}")
        layout = _layout(_with_folders(members), path)
        folder = cache_dir / _cache_name(archive, prefix)
        if not folder.is_dir():
            with refusing(f"{archive} is damaged", "copy it again"):
                _extract(file, members, layout, folder)
    return _from_files(name, folder, layout, shown=path, memory=cache_dir / "digests.index")


def _with_folders(names):
    """Zips may leave folders out: the names, and above each the folders that it lies in."""
    folders = {"/".join(name.split("/")[:depth]) + "/" for name in names for depth in range(1, name.count("/") + 1)}
    return folders | set(names)


def _cache_name(archive, prefix):
    status = archive.stat()
    identity = repr((str(archive.resolve()), status.st_size, status.st_mtime_ns, prefix))
    return f"{archive.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _extract(file, members, layout, folder):
    """Writes the images of a layout beside `folder`, and gives them its name once all are there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        for split, classes in layout.items():
            for name, files in classes.items():
                (temporary / split / name).mkdir(parents=True)
                for image in files:
                    place = f"{split}/{name}/{image}"
                    with file.open(members[place]) as source, (temporary / place).open("wb") as target:
                        shutil.copyfileobj(source, target, 2**20)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process has unpacked the same zip meanwhile
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
