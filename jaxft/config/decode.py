"""Between plain trees and config dataclasses, strictly: unknown keys and wrong types are errors with their full path."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from jaxft.config.names import meant
from jaxft.config.scalars import EXPONENT, Scalar, settle
from jaxft.config.stored import GONE
from jaxft.errors import UserError
from jaxft.files import JsonObject

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from pydantic import TypeAdapter

T = TypeVar("T")


def decode(schema: type[T], tree: object, where: str = "") -> T:
    """A dataclass of type ``schema`` from a plain tree.

    Raises:
      UserError: an unknown key (with the nearest valid one), or a value of the wrong type, each with its full path.
    """
    from pydantic import ValidationError  # costs 0.1 s: not for `jaxft --help`

    _check_keys(schema, tree, where, lambda path, names: meant(schema, path.removeprefix(f"{where}."), names))
    tree = settle(schema, tree, where)
    try:
        # JSON mode: strict about scalars, yet a list may fill a tuple.
        return _adapter(schema).validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join([where, *_present(tree, problem["loc"])]).strip(".")
        shown = json.dumps(problem["input"], default=str)
        raise UserError(f"{path}={shown}: {problem['msg'].lower()}") from error


@functools.cache
def _adapter(schema: type[T]) -> TypeAdapter[T]:
    from pydantic import TypeAdapter

    return TypeAdapter(schema)


def _present(tree: Any, path: tuple[int | str, ...]) -> Iterator[str]:
    """The parts of a path that are keys: pydantic names the members of unions too."""
    for part in path:
        places = range(len(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else ()
        if part not in places:
            return
        tree = tree[part]
        yield str(part)


def _check_keys(schema: object, tree: object, where: str, hint: Callable[[str, Iterable[str]], str]) -> None:
    if not dataclasses.is_dataclass(schema):
        return
    if not isinstance(tree, dict):
        found = tree.value if isinstance(tree, Scalar) else tree
        raise UserError(f"{where or 'config'}: expected keys and values, found {found!r}")
    hints = typing.get_type_hints(schema)  # those of the class itself are no keys
    types = {one.name: hints[one.name] for one in dataclasses.fields(schema)}
    for key, value in tree.items():
        path = f"{where}.{key}".strip(".")
        if path in GONE and key not in types:
            raise UserError(f"{path} is gone: {GONE[path]}")
        if key not in types:
            raise UserError(f"unknown config key {path!r}: {hint(path, types)}")
        _check_keys(types[key], value, path, hint)


def to_tree(config: DataclassInstance) -> JsonObject:
    """A config dataclass as plain dicts and lists, JSON- and YAML-ready."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def flat(tree: object, prefix: str = "") -> dict[str, object]:
    """The leaves of nested dicts by dotted path; an empty dict is a leaf."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}.{key}".strip(".")).items()}


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes text which our loader would read as a number, and escapes line breaks, which would be folded."""


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if text.isprintable() else '"')


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+0123456789."))


def to_yaml(config: DataclassInstance) -> str:
    """The resolved configuration as YAML; loading it gives the same configuration."""
    return yaml.dump(to_tree(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def to_yaml_line(value: object) -> str:
    """One value as YAML on one line, as it may be given on the command line."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=2**30)
    return text.removesuffix("\n").removesuffix("\n...")
