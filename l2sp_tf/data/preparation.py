"""Prepares a set of TensorFlow Datasets: first its files, then the shards; leaves nothing half-finished behind."""

import contextlib
import pathlib
import shutil

import filelock
import tensorflow_datasets as tfds

from l2sp_tf.data import fetch
from l2sp_tf.data.sets import ACCEPTED
from l2sp_tf.data.tfds_sets import data_folder, find_prepared, known_names
from l2sp_tf.files.errors import InputError

# Files that are available only after registration.
MANUAL_FILES = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}
# Sets whose files are exactly the addresses that TFDS has registered.
LISTED_BY_TFDS = ("stanford_dogs", "places365_small")


def prepare_tfds(name, *, data_dir=None, manual_dir=None, checksums=True, say=print):
    """Downloads the files of a TFDS set and writes its shards; reuses what exists.

    Args:
        name: of the set, with its configuration if it has several ("name/config").
        data_dir: the folder of TFDS's sets; None for its default.
        manual_dir: the folder for files that are downloaded by hand, and for the downloads of the paper's
            sets; None for <data_dir>/downloads/manual/<name>.
        checksums: whether to compare those of Caltech 256 and MIT Indoors 67; TFDS compares all others.
        say: called with a line of text for each step.

    Returns:
        The folder of the prepared set.

    Raises:
        InputError: the set is unknown, a file is missing or wrong, the network does not answer,
            or another process is preparing the set.
        OSError: the folder cannot be written.
    """
    name = name.removeprefix("tfds:")
    found = find_prepared(name, data_dir)
    if found is None:
        top, folder = name.partition("/")[0], data_folder(data_dir)
        if top not in known_names():
            raise InputError(f"There is no data set {name!r} to prepare: give {ACCEPTED.partition(', or ')[2]}.")
        manual = folder / "downloads" / "manual" / top if manual_dir is None else pathlib.Path(manual_dir).expanduser()
        with _alone(folder, top):
            _remove_litter(folder, top)
            found = _prepare(name, folder, manual, checksums, say)
    say(f"{name} is prepared in {found.data_path}")
    return pathlib.Path(found.data_path)


def _prepare(name, folder, manual, checksums, say):
    builder = tfds.builder(name, data_dir=folder)
    _check_manual_files(builder, manual)
    downloads = _downloads(builder)
    for download in downloads:
        fetch.fetch(download, manual, checksums=checksums, say=say)
    urls = [] if downloads or builder.MANUAL_DOWNLOAD_INSTRUCTIONS else sorted(builder.url_infos or ())
    if urls:
        fetch.reach(urls[0])  # TFDS would retry for minutes
    config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    try:
        builder.download_and_prepare(download_dir=folder / "downloads", download_config=config)
    except (InputError, OSError):
        raise
    except Exception as error:  # TFDS builders raise errors of any kind
        _remove_litter(folder, builder.name)
        reason = " ".join(str(error).split())
        raise InputError(f"{name} cannot be prepared ({reason}): fix that, and run prepare.py again.") from error
    return find_prepared(name, folder)


def _downloads(builder):
    """Lists the files to download here instead of in TFDS, which does not resume and does not give up."""
    if builder.name in LISTED_BY_TFDS:
        return [fetch.Download(url, f"sha256:{info.checksum}") for url, info in sorted(builder.url_infos.items())]
    return getattr(builder, "DOWNLOADS", ())


def _check_manual_files(builder, manual):
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS or hasattr(builder, "DOWNLOADS"):
        return
    instructions = " ".join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
    missing = [file for file in MANUAL_FILES.get(builder.name, ()) if not (manual / file).exists()]
    if missing or not manual.is_dir() or not any(manual.iterdir()):
        what = " and ".join(missing) or "what it needs"
        again = f"put {what} into {manual}, and run prepare.py again ({instructions})"
        raise InputError(f"You have to download {builder.name} by hand: {again}.")


def _remove_litter(folder, name):
    """Removes the leftovers of killed preparations: half-written shards, and half-downloaded files of TFDS."""
    for path in (*folder.glob(f"{name}/**/incomplete.*"), *folder.glob(f"downloads/{name}/*.tmp.*")):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder, name):
    """Holds a lock while a set is prepared; the system releases it when the process ends in any way."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.lock"
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"{name} is being prepared in {folder} by another process: wait for it.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # on Windows a file that is open cannot be removed; there `release` removes it
            path.unlink()
        lock.release()
