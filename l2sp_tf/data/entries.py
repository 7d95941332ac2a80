"""Files of entries of one size that are only ever appended, each with a checksum: what was cut off is never read."""

import pathlib
import zlib

import numpy as np


class EntryFile:
    """Entries by a key of 16 bytes; of several with one key the last counts.

    Args:
        path: the file; it need not exist.
        fields: names and types of the fields between the key and the checksum.
    """

    def __init__(self, path, fields):
        self.path = pathlib.Path(path)
        self.dtype = np.dtype([("key", "V16"), *fields, ("check", "<u4")])

    def read(self):
        """The whole entries there are: an array, and a dict from key (bytes) to position in it."""
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
        """Appends an array of entries, whose checksums are set here. One process at a time may do so.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        for entry in entries:
            entry["check"] = zlib.crc32(entry.tobytes()[:-4])
        with self.path.open("ab") as file:
            file.write(bytes(-file.tell() % self.dtype.itemsize))  # an interrupted process may have left a part of one
            file.write(entries.tobytes())
