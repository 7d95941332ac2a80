"""The figures of the paper, drawn from records alone, and the files of every table and figure."""

import pathlib
import textwrap

import matplotlib
import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure

from l2sp_tf import theory
from l2sp_tf.experiments.records import BOX
from l2sp_tf.files.errors import InputError
from l2sp_tf.files.writing import atomic_path, write_text
from l2sp_tf.reports import paper, tables
from l2sp_tf.reports.labels import by_place, differences, labelled, lines, place, place_text
from l2sp_tf.reports.summary import STATISTICS, by_penalty, chosen, summary

COLORS = dict(zip(paper.PENALTIES, ("tab:gray", "tab:blue", "tab:green", "tab:orange", "tab:red", "tab:purple"), strict=True))
MORE_COLORS = ("tab:brown", "tab:pink", "tab:olive", "tab:cyan")  # for penalties that are not the paper's
MOST_BOXES = 12
# An example for appendix A: J is about 10 times as curved across its valley as along it.
PATH_EXAMPLE = {"hessian": [[0.325, -0.39], [-0.39, 0.775]], "w_star": [1.0, 2.2], "w0": [2.6, 1.9]}


def color_of(symbol):
    """Returns the color of a penalty: the same in all figures."""
    return COLORS.get(symbol) or MORE_COLORS[sum(map(ord, symbol)) % len(MORE_COLORS)]


def save(drawing, folder, name):
    """Writes a figure as `name`.png and `name`.svg to a folder, and returns the paths.

    Raises:
        OSError: the folder cannot be written.
    """
    paths = [pathlib.Path(folder) / f"{name}.{ending}" for ending in ("png", "svg")]
    for path in paths:
        # leaves out the date and fixes the salt, so that equal records give equal files
        with atomic_path(path) as temporary, matplotlib.rc_context({"svg.hashsalt": name}):
            metadata = {"Date": None} if path.suffix == ".svg" else None
            drawing.savefig(temporary, format=path.suffix[1:], dpi=150, metadata=metadata)
    return paths


def overview(records):
    """Draws a panel for the target and one for the source of each pair of tasks: points are runs, bars are means."""
    places = by_place(labelled(summary(records)))
    has_source = any("before" in row for rows in places.values() for row in rows)
    widest = max(map(len, places.values()))
    drawing, axes = _panels(len(places), 1 + has_source, width=1.5 + max(3.0, 1.2 * widest))
    for (target, *source), (where, rows) in zip(axes, places.items(), strict=True):
        for position, row in enumerate(rows):
            target.plot([position] * row["runs"], row["accuracies"], "o", color="tab:blue", alpha=0.6)
            if row["target_accuracy"]:
                target.plot([position - 0.25, position + 0.25], [row["target_accuracy"][0]] * 2, color="black")
            if source and "before" in row:
                _source_points(source[0], position, row, is_first=not source[0].lines)
        target.set_title(f"target task: {where[0]}")
        if source:
            source[0].set_title(f"source task: {where[1]}")
            if any("before" in row for row in rows):
                source[0].legend(fontsize="small")
        for panel in (target, *source):
            panel.set_xticks(range(len(rows)), [_stacked(row) for row in rows], fontsize="small")
            panel.set_xlim(-0.6, len(rows) - 0.4)
            panel.set_ylabel("test accuracy, %")
    return drawing


def _source_points(panel, position, row, is_first):
    """Draws the source accuracy of a row before and after fine-tuning."""
    for name, color, shift in zip(STATISTICS, ("tab:red", "tab:green"), (-0.1, 0.1), strict=True):
        mean, sd = row[name]
        label = f"after, {STATISTICS[name]}" if is_first else None
        panel.errorbar(position + shift, mean, yerr=sd, fmt="o", color=color, capsize=4, label=label)
    panel.plot([position - 0.3, position + 0.3], [row["before"]] * 2, "k--", label="before" if is_first else None)


def _stacked(row):
    """Breaks a label over several lines, with alpha and the number of diverged runs."""
    words = row["label"].split(", ")
    if not any(word.startswith("alpha ") for word in words):
        words.insert(1, f"alpha {row['alpha']:g}")
    return "\n".join(words + ([f"{row['diverged']} diverged"] if row["diverged"] else []))


def figure_1(records):
    """Draws Fig. 1: target accuracy of L2-SP over alpha and beta, a panel for each target and each combination of other settings.

    Raises:
        InputError: L2-SP was not run with two values of alpha or beta, or two rows would look alike.
    """
    rows = [row for row in summary(records) if row["penalty"] == "l2_sp" and not row["frozen"]]
    grids = [grid for grid in labelled(lines(rows, ("alpha", "beta"))) if len(grid["points"]) > 1]
    _check(grids, "Fig. 1", "L2-SP with several --alpha and --beta")
    drawing, axes = _panels(1, len(grids), width=5)
    for panel, grid in zip(axes[0], grids, strict=True):
        alphas, betas = (sorted({row[name] for row in grid["points"]}) for name in ("alpha", "beta"))
        means = np.full((len(betas), len(alphas)), np.nan)
        for row in grid["points"]:
            means[betas.index(row["beta"]), alphas.index(row["alpha"])] = (row["target_accuracy"] or (np.nan,))[0]
        image = panel.imshow(means, origin="lower", cmap="viridis", aspect="auto")
        middle = (np.nanmin(means) + np.nanmax(means)) / 2 if not np.isnan(means).all() else 0
        for row in grid["points"]:
            b, a = betas.index(row["beta"]), alphas.index(row["alpha"])
            text = "diverged" if np.isnan(means[b, a]) else f"{means[b, a]:.1f}"
            panel.text(a, b, text, ha="center", va="center", color="white" if means[b, a] <= middle else "black")
        panel.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas])
        panel.set_yticks(range(len(betas)), [f"{beta:g}" for beta in betas])
        title = place_text(place(grid)) + grid["label"].removeprefix(paper.PENALTIES["l2_sp"])
        panel.set(xlabel=r"$\alpha$", ylabel=r"$\beta$", title=title)
        panel.grid(visible=False)
        drawing.colorbar(image, ax=panel, label="test accuracy of L2-SP, %")
    return drawing


def figure_2(records):
    """Draws Fig. 2: target accuracy of every penalty, a panel for each target, a colour for each source; points are runs.

    Raises:
        InputError: there is no run without frozen layers.
    """
    rows = labelled(chosen(summary(records)))
    _check(rows, "Fig. 2", "some penalties with --frozen=0")
    titles, sources = (sorted({row[name] for row in rows}) for name in ("title", "origin"))
    labels = list(dict.fromkeys(row["label"] for row in by_penalty(rows)))
    drawing, axes = _panels(1, len(titles), width=1.5 + 0.8 * len(labels))
    for panel, name in zip(axes[0], titles, strict=True):
        for number, source in enumerate(sources):
            here = [row for row in rows if row["title"] == name and row["origin"] == source]
            points = [(labels.index(row["label"]), accuracy) for row in here for accuracy in row["accuracies"]]
            shift = 0.2 * (number - (len(sources) - 1) / 2)
            color = ("navy", "lightcoral", "tab:green", "tab:orange")[number % 4]
            x, y = [x + shift for x, _ in points], [y for _, y in points]
            panel.plot(x, y, "o", color=color, alpha=0.7, label=f"from {source}")
        panel.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
        panel.set(ylabel="test accuracy, %", title=name, xlim=(-0.6, len(labels) - 0.4))
        panel.legend(fontsize="small")
    if sentences := differences(rows):
        width = int(14 * drawing.get_figwidth())  # characters
        drawing.supxlabel("\n".join(textwrap.fill(text, width) for text in sentences), fontsize="x-small")
    return drawing


def figure_3(records):
    """Draws Fig. 3: target accuracy when the first n units are frozen; dashed lines are the unfrozen accuracies.

    Raises:
        InputError: no run has frozen layers.
    """
    rows = [row for row in summary(records) if row["target_accuracy"]]
    places = by_place(labelled([line for line in lines(rows, ("frozen",)) if any(row["frozen"] for row in line["points"])]))
    _check(places, "Fig. 3", "L2 and L2-SP with several --frozen")
    drawing, axes = _panels(len(places), 1, width=7)
    for (panel,), (where, here) in zip(axes, places.items(), strict=True):
        for number, line in enumerate(here):
            color, marker, dashes = color_of(line["penalty"]), "osD^v"[number % 5], ("--", ":", "-.")[number % 3]
            points = [(row["frozen"], *row["target_accuracy"]) for row in line["points"]]
            x, mean, sd = zip(*(point for point in points if point[0]), strict=True)
            panel.errorbar(x, mean, [spread or 0 for spread in sd], fmt=f"{marker}-", color=color, label=line["label"])
            for whole in [mean for count, mean, _ in points if not count]:
                panel.axhline(whole, ls=dashes, color=color, label=f"{line['label']}, nothing frozen")
        panel.set(xlabel="number of frozen units n", ylabel="test accuracy, %", title=place_text(where))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend(fontsize="small")
    return drawing


def figure_4(records):
    """Draws Fig. 4: boxes of R² between activations before and after fine-tuning, by layer and penalty.

    The boxes of a penalty are those of its run of the lowest seed.

    Raises:
        InputError: no record holds R².
    """
    rows = [row for row in labelled(chosen(summary(records))) if _lowest_with_r2(row)]
    places = by_place(rows)
    _check(places, "Fig. 4", "a backbone whose units are known")
    drawing, axes = _panels(len(places), 1, width=9)
    for (panel,), (where, here) in zip(axes, places.items(), strict=True):
        for number, row in enumerate(here):
            boxes = _boxes(_lowest_with_r2(row)["results"]["r2"])
            positions = [layer + 0.8 * (number + 0.5) / len(here) - 0.4 for layer in range(len(boxes))]
            same = [other["penalty"] for other in here[:number]].count(row["penalty"])
            look = {"facecolor": color_of(row["penalty"]), "alpha": 0.6, "hatch": ("", "///", "...", "xxx")[same % 4]}
            _draw_boxes(panel, [box for _, box in boxes], positions, 0.7 / len(here), look)
            panel.fill_between([], [], **look, label=row["label"])
        panel.set_xticks(range(len(boxes)), [name.removesuffix("_out").removesuffix("_relu") for name, _ in boxes], rotation=30)
        panel.set(ylabel="$R^2$ with the pre-trained activations", title=place_text(where), ylim=(-0.02, 1.02))
        panel.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return drawing


def _lowest_with_r2(row):
    """Returns the record of the lowest seed that holds R², or None."""
    measured = [record for record in row["records"] if "r2" in record["results"]]
    return min(measured, key=lambda record: record["settings"]["seed"], default=None)


def _boxes(r2):
    """Picks the layers to draw: all if they are few, otherwise evenly spread from the first to the last."""
    boxes = list(r2.items())
    if len(boxes) <= MOST_BOXES:
        return boxes
    return [boxes[round(i * (len(boxes) - 1) / (MOST_BOXES - 1))] for i in range(MOST_BOXES)]


def _draw_boxes(panel, boxes, positions, width, look):
    """Draws the boxes of layers with a feature that varies."""
    drawn = [(box, position) for box, position in zip(boxes, positions, strict=True) if box["med"] is not None]
    panel.bxp(
        [{**{name: box[name] for name in BOX}, "fliers": []} for box, _ in drawn],
        positions=[position for _, position in drawn],
        widths=width,
        showfliers=False,
        patch_artist=True,
        boxprops=look,
        medianprops={"color": "black"},
    )


def figure_path(hessian=PATH_EXAMPLE["hessian"], w_star=PATH_EXAMPLE["w_star"], w0=PATH_EXAMPLE["w0"]):
    """Draws appendix A in two dimensions: the paths of L2 and L2-SP from w* to 0 and to w0 as alpha grows.

    Args:
        hessian: H of the objective J at w*, symmetric and positive semi-definite, not 0, [2, 2]. By default an example.
        w_star, w0: w* and w0, [2].

    Returns:
        A matplotlib `Figure`: the contours of J, and dots where alpha is a power of 10 times the largest eigenvalue of H.

    Raises:
        InputError: a bad argument, or one of more than two dimensions.
    """
    hessian, w_star, w0 = (np.asarray(value, "float64") for value in (hessian, w_star, w0))
    if hessian.shape != (2, 2) or not hessian.any():
        raise InputError(f"hessian, of the shape {hessian.shape}, cannot be drawn: give one of 2 by 2 that is not 0.")
    drawing = Figure(figsize=(7, 5.5), layout="constrained")
    axes = drawing.subplots()
    for label, end, color, side in (("L2, to 0", np.zeros(2), "tab:red", -1), ("L2-SP, to $w^0$", w0, "tab:blue", 1)):
        _draw_path(axes, hessian, (w_star, end), side, label=label, color=color)
    for name, point, marker in (("$w^*$", w_star, "*"), ("$w^0$", w0, "s"), ("0", np.zeros(2), "X")):
        axes.plot(*point, marker, color="black", markersize=12 if marker == "*" else 8, zorder=3)
        _annotate(axes, name, point, (0, -20), fontsize="x-large", color="black")
    _contours(axes, hessian, w_star, np.stack([w_star, w0, np.zeros(2)]))
    axes.set(xlabel="$w_1$", ylabel="$w_2$", aspect="equal")
    axes.set_title("The penalized minimum as $\\alpha$ grows, on the contours of $J$\n(at the dots: $\\alpha / \\lambda_{max}$)")
    axes.legend(loc="lower right")
    return drawing


def _draw_path(axes, hessian, ends, side, *, label, color):
    """Draws the path of Eq. (8) from w* to another point, with labelled dots on its left (-1) or right (1) side."""
    powers = 10.0 ** np.arange(-2, 2)
    alphas = np.linalg.eigvalsh(hessian)[-1] * np.concatenate([powers, 1.01 * powers, np.geomspace(1e-6, 1e4, 400)])
    dots, onward, line = np.split(theory.path(hessian, *ends, alphas), [len(powers), 2 * len(powers)])
    axes.plot(*line.T, color=color, linewidth=2, label=label)
    axes.plot(*dots.T, "o", color=color, markersize=5)
    across = side * (onward - dots) @ [[0, 1], [-1, 0]]
    offsets = 13 * across / np.maximum(np.linalg.norm(across, axis=1, keepdims=True), 1e-12)
    for power, dot, offset in zip(powers, dots, offsets, strict=True):
        _annotate(axes, f"{power:g}", dot, offset, va="center", fontsize="small", color=color)


def _annotate(axes, text, point, offset, **options):
    """Writes `text` beside a point, with a white rim that keeps it readable on lines."""
    rim = [patheffects.withStroke(linewidth=3, foreground="white")]
    axes.annotate(text, point, offset, textcoords="offset points", ha="center", path_effects=rim, zorder=4, **options)


def _contours(axes, hessian, w_star, points):
    """Draws contours of J = 1/2 (w - w*)^T H (w - w*), evenly spaced in its root, around all the points."""
    margin = 0.25 * np.ptp(points, axis=0).max()
    grid = np.stack(np.meshgrid(*np.linspace(points.min(axis=0) - margin, points.max(axis=0) + margin, 200).T), axis=-1)
    objective = np.einsum("...i,ij,...j", grid - w_star, hessian, grid - w_star) / 2
    levels = objective.max() * np.linspace(0, 1, 12)[1:-1] ** 2
    axes.contour(grid[..., 0], grid[..., 1], objective, levels, colors="gray", linewidths=0.6)


def write_summary(records, folder, *, say=print):
    """Writes the overview of all settings as summary.md, .csv, .png and .svg to a folder, and its table to `say`.

    Args:
        records: a list of records.
        folder: its path.
        say: a function that is called with the text of each table.

    Returns:
        The paths of the files.

    Raises:
        OSError: the folder cannot be written.
    """
    paths = [pathlib.Path(folder) / f"summary.{ending}" for ending in ("md", "csv")]
    text = tables.overview(records).markdown()
    say(text + "\n")
    write_text(paths[0], text + "\n")
    write_text(paths[1], tables.table_csv(records))
    return paths + save(overview(records), folder, "summary")


def write_table(records, folder, number, *, say=print):
    """Writes Table 2 or 3 as Markdown and CSV, and to `say`; arguments and errors as `write_summary`.

    Raises:
        InputError: there are no runs for the table.
    """
    makers = {2: {"table_2": tables.table_2, "table_2_tests": tables.table_2_tests}, 3: {"table_3": tables.table_3}}
    paths = []
    for name, make in makers[number].items():
        made = make(records)
        if made.rows:
            say(made.markdown() + "\n")
            paths += made.save(folder, name)
    return paths


def write_figure(records, folder, number):
    """Writes Fig. 1, 2, 3 or 4 as PNG and SVG, and returns the paths; errors as `write_table`."""
    figures = {1: figure_1, 2: figure_2, 3: figure_3, 4: figure_4}
    return save(figures[number](records), folder, f"figure_{number}")


def write_all(records, folder, *, say=print):
    """Writes the summary and every table and figure that has runs; says which are left out, and why."""
    paths = write_summary(records, folder, say=say)
    parts = [lambda n=n: write_table(records, folder, n, say=say) for n in (2, 3)]
    parts += [lambda n=n: write_figure(records, folder, n) for n in (1, 2, 3, 4)]
    for part in parts:
        try:
            paths += part()
        except InputError as error:
            say(f"left out: {error}")
    return paths


def _panels(rows, columns, width, height=4):
    """Makes a figure of panels; width and height of each in inches."""
    drawing = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = drawing.subplots(rows, columns, squeeze=False)
    for panel in axes.flat:
        panel.grid(axis="y", alpha=0.3)
    return drawing, axes


def _check(found, name, what):
    if not found:
        raise InputError(f"There are no runs for {name}: run train.py with {what} first.")
