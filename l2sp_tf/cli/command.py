"""How the entry points begin and end: flags, files of flags, help, and one sentence and a status for a user's mistake."""

import pathlib
import re
import shutil
import signal
import sys
import textwrap
import tomllib
import warnings

from absl import app, flags

from l2sp_tf.files import fields
from l2sp_tf.files.errors import InputError

HELP = ("--help", "-help", "-h", "--helpshort", "-helpshort")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a command as Ctrl-C does."""


def run_main(main, groups=None, others=None):
    """Parses flags, runs `main`, and exits: 2 for bad input, 1 for a disk or a training that failed, 130 or 143 if stopped.

    Args:
        main: a function of the arguments that are no flags.
        groups: a dict from a heading to the names of its flags, for --help; by default help is absl's.
        others: a dict from names that people try to the flags that they mean.
    """
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    app.run(lambda argv: sys.exit(status_of(main, argv)), flags_parser=lambda argv: _parse(argv, groups, others or {}))


def _terminate(number, frame):
    raise Terminated


def _parse(argv, groups, others):
    if groups is not None and any(word in HELP for word in argv[1:]):
        print(help_text(sys.modules["__main__"].__doc__, flags.FLAGS, groups))
        sys.exit(0)
    try:
        return parse(argv, flags.FLAGS, groups, others)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def parse(argv, values, groups=None, others=None):
    """Parses the flags of a command, and of the file that --config names, and returns the arguments that are no flags.

    Args:
        argv: the command's words.
        values: a `flags.FlagValues`, which is changed.
        groups, others: as in `run_main`.

    Raises:
        InputError: a flag is unknown, with the nearest one, or its value is none that it takes.
    """
    own = [name for names in (groups or {}).values() for name in names] or list(values)
    try:
        rest = values(argv)
    except flags.UnrecognizedFlagError as error:
        raise InputError(f"There is no flag --{error.flagname}{_instead(error.flagname, own, others)}") from None
    except flags.Error as error:
        raise InputError(f"{error} (--help lists the flags)") from None
    if "config" in own and values["config"].value is not None:
        read_config(values["config"].value, values, own, others)
    return rest


def _instead(name, own, others):
    meant = (others or {}).get(name) or fields.nearest(name, own)
    return f": did you mean --{meant}? (--help lists the flags)" if meant else " (--help lists the flags)."


def read_config(path, values, own, others=None):
    """Gives flags the values of a TOML file, except those that the command line gave.

    Args:
        path: the file: lines `name = value`, with the names of flags.
        values: a parsed `flags.FlagValues`, which is changed.
        own: the flags that may stand there.
        others: as in `run_main`.

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
        if name not in own or name == "config":
            raise InputError(f"{path} has {name}, but there is no flag --{name}{_instead(name, own, others)}")
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


def help_text(title, values, groups):
    """What --help prints: the flags under the headings of `groups`, each with its default and choices."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = [title.strip()]
    for heading, names in groups.items():
        lines += ["", f"{heading}:"]
        for name in names:
            flag = values[name]
            lines.append(f"  --{f'[no]{name}' if flag.boolean else name}{_example(flag)}")
            text = re.sub(r"^<[^>]*>: ", "", flag.help)  # absl repeats the choices there
            lines += textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _example(flag):
    """The choices of a flag, or its default."""
    if choices := getattr(flag.parser, "enum_values", None):
        return "=" + "|".join(choices) + (f" (default {flag.default})" if flag.default is not None else "")
    if flag.boolean:
        return f" (default {'yes' if flag.default else 'no'})" if flag.default is not None else ""
    default = ",".join(map(str, flag.default)) if isinstance(flag.default, list) else flag.default
    return "=..." if default in (None, "") else f"={default}"


def status_of(main, argv):
    """Runs `main(argv)` and returns the exit status, having printed the sentence of an error."""
    try:
        main(argv)
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
