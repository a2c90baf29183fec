"""Rows of words, or of running text, as windows of tokens: every token with its word and its place in the text.

What counts as a word of running text: what the tokenizer takes apart before it looks anything up in its vocabulary. Such words
are parted further in two cases, always between tokens: where letters or digits meet other characters (SentencePiece tokenizers
part texts at blanks alone, "Paris," would be one word), and in scripts that are written without blanks (Chinese, Japanese, Thai, ...).
"""

from __future__ import annotations

import copy
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from jaxft.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from tokenizers.pre_tokenizers import PreTokenizer
    from tokenizers.processors import PostProcessor

# Thai and Lao, Burmese, Khmer, then Chinese and Japanese.
_WITHOUT_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


class Window(NamedTuple):
    """A stretch of one row that fits ``max_length``, special tokens included."""

    row: int
    """Number of its row, from 0."""
    ids: list[int]
    """[S] token ids."""
    types: list[int]
    """[S] token types."""
    words: list[int]
    """[S] which word of the row each token is of, from 0; -1: special tokens. A word of which the tokenizer makes nothing has none."""
    offsets: list[tuple[int, int]]
    """[S] first character and the one after the last, in the text (or in the word, for rows of words); (-1, -1): special tokens."""
    first: int
    """Place of this window's first text token in the row's whole token sequence (without special tokens)."""
    dropped: int
    """Tokens of the row that no window holds."""


class Tokens(NamedTuple):
    """Every token of a row, with special tokens at both ends (words -1, offsets (-1, -1))."""

    ids: list[int]
    types: list[int]
    words: list[int]
    offsets: list[tuple[int, int]]
    begin: int
    """Where its text begins."""
    end: int
    """Where its text ends."""


def cut(row: int, tokens: Tokens, max_length: int | None, stride: int | None) -> Iterator[Window]:
    """The windows of one row; see :meth:`jaxft.data.processors.tokenizer.Tokenizer.windows`."""
    ids, types, words, offsets, begin, end = tokens
    if max_length is None or len(ids) <= max_length:
        yield Window(row, ids, types, words, offsets, 0, 0)
        return
    total, room = end - begin, max_length - (len(ids) - (end - begin))
    # With a stride, the last window is the first that reaches the end.
    starts = [0] if stride is None else range(0, total - stride, room - stride)
    for start in starts:
        kept = [*range(begin), *range(begin + start, min(begin + start + room, end)), *range(end, len(ids))]
        dropped = total - room if stride is None else 0
        yield Window(row, _at(ids, kept), _at(types, kept), _at(words, kept), _at(offsets, kept), start, dropped)


_T = TypeVar("_T")


def _at(column: list[_T], places: list[int]) -> list[_T]:
    return [column[place] for place in places]


def check_room(max_length: int | None, special: int, stride: int | None, where: str) -> None:
    """Raises UserError if windows of ``max_length`` tokens hold no text, or make no headway with ``stride`` tokens in common."""
    if max_length is not None and max_length <= special:
        raise UserError(
            f"{where}: rows of {max_length} tokens (data.max_length) have no room for text beside {special} special tokens"
        )
    if stride is None:
        return
    if stride < 0 or (max_length is not None and stride >= max_length - special):
        most = (
            "" if max_length is None else f" and at most {max_length - special - 1}, or a window would hold nothing new"
        )
        raise UserError(
            f"{where}: windows cannot have {stride} tokens in common (the stride); it must be at least 0{most}"
        )


def check_pair_room(tokens: Tokens, max_length: int | None, stride: int | None, where: str) -> None:
    """Raises UserError if the first text of a pair leaves no room for windows of the second one, which does not fit whole."""
    if max_length is None or len(tokens.ids) <= max_length:
        return
    beside = len(tokens.ids) - (tokens.end - tokens.begin)
    room = max_length - beside
    if room < 1:
        raise UserError(
            f"{where}: the first text and special tokens take {beside} tokens, which leaves no room for the second one in rows "
            f"of {max_length} (data.max_length); raise it, or shorten the first text, which is never cut"
        )
    if stride is not None and not 0 <= stride < room:
        raise UserError(
            f"{where}: windows of the second text cannot have {stride} tokens in common (data.stride): the first text leaves room "
            f"for {room} in rows of {max_length} (data.max_length); lower the one, or raise the other"
        )


def whole_pairs(fast: Tokenizer, texts: Sequence[str], pairs: Sequence[str], *, typed: bool) -> list[Tokens]:
    """Encodes each pair without a limit; words, places, ``begin`` and ``end`` are those of its second text.

    Args:
      fast: a backend of the tokenizers library; it is the same again when the call is over.
      typed: the model is fed token types; else they are all 0.
    """
    truncation = fast.truncation
    fast.no_truncation()
    try:
        encodings = fast.encode_batch(list(zip(texts, pairs, strict=True)))
    finally:
        if truncation is not None:
            fast.enable_truncation(**truncation)
    return [_second_of(encoding, typed) for encoding in encodings]


def _second_of(encoding: Encoding, typed: bool) -> Tokens:
    ids, sides = encoding.ids, encoding.sequence_ids
    types = encoding.type_ids if typed else [0] * len(ids)
    begin = sides.index(1) if 1 in sides else len(ids)
    end = len(ids) - sides[::-1].index(1) if 1 in sides else len(ids)
    words = cast(list[int], encoding.word_ids[begin:end])
    filled = [-1] * begin + words + [-1] * (len(ids) - end)
    places = [(-1, -1)] * begin + encoding.offsets[begin:end] + [(-1, -1)] * (len(ids) - end)
    return Tokens(ids, types, filled, places, begin, end)


def whole_tokens(
    fast: Tokenizer, texts: Sequence[str] | Sequence[Sequence[str]], *, split_words: bool, typed: bool
) -> list[Tokens]:
    """Encodes each text, or each list of words, without a limit.

    Args:
      fast: a backend of the tokenizers library; it is the same again when the call is over.
      split_words: rows are lists of words; each begins as words within a text do.
      typed: the model is fed token types; else they are all 0.
    """
    truncation, before, after = fast.truncation, fast.pre_tokenizer, fast.post_processor
    whole = not split_words and _leaves_whole(before)
    fast.no_truncation()
    try:
        if split_words and before is not None:
            fast.pre_tokenizer = _for_words(before)
        if split_words and after is not None:
            fast.post_processor = _with_prefix(after)
        encodings = fast.encode_batch(list(texts), is_pretokenized=split_words)
    finally:
        if split_words and before is not None:
            fast.pre_tokenizer = before
        if split_words and after is not None:
            fast.post_processor = after
        if truncation is not None:
            fast.enable_truncation(**truncation)
    return [
        _tokens(None if split_words else cast(str, text), encoding, whole, typed)
        for text, encoding in zip(texts, encodings, strict=True)
    ]


def _tokens(text: str | None, encoding: Encoding, whole: bool, typed: bool) -> Tokens:
    ids, words, offsets = encoding.ids, encoding.word_ids, encoding.offsets
    types = encoding.type_ids if typed else [0] * len(ids)
    begin = next((i for i, word in enumerate(words) if word is not None), len(words))
    end = next((i for i in range(len(words), begin, -1) if words[i - 1] is not None), begin)
    told = cast(list[int], words[begin:end])
    given = told if text is None else _words(text, told, offsets[begin:end], whole)
    filled = [-1] * begin + given + [-1] * (len(ids) - end)
    places = [(-1, -1)] * begin + offsets[begin:end] + [(-1, -1)] * (len(ids) - end)
    return Tokens(ids, types, filled, places, begin, end)


# ---------------------------------------------------------------------------------- lists of words: how each of them begins


def _for_words(pre: PreTokenizer) -> PreTokenizer:
    """A pre-tokenizer which takes each text for a word that follows a blank, as the words of a list do.

    That is what ``add_prefix_space=True`` means where transformers reads a tokenizer. Without it, byte-level tokenizers would take
    all words of a row for a single one.
    """
    from tokenizers import pre_tokenizers

    steps: list[Any] = _steps(pre)
    places = [i for i, step in enumerate(steps) if isinstance(step, pre_tokenizers.ByteLevel)]
    if places and not any(steps[i].add_prefix_space for i in places):
        if places[0] > 0:  # other steps part words before: the blank comes before these
            blank = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="always", split=False)
            return pre_tokenizers.Sequence([blank, *steps])
        steps[0].add_prefix_space = True
    for step in steps:
        if isinstance(step, pre_tokenizers.Metaspace) and step.prepend_scheme == "never":
            step.prepend_scheme = "always"
    return pre_tokenizers.Sequence(steps) if len(steps) != 1 else steps[0]


_Chain = TypeVar("_Chain", "PreTokenizer", "PostProcessor")


def _steps(chain: _Chain) -> list[_Chain]:
    """The steps of a pre-tokenizer or post-processor, as copies."""
    from tokenizers import pre_tokenizers, processors

    if not isinstance(chain, pre_tokenizers.Sequence | processors.Sequence):
        return [copy.deepcopy(chain)]
    steps: list[_Chain] = []
    for place in count():  # these sequences do not tell their length
        try:
            steps += _steps(chain[place])
        except IndexError:
            break
    return steps


def _with_prefix(post: PostProcessor) -> PostProcessor:
    """The post-processor that trims places of tokens (as byte-level tokenizers have one), told that the first blank is not of the text."""
    from tokenizers import processors

    steps = _steps(post)
    trimming = [step for step in steps if isinstance(step, processors.RobertaProcessing | processors.ByteLevel)]
    for step in trimming:
        step.add_prefix_space = True
    return processors.Sequence(steps) if len(steps) != 1 else steps[0]


# ------------------------------------------------------------------------------------------------ words of running text


def _leaves_whole(pre: PreTokenizer | None) -> bool:
    """Whether a pre-tokenizer leaves a text in one piece, blanks included."""
    return pre is None or len(pre.pre_tokenize_str("a b")) == 1


def _words(text: str, given: Sequence[int], offsets: Sequence[tuple[int, int]], whole: bool) -> list[int]:
    """Number of the word in a running text that each token belongs to, without gaps.

    Args:
      given: the words that the tokenizer tells.
      whole: it leaves texts in one piece: words begin at blanks.
    """
    if not given:
        return []
    groups: list[int] = []  # where each word begins
    seen: list[bool] = []  # whether it has a character that is not blank
    end = 0  # one past its last such character
    for i, (word, (first, last)) in enumerate(zip(given, offsets, strict=True)):
        start, stop = stripped(text, first, last)
        begins = not i or word != given[i - 1] or (whole and seen[-1] and start > first)
        if not begins and seen[-1] and end <= start < stop:
            begins = _are_parted(text, end, start)
        if begins:
            groups.append(i)
            seen.append(False)
        if start < stop:
            seen[-1], end = True, stop
    # Blanks that the tokenizer makes a word of belong to the word before; those that a text begins with, to its first.
    words, number, any_seen = [0] * len(given), 0, False
    for begin, stop, visible in zip(groups, [*groups[1:], len(given)], seen, strict=True):
        number += visible and any_seen
        any_seen = any_seen or visible
        words[begin:stop] = [number] * (stop - begin)
    return words


def stripped(text: str, first: int, last: int) -> tuple[int, int]:
    """A stretch of a text without the blanks at its ends."""
    while first < last and text[first].isspace():
        first += 1
    while first < last and text[last - 1].isspace():
        last -= 1
    return first, last


def _are_parted(text: str, end: int, start: int) -> bool:
    """Whether a token that begins at ``start`` is of another word than the one before, which ends at ``end``."""
    if any(map(str.isspace, text[end:start])):
        return True
    left, right = text[end - 1], text[start]
    if _WITHOUT_BLANKS.match(left) or _WITHOUT_BLANKS.match(right):
        return True
    joined = {unicodedata.category(left), unicodedata.category(right)} & {"Mn", "Mc", "Me", "Cf"}
    return not joined and left.isalnum() != right.isalnum()
