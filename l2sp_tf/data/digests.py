"""What identifies the content of image files, and how they are read; a file is read again only after a change."""

import concurrent.futures
import hashlib
import os
import time

import filelock
import numpy as np

from l2sp_tf.data.entries import EntryFile
from l2sp_tf.data.headers import READER, reading_of
from l2sp_tf.files.reading import MAX_IMAGE_BYTES

SETTLED_SECONDS = 2  # a file that changed this recently may change again with the same time


def file_digests(files, memory=None):
    """Returns the size of each file, a digest of its pixels as they are read, and how they are read.

    The digest is the sha256 of the content. Images that earlier versions read otherwise, or not at all, have another: the
    sha256 of that sha256 and of how they are read. So what was made of their earlier pixels is not used for them.

    Args:
        files: paths.
        memory: a file that remembers digests by path, size, times of change and `READER`; None to read all files.

    Returns:
        A list of (size, 32 bytes, `headers.Header.reading`).

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
    return [(state.st_size, *(read[i] if i in read else found[keys[i]])) for i, state in enumerate(states)]


def digest_of_rows(images):
    """Identifies a part of a data set: a hash of its labels and of the places of its images, in hexadecimal."""
    return hashlib.sha256(images.labels.tobytes() + images.places.tobytes()).hexdigest()


def _key(path, state):
    identity = repr((READER, os.path.abspath(path), state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return hashlib.sha256(identity.encode("utf-8", "surrogateescape")).digest()[:16]


def _digest(path):
    with open(path, "rb") as file:
        content = file.read(MAX_IMAGE_BYTES + 1)
        if len(content) > MAX_IMAGE_BYTES:  # no image
            file.seek(0)
            return hashlib.file_digest(file, "sha256").digest(), 0
    digest, reading = hashlib.sha256(content).digest(), reading_of(content)
    return hashlib.sha256(digest + bytes([READER, reading])).digest() if reading else digest, reading


def _entry_file(path):
    return EntryFile(path, [("digest", "V32"), ("reading", "u1")])


def _remembered(path):
    entries, places = _entry_file(path).read()
    digests, readings = entries["digest"], entries["reading"].tolist()
    return {key: (digests[i].tobytes(), readings[i]) for key, i in places.items()}


def _remember(path, digests):
    file = _entry_file(path)
    entries = np.zeros(len(digests), file.dtype)
    entries["key"] = np.array([np.void(key) for key in digests])
    entries["digest"] = np.array([np.void(digest) for digest, _ in digests.values()])
    entries["reading"] = [reading for _, reading in digests.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        file.append(entries)
