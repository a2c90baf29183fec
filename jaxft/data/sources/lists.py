"""Cells that are lists: words, labels, spans. Whatever a format calls them, they come as lists of plain values or of mappings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from jaxft.data.sources.rows import Binary, Value, plain_value
from jaxft.errors import UserError

Names: TypeAlias = "Callable[[int], str] | Mapping[str, Names] | None"
"""Where class ids stand in a column and what they are called: one function for all of them, or one (or such a mapping) by key."""


def names_in(feature: Any, class_label: type) -> Names:
    """The names of the ``ClassLabel`` anywhere in a feature of tfds or of the datasets library; None: there is none."""
    if isinstance(feature, class_label):
        return feature.int2str
    if hasattr(feature, "items"):
        found = {key: names_in(inner, class_label) for key, inner in feature.items()}
        return found if any(found.values()) else None
    return names_in(feature.feature, class_label) if hasattr(feature, "feature") else None


def names_in_parquet(metadata: Mapping[bytes, bytes] | None) -> dict[str, Names]:
    """By column, names of classes as the datasets library writes them into Parquet files; malformed metadata have none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {column: _stored_names(feature) for column, feature in features.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _stored_names(feature: object) -> Names:
    if isinstance(feature, list):  # as earlier versions of the library write lists of mappings
        feature = feature[0] if len(feature) == 1 else None
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list):
        return dict(enumerate(map(str, feature["names"]))).__getitem__
    if "_type" in feature:
        return _stored_names(feature.get("feature"))
    found = {key: _stored_names(inner) for key, inner in feature.items()}
    return found if any(found.values()) else None


def library_value(value: object, column: str, names: Names, where: str) -> Value:
    """A value as tfds, the datasets library or pyarrow gives it: arrays become lists, class ids their names, -1 ("hidden") None.

    Raises:
      UserError: it is nothing that a column can hold, or a class id has no name.
    """
    return plain_value(value if isinstance(column, Binary) else _python(value, column, names, where), column, where)


def _python(value: Any, column: str, names: Names, where: str) -> object:
    if isinstance(value, Mapping):
        inner = names if isinstance(names, Mapping) else {}
        return {key: _python(item, column, inner.get(key), where) for key, item in value.items()}
    if isinstance(value, list | tuple) or getattr(value, "ndim", 0):
        return [_python(item, column, names, where) for item in value]
    if isinstance(value, np.floating):
        value = shortest(value)
    elif hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or not callable(names) or isinstance(value, str):
        return value
    if value == -1:  # how both libraries mark the hidden labels of test splits
        return None
    try:
        return names(int(value))
    except (ValueError, LookupError) as error:
        raise UserError(
            f"{where}: column {column!r} holds class {value}, and the data set has no name for it"
        ) from error


def shortest(value: np.floating) -> float:
    """The float64 of the shortest text that means ``value``: 0.1 of a float32 is 0.1, and not 0.10000000149011612."""
    return float(np.format_float_scientific(value)) if np.isfinite(value) else float(value)
