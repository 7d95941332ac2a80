"""Redraws the published tables from the published records."""

import pathlib

import pytest

from l2sp_tf.experiments import records
from l2sp_tf.reports import figures

ROOT = pathlib.Path(__file__).parents[2]
PUBLISHED = sorted(path.name for path in (ROOT / "results").iterdir() if path.is_dir())


def test_there_are_results():
    assert PUBLISHED


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_table_is_redrawn_from_the_records(name, tmp_path):
    figures.write_all(records.read_records(ROOT / "results" / name), tmp_path, say=lambda text: None)
    published = ROOT / "docs" / "results" / name
    drawn = {path.name for path in tmp_path.iterdir() if path.suffix in (".md", ".csv", ".png")}
    assert drawn == {path.name for path in published.iterdir()}
    for path in tmp_path.glob("*.md"):
        assert path.read_text() == (published / path.name).read_text(), path.name
    for path in tmp_path.glob("*.csv"):
        assert path.read_text() == (published / path.name).read_text(), path.name


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_records_contain_no_path_of_a_machine(name):
    for path in (ROOT / "results" / name).glob("runs/*/run.json"):
        text = path.read_text()
        assert not any(place in text for place in ('"/', "/home", "/tmp", "/work", "/root")), path
