"""The plan of a build: its parts and what it depends on; and whether a folder's plan is that of a command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from jaxft.data.corpus.files import AGAIN, FORMAT, MANIFEST, PLAN, read_manifest, read_sealed, write_sealed
from jaxft.data.corpus.options import Options
from jaxft.data.corpus.parts import Part, Piece, divide, said_of
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.files import JsonObject


class PieceSaid(TypedDict):
    """What a plan says of a piece."""

    source: str
    size: int
    start: int
    stop: int | None


class Body(TypedDict):
    """What a plan says."""

    key: JsonObject
    parts: list[list[PieceSaid]]


@dataclass(frozen=True)
class Plan:
    """What is to be built."""

    folder: Path
    key: JsonObject
    """Sources, tokenizer and options: what the corpus depends on, by name."""
    parts: tuple[Part, ...]
    options: Options

    @property
    def folders(self) -> dict[str, Path]:
        """Where each split is written."""
        return {split: self.folder / split for split in self.options.splits}

    @property
    def is_done(self) -> bool:
        """Whether the manifests are written; that of the first split comes last."""
        return (next(iter(self.folders.values())) / MANIFEST).is_file()


def make_plan(folder: Path, sources: Sequence[str], tokenizer: Tokenizer, options: Options) -> Plan:
    """The plan of a command. Nothing is written.

    Raises:
      UserError: there is nothing to read, or the tokenizer cannot be used.
    """
    if tokenizer.count_types(paired=False) > 1:
        raise UserError(
            f"{tokenizer.folder}: gives single texts token types other than 0, which a corpus does not store"
        )
    parts = tuple(divide(sources, options))
    if not parts:
        raise UserError(f"{', '.join(sources)}: holds no file with anything in it")
    key: JsonObject = {
        "sources": list(sources),
        "tokenizer": tokenizer.digest(),
        "vocabulary": tokenizer.vocab_size,
        **asdict(options),
    }
    return Plan(folder, key, parts, options)


def begin(plan: Plan) -> str:
    """Writes the plan, or compares it with the one that is there: ``begun``, ``goes on`` or ``done``.

    Raises:
      UserError: the folder holds another build, or something else.
    """
    folder, body = plan.folder, {"key": plan.key, "parts": said_of(plan.parts)}
    if plan.is_done:
        _compare(folder, read_manifest(next(iter(plan.folders.values())))["key"], plan.key | {"parts": body["parts"]})
        return "done"
    try:
        found = read_sealed(folder / PLAN, Body)
    except FileNotFoundError:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} already exists; name another place or remove it first") from None
        for one in (folder, *plan.folders.values()):
            one.mkdir(parents=True, exist_ok=True)
        write_sealed(folder / PLAN, body)
        return "begun"
    _compare(folder, found["key"] | {"parts": found["parts"]}, plan.key | {"parts": body["parts"]})
    return "goes on"


def _compare(folder: Path, was: JsonObject, now: JsonObject) -> None:
    """Raises UserError if a folder's build is another one: names the first difference."""
    other = "give what it was begun with, or name another --out"
    for name in dict.fromkeys((*now, *was)):
        before, wanted = was.get(name), now.get(name)
        if before == wanted:
            continue
        if name == "tokenizer":
            raise UserError(f"{folder}: is of another tokenizer, which gives other ids; {other}")
        if name == "parts":
            raise UserError(f"{folder}: is stale: {_changed(before or [], wanted or [])}; {AGAIN}")
        raise UserError(f"{folder}: holds a build with {name}={before!r}, here it is {wanted!r}; {other}")


def _changed(was: list[list[JsonObject]], now: list[list[JsonObject]]) -> str:
    sizes, present = ({one["source"]: one["size"] for part in parts for one in part} for parts in (was, now))
    for source, size in sizes.items():
        if source not in present:
            return f"{source} is no longer there"
        if present[source] != size:
            return f"{source} had {size} bytes, now {present[source]}"
    new = next((source for source in present if source not in sizes), None)
    return "its sources are divided otherwise" if new is None else f"{new} is new"


__all__ = ["FORMAT", "Body", "Piece", "Plan", "begin", "make_plan"]
