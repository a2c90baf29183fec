"""Scores of each source of corpora, as a table."""

from __future__ import annotations

from collections.abc import Mapping

from jaxft.reporting.plots import plain_label

_COLUMNS = (
    ("documents", "documents", "{:,}"),
    ("predicted_tokens", "scored", "{:,}"),
    ("bytes", "bytes", "{:,}"),
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:,.2f}"),
    ("bits_per_token", "bits/token", "{:.4f}"),
    ("bits_per_byte", "bits/byte", "{:.4f}"),
)


def sources_text(sources: Mapping[str, Mapping[str, float]], width: int) -> str:
    """A line for each source; of names that are too long, the end."""
    columns = [column for column in _COLUMNS if any(column[0] in row for row in sources.values())]
    rows = [[form.format(row[name]) if name in row else "n/a" for name, _, form in columns] for row in sources.values()]
    sizes = [max(map(len, (head, *(row[i] for row in rows)))) + 2 for i, (_, head, _) in enumerate(columns)]
    first = max(min(max(map(len, ("source", *sources))), width - sum(sizes)), 12)
    names = [name if len(name) <= first else f"…{name[1 - first :]}" for name in map(plain_label, sources)]
    heads = [head for _, head, _ in columns]
    return "\n".join(
        f"{name:<{first}}" + "".join(f"{cell:>{size}}" for cell, size in zip(cells, sizes, strict=True))
        for name, cells in zip(("source", *names), (heads, *rows), strict=True)
    )
