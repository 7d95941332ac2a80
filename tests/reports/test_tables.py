"""Checks tables against numbers computed by hand."""

import csv
import io

import numpy as np
import pytest
from test_records import record

import l2sp_tf as l2sp
from l2sp_tf.files.table import Table
from l2sp_tf.reports import tables
from l2sp_tf.reports.summary import summary

ACCURACIES = {"l2": (0.5, 0.7), "l2_sp": (0.8, 0.9)}
RECORDS = [record(p, s, a, source=(0.9, a)) for p, values in ACCURACIES.items() for s, a in enumerate(values)]


def runs(penalty, accuracies, right=False, selected=False, **settings):
    """Makes records of one setting, a run for each accuracy; `right` adds which of 200 images are right."""
    found = []
    for seed, accuracy in enumerate(accuracies):
        made = record(penalty, seed, accuracy, **settings)
        if right:
            made["results"]["right"] = np.packbits(np.arange(200) < round(200 * accuracy)).tobytes().hex()
        if selected:
            made["selection"] = {}
        found.append(made)
    return found


def test_the_summary_has_mean_and_sample_standard_deviation():
    l2, sp = summary(RECORDS)
    assert (l2["penalty"], l2["runs"], sp["penalty"]) == ("l2", 2, "l2_sp")
    assert l2["target_accuracy"] == pytest.approx((60, 200**0.5))
    assert sp["target_statistics"] == pytest.approx((85, 50**0.5))
    assert l2["before"] == 90


def test_the_overview_shows_gain_and_loss():
    lines = tables.overview(RECORDS).markdown().splitlines()
    assert "60.0 ± 14.1" in lines[2] and "| 30.0 |" in lines[2]
    assert "85.0 ± 7.1" in lines[3] and "| 5.0 " in lines[3]
    assert len({len(line) for line in lines[:4]}) == 1


def test_a_single_run_has_no_spread_and_no_source_no_drop():
    line = tables.overview([record("l1_sp", 0, 0.5)]).markdown().splitlines()[2]
    assert "L1-SP" in line and "±" not in line and line.count(" - ") == 4


def test_runs_of_other_settings_are_not_averaged():
    found = [record("l2", 0, 0.5, alpha=0.1), record("l2", 0, 0.6, alpha=0.2), record("l2", 0, 0.7, anchors="z")]
    assert [row["runs"] for row in summary([*found, record("l2", 0, 0.7, frozen=2)])] == [1, 1, 1, 1]


def test_csv_holds_the_same_numbers():
    rows = list(csv.DictReader(io.StringIO(tables.table_csv(RECORDS))))
    assert float(rows[1]["target_mean"]) == pytest.approx(85)
    assert float(rows[1]["source_source_statistics_sd"]) == pytest.approx(50**0.5)


def test_table_2_has_a_column_for_each_data_set_and_the_papers_numbers_beside_ours():
    dogs, own = {"target": "stanford_dogs"}, {"target": "own", "per_class": 30}
    found = runs("l2", [0.8, 0.82], **dogs) + runs("l2_sp", [0.85], **dogs) + runs("l2_sp", [0.5, 0.5], **own)
    table = tables.table_2(found)
    assert table.columns == ("penalty", "Stanford Dogs 120 (from s)", "own - 30 (from s)")
    assert table.rows[:2] == [("L2", "81.0 ± 1.4 (2)", "-"), ("L2-SP", "85.0 (1)", "50.0 ± 0.0 (2)")]
    assert ("L2-SP, paper", "85.1 ± 0.2", "-") in table.rows
    assert not any("paper" in row[0] for row in tables.table_2(runs("l2", [0.5], **own)).rows)


def test_caltech_is_named_by_its_images_a_class():
    for per_class, l2_paper in ((30, "83.5 ± 0.3"), (60, "88.2 ± 0.2")):
        table = tables.table_2(runs("l2", [0.8], target="caltech256", per_class=per_class))
        assert table.columns[1] == f"Caltech 256 - {per_class} (from s)"
        assert ("L2, paper", l2_paper) in table.rows


def test_a_setting_is_never_chosen_by_its_test_accuracy():
    grid = runs("l2_sp", [0.5], alpha=0.1) + runs("l2_sp", [0.9], alpha=1.0)
    assert [row[0] for row in tables.table_2(grid).rows] == ["L2-SP, alpha 0.1", "L2-SP, alpha 1"]
    selected = runs("l2_sp", [0.4, 0.6], selected=True, alpha=0.01)
    assert tables.table_2(grid + selected).rows == [("L2-SP", "50.0 ± 14.1 (2)")]


def test_frozen_runs_are_not_in_the_tables():
    found = runs("l2", [0.5]) + runs("l2", [0.9], frozen=3)
    assert tables.table_2(found).rows == [("L2", "50.0 (1)")]
    with pytest.raises(l2sp.InputError, match="frozen"):
        tables.table_2(runs("l2", [0.9], frozen=3))


def test_differences_are_tested_over_runs_and_over_images():
    found = runs("l2", [0.5, 0.52, 0.54, 0.56, 0.58], right=True) + runs("l2_sp", [0.7, 0.72, 0.74, 0.76, 0.78], right=True)
    ((target, source, better, worse, difference, p, criterion),) = tables.table_2_tests(found).rows
    assert (target, source, better, worse) == ("t", "s", "L2-SP", "L2")
    assert (difference, p) == ("20.0", "0.0079, 0.0079")
    # the worst L2-SP is right on 140 images, the best L2 on 116 of them: 24 to none
    assert criterion == f"yes (p = {2 * 0.5**24:.2g}, {2 * 0.5**24:.2g})"
    without = runs("l2", [0.5, 0.6]) + runs("l2_sp", [0.7, 0.8], target="other") + runs("gl_sp", [0.7])
    ((_, _, better, _, _, p, criterion),) = tables.table_2_tests(without).rows
    assert better.startswith("GL-SP") and (p, criterion) == ("-", "-")


def test_which_images_were_right_comes_back_from_a_record():
    (made,) = runs("l2", [0.35], right=True)
    assert tables.right(made).sum() == 70 and len(tables.right(made)) == 200
    assert tables.right(record()) is None


def test_table_3_has_both_readings_and_the_paper():
    found = [record("l2", s, 0.5, source=(0.9, a), target="stanford_dogs") for s, a in enumerate((0.6, 0.8))]
    found += [record("l2_sp", 0, 0.5, source=(0.9, 0.85), target="stanford_dogs"), record("gl_sp", 0, 0.5)]
    for made in found[:3]:
        made["results"]["source"]["source_statistics"] = {"accuracy": 0.3, "correct": 30, "total": 100}
    table = tables.table_3(found)
    assert table.columns[4:] == ("L2", "L2-SP")
    assert table.rows == [
        ("Stanford Dogs 120", "s", "fine-tuned statistics", "90.0", "20.0 ± 14.1", "5.0"),
        ("Stanford Dogs 120", "s", "source statistics", "90.0", "60.0 ± 0.0", "60.0"),
        ("Stanford Dogs 120", "-", "paper", "-", "14.1", "4.7"),
    ]
    with pytest.raises(l2sp.InputError, match="--source"):
        tables.table_3([record()])


def test_tables_are_written_as_markdown_and_csv(tmp_path):
    table = Table(("a", "long name"), [("1", "x, y")], "A note.")
    assert table.markdown() == "| a | long name |\n|---|-----------|\n| 1 | x, y      |\n\nA note."
    assert table.csv() == 'a,long name\n1,"x, y"\n'
    assert [path.name for path in table.save(tmp_path, "t")] == ["t.md", "t.csv"]
    assert (tmp_path / "t.csv").read_text() == table.csv()


def test_table_1_has_the_papers_numbers_beside_ours():
    full = {"name": "mit_indoors67", "classes": 67, "train": 5360, "train_per_class": (80, 80), "test": 1340}
    table = tables.table_1([full | {"test_per_class": (19, 21)}, {"name": "stanford_dogs", "missing": "it is not there"}])
    assert table.rows == [
        ("MIT Indoors 67", "scene classification", "67 (67)", "80 (80)", "19-21 (20)", "5,360", "1,340"),
        ("Stanford Dogs 120", "specific object recog.", "- (120)", "- (100)", "- (~ 72)", "-", "-"),
    ]
    assert table.notes == "Stanford Dogs 120: it is not there"
