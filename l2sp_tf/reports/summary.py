"""Which runs make one row of a table and one point of a figure, and what tells the row from the others."""

import collections
import json
import statistics

from l2sp_tf.experiments.records import CHOICE, diverged, identity, is_chosen, question, runs_of, selections_of
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.provenance import RESULTS_VERSION
from l2sp_tf.reports import paper

STATISTICS = {"target_statistics": "fine-tuned statistics", "source_statistics": "source statistics"}
STRENGTHS = ("alpha", "beta", "recipe.learning_rate")
TARGET = ("target", "per_class", "subset_seed", "protocol", "skipped", "target_digest")
SOURCE = ("source", "source_digest")
NAMED = ("penalty", "frozen", "recipe.solver", "recipe.penalty_step")  # in every label
IDLE = ("recipe.momentum", "recipe.blur_kernel", "recipe.blur_sigma")  # see `Recipe.idle`
# Named only where nothing that can be read tells two rows apart.
HASHES = ("fisher", "anchors", "target_digest", "source_digest", "skipped", "source_mean")
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


def summary(records):
    """The rows of all runs: one for each identity (`records.identity`), with mean and standard deviation over its seeds.

    Args:
        records: a list of records, of runs and of selections.

    Returns:
        A list of dicts. Accuracies are in percent: under "target_accuracy" and, where the source task was measured,
        "target_statistics" and "source_statistics" (see `evaluation.retention`), pairs of mean and sample standard
        deviation (None for a single run), over the runs that did not diverge; None where all did. "runs" and "diverged"
        count the two, "before" is the pre-trained model's accuracy. "title" and "origin" name target and source, told
        apart from all others; "frozen" counts frozen units, "selected" tells whether cross-validation chose the setting,
        "identity" is what all of its "records" share, of which there is one for each seed; "repeated" counts those that
        were left out, as a record of their seed is there.

    Raises:
        InputError: a record has an unknown penalty, or two targets or sources cannot be told apart.
    """
    groups = collections.defaultdict(dict)
    repeated = collections.Counter()
    for record in runs_of(records):
        penalty = record["settings"]["penalty"]
        if penalty not in paper.PENALTIES:
            raise InputError(
                f"A record has the penalty {penalty[:100]!r}: remove it, or give one of {', '.join(paper.PENALTIES)}."
            )
        key, seed = _key(identity(record["settings"])), record["settings"]["seed"]
        repeated[key] += seed in groups[key]
        groups[key].setdefault(seed, record)  # a copy of a run is no run of its own
    selections = selections_of(records)
    rows = [{**_row(list(found.values()), selections), "repeated": repeated[key]} for key, found in groups.items()]
    for name, parts, text in (("title", TARGET, title), ("origin", SOURCE, lambda settings: settings["source"])):
        for row, made in zip(rows, _titles(rows, parts, text), strict=True):
            row[name] = made
    return sorted(rows, key=_order)


def _order(row):
    """By this the rows of a table are sorted."""
    own = [row[name] for name in ("name", "frozen", "alpha", "beta")]
    return (*place(row)[::-1], list(paper.PENALTIES).index(row["penalty"]), *own, _key(row["identity"]))


def _row(found, selections):
    """What one row has of its own."""
    settings = found[0]["settings"]
    finished = [record["results"] for record in found if not diverged(record)]
    row = {name: settings[name] for name in ("source", "target", "penalty", "alpha", "beta")}
    row |= {"identity": identity(settings), "records": found, "frozen": settings.get("frozen", 0)}
    row |= {
        "runs": len(finished),
        "diverged": len(found) - len(finished),
        "name": paper.PENALTIES[row["penalty"]] + variant(settings),
    }
    about = [answer for selection in selections if (answer := is_chosen(selection, settings)) is not None]
    # records of the first format say themselves that they were chosen
    row["selected"] = any(about) if about else any("selection" in record for record in found)
    row["accuracies"] = [100 * results["accuracy"] for results in finished]
    row["target_accuracy"] = _mean_sd(row["accuracies"])
    if finished and all("source" in results for results in finished):
        row["before"] = 100 * finished[0]["source"]["before"]["accuracy"]
        for name in STATISTICS:
            row[name] = _mean_sd([100 * results["source"][name]["accuracy"] for results in finished])
    return row


def variant(settings):
    """How the steps of a run differ from the paper's: ", Adam", ", proximal", ", Adam, decoupled" or nothing."""
    recipe = settings.get("recipe") or {}
    solver, step = recipe.get("solver", "sgd"), recipe.get("penalty_step", "gradient")
    return "".join([", Adam" if solver == "adam" else "", f", {step}" if step != "gradient" else ""])


def title(settings):
    """What to call a target: the paper's name of its data set, with the training images a class where they were limited."""
    name, per_class = paper.DATA_SETS.get(settings["target"], settings["target"]), settings.get("per_class")
    return f"{name} - {per_class}" if per_class is not None else name


def place(row):
    """The target and the source of a row."""
    return row["title"], row["origin"]


def by_place(rows):
    """The rows of each pair of target and source: a dict, in order of the names."""
    places = collections.defaultdict(list)
    for row in rows:
        places[place(row)].append(row)
    return dict(sorted(places.items()))


def chosen(rows):
    """Of the summary's rows without frozen layers, those that the paper's tables are about.

    Where cross-validation chose a setting of a penalty, that one; otherwise all, so that no
    setting is chosen by its test accuracy.
    """
    rows = [row for row in rows if not row["frozen"]]
    selected = {_key(question(row["identity"])) for row in rows if row["selected"]}
    return [row for row in rows if row["selected"] or _key(question(row["identity"])) not in selected]


def labelled(rows, shown=()):
    """The rows with a "label" each: the penalty, and whatever tells the row from those of the same place.

    Strengths and rate are named where one penalty has several; other settings wherever two rows of the place differ.

    Args:
        rows: of `summary`.
        shown: names of the identity that the table shows in columns of their own.

    Raises:
        InputError: two rows would look alike.
    """
    for here in by_place(rows).values():
        identities = [row["identity"] for row in here]
        texts = [[row["name"]] + ([frozen_text(row)] if row["frozen"] else []) for row in here]
        own = [name for name in STRENGTHS if name not in shown]
        other = {name for found in identities for name in found} - {*STRENGTHS, *CHOICE, *TARGET, *SOURCE, *NAMED, *shown}
        for members in _alike([row["name"]] for row in here):  # whatever is frozen, so that a line of Fig. 3 has one name
            _name_differences(identities, texts, members, own)
        readable = sorted(name for name in other if not _is_hash(name))
        for name in readable:
            for members in _asked(name, here):
                _name_differences(identities, texts, members, [name])
        cells = [[_phrase(name, found.get(name)) for name in shown] for found in identities]
        words = [_words_of(row["records"][0]) for row in here]
        for members in _alike([text + cell for text, cell in zip(texts, cells, strict=True)]):
            _name_differences(words, texts, members, list(dict.fromkeys(name for found in words for name in found)))
        for name in sorted(other - {*readable}, key=_hash_order):
            for members in _alike([text + cell for text, cell in zip(texts, cells, strict=True)]):
                _name_differences(identities, texts, members, [name])
        for row, text in zip(here, texts, strict=True):
            row["label"] = ", ".join(filter(None, text))
        _check_told_apart([(row["label"], *cell) for row, cell in zip(here, cells, strict=True)], place(here[0]))
    return rows


def _asked(name, rows):
    """The positions of the rows that a setting can tell apart, in groups: those without it, as it is idle there, stay out."""
    if name == "recipe.smoothing":  # 0 goes unsaid, and a penalty without roots has none
        return _alike([row["name"]] for row in rows)
    return [[i for i, row in enumerate(rows) if name not in IDLE or name in row["identity"]]]


def _words_of(record):
    """What a run's record says in words of its anchors and its F_jj: a flat dict."""
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


def frozen_text(row):
    """How many units of a row are frozen, in words."""
    return f"{row['frozen']} unit{'s' * (row['frozen'] > 1)} frozen"


def _titles(rows, parts, text):
    """A name for the data of each row, the same for the same data and no other's."""
    identities = [row["identity"] for row in rows]
    data = [_key({name: found.get(name) for name in parts}) for found in identities]
    texts = [[text(found)] for found in identities]
    for members in _alike(texts):
        _name_differences(identities, texts, members, [name for name in parts[1:] if not _is_hash(name) and name != "per_class"])
    for name in filter(_is_hash, parts):
        for members in _alike(texts):
            _name_differences(identities, texts, members, [name])
    made = [", ".join(filter(None, words)) for words in texts]
    for name, count in collections.Counter(name for name, _ in set(zip(made, data, strict=True))).items():
        if count > 1:
            raise InputError(f"{count} data sets would all be called {name!r}: draw them in tables of their own.")
    return made


def _name_differences(identities, texts, members, names):
    """Appends to the texts of some rows the settings of these names that they do not share."""
    for name in names:
        if len({_key(identities[i].get(name)) for i in members}) > 1:
            for i in members:
                texts[i].append(_phrase(name, identities[i].get(name)))


def _alike(texts):
    """The positions of equal texts, for each text that several have."""
    found = collections.defaultdict(list)
    for i, text in enumerate(texts):
        found[tuple(text)].append(i)
    return [members for members in found.values() if len(members) > 1]


def _phrase(name, value):
    """A setting in words; one that an older record does not have is the default of its time, and goes unsaid."""
    if value is None:
        return "earlier code" if name == "code" else ""
    if name in PHRASES and isinstance(value, (int, float, str)):
        return PHRASES[name].format(value)
    if isinstance(value, list):
        value = "/".join(f"{item:.4g}" if isinstance(item, float) else str(item) for item in value)
    return f"{name.rpartition('.')[2].replace('_', ' ')} {value}"


def _is_hash(name):
    return name in HASHES or name.startswith("pixels.")


def _hash_order(name):
    return HASHES.index(name) if name in HASHES else len(HASHES), name


def _key(value):
    return json.dumps(value, sort_keys=True)


def _check_told_apart(names, where):
    name, count = collections.Counter(names).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"{count} rows of {where[0]} (from {where[1]}) would all read {', '.join(name)!r}, though their runs differ: "
            "draw them in tables of their own, from a --workdir each."
        )


def notes(rows, records):
    """What a table has to say about how its rows were made: a list of sentences."""
    found = []
    old = [row for row in rows if row["identity"].get("code") != RESULTS_VERSION]
    if old:
        which = "All rows" if len(old) == len(rows) else f"{len(old)} of {len(rows)} rows"
        found.append(f"{which} were made by an earlier version of the code than the one that drew this table.")
    for row in rows:
        if row["repeated"]:
            found.append(f"{row['label']} on {row['title']}: {row['repeated']} more records of the same seeds were left out.")
        for what, texts in _makings(row["records"]).items():
            if len(texts) > 1:
                found.append(f"{row['label']} on {row['title']} joins runs of several {what}: {', '.join(sorted(texts))}.")
    for (where, _), here in by_place(rows).items():
        models = collections.defaultdict(list)
        for row in here:
            models[row["identity"].get("anchors", row["records"][0]["anchors"]["digest"])].append(row["label"])
        if len(models) > 1:
            each = "; ".join(f"{digest:.8}: {', '.join(dict.fromkeys(labels))}" for digest, labels in models.items())
            found.append(f"The runs on {where} do not start from one pre-trained model. By its digest, {each}.")
    for selection in selections_of(records):
        name = f"{paper.PENALTIES[selection['question']['penalty']]} on {title(selection['question'])}"
        if selection["chosen"] is None:
            found.append(f"Every setting of {name} diverged in cross-validation, so that none was run on all training images.")
        elif selection.get("edges"):
            found.append(f"The choice for {name} lies at the edge of what was tried ({', '.join(selection['edges'])}).")
    return found


def notes_across(rows):
    """What rows that share a label, each of another pair of tasks, do not share: a list of sentences.

    A table with a column for each pair has one line for them, as each task may have strengths of its own.
    """
    found = []
    for label in dict.fromkeys(row["label"] for row in rows):
        here = [row for row in rows if row["label"] == label]
        identities, texts = [row["identity"] for row in here], [[] for _ in here]
        names = {name for each in identities for name in each} - {*CHOICE, *TARGET, *SOURCE, *NAMED}
        readable = sorted(name for name in names if not _is_hash(name))
        _name_differences(identities, texts, range(len(here)), [*STRENGTHS, *readable])
        if texts[0]:
            each = (f"{', '.join(filter(None, text))} on {row['title']}" for text, row in zip(texts, here, strict=True))
            found.append(f"{label}: {'; '.join(each)}.")
    return found


def _makings(records):
    """By kind the different versions and devices of some records."""
    found = {"versions": set(), "devices": set()}
    for record in records:
        versions = record.get("versions", {})
        found["versions"].add(" ".join(f"{name} {versions[name]}" for name in ("keras", "tensorflow") if name in versions))
        found["devices"].add(str(record.get("machine", {}).get("device", "")))
    return {what: texts - {""} for what, texts in found.items()}


def _mean_sd(values):
    """Mean and sample standard deviation; None of no values."""
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
