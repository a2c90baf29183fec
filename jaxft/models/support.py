"""The tables of families in README.md and docs/models.md, made from what families say of themselves.

``python -m jaxft.models.support FILE ...`` (``make tables``) rewrites what stands between a table's two marks in each file.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jaxft.errors import UserError
from jaxft.files import write_atomic
from jaxft.models import families, family
from jaxft.models.contract import Family, architecture_of

_MARKED = re.compile(r"(<!-- table of (\w+)[^>]*-->\n).*?(<!-- end of table -->)", re.DOTALL)


def families_table() -> str:
    """A Markdown table: each family, the ``model_type``s and heads that it has, and whether labelled texts may share its rows."""
    lines = [("family", "`model_type`", "heads", "labelled texts may share rows")]
    for name in families():
        module = family(name)
        heads = ", ".join(f"`{head}`" for head in module.HEADS if head is not None)
        models = [module.Model(module.TINY, head) for head in module.HEADS]
        packs = "yes" if any("starts" in model.facts.inputs for model in models) else "no"
        lines.append((f"`{name}`", ", ".join(f"`{kind}`" for kind in module.MODEL_TYPES), heads, packs))
    return _markdown(lines)


def classes_table() -> str:
    """A Markdown table: each head of each family, and the classes of the reference that are read as it."""
    lines = [("family", "head", "classes of `transformers`")]
    for name in families():
        module = family(name)
        for head in module.HEADS:
            named = "none" if head is None else f"`{head}`"
            lines.append((f"`{name}`", named, ", ".join(f"`{one}`" for one in _classes(module, head))))
    return _markdown(lines)


TABLES = {"families": families_table, "classes": classes_table}


def with_tables(text: str, where: str) -> str:
    """A page with the tables of today between its marks.

    Raises:
      UserError: it has no such marks, or those of a table that there is not.
    """
    named = [name for _, name, _ in _MARKED.findall(text)]
    if not named or not set(named) <= set(TABLES):
        wanted = f"<!-- table of {'|'.join(TABLES)} --> ... <!-- end of table -->"
        raise UserError(f"{where}: no marks of a table that there is ({wanted})")
    return _MARKED.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def main(files: Sequence[str]) -> None:
    """Rewrites the tables of files."""
    for file in files:
        text = Path(file).read_text(encoding="utf-8")
        write_atomic(Path(file), with_tables(text, file))


def _classes(module: Family, head: str | None) -> list[str]:
    """Classes that are written for a head of each kind of model, then further ones that are read as it, of the family's own kind."""
    written = [architecture_of(module, head, kind) for kind in module.MODEL_TYPES]
    return [*written, *(next(iter(module.MODEL_TYPES.values())) + suffix for suffix in module.HEADS[head].read_as)]


def _markdown(lines: Sequence[tuple[str, ...]]) -> str:
    rows = [lines[0], ("---",) * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main(sys.argv[1:])
