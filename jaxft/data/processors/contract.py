"""What turns raw values into arrays: read from a model folder, and written back at export."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Integer

from jaxft.data.processors.windows import Window


class SpecialIds(NamedTuple):
    """Ids of tokens that are not text. None: the files name no such token; whoever needs it refuses."""

    pad: int | None = None
    mask: int | None = None
    first: int | None = None
    """Id of the token that BERT begins rows with."""
    separator: int | None = None
    begin: int | None = None
    """Id of the token that begins a text."""
    end: int | None = None
    """Id of the token that ends a text."""
    unknown: int | None = None
    """Id of the token that stands for an unknown word."""

    @property
    def before(self) -> tuple[int, ...]:
        """What documents may begin with that is no text: the token that begins texts or, where there is none, ends the text before; and
        the one that BERT's rows begin with."""
        usual = self.end if self.begin is None else self.begin
        return tuple(dict.fromkeys(one for one in (usual, self.first) if one is not None))


class Languages(NamedTuple):
    """Languages, as a tokenizer calls them; None: as its files say."""

    source: str | None = None
    target: str | None = None


AS_FILES_SAY = Languages()


class Processor(Protocol):
    """What is read of a model folder beside its weights, whatever it takes in."""

    @property
    def folder(self) -> Path:
        """Where it was read."""
        ...

    @property
    def files(self) -> tuple[str, ...]:
        """The names that its files may have."""
        ...

    @property
    def max_length(self) -> int | None:
        """Tokens kept per row; None: all, or there are no tokens."""
        ...

    @property
    def pad_id(self) -> int:
        """What rows are padded with. Nothing sees it: 0 where there is no such token."""
        ...

    def digest(self) -> str:
        """A hash of what it means: equal where it gives the same arrays."""
        ...

    def save(self, folder: Path, max_length: int | None = None) -> None:
        """Writes files that mean the same."""
        ...


class TextProcessor(Processor, Protocol):
    """Text to token ids."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that it can produce."""
        ...

    @property
    def special(self) -> SpecialIds:
        """Ids of the special tokens that the files name."""
        ...

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of all tokens that are not text; the unknown token stands for a word."""
        ...

    @property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the tokens that are put before a single text, and behind it."""
        ...

    @property
    def target(self) -> TextProcessor:
        """The processor of texts that a model writes: itself, unless those are cut into other pieces or marked with another language."""
        ...

    @property
    def marks_languages(self) -> bool:
        """Whether texts are marked with their languages."""
        ...

    @property
    def language(self) -> int | None:
        """Id of the token that marks the language of texts that a model writes; None: none does."""
        ...

    def pieces(self, ids: Integer[np.ndarray, " S"]) -> list[str]:
        """The vocabulary's own text of each token, as it is written there (``##ing``, ``Ġthe``)."""
        ...

    def count_types(self, *, paired: bool) -> int:
        """One more than the largest token type in rows of one text, or of two."""
        ...

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, split: bool = False
    ) -> list[tuple[list[int], list[int], int]]:
        """Per row: token ids, token types, and how many tokens were cut off.

        Args:
          split: what is cut off of single texts becomes rows of its own, right after.
        """
        ...

    def plain(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Per row: token ids of a text with nothing put around it, and each token's first character and the one after its last."""
        ...

    def windows(
        self, texts: Sequence[str] | Sequence[Sequence[str]], *, split_words: bool = False, stride: int | None = None
    ) -> Iterator[Window]:
        """Rows with each token's word and place in the text, in order; a row has one window, or several with ``stride``.

        Args:
          split_words: each row is a list of words.
          stride: tokens that a window has in common with the one before; None: the end of what is too long is cut off.
        """
        ...

    def pair_windows(
        self, texts: Sequence[str], pairs: Sequence[str], where: Sequence[str], *, stride: int | None = None
    ) -> Iterator[Window]:
        """Pairs with each token's place in the second text, in order; a pair has one window, or several with ``stride``, each with the
        whole first text.

        Args:
          where: what messages call each pair.
          stride: as in :meth:`windows`, for second texts.
        """
        ...
