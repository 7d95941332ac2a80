"""The sha256 of image files; a file is read again only after a change."""

import concurrent.futures
import hashlib
import os
import time

import filelock
import numpy as np

from l2sp_tf.data.entries import EntryFile

SETTLED_SECONDS = 2  # a file that changed this recently may change again with the same time


def file_digests(files, memory=None):
    """Returns the size and the sha256 of each file's content.

    Args:
        files: paths.
        memory: a file that remembers digests by path, size and times of change; None to read all files.

    Returns:
        A list of (size, 32 bytes).

    Raises:
        OSError: a file cannot be read.
    """
    states = [os.stat(path) for path in files]
    keys = [_key(path, state) for path, state in zip(files, states, strict=True)]
    found = {} if memory is None else _remembered(memory)
    unknown = [i for i, key in enumerate(keys) if key not in found]
    with concurrent.futures.ThreadPoolExecutor() as pool:  # reading and hashing release Python's lock
        read = dict(zip(unknown, pool.map(lambda i: _digest(files[i]), unknown), strict=True))
    settled = time.time() - SETTLED_SECONDS
    new = {keys[i]: read[i] for i in unknown if max(states[i].st_mtime, states[i].st_ctime) < settled}
    if memory is not None and new:
        _remember(memory, new)
    return [(state.st_size, read[i] if i in read else found[keys[i]]) for i, state in enumerate(states)]


def digest_of_rows(images):
    """Identifies a part of a data set: a hash of its labels and of the places of its images, in hexadecimal."""
    return hashlib.sha256(images.labels.tobytes() + images.places.tobytes()).hexdigest()


def _key(path, state):
    identity = repr((os.path.abspath(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()[:16]


def _digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _entry_file(path):
    return EntryFile(path, [("sha256", "V32")])


def _remembered(path):
    entries, places = _entry_file(path).read()
    content = entries["sha256"]
    return {key: content[i].tobytes() for key, i in places.items()}


def _remember(path, digests):
    file = _entry_file(path)
    entries = np.zeros(len(digests), file.dtype)
    entries["key"] = np.array([np.void(key) for key in digests])
    entries["sha256"] = np.array([np.void(digest) for digest in digests.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        file.append(entries)
