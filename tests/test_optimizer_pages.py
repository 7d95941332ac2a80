"""The Python of the pages on proximal steps and on the decoupled pull, block after block."""

import pathlib
import re

import pytest

DOCS = pathlib.Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["proximal.md", "decoupled.md"])
def test_the_python_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks, names = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S), {}
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, page, "exec"), names)  # noqa: S102
