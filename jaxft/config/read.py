"""Run files: YAML with ``extends:``, then ``key=value`` overrides."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from jaxft.config.decode import decode, to_tree
from jaxft.config.names import meant
from jaxft.config.ranges import check_ranges
from jaxft.config.scalars import MOST_BYTES, Scalar, parse_yaml, settle, value_kind
from jaxft.config.schema import RunConfig, TaskConfig
from jaxft.config.stored import GONE, as_today
from jaxft.config.tasks import task_options
from jaxft.config.typed import typed
from jaxft.errors import UserError
from jaxft.files import find_file, read_text


def _read_tree(path: Path, depth: int = 0) -> dict[str, object]:
    """The merged tree of a YAML file and of what it extends."""
    tree = parse_yaml(read_text(path, MOST_BYTES), str(path))
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
    merged: dict[str, object] = {}
    for parent in parents:
        found = path.parent / parent
        if not found.is_file():
            raise UserError(f"{path}: extends {parent!r}, but there is no file {found}")
        merged = _merge(merged, _read_tree(found, depth + 1))
    return _merge(merged, tree)


def stored_tree(path: Path) -> dict[str, object]:
    """The plain tree of a configuration that a run wrote, with the keys that are gone since."""
    tree = _read_tree(path)
    task = settle(task_options(_task_name(tree)), tree.get("task", {}), "task")
    rest = settle(RunConfig, {name: value for name, value in tree.items() if name != "task"}, "")
    return cast(dict[str, object], rest) | {"task": task}


def _merge(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    merged = dict(below)
    for key, value in above.items():
        found = merged.get(key)
        merged[key] = _merge(found, value) if isinstance(found, dict) and isinstance(value, dict) else value
    return merged


def _override(tree: Mapping[str, object], assignment: str) -> dict[str, object]:
    """``tree`` with one dotted ``key=value`` applied; the type of the key says how the value is read."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise UserError(f"{assignment!r}: expected key=value, for instance optim.learning_rate=1e-4")
    *sections, last = key.split(".")
    above: dict[str, object] = {last: typed(kind_of(key, text, _task_name(tree)), text, key)}
    for section in reversed(sections):
        above = {section: above}
    return _merge(tree, above)


def kind_of(key: str, text: str, task: str) -> object:
    """The declared type of a dotted key of a run with this task; Any inside mappings that take anything."""
    kind: object = RunConfig
    done: list[str] = []
    for part in key.split("."):
        done.append(part)
        if dataclasses.is_dataclass(kind):
            kinds = typing.get_type_hints(kind)
            if ".".join(done) in GONE:
                raise UserError(f"{'.'.join(done)} is gone: {GONE['.'.join(done)]}")
            if part not in kinds:
                raise UserError(f"unknown config key {'.'.join(done)!r}: {meant(RunConfig, '.'.join(done), kinds)}")
            kind = task_options(task) if kinds[part] is TaskConfig else kinds[part]
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
    tree: dict[str, object] = {}
    if path is not None:
        tree = _read_tree(find_file(str(path), "config file"))
        tree = as_today(tree) if stored else tree
    # The task first: it says what its other options are.
    for assignment in sorted(overrides, key=lambda text: not text.startswith("task.name=")):
        tree = _override(tree, assignment)
    config = run_config(tree)
    check_ranges(config)
    return config


def with_overrides(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The same with ``key=value`` overrides applied.

    Raises:
      UserError: unknown key, value of the wrong type or out of range.
    """
    tree: dict[str, object] = to_tree(config)
    for assignment in overrides:
        tree = _override(tree, assignment)
    changed = run_config(tree)
    check_ranges(changed)
    return changed


def run_config(tree: Mapping[str, object]) -> RunConfig:
    """The configuration that a whole plain tree holds.

    Raises:
      UserError: an unknown key, or a value of the wrong type.
    """
    options = task_options(_task_name(tree))
    rest = {section: value for section, value in tree.items() if section != "task"}
    task = decode(options, tree.get("task", {}), "task")
    return dataclasses.replace(decode(RunConfig, rest), task=task)


def _task_name(tree: Mapping[str, object]) -> str:
    section = tree.get("task")
    name = section.get("name", TaskConfig.name) if isinstance(section, dict) else TaskConfig.name
    return str(name.value if isinstance(name, Scalar) else name)
