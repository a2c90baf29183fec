"""What the loader will see, as text: labels, lengths, and rows token by token."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence

import numpy as np

_MOST_LABELS = 30
_BARS = 40
_MOST_TOKENS = 64


def bars(counts: Sequence[tuple[str, int]], *, total: int | None = None, block: str = "█") -> list[str]:
    """A line for each name: how many, their share of the total (None: of all these), and a bar."""
    most = max((count for _, count in counts), default=0)
    total = sum(count for _, count in counts) if total is None else total
    wide = max((len(name) for name, _ in counts), default=0)
    return [
        f"  {name:{wide}} {count:9,} {count / max(total, 1):7.1%}  {block * round(_BARS * count / max(most, 1))}".rstrip()
        for name, count in counts
    ]


def label_lines(labels: Sequence[str], counts: Sequence[int], *, block: str = "█") -> list[str]:
    """How often each label occurs in training, the commonest first; of many, the first and the number of the others."""
    order = sorted(range(len(labels)), key=lambda i: (-counts[i], i))
    shown = order if len(order) <= _MOST_LABELS else order[: _MOST_LABELS - 1]
    lines = bars([(labels[i], counts[i]) for i in shown], total=sum(counts), block=block)
    rest = order[len(shown) :]
    return [*lines, *([f"  and {len(rest)} more, {sum(counts[i] for i in rest):,} in all"] if rest else [])]


def part_lines(labels: Sequence[str], parts: Mapping[str, Sequence[int]]) -> list[str]:
    """How often each label occurs in each split, and its share there; of many, those that are commonest in the first.

    Args:
      parts: by name of the split, the number of its rows of each label.
    """
    first = next(iter(parts.values()))
    order = sorted(range(len(labels)), key=lambda i: (-first[i], i))[:_MOST_LABELS]
    wide = max((len(labels[i]) for i in order), default=0)
    totals = {name: max(sum(counts), 1) for name, counts in parts.items()}
    lines = [" " * (wide + 2) + "".join(f"{name:>17}" for name in parts)]
    for i in order:
        cells = (f"{counts[i]:9,} {counts[i] / totals[name]:7.1%}" for name, counts in parts.items())
        lines.append(f"  {labels[i]:{wide}}" + "".join(cells))
    return [*lines, *([f"  and {len(labels) - len(order)} more"] if len(order) < len(labels) else [])]


def length_lines(sizes: np.ndarray, buckets: Sequence[int], *, block: str = "█") -> list[str]:
    """How many rows fit each padded length and none that is shorter.

    Args:
      sizes: [rows], tokens of each.
    """
    edges = [0, *buckets]
    counts = [int(((sizes > low) & (sizes <= high)).sum()) for low, high in itertools.pairwise(edges)]
    names = [f"{low + 1}-{high}" for low, high in itertools.pairwise(edges)]
    return bars([(name, count) for name, count in zip(names, counts, strict=True) if count], block=block)


def example_lines(
    example: Mapping[str, np.ndarray], pieces: Sequence[str], about: Mapping[str, str], width: int = 100
) -> list[str]:
    """A row as the model is given it: its tokens between bars, in types where there are several, and what else is known of it.

    Args:
      pieces: the text of each of its tokens.
      about: for instance ``{"label": "animal"}``.
    """
    said = "".join(f", {key} {value}" for key, value in about.items())
    shown = [piece if piece.strip() else repr(piece) for piece in pieces[:_MOST_TOKENS]]
    more = f" | ... {len(pieces) - _MOST_TOKENS} more" if len(pieces) > _MOST_TOKENS else ""
    lines = [f"  {len(pieces)} tokens{said}"]
    lines += textwrap.wrap(" | ".join(shown) + more, width, initial_indent="    ", subsequent_indent="    ")
    types = example.get("types")
    if types is not None and len(set(types.tolist())) > 1:
        changes = [0, *(np.flatnonzero(np.diff(types)) + 1).tolist(), len(types)]
        spans = [f"{types[a]} of tokens {a}-{b - 1}" for a, b in itertools.pairwise(changes)]
        lines.append(f"    types: {', '.join(spans)}")
    return lines
