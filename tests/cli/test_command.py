"""Flags and files of flags: an unknown name suggests the nearest one, and each mistake gives one sentence."""

import os
import signal
import warnings

import pytest
from absl import flags

import l2sp_tf as l2sp
from l2sp_tf.cli import command, train


def parse(*words):
    return command.parse(words, train.FLAGS, train.OTHER_NAMES)


@pytest.mark.parametrize(
    ("flag", "right"),
    [("epochs", "iterations"), ("lr", "learning_rate"), ("log_dir", "workdir"), ("penlaty", "penalty"), ("crp", "crop")],
)
def test_a_wrong_flag_suggests_the_nearest_one(flag, right, tmp_path):
    with pytest.raises(l2sp.InputError, match=rf"There is no flag --{flag}: did you mean --{right}\?"):
        parse(f"--{flag}=3")
    (tmp_path / "c.toml").write_text(f"{flag} = 3\n")
    with pytest.raises(l2sp.InputError, match=rf"c.toml has {flag}, but there is no flag --{flag}: did you mean --{right}\?"):
        parse(f"--config={tmp_path / 'c.toml'}")


def test_a_flag_that_resembles_none_is_refused_without_advice():
    with pytest.raises(l2sp.InputError, match=r"There is no flag --zzzz \(--help lists the flags\)"):
        parse("--zzzz")


@pytest.mark.parametrize("argument", ["--iterations=x", "--solver=sgdw", "--run_cpus=-1", "--mirror=perhaps", "--folds=-1"])
def test_values_that_a_flag_does_not_take_are_refused(argument):
    with pytest.raises(l2sp.InputError, match=argument.partition("=")[0]):
        parse(argument)


def test_a_file_gives_flags_their_values_and_the_command_line_wins(tmp_path):
    (tmp_path / "c.toml").write_text(
        "iterations = 12\nalpha = [0.1, 1]\nmirror = false\nsolver = 'adam'\ntarget = ['a,b', 'c']\nmomentum = 0.5\n"
        "penalty = 'l2,l2_sp:0.1'\nmean = [1, 2.5, 3]\n"
    )
    values, _ = parse(f"--config={tmp_path / 'c.toml'}", "--iterations=7", "--solver=sgd")
    assert (values.iterations, values.solver, values.mirror, values.momentum) == (7, "sgd", False, 0.5)
    assert values.alpha == ["0.1", "1"] and values.target == ["a,b", "c"] and values.penalty == ["l2", "l2_sp:0.1"]
    assert values.mean == ["1", "2.5", "3"] and values["iterations"].present and values["alpha"].present
    assert not values["beta"].present


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iterations = ", "is not a TOML file"),
        ("iterations = 1\niterations = 2", "is not a TOML file"),
        ("\udcff", "is not a TOML file"),
        ("a = " + "[" * 5000, "is not a TOML file"),
        ("iterations = 'many'", "has iterations = 'many'"),
        ("iterations = true", "has iterations = True"),
        ("iterations = [3]", "give one text or number"),
        ("iterations = 2.5", "has iterations = 2.5"),
        ("mirror = 'yes'", "give true or false"),
        ("mirror = 1", "give true or false"),
        ("solver = 'sgdw'", "has solver = 'sgdw'"),
        ("alpha = [[0.1]]", "give a list of texts or numbers"),
        ("alpha = 2020-01-01", "give a list of texts or numbers"),
        ("[recipe]\niterations = 3", "has recipe, but there is no flag --recipe"),
        ("config = 'd.toml'", "has config"),
    ],
)
def test_wrong_files_of_flags_are_refused(tmp_path, text, message):
    (tmp_path / "c.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(l2sp.InputError, match=message) as found:
        parse(f"--config={tmp_path / 'c.toml'}")
    assert "\n" not in str(found.value)


def test_a_missing_file_of_flags_is_named(tmp_path):
    with pytest.raises(l2sp.InputError, match="There is no file"):
        parse(f"--config={tmp_path / 'c.toml'}")
    with pytest.raises(l2sp.InputError, match="There is no file"):
        parse(f"--config={tmp_path}")


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (l2sp.InputError("x is 1"), 2, "error: x is 1"),
        (OSError("full"), 1, "error: full"),
        (FloatingPointError("nan"), 1, "error: nan"),
        (KeyboardInterrupt(), 130, "the same command again"),
        (command.Terminated(), 143, "the same command again"),
        (None, 0, ""),
    ],
)
def test_how_a_command_ends(error, status, word, capsys):
    def call():
        if error is not None:
            raise error

    assert command.status_of(call) == status
    assert word in capsys.readouterr().err


def test_sigterm_stops_a_command_as_ctrl_c_does(capsys):
    def body(values, arguments):
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM), warnings.showwarning
    assert command.run(body, flags.FlagValues(), [], title="") == 143
    assert "the same command again" in capsys.readouterr().err
    assert (signal.getsignal(signal.SIGTERM), warnings.showwarning) == before
    assert issubclass(command.Terminated, KeyboardInterrupt)


def test_a_command_gets_its_flags_and_other_words_and_its_definitions_stay(capsys):
    definitions, found = flags.FlagValues(), []
    section = command.Section(definitions, "Numbers")
    section.integer("count", 1, "How many.")
    section.multi_enum("kind", [], ["a", "b"], "Which ones.")

    def body(values, arguments):
        warnings.warn("it is late", stacklevel=1)
        found.append((values.count, values.kind, arguments))

    for words in (["--count=3", "x", "--kind=a", "--kind=b", "y"], []):
        assert command.run(body, definitions, words, title="Counts.") == 0
        assert capsys.readouterr().err == "warning: it is late\n"
    assert found == [(3, ["a", "b"], ["x", "y"]), (1, [], [])]
    assert command.run(body, definitions, ["--help"], title="Counts.") == 0
    lines = ["Counts.", "", "Numbers:", "  --count=1", "      How many.", "  --kind=a|b"]
    assert capsys.readouterr().out.splitlines() == [*lines, "      Which ones. Repeat the flag for several."]
    assert command.run(body, definitions, ["--coutn=3"], title="") == 2 and len(found) == 2
    assert capsys.readouterr().err.startswith("error: There is no flag --coutn: did you mean --count?")
