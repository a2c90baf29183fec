"""One tag per word and what it stands for: character spans to tags, tags to pieces of words, tags to entities.

A tag is a label with a prefix that says where in an entity its word stands: ``B-`` the first, ``I-`` a further one, and in the BIOES
scheme ``E-`` the last of several, ``S-`` the only one; ``O``: in no entity.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from jaxft.data.labels import label_text
from jaxft.data.processors.windows import Window, stripped
from jaxft.errors import UserError

Scheme = Literal["BIO", "BIOES"]


def word_spans(text: str, windows: Sequence[Window]) -> list[tuple[int, int]]:
    """The characters of each word of a running text, blanks around it left out: its first and the one after its last.

    Args:
      windows: all of this text. Of a text that was cut off, words and parts of words that no window holds are left out.
    """
    found: list[tuple[int, int]] = []
    for window in windows:
        for word, (first, last) in zip(window.words, window.offsets, strict=True):
            if word < 0:
                continue
            first, last = stripped(text, first, last)
            if word == len(found):
                found.append((first, last))
            elif first < last:  # pieces that are blank say nothing of a word's place
                start, end = found[word]
                found[word] = (min(start, first), max(end, last)) if start < end else (first, last)
    return found


def tags_of_spans(
    spans: Sequence[object],
    words: Sequence[tuple[int, int]],
    scheme: Scheme,
    where: str,
    length: int | None = None,
) -> tuple[list[str], int]:
    """One tag per word, of character spans; and how many spans begin or end inside a word, and so got the whole of it.

    Args:
      spans: ``{"start": 2, "end": 7, "label": "CITY"}``: the first character and the one after the last; in any order.
      words: the characters of each word (:func:`word_spans`).
      where: what messages call the row.
      length: of the text in characters; None: it ends with its last word. Spans behind the last word have no tag: cut off.

    Raises:
      UserError: a span that is malformed, empty, or outside of the text, that overlaps another one, has a word in common with another
        one, or holds no word.
    """
    starts, ends = [start for start, _ in words], [end for _, end in words]
    size = max(ends, default=0) if length is None else length
    tags, widened, before, taken = ["O"] * len(words), 0, None, 0
    for start, end, label in sorted(_checked(span, size, where) for span in spans):
        shown = f"span {start} to {end} ({label})"
        if before and start < before[1]:
            raise UserError(
                f"{where}: {shown} overlaps span {before[0]} to {before[1]} ({before[2]}); a word has one tag, keep one of the two"
            )
        before = start, end, label
        if start >= max(ends, default=0):
            continue
        first, stop = bisect_right(ends, start), bisect_left(starts, end)
        if first >= stop:
            raise UserError(f"{where}: {shown} holds no word, but blanks or what the tokenizer leaves out; remove it")
        if first < taken:
            raise UserError(
                f"{where}: {shown} and the span before it have a word in common, characters {starts[first]} to {ends[first]}; "
                "a word has one tag, keep one of the two"
            )
        widened += starts[first] < start or ends[stop - 1] > end
        tags[first:stop] = _tags(label, stop - first, scheme)
        taken = stop
    return tags, widened


def _tags(label: str, count: int, scheme: Scheme) -> list[str]:
    """Tags of the words of one entity."""
    marks = ["B"] + ["I"] * (count - 1)
    if scheme == "BIOES":
        marks[-1] = "S" if count == 1 else "E"
    return [f"{mark}-{label}" for mark in marks]


def _checked(span: object, size: int, where: str) -> tuple[int, int, str]:
    if not isinstance(span, Mapping) or not {"start", "end", "label"} <= set(span):
        raise UserError(f'{where}: {span!r:.80} is no span; expected {{"start": 0, "end": 5, "label": "NAME"}}')
    start, end, label = span["start"], span["end"], label_text(span["label"])
    if not all(isinstance(place, int) and not isinstance(place, bool) for place in (start, end)):
        raise UserError(
            f"{where}: span {start!r} to {end!r}: start and end must be whole numbers, places of characters"
        )
    if not label:
        raise UserError(f"{where}: span {start} to {end} has no label")
    if start >= end:
        raise UserError(f"{where}: span {start} to {end} ({label}) is empty; end is the place after its last character")
    if start < 0 or end > size:
        raise UserError(f"{where}: span {start} to {end} ({label}) is outside of the text, which has {size} characters")
    return start, end, label


# --------------------------------------------------------------------------------------------------------- pieces of words


def _places(window: Window) -> np.ndarray:
    """[S] place of each token in the row's whole sequence; -1: special tokens."""
    inside = np.asarray(window.words, np.int64) >= 0
    return np.where(inside, window.first + np.cumsum(inside) - 1, -1)


def _first_pieces(windows: Sequence[Window]) -> list[np.ndarray]:
    """Per window of one row, [S] bool: the first piece of each word. A window may begin with further pieces of one."""
    first: dict[int, int] = {}
    places = [_places(window) for window in windows]
    for window, at in zip(windows, places, strict=True):
        for word, place in zip(window.words, at.tolist(), strict=True):
            if place >= 0 and place < first.get(word, place + 1):
                first[word] = place
    found = [np.fromiter((first.get(word, -1) for word in window.words), np.int64) for window in windows]
    return [(at >= 0) & (at == begins) for at, begins in zip(places, found, strict=True)]


def counting(windows: Sequence[Window]) -> list[np.ndarray]:
    """Per window of one row, [S] bool: where a word counts. That is at its first piece, in one window only.

    Of several windows that hold it, the one where it has the most context: the larger of the smaller numbers of tokens to its left
    and to its right, special tokens aside; the earlier window, if two have the same.
    """
    masks = _first_pieces(windows)
    best: dict[int, tuple[int, int, int]] = {}  # by word: context, window, place in it
    for number, (window, mask) in enumerate(zip(windows, masks, strict=True)):
        inside = np.asarray(window.words, np.int64) >= 0
        left = np.cumsum(inside) - 1
        context = np.minimum(left, inside.sum() - 1 - left)
        for place in np.flatnonzero(mask).tolist():
            word = window.words[place]
            if word not in best or context[place] > best[word][0]:
                best[word] = int(context[place]), number, place
    counts = [np.zeros(len(window.words), bool) for window in windows]
    for _, number, place in best.values():
        counts[number][place] = True
    return counts


def continuations(names: Sequence[str]) -> np.ndarray:
    """[C] int32: the class of a word's further pieces, by the class of the word.

    An entity goes on in them: of ``B-X`` it is ``I-X``, of ``S-X`` it is ``E-X``, or ``I-X`` if there is no such class (of the tags ``B``
    and ``S`` likewise). It is the word's own class in all other cases: ``I-X``, ``E-X``, ``O``, other tags, and where there is no class
    to go on with.
    """
    ids = {name: i for i, name in enumerate(names)}

    def further(name: str) -> int:
        label = name[1:]
        options = {"B": "I", "S": "EI"}.get(name[:1], "") if label[:1] in ("", "-") else ""
        return next((ids[mark + label] for mark in options if mark + label in ids), ids[name])

    return np.array([further(name) for name in names], np.int32)


def label_pieces(
    windows: Sequence[Window], classes: Sequence[int] | np.ndarray, further: np.ndarray | None = None
) -> list[np.ndarray]:
    """Per window of one row, [S] int32: the class of each token; -1: none.

    Args:
      classes: [W] of each word.
      further: [C] from :func:`continuations`: pieces of a word after its first have a class too; None: they have none. The first
        piece always has the word's own class, as that is where a word's answer is read.
    """
    of_word = np.asarray(classes, np.int32)
    rows = []
    for window, first in zip(windows, _first_pieces(windows), strict=True):
        words = np.asarray(window.words, np.int64)
        row = np.full(len(words), -1, np.int32)
        row[first] = of_word[words[first]]
        if further is not None:
            rest = (words >= 0) & ~first
            row[rest] = further[of_word[words[rest]]]
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------------- entities


def entities_of(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Entities in a sequence of tags: label, first word, the one after the last.

    The rule is the lenient one of conlleval, as seqeval has it by default: an entity begins wherever its label changes or a ``B-`` or
    ``S-`` says so, with ``I-`` and ``E-`` too. What comes after the first hyphen is the label; of a tag that has none, what follows
    its first character (``_`` if that is nothing).
    """
    entities: list[tuple[str, int, int]] = []
    before, label, begin = "O", "", 0
    parts: dict[str, tuple[str, str]] = {}
    for i, tag in enumerate((*tags, "O")):
        found = parts.get(tag)
        if found is None:
            if not tag:
                raise UserError(f"tag {i} is empty; words of no entity have the tag O")
            found = parts[tag] = tag[0], tag[1:].split("-", maxsplit=1)[-1] or "_"
        mark, kind = found
        if before not in "O." and kind != label:
            ends, begins = True, mark not in "O."
        else:
            ends = before in "ES" or (before in "BI" and mark in "BSO")
            begins = mark in "BS" or (mark in "EI" and before in "ESO") or (mark not in "O." and kind != label)
        if ends:
            entities.append((label, begin, i))
        if begins:
            begin = i
        before, label = mark, kind
    return entities
