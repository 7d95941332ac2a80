"""Preparing a set of TensorFlow Datasets: files first, then the shards, and nothing half-finished left behind."""

import contextlib
import pathlib
import shutil

import tensorflow_datasets as tfds

from l2sp_tf.data import fetch
from l2sp_tf.data.sets import ACCEPTED
from l2sp_tf.data.tfds_sets import data_folder, find_prepared, known_names
from l2sp_tf.files.errors import InputError

# The files that their owners give out on registration only.
MANUAL_FILES = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}
# Sets of TFDS whose registered addresses are exactly the files they are made of.
LISTED_BY_TFDS = ("stanford_dogs", "places365_small")


def prepare_tfds(name, *, data_dir=None, manual_dir=None, checksums=True, say=print):
    """Downloads what a set of TFDS is made of, and writes its shards; what is there already is used.

    Args:
        name: of the set, with its configuration where it has several ("name/config").
        data_dir: where TFDS keeps its sets; None for its own default.
        manual_dir: where files lie that were downloaded by hand, and where those of the paper's
            sets are loaded to; None for <data_dir>/downloads/manual/<name>.
        checksums: whether those of Caltech 256 and MIT Indoors 67 are compared; TFDS compares all others.
        say: called with a line of text for each step of the work.

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
            raise InputError(f"no data set {name!r} can be prepared: give {ACCEPTED.partition(', or ')[2]}")
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
        fetch.reach(urls[0])  # TFDS would try for minutes
    config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    try:
        builder.download_and_prepare(download_dir=folder / "downloads", download_config=config)
    except (InputError, OSError):
        raise
    except Exception as error:  # a builder of TFDS raises what it likes
        _remove_litter(folder, builder.name)
        raise InputError(f"{name} cannot be prepared ({' '.join(str(error).split())}): mend that, and run it again") from error
    return find_prepared(name, folder)


def _downloads(builder):
    """The files that are loaded here, and not by TFDS, which neither resumes them nor gives up."""
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
        raise InputError(f"{builder.name} is downloaded by hand: put {what} into {manual}, and run it again ({instructions})")


def _remove_litter(folder, name):
    """Removes what killed preparations of a set have left: half-written shards, and half-loaded files of TFDS."""
    for path in (*folder.glob(f"{name}/**/incomplete.*"), *folder.glob(f"downloads/{name}/*.tmp.*")):
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _alone(folder, name):
    """Holds a lock for preparing a set, which the system lets go when the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{name}.lock"
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"{name} is being prepared in {folder} by another process: wait for it") from error
        try:
            yield
        finally:
            path.unlink()
