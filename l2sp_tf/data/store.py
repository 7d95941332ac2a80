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

DECODER = 1  # raise it when decoding or resizing gives other pixels
# of an image: where its pixels begin (counted in pixels), its height and width, and the CRC of its pixels
FIELDS = [("start", "<i8"), ("sides", "<i4", 2), ("pixels", "<u4")]


class PixelStore:
    """The pixels of images that were decoded and resized in one way: a file that only grows, and an index of it.

    A process appends under a lock, pixels first, so that what another one was cut off in is never read. The checksum of
    each image is compared before its pixels are used: damaged ones count as missing, and are appended again.

    Args:
        folder: where the two files lie; it is made when something is appended.
        how: (size, mode, filter) of the resizing.
    """

    def __init__(self, folder, how):
        name = "-".join(map(str, ("pixels", *how, DECODER, tf.__version__)))
        self._folder = pathlib.Path(folder)
        self._path, self._index = self._folder / f"{name}.uint8", EntryFile(self._folder / f"{name}.index", FIELDS)
        self._whole = set()  # where the images begin whose checksums were compared

    @property
    def is_empty(self):
        """Whether nothing was ever stored."""
        return not self._index.path.exists()

    def lacks(self, keys):
        """The keys, each once, that the index does not have; the pixels are not looked at."""
        _, places = self._index.read()
        return [key for key in dict.fromkeys(keys) if key not in places]

    def missing(self, keys):
        """The keys, each once, whose images are not here or are damaged."""
        entries, places = self._index.read()
        pixels, keys = self._map(), list(dict.fromkeys(keys))
        starts = {key: int(entries[places[key]]["start"]) for key in keys if key in places}
        unseen = [entries[places[key]] for key, start in starts.items() if start not in self._whole]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # a checksum does not hold Python's lock
            whole = pool.map(lambda entry: _is_whole(pixels, entry), unseen)
            self._whole.update(int(entry["start"]) for entry, good in zip(unseen, whole, strict=True) if good)
        return [key for key in keys if starts.get(key) not in self._whole]

    @contextlib.contextmanager
    def writing(self):
        """Lets this process alone append; another one waits here."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{self._path}.lock"):
            yield

    def append(self, keys, images):
        """Adds images, uint8 [h, w, 3] each, under their keys; the caller is `writing`.

        Raises:
            OSError: the disk is full, or cannot be written; what was appended before stays.
        """
        entries = np.zeros(len(keys), self._index.dtype)
        # written, not mapped: a full disk then raises OSError, where a mapping would kill the process
        with self._path.open("ab") as file:
            file.write(bytes(-file.tell() % 3))  # what an interrupted process left may end within a pixel
            for entry, key, image in zip(entries, keys, images, strict=True):
                entry["key"], entry["start"], entry["sides"] = np.void(key), file.tell() // 3, image.shape[:2]
                entry["pixels"] = zlib.crc32(image.tobytes())
                file.write(image.tobytes())
        self._index.append(entries)
        self._whole.update(entries["start"].tolist())

    def read(self, keys):
        """All pixels here, and for each key where its image begins in them, and its sides.

        Returns:
            uint8 [pixels in all, 3], mapped; int64 [n], counted in pixels; int64 [n, 2].
        """
        entries, places = self._index.read()
        found = entries[[places[key] for key in keys]]
        return self._map(), found["start"].astype(np.int64), found["sides"].astype(np.int64)

    def _map(self):
        length = self._path.stat().st_size // 3 if self._path.exists() else 0
        if not length:
            return np.empty((0, 3), np.uint8)
        # copy-on-write, as only writable memory can be shared with tensors; nobody writes to it
        return np.memmap(self._path, np.uint8, mode="c", shape=(length, 3))


def _is_whole(pixels, entry):
    """Whether the pixels that an entry tells of are here and have its checksum."""
    first, last = int(entry["start"]), int(entry["start"]) + int(entry["sides"].prod(dtype=np.int64))
    return last <= len(pixels) and zlib.crc32(pixels[first:last]) == entry["pixels"]
