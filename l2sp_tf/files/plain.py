"""Settings as JSON values: nested, or flat with dotted names."""

import dataclasses
import json


def plain(value):
    """Converts a dataclass or dict to what JSON gives back, so that keys do not depend on tuples and lists."""
    return json.loads(json.dumps(dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value))


def flat(value, whole=(), prefix=""):
    """Yields the leaves of nested dicts by dotted name, as ("recipe.momentum", 0.9); dicts named in `whole` count as leaves."""
    if not isinstance(value, dict) or prefix in whole:
        yield prefix, value
        return
    for name, part in value.items():
        yield from flat(part, whole, f"{prefix}.{name}".lstrip("."))
