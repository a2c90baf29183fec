"""JSON as weights files use it: one object, no duplicate keys (the json module would silently keep the last)."""

from __future__ import annotations

import json
from pathlib import Path

from jaxft.hub.weights.contract import corrupt, quoted


class _DuplicateKey(ValueError):
    pass


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _DuplicateKey(f"the key {quoted(duplicate)} appears twice")
    return result


def parse_object(raw: bytes, path: Path, what: str) -> dict[str, object]:
    """The JSON object in ``raw``; UserError if it is anything else."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except _DuplicateKey as error:
        raise corrupt(path, f"in {what}, {error}") from None
    except (ValueError, RecursionError):  # not UTF-8, not JSON, numbers of 4300 digits, nested without end
        raise corrupt(path, f"{what} is not valid JSON") from None
    if not isinstance(value, dict):
        raise corrupt(path, f"{what} is not a JSON object")
    return value
