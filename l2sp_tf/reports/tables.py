"""Tables 1 to 3 and the overview of any runs: the first from counts of images, the others from records alone."""

import itertools

import numpy as np

from l2sp_tf.experiments.records import diverged, run_key
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.table import Table
from l2sp_tf.reports import paper
from l2sp_tf.reports.significance import holm, permutation_test, worst_beats_best
from l2sp_tf.reports.summary import STATISTICS, STRENGTHS, by_place, chosen, labelled, notes, notes_across, place, summary


def overview(records):
    """What was gained on the target task and lost on the source task, for every setting that was run."""
    columns = ("source", "target", "penalty", "alpha", "beta", "rate", "runs")
    columns += ("target accuracy", "source before", "source after", "drop")
    rows, lines = labelled(summary(records), shown=STRENGTHS), []
    for row in rows:
        source = ("-", "-", "-")
        if "before" in row:
            after = row["target_statistics"]
            source = (f"{row['before']:.1f}", _show(after), _one_decimal(row["before"] - after[0]))
        strengths = ["-" if row["identity"].get(name) is None else f"{row['identity'][name]:g}" for name in STRENGTHS]
        setting = (row["origin"], row["title"], row["label"], *strengths)
        lines.append((*setting, _count(row), _show(row["target_accuracy"]), *source))
    text = (
        "Accuracies in percent, mean ± standard deviation over runs. Source after: the fine-tuned backbone under the original "
        "head, with its own batch-norm statistics; eval.py writes those with the source's statistics to summary.csv. Drop: "
        "percentage points lost."
    )
    return Table(columns, lines, "\n\n".join([text, *notes(rows, records)]))


def table_csv(records):
    """The summary as CSV, with both batch-norm readings of the source accuracy; "row" tells rows of other settings apart."""
    columns = ("source", "target", "penalty", "setting", "frozen", "alpha", "beta", "rate", "runs", "diverged")
    columns += ("target_mean", "target_sd", "source_before")
    columns += tuple(f"source_{name}_{kind}" for name in STATISTICS for kind in ("mean", "sd"))
    rows = []
    for row in labelled(summary(records), shown=STRENGTHS):
        measured = [value for name in STATISTICS for value in row.get(name, (None, None))]
        own = [row[name] for name in ("origin", "title", "penalty", "label", "frozen", "alpha", "beta")]
        own += [row["identity"].get("recipe.learning_rate"), row["runs"], row["diverged"]]
        rows.append([*own, *(row["target_accuracy"] or (None, None)), row.get("before"), *measured, run_key(row["identity"])])
    return Table((*columns, "row"), rows).csv()


def table_1(rows):
    """Table 1: the characteristics of the target databases, as loaded and as the paper gives them.

    Args:
        rows: dicts as `data.table_1_rows` returns them.
    """
    columns = ("database", "task category", "classes (paper)", "training a class (paper)", "test a class (paper)")
    lines = []
    for row in rows:
        name, task, train, test, classes = paper.TABLE_1[row["name"]]
        found = ["-"] * 5
        if "missing" not in row:
            a_class = ["-".join(str(n) for n in sorted(set(row[key]))) for key in ("train_per_class", "test_per_class")]
            found = [row["classes"], *a_class, f"{row['train']:,}", f"{row['test']:,}"]
        cells = [f"{ours} ({theirs})" for ours, theirs in zip(found[:3], (classes, train, test), strict=True)]
        lines.append((name, task, *cells, *found[3:]))
    notes = [f"{paper.TABLE_1[row['name']][0]}: {row['missing']}" for row in rows if "missing" in row]
    return Table((*columns, "training", "test"), lines, "\n".join(notes))


def table_2(records):
    """Table 2: target accuracies by penalty and data set, with the paper's numbers where the data set is the paper's.

    Raises:
        InputError: no record is without frozen layers, or two rows would look alike.
    """
    rows = sorted(_rows_of_a_table(records), key=lambda row: list(paper.PENALTIES).index(row["penalty"]))
    places = list(by_place(rows))
    cells = {label: {} for label in dict.fromkeys(row["label"] for row in rows)}
    for row in rows:
        cells[row["label"]][place(row)] = _show(row["target_accuracy"], _count(row))
    columns = ["penalty"] + [f"{target} (from {source})" for target, source in places]
    lines = [(label, *(line.get(name, "-") for name in places)) for label, line in cells.items()]
    if any(name in paper.TABLE_2 for name, _ in places):
        for symbol in ("l2", "l2_sp", "l2_sp_fisher"):
            found = (paper.TABLE_2.get(name, {}).get(symbol) for name, _ in places)
            lines.append((f"{paper.PENALTIES[symbol]}, paper", *(_show(pair) if pair else "-" for pair in found)))
    text = "Test accuracy in percent, mean ± standard deviation (number of runs)."
    told = [text, *notes_across(rows), *notes(rows, records)]
    return Table(tuple(columns), lines, "\n\n".join(told))


def table_2_tests(records):
    """Whether the differences of Table 2 are more than chance, for each pair of penalties on each data set.

    The permutation test compares the two methods over their runs, and McNemar's test the worst
    run of the better one with the best run of the other, as section 4.3.1 does. Both are corrected by Holm's method for
    the number of comparisons in the table.

    Raises:
        InputError: as `table_2`.
    """
    pairs = [pair for rows in by_place(_rows_of_a_table(records)).values() for pair in itertools.combinations(rows, 2)]
    pairs = [sorted(pair, key=lambda row: row["target_accuracy"] or (-1,), reverse=True) for pair in pairs]
    means = [_test_of_means(*pair) for pair in pairs]
    worst = [_worst_against_best(*pair) for pair in pairs]
    corrected = _corrected(means), _corrected([p for _, p in worst])
    lines = []
    for i, (better, worse) in enumerate(pairs):
        difference = "-"
        if better["target_accuracy"] and worse["target_accuracy"]:
            difference = f"{better['target_accuracy'][0] - worse['target_accuracy'][0]:.1f}"
        text, p = worst[i]
        criterion = text if p is None else f"{text if corrected[1][i] < 0.05 else 'no'} (p = {p:.2g}, {corrected[1][i]:.2g})"
        mean = means[i] if isinstance(means[i], str) else f"{means[i]:.2g}, {corrected[0][i]:.2g}"
        lines.append((*place(better), better["label"], worse["label"], difference, mean, criterion))
    return Table(
        ("target", "source", "better", "worse", "difference", "p of the means", "worst run beats best at 5%"),
        lines,
        "Differences in percentage points. Of two p the second is corrected for the number of comparisons in the table (Holm), "
        "and decides. p of the means: two-sided permutation test over runs, exact up to ten a side, sampled beyond. Worst run "
        "beats best: the better method's worst run against the other's best, McNemar's exact test on the test images.",
    )


def _test_of_means(a, b):
    """The p-value of the difference of two rows, or why there is none."""
    if a["diverged"] or b["diverged"]:
        return "runs diverged"
    return permutation_test(a["accuracies"], b["accuracies"]) if min(a["runs"], b["runs"]) > 1 else "-"


def _worst_against_best(better, worse):
    """Whether the worst run of one row is above the best of another, and McNemar's p, or None and why there is none."""
    records = better["records"] + worse["records"]
    if better["diverged"] or worse["diverged"]:
        return "runs diverged", None
    if any(right(record) is None for record in records):
        return "-", None
    if len({record["results"].get("test_digest") for record in records}) > 1:
        return "other test images", None
    higher, p = worst_beats_best(*([right(record) for record in row["records"]] for row in (better, worse)))
    return "yes" if higher else "no", p


def _corrected(values):
    """Holm's correction of those values that are p-values, at their places."""
    places = [i for i, value in enumerate(values) if isinstance(value, float)]
    return dict(zip(places, holm([values[i] for i in places]), strict=True))


def table_3(records):
    """Table 3: accuracy lost on the source task, with both readings of the batch-norm statistics.

    Raises:
        InputError: no record has measured the source task, or two rows would look alike.
    """
    rows = _rows_of_a_table(records)
    measured = {place(row) for row in rows if "before" in row}
    rows = [row for row in rows if place(row) in measured and ("before" in row or row["diverged"])]
    if not rows:
        raise InputError("No run has measured its source task: run train.py with --source.")
    rows.sort(key=lambda row: list(paper.PENALTIES).index(row["penalty"]))
    labels = {row["label"]: row["penalty"] for row in rows}
    lines = []
    for (target, source), here in by_place(rows).items():
        befores = sorted({f"{row['before']:.1f}" for row in here if "before" in row})
        for name, reading in STATISTICS.items():
            cells = {row["label"]: _drop(row, name) for row in here}
            lines.append((target, source, reading, ", ".join(befores), *(cells.get(label, "-") for label in labels)))
        if target in paper.TABLE_3:
            drops = {symbol: str(drop) for symbol, drop in paper.TABLE_3[target].items()}
            lines.append((target, "-", "paper", "-", *(drops.pop(symbol, "-") for symbol in labels.values())))
    text = (
        "Percentage points lost on the source task after fine-tuning, mean ± standard deviation over runs: the fine-tuned "
        "backbone under the original head. Table 3 does not say whose batch-norm statistics it takes; both are given."
    )
    told = [text, *notes_across(rows), *notes(rows, records)]
    return Table(("target", "source", "batch norm", "before", *labels), lines, "\n\n".join(told))


def _drop(row, name):
    """What was lost on the source by the statistics of this name, and how many runs diverged."""
    if "before" not in row:
        return "diverged"
    lost = _show((row["before"] - row[name][0], row[name][1]))
    return f"{lost}, {row['diverged']} diverged" if row["diverged"] else lost


def right(record):
    """Which test images a run got right: bool [n], or None if the record does not hold it."""
    text = record["results"].get("right")
    if diverged(record) or text is None:
        return None
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    return bits[: record["results"]["total"]].astype(bool)


def _rows_of_a_table(records):
    rows = chosen(summary(records))
    if not rows:
        raise InputError("Every run has frozen layers, and the tables are about runs without: run train.py with --frozen=0.")
    return labelled(rows)


def _count(row):
    """How many runs a row has, and how many of them diverged."""
    return str(row["runs"]) if not row["diverged"] else f"{row['runs'] + row['diverged']}, {row['diverged']} diverged"


def _show(pair, count=None):
    if pair is None:
        text = "diverged"
    else:
        mean, sd = pair
        text = _one_decimal(mean) if sd is None else f"{_one_decimal(mean)} ± {sd:.1f}"
    return text if count is None else f"{text} ({count})"


def _one_decimal(value):
    return f"{round(value, 1) + 0.0:.1f}"  # 0.0, not -0.0
