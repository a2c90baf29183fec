"""Lengths before truncation, the limit they call for, and pairs cut by the tokenizers library's own rule."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tiny import WORDS, write_tokenizer
from tokenizers import Tokenizer as Fast

from jaxft.data.batch import text_fields
from jaxft.data.encode import encode_texts
from jaxft.data.examples import Split, make_split
from jaxft.data.lengths import Lengths, advice, lengths_text
from jaxft.data.loader import make_buckets
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.sources.rows import Row


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("lengths")
    write_tokenizer(made)
    return made


def _text(words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS[5:], k=words))


def _rows(*lengths: int) -> list[Row]:
    return [Row((_text(length, i),), "") for i, length in enumerate(lengths)]


def _encoded(rows: list[Row], tokenizer: Tokenizer) -> Split:
    return make_split("train", encode_texts(rows, tokenizer, paired=False), text_fields(tokenizer.pad_id))


def test_lengths_are_those_before_truncation(folder: Path) -> None:
    words = [0, 3, 14, 15, 29, 30, 500]
    split = _encoded(_rows(*words), Tokenizer(folder, 16))
    whole = [length + 2 for length in words]
    assert split.dropped is not None
    assert (split.sizes("length") + split.dropped).tolist() == whole
    found = Lengths(split)
    for share in range(0, 101):
        assert found.percentile(share) == np.percentile(whole, share, method="higher")
    for length in range(520):
        assert found.share_within(length) == np.mean([one <= length for one in whole])
    assert split.sizes("length").tolist() == [2, 5, 16, 16, 16, 16, 16]
    assert split.truncated == 4
    assert lengths_text(split, 16) == (
        "7 rows, 87 tokens; median 17, 95 % 502, 99 % 502, max 502; 4 truncated to 16 (57.14%)"
    )


def test_advice(folder: Path) -> None:
    split = _encoded(_rows(*[10] * 90, *[40] * 10), Tokenizer(folder, 16))
    cut = "note: 10.0% of rows cut at 16 tokens"
    assert advice(split, 16, make_buckets(None, 16), 512) == f"{cut}; data.max_length=48 holds 100.0% whole"
    assert advice(split, 16, make_buckets(None, 16), 32) == (
        f"{cut}; data.max_length=32 (the model's limit) holds 90.0% whole"
    )
    assert advice(split, 16, make_buckets(None, 16), 16) == f"{cut}, which is as many as the model can take"
    few = _encoded(_rows(*[10] * 199, 40), Tokenizer(folder, 16))
    assert advice(few, 16, make_buckets(None, 16), 512) is None
    short = _encoded(_rows(*[10] * 9, 68), Tokenizer(folder, 512))
    assert advice(short, 512, (16, 512), 512) == (
        "note: the longest training row has 70 tokens and is padded to 512; "
        "data.max_length=80 (and data.buckets left out) would be less work"
    )
    assert advice(short, 512, make_buckets(None, 512), 512) == (
        "note: the longest training row has 70 tokens and is padded to 128; "
        "data.max_length=80 (and data.buckets left out) would be less work"
    )
    assert advice(short, 80, make_buckets(None, 80), 512) is None


@pytest.mark.parametrize("direction", ["right", "left"])
def test_pairs_are_cut_as_the_library_cuts_them(folder: Path, direction: str) -> None:
    drawn = random.Random(1)
    sizes = [(drawn.randrange(0, 25), drawn.randrange(0, 25)) for _ in range(150)]
    texts, pairs = ([_text(pair[i], k) for k, pair in enumerate(sizes)] for i in (0, 1))
    for limit in (4, 5, 16, 17):
        ours = Tokenizer(folder, limit)
        theirs = Fast.from_file(str(folder / "tokenizer.json"))
        for fast in (ours._fast, theirs):
            fast.enable_truncation(limit, direction=direction)
        expected = theirs.encode_batch(list(zip(texts, pairs, strict=True)))
        found = ours.encode(texts, pairs)
        assert [(ids, types) for ids, types, _ in found] == [(e.ids, e.type_ids) for e in expected]
        assert [cut for _, _, cut in found] == [max(0, a + b + 3 - limit) for a, b in sizes]
        assert [cut > 0 for _, _, cut in found] == [bool(e.overflowing) for e in expected]
        truncation = ours._fast.truncation
        assert truncation is not None
        assert truncation["max_length"] == limit  # for the single texts that follow


def test_two_long_texts_take_no_more_than_one_of_both_lengths(folder: Path) -> None:
    # The library's answer would be 600 million pieces.
    text = _text(100) * 2000
    ((ids, types, cut),) = Tokenizer(folder, 16).encode([text], [text])
    assert len(ids) == len(types) == 16
    assert cut > 100_000
    assert np.unique(types).tolist() == [0, 1]
