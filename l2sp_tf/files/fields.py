"""Checks of settings: each raises one sentence with the setting's name, its value and what to give instead."""

import difflib
import math
import numbers
import re

from l2sp_tf.files.errors import InputError


def whole(name, value, least=1):
    """Returns a whole number of at least `least` as an int.

    Raises:
        InputError: the value is something else, such as True or False.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}: give a whole number of at least {least}.")
    if value < least:
        raise InputError(f"{name} is {value}: give a whole number of at least {least}.")
    return int(value)


def number(name, value, least=0.0, below=math.inf, above=None):
    """Returns a finite number as a float: at least `least` (or above `above`), and below `below`.

    Raises:
        InputError: the value is something else, such as True, False or NaN.
    """
    asked = "" if least == -math.inf else f" from {least:g}" if above is None else f" above {above:g}"
    asked += "" if below == math.inf else f" to below {below:g}"
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or value >= below or (value < least if above is None else value <= above):
        raise InputError(f"{name} is {value!r}: give a finite number{asked}.")
    return float(value)  # so that 1 and NumPy's 1.0 are written alike in a record


def each_number(name, values, least=0.0, above=None):
    """Returns a number, a sequence or an array as a tuple of finite floats without repeats; raises as `number` does."""
    if isinstance(values, (str, dict)) or not (isinstance(values, numbers.Real) or hasattr(values, "__iter__")):
        raise InputError(f"{name} is {values!r}: give numbers, as in (0.1, 1.0).")
    found = (values,) if isinstance(values, numbers.Real) else values
    return tuple(dict.fromkeys(number(name, value, least, above=above) for value in found))


def is_symbol(text):
    """Whether a text may name a penalty: lower case letters, digits and underscores after a letter."""
    return isinstance(text, str) and re.fullmatch(r"[a-z][a-z0-9_]*", text) is not None


def choice(name, value, choices):
    """Returns `value` if it is one of the choices.

    Raises:
        InputError: it is not; the message suggests the nearest choice.
    """
    if not any(value is known or (type(value) is type(known) and value == known) for known in choices):
        raise InputError(f"{name} is {value!r}: give one of {', '.join(map(str, choices))}.{_nearest_of(value, choices)}")
    return value


def yes_or_no(name, value):
    """Returns `value` if it is True or False.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, bool):
        raise InputError(f"{name} is {value!r}: give True or False.")
    return value


def nearest(name, known):
    """Returns the known name that is most like `name`, or None if no name is like it."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


def _nearest_of(value, choices):
    like = nearest(value, [known for known in choices if isinstance(known, str)]) if isinstance(value, str) else None
    return f" Did you mean {like}?" if like else ""
