"""The starting point w0: a snapshot of a model's weights by value, saved and verified."""

import collections.abc
import copy
import hashlib
import json
import pathlib

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from l2sp_tf.files.errors import InputError
from l2sp_tf.files.memory import aligned_copy
from l2sp_tf.files.reading import parse_json, refusing
from l2sp_tf.files.writing import atomic_path
from l2sp_tf.models.copies import assign
from l2sp_tf.models.pixels import PixelFormat
from l2sp_tf.penalties.matching import match
from l2sp_tf.penalties.weights import keyed_weights

FORMAT = "l2sp_tf.penalties.anchors.v1"


class Arrays(collections.abc.Mapping):
    """A read-only mapping from the key of a weight to a read-only array, copied by value.

    Args:
        arrays: a mapping from key to array.
        dtype: of all arrays; None keeps each one's own.
    """

    def __init__(self, arrays, dtype=None):
        self._arrays = {}
        for key, value in arrays.items():
            array = aligned_copy(value, dtype)  # a copy: an anchor that aliased a live weight would penalise nothing
            array.flags.writeable = False
            self._arrays[key] = array

    def __getitem__(self, key):
        return self._arrays[key]

    def __iter__(self):
        return iter(self._arrays)

    def __len__(self):
        return len(self._arrays)

    @property
    def manifest(self):
        """For each array its name, shape, dtype and sha256."""
        return manifest_of(self)


class Anchors(Arrays):
    """The pre-trained weights w0 of section 3, a read-only mapping from key to array.

    Keys are those of `l2sp_tf.penalties.weights.keyed_weights`, such as "conv1_conv/kernel". All
    weights are kept, trainable or not, so that the pre-trained model can be restored from
    its anchors: the original head and the source's batch-norm statistics are in them.

    Args:
        arrays: a mapping from key to array.
        pixels: the `PixelFormat` that the weights were trained on, or None if it is not known.
        provenance: a dict of where the weights come from, or None.
    """

    def __init__(self, arrays, pixels=None, provenance=None):
        super().__init__(arrays)
        self.pixels, self.provenance = pixels, provenance
        self._digest = digest_of(self.manifest)

    @classmethod
    def of(cls, model, pixels=None):
        """Copies the weights of a built model by value; later training does not change them."""
        return cls({key: weight.variable.numpy() for key, weight in keyed_weights(model).items()}, pixels)

    def with_pixels(self, pixels):
        """These anchors, their arrays shared, with a `PixelFormat` where they had none."""
        other = copy.copy(self)
        other.pixels = self.pixels or pixels
        return other

    def __repr__(self):
        return f"Anchors({len(self)} arrays, {sum(a.size for a in self.values()):,} numbers, digest {self.digest[:12]})"

    @property
    def digest(self):
        """The sha256 of the manifest, in hexadecimal: equal digests mean bit-equal weights."""
        return self._digest

    def save(self, path):
        """Writes the arrays and their manifest to a safetensors file, atomically.

        Raises:
            OSError: the file cannot be written.
        """
        header = {"format": FORMAT, "digest": self.digest}
        if self.pixels is not None:
            header["pixels"] = self.pixels.to_json()
        if self.provenance is not None:
            header["provenance"] = json.dumps(self.provenance)
        save_arrays(path, self._arrays, header)

    @classmethod
    def load(cls, path):
        """Reads anchors that `save` wrote, and verifies each array against the manifest.

        Raises:
            InputError: the file is missing, is no such file, or differs from its manifest.
        """
        arrays, metadata = load_arrays(path)
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{path} is no file of anchors (its format is {metadata.get('format')!r}): give one that Anchors.save wrote."
            )
        pixels = PixelFormat.from_json(metadata["pixels"], path) if "pixels" in metadata else None
        provenance = parse_json(metadata.get("provenance", "null"), f"The provenance in {path} is damaged")
        anchors = cls(arrays, pixels, provenance)
        if anchors.digest != metadata.get("digest"):
            raise InputError(f"The anchors in {path} are damaged: their digest is not the one in the manifest; use another copy.")
        return anchors

    def restore(self, model):
        """Assigns these values to the weights of `model` that have the same key; its layers derive their state from them.

        Args:
            model: a built model of the same architecture.

        Raises:
            InputError: a weight of the model is missing here or has another shape, or the
                other way round; both sides are listed, and the model is left as it was.
        """
        weights = keyed_weights(model)
        found = match(weights, self, values=False)  # the model holds other values
        pairs, other_shape = found.pairs, found.other_shape
        wrong = [
            f"{key} {tuple(weight.variable.shape)} / {self._partner(key, found)}"
            for key, weight in weights.items()
            if key not in pairs
        ]
        named = {*pairs.values(), *other_shape.values(), *(key for keys in found.ambiguous.values() for key in keys)}
        wrong += [f"missing / {key} {self[key].shape}" for key in self if key not in named]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise InputError(
                f"These weights are not of the architecture of the model {model.name!r} "
                f"(model / weights: {'; '.join(wrong[:5])}{more}): choose the architecture they were made with."
            )
        assign(model, {key: self[other] for key, other in pairs.items()})

    def _partner(self, key, found):
        """What is said of a weight of a model that has no partner of its shape here."""
        if key in found.ambiguous:
            return f"any of {', '.join(found.ambiguous[key])}"
        return self[found.other_shape[key]].shape if key in found.other_shape else "missing"


def manifest_of(arrays):
    """The manifest of a mapping of arrays: a list of name, shape, dtype and sha256."""
    return [
        {"name": key, "shape": list(array.shape), "dtype": array.dtype.name, "sha256": _sha256(array)}
        for key, array in arrays.items()
    ]


def digest_of(manifest):
    """The sha256 over a manifest, whatever the order of its entries."""
    entries = sorted(manifest, key=lambda entry: entry["name"])
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def digest_of_arrays(arrays):
    """The digest of an `Anchors`, a `Fisher` or any other mapping from the key of a weight to an array."""
    return arrays.digest if hasattr(arrays, "digest") else digest_of(Arrays(arrays).manifest)


def save_arrays(path, arrays, metadata):
    """Writes arrays to a safetensors file with a manifest in its header, atomically.

    Args:
        path: the file.
        arrays: a mapping from name to NumPy array of any dtype of NumPy or ml_dtypes.
        metadata: a dict of strings kept in the header beside the manifest and a sha256 of both.

    Raises:
        OSError: the file cannot be written.
    """
    stored = {key: np.asarray(array, order="C") for key, array in arrays.items()}
    # safetensors' NumPy reader knows no bfloat16 and no 8-bit floats: keep their bits.
    stored = {key: a if a.dtype.kind in "fiub" else a.view(f"u{a.dtype.itemsize}") for key, a in stored.items()}
    header = {**metadata, "manifest": json.dumps(manifest_of(arrays))}
    header["sha256"] = _sha256_of(header)
    with atomic_path(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(stored, header))


def load_arrays(path):
    """Reads what `save_arrays` wrote: (arrays, metadata), each array verified.

    Raises:
        InputError: the file is missing, is not such a file, its header differs from its sha256, or an
            array from its shape, dtype or sha256 in the manifest.
    """
    path = _existing(path)
    with refusing(f"{path} is damaged or not a file that this project wrote"):
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            if metadata.pop("sha256", None) != _sha256_of(metadata):
                raise ValueError("its header does not have the sha256 that it gives")
            manifest = parse_json(metadata.pop("manifest", "null"), f"The manifest of {path} is damaged")
            raw = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not iterable)
        arrays = {entry["name"]: _decode(raw.pop(entry["name"]), entry) for entry in manifest}
    if raw:
        raise InputError(f"{path} holds arrays that its manifest does not list ({', '.join(sorted(raw)[:5])}): use another copy.")
    return arrays, metadata


def read_header(path):
    """The metadata of any safetensors file, and the shape of each array, without reading the arrays.

    Raises:
        InputError: the file is missing, or is not such a file.
    """
    path = _existing(path)
    with refusing(f"{path} is damaged or no safetensors file"):
        with safetensors.safe_open(path, framework="numpy") as file:
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not iterable)
            return dict(file.metadata() or {}), shapes


def _existing(path):
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}: give the path of a saved safetensors file.")
    return path


def _decode(array, entry):
    """Restores the dtype of one stored array and checks it against its manifest entry."""
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
