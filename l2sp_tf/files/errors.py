"""The one exception that bad input raises."""


class InputError(ValueError):
    """Bad input, told in one sentence: what was wrong, its name and value, and what to do.

    The entry points print its message and exit with status 2, without a traceback.
    """
