"""Tables 1 to 3 and the overview of any runs. Table 1 counts images; the others need only records."""

import itertools

import numpy as np

from l2sp_tf.experiments.records import diverged, run_key
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.table import Table
from l2sp_tf.reports import paper
from l2sp_tf.reports.labels import STRENGTHS, by_place, differences, labelled, place, place_text
from l2sp_tf.reports.significance import holm, permutation_test, worst_beats_best
from l2sp_tf.reports.summary import STATISTICS, by_penalty, chosen, notes, summary


def overview(records):
    """Makes the table of every setting that was run: its gain on the target task and its loss on the source task."""
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
    """Returns the summary as CSV, with both batch-norm readings of the source accuracy; "row" is a hash of the identity."""
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
    """Makes Table 1: the characteristics of the target databases, as loaded and in the paper.

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
    """Makes Table 2: target accuracies by penalty and data set, with the paper's numbers for the paper's data sets.

    Raises:
        InputError: all runs have frozen layers, or two rows would look alike.
    """
    rows = by_penalty(_rows_of_a_table(records))
    places = list(by_place(rows))
    cells = {label: {} for label in dict.fromkeys(row["label"] for row in rows)}
    for row in rows:
        cells[row["label"]][place(row)] = _show(row["target_accuracy"], _count(row))
    columns = ["penalty"] + [place_text(name) for name in places]
    lines = [(label, *(line.get(name, "-") for name in places)) for label, line in cells.items()]
    if any(name in paper.TABLE_2 for name, _ in places):
        for symbol in ("l2", "l2_sp", "l2_sp_fisher"):
            found = (paper.TABLE_2.get(name, {}).get(symbol) for name, _ in places)
            lines.append((f"{paper.PENALTIES[symbol]}, paper", *(_show(pair) if pair else "-" for pair in found)))
    text = "Test accuracy in percent, mean ± standard deviation (number of runs)."
    return Table(tuple(columns), lines, "\n\n".join([text, *differences(rows), *notes(rows, records)]))


def table_2_tests(records):
    """Tests whether the differences of Table 2 are more than chance, for each pair of penalties on each data set.

    The permutation test compares the runs of the two methods. McNemar's test compares the worst run of the better method
    with the best run of the other, as in section 4.3.1. Holm's method corrects both for the number of comparisons.

    Raises:
        InputError: as `table_2`.
    """
    pairs = [pair for rows in by_place(_rows_of_a_table(records)).values() for pair in itertools.combinations(rows, 2)]
    pairs = [sorted(pair, key=lambda row: row["target_accuracy"] or (-1,), reverse=True) for pair in pairs]
    means, worst = ([test(*pair) for pair in pairs] for test in (_test_of_means, _worst_against_best))
    corrected = zip(_corrected(means), _corrected([p for _, p in worst]), strict=True)
    lines = []
    for (better, worse), mean, (is_higher, criterion), (p, q) in zip(pairs, means, worst, corrected, strict=True):
        if p is not None:
            mean = f"{mean:.2g}, {p:.2g}"
        if q is not None:
            criterion = f"{'yes' if is_higher and q < 0.05 else 'no'} (p = {criterion:.2g}, {q:.2g})"
        lines.append((*place(better), better["label"], worse["label"], _difference(better, worse), mean, criterion))
    return Table(
        ("target", "source", "better", "worse", "difference", "p of the means", "worst run beats best at 5%"),
        lines,
        "Differences in percentage points. Of two p the second is corrected for the number of comparisons in the table (Holm), "
        "and decides. p of the means: two-sided permutation test over runs, exact up to ten a side, sampled beyond. Worst run "
        "beats best: the better method's worst run against the other's best, McNemar's exact test on the test images.",
    )


def _difference(better, worse):
    """Returns the difference of two rows' mean accuracies as text."""
    if not (better["target_accuracy"] and worse["target_accuracy"]):
        return "-"
    return f"{better['target_accuracy'][0] - worse['target_accuracy'][0]:.1f}"


def _test_of_means(a, b):
    """Returns the p-value of the difference of two rows' means, or why there is none."""
    if a["diverged"] or b["diverged"]:
        return "runs diverged"
    return permutation_test(a["accuracies"], b["accuracies"]) if min(a["runs"], b["runs"]) > 1 else "-"


def _worst_against_best(better, worse):
    """Returns whether one row's worst run is above another's best, and McNemar's p-value, or why there is none."""
    if better["diverged"] or worse["diverged"]:
        return None, "runs diverged"
    sides = [[right(record) for record in row["records"]] for row in (better, worse)]
    if any(found is None for side in sides for found in side):
        return None, "-"
    records = better["records"] + worse["records"]
    if len({record["results"].get("test_digest") for record in records}) > 1:
        return None, "other test images"
    return worst_beats_best(*sides)


def _corrected(values):
    """Corrects p-values by Holm's method; None for those that are reasons why there is none."""
    corrected = iter(holm([p for p in values if not isinstance(p, str)]))
    return [None if isinstance(p, str) else next(corrected) for p in values]


def table_3(records):
    """Makes Table 3: accuracy lost on the source task, by both readings of the batch-norm statistics.

    Raises:
        InputError: no record has measured the source task, or two rows would look alike.
    """
    rows = _rows_of_a_table(records)
    measured = {place(row) for row in rows if "before" in row}
    rows = by_penalty(row for row in rows if place(row) in measured and ("before" in row or row["diverged"]))
    if not rows:
        raise InputError("No run has measured its source task: run train.py with --source.")
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
    columns = ("target", "source", "batch norm", "before", *labels)
    return Table(columns, lines, "\n\n".join([text, *differences(rows), *notes(rows, records)]))


def _drop(row, name):
    """Returns what a row lost on the source by the statistics of this name, and how many of its runs diverged."""
    if "before" not in row:
        return "diverged"
    lost = _show((row["before"] - row[name][0], row[name][1]))
    return f"{lost}, {row['diverged']} diverged" if row["diverged"] else lost


def right(record):
    """Reads from a record which test images its run got right: bool [n], or None if the record lacks it."""
    text = record["results"].get("right")
    if diverged(record) or text is None:
        return None
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    return bits[: record["results"]["total"]].astype(bool)


def _rows_of_a_table(records):
    """Returns the labelled rows of the paper's tables, or raises InputError if there are none."""
    rows = chosen(summary(records))
    if not rows:
        raise InputError("Every run has frozen layers, and the tables are about runs without: run train.py with --frozen=0.")
    return labelled(rows)


def _count(row):
    """Returns how many runs a row has, and how many of them diverged."""
    return str(row["runs"]) if not row["diverged"] else f"{row['runs'] + row['diverged']}, {row['diverged']} diverged"


def _show(pair, count=None):
    """Writes mean ± standard deviation with one decimal, and the number of runs in brackets."""
    text = "diverged"
    if pair is not None:
        mean, sd = pair
        text = _one_decimal(mean) if sd is None else f"{_one_decimal(mean)} ± {sd:.1f}"
    return text if count is None else f"{text} ({count})"


def _one_decimal(value):
    return f"{round(value, 1) + 0.0:.1f}"  # 0.0, not -0.0
