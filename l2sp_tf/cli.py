"""How the entry points end: one sentence and a status for a user's mistake, never a traceback."""

import sys
import warnings

from absl import app, flags

from l2sp_tf.errors import InputError


def run_main(main):
    """Parses flags, runs `main`, and exits: 2 for bad input, 1 for a disk or a training that failed, 130 for Ctrl-C."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    app.run(lambda argv: sys.exit(status_of(main, argv)), flags_parser=_parse)


def _parse(argv):
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        print(f"error: {error} (--help lists the flags)", file=sys.stderr)
        sys.exit(2)


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
    except KeyboardInterrupt:
        print("stopped; finished runs are kept, and the same command goes on after them", file=sys.stderr)
        return 130
    return 0
