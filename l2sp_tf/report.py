"""Tables and figures, drawn from records alone."""

import collections
import csv
import io
import statistics

from l2sp_tf.files import atomic_path, write_text

LABELS = {
    "l2": "L2",
    "l2_sp": "L2-SP",
    "l2_sp_fisher": "L2-SP-Fisher",
    "l1_sp": "L1-SP",
    "gl_sp": "GL-SP",
    "gl_sp_fisher": "GL-SP-Fisher",
}
COLUMNS = ("source", "target", "penalty", "alpha", "beta", "runs", "target accuracy", "source before", "source after", "drop")


def summary(records):
    """One row for each source, target, penalty and strengths, with mean and standard deviation over seeds.

    Args:
        records: a list of records.

    Returns:
        A list of dicts. Accuracies are in percent: under "target" and, where the source task
        was measured, "target_statistics" and "source_statistics" (see
        `evaluation.retention`), pairs of mean and sample standard deviation (None for a
        single run); "before" is the pre-trained model's accuracy.
    """
    groups = collections.defaultdict(list)
    for record in records:
        s = record["settings"]
        rest = tuple(repr(s.get(name)) for name in ("anchors", "target_digest", "recipe", "fisher"))
        groups[(s["source"], s["target"], s["penalty"], s["alpha"], s["beta"], rest)].append(record["results"])
    rows = []
    for (source, target, penalty, alpha, beta, _), results in groups.items():
        row = {"source": source, "target": target, "penalty": penalty, "alpha": alpha, "beta": beta, "runs": len(results)}
        row["target_accuracy"] = _mean_sd([r["accuracy"] for r in results])
        row["accuracies"] = [100 * r["accuracy"] for r in results]
        if all("source" in r for r in results):
            row["before"] = 100 * results[0]["source"]["before"]["accuracy"]
            for name in ("target_statistics", "source_statistics"):
                row[name] = _mean_sd([r["source"][name]["accuracy"] for r in results])
        rows.append(row)
    order = list(LABELS)
    return sorted(rows, key=lambda r: (r["source"], r["target"], order.index(r["penalty"]), r["alpha"]))


def table(records):
    """The summary as a Markdown table: what was gained on the target task and lost on the source task."""
    lines = [COLUMNS]
    for row in summary(records):
        lines.append(
            (
                row["source"],
                row["target"],
                LABELS[row["penalty"]],
                f"{row['alpha']:g}",
                f"{row['beta']:g}",
                str(row["runs"]),
                _show(row["target_accuracy"]),
                f"{row['before']:.1f}" if "before" in row else "-",
                _show(row["target_statistics"]) if "before" in row else "-",
                f"{row['target_statistics'][0] - row['before']:+.1f}" if "before" in row else "-",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    notes = (
        "Accuracies in percent, mean ± standard deviation over runs. Source after: the fine-tuned backbone under the original "
        "head, with its own batch-norm statistics; eval.py writes those with the source's statistics to summary.csv."
    )
    return "\n".join([*text, "", notes])


def table_csv(records):
    """The summary as CSV, with both batch-norm readings of the source accuracy."""
    names = ["source", "target", "penalty", "alpha", "beta", "runs", "target_mean", "target_sd", "source_before"]
    names += [f"source_{name}_{kind}" for name in ("target_statistics", "source_statistics") for kind in ("mean", "sd")]
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in summary(records):
        line = {name: row[name] for name in names[:6]}
        line |= {
            "target_mean": row["target_accuracy"][0],
            "target_sd": row["target_accuracy"][1],
            "source_before": row.get("before"),
        }
        for name in ("target_statistics", "source_statistics"):
            line[f"source_{name}_mean"], line[f"source_{name}_sd"] = row.get(name, (None, None))
        writer.writerow(line)
    return text.getvalue()


def figure(records):
    """A figure with one panel for the target and one for the source task: points are runs, bars are means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = summary(records)
    names = [f"{LABELS[row['penalty']]}\n$\\alpha$={row['alpha']:g}" for row in rows]
    panels = 2 if any("before" in row for row in rows) else 1
    drawing, axes = pyplot.subplots(
        1, panels, figsize=(1.5 + panels * max(3.0, 1.2 * len(rows)), 4), squeeze=False, layout="constrained"
    )
    target, *source = axes[0]
    for position, row in enumerate(rows):
        target.plot([position] * row["runs"], row["accuracies"], "o", color="tab:blue", alpha=0.6)
        target.plot([position - 0.25, position + 0.25], [row["target_accuracy"][0]] * 2, color="black")
        if source and "before" in row:
            for name, color, shift in (("target_statistics", "tab:red", -0.1), ("source_statistics", "tab:green", 0.1)):
                mean, sd = row[name]
                label = f"after, {name.replace('_', ' ')}" if position == 0 else None
                source[0].errorbar(position + shift, mean, yerr=sd, fmt="o", color=color, capsize=4, label=label)
            source[0].plot(
                [position - 0.3, position + 0.3], [row["before"]] * 2, "k--", label="before" if position == 0 else None
            )
    target.set_title(f"target task: {rows[0]['target']}")
    if source:
        source[0].set_title(f"source task: {rows[0]['source']}")
        source[0].legend(fontsize="small")
    for panel in axes[0]:
        panel.set_xticks(range(len(rows)), names, fontsize="small")
        panel.set_xlim(-0.6, len(rows) - 0.4)
        panel.set_ylabel("test accuracy, %")
        panel.grid(axis="y", alpha=0.3)
    return drawing


def write_summary(records, folder):
    """Writes summary.md, summary.csv and summary.png to a folder, and returns their paths.

    Raises:
        OSError: the folder cannot be written.
    """
    from matplotlib import pyplot

    paths = [folder / f"summary.{ending}" for ending in ("md", "csv", "png")]
    write_text(paths[0], table(records) + "\n")
    write_text(paths[1], table_csv(records))
    drawing = figure(records)
    with atomic_path(paths[2]) as temporary:
        drawing.savefig(temporary, dpi=150)
    pyplot.close(drawing)
    return paths


def _mean_sd(accuracies):
    """Mean and sample standard deviation, in percent."""
    percent = [100 * a for a in accuracies]
    return statistics.fmean(percent), statistics.stdev(percent) if len(percent) > 1 else None


def _show(pair):
    mean, sd = pair
    return f"{mean:.1f}" if sd is None else f"{mean:.1f} ± {sd:.1f}"
