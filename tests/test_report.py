"""Tables and figures against numbers worked out by hand."""

import csv
import io

import pytest
from test_records import record

from l2sp_tf import report

ACCURACIES = {"l2": (0.5, 0.7), "l2_sp": (0.8, 0.9)}
RECORDS = [record(p, s, a, source=(0.9, a)) for p, values in ACCURACIES.items() for s, a in enumerate(values)]


def test_the_summary_has_mean_and_sample_standard_deviation():
    l2, sp = report.summary(RECORDS)
    assert (l2["penalty"], l2["runs"], sp["penalty"]) == ("l2", 2, "l2_sp")
    assert l2["target_accuracy"] == pytest.approx((60, 200**0.5))
    assert sp["target_statistics"] == pytest.approx((85, 50**0.5))
    assert l2["before"] == 90


def test_the_table_shows_gain_and_loss():
    lines = report.table(RECORDS).splitlines()
    assert "60.0 ± 14.1" in lines[2] and "-30.0" in lines[2]
    assert "85.0 ± 7.1" in lines[3] and "-5.0" in lines[3]
    assert len({len(line) for line in lines[:4]}) == 1


def test_a_single_run_has_no_spread_and_no_source_no_drop():
    line = report.table([record("l1_sp", 0, 0.5)]).splitlines()[2]
    assert "L1-SP" in line and "±" not in line and line.count(" - ") == 3


def test_runs_of_other_settings_are_not_averaged():
    rows = report.summary([record("l2", 0, 0.5, alpha=0.1), record("l2", 0, 0.6, alpha=0.2), record("l2", 0, 0.7, anchors="z")])
    assert [row["runs"] for row in rows] == [1, 1, 1]


def test_csv_holds_the_same_numbers():
    rows = list(csv.DictReader(io.StringIO(report.table_csv(RECORDS))))
    assert float(rows[1]["target_mean"]) == pytest.approx(85)
    assert float(rows[1]["source_source_statistics_sd"]) == pytest.approx(50**0.5)


def test_files_are_written(tmp_path):
    paths = report.write_summary(RECORDS, tmp_path)
    assert [path.name for path in paths] == ["summary.md", "summary.csv", "summary.png"]
    assert paths[2].read_bytes().startswith(b"\x89PNG") and paths[2].stat().st_size > 5000
    assert len(list(tmp_path.iterdir())) == 3
