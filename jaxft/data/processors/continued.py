"""Prompts as tokens that a decoder goes on with, and the text of what it makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@runtime_checkable
class Decoding(Protocol):
    """A tokenizer that gives ids their text back."""

    def decode(self, ids: Sequence[object]) -> str | list[str]:
        """The text of ids."""
        ...


def without_ends(ids: Sequence[int], ends: Sequence[int | None]) -> list[int]:
    """A prompt's tokens without those that some tokenizers put after every text, behind which nothing would follow."""
    found = list(ids)
    while found and found[-1] in ends:
        found.pop()
    return found


def text_after(tokenizer: Decoding, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens that follow a prompt's."""
    # Tokens by themselves would lose the blank that they begin with, in vocabularies that write it so.
    both, before = str(tokenizer.decode([*prompt, *tokens])), str(tokenizer.decode(list(prompt)))
    return both.removeprefix(before) if both.startswith(before) else str(tokenizer.decode(list(tokens)))
