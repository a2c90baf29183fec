"""Malformed checkpoints: manifests that are damaged, and manifests that are signed and say odd things."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.malformed.case import MILLION, Case, Damage, bad_json, gone, words

MANIFEST = "checkpoint/jaxft.json"
PREDICT = words("predict checkpoint --text a")
CONVERT = words("convert checkpoint made")
ODD: tuple[object, ...] = (..., None, 5, -1, 1.5, True, "x", [], ["x"], {}, {"x": 1}, MILLION, 10**30)
Body = dict[str, Any]


def cases() -> Iterator[Case]:
    """The cases of this kind."""
    for title, damage in bad_json(MANIFEST):
        yield Case("checkpoint", f"manifest: {title}", damage, PREDICT, (2, 3))
        yield Case(
            "checkpoint",
            f"manifest, listed: {title}",
            _as_run(damage),
            words("checkpoint list run"),
            (0, 2, 3),
            told="",
        )
        yield Case(
            "checkpoint",
            f"manifest, verified: {title}",
            _as_run(damage),
            words("checkpoint verify run"),
            (1, 2, 3),
            told="",
        )
    others = itertools.cycle(("list run", "inspect run 2", "verify run", "prune run --keep 1 --dry-run", ""))
    for title, change in _changes():
        damage = signed(change)
        either = title.startswith("may: ")
        codes, name = ((0, 2, 3) if either else (2, 3)), title.removeprefix("may: ")
        yield Case("checkpoint", f"signed, {name}", damage, PREDICT, codes)
        if what := next(others):
            command = words(f"checkpoint {what}")
            yield Case("checkpoint", f"signed, {name}: {what}", _as_run(damage), command, (0, 1, 2, 3), told="")
        else:
            yield Case("checkpoint", f"signed, {name}: converted", damage, CONVERT, (0, 2, 3), writes=True)
    for name in ("_METADATA", "manifest.ocdbt"):
        yield Case("checkpoint", f"no {name}", gone(f"checkpoint/params/{name}"), PREDICT, (2, 3))
    for version in (0, -1, 2, 99, 10**30):
        yield Case(
            "checkpoint",
            f"format {version}",
            signed(lambda body, version=version: body.update(format=version)),
            PREDICT,
            (2, 3),
        )


def signed(change: Callable[[Body], object]) -> Damage:
    """A manifest that says something else, and matches its checksum."""

    def damage(folder: Path) -> None:
        from jaxft.checkpoint.manifest import _checksum, _render

        path = folder / MANIFEST
        body = json.loads(path.read_text())
        del body["sha256"]
        change(body)
        path.write_text(_render({**body, "sha256": _checksum(body)}))

    return damage


def _as_run(damage: Damage) -> Damage:
    """The same in a run's folder, as its step 2."""

    def moved(folder: Path) -> None:
        damage(folder)
        (folder / "run/checkpoints").mkdir(parents=True)
        (folder / "checkpoint").rename(folder / "run/checkpoints/2")

    return moved


def _set(place: Callable[[Body], Any], key: str, value: object) -> Callable[[Body], object]:
    def change(body: Body) -> None:
        tree = place(body)
        if value is ...:
            tree.pop(key, None)
        else:
            tree[key] = value

    return change


def _changes() -> Iterator[tuple[str, Callable[[Body], object]]]:
    """(what it is, the change); "may: " where some commands can do without what is odd."""
    for key in ("kind", "step", "best", "tree", "meta", "files"):
        for value in ODD:
            free = "may: " if key in ("step", "best", "kind") or (key == "files" and value == {}) else ""
            yield f"{free}{key}: {_said(value)}", _set(lambda body: body, key, value)
    needed = ("config", "seed", "family", "arch", "head", "labels", "hf_config", "tokenizer", "max_length")
    for key in (*needed, "progress", "log", "train_rows", "tokenizer_digest", "tokenizer_inside", "versions", "nope"):
        for value in (..., None, 5, [], {}, {"x": 1}, MILLION):
            yield f"may: meta.{key}: {_said(value)}", _set(lambda body: body["meta"], key, value)
    for section in ("data", "model", "train", "task", "nope"):
        for value in (None, 5, [], {"nope": 1}, {"name": MILLION}):
            yield (
                f"may: meta.config.{section}: {_said(value)}",
                _set(lambda body: body["meta"]["config"], section, value),
            )
    yield "unknown key", lambda body: body["meta"]["config"]["train"].update(nope=1)
    for value in ("32", 0, 10**9, 10**30):
        yield (
            f"meta.arch.num_hidden_layers: {value}",
            _set(lambda body: body["meta"]["arch"], "num_hidden_layers", value),
        )
        yield f"meta.arch.vocab_size: {value}", _set(lambda body: body["meta"]["arch"], "vocab_size", value)
    for name, leaf in {
        "a shape of text": {"shape": ["x"], "dtype": "float32"},
        "a negative shape": {"shape": [-1, 2], "dtype": "float32"},
        "a shape of terabytes": {"shape": [2**40, 2**10], "dtype": "float32"},
        "an unknown type": {"shape": [2], "dtype": "nope"},
        "objects": {"shape": [2], "dtype": "object"},
        "no shape": {"dtype": "float32"},
        "a list": [1],
    }.items():
        yield f"tree: {name}", lambda body, leaf=leaf: body["tree"].update({next(iter(body["tree"])): leaf})
        yield f"tree, one more: {name}", lambda body, leaf=leaf: body["tree"].update({"params/zzz": leaf})
    yield (
        "tree: deep",
        lambda body: body["tree"].update({"params/" + "a/" * 5000 + "x": {"shape": [2], "dtype": "float32"}}),
    )
    yield (
        "tree: a leaf in a leaf",
        lambda body: body["tree"].update({f"{next(iter(body['tree']))}/x": {"shape": [2], "dtype": "float32"}}),
    )
    for name, file in {
        "../model/config.json": {"size": 1, "sha256": "x"},
        "/dev/zero": {"size": 0, "sha256": "x"},
        "/etc/passwd": {"size": 1, "sha256": "x"},
        "x" * 5000: {"size": 1, "sha256": "x"},
        "\0": {"size": 1, "sha256": "x"},
        "params": {"size": 4096, "sha256": "x"},
        "no size": {"sha256": "x"},
        "text as size": {"size": "1", "sha256": "x"},
    }.items():
        yield f"files: {name[:20]!a}", lambda body, name=name, file=file: body["files"].update({name: file})


def _said(value: object) -> str:
    return "gone" if value is ... else str(value)[:20]
