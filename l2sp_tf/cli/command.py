"""How the entry points begin and end: flags, files of flags, help, and one sentence and a status for a user's mistake."""

import contextlib
import copy
import faulthandler
import functools
import os
import pathlib
import re
import shutil
import signal
import sys
import textwrap
import tomllib
import warnings

from absl import flags

from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError

HELP = ("--help", "-help", "-h", "--helpshort", "-helpshort")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a command as Ctrl-C does."""


class Section:
    """Flags under one heading of --help: `section.list(name, default, help)` defines one as absl's `DEFINE_list` does."""

    def __init__(self, values, heading):
        self._place = {"flag_values": values, "module_name": heading}

    def __getattr__(self, kind):
        return functools.partial(getattr(flags, f"DEFINE_{kind}"), **self._place)


def run(body, definitions, argv=None, *, title, others=None):
    """Parses flags, calls `body` and returns the exit status: 2 for bad input, and so on as in `status_of`.

    Args:
        body: a function of the parsed flags and of a list of the words that are no flags.
        definitions: a `flags.FlagValues`, which stays as it is.
        argv: the words behind the command's name; by default those of this process.
        title: what --help prints above the flags.
        others: a dict from names that people try to the flags that they mean.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow reads it when it is imported
    words = sys.argv[1:] if argv is None else list(argv)
    if any(word in HELP for word in words):
        print(help_text(title, definitions))
        return 0
    with _set_up():
        return status_of(lambda: body(*parse(words, definitions, others)))


@contextlib.contextmanager
def _set_up():
    """Prints each warning in one line, lets SIGTERM stop the command as Ctrl-C does, and a crash print where it happened."""
    if not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)
    before = signal.getsignal(signal.SIGTERM)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        if before == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _terminate)
        try:
            yield
        finally:
            if before == signal.SIG_DFL:
                signal.signal(signal.SIGTERM, before)


def _terminate(number, frame):
    raise Terminated


def parse(words, definitions, others=None):
    """Parses the flags of a command, and of the file that --config names.

    Args:
        words, definitions, others: as in `run`.

    Returns:
        A pair: a `flags.FlagValues` with the values, and a list of the words that are no flags.

    Raises:
        InputError: a flag is unknown, with the nearest one, or its value is none that it takes.
    """
    values = copy.deepcopy(definitions)
    try:
        _, *rest = values(["command", *words])
    except flags.UnrecognizedFlagError as error:
        raise InputError(f"There is no flag --{error.flagname}{_instead(error.flagname, values, others)}") from None
    except flags.Error as error:
        raise InputError(f"{error} (--help lists the flags)") from None
    if "config" in values and values.config is not None:
        read_config(values.config, values, others)
    return values, rest


def _instead(name, values, others):
    meant = (others or {}).get(name) or fields.nearest(name, values)
    return f": did you mean --{meant}? (--help lists the flags)" if meant else " (--help lists the flags)."


def read_config(path, values, others=None):
    """Gives flags the values of a TOML file, except those that the command line gave.

    Args:
        path: the file: lines `name = value`, with the names of flags.
        values: a parsed `flags.FlagValues`, which is changed.
        others: as in `run`.

    Raises:
        InputError: there is no such file, it is no TOML, or has a name or a value that no flag has.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}: give --config a TOML file, such as the config.toml of a run.")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # of TOML and of UTF-8
        raise InputError(f"{path} is no TOML file ({error}): write lines such as alpha = [0.1, 1.0].") from error
    for name, value in found.items():
        if name not in values or name == "config":
            raise InputError(f"{path} has {name}, but there is no flag --{name}{_instead(name, values, others)}")
        if not values[name].present:
            _take(values[name], value, f"{path} has {name} = {value!r}")


def _take(flag, value, what):
    """Gives a flag a value of a TOML file."""
    is_list = isinstance(flag.parser, flags.ListParser)
    items = value if isinstance(value, list) else [value]
    if any(not isinstance(item, (str, int, float)) for item in items) or (isinstance(value, list) and not is_list):
        raise InputError(f"{what}: give {'a list of texts or numbers' if is_list else 'one text or number'}.")
    if flag.boolean and not isinstance(value, bool):
        raise InputError(f"{what}: give true or false.")
    try:
        flag.parse([str(item) for item in items] if isinstance(value, list) else value if flag.boolean else str(value))
    except flags.Error as error:
        raise InputError(f"{what}: {str(error).partition(': ')[2] or error}") from None


def help_text(title, values):
    """What --help prints: the flags under their headings, each with its default and choices."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = [title.strip()]
    for heading, found in values.flags_by_module_dict().items():
        lines += ["", f"{heading}:"]
        for flag in found:
            lines.append(f"  --{f'[no]{flag.name}' if flag.boolean else flag.name}{_example(flag)}")
            text = re.sub(r"^<[^>]*>: ", "", flag.help)  # absl repeats the choices there
            text = re.sub(r";\s+repeat this option to specify.*", " Repeat the flag for several.", text)
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _example(flag):
    """The choices of a flag, or its default."""
    if choices := getattr(flag.parser, "enum_values", None):
        return "=" + "|".join(choices) + (f" (default {flag.default})" if flag.default else "")
    if flag.boolean:
        return f" (default {'yes' if flag.default else 'no'})" if flag.default is not None else ""
    default = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
    return "=..." if default in (None, "") else f"={default}"


def status_of(call):
    """Calls a function, prints the sentence of its error, and returns the exit status: 0 if there was none.

    2 is for bad input, 1 for a disk or a training that failed, 130 and 143 for a command that was stopped.
    """
    try:
        call()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("stopped; finished runs are kept, and the same command goes on after them", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    return 0
