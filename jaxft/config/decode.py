"""Between plain trees and config dataclasses, strictly: unknown keys and wrong types are errors with their full path."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from typing import Any, TypeVar

import yaml

from jaxft.errors import UserError, nearest

EXPONENT = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
"""Numbers such as 1e-4, which YAML 1.1 takes for text (it wants 1.0e-4)."""

T = TypeVar("T")


def decode(schema: type[T], tree: Any, where: str = "") -> T:
    """A dataclass of type ``schema`` from a plain tree.

    Raises:
      UserError: an unknown key (with the nearest valid one), or a value of the wrong type, each with its full path.
    """
    from pydantic import TypeAdapter, ValidationError  # costs 0.1 s: not for `jaxft --help`

    _check_keys(schema, tree, where)
    try:
        # JSON mode: strict about scalars, yet a list may fill a tuple.
        return TypeAdapter(schema).validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join([where, *(str(part) for part in problem["loc"])]).strip(".")
        shown = json.dumps(problem["input"], default=str)
        raise UserError(f"{path}={shown}: {problem['msg'].lower()}") from error


def _check_keys(schema: Any, tree: Any, where: str) -> None:
    if not dataclasses.is_dataclass(schema):
        return
    if not isinstance(tree, dict):
        raise UserError(f"{where or 'config'}: expected keys and values, found {tree!r}")
    types = typing.get_type_hints(schema)
    for key, value in tree.items():
        path = f"{where}.{key}".strip(".")
        if key not in types:
            raise UserError(f"unknown config key {path!r}: {nearest(str(key), types)}")
        _check_keys(types[key], value, path)


def to_tree(config: Any) -> dict[str, Any]:
    """A config dataclass as plain dicts and lists, JSON- and YAML-ready."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which our loader would read as a number."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789."))


def to_yaml(config: Any) -> str:
    """The resolved configuration as YAML; loading it gives the same configuration."""
    return yaml.dump(to_tree(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
