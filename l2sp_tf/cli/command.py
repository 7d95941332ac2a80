"""Parses flags and --config files, prints --help and returns exit statuses, for all commands.

A user's mistake becomes one sentence on the error stream, without a traceback.
"""

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
    """Raised on SIGTERM, which stops a command as Ctrl-C does."""


class Section:
    """Defines flags under one heading of --help: `section.list(name, default, help)` calls absl's `DEFINE_list`."""

    def __init__(self, values, heading):
        self._place = {"flag_values": values, "module_name": heading}

    def __getattr__(self, kind):
        return functools.partial(getattr(flags, f"DEFINE_{kind}"), **self._place)


def run(body, definitions, argv=None, *, title, others=None):
    """Parses flags, calls `body` with them, and returns the exit status, as `status_of` does.

    Args:
        body: called with the parsed flags and the list of other words.
        definitions: a `flags.FlagValues`; parsing works on a copy.
        argv: the words after the command's name; by default those of this process.
        title: what --help prints above the flags.
        others: a dict from flag names of other programs to the flags that mean the same here.
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
    """Prints each warning as one line, stops on SIGTERM as on Ctrl-C, and prints a traceback if the process crashes."""
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
    """Parses the flags of a command, and those in the file that --config names.

    Args:
        words, definitions, others: as in `run`.

    Returns:
        A `flags.FlagValues` with the values, and the list of other words.

    Raises:
        InputError: a flag is unknown (the message suggests the nearest one), or a value is invalid.
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
    """Returns the end of a message about an unknown flag, with the flag that it probably means."""
    meant = (others or {}).get(name) or fields.nearest(name, values)
    return f": did you mean --{meant}? (--help lists the flags)" if meant else " (--help lists the flags)."


def read_config(path, values, others=None):
    """Sets flags from a TOML file, except those that the command line set.

    Args:
        path: the file, with lines `flag = value`.
        values: a parsed `flags.FlagValues`, changed in place.
        others: as in `run`.

    Raises:
        InputError: the file is missing or not TOML, or one of its flags is unknown or has an invalid value.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"There is no file {path}: give --config a TOML file, such as the config.toml of a run.")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # ValueError: bad TOML or bad UTF-8
        raise InputError(f"{path} is not a TOML file ({error}): write lines such as alpha = [0.1, 1.0].") from error
    for name, value in found.items():
        if name not in values or name == "config":
            raise InputError(f"{path} has {name}, but there is no flag --{name}{_instead(name, values, others)}")
        if not values[name].present:
            _take(values[name], value, f"{path} has {name} = {value!r}")


def _take(flag, value, what):
    """Sets a flag to a value of a TOML file."""
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
    """Returns what --help prints: the flags under their headings, each with its default and choices."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = [title.strip()]
    for heading, found in values.flags_by_module_dict().items():
        lines += ["", f"{heading}:"]
        for flag in found:
            lines.append(f"  --{f'[no]{flag.name}' if flag.boolean else flag.name}{_example(flag)}")
            text = re.sub(r"^<[^>]*>: ", "", flag.help)  # absl adds the choices, which the line above shows
            text = re.sub(r";\s+repeat this option to specify.*", " Repeat the flag for several.", text)
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _example(flag):
    """Returns what --help prints after a flag's name: its choices, its default or both."""
    if choices := getattr(flag.parser, "enum_values", None):
        return "=" + "|".join(choices) + (f" (default {flag.default})" if flag.default else "")
    if flag.boolean:
        return f" (default {'yes' if flag.default else 'no'})" if flag.default is not None else ""
    default = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
    return "=..." if default in (None, "") else f"={default}"


def status_of(call):
    """Calls a function, prints its error in one sentence, and returns the exit status.

    0: it succeeded. 2: the input is bad. 1: the disk or the training failed. 130 or 143: Ctrl-C or SIGTERM stopped it.
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
        print("stopped; finished runs are kept: run the same command again to continue", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    return 0
