"""Data sets in files: the embedded digits, a folder of images, or a zip of one."""

import hashlib
import os
import pathlib
import re
import shutil
import tempfile
import zipfile

import numpy as np

from l2sp_tf.data.sets import ACCEPTED, TFDS_NAME, Dataset, Split, default_cache_dir
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import open_zip, refusing

SPLITS = ("train", "test")
ENDINGS = (".jpg", ".jpeg", ".png")
HIDDEN = ("__MACOSX", "Thumbs.db", "desktop.ini")
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


def _folder_entries(root):
    """Yields the relative paths below `root`, as deep as a layout goes; those of folders end in "/"."""
    for top in root.iterdir():
        if not top.is_dir():
            yield top.name
            continue
        yield f"{top.name}/"
        for path in top.iterdir():
            yield f"{top.name}/{path.name}" + "/" * path.is_dir()
            if path.is_dir() and top.name in SPLITS:
                # scandir needs no stat of each file: class folders may be large
                with os.scandir(path) as entries:
                    # a pipe or a device counts as a folder, so it is refused: reading it might never end
                    yield from (f"{top.name}/{path.name}/{e.name}" + "/" * (not e.is_file()) for e in entries)


def _layout(entries, where, partial=False):
    """Sorts relative paths into {split: {class: [file, ...]}}, or raises for a wrong layout.

    If `partial`, a split may lack classes.
    """
    entries = sorted(entry for entry in entries if not _is_hidden(entry))
    _check_splits(entries, where)
    layout = {split: {} for split in SPLITS}
    for entry in entries:
        split, *rest = entry.rstrip("/").split("/")
        if split not in SPLITS or not rest:
            continue
        if len(rest) == 1 and not entry.endswith("/"):
            raise InputError(f"{where}/{entry} lies in no class folder: the layout is <split>/<class>/<image>.")
        files = layout[split].setdefault(rest[0], [])
        if len(rest) > 1:
            if len(rest) > 2 or entry.endswith("/") or not entry.lower().endswith(ENDINGS):
                raise InputError(f"{where}/{entry} is not an image: class folders hold {', '.join(ENDINGS)} files only.")
            files.append(rest[1])
    _check_classes(layout, where, partial)
    for classes in layout.values():
        for name in set().union(*layout.values()):
            classes.setdefault(name, [])
    return layout


def _is_hidden(entry):
    return any(part.startswith(".") or part in HIDDEN for part in entry.rstrip("/").split("/"))


def _check_splits(entries, where):
    tops = sorted({entry.split("/")[0] for entry in entries if "/" in entry})
    missing = [split for split in SPLITS if split not in tops]
    if not any(entry.lower().endswith(ENDINGS) or "/" in entry for entry in entries):
        raise InputError(f"{where} holds no images: give {ACCEPTED}.")
    if len(missing) == 2 and any(re.fullmatch(r"([^/]+/)?[^/]+", e) and e.lower().endswith(ENDINGS) for e in entries):
        raise InputError(f"{where} has images without splits: put the classes into {where}/train and {where}/test.")
    if missing:
        found = f"it holds {_some(tops)}" if tops else "it holds no folder"
        raise InputError(f"{where} has no {' and no '.join(f'{split}/' for split in missing)}: {found}.")
    others = [top for top in tops if top not in SPLITS]
    if others:
        raise InputError(f"{where} has folders other than train and test: {_some(others)}.")


def _check_classes(layout, where, partial):
    train, test = (layout[split] for split in SPLITS)
    for split in SPLITS:
        if not any(layout[split].values()):
            raise InputError(f"{where}/{split} holds no images.")
    if partial:
        return
    if train.keys() != test.keys():
        raise InputError(
            f"The classes of {where}/train and {where}/test differ: only in train: {_some(train.keys() - test.keys())}; "
            f"only in test: {_some(test.keys() - train.keys())}."
        )
    for split in SPLITS:
        for name, files in layout[split].items():
            if not files:
                raise InputError(f"{where}/{split}/{name} holds no images: add some, or remove the class from both splits.")


def _some(names, limit=5):
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more


def _from_files(name, root, layout, shown=None, memory=None):
    """Builds the data set of a checked layout with files under `root`; messages name the root `shown`."""
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


def _zip(name, archive, path, cache_dir, partial):
    """Builds the data set in the zip `archive`; `path` is the path of the zip, or of a folder in it."""
    inside = path.relative_to(archive).as_posix()
    prefix = "" if inside == "." else f"{inside}/"
    with open_zip(archive) as file:
        members = {m.filename[len(prefix) :]: m for m in file.infolist() if m.filename.startswith(prefix)}
        members.pop("", None)
        if not members:
            raise InputError(f"{archive} has no folder {inside!r}.")
        layout = _layout(_with_folders(members), path, partial)
        folder = cache_dir / _cache_name(archive, prefix)
        if not folder.is_dir():
            with refusing(f"{archive} is damaged", "copy it again"):
                _extract(file, members, layout, folder)
    return _from_files(name, folder, layout, shown=path, memory=cache_dir / "digests.index")


def _with_folders(names):
    """Returns the names and the folders above each, because zips may leave folders out."""
    folders = {"/".join(name.split("/")[:depth]) + "/" for name in names for depth in range(1, name.count("/") + 1)}
    return folders | set(names)


def _cache_name(archive, prefix):
    status = archive.stat()
    identity = repr((str(archive.resolve()), status.st_size, status.st_mtime_ns, prefix))
    return f"{archive.name}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"


def _extract(file, members, layout, folder):
    """Unpacks the images of a layout beside `folder`, and renames the result to `folder` once it is complete."""
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
        memory = None if cache_dir is None else pathlib.Path(cache_dir) / "digests.index"
        return _from_files(str(spec), path, _layout(_folder_entries(path), path, partial), memory=memory)
    archive = next((part for part in (*reversed(path.parents), path) if part.is_file()), None)
    if archive is None and TFDS_NAME.fullmatch(str(spec)):
        return None
    if archive is None or not (zipfile.is_zipfile(archive) or archive.suffix.lower() == ".zip"):
        raise InputError(f"There is no data set {str(spec)!r}: give {ACCEPTED}.")
    folder = default_cache_dir() if cache_dir is None else pathlib.Path(cache_dir)
    return _zip(str(spec), archive, path, folder, partial)
