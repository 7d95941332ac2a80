"""Checks what each figure draws where, from records alone."""

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot
from test_records import record
from test_tables import RECORDS, runs

import l2sp_tf as l2sp
from l2sp_tf import theory
from l2sp_tf.reports import figures, paper


def box(median):
    return {"whislo": 0.1, "q1": 0.2, "med": median, "q3": 0.9, "whishi": 1.0, "features": 4, "undefined": 0}


def labels(panel):
    return [text.get_text() for text in panel.get_legend().get_texts()]


def test_fig_1_is_the_mean_accuracy_over_alpha_and_beta():
    grid = {(0.01, 0.1): [0.5, 0.7], (0.01, 1.0): [0.8], (0.1, 1.0): [0.9]}
    found = [made for (beta, alpha), values in grid.items() for made in runs("l2_sp", values, alpha=alpha, beta=beta)]
    found = [*found, *runs("l2_sp", [0.1], alpha=1.0, frozen=2), *runs("l2", [0.2], alpha=1.0)]
    for made, beta in zip(found, (0.01, 0.01, 0.01, 0.1, 0.01, 0.01), strict=True):
        made["settings"]["beta"] = beta
    panel = figures.figure_1(found).axes[0]
    assert [text.get_text() for text in panel.texts] == ["60.0", "80.0", "90.0"]
    assert [text.get_text() for text in panel.get_xticklabels()] == ["0.1", "1"]
    assert [text.get_text() for text in panel.get_yticklabels()] == ["0.01", "0.1"]


def test_fig_2_has_a_panel_for_each_target_and_a_colour_for_each_source():
    found = [
        record(p, s, a, target=t, source_name=src)
        for t in "uv"
        for src in "ab"
        for p, s, a in (("l2", 0, 0.5), ("gl_sp", 1, 0.6))
    ]
    for made in found:
        made["settings"]["source"] = made["settings"].pop("source_name")
    drawing = figures.figure_2(found)
    assert [panel.get_title() for panel in drawing.axes] == ["u", "v"]
    for panel in drawing.axes:
        assert [text.get_text() for text in panel.get_xticklabels()] == ["L2", "GL-SP"]
        assert labels(panel) == ["from a", "from b"]
        assert [list(line.get_ydata()) for line in panel.lines] == [pytest.approx([50, 60])] * 2


def test_fig_3_is_a_line_over_frozen_units_and_a_dashed_one_for_none():
    found = [made for n in (1, 2) for made in runs("l2", [0.5 + 0.1 * n, 0.7 + 0.1 * n], frozen=n)]
    found += runs("l2", [0.4]) + runs("l2", [0.9], alpha=7.0)  # the second has another strength and is not drawn
    panel = figures.figure_3(found).axes[0]
    solid, dashed = (line for line in panel.lines if len(line.get_xdata()) == 2 and line.get_linestyle() in ("-", "--"))
    assert list(solid.get_xdata()) == [1, 2] and list(solid.get_ydata()) == pytest.approx([70, 80])
    assert list(dashed.get_ydata()) == pytest.approx([40, 40])
    assert labels(panel) == ["L2, nothing frozen", "L2"]


def test_fig_3_distinguishes_lines_that_have_no_n_in_common():
    found = [made for n, weights in ((1, "a"), (2, "b")) for made in runs("l2", [0.5], frozen=n, anchors=weights)]
    assert labels(figures.figure_3(found).axes[0]) == ["L2, anchors a", "L2, anchors b"]


def test_figures_leave_pyplot_alone():
    backend = matplotlib.rcParams["backend"]
    figures.overview(RECORDS), figures.figure_path()
    assert pyplot.get_fignums() == [] and matplotlib.rcParams["backend"] == backend


def test_fig_4_has_a_box_for_each_layer_and_penalty_of_the_lowest_seed():
    found = runs("l2", [0.5, 0.6]) + runs("l2_sp", [0.7])
    for made in found:
        seed = made["settings"]["seed"]
        made["results"]["r2"] = {f"conv{i}_block1_out": box(0.3 + 0.1 * i + 0.01 * seed) for i in range(3)}
    found[0]["results"]["r2"]["conv1_block1_out"] = dict.fromkeys(figures.BOX)
    panel = figures.figure_4(found[::-1]).axes[0]
    assert labels(panel) == ["L2", "L2-SP"] and len(panel.patches) == 2 + 3
    medians = [line.get_ydata()[0] for line in panel.lines if line.get_color() == "black" and len(set(line.get_ydata())) == 1]
    assert {0.3, 0.5, 0.4}.issubset({round(m, 6) for m in medians}) and 0.31 not in {round(m, 6) for m in medians}
    assert [text.get_text() for text in panel.get_xticklabels()] == ["conv0_block1", "conv1_block1", "conv2_block1"]


def test_of_many_layers_some_are_drawn_from_the_first_to_the_last():
    drawn = figures._boxes({f"layer{i}": box(0.5) for i in range(34)})
    assert len(drawn) == 12 and (drawn[0][0], drawn[-1][0]) == ("layer0", "layer33")


def test_without_runs_a_figure_says_what_to_run():
    for draw, what in ((figures.figure_1, "--alpha"), (figures.figure_3, "--frozen"), (figures.figure_4, "units")):
        with pytest.raises(l2sp.InputError, match=what):
            draw(RECORDS)
    with pytest.raises(l2sp.InputError, match="--frozen=0"):
        figures.figure_2(runs("l2", [0.5], frozen=1))


def test_two_rows_are_never_one_cell():
    grid = runs("l2_sp", [0.5], alpha=0.1, recipe={"beta": 0.01}) + runs("l2_sp", [0.7], alpha=1.0, recipe={"beta": 0.02})
    assert [text.get_text() for text in figures.figure_1(grid).axes[0].texts] == ["50.0", "70.0"]
    for other in ({"alpha": 0.1 + 1e-9, "recipe": {"beta": 0.01}}, {"alpha": 0.1, "recipe": {"beta": 0.02}}):
        with pytest.raises(l2sp.InputError, match="2 rows of t .* would all read 'alpha 0.1, beta 0.01'"):
            figures.figure_1([*grid, *runs("l2_sp", [0.6], **other)])


def test_the_summary_is_written_in_four_formats(tmp_path):
    said = []
    paths = figures.write_summary(RECORDS, tmp_path, say=said.append)
    assert sorted(path.name for path in paths) == [f"summary.{end}" for end in ("csv", "md", "png", "svg")]
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG") and "85.0 ± 7.1" in said[0]
    assert len(list(tmp_path.iterdir())) == 4


def test_equal_records_give_equal_files(tmp_path):
    for name in "ab":
        figures.write_all(RECORDS, tmp_path / name, say=lambda _: None)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"table_2.md", "table_2_tests.csv", "table_3.md", "figure_2.svg"} < set(files) and "figure_1.png" not in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_every_penalty_has_a_colour():
    assert set(figures.COLORS) == set(paper.PENALTIES)


def test_the_figure_of_appendix_a_draws_both_paths_over_the_objective():
    hessian, w_star, w0 = (np.array(value) for value in figures.PATH_EXAMPLE.values())
    (axes,) = figures.figure_path(hessian, w_star, w0).axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    for label, end in (("L2, to 0", 0 * w0), ("L2-SP, to $w^0$", w0)):
        line = lines[label]
        np.testing.assert_allclose(line[0], w_star, atol=1e-3)
        np.testing.assert_allclose(line[-1], end, atol=1e-3)
        # each point solves Eq. (8) for some alpha: H (w - w*) is parallel to the way back to the end
        force, back = (line - w_star) @ hessian, end - line
        np.testing.assert_allclose(force[:, 0] * back[:, 1], force[:, 1] * back[:, 0], atol=1e-12)
    dots = [line.get_xydata() for line in axes.lines if line.get_marker() == "o"]
    alphas = np.linalg.eigvalsh(hessian)[-1] * np.array([0.01, 0.1, 1, 10])
    np.testing.assert_allclose(dots[1], theory.path(hessian, w_star, w0, alphas))
    assert [t.get_text() for t in axes.texts[4:8]] == ["0.01", "0.1", "1", "10"]
    assert axes.get_aspect() == 1 and axes.collections


def test_a_figure_of_appendix_a_that_cannot_be_drawn_is_refused():
    for hessian in (np.eye(3), np.zeros((2, 2))):
        with pytest.raises(l2sp.InputError, match="cannot be drawn"):
            figures.figure_path(hessian, np.ones(len(hessian)), np.ones(len(hessian)))
