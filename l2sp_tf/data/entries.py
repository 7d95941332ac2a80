"""Append-only files of entries of equal size, each with a checksum, so that a half-written entry is never read."""

import pathlib
import zlib

import numpy as np


class EntryFile:
    """Entries with keys of 16 bytes; of several with the same key the last counts.

    Args:
        path: the file; it need not exist.
        fields: names and types of the fields between the key and the checksum.
    """

    def __init__(self, path, fields):
        self.path = pathlib.Path(path)
        self.dtype = np.dtype([("key", "V16"), *fields, ("check", "<u4")])

    def read(self):
        """Reads the entries with a correct checksum: returns an array, and a dict from key (bytes) to position in it."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            content = b""
        size = self.dtype.itemsize
        entries = np.frombuffer(content[: len(content) // size * size], self.dtype)
        parts = (content[first : first + size] for first in range(0, entries.nbytes, size))
        checks = entries["check"].tolist()
        return entries, {part[:16]: i for i, part in enumerate(parts) if zlib.crc32(part[:-4]) == checks[i]}

    def append(self, entries):
        """Appends an array of entries after setting their checksums. Only one process at a time may append.

        Raises:
            OSError: the disk is full or cannot be written.
        """
        for entry in entries:
            entry["check"] = zlib.crc32(entry.tobytes()[:-4])
        with self.path.open("ab") as file:
            file.write(bytes(-file.tell() % self.dtype.itemsize))  # an interrupted process may have left part of an entry
            file.write(entries.tobytes())
