"""docs/api.md: its table is what may be imported; each name is there, says what it is, and has a whole signature."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, get_type_hints

import flax.linen as nn
import jax
import pytest

import jaxft
from jaxft import models, tasks

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


class Entry(NamedTuple):
    """A name of the table."""

    module: str
    name: str
    row: int
    any: bool
    """The table says why there is ``Any`` in its signature."""
    link: str

    @property
    def thing(self) -> Any:
        found = importlib.import_module(self.module)
        if hasattr(found, self.name):
            return getattr(found, self.name)
        return importlib.import_module(f"{self.module}.{self.name}")


def entries() -> list[Entry]:
    lines = (ROOT / "docs/api.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| `")]
    assert {len(cells) for cells in table} <= {3, 4}
    return [
        Entry(module, name, row, "`Any`:" in what, ", ".join(link))
        for row, (modules, names, what, *link) in enumerate(table)
        for module in re.findall(r"`([\w.]+)`", modules)
        for name in re.findall(r"`(\w+)`", names)
    ]


ENTRIES = entries()
IDS = [f"{entry.module}.{entry.name}" for entry in ENTRIES]
NAMED = {(entry.module, entry.name) for entry in ENTRIES}


class Signed(NamedTuple):
    """A function or method, or the making of a value."""

    name: str
    call: Callable[..., Any]
    result: bool
    """Whether it states what it returns."""


def signed(entry: Entry) -> Iterator[Signed]:
    """The signatures of a name: its own, or those of a class and its public methods."""
    thing = entry.thing
    if not inspect.isclass(thing):
        if callable(thing) and hasattr(thing, "__name__") and not hasattr(thing, "__origin__"):
            yield Signed(entry.name, thing, True)
        return
    made = dataclasses.is_dataclass(thing) or hasattr(thing, "_fields") or "__init__" in vars(thing)
    if made and not issubclass(thing, nn.Module) and not getattr(thing, "_is_protocol", False):
        yield Signed(entry.name, thing, False)
    for owner in [one for one in thing.__mro__ if one.__module__.startswith("jaxft.")]:
        for name, value in vars(owner).items():
            if name.startswith("_") and name != "__call__":
                continue
            value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
            if inspect.isfunction(value):
                yield Signed(f"{owner.__name__}.{name}", value, True)


LOOSE = re.compile(r"\b(Any|JsonObject)\b")  # the second is a dict of the first


def stated(one: Signed) -> dict[str, Any]:
    """The annotations of a signature."""
    signature = inspect.signature(one.call)
    found = {p.name: p.annotation for p in signature.parameters.values() if p.name not in ("self", "cls", "_cls")}
    return found | ({"return": signature.return_annotation} if one.result else {})


def test_the_table_is_not_empty_and_says_each_name_once() -> None:
    assert len(NAMED) == len(ENTRIES) > 50


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_a_name_is_there_and_says_what_it_is(entry: Entry) -> None:
    thing = entry.thing
    if inspect.isclass(thing) or inspect.isfunction(thing) or isinstance(thing, ModuleType | jax.custom_vjp):
        first = (thing.__doc__ or "").strip().partition("\n\n")[0]
        assert re.match(r"[A-Z]|``\w", first), first
        assert first.endswith((".", ":")), first
        assert not first.startswith(f"{entry.name}("), "a docstring that dataclasses made"


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_signatures_are_whole(entry: Entry) -> None:
    for one in signed(entry):
        for name, annotation in stated(one).items():
            assert annotation is not inspect.Signature.empty, f"{one.name}: {name} has no type"
            loose = LOOSE.search(str(annotation))
            assert entry.any or not loose, f"{one.name}: {name}: {annotation}"


def test_any_is_excused_only_where_it_is() -> None:
    for entry in ENTRIES:
        if entry.any:
            row = [other for other in ENTRIES if other.row == entry.row]
            found = [text for other in row for one in signed(other) for text in map(str, stated(one).values())]
            assert any(map(LOOSE.search, found)), f"{entry.module}.{entry.name}"


@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_arrays_have_shapes(entry: Entry) -> None:
    if entry.module.startswith(("jaxft.models.families.", "jaxft.tasks")):
        return  # batches are declared by their fields
    for one in signed(entry):
        for name, annotation in stated(one).items():
            bare = re.sub(r"\b(Float|Float32|Int32|Integer|Bool|Shaped|UInt32|PyTree)\[[^\[\]]*\]", "", str(annotation))
            assert not re.search(r"(?<!Key)\b(Array|ndarray)\b", bare), f"{one.name}: {name}: {annotation}"


@pytest.mark.parametrize("name", sorted({entry.module for entry in ENTRIES}))
def test_all_agrees(name: str) -> None:
    public = getattr(importlib.import_module(name), "__all__", None)
    listed = {entry.name for entry in ENTRIES if entry.module == name}
    if name in ("jaxft", "jaxft.models.contract", "jaxft.tasks.contract"):
        assert public is not None
        assert set(public) == listed
    elif public is not None and name not in ("jaxft.tasks", "jaxft.models.families"):
        assert listed <= set(public)


def test_what_is_taken_over_is_all_that_is_asked_for() -> None:
    for package, needed in (("jaxft.tasks.", tasks._NEEDED), ("jaxft.models.families.", models._NEEDED)):
        wanted = {name for name in needed if "." not in name}
        modules = {entry.module for entry in ENTRIES if entry.module.startswith(package)} - {"jaxft.tasks.contract"}
        assert {module.removeprefix(package) for module in modules} == set(
            tasks.tasks() if "tasks" in package else models.families()
        )
        for module in modules:
            assert wanted <= {entry.name for entry in ENTRIES if entry.module == module}


def blocks(page: Path) -> list[ast.Module]:
    code = re.findall(r"^```python[^\n]*\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [ast.parse(block) for block in code]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_use_nothing_else(page: Path) -> None:
    for block in blocks(page):
        for node in ast.walk(block):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxft":
                for alias in node.names:
                    module = node.module or ""
                    known = any(entry.module == module for entry in ENTRIES)
                    assert known if alias.name == "*" else (module, alias.name) in NAMED, (module, alias.name)
            elif isinstance(node, ast.Import):
                names = {alias.name for alias in node.names if alias.name.split(".")[0] == "jaxft"}
                assert names <= {"jaxft"}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jaxft":
                assert node.attr in jaxft.__all__, node.attr


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.link], ids=lambda entry: entry.name)
def test_examples_are_where_the_table_says(entry: Entry) -> None:
    for page, place in re.findall(r"\]\((\w+\.md)#([^)]+)\)", entry.link):
        headings = re.findall(r"^#+ (.*)$", (ROOT / "docs" / page).read_text(), re.MULTILINE)
        assert place in map(anchor, headings), place


def test_annotations_resolve() -> None:
    """A name that only the type checker knows would be found nowhere by help() and by those who check shapes."""
    for entry in ENTRIES:
        if entry.module.startswith(("jaxft.layers", "jaxft.attention", "jaxft.models.contract")):
            for one in signed(entry):
                assert get_type_hints(inspect.unwrap(one.call)) is not None
