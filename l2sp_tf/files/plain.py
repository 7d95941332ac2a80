"""Settings as JSON has them: nested, and with dotted names."""

import dataclasses
import json


def plain(value):
    """A dataclass or dict as JSON would give it back, so that keys do not depend on tuples and lists."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))


def flat(value, whole=(), prefix=""):
    """The leaves of nested dicts with their dotted names, ("recipe.momentum", 0.9); dicts named in `whole` are leaves too."""
    if not isinstance(value, dict) or prefix in whole:
        yield prefix, value
        return
    for name, part in value.items():
        yield from flat(part, whole, f"{prefix}.{name}".lstrip("."))
