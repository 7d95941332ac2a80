"""run.json: one record for each finished run, the only thing that tables and figures read."""

import dataclasses
import hashlib
import json
import math
import pathlib
import platform
import re
import warnings
from importlib import metadata

from l2sp_tf.errors import InputError
from l2sp_tf.files import write_text
from l2sp_tf.reading import read_json

FORMAT = "l2sp_tf.run.v1"
REQUIRED = {
    "settings": {"source": str, "target": str, "penalty": str, "alpha": float, "beta": float, "seed": int},
    "coverage": {"digest": str},
    "anchors": {"digest": str},
    "results": {"accuracy": float, "correct": int, "total": int},
    "versions": {},
}
ACCURACY = {"accuracy": float, "correct": int, "total": int}
BOX = ("whislo", "q1", "med", "q3", "whishi")  # of R², None where no feature varies


def run_key(settings):
    """Sixteen hexadecimal digits that name a run: equal settings, equal key."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def plain(value):
    """A dataclass or dict as JSON would give it back, so that keys do not depend on tuples and lists."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))


def versions():
    """The versions that a result depends on."""
    found = {name: metadata.version(name) for name in ("keras", "numpy", "tensorflow")}
    return {**found, "python": platform.python_version()}


def write_record(path, record):
    """Writes one record, atomically.

    Raises:
        InputError: a field is missing or of the wrong type, or a number is not finite.
        OSError: the file cannot be written.
    """
    record = {"format": FORMAT, **record}
    check_record(record, path)
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def read_record(path):
    """Reads one record and checks it.

    Raises:
        InputError: it is no JSON, of another format, or a field is missing or of the wrong type.
    """
    record = read_json(path, f"{path} is no record")
    check_record(record, path)
    return record


def read_records(workdir):
    """Reads every `runs/*/run.json` under a folder; damaged ones are left out with a warning.

    Raises:
        InputError: the folder is missing, or holds no record.
    """
    workdir = pathlib.Path(workdir)
    if not workdir.is_dir():
        raise InputError(f"There is no folder {workdir}: give the --workdir of a finished train.py.")
    records = []
    for path in sorted(workdir.glob("runs/*/run.json")):
        try:
            records.append(read_record(path))
        except InputError as error:
            warnings.warn(str(error), stacklevel=2)
    if not records:
        raise InputError(f"There is no finished run under {workdir}: run train.py --workdir={workdir} first.")
    return records


def check_record(record, path):
    """Checks the format of a record and the presence and type of the fields that reports need.

    Raises:
        InputError: names the first field that is wrong.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"{path} is no record of the format {FORMAT}: remove it and run its run again.")
    for section, fields in REQUIRED.items():
        _check_fields(record, section, fields, path)
    settings, results = record["settings"], record["results"]
    _check_fields(record, "settings", {"frozen": int} if "frozen" in settings else {}, path)
    if "source" in results:
        for measured in ("before", "target_statistics", "source_statistics"):
            _check_fields(results["source"], measured, ACCURACY, path)
    r2, right = results.get("r2", {}), results.get("right", "")
    boxes = list(r2.values()) if isinstance(r2, dict) else [r2]
    if not all(isinstance(box, dict) and all(box.get(n) is None or _is(box[n], float) for n in BOX) for box in boxes):
        raise InputError(f"{path} has results.r2 that are no boxes: remove it and run its run again.")
    if not isinstance(right, str) or not re.fullmatch(r"([0-9a-f]{2})*", right):
        raise InputError(f"{path} has results.right that are no bytes: remove it and run its run again.")


def _check_fields(parent, section, fields, path):
    """Raises InputError unless `parent` has a dict of that name whose fields are of these kinds."""
    found = parent.get(section) if isinstance(parent, dict) else None
    if not isinstance(found, dict):
        raise InputError(f"{path} has no section {section!r}: remove it and run its run again.")
    for field, kind in fields.items():
        if not _is(found.get(field), kind):
            value = repr(found.get(field))[:100]
            raise InputError(f"{path} has {section}.{field} = {value}, not a {kind.__name__}: remove it and run its run again.")


def _is(value, kind):
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool)
