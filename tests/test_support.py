"""README.md and docs/models.md hold the tables of families that the code makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxft import models
from jaxft.errors import UserError
from jaxft.models import support
from jaxft.models.contract import architectures

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_pages_have_the_tables_of_today(page: str) -> None:
    text = (ROOT / page).read_text()
    assert support.with_tables(text, page) == text, "run `make tables`"
    assert support.families_table() in text


def test_every_model_type_and_head_is_in_the_table() -> None:
    rows = {row.split("`")[1]: row for row in support.families_table().splitlines()[2:]}
    assert [*rows] == list(models.families())
    for name, row in rows.items():
        module = models.family(name)
        assert all(f"`{one}`" in row for one in (*module.MODEL_TYPES, *module.HEADS) if one)
        facts = module.facts(module.TINY)
        of_texts = facts.start is None or any(one.classes for one in module.HEADS.values())
        assert row.endswith("| yes |" if of_texts and facts.processor == "text" else "| no |")
    known = {stated for name in models.families() for stated in architectures(models.family(name))}
    listed = set(support.classes_table().replace("`", " ").replace(",", " ").split())
    assert {stated for stated in known if stated.endswith(("ForMaskedLM", "ForSequenceClassification"))} <= listed


def test_a_table_is_written_between_its_marks_and_nothing_else_is_touched(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table of classes, by hand -->\nold\n<!-- end of table -->\nafter\n")
    support.main([str(page)])
    once = page.read_text()
    assert once.startswith("before\n<!-- table of classes, by hand -->\n\n| family | head |")
    assert once.endswith("|\n\n<!-- end of table -->\nafter\n")
    assert "old" not in once
    support.main([str(page)])
    assert page.read_text() == once


@pytest.mark.parametrize("text", ["none", "<!-- table of tasks -->\n<!-- end of table -->"])
def test_pages_without_marks_are_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"page\.md: no marks of a table that there is"):
        support.with_tables(text, "page.md")
