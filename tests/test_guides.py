"""The guides to delta files and retention reports run as written, and the table of models is what happens."""

import pathlib
import re

import pytest

from benchmarks import models

DOCS = pathlib.Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["delta", "retention"])
def test_the_python_of_a_guide_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{name}.md").read_text(), re.S)
    assert len(blocks) == 2
    namespace = {}
    for block in blocks:
        exec(compile(block, f"{name}.md", "exec"), namespace)  # noqa: S102
    assert list(tmp_path.iterdir())


def test_the_table_has_models_in_order():
    rows = list(models.rows_of_page())
    assert rows == [name for name in models.MODELS if name in rows] and set(models.CHEAPEST) <= set(rows)


@pytest.mark.parametrize(
    "name", [name if name in models.CHEAPEST else pytest.param(name, marks=pytest.mark.slow) for name in models.MODELS]
)
def test_a_row_of_the_table_is_what_happens(name):
    if name.startswith("KerasHub"):
        pytest.importorskip("keras_hub")
    rows = models.rows_of_page()
    if name not in rows:
        pytest.skip(f"{name} is not in docs/models.md yet")
    assert models.check(name) == rows[name]
