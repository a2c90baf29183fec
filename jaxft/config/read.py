"""Run files: YAML with ``extends:``, then ``key=value`` overrides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from jaxft.config.decode import EXPONENT, decode
from jaxft.config.ranges import check_ranges
from jaxft.config.schema import RunConfig
from jaxft.errors import UserError
from jaxft.files import find_file


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads ``1e-4`` as a number (YAML 1.1 wants ``1.0e-4``), ``on``, ``off``, ``yes`` and ``no`` as text (YAML
    1.1 has them for booleans: ``log.progress=off``, labels ``[yes, no]``), ``10:13`` too (YAML 1.1: 613, counted in
    sixties), and refuses a key given twice.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key is a list or mapping", key_node.start_mark)
            key = self.construct_object(key_node, deep=deep)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


_BOOL, _INT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:int"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_BOOL, _INT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(_BOOL, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    EXPONENT,
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: not valid YAML: {problem}") from error


def _read_tree(path: Path, depth: int = 0) -> dict[str, Any]:
    """The merged tree of a YAML file and of what it extends."""
    try:
        tree = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a config file: {error}") from error
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: a config file holds `section: {{key: value}}`, this one holds a {type(tree).__name__}"
        )
    parents = tree.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or len(parents) > 2 or not all(isinstance(p, str) for p in parents):
        raise UserError(f"{path}: `extends:` takes one or two file names")
    if parents and depth == 4:
        raise UserError(f"{path}: `extends:` goes deeper than 4 files; is it circular?")
    merged: dict[str, Any] = {}
    for parent in parents:
        found = path.parent / parent
        if not found.is_file():
            raise UserError(f"{path}: extends {parent!r}, but there is no file {found}")
        merged = _merge(merged, _read_tree(found, depth + 1))
    return _merge(merged, tree)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(tree: dict[str, Any], assignment: str) -> dict[str, Any]:
    """``tree`` with one dotted ``key=value`` applied; the value is read as YAML."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"{assignment!r}: expected key=value, for instance optim.learning_rate=1e-4")
    value = _parse_yaml(text, assignment)
    for part in reversed(key.split(".")):
        value = {part: value}
    return _merge(tree, value)


def load_config(path: str | None, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """The resolved configuration of a run file (or of the defaults, for None) with ``key=value`` overrides applied.

    Raises:
      UserError: missing or malformed file, unknown key, value of the wrong type or out of range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_tree(find_file(path, "config file"))
    for assignment in overrides:
        tree = _override(tree, assignment)
    config = decode(RunConfig, tree)
    check_ranges(config)
    return config
