"""What truncation cuts off: how many tokens, and which ones of a pair.

The tokenizers library returns what it cuts off of a pair as every combination of the pieces of both texts: time and memory then
grow with the product of their lengths. So pairs are tokenised whole and cut here, by its rule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


def count_dropped(encoding: Encoding, special: int) -> int:
    """Tokens of one text that truncation cut off; ``special``: tokens that are added to each row."""
    return sum(len(part) - special for part in encoding.overflowing)


def cut_pairs(
    fast: Tokenizer, texts: Sequence[str], pairs: Sequence[str]
) -> Iterator[tuple[Encoding, list[int] | None, int]]:
    """Per pair: its whole encoding, the positions that stay (None: all), and how many tokens are cut off.

    Args:
      fast: a tokenizer of the tokenizers library, with its truncation set (``longest_first``) or not.
    """
    settings = fast.truncation
    fast.no_truncation()
    try:
        encodings = fast.encode_batch_fast(list(zip(texts, pairs, strict=True)))
    finally:
        if settings is not None:
            fast.enable_truncation(**settings)
    for encoding in encodings:
        if settings is None or len(encoding) <= settings["max_length"]:
            yield encoding, None, 0
            continue
        room = max(0, settings["max_length"] - fast.num_special_tokens_to_add(True))
        kept = _kept(encoding.sequence_ids, room, settings["direction"])
        yield encoding, kept, len(encoding) - len(kept)


def _kept(sides: list[int | None], room: int, direction: str) -> list[int]:
    """Positions of special tokens and of what stays of each text."""
    places = [[i for i, side in enumerate(sides) if side == number] for number in (0, 1)]
    first, second = longest_first(len(places[0]), len(places[1]), room)
    kept = [i for i, side in enumerate(sides) if side is None]
    for place, count in zip(places, (first, second), strict=True):
        kept += place[:count] if direction == "right" else place[len(place) - count :]
    return sorted(kept)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens that stay of two texts in ``room`` tokens: the longer one is cut to what the shorter leaves, or both to half each
    (the tokenizers library's rule; an odd token goes to the longer text).
    """
    if first + second <= room:
        return first, second
    short, long = min(first, second), max(first, second)
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    return (long, short) if first > second else (short, long)
