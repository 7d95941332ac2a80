"""Delta checkpoints: what a fine-tuned model differs in from its anchors, exact to the bit."""

import collections
import dataclasses
import json
import pathlib
import zlib

import keras
import numpy as np

from l2sp_tf.files.arrays import load_arrays, save_arrays
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import parse_json, refusing
from l2sp_tf.files.types import Path
from l2sp_tf.penalties.anchors import Anchors
from l2sp_tf.penalties.matching import match
from l2sp_tf.penalties.weights import keyed_weights

FORMAT = "l2sp_tf.delta.v1"


@dataclasses.dataclass(frozen=True)
class DeltaSize:
    """How large a delta file is.

    Attributes:
        bytes: of the file.
        full_bytes: of all weights of the model, stored whole.
        encodings: how many weights are stored in each way: "equal", "changed" or "whole".
    """

    bytes: int
    full_bytes: int
    encodings: dict

    def __str__(self):
        counts = ", ".join(f"{count} {name}" for name, count in self.encodings.items())
        return f"{self.bytes:,} bytes, {self.bytes / self.full_bytes:.1%} of {self.full_bytes:,}; weights: {counts}"


def save_delta(model: keras.Model, anchors: Anchors, path: Path) -> DeltaSize:
    """Writes what a model differs in from its anchors, atomically; `load_delta` gives it back to the bit.

    Each weight is stored in one of three ways, all exact for any dtype:
    - "equal": its bits are the anchor's, and nothing is stored;
    - "changed": a bit for each number that tells whether it differs, and the differences of those
      that do, deflated;
    - "whole": new weights, such as a head, those of another shape or dtype than the anchor, and
      those of which this is smaller.

    Args:
        model: a built Keras model.
        anchors: the `Anchors` that it started from.
        path: of the safetensors file.

    Returns:
        A `DeltaSize`.

    Raises:
        InputError: no weight of the model has an anchor of its name, shape and dtype.
        OSError: the file cannot be written.
    """
    weights = Anchors.of(model)
    matches = {key: other for key, other in match(weights, anchors).pairs.items() if _alike(weights[key], anchors[other])}
    if not matches:
        raise InputError(
            f"No weight of the model {model.name!r} has an anchor of its name, shape and dtype: "
            "give the anchors of the model that it started from."
        )
    stored, entries = {}, []
    for key, array in weights.items():
        anchor = matches.get(key)
        encoding, part = ("whole", array) if anchor is None else _encoded(array, anchors[anchor])
        if part is not None:
            stored[key] = part
        entries.append({"name": key, "anchor": anchor, "encoding": encoding})
    header = {"anchors": anchors.digest, "digest": weights.digest, "weights": json.dumps(entries)}
    save_arrays(path, stored, FORMAT, header)
    counts = collections.Counter(entry["encoding"] for entry in entries)
    return DeltaSize(pathlib.Path(path).stat().st_size, sum(a.nbytes for a in weights.values()), dict(counts))


def load_delta(model: keras.Model, anchors: Anchors, path: Path) -> None:
    """Gives a model the weights that `save_delta` wrote, to the bit.

    Args:
        model: a built Keras model of the same architecture and dtypes.
        anchors: the same `Anchors`.
        path: of the file.

    Raises:
        InputError: the file is missing, damaged or no delta; the anchors are others; or the
            model is of another architecture or dtype (both sides are listed). The model then keeps its weights.
    """
    stored, metadata = load_arrays(path, FORMAT, "no delta", "save_delta")
    if metadata.get("anchors") != anchors.digest:
        raise InputError(
            f"{path} differs from anchors of digest {str(metadata.get('anchors'))[:12]}, but these have {anchors.digest[:12]}: "
            "give the anchors of the model that it was fine-tuned from."
        )
    with refusing(f"{path} is damaged"):
        entries = parse_json(metadata["weights"], f"{path} is damaged")
        weights = Anchors({entry["name"]: _decoded(entry, stored, anchors) for entry in entries})
    if weights.digest != metadata.get("digest"):
        raise InputError(f"{path} is damaged: the digest of the weights is not the one in its header; use another copy.")
    _check_dtypes(model, weights)
    weights.restore(model)


def _check_dtypes(model, weights):
    """A value that is cast is not the one that was saved."""
    own = keyed_weights(model)
    for key, other in match(own, weights, values=False).pairs.items():
        if own[key].variable.dtype != weights[other].dtype.name:
            raise InputError(
                f"{key} is of {own[key].variable.dtype} in the model {model.name!r}, but of {weights[other].dtype.name} "
                "in the delta: build the model with the dtype it was saved in."
            )


def _alike(a, b):
    return a.shape == b.shape and a.dtype == b.dtype


def _encoded(array, anchor):
    """The encoding of an array that has an anchor, and what is stored of it."""
    bits, base = _bits(array), _bits(anchor)
    if np.array_equal(bits, base):
        return "equal", None
    packed = _packed(bits, base)
    return ("changed", packed) if packed.nbytes < array.nbytes else ("whole", array)


def _decoded(entry, stored, anchors):
    """One weight from what is stored of it; errors of many kinds where the two do not fit."""
    name, encoding = entry["name"], entry["encoding"]
    if encoding == "whole":
        return stored[name]
    anchor = anchors[entry["anchor"]]
    if encoding == "equal":
        return anchor
    if encoding != "changed":
        raise ValueError(f"the encoding {encoding!r} of {name} is unknown")
    return _unpacked(stored[name], _bits(anchor)).view(anchor.dtype).reshape(anchor.shape)


def _bits(array):
    """The numbers of an array as unsigned integers of the same bits, in one dimension."""
    return np.asarray(array, order="C").reshape(-1).view(f"u{array.dtype.itemsize}")


def _packed(bits, base):
    """Which numbers differ, and the differences of their bits, deflated to bytes.

    A difference d of the bits modulo 2^n is folded to 2d or -2d - 1, so that a small step either way
    has zeros in its high bytes; bytes of equal significance stand together.
    """
    differs = bits != base
    difference = bits[differs] - base[differs]
    folded = (difference << 1) ^ -(difference >> (8 * bits.itemsize - 1))
    planes = folded.view("u1").reshape(-1, bits.itemsize).T
    return np.frombuffer(zlib.compress(np.packbits(differs).tobytes() + planes.tobytes()), "u1")


def _unpacked(packed, base):
    """The bits that `_packed` was given."""
    marks = -(-base.size // 8)
    content = zlib.decompressobj().decompress(packed.tobytes(), marks + base.nbytes)  # never more than that
    differs = np.unpackbits(np.frombuffer(content[:marks], "u1"), count=base.size).astype(bool)
    planes = np.frombuffer(content[marks:], "u1").reshape(base.itemsize, -1)
    folded = planes.T.copy().view(base.dtype).reshape(-1)
    bits = base.copy()
    bits[differs] += (folded >> 1) ^ -(folded & 1)
    return bits
