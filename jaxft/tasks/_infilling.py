"""Texts with a stretch of them last, so that a model learns to fill it in (Bavarian et al. 2022, fill in the middle).

A text is parted at two places, each anywhere, into prefix, middle and suffix. Half of the texts then read prefix, suffix, middle; half
suffix, prefix, middle, whose prefix and middle stand together as they do in the text. All its tokens are there once; what begins and ends
texts stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from jaxft.config.tasks.causal_lm import Config
from jaxft.data.processors.contract import TextProcessor
from jaxft.errors import UserError

_NAMES = (("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"), ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"))
_SUFFIX_FIRST = 0.5
"""How often the suffix comes before the prefix."""


@dataclass(frozen=True)
class Infilling:
    """Which texts are read with their middle last, and what is put between the parts: token ids."""

    rate: float
    prefix: int
    middle: int
    suffix: int
    begin: int | None
    """What begins texts, if anything does."""
    end: int | None

    room = 3
    """Tokens that are put between the parts."""

    def said(self) -> list[object]:
        """What it does, as plain JSON."""
        return ["fill_in_the_middle", self.rate, self.prefix, self.middle, self.suffix]

    def __call__(self, tokens: Int32[np.ndarray, " n"], draws: Iterator[float]) -> Int32[np.ndarray, " m"]:
        """A text as it is read: as it is, or with three tokens more."""
        if next(draws) >= self.rate:
            return tokens
        suffix_first = next(draws) < _SUFFIX_FIRST
        first = int(len(tokens) > 0 and tokens[0] == self.begin)
        last = len(tokens) - int(len(tokens) > first and tokens[-1] == self.end)
        one, other = sorted(first + int(next(draws) * (last - first + 1)) for _ in range(2))
        before, middle, after = range(first, one), range(one, other), range(other, last)
        if suffix_first:
            parts = (self.prefix, self.suffix, after, self.middle, range(first, other))
        else:
            parts = (self.prefix, before, self.suffix, after, self.middle, middle)
        made = np.empty(len(tokens) + self.room, np.int32)
        made[:first], made[last + self.room :] = tokens[:first], tokens[last:]
        at = first
        for part in parts:
            size = 1 if isinstance(part, int) else len(part)
            made[at : at + size] = part if isinstance(part, int) else tokens[part.start : part.stop]
            at += size
        return made


def infilling(options: Config, tokenizer: TextProcessor) -> Infilling | None:
    """What becomes of texts; None: they stay as they are.

    Raises:
      UserError: the tokenizer has no such tokens.
    """
    if not options.fill_in_the_middle:
        return None
    asked = options.fill_in_the_middle_tokens
    for names in (asked,) if asked else _NAMES:
        prefix, middle, suffix = (_id_of(name, tokenizer) for name in names)
        if prefix is not None and middle is not None and suffix is not None:
            special = tokenizer.special
            return Infilling(options.fill_in_the_middle, prefix, middle, suffix, special.begin, special.end)
    lacking = (
        f"no token {next(n for n in asked if _id_of(n, tokenizer) is None)!r}"
        if asked
        else "neither <|fim_prefix|> nor <fim_prefix>"
    )
    raise UserError(
        f"{tokenizer.folder}: task.fill_in_the_middle={options.fill_in_the_middle:g}: the tokenizer has {lacking}; name the tokens that "
        "begin prefix, middle and suffix in task.fill_in_the_middle_tokens"
    )


def _id_of(name: str, tokenizer: TextProcessor) -> int | None:
    """The id of a token by its name; None: texts that say it become something else."""
    ((ids, _),) = tokenizer.plain([name])
    return ids[0] if len(ids) == 1 and tokenizer.pieces(np.asarray(ids)) == [name] else None
