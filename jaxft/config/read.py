"""Run files: YAML with ``extends:``, then ``key=value`` overrides."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

from jaxft.config.decode import decode
from jaxft.config.names import meant
from jaxft.config.ranges import check_ranges
from jaxft.config.scalars import Scalar, parse_yaml, settle, value_kind
from jaxft.config.schema import RunConfig
from jaxft.config.stored import GONE, without_gone
from jaxft.config.typed import typed
from jaxft.errors import UserError
from jaxft.files import find_file


def _read_tree(path: Path, depth: int = 0) -> dict[str, Any]:
    """The merged tree of a YAML file and of what it extends."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: cannot be read as a config file: {error.reason} at byte {error.start + 1}; save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a config file: {error.strerror or error}") from error
    tree = tree.value if isinstance(tree, Scalar) else tree
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


def stored_tree(path: Path) -> dict[str, Any]:
    """The plain tree of a configuration that a run wrote, with the keys that are gone since."""
    return settle(RunConfig, _read_tree(path), "")


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(tree: dict[str, Any], assignment: str) -> dict[str, Any]:
    """``tree`` with one dotted ``key=value`` applied; the type of the key says how the value is read."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"{assignment!r}: expected key=value, for instance optim.learning_rate=1e-4")
    value = typed(_kind_of(key, text), text, key)
    for part in reversed(key.split(".")):
        value = {part: value}
    return _merge(tree, value)


def _kind_of(key: str, text: str) -> Any:
    """The declared type of a dotted key; Any inside mappings that take anything."""
    kind: Any = RunConfig
    done: list[str] = []
    for part in key.split("."):
        done.append(part)
        if dataclasses.is_dataclass(kind):
            kinds = typing.get_type_hints(kind)
            if ".".join(done) in GONE:
                raise UserError(f"{'.'.join(done)} is gone: {GONE['.'.join(done)]}")
            if part not in kinds:
                raise UserError(f"unknown config key {'.'.join(done)!r}: {meant(RunConfig, '.'.join(done), kinds)}")
            kind = kinds[part]
        else:
            kind = value_kind(kind) or Any
    if dataclasses.is_dataclass(kind) and not text.startswith("{"):
        hint = meant(RunConfig, f"{key}.{key}", ()) if "." not in key else ""
        hint = f"; {hint}" if hint.startswith("did you mean") else ""
        raise UserError(f"{key}={text}: {key} is a section; write {key}.KEY=...{hint}")
    return kind


def load_config(
    path: str | Path | None, overrides: list[str] | tuple[str, ...] = (), *, stored: bool = False
) -> RunConfig:
    """The resolved configuration of a run file (or of the defaults, for None) with ``key=value`` overrides applied.

    Args:
      stored: the file was written by a run, perhaps of an earlier version: keys that are gone since are passed over.

    Raises:
      UserError: missing or malformed file, unknown key, value of the wrong type or out of range.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = _read_tree(find_file(str(path), "config file"))
        tree = without_gone(tree) if stored else tree
    for assignment in overrides:
        tree = _override(tree, assignment)
    config = decode(RunConfig, tree)
    check_ranges(config)
    return config
