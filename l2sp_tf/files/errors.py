"""The exception that bad input raises."""


class InputError(ValueError):
    """Bad input. The message is one sentence: what was wrong, its name and value, and what to do.

    The entry points print it without a traceback and exit with status 2.
    """
