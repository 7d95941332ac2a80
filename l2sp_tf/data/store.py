"""Decoded pixels on disk: each image once, by its content, for all processes and later commands that share the folder."""

import concurrent.futures
import contextlib
import os
import pathlib
import zlib

import filelock
import numpy as np
import tensorflow as tf

from l2sp_tf.data.entries import EntryFile

DECODER = 1  # raise it if decoding or resizing gives other pixels
# for each image: its offset in pixels, its height and width, and the CRC of its pixels
FIELDS = [("offset", "<i8"), ("sides", "<i4", 2), ("pixels", "<u4")]


class PixelStore:
    """The pixels of images that were decoded and resized in one way: an append-only file and its index.

    A process appends under a lock, pixels first, so that a half-written image is never read. The checksum of each image is
    compared before its pixels are used: damaged images count as missing and are appended again.

    Args:
        folder: the folder of the two files; created on the first append.
        how: (size, mode, filter) of the resizing.
    """

    def __init__(self, folder, how):
        name = "-".join(map(str, ("pixels", *how, DECODER, tf.__version__)))
        self._folder = pathlib.Path(folder)
        self._path, self._index = self._folder / f"{name}.uint8", EntryFile(self._folder / f"{name}.index", FIELDS)
        self._whole = set()  # the offsets of images with a verified checksum

    @property
    def is_empty(self):
        """Whether nothing was ever stored."""
        return not self._index.path.exists()

    def lacks(self, keys):
        """Returns the keys that the index does not have, each once; does not check the pixels."""
        _, places = self._index.read()
        return [key for key in dict.fromkeys(keys) if key not in places]

    def missing(self, keys):
        """Returns the keys whose images are absent or damaged, each once."""
        entries, places = self._index.read()
        pixels, keys = self._map(), list(dict.fromkeys(keys))
        offsets = {key: int(entries[places[key]]["offset"]) for key in keys if key in places}
        unseen = [entries[places[key]] for key, offset in offsets.items() if offset not in self._whole]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # checksums release Python's lock
            whole = pool.map(lambda entry: _is_whole(pixels, entry), unseen)
            self._whole.update(int(entry["offset"]) for entry, good in zip(unseen, whole, strict=True) if good)
        return [key for key in keys if offsets.get(key) not in self._whole]

    @contextlib.contextmanager
    def writing(self):
        """Lets only this process append; another one waits here."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{self._path}.lock"):
            yield

    def append(self, keys, images):
        """Appends images, uint8 [h, w, 3] each, under their keys; the caller must be in `writing`.

        Raises:
            OSError: the disk is full or cannot be written; earlier images stay.
        """
        entries = np.zeros(len(keys), self._index.dtype)
        # written, not mapped: a full disk raises OSError here, but would kill the process in a mapping
        with self._path.open("ab") as file:
            file.write(bytes(-file.tell() % 3))  # an interrupted process may have left part of a pixel
            for entry, key, image in zip(entries, keys, images, strict=True):
                entry["key"], entry["offset"], entry["sides"] = np.void(key), file.tell() // 3, image.shape[:2]
                entry["pixels"] = zlib.crc32(image.tobytes())
                file.write(image.tobytes())
        self._index.append(entries)
        self._whole.update(entries["offset"].tolist())

    def read(self, keys):
        """Returns all pixels here, and the offset and the sides of each key's image.

        Returns:
            uint8 [all pixels, 3], mapped; int64 [n], counted in pixels; int64 [n, 2].
        """
        entries, places = self._index.read()
        found = entries[[places[key] for key in keys]]
        return self._map(), found["offset"].astype(np.int64), found["sides"].astype(np.int64)

    def _map(self):
        length = self._path.stat().st_size // 3 if self._path.exists() else 0
        if not length:
            return np.empty((0, 3), np.uint8)
        # copy-on-write, because tensors share only writable memory; it is never written
        return np.memmap(self._path, np.uint8, mode="c", shape=(length, 3))


def _is_whole(pixels, entry):
    """Whether an entry's pixels are here and have its checksum."""
    first, last = int(entry["offset"]), int(entry["offset"]) + int(entry["sides"].prod(dtype=np.int64))
    return last <= len(pixels) and zlib.crc32(pixels[first:last]) == entry["pixels"]
