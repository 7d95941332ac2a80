"""What holds for the whole project: the floors of the house, and every row of the README's tables."""

import ast
import importlib.util
import inspect
import os
import pathlib
import re
import subprocess
import sys

import keras
import numpy as np
import pytest

import l2sp_tf as l2sp
from l2sp_tf.penalties.formulas import PENALTIES

ROOT = pathlib.Path(__file__).parents[1]
FLOORS = [
    {"files", "theory"},
    {"penalties", "models"},
    {"optimizers", "fisher", "data"},
    {"training", "evaluation"},
    {"experiments"},
    {"reports"},
    {"cli"},
]
# what models may use of penalties: the weights of a model, whatever is done with them
WEIGHTS = {"penalties.weights", "penalties.assignment", "penalties.matching"}


def rooms():
    """The modules of the package by name, as in "models.zoo"."""
    package = ROOT / "l2sp_tf"
    for path in sorted(package.rglob("*.py")):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(package).with_suffix("").parts), path


ROOMS = dict(rooms())


def imported(room):
    """The rooms that a room imports, anywhere in it; a wing's `__init__` counts as the rooms that its names come from."""
    names = []
    for node in ast.walk(ast.parse(ROOMS[room].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "l2sp_tf":
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("l2sp_tf.")]
    for name in names:
        parts = name.split(".")[1:]
        found = [".".join(parts[:n]) for n in (1, 2) if ".".join(parts[:n]) in ROOMS]
        assert found, f"{room} imports {name}, which is not a room: import it from its own room"
        yield found[0]


def floor_of(room):
    return next((number for number, wings in enumerate(FLOORS) if room.split(".")[0] in wings), None)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down_only(room):
    assert floor_of(room) is not None, f"{room} stands in no wing"
    for other in set(imported(room)):
        if other.split(".")[0] != room.split(".")[0]:
            allowed = (room == "theory" and other.startswith("files.")) or (room.startswith("models.") and other in WEIGHTS)
            assert allowed or floor_of(other) < floor_of(room), f"{room} imports {other}"


def test_no_room_imports_itself_through_others():
    waiting, done = {room: set(imported(room)) for room in ROOMS}, set()
    while ready := {room for room, others in waiting.items() if others <= done}:
        done |= ready
        waiting = {room: others for room, others in waiting.items() if room not in ready}
    assert not waiting, f"a circle among {sorted(waiting)}"


MOST_PARAMETERS, MOST_LINES = 6, 45  # besides keyword-only ones; without the docstring


@pytest.mark.parametrize("room", ROOMS)
def test_functions_fit_on_a_screen(room):
    for node in ast.walk(ast.parse(ROOMS[room].read_text())):
        if isinstance(node, ast.FunctionDef):
            names = [argument.arg for argument in node.args.posonlyargs + node.args.args]
            assert len([name for name in names if name not in ("self", "cls")]) <= MOST_PARAMETERS, f"{room}.{node.name}"
            first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
            assert node.end_lineno - first.lineno < MOST_LINES, f"{room}.{node.name}"


@pytest.mark.parametrize("room", ROOMS)
def test_the_library_reads_no_flags_and_asserts_nothing(room):
    text = ROOMS[room].read_text()
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(text)))
    assert room.startswith("cli.") or "absl" not in text


def test_public_names_have_docstrings_and_are_all_listed():
    for name in l2sp.__all__:
        assert inspect.getdoc(getattr(l2sp, name)), name
    equations = {"l2": 1, "l2_sp": 2, "l2_sp_fisher": 4, "l1_sp": 5, "gl_sp": 6, "gl_sp_fisher": 7}
    assert set(equations) == set(PENALTIES)
    for symbol, number in equations.items():
        assert PENALTIES[symbol].__doc__.startswith(f"Eq. ({number})")


def public_functions():
    """The functions and methods behind the public names that this package defines itself, by name."""
    for name in l2sp.__all__:
        found = getattr(l2sp, name)
        members = {name: found}
        if inspect.isclass(found):
            members = {f"{name}.{key}": value for key, value in vars(found).items() if not key.startswith("_")}
        for key, value in members.items():
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(value) and value.__module__.startswith("l2sp_tf."):
                yield key, value


@pytest.mark.parametrize(("name", "function"), list(public_functions()), ids=[name for name, _ in public_functions()])
def test_the_signatures_of_public_names_have_types(name, function):
    signature = inspect.signature(function)
    bare = [key for key, parameter in signature.parameters.items() if parameter.annotation is inspect.Parameter.empty]
    assert [key for key in bare if key not in ("self", "cls")] == []
    assert signature.return_annotation is not inspect.Signature.empty


def test_the_types_hold():
    options = {"capture_output": True, "text": True, "cwd": ROOT}
    result = subprocess.run([sys.executable, "-m", "mypy"], **options)
    assert result.returncode == 0, result.stdout


def test_rooms_that_attach_penalties_do_not_import_tensorflow():
    rooms = "penalties.formulas penalties.anchors penalties.attachment models.zoo models.heads models.units"
    found, waiting = set(), f"{rooms} optimizers.proximal optimizers.decoupled".split()
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += imported(name)
            top = ast.parse(ROOMS[name].read_text()).body
            names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
            names += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
            assert not [n for n in names if n.startswith("tensorflow")], name


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_the_penalties_work_on_another_backend_without_tensorflow(backend):
    if not importlib.util.find_spec(backend):  # and not imported here, where TensorFlow is
        pytest.skip(f"{backend} is not installed")
    code = (
        "import sys, numpy as np, l2sp_tf as l2sp; w = np.ones((2, 3), 'float32'); w0 = 0 * w\n"
        "penalties = l2sp.L2(2.0), l2sp.L2SP(2.0, w0), l2sp.L2SPFisher(2.0, w0, 4 * w), l2sp.L1SP(2.0, w0)\n"
        "penalties += l2sp.GroupLassoSP(2.0, w0), l2sp.GroupLassoSPFisher(2.0, w0, 4 * w)\n"
        "l2sp.attach, l2sp.Anchors, l2sp.with_new_head\n"
        "print([round(float(p(w)), 3) for p in penalties], 'tensorflow' in sys.modules)"
    )
    options = {"capture_output": True, "text": True, "cwd": ROOT, "env": {**os.environ, "KERAS_BACKEND": backend}}
    result = subprocess.run([sys.executable, "-c", code], **options)
    # 6 weights of distance 1; 3 groups of 2
    assert result.stdout == "[6.0, 6.0, 24.0, 12.0, 12.0, 24.0] False\n", result.stderr


def test_the_package_itself_is_imported_at_once():
    code = "import sys, l2sp_tf; print(sorted({'keras', 'tensorflow', 'numpy'} & set(sys.modules)), 'finetune' in dir(l2sp_tf))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "[] True\n"


IMPORTS = ["import l2sp_tf, keras", "import keras, l2sp_tf", "from l2sp_tf import attach; import keras"]
IMPORTS += [
    "import l2sp_tf.penalties.attachment, keras",
    "import l2sp_tf.optimizers.stepping, keras",
    "import l2sp_tf, tensorflow, keras",
]


@pytest.mark.parametrize(
    "number", [n if n < 2 else pytest.param(n, marks=pytest.mark.slow) for n in range(len(IMPORTS))], ids=IMPORTS.__getitem__
)
def test_a_saved_model_loads_after_the_import_alone(number, tmp_path):
    """In fresh processes, whatever is imported first; and without the import Keras says that it does not know the class."""
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, name="a")])
    anchors = l2sp.Anchors.of(model)
    for symbol, cls in PENALTIES.items():
        l2sp.attach(model, cls(0.1), anchors, fisher={key: np.ones_like(a) for key, a in anchors.items()})
        model.compile(l2sp.Proximal.of("sgd", model), "mse")
        model.save(tmp_path / f"{symbol}.keras")
    l2sp.attach(model, l2sp.L2SP(0.1), anchors)
    model.compile(l2sp.Decoupled.of("sgd", model), "mse")
    model.save(tmp_path / "decoupled.keras")
    code = "import pathlib; print(len([keras.models.load_model(p) for p in pathlib.Path('.').glob('*.keras')]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    code = code if number == 0 else code.replace("*.keras", "*sp.keras")  # without the optimizers: all are tried once
    command = [sys.executable, "-c", f"{IMPORTS[number]}; {code}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.stdout == ("7\n" if number == 0 else "3\n"), result.stderr[-500:]


@pytest.mark.parametrize("precision", ["float32", "mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("symbol", list(PENALTIES))
def test_every_penalty_trains_under_every_policy(symbol, precision):
    keras.config.set_dtype_policy(precision)
    try:
        train_two_epochs(symbol)
    finally:
        keras.config.set_dtype_policy("float32")


def train_two_epochs(symbol):
    """Trains a small model under a penalty, from anchors moved off its weights, and returns its weights."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(2, dtype="float32", name="b")]
    )
    anchors = l2sp.Anchors({key: a + np.float32(0.1) for key, a in l2sp.Anchors.of(model).items()})
    fisher = {key: np.ones(a.shape, "float32") for key, a in anchors.items()} if "fisher" in symbol else None
    coverage = l2sp.attach(model, PENALTIES[symbol](0.1), anchors, fisher=fisher, params="all")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = np.random.default_rng(0).normal(size=(8, 4)), np.arange(8) % 2
    history = model.fit(x, y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[l2sp.AnchorGuard(coverage)])
    assert np.all(np.isfinite(history.history["loss"]))
    return l2sp.Anchors.of(model)


def readme_rows():
    text = (ROOT / "README.md").read_text()
    section = text.split("## Where each equation is")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][2:]
    return [[cell.strip() for cell in row] for row in rows]


def test_every_row_of_the_equation_table_resolves():
    rows = readme_rows()
    assert len(rows) >= 7
    for equation, symbol, test in rows:
        module, _, name = symbol.strip("`").rpartition(".")
        found = __import__(module, fromlist=[name])
        assert hasattr(found, name), symbol
        path, _, function = test.strip("`").partition("::")
        assert f"def {function}(" in (ROOT / path).read_text(), test
        assert equation


def test_the_readme_and_ci_give_the_same_test_command():
    commands = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    test_command = next(line for block in commands for line in block.splitlines() if "pytest" in line)
    assert test_command in (ROOT / ".ci/run").read_text()
