"""Decides from the values of two arrays whether one descends from the other."""

import math

import ml_dtypes
import numpy as np

SAMPLE = 1024  # numbers per array for correlations
LOOKED_UP = 32  # numbers of a sample that index equal arrays
EQUAL = 2  # strength of bit-equal arrays; for others, their correlation
QUIET = np.errstate(all="ignore")  # numbers that are not finite, or overflow half precision, match nothing


@QUIET
def related(weights, known):
    """Relates arrays of the same name and shape: {key: {known key: EQUAL, or a significant correlation}}.

    Constants, and arrays of fewer than four numbers, carry no evidence: their keys are missing. Correlations use a sample.
    """
    arrays = [{key: np.asarray(array) for key, array in side.items()} for side in (weights, known)]
    floats = [a.dtype for side in arrays for a in side.values() if _is_float(a.dtype)]
    coarse = min(floats, key=_precision, default=None)
    groups, related = {}, {}
    for number, side in enumerate(arrays):
        for key, array in side.items():
            if array.size >= 4 and not _is_constant(array):
                name = key.rpartition("/")[2].partition("#")[0]
                groups.setdefault((name, array.shape), ({}, {}))[number][key] = array
    for (_, shape), (own, others) in groups.items():
        related.update({key: {} for key in own})
        if own and others:
            _relate(own, others, _places(math.prod(shape)), coarse, related)
    return related


def _relate(own, others, places, coarse, related):
    """Adds the relations between arrays of one name and shape to `related`."""
    samples, known_samples = ({key: array.reshape(-1)[places] for key, array in side.items()} for side in (own, others))
    looked_up = {}
    for key, sample in known_samples.items():
        looked_up.setdefault(_bytes(sample[:LOOKED_UP], coarse), []).append(key)
    for key, sample in samples.items():
        candidates = looked_up.get(_bytes(sample[:LOOKED_UP], coarse), [])
        related[key].update({other: EQUAL for other in candidates if are_equal(own[key], others[other])})
    plain = max(0.5, math.tanh(6 / math.sqrt(len(places) - 3)))  # six standard deviations of Fisher's z
    correlations = _standardized(samples.values()) @ _standardized(known_samples.values()).T
    others = list(others)
    for key, row in zip(own, correlations, strict=True):
        for column in np.flatnonzero(row >= plain):
            related[key].setdefault(others[column], float(row[column]))


def _places(size):
    """Returns the sampled positions of an array: all of a small one, else fixed random ones."""
    return np.arange(size) if size <= SAMPLE else np.random.default_rng(size).choice(size, SAMPLE, replace=False, shuffle=False)


def _standardized(samples):
    """Returns the samples as rows of mean 0 and norm 1; zeros for a sample that is constant or not finite."""
    rows = np.stack([sample.astype("float64") for sample in samples])
    rows /= np.abs(rows).max(axis=1, keepdims=True)
    rows -= rows.mean(axis=1, keepdims=True)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0)


def _is_constant(array):
    sample = array.reshape(-1)[:LOOKED_UP]
    return bool((sample == sample[0]).all() and (array == sample[0]).all())


def _is_float(dtype):
    return dtype.kind in "fV"  # bfloat16 has the kind V in NumPy


def _precision(dtype):
    return ml_dtypes.finfo(dtype).nmant


def _bytes(array, dtype):
    array = array.astype(dtype) if dtype is not None and _is_float(array.dtype) else array
    return array.tobytes()


@QUIET
def are_equal(a, b):
    """Whether two arrays are equal to the bit in the lower of their precisions."""
    if a.dtype != b.dtype and _is_float(a.dtype) and _is_float(b.dtype):
        lower = min(a.dtype, b.dtype, key=_precision)
        a, b = a.astype(lower), b.astype(lower)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.array_equal(*(np.ascontiguousarray(array).reshape(-1).view("u1") for array in (a, b)))


@QUIET
def doubts(pairs):
    """Finds the unrelated pairs (w, w0); returns ||w - w0|| / ||w0|| by key.

    A kernel of n >= 64 numbers is unrelated if |cos(w, w0)| < 4 / sqrt(n) and ||w - w0|| >= ||w0||. At a fresh start, with
    most numbers bit-equal, any pair with ||w - w0|| > ||w0|| / 2 is unrelated. A constant w0 is no evidence.
    """
    equal, kept, moved, unrelated = [], 0, {}, {}
    for key, (w, w0) in pairs.items():
        w, w0 = np.asarray(w), np.asarray(w0)
        if w0.size == 0 or _is_constant(w0):
            continue
        if are_equal(w, w0):
            equal.append(w0.size)
            continue
        distance, cosine = _distance(w, w0)
        if distance > 0.5:
            moved[key] = distance
        else:
            kept += w0.size
        if w0.ndim >= 2 and w0.size >= 64 and distance >= 1 and abs(cosine) < 4 / math.sqrt(w0.size):
            unrelated[key] = distance
    is_fresh = sum(equal) > kept and len(equal) >= len(moved)
    return moved if is_fresh else unrelated


def _distance(w, w0):
    """Returns ||w - w0|| / ||w0||, and the cosine between the two (0 if either is 0)."""
    w, w0 = (array.reshape(-1).astype("float64" if array.dtype == "float64" else "float32") for array in (w, w0))
    scale = max(np.abs(w0).max(), np.abs(w).max())  # keeps squares in range
    w, w0 = w / scale, w0 / scale
    norm, norm0 = float(np.linalg.norm(w)), float(np.linalg.norm(w0))
    cosine = float(np.dot(w, w0)) / (norm * norm0) if norm and norm0 else 0.0
    return float(np.linalg.norm(w - w0)) / (norm0 or math.inf), cosine
