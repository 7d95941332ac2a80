"""Writes, reads and checks run.json and selection.json, the only input of tables and figures."""

import hashlib
import json
import math
import pathlib
import re
import warnings

from l2sp_tf.files.errors import InputError
from l2sp_tf.files.fields import is_symbol
from l2sp_tf.files.plain import flat
from l2sp_tf.files.reading import read_json
from l2sp_tf.files.writing import write_text

FORMAT = "l2sp_tf.run.v2"
FIRST_FORMAT = "l2sp_tf.run.v1"  # lacks the version of the code
SELECTION = "l2sp_tf.selection.v1"
SETTINGS = {"source": str, "target": str, "penalty": str, "alpha": float, "beta": float, "seed": int}
REQUIRED = {"settings": SETTINGS, "coverage": {"digest": str}, "anchors": {"digest": str}, "versions": {}}
ACCURACY = {"accuracy": float, "correct": int, "total": int}
BOX = ("whislo", "q1", "med", "q3", "whishi")  # of R²; None if no feature varies
CHOICE = {"alpha": "alpha", "beta": "beta", "recipe.beta": "beta", "recipe.learning_rate": "learning_rate"}
WITHOUT_EFFECT = ("recipe.alpha", "recipe.log_every")  # the strengths of other penalties, and the logging interval


def run_key(settings):
    """Returns the sixteen hexadecimal digits that name a run; equal settings give equal keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def identity(settings):
    """Returns the identity of a row: everything its results depend on except the seed and fold, as a flat dict.

    Nested settings join both names, as in "recipe.iterations".
    """
    return {name: value for name, value in flat(settings, WITHOUT_EFFECT) if name not in ("seed", "fold", *WITHOUT_EFFECT)}


def identity_of_run(settings):
    """Returns the identity of a run: its row's identity, its seed, and its fold if it has one."""
    return identity(settings) | {name: settings[name] for name in ("seed", "fold") if name in settings}


def question(settings):
    """Returns the question that a selection answers: the identity without strengths, learning rate and frozen units."""
    return {name: value for name, value in identity(settings).items() if name not in (*CHOICE, "frozen")}


def is_chosen(selection, settings):
    """Returns True if a selection chose these settings, False if not, None if it answers another question."""
    if selection["question"] != question(settings):
        return None
    own, chosen = identity(settings), selection["chosen"]
    return chosen is not None and all(own[name] == chosen[value] for name, value in CHOICE.items() if name in own)


def write_record(path, record):
    """Writes one record atomically.

    Raises:
        InputError: a field is missing or has the wrong type, or a number is not finite.
        OSError: the file cannot be written.
    """
    record = {"format": FORMAT, **record}
    check_record(record, path)
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def read_record(path):
    """Reads one record and checks it.

    Raises:
        InputError: it is not JSON or has another format, or a field is missing or has the wrong type.
    """
    record = read_json(path, f"{path} is not a record")
    check_record(record, path)
    return record


def read_records(*workdirs):
    """Reads all runs and selections under the workdirs; skips damaged records with a warning.

    Raises:
        InputError: a folder is missing, or holds no run.
    """
    records = []
    for workdir in map(pathlib.Path, workdirs):
        if not workdir.is_dir():
            raise InputError(f"There is no folder {workdir}: give the --workdir of a finished train.py.")
        runs = _readable(workdir.glob("runs/*/run.json"))
        if not runs:
            raise InputError(f"There is no finished run under {workdir}: run train.py --workdir={workdir} first.")
        records += runs + _readable(workdir.glob("selections/*/selection.json"))
    return records


def _readable(paths):
    found = []
    for path in sorted(paths):
        try:
            found.append(read_record(path))
        except InputError as error:
            warnings.warn(str(error), stacklevel=3)
    return found


def runs_of(records):
    """Returns the records of runs."""
    return [record for record in records if record.get("format") != SELECTION]


def selections_of(records):
    """Returns the records of selections."""
    return [record for record in records if record.get("format") == SELECTION]


def check_record(record, path):
    """Checks the format of a record, and the fields that reports need.

    Raises:
        InputError: names the first wrong field.
    """
    if not isinstance(record, dict) or record.get("format") not in (FORMAT, FIRST_FORMAT, SELECTION):
        raise InputError(f"{path} is not a record of the format {FORMAT}: remove it and repeat the run.")
    if record["format"] == SELECTION:
        _check_selection(record, path)
        return
    for section, fields in REQUIRED.items():
        _check_fields(record, section, fields, path)
    if record["format"] == FORMAT:
        _check_fields(record, "code", {"version": str, "results": int, "digest": str}, path)
    settings, results = record["settings"], record.get("results")
    if not is_symbol(settings["penalty"]):
        raise InputError(
            f"{path} has settings.penalty = {settings['penalty'][:100]!r}, which is not a symbol: remove it and repeat the run."
        )
    known = {"frozen": int, "anchors": str}  # older records of the first format lack them
    _check_fields(record, "settings", {name: kind for name, kind in known.items() if name in settings}, path)
    if "recipe" in settings:
        _check_fields(settings, "recipe", {}, path)
        rate = {"learning_rate": float} if "learning_rate" in settings["recipe"] else {}
        _check_fields(settings, "recipe", rate, path)
    if "fisher" in record:
        _check_fields(record, "fisher", {}, path)
        steps = record["fisher"].get("transforms", [])
        if not isinstance(steps, list) or not all(isinstance(step, dict) and {"name", "value"} <= set(step) for step in steps):
            raise InputError(f"{path} has fisher.transforms that are not steps: remove it and repeat the run.")
    if "machine" in record:
        _check_fields(record, "machine", {}, path)
    _check_fields(record, "results", {"diverged": str} if diverged(record) else ACCURACY, path)
    if "source" in results:
        for measured in ("before", "target_statistics", "source_statistics"):
            _check_fields(results["source"], measured, ACCURACY, path)
    r2, right = results.get("r2", {}), results.get("right", "")
    boxes = list(r2.values()) if isinstance(r2, dict) else [r2]
    if not all(isinstance(box, dict) and all(box.get(n) is None or _is(box[n], float) for n in BOX) for box in boxes):
        raise InputError(f"{path} has results.r2 that are not boxes: remove it and repeat the run.")
    if not isinstance(right, str) or not re.fullmatch(r"([0-9a-f]{2})*", right):
        raise InputError(f"{path} has results.right that are not bytes: remove it and repeat the run.")


def diverged(record):
    """Whether a run diverged and so has no accuracy."""
    return isinstance(record.get("results"), dict) and "diverged" in record["results"]


def _check_selection(record, path):
    """Raises InputError unless a selection has valid question, candidates and choice."""
    candidate = {"alpha": float, "beta": float, "learning_rate": float}
    _check_fields(record, "question", {"source": str, "target": str, "penalty": str}, path)
    candidates = record.get("candidates")
    if not isinstance(candidates, list) or not candidates:
        raise InputError(f"{path} has no candidates: remove it and run the cross-validation again.")
    for number, found in enumerate(candidates):
        _check_fields({f"candidates[{number}]": found}, f"candidates[{number}]", candidate, path)
        scores = found.get("accuracies")
        if not isinstance(scores, list) or not all(score is None or _is(score, float) for score in scores):
            raise InputError(f"{path} has candidates[{number}].accuracies that are not numbers: remove it and run it again.")
    if record.get("chosen") is not None:
        _check_fields(record, "chosen", candidate, path)


def _check_fields(parent, section, fields, path):
    """Raises InputError unless `parent[section]` is a dict whose fields have these types."""
    found = parent.get(section) if isinstance(parent, dict) else None
    if not isinstance(found, dict):
        raise InputError(f"{path} has no section {section!r}: remove it and repeat the run.")
    for field, kind in fields.items():
        if not _is(found.get(field), kind):
            value = repr(found.get(field))[:100]
            raise InputError(f"{path} has {section}.{field} = {value}, not a {kind.__name__}: remove it and repeat the run.")


def _is(value, kind):
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool)
