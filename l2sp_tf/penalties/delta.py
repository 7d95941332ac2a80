"""Delta checkpoints: the difference of a fine-tuned model from its anchors, exact to the bit."""

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
    """The size of a delta file.

    Attributes:
        bytes: size of the file.
        full_bytes: size of all weights of the model, stored whole.
        encodings: number of weights for each encoding: "equal", "changed" or "whole".
    """

    bytes: int
    full_bytes: int
    encodings: dict

    def __str__(self):
        counts = ", ".join(f"{count} {name}" for name, count in self.encodings.items())
        return f"{self.bytes:,} bytes, {self.bytes / self.full_bytes:.1%} of {self.full_bytes:,}; weights: {counts}"


def save_delta(model: keras.Model, anchors: Anchors, path: Path) -> DeltaSize:
    """Writes the difference of a model from its anchors atomically; `load_delta` restores the model to the bit.

    Each weight has one of three encodings, all exact for any dtype:
    - "equal": its bits are the anchor's; nothing is stored;
    - "changed": a bit mask of the changed numbers and their differences, deflated;
    - "whole": for new weights such as a head, for another shape or dtype than the anchor's, and wherever it is smaller.

    Args:
        model: a built Keras model.
        anchors: the `Anchors` that it started from.
        path: the safetensors file.

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
    """Restores the weights that `save_delta` wrote, to the bit.

    Args:
        model: a built Keras model of the same architecture and dtypes.
        anchors: the same `Anchors`.
        path: the delta file.

    Raises:
        InputError: the file is missing, damaged or not a delta; the anchors differ; or the model has another
            architecture or dtype (the message lists both sides). The model then keeps its weights.
    """
    stored, metadata = load_arrays(path, FORMAT, "not a delta", "save_delta")
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
    """Raises if the model has another dtype: a cast would change the saved values."""
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
    """Returns the encoding of an array with an anchor, and the array to store, or None."""
    bits, base = _bits(array), _bits(anchor)
    if np.array_equal(bits, base):
        return "equal", None
    packed = _packed(bits, base)
    return ("changed", packed) if packed.nbytes < array.nbytes else ("whole", array)


def _decoded(entry, stored, anchors):
    """Decodes one weight; a mismatch raises errors of many kinds."""
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
    """Returns the bits of an array's numbers as unsigned integers, in one dimension."""
    return np.asarray(array, order="C").reshape(-1).view(f"u{array.dtype.itemsize}")


def _packed(bits, base):
    """Deflates the mask of differing numbers and the differences of their bits.

    A difference d modulo 2^n is folded to 2d or -2d - 1 (zigzag), so that small steps in either direction have zero high
    bytes. Bytes of equal significance are stored together.
    """
    differs = bits != base
    difference = bits[differs] - base[differs]
    folded = (difference << 1) ^ -(difference >> (8 * bits.itemsize - 1))
    planes = folded.view("u1").reshape(-1, bits.itemsize).T
    return np.frombuffer(zlib.compress(np.packbits(differs).tobytes() + planes.tobytes()), "u1")


def _unpacked(packed, base):
    """Inverts `_packed`."""
    marks = -(-base.size // 8)
    content = zlib.decompressobj().decompress(packed.tobytes(), marks + base.nbytes)  # the limit stops decompression bombs
    differs = np.unpackbits(np.frombuffer(content[:marks], "u1"), count=base.size).astype(bool)
    planes = np.frombuffer(content[marks:], "u1").reshape(base.itemsize, -1)
    folded = planes.T.copy().view(base.dtype).reshape(-1)
    bits = base.copy()
    bits[differs] += (folded >> 1) ^ -(folded & 1)
    return bits
