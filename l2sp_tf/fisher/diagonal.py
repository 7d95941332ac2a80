"""`Fisher`: the diagonal F_jj of the Fisher information of each weight, its file, its sums and its transforms."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from l2sp_tf.files.arrays import Arrays, digest_of, load_arrays, save_arrays
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.reading import parse_json, refusing
from l2sp_tf.files.types import Path, Weights

FORMAT = "l2sp_tf.fisher.v1"
MODES = ("rademacher", "mc", "exact")
PROVENANCE = {"source", "images", "mode", "samples", "seed", "first", "model", "transforms"}


class Fisher(Arrays):
    """The Fisher diagonal, a read-only mapping from key to a float32 array of the weight's shape.

    `fisher_diagonal` and `load` make it. `l2sp_tf.penalties.weights.keyed_weights` names its keys.

    Attributes:
        provenance: a dict that says where the numbers come from: `source` (the caller's words),
            `images` (how many), `mode`, `samples`, `seed`, `first`, `model` (the digest of the
            model's weights), `weights` (the sha256 of each weight of the model, by key; older
            files lack it) and `transforms`.
    """

    def __init__(self, arrays: Weights, provenance: dict[str, Any], statistics: Mapping[str, Any]) -> None:
        super().__init__(arrays, "float32")
        self.provenance = json.loads(json.dumps(provenance))
        self._statistics = {layer: [float(n) for n in sums] for layer, sums in statistics.items()}

    def __repr__(self):
        size = sum(array.size for array in self.values())
        return f"Fisher({len(self)} arrays, {size:,} numbers, {self.provenance['images']} images, digest {self.digest[:12]})"

    @property
    def digest(self) -> str:
        """The sha256 of the arrays, provenance and statistics, in hexadecimal."""
        parts = [digest_of(self.manifest), self.provenance, self._statistics]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes the arrays, provenance and statistics to a safetensors file, atomically.

        Raises:
            OSError: the file cannot be written.
        """
        header = {"provenance": json.dumps(self.provenance), "statistics": json.dumps(self._statistics)}
        save_arrays(path, self._arrays, FORMAT, {"digest": self.digest, **header})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a file that `save` wrote, and verifies its manifest and digest.

        Raises:
            InputError: the file is missing, of another format, or damaged.
        """
        arrays, metadata = load_arrays(path, FORMAT, "not a Fisher diagonal", "Fisher.save")
        fisher = cls(arrays, *_header(metadata, path))
        if fisher.digest != metadata.get("digest"):
            raise InputError(f"The Fisher diagonal in {path} is damaged: its digest is not that of its header; use another copy.")
        return fisher

    def __add__(self, other):
        """Averages two partial passes, weighted by their numbers of images.

        Fields of the provenance that differ (source, seed, first) become lists.

        Raises:
            InputError: the passes differ in model, values of the weights, mode or samples, or one is
                transformed.
        """
        if not isinstance(other, Fisher):
            return NotImplemented
        self._check_addable(other)
        m, n = self.provenance["images"], other.provenance["images"]
        arrays = {key: (m * self[key].astype("float64") + n * other[key]) / (m + n) for key in self}
        statistics = {layer: np.add(sums, other._statistics[layer]) for layer, sums in self._statistics.items()}
        merged = {key: _merge(self.provenance[key], other.provenance[key]) for key in ("source", "seed", "first")}
        return Fisher(arrays, {**other.provenance, **self.provenance, **merged, "images": m + n}, statistics)

    def _check_addable(self, other):
        wrong = [
            f"their {name} differ ({self.provenance[name]} and {other.provenance[name]})"
            for name in ("model", "mode", "samples")
            if self.provenance[name] != other.provenance[name]
        ]
        hashes, others = self.provenance.get("weights"), other.provenance.get("weights")
        if hashes and others and hashes != others:  # the digest of the model covers files that lack them
            key = next(key for key in {**hashes, **others} if hashes.get(key) != others.get(key))
            wrong.append(f"they were estimated at other weights (of {key}, say)")
        if {key: array.shape for key, array in self.items()} != {key: array.shape for key, array in other.items()}:
            wrong.append("their weights differ")
        if self.provenance["transforms"] or other.provenance["transforms"]:
            wrong.append("one is transformed already")
        if wrong:
            raise InputError(
                f"These Fisher diagonals cannot be added, because {' and '.join(wrong)}: "
                "add untransformed passes of one model and mode, and transform the sum."
            )

    def standard_error(self) -> dict[str, float]:
        """Estimates for each layer the relative standard error of the mean of its entries.

        Batch b has n_b images and alone gives a Fisher diagonal whose mean over the layer's entries
        is t_b. With N = sum_b n_b images in M batches, the mean is t = sum_b n_b t_b / N, the
        variance of one image s² = sum_b n_b (t_b - t)² / (M - 1), and the relative standard error
        sqrt(s² / N) / t. It covers the choice of images and, in the sampled modes, the draws.
        Transforms do not change it.

        Returns:
            A dict from the layer's key to a float: infinite after fewer than two batches, 0 for
            a layer whose entries are all 0.
        """
        return {layer: relative_error(*sums) for layer, sums in self._statistics.items()}

    def clip(self, maximum: float) -> "Fisher":
        """Lowers entries above `maximum` to it.

        Raises:
            InputError: `maximum` is not a positive number.
        """
        return self._transformed("clip", check_positive(maximum, "maximum"), lambda f: np.minimum(f, np.float32(maximum)))

    def epsilon(self, value: float) -> "Fisher":
        """Adds `value` to each entry.

        Raises:
            InputError: `value` is not a positive number.
        """
        return self._transformed("epsilon", check_positive(value, "value"), lambda f: f + np.float32(value))

    def normalise(self) -> "Fisher":
        """Divides all entries by their mean over all weights.

        Raises:
            InputError: all entries are 0.
        """
        total = sum(float(array.sum(dtype="float64")) for array in self.values())
        mean = total / sum(array.size for array in self.values())
        if not mean > 0:
            raise InputError("This Fisher diagonal cannot be normalised, because all its entries are 0.")
        return self._transformed("normalise", mean, lambda f: (f / mean).astype("float32"))

    def _transformed(self, name, value, function):
        provenance = {**self.provenance, "transforms": [*self.provenance["transforms"], {"name": name, "value": value}]}
        return Fisher({key: function(array) for key, array in self.items()}, provenance, self._statistics)


def relative_error(batches, images, first, second):
    """The relative standard error of `Fisher.standard_error` from M, N, sum_b n_b t_b and sum_b n_b t_b²."""
    if batches < 2:
        return math.inf
    if first == 0:
        return 0.0
    variance = max(second - first**2 / images, 0) / (batches - 1)
    return math.sqrt(variance / images) / (first / images)


def check_positive(value, name):
    """Returns a number as a float.

    Raises:
        InputError: it is not a finite number above 0.
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"{name} is {value!r}: give a finite number above 0.")
    return float(value)


def _header(metadata, path):
    """Reads and checks the provenance and the statistics in the metadata of a file."""
    what = f"The Fisher diagonal in {path} is damaged"
    provenance = parse_json(metadata.get("provenance", ""), what)
    statistics = parse_json(metadata.get("statistics", ""), what, finite=False)  # the sums of huge entries overflow
    with refusing(what):
        counts = [count for batches, images, _, _ in statistics.values() for count in (batches, images)]
        numbers = [number for sums in statistics.values() for number in sums]
        if not all(type(number) in (int, float) for number in numbers) or not all(0 < count < math.inf for count in counts):
            raise ValueError("its statistics are not sums over images")
        if not PROVENANCE.issubset(provenance) or type(provenance["images"]) is not int or provenance["images"] < 1:
            raise ValueError("its provenance lacks a field, or has no number of images")
        if provenance["mode"] not in MODES or not isinstance(provenance["transforms"], list):
            raise ValueError("its provenance lacks a mode or a list of transforms")
        hashes = provenance.get("weights", {})
        if not isinstance(hashes, dict) or not all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes.values()):
            raise ValueError("the weights of its provenance have no sha256 each")
    return provenance, statistics


def _merge(a, b):
    """Joins two values of a provenance: the value if they are equal, else a list."""
    if a == b:
        return a
    return [*(a if isinstance(a, list) else [a]), *(b if isinstance(b, list) else [b])]
