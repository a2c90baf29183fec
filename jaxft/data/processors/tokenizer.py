"""Text to token ids, with the fast `tokenizers` library alone: importing `transformers` costs seconds."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jax import Array
from jaxtyping import Int32, Integer

from jaxft.data.processors.contract import AS_FILES_SAY, Languages, SpecialIds
from jaxft.data.processors.cutting import count_dropped, cut_pairs
from jaxft.data.processors.padding import pad_rows, padded_length
from jaxft.data.processors.panics import Panic, told_as_errors
from jaxft.data.processors.tokenizer_files import TOKENIZER_FILES, has_tokenizer, read_files
from jaxft.data.processors.tokenizer_saving import save_files
from jaxft.data.processors.windows import Window, check_pair_room, check_room, cut, whole_pairs, whole_tokens
from jaxft.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding

__all__ = ["Tokenizer", "Window", "has_tokenizer"]

_CHUNK = 1024  # rows tokenised at a time: enough to keep the library's threads busy

# Letters and marks that normalizers, splitters and added tokens are known to treat each in its own way.
_KINDS_OF_TEXT = (
    "The quick Brown FOX, over 12 lazy dogs' tails.",
    "  two  blanks,\ttab\nline\r\n\u00a0end ",
    "na\u00efve E\u0301COLE \u0130stanbul stra\u00dfe \ufb01ne \u2167 \u200bx\ufeff",
    "\u6771\u4eac \ud55c\uad6d\uc5b4 \u041f\u0440\u0438\u0432\u0435\u0442 \u0939\u093f\u0928\u094d\u0926\u0940 \U0001f642",
    "[MASK] [SEP]<mask>  </s><s> <unk> [UNK]x",
    "e.g. http://a.b/c_d?e=1 1,000.5 state-of-the-art don't\u2019t",
    "",
)


class Tokenizer:
    """A Hugging Face tokenizer read from a folder.

    Calling it gives model inputs: ``tokenizer(["one text", "another"])`` or ``tokenizer(texts, pairs)`` returns a dict of
    [B, S] int32 arrays ``tokens``, ``mask`` and ``types`` (those that the model takes), padded to the longest row.
    """

    files = TOKENIZER_FILES

    def __init__(
        self,
        folder: Path,
        max_length: int | None = None,
        inputs: Collection[str] | None = None,
        model_type: str | None = None,
        languages: Languages = AS_FILES_SAY,
    ) -> None:
        """Reads the tokenizer in ``folder``; rows are truncated to ``max_length`` tokens (None: never).

        Args:
          folder: with the tokenizer's files.
          max_length: tokens kept per row.
          inputs: what a call gives of ``tokens``, ``mask`` and ``types``: what the model takes; None: all.
          model_type: of the model, for folders whose config.json does not say.
          languages: that texts are marked with, where not as the files say.

        Raises:
          UserError: there is no tokenizer, its files are malformed, or it does not know a language.
        """
        self.folder = folder
        self.max_length = max_length
        self.languages = languages
        self._inputs = inputs
        self._files = read_files(folder, model_type, languages)
        self._fast = self._files.fast
        named = ("pad", "mask", "cls", "sep", "bos", "eos", "unk")
        self.special = SpecialIds(*(self._id_of(f"{name}_token") for name in named))
        self._truncate(self._files.truncation_side)

    @property
    def pad_id(self) -> int:
        """What rows are padded with. Nothing sees it: 0 where the files name no such token."""
        return 0 if self.special.pad is None else self.special.pad

    @property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of the tokens that are put before a single text, and behind it."""
        row = self._fast.encode("a")
        text = [place for place, put in enumerate(row.special_tokens_mask) if not put]
        first, last = (text[0], text[-1] + 1) if text else (0, 0)
        return tuple(row.ids[:first]), tuple(row.ids[last:])

    @cached_property
    def target(self) -> Tokenizer:
        """The tokenizer of texts that a model writes: itself, unless those are cut into other pieces or marked with another language."""
        if self._files.target is None:
            return self
        made = copy.copy(self)
        made._files = dataclasses.replace(self._files, fast=self._files.target, target=None)
        made._fast = made._files.fast
        made._truncate(made._files.truncation_side)
        return made

    @property
    def language(self) -> int | None:
        """Id of the token that marks the language of texts that a model writes; None: none does."""
        said = self._files.stated.get("tgt_lang")
        return None if said is None else self._fast.token_to_id(said)

    @property
    def marks_languages(self) -> bool:
        """Whether texts are marked with their languages."""
        return "src_lang" in self._files.stated

    @property
    def vocab_size(self) -> int:
        """One more than the largest id that this tokenizer can produce."""
        vocabulary = self._fast.get_vocab(with_added_tokens=True).values()
        # What is put around texts has ids of its own in tokenizer.json, which need not be the vocabulary's.
        try:
            with told_as_errors():
                around = (*self._fast.encode("").ids, *self._fast.encode("", "").ids)
        except Panic as error:
            raise UserError(
                f"{self.folder}: its tokenizer cannot tokenize the empty text: {error}; correct it"
            ) from error
        return max(*vocabulary, *around) + 1

    def decode(
        self, ids: Integer[Array | np.ndarray, "*rows S"] | Sequence[object], *, special: bool = False
    ) -> str | list[str]:
        """Text of token ids [S], or a list of texts of [B, S]; without special tokens (padding among them) unless ``special``."""
        rows, left_out = np.asarray(ids), set() if special else set(self.special_ids)
        kept = [[i for i in row if i not in left_out] for row in np.atleast_2d(rows).tolist()]
        found = self._fast.decode_batch(kept, skip_special_tokens=False)
        return found if rows.ndim == 2 else found[0]

    def pieces(self, ids: Integer[np.ndarray, " S"]) -> list[str]:
        """The vocabulary's own text of each token, as it is written there (``##ing``, ``Ġthe``)."""
        return [self._fast.id_to_token(i) or f"<{i}>" for i in ids.tolist()]

    def spans(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        length: int | None = None,
        buckets: Sequence[int] | None = None,
    ) -> dict[str, Int32[np.ndarray, "B S *pair"]]:
        """Where each token comes from, in the same rows and columns that calling the tokenizer gives.

        Returns:
          ``offsets`` [B, S, 2] int32: its first character and the one after its last, in its own text; ``words`` [B, S] int32: the
          how-manieth word of that text it is of, counted from 0 as the tokenizer splits words; ``sources`` [B, S] int32: 0 in the
          first text, 1 in its pair. All -1 for special tokens and padding.
        """
        texts = [texts] if isinstance(texts, str) else texts
        pairs = [pairs] if isinstance(pairs, str) else pairs
        inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        try:
            with told_as_errors():
                rows = self._fast.encode_batch(inputs)  # the fast form that encode() uses does not count characters
        except Exception as error:  # tokenizers raises bare Exceptions
            raise self._unencodable(error) from error
        width = padded_length(max(map(len, rows), default=1), length, buckets)
        out = {name: np.full((len(rows), width), -1, np.int32) for name in ("words", "sources")}
        offsets = np.full((len(rows), width, 2), -1, np.int32)
        for i, row in enumerate(rows):
            for j, source in enumerate(row.sequence_ids):
                if source is not None:
                    word = row.word_ids[j]
                    out["words"][i, j], out["sources"][i, j] = -1 if word is None else word, source
                    offsets[i, j] = row.offsets[j]
        return {"offsets": offsets, **out}

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, split: bool = False
    ) -> list[tuple[list[int], list[int], int]]:
        """Per row: token ids, token types, and how many tokens were cut off.

        Args:
          split: what is cut off of single texts becomes rows of its own, right after; a row is then never said to be cut.
        """
        if pairs is not None:
            rows = ((e.ids, self._types_of(e), kept, cut) for e, kept, cut in self._cut_pairs(texts, pairs))
            return [(_at(ids, kept), _at(types, kept), cut) for ids, types, kept, cut in rows]
        if split:  # the parts of a text come in its own order, whatever side would be cut off
            self._truncate("right")
        encodings = self._encodings(list(texts))
        if split:
            self._truncate(self._files.truncation_side)
            return [(part.ids, self._types_of(part), 0) for e in encodings for part in (e, *e.overflowing)]
        special = self._fast.num_special_tokens_to_add(False)
        return [(e.ids, self._types_of(e), count_dropped(e, special)) for e in encodings]

    def plain(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Per row: token ids of a text with nothing put around it and nothing cut off, and each token's first character and the one after
        its last.

        Raises:
          UserError: a text cannot be encoded.
        """
        limits = self._fast.truncation
        self._fast.no_truncation()
        try:
            with told_as_errors():
                found = self._fast.encode_batch(list(texts), add_special_tokens=False)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise self._unencodable(error) from error
        finally:
            if limits is not None:
                self._fast.enable_truncation(**limits)
        return [(one.ids, one.offsets) for one in found]

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of single texts alone, as :meth:`encode` gives them."""
        return [encoding.ids for encoding in self._encodings(list(texts))]

    def windows(
        self, texts: Sequence[str] | Sequence[Sequence[str]], *, split_words: bool = False, stride: int | None = None
    ) -> Iterator[Window]:
        """Rows with each token's word and place in the text, in order; a row has one window, or several with ``stride``.

        Args:
          split_words: each row is a list of words. Tokenised as ``is_split_into_words=True`` and ``add_prefix_space=True`` say in
            transformers: a word begins as it would in a text, after a blank.
          stride: rows of more than ``max_length`` tokens become windows that have so many tokens in common with the one before; None:
            the end of such rows is cut off (always the end: ``truncation_side`` of the files is not looked at).

        Raises:
          UserError: a window has no room for text, or would hold nothing new, or a text cannot be encoded.
        """
        check_room(self.max_length, self._fast.num_special_tokens_to_add(False), stride, str(self.folder))
        return self._windows(texts, split_words, stride)

    def _windows(
        self, texts: Sequence[str] | Sequence[Sequence[str]], split_words: bool, stride: int | None
    ) -> Iterator[Window]:
        remaining, done = iter(texts), 0
        while chunk := list(islice(remaining, _CHUNK)):
            try:
                with told_as_errors():
                    rows = whole_tokens(self._fast, chunk, split_words=split_words, typed=self._files.types)
            except Exception as error:  # tokenizers raises bare Exceptions
                raise self._unencodable(error) from error
            for row, tokens in enumerate(rows, start=done):
                yield from cut(row, tokens, self.max_length, stride)
            done += len(rows)

    def pair_windows(
        self, texts: Sequence[str], pairs: Sequence[str], where: Sequence[str], *, stride: int | None = None
    ) -> Iterator[Window]:
        """Pairs with each token's place in the second text, in order; a pair has one window, or several with ``stride``, each with the
        whole first text.

        Args:
          where: what messages call each pair.
          stride: as in :meth:`windows`, for what is too long of second texts; None: its end is cut off.

        Raises:
          UserError: a first text leaves no room for the second, or a text cannot be encoded.
        """
        try:
            with told_as_errors():
                rows = whole_pairs(self._fast, texts, pairs, typed=self._files.types)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise self._unencodable(error) from error
        for row, (tokens, place) in enumerate(zip(rows, where, strict=True)):
            check_pair_room(tokens, self.max_length, stride, place)
            yield from cut(row, tokens, self.max_length, stride)

    def _encodings(self, texts: list[str]) -> list[Encoding]:
        try:
            with told_as_errors():
                return self._fast.encode_batch_fast(texts)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise self._unencodable(error) from error

    def _cut_pairs(self, texts: Sequence[str], pairs: Sequence[str]) -> list[tuple[Encoding, list[int] | None, int]]:
        try:
            with told_as_errors():
                return list(cut_pairs(self._fast, texts, pairs))
        except Exception as error:  # tokenizers raises bare Exceptions
            raise self._unencodable(error) from error

    def _unencodable(self, error: Exception) -> UserError:
        limit = "" if self.max_length is None else f" in {self.max_length} tokens"
        return UserError(f"{self.folder}: the tokenizer cannot encode a text{limit}: {error}")

    def _types_of(self, encoding: Encoding) -> list[int]:
        return encoding.type_ids if self._files.types else [0] * len(encoding)

    def _truncate(self, side: str) -> None:
        """Makes rows of at most ``max_length`` tokens, cut off at ``side``."""
        if self.max_length is None:
            return
        try:
            self._fast.enable_truncation(self.max_length, direction=side)
        except (ValueError, OverflowError) as error:
            raise UserError(f"data.max_length={self.max_length}: {error}") from error

    def __call__(
        self,
        texts: str | Sequence[str],
        pairs: str | Sequence[str] | None = None,
        *,
        length: int | None = None,
        buckets: Sequence[int] | None = None,
    ) -> dict[str, Int32[np.ndarray, "B S"]]:
        """Model inputs for a few texts (or pairs), padded to the longest.

        Args:
          length: pad to so many tokens instead: a jitted function is compiled once.
          buckets: pad to the least of these that the longest row fits: once for each.

        Raises:
          UserError: a row is longer than that (``max_length`` truncates).
        """
        texts = [texts] if isinstance(texts, str) else texts
        pairs = [pairs] if isinstance(pairs, str) else pairs
        rows = self.encode(texts, pairs)
        width = padded_length(max((len(ids) for ids, _, _ in rows), default=1), length, buckets)
        made = pad_rows([ids for ids, _, _ in rows], [types for _, types, _ in rows], width, self.pad_id)
        return {name: array for name, array in made.items() if self._inputs is None or name in self._inputs}

    def count_types(self, *, paired: bool) -> int:
        """One more than the largest token type in rows of one text, or of two."""
        with told_as_errors():
            row = self._fast.encode("", "" if paired else None)
        return max(self._types_of(row), default=0) + 1

    @property
    def stated_length(self) -> int | None:
        """The ``model_max_length`` that the tokenizer's files state, if it is a number that means something."""
        return self._files.stated_length

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of tokens that are not text: start, separator, end, padding and mask tokens."""
        marked = {i for i, token in self._fast.get_added_tokens_decoder().items() if token.special}
        named = set(self.special._replace(unknown=None))  # the unknown token stands for a word
        return tuple(sorted(i for i in marked | named if i is not None and i != self.special.unknown))

    def _id_of(self, name: str) -> int | None:
        """The id of a named token; where the files do not speak of it, of the one that BERT's vocabularies have for it."""
        if name in self._files.denied:
            return None
        token = self._files.named.get(name, f"[{name.removesuffix('_token').upper()}]")
        return self._fast.token_to_id(token)

    def digest(self) -> str:
        """A hash of what this tokenizer means: its tokens and their ids, and what it makes of texts of many kinds."""
        self._fast.no_truncation()
        try:
            rows = [self._meant(text, pair) for pair in (None, _KINDS_OF_TEXT[0]) for text in _KINDS_OF_TEXT]
        finally:
            self._truncate(self._files.truncation_side)
        tokens = sorted(self._fast.get_vocab(with_added_tokens=True).items())
        meant = [tokens, self.special_ids, self.special.mask, self.special.end, self._files.truncation_side, rows]
        if self.target is not self:
            meant.append(self.target.digest())
        said = json.dumps(meant)
        return hashlib.sha256(said.encode()).hexdigest()

    def _meant(self, text: str, pair: str | None) -> list[list[int]] | str:
        try:
            with told_as_errors():
                row = self._fast.encode(text, pair)
        except Exception as error:  # noqa: BLE001 - tokenizers raises bare Exceptions; not every vocabulary has all letters
            return str(error)
        return [row.ids, self._types_of(row)]

    def save(self, folder: Path, max_length: int | None = None) -> None:
        """Writes tokenizer files to ``folder``, which may hold a config.json, that give the ids of this tokenizer.

        Files are copied as they are if, beside that config.json, they mean the same; else tokenizer.json is written anew, with
        a class that takes it as it is.

        Args:
          max_length: becomes ``model_max_length``; None: as stated before.
        """
        save_files(self.folder, self._files, folder, max_length)


def _at(values: list[int], kept: list[int] | None) -> list[int]:
    return values if kept is None else [values[i] for i in kept]
