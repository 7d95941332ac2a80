"""The documentation: its code runs, its commands have flags that exist, and the site builds strictly."""

import contextlib
import copy
import importlib
import io
import json
import pathlib
import re
import shlex
import subprocess
import sys

import keras
import numpy as np
import pytest
from absl import flags

import l2sp_tf as l2sp
from l2sp_tf.cli.convert import main as convert
from l2sp_tf.models import zoo
from l2sp_tf.penalties.formulas import PENALTIES

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "results" not in path.parts)
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
WITH_COMMANDS = [*PAGES, ROOT / "docs/results/README.md", ROOT / "README.md"]
SCRIPTS = ("train.py", "eval.py", "prepare.py")
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.M | re.S)


def name_of(path):
    return str(path.relative_to(ROOT))


def run_blocks(path, namespace):
    """Runs the Python blocks of a page in order; an `output` block must be what the Python before it has printed."""
    text, printed, count = path.read_text(encoding="utf-8"), io.StringIO(), 0
    for block in FENCE.finditer(text):
        if block[1] == "python":
            count, printed = count + 1, io.StringIO()
            above = "\n" * text.count("\n", 0, block.start(2))  # so that a traceback has the line of the page
            with contextlib.redirect_stdout(printed):
                exec(compile(above + block[2], str(path), "exec"), namespace)  # noqa: S102
        elif block[1] == "output":
            expected, found = (re.sub(r" +$", "", part, flags=re.M).strip() for part in (block[2], printed.getvalue()))
            pattern = re.escape(expected).replace(r"\.\.\.", ".*")  # three dots stand for anything
            assert re.fullmatch(pattern, found, re.S), f"{name_of(path)} says\n{expected}\nbut this was printed:\n{found}"
    return count


@pytest.mark.parametrize("path", [path for path in PAGES if "```python" in path.read_text(encoding="utf-8")], ids=name_of)
def test_the_python_of_a_page_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(path, {})


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keras.applications, "ResNet50", lambda weights: _stand_in())
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(8, 32, 32, 3)).astype("float32"), rng.integers(120, size=8)
    assert run_blocks(ROOT / "README.md", {"images": images, "labels": labels})


def _stand_in():
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3, name="conv1_conv")(inputs))
    return keras.Model(inputs, keras.layers.Dense(10, "softmax", name="predictions")(x))


def test_an_output_that_is_not_printed_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page.write_text("```python\nprint('a b')\n```\n```output\na ... b\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md says"):
        run_blocks(page, {})
    page.write_text("```python\nprint('a and b')\n```\n\n```output\na ... b\n```\n")
    assert run_blocks(page, {}) == 1


def flags_of(script):
    """The flags of an entry point, none of them given."""
    return copy.deepcopy(importlib.import_module(f"l2sp_tf.cli.{pathlib.Path(script).stem}").FLAGS)


def commands_of(path, programs):
    """The commands of a text that start one of the programs, in its blocks and in its lines, as lists of words."""
    found = re.findall(rf"python ((?:{'|'.join(map(re.escape, programs))})\b[^`\n|&]*)", path.read_text(encoding="utf-8"))
    return [shlex.split(command) for command in found]


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_the_commands_of_a_text_have_flags_that_exist(path):
    for script, *arguments in commands_of(path, SCRIPTS):
        if "--help" in arguments:
            continue
        values = flags_of(script)
        positional = values([script, *arguments])[1:]
        assert not positional or script == "prepare.py", f"{script} takes no {positional}"
        if script == "train.py":
            assert {text.partition(":")[0] for text in values.penalty} <= set(PENALTIES)
            assert values.backbone in zoo.BACKBONES


def test_commands_are_found_and_a_wrong_flag_is_noticed():
    counts = {script: sum(len(commands_of(path, [script])) for path in WITH_COMMANDS) for script in SCRIPTS}
    assert all(counts.values()), counts
    with pytest.raises(flags.UnrecognizedFlagError):
        flags_of("train.py")(["train.py", "--penlaty=l2"])
    with pytest.raises(flags.IllegalFlagValueError):
        flags_of("eval.py")(["eval.py", "--table=7"])


@pytest.mark.parametrize("path", WITH_COMMANDS, ids=name_of)
def test_the_conversions_of_a_text_have_options_that_exist(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _, _, *arguments in commands_of(path, ["-m l2sp_tf.cli.convert"]):
        if "--help" not in arguments:
            assert convert(arguments) == 2  # the options are read before the file is missed
            assert "There is no" in capsys.readouterr().err


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_the_flags_that_a_page_names_exist(path):
    known = {"help", "logdir"} | {name for script in SCRIPTS for name in flags_of(script)}
    known |= {f"no{name}" for name in known}
    for folder in ("l2sp_tf", "benchmarks"):
        for module in (ROOT / folder).rglob("*.py"):
            known |= set(re.findall(r'add_argument\(\s*"--(\w+)"', module.read_text(encoding="utf-8")))
    named = set(re.findall(r"--([a-z]\w*)", re.sub(r"<!--|-->", "", path.read_text(encoding="utf-8"))))
    assert named <= known, sorted(named - known)


def cells_of(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_the_saved_outputs_of_a_notebook_are_small_and_contain_no_path_of_a_machine(path):
    text, cells = path.read_text(encoding="utf-8"), cells_of(path)
    assert json.loads(text)["nbformat"] == 4 and len(text) < 150_000
    assert not any(place in text for place in ("/home", "/tmp", "/work", "/root"))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output["output_type"], output.get("name")) for cell in cells for output in cell["outputs"]}
    assert kinds and kinds <= {("stream", "stdout"), ("display_data", None)}


SLOW = {"choosing_alpha.ipynb"}


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=[pytest.mark.slow] * (path.name in SLOW)) for path in NOTEBOOKS], ids=name_of
)
def test_the_code_of_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    namespace = {}
    for cell in cells_of(path):
        exec(compile("".join(cell["source"]), path.name, "exec"), namespace)  # noqa: S102


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason='the site is built where pip install -e ".[docs]" was run')
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert result.returncode == 0, result.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    reference = "".join(page.read_text() for page in (tmp_path / "site/reference").rglob("*.html"))
    for public in (getattr(l2sp, name) for name in l2sp.__all__):
        assert f'id="{public.__module__}.{public.__name__}"' in reference, public
    for page in pages:
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*?(?:src|href)=\"?(?:https?:)?//[^ >]*", page.read_text())
        assert not loaded, (page, loaded)
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet
