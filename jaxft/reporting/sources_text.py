"""Scores of each source of corpora, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

_COLUMNS = (
    ("documents", "documents", "{:,}"),
    ("predicted_tokens", "scored", "{:,}"),
    ("bytes", "bytes", "{:,}"),
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:,.2f}"),
    ("bits_per_token", "bits/token", "{:.4f}"),
    ("bits_per_byte", "bits/byte", "{:.4f}"),
)


def sources_text(sources: Mapping[str, Mapping[str, float]], width: int, fit: Callable[[str, int], str]) -> str:
    """A line for each source.

    Args:
      fit: a text cut or padded to so many columns.
    """
    columns = [column for column in _COLUMNS if any(column[0] in row for row in sources.values())]
    rows = [[form.format(row[name]) if name in row else "n/a" for name, _, form in columns] for row in sources.values()]
    sizes = [max(map(len, (head, *(row[i] for row in rows)))) + 2 for i, (_, head, _) in enumerate(columns)]
    first = max(min(max(map(len, ("source", *sources))), width - sum(sizes)), 12)
    heads = [head for _, head, _ in columns]
    return "\n".join(
        fit(name, first) + "".join(f"{cell:>{size}}" for cell, size in zip(cells, sizes, strict=True))
        for name, cells in zip(("source", *sources), (heads, *rows), strict=True)
    )
