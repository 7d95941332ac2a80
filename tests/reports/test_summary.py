"""Checks that runs of different settings make different rows, and that every table and figure says how they differ."""

import copy
import csv
import functools
import io

import pytest
from test_records import record

import l2sp_tf as l2sp
from l2sp_tf.experiments import records
from l2sp_tf.files.plain import plain
from l2sp_tf.files.provenance import RESULTS_VERSION
from l2sp_tf.reports import figures, tables
from l2sp_tf.reports.labels import by_place, labelled
from l2sp_tf.reports.summary import chosen, summary
from l2sp_tf.training.recipe import Recipe

BASE = {
    "source": "digits/source",
    "target": "digits/target",
    "target_digest": "a" * 64,
    "source_digest": "b" * 64,
    "skipped": [0, 0],
    "per_class": 25,
    "subset_seed": None,
    "protocol": "paper",
    "anchors": "c" * 64,
    "weights": "scratch",
    "backbone": "small",
    "pixels": {"channel_order": "rgb", "scale": [1.0, 1.0, 1.0], "mean": [1.5, 2.5, 3.5]},
    "source_mean": [1.0, 2.0, 3.0],
    "penalty": "l2_sp",
    "alpha": 0.1,
    "beta": 0.01,
    "frozen": 0,
    "code": RESULTS_VERSION,
    "fisher": "d" * 64,
    "deterministic": True,
    "recipe": plain(Recipe.digits().replace(blur="gaussian").record()) | {"solver": "sgd", "penalty_step": "gradient"},
}
SAME = {("recipe", "alpha"), ("recipe", "log_every")}  # no result depends on them


def leaves(settings, path=()):
    for name, value in settings.items():
        yield from leaves(value, (*path, name)) if isinstance(value, dict) and name != "alpha" else [(*path, name)]


def another(value):
    """Returns a different value of the same kind."""
    if isinstance(value, bool) or value is None:
        return {True: False, False: True, None: 7}[value]
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return {"l2_sp": "l1_sp", "sgd": "adam", "gradient": "proximal"}.get(value, f"x{value}")
    return {**value, "l2": 7.0} if isinstance(value, dict) else [another(value[0]), *value[1:]]


def made(path=(), value=None, accuracies=(0.5, 0.6)):
    """Makes runs of the base settings with one of them changed."""
    settings = copy.deepcopy(BASE)
    if path:
        *way, last = path
        place = settings
        for name in way:
            place = place[name]
        place[last] = value
    found = [record(seed=s, accuracy=a, source=(0.9, 0.8)) for s, a in enumerate(accuracies)]
    for each in found:
        each["settings"] = settings | {"seed": each["settings"]["seed"]}
        each["results"]["r2"] = {"conv1": {"whislo": 0.1, "q1": 0.2, "med": 0.3, "q3": 0.4, "whishi": 0.5}}
    return found


def shown(drawing):
    """Returns all words of a figure."""
    texts = [panel.get_title() for panel in drawing.axes]
    for panel in drawing.axes:
        texts += [text.get_text() for text in [*panel.get_xticklabels(), *panel.texts]]
        texts += [text.get_text() for text in panel.get_legend().get_texts()] if panel.get_legend() else []
    return texts


@functools.cache
def words_of_one_row(draw):
    return len(set(shown(draw(made()))))


PATHS = [path for path in leaves(BASE) if path != ("recipe", "beta")]


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_each_setting_that_changes_results_makes_another_row_and_is_shown(path):
    value = BASE
    for name in path:
        value = value[name]
    found = made() + made(path, another(value), accuracies=(0.7, 0.8))
    rows = summary(found)
    if path in SAME:  # other seeds, as no run counts twice
        for each in found[2:]:
            each["settings"]["seed"] += 2
        rows = summary(found)
        assert [row["runs"] for row in rows] == [4]
        return
    assert sorted(row["accuracies"] for row in rows) == [pytest.approx([50, 60]), pytest.approx([70, 80])]
    lines = tables.overview(found).rows
    assert len({line[:6] for line in lines}) == 2
    assert len({tuple(line.values())[:8] for line in csv.DictReader(io.StringIO(tables.table_csv(found)))}) == 2
    if path == ("frozen",):
        return
    table = tables.table_2(found)
    cells = [(line[0], column) for line in table.rows for column, cell in zip(table.columns, line, strict=True) if "(2)" in cell]
    assert len(set(cells)) == 2
    table = tables.table_3(found)
    assert len({(line[:2], label) for line in table.rows for label in table.columns[4:]}) >= 2
    assert len(set(shown(figures.figure_2(found)))) > words_of_one_row(figures.figure_2)
    assert len(set(shown(figures.overview(found)))) > words_of_one_row(figures.overview)
    assert len(set(shown(figures.figure_4(found)))) > words_of_one_row(figures.figure_4)


@pytest.mark.parametrize("path", [p for p in PATHS if p not in SAME and p[-1] not in ("penalty", "frozen")], ids=".".join)
def test_no_figure_of_a_grid_or_of_frozen_units_averages_what_differs(path):
    value = BASE
    for name in path:
        value = value[name]
    grid = [each for alpha in (1.0, 2.0) for p, v in (((), None), (path, another(value))) for each in made(p, v)]
    for number, each in enumerate(grid):
        each["settings"]["alpha"] += number // 4
    panels = [panel for panel in figures.figure_1(grid).axes if panel.get_title()]
    cells = [text.get_text() for panel in panels for text in panel.texts]
    assert len(cells) == len(summary(grid)) and set(cells) == {"55.0"}
    if path in (("alpha",), ("beta",)):
        return
    assert len({panel.get_title() for panel in panels}) == len(panels) == 2
    lines = [each for n in (0, 1, 2) for p, v in (((), None), (path, another(value))) for each in made(p, v)]
    for number, each in enumerate(lines):
        each["settings"]["frozen"] = number // 4
    panels = figures.figure_3(lines).axes
    names = [(panel.get_title(), text.get_text()) for panel in panels for text in panel.get_legend().get_texts()]
    assert len(names) == len(set(names)) == 4


def test_two_rates_are_two_cells_and_two_rows_of_the_test():
    found = made(("recipe", "learning_rate"), 0.01, (0.5,) * 5) + made(("recipe", "learning_rate"), 0.02, (0.9,) * 5)
    assert [row[0] for row in tables.table_2(found).rows] == ["L2-SP, rate 0.01", "L2-SP, rate 0.02"]
    ((_, _, better, worse, *_),) = tables.table_2_tests(found).rows
    assert (better, worse) == ("L2-SP, rate 0.02", "L2-SP, rate 0.01")


IN_THE_LABEL = ("penalty", "frozen", "solver", "penalty_step")


@pytest.mark.parametrize("path", [p for p in PATHS if p not in SAME and p[-1] not in IN_THE_LABEL], ids=".".join)
def test_a_line_over_several_targets_says_what_its_cells_do_not_share(path):
    value = BASE
    for name in path:
        value = value[name]
    elsewhere = made(path, another(value), accuracies=(0.7, 0.8))
    for each in elsewhere:
        each["settings"]["target"] = f"{each['settings']['target']} elsewhere"
    data = {"target", "target_digest", "per_class", "subset_seed", "protocol", "skipped", "source", "source_digest"}
    hashes = {"anchors", "fisher", "source_mean", "pixels"}  # each task has its own
    for draw in (tables.table_2, tables.table_3):
        assert ("L2-SP: " in draw(made() + elsewhere).notes) == (path[0] not in data | hashes)
    same = made() + [dict(each, settings=each["settings"] | {"target": "x"}) for each in made()]
    assert "L2-SP: " not in tables.table_2(same).notes


def test_two_subset_seeds_of_a_target_have_different_titles():
    found = []
    for seed in (0, 1):
        settings = {"subset_seed": seed, "target_digest": f"{seed}" * 64, "target": "caltech256", "per_class": 30}
        found += [dict(each, settings=each["settings"] | settings) for each in made()]
    assert tables.table_2(found).columns[1:] == (
        "Caltech 256 - 30, subset seed 0 (from digits/source)",
        "Caltech 256 - 30, subset seed 1 (from digits/source)",
    )
    assert len(figures.overview(found).axes) == 4  # a panel for each target and each source


def test_rows_that_read_alike_stop_the_table():
    found = made(("alpha",), 0.1) + made(("alpha",), 0.1 + 1e-9)
    for draw in (tables.overview, tables.table_2, tables.table_2_tests, tables.table_3, figures.figure_2, figures.overview):
        with pytest.raises(l2sp.InputError, match=r"2 rows of digits/target - 25 .* would all read"):
            draw(found)


@pytest.mark.parametrize("path", sorted(SAME), ids=".".join)
def test_a_run_counts_once_however_often_it_is_recorded(path):
    again = made(path, another(BASE["recipe"][path[1]]))
    for found in (made() + made(), made() + again, made() + again + made(accuracies=(0.1,))):
        (row,) = summary(found)
        assert row["accuracies"] == pytest.approx([50, 60]) and row["repeated"] == len(found) - 2
        assert f"{len(found) - 2} more records of the same seeds were left out" in tables.table_2(found).notes
    assert "left out" not in tables.table_2(made()).notes


def test_runs_of_earlier_code_are_marked_and_not_averaged_with_others():
    old = made(("code",), None)
    for each in old:
        del each["settings"]["code"], each["code"]
        each["format"] = records.FIRST_FORMAT
    table = tables.overview(old + made(accuracies=(0.7,)))
    assert {row[2] for row in table.rows} == {"L2-SP, earlier code", f"L2-SP, code {RESULTS_VERSION}"}
    assert "1 of 2 rows were made by an earlier version" in table.notes
    assert "All rows were made by an earlier" in tables.table_2(old).notes
    assert "earlier" not in tables.table_2(made()).notes


def test_a_row_that_joins_versions_or_devices_says_so():
    found = made()
    assert "joins" not in tables.overview(found).notes
    found[1]["versions"] = found[1]["versions"] | {"keras": "9"}
    found[0]["machine"] = found[0]["machine"] | {"device": "a card"}
    notes = tables.table_2(found).notes
    assert "joins runs of several versions" in notes and "joins runs of several devices: CPU, a card" in notes


def test_diverged_runs_are_counted_and_keep_their_row():
    found = made(accuracies=(0.5, 0.7, 0.9)) + made(("penalty",), "l2", (0.5,)) + made(("penalty",), "l1_sp", (0.8, 0.9))
    for each in (found[2], found[3]):
        each["results"] = {"diverged": "The loss is nan after step 3."}
        records.check_record(each, "run.json")
    assert tables.table_2(found).rows == [
        ("L2", "diverged (1, 1 diverged)"),
        ("L2-SP", "60.0 ± 14.1 (3, 1 diverged)"),
        ("L1-SP", "85.0 ± 7.1 (2)"),
    ]
    tests = {line[2:4]: line[4:] for line in tables.table_2_tests(found).rows}
    assert tests["L1-SP", "L2-SP"] == ("25.0", "runs diverged", "runs diverged") and tests["L2-SP", "L2"][0] == "-"
    lost = tables.table_3(found)
    assert lost.columns[4:] == ("L2", "L2-SP", "L1-SP")
    assert all(line[4] == "diverged" and line[5].endswith(", 1 diverged") and "diverged" not in line[6] for line in lost.rows)
    assert tables.overview(found).rows
    assert tables.table_csv(found).count("\n") == 4
    for draw in (figures.overview, figures.figure_2, figures.figure_4):
        draw(found)
    everything = made(accuracies=(0.5,))
    everything[0]["results"] = {"diverged": "The loss is nan after step 3."}
    assert tables.table_2(everything).rows == [("L2-SP", "diverged (1, 1 diverged)")]
    figures.overview(everything)


def selection(chosen, alphas=(0.1, 1.0), **more):
    candidates = [{"alpha": alpha, "beta": 0.01, "learning_rate": 0.01, "accuracies": [0.5, 0.6]} for alpha in alphas]
    choice = next((c for c in candidates if c["alpha"] == chosen), None)
    found = {"format": records.SELECTION, "question": records.question(made()[0]["settings"]), "folds": 2}
    found |= {"candidates": candidates, "chosen": choice, **more}
    records.check_record(found, "selection.json")
    return found


def test_a_selection_decides_which_rows_the_tables_show():
    grid = made(("alpha",), 0.1, (0.9,)) + made(("alpha",), 1.0, (0.5, 0.6)) + made(("alpha",), 10.0, (0.7,))
    assert len(tables.table_2(grid).rows) == 3
    for alpha in (0.1, 1.0):
        (row,) = chosen(summary([*grid, selection(alpha)]))
        assert row["alpha"] == alpha
    other = selection(0.1)
    other["question"] = other["question"] | {"recipe.iterations": 7}
    assert len(chosen(summary([*grid, other]))) == 3  # it is about other runs
    noted = [dict(each, selection={}) for each in made(("alpha",), 10.0, (0.7,))] + grid[:2]  # as records of the first format
    assert [row["alpha"] for row in chosen(summary(noted))] == [10.0]
    assert [row["alpha"] for row in chosen(summary([*noted, selection(0.1)]))] == [0.1]


def test_a_note_names_a_selection_in_which_all_diverged_or_that_met_its_limit():
    grid = made(("alpha",), 0.1, (0.9,))
    assert "Every setting of L2-SP on digits/target - 25 diverged" in tables.table_2([*grid, selection(None)]).notes
    edge = selection(0.1, edges=["alpha 0.1"])
    assert "lies at the edge of what was tried (alpha 0.1)" in tables.overview([*grid, edge]).notes


def test_labels_name_what_differs_and_no_more():
    recipes = [("iterations", 100), ("learning_rate", 0.02), ("solver", "adam")]
    found = [each for name, value in recipes for each in made(("recipe", name), value)] + made()
    names = {row["label"] for row in labelled(summary(found))}
    assert names == {
        "L2-SP, rate 0.01, iterations 100",
        "L2-SP, rate 0.02, iterations 200",
        "L2-SP, rate 0.01, iterations 200",
        "L2-SP, Adam, iterations 200",
    }


def test_places_are_in_order():
    rows = summary(made(("target",), "b") + made(("target",), "a"))
    assert list(by_place(rows)) == [("a - 25", "digits/source"), ("b - 25", "digits/source")]


def test_labels_distinguish_source_models_and_fisher_diagonals_by_the_words_of_their_records():
    first, second = made(), made(("anchors",), "e" * 64)
    for each, iterations in zip(first + second, (100, 100, 200, 200), strict=True):
        each["anchors"]["recipe"] = {"iterations": iterations, "batch_size": 64, "alpha": {"l2": 1e-4}}
    labels = [row["label"] for row in labelled(summary(first + second))]
    assert labels == ["L2-SP, source iterations 100", "L2-SP, source iterations 200"]
    (note,) = [text for text in tables.table_2(first + second).notes.split("\n\n") if "pre-trained model" in text]
    assert "cccccccc: L2-SP, source iterations 100; eeeeeeee: L2-SP, source iterations 200" in note
    assert "pre-trained model" not in tables.table_2(first).notes
    first, second = made(), made(("fisher",), "e" * 64)
    for each, images, step in zip(first + second, (9, 9, 9, 9), ("normalise", "normalise", "clip", "clip"), strict=True):
        each["fisher"] = {
            "images": images,
            "mode": "exact",
            "transforms": [{"name": step, "value": 2.0 if step == "clip" else None}],
        }
    labels = [row["label"] for row in labelled(summary(first + second))]
    assert sorted(labels) == ["L2-SP, Fisher transforms clip 2.0", "L2-SP, Fisher transforms normalise"]


def test_another_batch_size_that_trained_another_source_model_says_both():
    first, second = made(), made(("recipe", "batch_size"), 32)
    for each in second:
        each["settings"]["anchors"] = "e" * 64
    labels = {row["label"] for row in labelled(summary(first + second))}
    assert labels == {"L2-SP, batch size 64", "L2-SP, batch size 32"}
    assert "do not start from one pre-trained model" in tables.table_2(first + second).notes


def test_fig_2_says_what_a_label_does_not_share_across_targets():
    first = made()
    second = made(("target",), "digits/other")
    for each in second:
        each["settings"]["alpha"] = 5.0
    drawing = figures.figure_2(first + second)
    words = " ".join(text.get_text() for text in drawing.texts) + (drawing.get_supxlabel() or "")
    assert "alpha 5 on" in words.replace("\n", " ") and "alpha 0.1 on" in words.replace("\n", " ")
    assert not figures.figure_2(first).get_supxlabel()


def test_a_setting_that_is_idle_in_one_row_is_not_named_in_the_other():
    plain, adam, no_blur = made(), made(("recipe", "solver"), "adam"), made(("recipe", "blur"), "none")
    for each in adam:
        each["settings"]["recipe"].pop("momentum", None)  # both runs share the recipe
    for each in no_blur:
        each["settings"]["recipe"].pop("blur_kernel", None), each["settings"]["recipe"].pop("blur_sigma", None)
    assert [row["label"] for row in labelled(summary(plain + adam))] == ["L2-SP", "L2-SP, Adam"]
    assert {row["label"] for row in labelled(summary(plain + no_blur))} == {"L2-SP, blur gaussian", "L2-SP, blur none"}
    rooted = made(("penalty",), "gl_sp")
    for each in rooted:
        each["settings"]["recipe"]["smoothing"] = 1e-16
    assert [row["label"] for row in labelled(summary(plain + rooted))] == ["L2-SP", "GL-SP"]
    smooth = made(("penalty",), "gl_sp", accuracies=(0.1, 0.2))
    assert {row["label"] for row in labelled(summary(smooth + rooted))} == {"GL-SP", "GL-SP, smoothing 1e-16"}
