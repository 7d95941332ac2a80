"""Tables 1 to 3 and the summary of any runs: the first from counts of images, the others from records alone."""

import collections
import csv
import io
import itertools
import pathlib
import statistics
import typing

import numpy as np

from l2sp_tf.comparison import permutation_test, worst_beats_best
from l2sp_tf.errors import InputError
from l2sp_tf.files import write_text

LABELS = {
    "l2": "L2",
    "l2_sp": "L2-SP",
    "l2_sp_fisher": "L2-SP-Fisher",
    "l1_sp": "L1-SP",
    "gl_sp": "GL-SP",
    "gl_sp_fisher": "GL-SP-Fisher",
}
STATISTICS = {"target_statistics": "fine-tuned statistics", "source_statistics": "source statistics"}
# The paper's numbers for its data sets: Table 2 (mean, standard deviation of 5 runs) and Table 3 (accuracy lost).
PAPER_TABLE_2 = {
    "MIT Indoors 67": {"l2": (79.6, 0.5), "l2_sp": (84.2, 0.3), "l2_sp_fisher": (84.0, 0.4)},
    "Stanford Dogs 120": {"l2": (81.4, 0.2), "l2_sp": (85.1, 0.2), "l2_sp_fisher": (85.1, 0.2)},
    "Caltech 256 - 30": {"l2": (83.5, 0.3), "l2_sp": (85.7, 0.1), "l2_sp_fisher": (85.7, 0.1)},
    "Caltech 256 - 60": {"l2": (88.2, 0.2), "l2_sp": (89.6, 0.1), "l2_sp_fisher": (89.6, 0.1)},
}
PAPER_TABLE_3 = {
    "MIT Indoors 67": {"l2": 24.1, "l2_sp": 5.3, "l2_sp_fisher": 4.9},
    "Stanford Dogs 120": {"l2": 14.1, "l2_sp": 4.7, "l2_sp_fisher": 4.2},
    "Caltech 256 - 30": {"l2": 18.2, "l2_sp": 3.6, "l2_sp_fisher": 3.0},
    "Caltech 256 - 60": {"l2": 21.8, "l2_sp": 3.4, "l2_sp_fisher": 2.8},
}
# The paper's Table 1: database, task category, training and test images a class, classes.
PAPER_TABLE_1 = {
    "caltech256/30": ("Caltech 256 - 30", "generic object recog.", "30", "> 20", 257),
    "caltech256/60": ("Caltech 256 - 60", "generic object recog.", "60", "> 20", 257),
    "stanford_dogs": ("Stanford Dogs 120", "specific object recog.", "100", "~ 72", 120),
    "mit_indoors67": ("MIT Indoors 67", "scene classification", "80", "20", 67),
}
PAPER_NAMES = {"mit_indoors67": "MIT Indoors 67", "stanford_dogs": "Stanford Dogs 120", "caltech256": "Caltech 256"}


class Table(typing.NamedTuple):
    """Columns, rows of text, and notes below."""

    columns: tuple
    rows: list
    notes: str = ""

    def markdown(self):
        """The table in Markdown, its columns aligned, the notes in a paragraph of their own."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
        text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
        return "\n".join([*text, "", self.notes] if self.notes else text)

    def csv(self):
        """The table as comma-separated values, without the notes."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
        return text.getvalue()

    def save(self, folder, name):
        """Writes `name`.md and `name`.csv to a folder, and returns their paths.

        Raises:
            OSError: the folder cannot be written.
        """
        paths = [pathlib.Path(folder) / f"{name}.{ending}" for ending in ("md", "csv")]
        write_text(paths[0], self.markdown() + "\n")
        write_text(paths[1], self.csv())
        return paths


def summary(records):
    """One row for each source, target, penalty and setting, with mean and standard deviation over seeds.

    Args:
        records: a list of records.

    Returns:
        A list of dicts. Accuracies are in percent: under "target_accuracy" and, where the source task
        was measured, "target_statistics" and "source_statistics" (see
        `evaluation.retention`), pairs of mean and sample standard deviation (None for a
        single run); "before" is the pre-trained model's accuracy. "title" names the target as the paper
        does, "frozen" counts frozen units, "selected" tells whether cross-validation chose the
        setting, and "records" are the row's own.

    Raises:
        InputError: a record has an unknown penalty.
    """
    groups = collections.defaultdict(list)
    for record in records:
        s = record["settings"]
        if s["penalty"] not in LABELS:
            raise InputError(f"A record has the penalty {s['penalty'][:100]!r}: remove it, or give one of {', '.join(LABELS)}.")
        rest = tuple(repr(s.get(name)) for name in ("anchors", "target_digest", "recipe", "fisher", "frozen"))
        groups[(s["source"], s["target"], s["penalty"], s["alpha"], s["beta"], rest)].append(record)
    rows = []
    for (source, target, penalty, alpha, beta, _), found in groups.items():
        results, settings = [record["results"] for record in found], found[0]["settings"]
        row = {"source": source, "target": target, "penalty": penalty, "alpha": alpha, "beta": beta, "runs": len(results)}
        row |= {"title": title(settings), "frozen": settings.get("frozen", 0), "records": found}
        row["label"] = LABELS[penalty] + variant(settings)
        row["selected"] = all("selection" in record for record in found)
        row["target_accuracy"] = _mean_sd([r["accuracy"] for r in results])
        row["accuracies"] = [100 * r["accuracy"] for r in results]
        if all("source" in r for r in results):
            row["before"] = 100 * results[0]["source"]["before"]["accuracy"]
            for name in STATISTICS:
                row[name] = _mean_sd([r["source"][name]["accuracy"] for r in results])
        rows.append(row)
    order = list(LABELS)
    return sorted(
        rows,
        key=lambda r: (r["source"], r["title"], order.index(r["penalty"]), r["label"], r["frozen"], r["alpha"], r["beta"]),
    )


def variant(settings):
    """How the steps of a run differ from the paper's: ", Adam", ", proximal", ", Adam, decoupled" or nothing."""
    recipe = settings.get("recipe") or {}
    solver, step = recipe.get("solver"), recipe.get("penalty_step")
    return "".join([", Adam" if solver == "adam" else "", f", {step}" if step else ""])


def title(settings):
    """What to call a target: the paper's name of its data set, with the training images a class where they were limited."""
    name, per_class = PAPER_NAMES.get(settings["target"], settings["target"]), settings.get("per_class")
    return f"{name} - {per_class}" if per_class is not None else name


def chosen(rows):
    """Of the summary's rows without frozen layers, those that the paper's tables are about.

    Where cross-validation chose a setting of a penalty, that one; otherwise all, so that no
    setting is chosen by its test accuracy.
    """
    rows = [row for row in rows if not row["frozen"]]
    selected = {(row["source"], row["title"], row["label"]) for row in rows if row["selected"]}
    return [row for row in rows if row["selected"] or (row["source"], row["title"], row["label"]) not in selected]


def overview(records):
    """What was gained on the target task and lost on the source task, for every setting that was run."""
    columns = ("source", "target", "penalty", "alpha", "beta", "runs", "target accuracy", "source before", "source after", "drop")
    rows = []
    for row in summary(records):
        frozen = f", {row['frozen']} units frozen" if row["frozen"] else ""
        setting = (row["source"], row["title"], row["label"] + frozen, f"{row['alpha']:g}", f"{row['beta']:g}")
        source = ("-", "-", "-")
        if "before" in row:
            after = row["target_statistics"]
            source = (f"{row['before']:.1f}", _show(after), f"{after[0] - row['before']:+.1f}")
        rows.append((*setting, str(row["runs"]), _show(row["target_accuracy"]), *source))
    return Table(
        columns,
        rows,
        "Accuracies in percent, mean ± standard deviation over runs. Source after: the fine-tuned backbone under the original "
        "head, with its own batch-norm statistics; eval.py writes those with the source's statistics to summary.csv.",
    )


def table_csv(records):
    """The summary as CSV, with both batch-norm readings of the source accuracy."""
    names = ["source", "title", "penalty", "frozen", "alpha", "beta", "runs"]
    columns = (*names, "target_mean", "target_sd", "source_before")
    columns += tuple(f"source_{name}_{kind}" for name in STATISTICS for kind in ("mean", "sd"))
    rows = []
    for row in summary(records):
        both = [value for name in STATISTICS for value in row.get(name, (None, None))]
        row["penalty"] += variant(row["records"][0]["settings"])
        rows.append([row[name] for name in names] + [*row["target_accuracy"], row.get("before"), *both])
    return Table(columns, rows).csv()


def table_1(rows):
    """Table 1: the characteristics of the target databases, as loaded and as the paper gives them.

    Args:
        rows: dicts as `data.table_1_rows` returns them.
    """
    columns = ("database", "task category", "classes (paper)", "training a class (paper)", "test a class (paper)")
    lines = []
    for row in rows:
        name, task, train, test, classes = PAPER_TABLE_1[row["name"]]
        found = ["-"] * 5
        if "missing" not in row:
            a_class = ["-".join(str(n) for n in sorted(set(row[key]))) for key in ("train_per_class", "test_per_class")]
            found = [row["classes"], *a_class, f"{row['train']:,}", f"{row['test']:,}"]
        cells = [f"{ours} ({paper})" for ours, paper in zip(found[:3], (classes, train, test), strict=True)]
        lines.append((name, task, *cells, *found[3:]))
    notes = [f"{PAPER_TABLE_1[row['name']][0]}: {row['missing']}" for row in rows if "missing" in row]
    return Table((*columns, "training", "test"), lines, "\n".join(notes))


def table_2(records):
    """Table 2: target accuracies by penalty and data set, with the paper's numbers where the data set is the paper's.

    Raises:
        InputError: no record is without frozen layers.
    """
    rows = sorted(_rows_of_a_table(records), key=lambda row: list(LABELS).index(row["penalty"]))
    names = sorted({(row["title"], row["source"]) for row in rows})
    cells = collections.defaultdict(dict)
    for row in rows:
        several = sum(r["label"] == row["label"] and _place(r) == _place(row) for r in rows) > 1
        label = row["label"] + (f", alpha {row['alpha']:g}, beta {row['beta']:g}" if several else "")
        cells[label][_place(row)] = _show(row["target_accuracy"], row["runs"])
    columns = ["penalty"] + [f"{target} (from {source})" for target, source in names]
    lines = [(label, *(line.get(name, "-") for name in names)) for label, line in cells.items()]
    if any(name in PAPER_TABLE_2 for name, _ in names):
        for symbol in ("l2", "l2_sp", "l2_sp_fisher"):
            found = (PAPER_TABLE_2.get(name, {}).get(symbol) for name, _ in names)
            lines.append((f"{LABELS[symbol]}, paper", *(_show(pair) if pair else "-" for pair in found)))
    return Table(tuple(columns), lines, "Test accuracy in percent, mean ± standard deviation (number of runs).")


def table_2_tests(records):
    """Whether the differences of Table 2 are more than chance, for each pair of penalties on each data set.

    The exact permutation test compares the two methods over their runs, and McNemar's test the worst
    run of the better one with the best run of the other, as section 4.3.1 does.
    """
    lines = []
    for a, b in itertools.combinations(_rows_of_a_table(records), 2):
        if _place(a) != _place(b):
            continue
        better, worse = (a, b) if a["target_accuracy"][0] >= b["target_accuracy"][0] else (b, a)
        difference = better["target_accuracy"][0] - worse["target_accuracy"][0]
        p = permutation_test(better["accuracies"], worse["accuracies"]) if min(a["runs"], b["runs"]) > 1 else None
        answers = [[right(record) for record in row["records"]] for row in (better, worse)]
        criterion = "-"
        if all(answer is not None for row in answers for answer in row):
            higher, chance = worst_beats_best(*answers)
            criterion = f"{'yes' if higher and chance < 0.05 else 'no'} (p = {chance:.2g})"
        names = (row["label"] + f", alpha {row['alpha']:g}" for row in (better, worse))
        lines.append((a["title"], a["source"], *names, f"{difference:.1f}", "-" if p is None else f"{p:.2g}", criterion))
    return Table(
        ("target", "source", "better", "worse", "difference", "p of the means", "worst run beats best at 5%"),
        lines,
        "Differences in percentage points. p of the means: exact two-sided permutation test over runs. Worst run beats best: the "
        "better method's worst run against the other's best, McNemar's exact test on the test images.",
    )


def table_3(records):
    """Table 3: accuracy lost on the source task, with both readings of the batch-norm statistics.

    Raises:
        InputError: no record has measured the source task.
    """
    rows = [row for row in _rows_of_a_table(records) if "before" in row]
    if not rows:
        raise InputError("No run has measured its source task: run train.py with --source.")
    symbols = [symbol for symbol in LABELS if any(row["penalty"] == symbol for row in rows)]
    lines = []
    for place in sorted({_place(row) for row in rows}):
        for name, reading in STATISTICS.items():
            cells = []
            for symbol in symbols:
                drops = [(r["before"] - r[name][0], r[name][1]) for r in rows if _place(r) == place and r["penalty"] == symbol]
                cells.append(", ".join(_show(drop) for drop in drops) or "-")
            before = next(row["before"] for row in rows if _place(row) == place)
            lines.append((place[0], place[1], reading, f"{before:.1f}", *cells))
        if place[0] in PAPER_TABLE_3:
            lines.append((place[0], "-", "paper", "-", *(f"{PAPER_TABLE_3[place[0]].get(s, '-')}" for s in symbols)))
    return Table(
        ("target", "source", "batch norm", "before", *(LABELS[symbol] for symbol in symbols)),
        lines,
        "Percentage points lost on the source task after fine-tuning, mean ± standard deviation over runs: the fine-tuned "
        "backbone under the original head. Table 3 does not say whose batch-norm statistics it takes; both are given.",
    )


def right(record):
    """Which test images a run got right: bool [n], or None if the record does not hold it."""
    text, total = record["results"].get("right"), record["results"]["total"]
    if text is None:
        return None
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))
    return bits[:total].astype(bool)


def _place(row):
    return row["title"], row["source"]


def _rows_of_a_table(records):
    rows = chosen(summary(records))
    if not rows:
        raise InputError("Every run has frozen layers, and the tables are about runs without: run train.py with --frozen=0.")
    return rows


def _mean_sd(accuracies):
    """Mean and sample standard deviation, in percent."""
    percent = [100 * a for a in accuracies]
    return statistics.fmean(percent), statistics.stdev(percent) if len(percent) > 1 else None


def _show(pair, runs=None):
    mean, sd = pair
    text = f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}"
    return text if runs is None else f"{text} ({runs})"
