"""Windows of tokens with the word and the place of each: against AutoTokenizer of `transformers`, on tiny tokenizers of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import write_tokenizer
from zoo import tokenizer_folders as folders

from jaxft.data.processors.tokenizer import Tokenizer, Window
from jaxft.data.tagging import word_spans
from jaxft.errors import UserError


def camembert(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pieces = json.loads(folders._unigram())["model"]["vocab"]
    transformers.CamembertTokenizer(vocab=[tuple(piece) for piece in pieces]).save_pretrained(str(folder))


KINDS: dict[str, Callable[[Path], None]] = {
    "bert": folders.bert,
    "roberta": folders.roberta,
    "gpt2": folders.gpt2,
    "xlmr": folders.xlmr,
    "camembert": camembert,
    "llama": folders.llama,
    "words": folders.words,
}
ROW = ["The", "", "\u200b", "don't", "<mask>", "cat</s>", "Straße,", " dog", "电影很好", "x", "[SEP]", "naïve"]
TEXT = "  The cat's Straße,  (don't) 电影很好 in on\u200b <mask> [SEP] café é\u0301. 3.14a naïve\u00a0house   "


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, make in KINDS.items():
        made[name] = tmp_path_factory.mktemp(name)
        make(made[name])
    return made


def theirs(folder: Path, rows: list[Any], *, split_words: bool, **how: Any) -> tuple[Any, list[Any]]:
    """What AutoTokenizer gives, and per row (ids, words, offsets)."""
    transformers = pytest.importorskip("transformers")
    prefix = {"add_prefix_space": True} if split_words else {}
    found = transformers.AutoTokenizer.from_pretrained(str(folder), **prefix)(
        rows, is_split_into_words=split_words, return_overflowing_tokens=how.get("stride") is not None, **how
    )
    return found, [
        (
            e.ids,
            [-1 if word is None else word for word in e.word_ids],
            [(-1, -1) if word is None else offsets for word, offsets in zip(e.word_ids, e.offsets, strict=True)],
        )
        for e in found.encodings
    ]


def ours(windows: list[Window]) -> list[Any]:
    return [(window.ids, window.words, window.offsets) for window in windows]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("max_length", "stride"), [(None, None), (12, None), (12, 0), (12, 3), (7, 4)])
def test_rows_of_words_are_those_of_the_reference(
    kinds: dict[str, Path], kind: str, max_length: int | None, stride: int | None
) -> None:
    rows = [ROW, [], ["cat"], ROW * 3]
    tokenizer = Tokenizer(kinds[kind], max_length)
    found = list(tokenizer.windows(rows, split_words=True, stride=stride))
    cutting = {} if max_length is None else {"truncation": True, "max_length": max_length}
    cutting |= {} if stride is None else {"stride": stride}
    expected, encodings = theirs(kinds[kind], rows, split_words=True, **cutting)
    assert ours(found) == encodings
    assert [window.types for window in found] == expected.get("token_type_ids", [[0] * len(w.ids) for w in found])
    if stride is not None:
        assert [window.row for window in found] == expected["overflow_to_sample_mapping"]
    # A word of which nothing is left has no token.
    assert (2 in found[0].words) == (kind != "bert")
    # The tokenizer itself is as it was.
    assert tokenizer.encode(["cat " * 20])[0] == Tokenizer(kinds[kind], max_length).encode(["cat " * 20])[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [None, 0, 5])
def test_running_texts_have_the_ids_and_places_of_the_reference(
    kinds: dict[str, Path], kind: str, stride: int | None
) -> None:
    rows = [TEXT, "", "cat", TEXT * 3]
    found = list(Tokenizer(kinds[kind], 12).windows(rows, stride=stride))
    cutting = {} if stride is None else {"stride": stride}
    _, encodings = theirs(kinds[kind], rows, split_words=False, truncation=True, max_length=12, **cutting)
    assert [(ids, offsets) for ids, _, offsets in ours(found)] == [(ids, offsets) for ids, _, offsets in encodings]
    assert [window.ids for window in found if stride is None] == [
        ids for ids, _, _ in Tokenizer(kinds[kind], 12).encode(rows) if stride is None
    ]


def words_of(folder: Path, text: str) -> list[str]:
    windows = list(Tokenizer(folder).windows([text]))
    return [text[start:end] for start, end in word_spans(text, windows)]


def test_words_of_running_text(kinds: dict[str, Path]) -> None:
    """Whatever the tokenizer: parted at blanks, at punctuation, and between the tokens of scripts without blanks."""
    text = "  The cat's house,  (don't) on 电影\n3.14   "
    expected = ["The", "cat", "'", "s", "house", ",", "(", "don", "'", "t", ")", "on", "电", "影", "3", ".", "14"]
    for kind in ("bert", "roberta", "gpt2", "llama"):
        assert words_of(kinds[kind], text) == expected, kind
    # Its vocabulary is too small: unknown characters are one token.
    assert words_of(kinds["xlmr"], "the cat, (and) dog") == ["the", "cat", ",", "(", "and", ")", "dog"]
    assert words_of(kinds["llama"], "the\u200dcat  naïve") == ["the\u200dcat", "naïve"]
    assert words_of(kinds["roberta"], "   ") == [""]
    assert words_of(kinds["bert"], "   ") == []


@given(text=st.text(alphabet="ab é\u0301'.,-12 \t\n电影ก\u200b", max_size=40))
@settings(max_examples=60)
def test_words_do_not_depend_on_windows(kinds: dict[str, Path], text: str) -> None:
    for kind in ("bert", "roberta", "xlmr", "llama"):
        whole = next(iter(Tokenizer(kinds[kind]).windows([text])))
        assert [w for w in whole.words if w >= 0] == sorted(w for w in whole.words if w >= 0)
        assert set(whole.words) - {-1} == set(range(max(whole.words, default=-1) + 1))
        windows = list(Tokenizer(kinds[kind], 8).windows([text], stride=2))
        tokens = [(i, w) for i, w in zip(whole.ids, whole.words, strict=True) if w >= 0]
        seen = {}
        for window in windows:
            inside = [(i, w) for i, w in zip(window.ids, window.words, strict=True) if w >= 0]
            seen |= {window.first + place: token for place, token in enumerate(inside)}
            assert window.dropped == 0
        assert [seen[place] for place in range(len(tokens))] == tokens
        spans = word_spans(text, windows)
        assert spans == word_spans(text, [whole])
        assert spans == sorted(spans)
        assert all(text[start:end] == text[start:end].strip() for start, end in spans)


def test_what_is_cut_off_is_counted(kinds: dict[str, Path], tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tiny")
    settings_path = tmp_path / "tiny/tokenizer_config.json"
    settings_path.write_text(json.dumps(json.loads(settings_path.read_text()) | {"truncation_side": "left"}))
    rows = ["red green blue", "red"]
    tokenizer = Tokenizer(tmp_path / "tiny", 4)
    for split_words in (False, True):
        given_rows = [row.split() for row in rows] if split_words else rows
        found = list(tokenizer.windows(given_rows, split_words=split_words))
        assert [(w.row, w.words) for w in found] == [(0, [-1, 0, 1, -1]), (1, [-1, 0, -1])]
        assert [(w.first, w.dropped) for w in found] == [(0, 1), (0, 0)]
        found = list(tokenizer.windows(given_rows, split_words=split_words, stride=1))
        assert [(w.row, w.words, w.first) for w in found] == [
            (0, [-1, 0, 1, -1], 0),
            (0, [-1, 1, 2, -1], 1),
            (1, [-1, 0, -1], 0),
        ]


def test_words_begin_after_a_blank_where_other_steps_part_texts_first(tmp_path: Path) -> None:
    """Llama 3's kind: a pattern parts texts, then comes the byte level, so its own setting would put blanks inside words."""
    folders.llama3(tmp_path)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    pattern = {"Regex": r"'s|'t| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    words = ["the", "cat", "don't", "(dog)", "3.14"]
    (found,) = Tokenizer(tmp_path).windows([words], split_words=True)
    assert found.ids == Tokenizer(tmp_path).encode([" " + " ".join(words)])[0][0]
    assert found.words == sorted(found.words)
    assert set(found.words) == {0, 1, 2, 3, 4}


def test_windows_that_cannot_be(kinds: dict[str, Path]) -> None:
    for max_length, stride, message in (
        (2, None, "rows of 2 tokens .data.max_length. have no room for text beside 2 special tokens"),
        (8, 6, "6 tokens in common .the stride.; it must be at least 0 and at most 5"),
        (8, -1, "-1 tokens in common"),
        (None, -1, "it must be at least 0$"),
    ):
        with pytest.raises(UserError, match=message):
            Tokenizer(kinds["bert"], max_length).windows(["cat"], stride=stride)
    assert len(list(Tokenizer(kinds["bert"], 8).windows(["cat " * 20], stride=5))) == 15
