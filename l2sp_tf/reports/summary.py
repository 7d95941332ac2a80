"""The rows of tables and the points of figures, one for each identity of runs, and the notes on how they were made."""

import collections
import statistics

from l2sp_tf.experiments.records import diverged, identity, is_chosen, question, runs_of, selections_of
from l2sp_tf.files.provenance import RESULTS_VERSION
from l2sp_tf.reports import paper
from l2sp_tf.reports.labels import SOURCE, TARGET, by_place, key, method, penalty, title, titles

STATISTICS = {"target_statistics": "fine-tuned statistics", "source_statistics": "source statistics"}


def summary(records):
    """Summarizes runs: a row for each identity (`records.identity`), with mean and standard deviation over its seeds.

    Args:
        records: a list of records, of runs and of selections.

    Returns:
        A sorted list of dicts:
            "identity": the settings that all runs of the row share; "records": its runs, one for each seed;
            "runs", "diverged": how many runs finished, and how many diverged;
            "repeated": how many further records of the same seeds are left out;
            "source", "target", "penalty", "alpha", "beta", "frozen" (units): as in the settings;
            "name": the method; "title", "origin": names of target and source, different for different data;
            "selected": whether cross-validation chose the setting;
            "accuracies": on the target, in percent, of the runs that finished;
            "target_accuracy": their mean and sample standard deviation (None for a single run); None where all diverged;
            "before", "target_statistics", "source_statistics": in percent on the source, where all runs measured it: the
            pre-trained model's, and the same pairs after fine-tuning (see `evaluation.accuracy.retention`).

    Raises:
        InputError: different targets or sources would have the same name.
    """
    groups, repeated = collections.defaultdict(dict), collections.Counter()
    for record in runs_of(records):
        row, seed = key(identity(record["settings"])), record["settings"]["seed"]
        repeated[row] += seed in groups[row]
        groups[row].setdefault(seed, record)  # counts a copied run once
    selections = selections_of(records)
    rows = [_row(list(found.values()), selections) | {"repeated": repeated[row]} for row, found in groups.items()]
    targets, sources = titles(rows, TARGET, title), titles(rows, SOURCE, lambda settings: settings["source"])
    rows = [row | {"title": t, "origin": s} for row, t, s in zip(rows, targets, sources, strict=True)]
    return sorted(rows, key=_order)


def _order(row):
    """Returns the sort key of a row."""
    parts = [row[name] for name in ("name", "frozen", "alpha", "beta")]
    return (row["origin"], row["title"], _number(row), *parts, key(row["identity"]))


def _number(row):
    """Returns the position of a row's penalty among Eqs. (1)-(7); others come after them."""
    known = list(paper.PENALTIES)
    return known.index(row["penalty"]) if row["penalty"] in known else len(known)


def _row(found, selections):
    """Makes the row of some records of one identity, still without names of target and source."""
    settings = found[0]["settings"]
    row = {name: settings[name] for name in ("source", "target", "penalty", "alpha", "beta")}
    row |= {"identity": identity(settings), "records": found, "frozen": settings.get("frozen", 0), "name": method(settings)}
    finished = [record["results"] for record in found if not diverged(record)]
    row |= {"runs": len(finished), "diverged": len(found) - len(finished), "selected": _is_selected(found, selections)}
    row["accuracies"] = [100 * results["accuracy"] for results in finished]
    row["target_accuracy"] = _mean_sd(row["accuracies"])
    if finished and all("source" in results for results in finished):
        row["before"] = 100 * finished[0]["source"]["before"]["accuracy"]
        for name in STATISTICS:
            row[name] = _mean_sd([100 * results["source"][name]["accuracy"] for results in finished])
    return row


def _is_selected(found, selections):
    """Whether cross-validation chose the setting of these records; records of the first format hold the answer themselves."""
    answers = [is_chosen(selection, found[0]["settings"]) for selection in selections]
    answers = [answer for answer in answers if answer is not None]
    return any(answers) if answers else any("selection" in record for record in found)


def _mean_sd(values):
    """Returns mean and sample standard deviation; None for no values."""
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def by_penalty(rows):
    """Sorts rows by their penalty, in the order of Eqs. (1)-(7)."""
    return sorted(rows, key=_number)


def chosen(rows):
    """Picks the rows of the paper's tables: without frozen layers, and with the settings that cross-validation chose.

    If cross-validation chose no setting of a penalty, all its settings stay: none is chosen by its test accuracy.
    """
    rows = [row for row in rows if not row["frozen"]]
    selected = {key(question(row["identity"])) for row in rows if row["selected"]}
    return [row for row in rows if row["selected"] or key(question(row["identity"])) not in selected]


def notes(rows, records):
    """Describes how the rows of a table were made, in a list of sentences to print below it.

    Args:
        rows: of `labelled`.
        records: the records behind the rows.
    """
    found = []
    old = [row for row in rows if row["identity"].get("code") != RESULTS_VERSION]
    if old:
        which = "All rows" if len(old) == len(rows) else f"{len(old)} of {len(rows)} rows"
        found.append(f"{which} were made by an earlier version of the code than the one that drew this table.")
    for row in rows:
        name = f"{row['label']} on {row['title']}"
        if row["repeated"]:
            found.append(f"{name}: {row['repeated']} more records of the same seeds were left out.")
        for what, texts in _makings(row["records"]).items():
            if len(texts) > 1:
                found.append(f"{name} joins runs of several {what}: {', '.join(sorted(texts))}.")
    return [*found, *_notes_on_starts(rows), *filter(None, map(_note_on, selections_of(records)))]


def _makings(records):
    """Returns the different versions of Keras and TensorFlow that made some records, and the devices."""
    found = {"versions": set(), "devices": set()}
    for record in records:
        versions = record.get("versions", {})
        found["versions"].add(" ".join(f"{name} {versions[name]}" for name in ("keras", "tensorflow") if name in versions))
        found["devices"].add(str(record.get("machine", {}).get("device", "")))
    return {what: texts - {""} for what, texts in found.items()}


def _notes_on_starts(rows):
    """Returns a sentence for each pair of tasks whose runs start from several pre-trained models."""
    found = []
    for (where, _), here in by_place(rows).items():
        models = collections.defaultdict(list)
        for row in here:
            models[row["identity"].get("anchors", row["records"][0]["anchors"]["digest"])].append(row["label"])
        if len(models) > 1:
            each = "; ".join(f"{digest:.8}: {', '.join(dict.fromkeys(labels))}" for digest, labels in models.items())
            found.append(f"The runs on {where} do not start from one pre-trained model. By its digest, {each}.")
    return found


def _note_on(selection):
    """Describes what is doubtful about a selection; None if nothing is."""
    name = f"{penalty(selection['question'])} on {title(selection['question'])}"
    if selection["chosen"] is None:
        return f"Every setting of {name} diverged in cross-validation, so that none was run on all training images."
    if selection.get("edges"):
        return f"The choice for {name} lies at the edge of what was tried ({', '.join(selection['edges'])})."
    return None
