"""Arrays by name: read-only in memory, and in safetensors files whose content is verified."""

import collections.abc
import copy
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, Self

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from l2sp_tf.files.errors import InputError
from l2sp_tf.files.memory import aligned_copy
from l2sp_tf.files.reading import parse_json, refusing
from l2sp_tf.files.types import Path, Weights
from l2sp_tf.files.writing import atomic_path

WEIGHTS = "l2sp_tf.anchors.v1"


class Arrays(collections.abc.Mapping):
    """A read-only mapping from the key of a weight to a read-only copy of its array.

    Args:
        arrays: a mapping from key to array.
        dtype: the dtype of all arrays; None keeps the dtype of each.
    """

    def __init__(self, arrays: Weights, dtype: Any = None) -> None:
        self._arrays = {}
        for key, value in arrays.items():
            array = aligned_copy(value, dtype)  # copied: an anchor that shared a live weight's memory would penalise nothing
            array.flags.writeable = False
            self._arrays[key] = array

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    @property
    def manifest(self) -> list[dict[str, Any]]:
        """The name, shape, dtype and sha256 of each array, as a list of dicts."""
        return manifest_of(self)

    @functools.cached_property
    def digest(self) -> str:
        """The sha256 of the manifest, in hexadecimal: equal digests mean bit-equal arrays."""
        return digest_of(self.manifest)


class Snapshot(Arrays):
    """The weights of a model, copied: a read-only mapping from key to array, with metadata.

    Args:
        arrays: a mapping from key to array.
        metadata: a dict from name to a JSON value, such as "pixels" (`PixelFormat.plain`) and "provenance"; or None.
    """

    def __init__(self, arrays: Weights, metadata: dict[str, Any] | None = None) -> None:
        super().__init__(arrays)
        self.metadata = dict(metadata or {})

    def __repr__(self):
        numbers = sum(array.size for array in self.values())
        return f"{type(self).__name__}({len(self)} arrays, {numbers:,} numbers, digest {self.digest[:12]})"

    def with_metadata(self, **metadata: Any) -> Self:
        """Returns the same weights, sharing the arrays, with more metadata; entries that exist already are kept."""
        other = copy.copy(self)
        other.metadata = {**metadata, **self.metadata}
        return other

    def save(self, path: Path) -> None:
        """Writes the arrays, their manifest and the metadata to a safetensors file, atomically.

        Raises:
            OSError: the file cannot be written.
        """
        header = {name: json.dumps(value) for name, value in self.metadata.items()}
        save_arrays(path, self._arrays, WEIGHTS, {**header, "digest": self.digest})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads weights that `save` wrote, and verifies each array against the manifest.

        Raises:
            InputError: the file is missing, is not one that `save` wrote, or differs from its manifest.
        """
        arrays, metadata = load_arrays(path, WEIGHTS, "not a file of anchors", "Anchors.save")
        digest = metadata.pop("digest", None)
        metadata = {name: parse_json(text, f"The {name} in {path} is damaged") for name, text in metadata.items()}
        found = cls(arrays, metadata)
        if found.digest != digest:
            raise InputError(
                f"The anchors in {path} are damaged (their digest differs from the one saved with them): use another copy."
            )
        return found


def manifest_of(arrays):
    """Lists the name, shape, dtype and sha256 of each array in a mapping."""
    return [
        {"name": key, "shape": list(array.shape), "dtype": array.dtype.name, "sha256": _sha256(array)}
        for key, array in arrays.items()
    ]


def digest_of(manifest):
    """Returns the sha256 over a manifest; the order of its entries does not matter."""
    entries = sorted(manifest, key=lambda entry: entry["name"])
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def digest_of_arrays(arrays):
    """Returns the digest of an `Anchors`, a `Fisher` or any other mapping from the key of a weight to an array."""
    return (arrays if hasattr(arrays, "digest") else Arrays(arrays)).digest


def save_arrays(path, arrays, format, metadata):
    """Writes arrays to a safetensors file with a manifest in its header, atomically.

    Args:
        path: the file.
        arrays: a mapping from name to NumPy array, of any dtype of NumPy or ml_dtypes.
        format: the name of the file's format, stored in the header.
        metadata: a dict of strings, stored in the header with the manifest and a sha256 of both.

    Raises:
        OSError: the file cannot be written.
    """
    stored = {key: np.asarray(array, order="C") for key, array in arrays.items()}
    # safetensors' NumPy reader does not know bfloat16 and 8-bit floats: store their bits as integers.
    stored = {key: a if a.dtype.kind in "fiub" else a.view(f"u{a.dtype.itemsize}") for key, a in stored.items()}
    header = {"format": format, **metadata, "manifest": json.dumps(manifest_of(arrays))}
    header["sha256"] = _sha256_of(header)
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(stored, header))


def load_arrays(path, format, otherwise, writer):
    """Reads a file that `save_arrays` wrote, verifies each array, and returns (arrays, metadata).

    Args:
        path: the file.
        format: the required format.
        otherwise: the message's words for a file of another format, such as "not a delta".
        writer: the function that writes such files, named in the message.

    Raises:
        InputError: the file is missing or not such a file, its header differs from its sha256, or an
            array differs from its shape, dtype or sha256 in the manifest.
    """
    path = _existing(path)
    with refusing(f"{path} is damaged or not a file that this project wrote"):
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            if metadata.pop("sha256", None) != _sha256_of(metadata):
                raise ValueError("its header does not match its sha256")
            manifest = parse_json(metadata.pop("manifest", "null"), f"The manifest of {path} is damaged")
            raw = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not iterable)
        arrays = {entry["name"]: _decode(raw.pop(entry["name"]), entry) for entry in manifest}
    if raw:
        raise InputError(f"{path} holds arrays that its manifest does not list ({', '.join(sorted(raw)[:5])}): use another copy.")
    if (found := metadata.pop("format", None)) != format:
        raise InputError(f"{path} is {otherwise} (its format is {found!r}): give one that {writer} wrote.")
    return arrays, metadata


def read_header(path):
    """Returns the metadata of any safetensors file and the shape of each array, without reading the arrays.

    Raises:
        InputError: the file is missing or not a safetensors file.
    """
    path = _existing(path)
    with refusing(f"{path} is damaged or not a safetensors file"):
        with safetensors.safe_open(path, framework="numpy") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not iterable)
            return dict(file.metadata() or {}), shapes


def _existing(path):
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}: give the path of a saved safetensors file.")
    return path


def _decode(array, entry):
    """Restores the dtype of a stored array and checks the array against its manifest entry."""
    if array.dtype.name != entry["dtype"]:
        array = array.view(np.dtype(getattr(ml_dtypes, entry["dtype"], entry["dtype"])))
    is_numeric = array.dtype.kind in "fiub" or hasattr(ml_dtypes, array.dtype.name)
    found = {"name": entry["name"], "shape": list(array.shape), "dtype": array.dtype.name, "sha256": _sha256(array)}
    if found != entry or not is_numeric:
        raise ValueError(f"the array {entry['name']!r} does not have the shape, dtype and sha256 of the manifest")
    return array


def _sha256_of(metadata):
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()


def _sha256(array):
    return hashlib.sha256(array.tobytes()).hexdigest()
