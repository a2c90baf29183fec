"""Tags of words: of character spans, of pieces of words, and what entities they make (against seqeval)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities
from tiny import write_tokenizer

from jaxft.data.processors.tokenizer import Tokenizer, Window
from jaxft.data.tagging import continuations, counting, entities_of, label_pieces, tags_of_spans, word_spans
from jaxft.errors import UserError

# "New York is big" and the place of each word
WORDS = [(0, 3), (4, 8), (9, 11), (12, 15)]


def span(start: Any, end: Any, label: Any = "CITY") -> dict[str, Any]:
    return {"start": start, "end": end, "label": label}


def refused(*spans: Any, words: list[tuple[int, int]] = WORDS, length: int | None = 16) -> str:
    with pytest.raises(UserError) as caught:
        tags_of_spans(spans, words, "BIO", "a.jsonl:3", length)
    assert str(caught.value).startswith("a.jsonl:3: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------- spans


def test_tags_of_spans() -> None:
    assert tags_of_spans([], WORDS, "BIO", "") == (["O"] * 4, 0)
    both = [span(12, 15, "SIZE"), span(0, 8)]
    assert tags_of_spans(both, WORDS, "BIO", "") == (["B-CITY", "I-CITY", "O", "B-SIZE"], 0)
    assert tags_of_spans(both, WORDS, "BIOES", "") == (["B-CITY", "E-CITY", "O", "S-SIZE"], 0)
    assert tags_of_spans([span(0, 11)], WORDS, "BIOES", "")[0] == ["B-CITY", "I-CITY", "E-CITY", "O"]
    # Blanks at its ends do no harm; a label is named as labels are.
    assert tags_of_spans([span(3, 9, 1.0)], WORDS, "BIO", "") == (["O", "B-1", "O", "O"], 0)


def test_a_span_that_begins_or_ends_inside_a_word_gets_the_word() -> None:
    assert tags_of_spans([span(1, 8), span(9, 10, "X"), span(12, 15)], WORDS, "BIO", "") == (
        ["B-CITY", "I-CITY", "B-X", "B-CITY"],
        2,
    )
    assert tags_of_spans([span(1, 2)], WORDS, "BIOES", "") == (["S-CITY", "O", "O", "O"], 1)


def test_what_was_cut_off_has_no_tag() -> None:
    assert tags_of_spans([span(20, 24), span(12, 19)], WORDS, "BIO", "", 30) == (["O", "O", "O", "B-CITY"], 0)


def test_spans_that_cannot_be() -> None:
    assert "span 4 to 11 (X) overlaps span 0 to 8 (CITY)" in refused(span(0, 8), span(4, 11, "X"))
    assert "overlaps" in refused(span(0, 8), span(0, 8))
    assert "(CITY) and the span before it have a word in common, characters 0 to 3" in refused(span(0, 1), span(1, 3))
    assert "is empty" in refused(span(4, 4))
    assert "is empty" in refused(span(4, 1))
    assert "outside of the text, which has 16 characters" in refused(span(4, 17))
    assert "outside of the text, which has 15 characters" in refused(span(4, 17), length=None)
    assert "outside" in refused(span(-1, 3))
    assert "holds no word" in refused(span(3, 4))
    assert "has no label" in refused(span(0, 3, " "))
    assert "has no label" in refused(span(0, 3, None))
    assert "must be whole numbers" in refused(span(0.0, 3))
    assert "must be whole numbers" in refused(span(False, 3))
    assert 'is no span; expected {"start": 0, "end": 5, "label": "NAME"}' in refused({"start": 1, "stop": 4})
    assert "is no span" in refused("B-CITY")


@st.composite
def entities(draw: st.DrawFn) -> tuple[list[tuple[int, int]], list[tuple[str, int, int]]]:
    """Words in a text, and entities of some of them that do not touch each other's words."""
    words, at = [], draw(st.integers(0, 2))
    for length in draw(st.lists(st.integers(1, 4), min_size=1, max_size=12)):
        words.append((at, at + length))
        at += length + draw(st.integers(0, 2))
    found, word = [], 0
    while word < len(words):
        stop = draw(st.integers(word + 1, len(words)))
        if draw(st.booleans()):
            found.append((draw(st.sampled_from(["X", "Y-Z", "O"])), word, stop))
        word = stop
    return words, found


@settings(max_examples=150)
@given(entities(), st.sampled_from(["BIO", "BIOES"]))
def test_spans_come_back_from_their_tags(
    made: tuple[list[tuple[int, int]], list[tuple[str, int, int]]], scheme: Literal["BIO", "BIOES"]
) -> None:
    words, found = made
    spans = [span(words[first][0], words[stop - 1][1], label) for label, first, stop in found]
    tags, widened = tags_of_spans(spans[::-1], words, scheme, "")
    assert not widened
    assert entities_of(tags) == found


# --------------------------------------------------------------------------------------------------- pieces and windows


def window(words: list[int], first: int) -> Window:
    marked = [-1, *words, -1]
    return Window(0, [9] * len(marked), [0] * len(marked), marked, [(0, 1)] * len(marked), first, 0)


def test_each_word_counts_where_it_has_the_most_context() -> None:
    # Eight tokens: the words 0, 1 (two pieces), 2, 3 (two pieces), 4, 5; windows of five tokens, three in common.
    windows = [window([0, 1, 1, 2, 3], 0), window([1, 2, 3, 3, 4], 2), window([3, 3, 4, 5], 4)]
    found = [np.flatnonzero(mask).tolist() for mask in counting(windows)]
    # Word 1 begins in the first window alone; 2 has one token beside it in both, 3 none in the first but two in the second.
    assert found == [[1, 2, 4], [3], [3, 4]]
    assert [mask.dtype for mask in counting(windows)] == [bool] * 3
    assert [mask.tolist() for mask in counting([window([], 0)])] == [[False, False]]
    assert counting([]) == []


@settings(max_examples=100)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(4, 12), st.integers(0, 9))
def test_each_word_counts_once(pieces: list[int], room: int, stride: int) -> None:
    words = [word for word, count in enumerate(pieces) for _ in range(count)]
    stride = min(stride, room - 1)
    starts = range(0, max(1, len(words) - stride), room - stride)
    windows = [window(words[start : start + room], start) for start in starts]
    counted = []
    for one, mask in zip(windows, counting(windows), strict=True):
        for place in np.flatnonzero(mask).tolist():
            counted.append(one.words[place])
            begin = one.first + place - 1
            assert begin == words.index(one.words[place])  # its first piece
            context = min(place - 1, len(one.words) - 2 - place)
            others = [(begin - w.first, len(w.words) - 3 - (begin - w.first)) for w in windows]
            assert context == max(min(pair) for pair in others)
    assert sorted(counted) == sorted(set(words))


def test_continuations() -> None:
    names = ["O", "B-X", "I-X", "B-Y", "E-Z", "S-Z", "S-W", "I-W", "B", "I", "BX", "NN"]
    assert [names[i] for i in continuations(names)] == [
        *("O", "I-X", "I-X", "B-Y", "E-Z", "E-Z", "I-W", "I-W", "I", "I", "BX", "NN")
    ]
    assert continuations([]).shape == (0,)


def test_labels_of_pieces() -> None:
    windows = [window([0, 0, 2, 2], 0), window([2, 2, 3], 3)]
    classes = np.array([1, 0, 1, 0])
    first = label_pieces(windows, classes)
    assert [row.tolist() for row in first] == [[-1, 1, -1, 1, -1, -1], [-1, -1, -1, 0, -1]]
    every = label_pieces(windows, classes, continuations(["O", "B-X", "I-X"]))
    assert [row.tolist() for row in every] == [[-1, 1, 2, 1, 2, -1], [-1, 2, 2, 0, -1]]
    assert every[0].dtype == np.int32


def test_places_of_words_in_overlapping_windows(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer", extra=("##s", "##x"))
    text = " The cats, and (dogxs) "
    for stride in (0, 1, 2):
        windows = list(Tokenizer(tmp_path / "tokenizer", 5).windows([text], stride=stride))
        assert [text[a:b] for a, b in word_spans(text, windows)] == ["The", "cats", ",", "and", "(", "dogxs", ")"]
    (cut,) = Tokenizer(tmp_path / "tokenizer", 4).windows([text])
    assert word_spans(text, [cut]) == [(1, 4), (5, 8)]
    tags = tags_of_spans([span(5, 9), span(16, 21, "PET")], word_spans(text, [cut]), "BIO", "", len(text))
    assert tags == (["O", "B-CITY"], 0)


# ------------------------------------------------------------------------------------------------------------- entities

_TEXT = """
O B-X I-X E-X S-X B-Y I-Y E-Y S-Y B I E S B- I- - _ . O-X B-MISC-x I-MISC-x LOC NN X BX O_ B_X ü-X I--X é
"""
TAGS = [str(tag) for tag in _TEXT.split()]


def reference(tags: list[str]) -> list[tuple[str, int, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [(label, first, last + 1) for label, first, last in get_entities(tags)]


@settings(max_examples=400)
@given(st.lists(st.sampled_from(TAGS), max_size=12) | st.lists(st.text(min_size=1, max_size=4), max_size=6))
def test_entities_are_those_of_seqeval(tags: list[str]) -> None:
    assert entities_of(tags) == reference(tags)


def test_entities_of_all_short_sequences() -> None:
    few = ["O", "B-X", "I-X", "E-X", "S-X", "B-Y", "I-Y", "X"]
    for first in few:
        for second in few:
            for third in few:
                assert entities_of([first, second, third]) == reference([first, second, third])


def test_an_empty_tag_is_refused() -> None:
    with pytest.raises(UserError, match="tag 1 is empty"):
        entities_of(["O", ""])
