"""Names the data of rows, and gives rows labels that differ wherever the rows do."""

import collections
import json

from l2sp_tf.experiments.records import CHOICE
from l2sp_tf.files.errors import InputError
from l2sp_tf.reports import paper

STRENGTHS = ("alpha", "beta", "recipe.learning_rate")
TARGET = ("target", "per_class", "subset_seed", "protocol", "skipped", "target_digest")
SOURCE = ("source", "source_digest")
NAMED = ("penalty", "frozen", "recipe.solver", "recipe.penalty_step")  # in every label
IDLE = ("recipe.momentum", "recipe.blur_kernel", "recipe.blur_sigma")  # see `Recipe.idle`
HASHES = ("fisher", "anchors", "target_digest", "source_digest", "skipped", "source_mean")  # shown only if all words are equal
PHRASES = {
    "alpha": "alpha {:g}",
    "beta": "beta {:g}",
    "recipe.learning_rate": "rate {:g}",
    "subset_seed": "subset seed {}",
    "protocol": "{} splits",
    "code": "code {}",
    "fisher": "F_jj {:.8}",
    "anchors": "anchors {:.8}",
    "target_digest": "images {:.8}",
    "source_digest": "images {:.8}",
}


def key(value):
    """Returns settings as text, equal for equal settings."""
    return json.dumps(value, sort_keys=True)


def title(settings):
    """Names a target as the paper does, with the number of training images per class if it is limited."""
    name, per_class = paper.DATA_SETS.get(settings["target"], settings["target"]), settings.get("per_class")
    return f"{name} - {per_class}" if per_class is not None else name


def penalty(settings):
    """Names the penalty as the paper does; a penalty that is not the paper's by its title."""
    return paper.PENALTIES.get(settings["penalty"]) or settings.get("penalty_title") or settings["penalty"]


def method(settings):
    """Names the penalty, and the solver and the penalty's step if they are not the paper's: "L2-SP, Adam, proximal"."""
    recipe = settings.get("recipe") or {}
    solver, step = recipe.get("solver", "sgd"), recipe.get("penalty_step", "gradient")
    return penalty(settings) + ", Adam" * (solver == "adam") + f", {step}" * (step != "gradient")


def place(row):
    """Returns the target and the source of a row."""
    return row["title"], row["origin"]


def place_text(where):
    """Names a `place` in words."""
    return f"{where[0]} (from {where[1]})"


def by_place(rows):
    """Groups rows by target and source: a dict from `place` to rows, in order of the names."""
    places = collections.defaultdict(list)
    for row in rows:
        places[place(row)].append(row)
    return dict(sorted(places.items()))


def titles(rows, parts, text):
    """Names the data of each row; different data get different names.

    Args:
        rows: of `summary`.
        parts: the settings that define the data, `TARGET` or `SOURCE`.
        text: a function from the identity of a row to the first words of the name.

    Returns:
        A list of names, one for each row.

    Raises:
        InputError: different data would have the same name.
    """
    settings = [row["identity"] for row in rows]
    texts = [[text(each)] for each in settings]
    _name(texts, settings, [name for name in parts[1:] if not _is_hash(name) and name != "per_class"])
    for name in filter(_is_hash, parts):
        _name(texts, settings, [name])
    names = [", ".join(filter(None, words)) for words in texts]
    data = {(name, key([each.get(part) for part in parts])) for name, each in zip(names, settings, strict=True)}
    for name, count in collections.Counter(name for name, _ in data).items():
        if count > 1:
            raise InputError(f"{count} data sets would all be called {name!r}: draw a table of each.")
    return names


def labelled(rows, shown=()):
    """Gives each row a "label": its method, frozen units, and the settings in which it differs from rows of its place.

    A label names a strength or rate if rows of one method differ in it, and another setting if any two rows of the place do.
    It names hashes only if all words are equal.

    Args:
        rows: of `summary`.
        shown: names of settings that have their own columns in the table.

    Returns:
        The same rows.

    Raises:
        InputError: two rows would look alike.
    """
    for where, here in by_place(rows).items():
        settings, words = [row["identity"] for row in here], [_words_of(row["records"][0]) for row in here]
        cells = [[_phrase(name, each.get(name)) for name in shown] for each in settings]
        texts = [[*cell, row["name"], frozen_text(row["identity"])] for cell, row in zip(cells, here, strict=True)]
        readable, hashes = _settings_of(here, shown)
        _name(texts, settings, [name for name in STRENGTHS if name not in shown], _of_one_method(here))
        for name in readable:
            _name(texts, settings, [name], _that_use(name, here))
        _name(texts, words, list(dict.fromkeys(name for each in words for name in each)))
        for name in hashes:
            _name(texts, settings, [name])
        for row, text in zip(here, texts, strict=True):
            row["label"] = ", ".join(filter(None, text[len(shown) :]))
        _check_different([(row["label"], *cell) for row, cell in zip(here, cells, strict=True)], where)
    return rows


def lines(rows, along):
    """Joins rows that differ only in some settings: those of a line in Fig. 3, or of a grid in Fig. 1.

    Args:
        rows: of `summary`.
        along: names of these settings. The recipe's own values for them may differ too.

    Returns:
        A list of rows for `labelled`, one for each line: its last row, whose identity lacks these settings, and whose
        "points" are all rows of the line, in their order.

    Raises:
        InputError: two rows of a line would look alike.
    """
    found, left_out = {}, {*along, *(f"recipe.{name}" for name in along)}
    for row in rows:
        shared = {name: value for name, value in row["identity"].items() if name not in left_out}
        line = key(shared)
        points = found[line]["points"] if line in found else []
        found[line] = row | {"identity": shared, "points": [*points, row]}
    for line in found.values():
        cells = [tuple(_phrase(name, row["identity"].get(name)) for name in along) for row in line["points"]]
        _check_different(cells, place(line))
    return list(found.values())


def differences(rows):
    """Returns a sentence for each label whose rows, of several pairs of tasks, have different settings.

    A table with a column for each pair shows such rows in one line, although each task may have its own strengths.
    """
    found = []
    for label in dict.fromkeys(row["label"] for row in rows):
        here = [row for row in rows if row["label"] == label]
        texts = [[] for _ in here]
        _name(texts, [row["identity"] for row in here], [*STRENGTHS, *_settings_of(here)[0]], [range(len(here))])
        if texts[0]:
            each = (f"{', '.join(filter(None, text))} on {row['title']}" for text, row in zip(texts, here, strict=True))
            found.append(f"{label}: {'; '.join(each)}.")
    return found


def frozen_text(settings):
    """Returns how many units are frozen in words; "" for none."""
    count = settings.get("frozen")
    return f"{count} unit{'s' * (count > 1)} frozen" if count else ""


def _settings_of(rows, shown=()):
    """Returns the names of settings that may distinguish rows of one place: those in words, then hashes, each in order."""
    names = {name for row in rows for name in row["identity"]} - {*CHOICE, *TARGET, *SOURCE, *NAMED, *shown}
    hashes = sorted(filter(_is_hash, names), key=lambda name: (HASHES.index(name) if name in HASHES else len(HASHES), name))
    return sorted(names.difference(hashes)), hashes


def _is_hash(name):
    return name in HASHES or name.startswith("pixels.")


def _of_one_method(rows):
    """Groups the positions of rows by their method, regardless of frozen units."""
    return _alike([row["name"]] for row in rows)


def _that_use(name, rows):
    """Groups the positions of the rows whose results depend on a setting."""
    if name == "recipe.smoothing":  # penalties without roots have none, and records leave 0 out
        return _of_one_method(rows)
    return [[i for i, row in enumerate(rows) if name not in IDLE or name in row["identity"]]]


def _words_of(record):
    """Describes the anchors and F_jj of a run in words: a flat dict."""
    anchors, fisher = record["anchors"], record.get("fisher")
    words = {"weights": anchors["weights"]} if "weights" in anchors else {}
    recipe = anchors.get("recipe")
    if isinstance(recipe, dict):
        words |= {f"source {name}": value for name, value in recipe.items() if not isinstance(value, dict)}
    if isinstance(fisher, dict):
        words |= {f"Fisher {name}": fisher[name] for name in ("source", "mode", "samples", "images") if name in fisher}
        steps = ([step["name"], step["value"]] for step in fisher.get("transforms", []))
        words["Fisher transforms"] = [" ".join(str(part) for part in step if part is not None) for step in steps]
    return words


def _name(texts, settings, names, groups=None):
    """Appends settings to texts, wherever the members of a group do not share them.

    Args:
        texts: a list of words for each row, which is changed.
        settings: a dict for each row.
        names: of the settings.
        groups: lists of positions; by default those of equal texts.
    """
    for members in _alike(texts) if groups is None else groups:
        for name in names:
            if len({key(settings[i].get(name)) for i in members}) > 1:
                for i in members:
                    texts[i].append(_phrase(name, settings[i].get(name)))


def _alike(texts):
    """Returns the positions of equal texts, a list for each text that occurs several times."""
    found = collections.defaultdict(list)
    for i, text in enumerate(texts):
        found[tuple(text)].append(i)
    return [members for members in found.values() if len(members) > 1]


def _phrase(name, value):
    """Returns a setting in words; "" for None: a record without the setting has the default of its time."""
    if value is None:
        return "earlier code" if name == "code" else ""
    if name in PHRASES and isinstance(value, (int, float, str)):
        return PHRASES[name].format(value)
    if isinstance(value, list):
        value = "/".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value)
    return f"{name.rpartition('.')[2].replace('_', ' ')} {value}"


def _check_different(names, where):
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"{count} rows of {place_text(where)} would all read {', '.join(name)!r}, though their runs differ: "
            "draw a table of each, from a --workdir of its own."
        )
