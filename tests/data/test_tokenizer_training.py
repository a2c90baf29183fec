"""Tokenizers learnt of texts: the same bytes each time, read alike by `transformers`, and what cannot be learnt refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from jaxft.data.processors.tokenizer import Tokenizer

Capture = pytest.CaptureFixture[str]
TEXTS = [
    "the cat runs",
    "the dog sings over the house",
    "naïve birds! and 東京 fish",
    "a tree, a road; a tree\nfast",
] * 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    return path


@pytest.mark.parametrize(
    ("kind", "use", "size"), [("wordpiece", "encoder", 120), ("bpe", "decoder", 300), ("unigram", "encoder", 60)]
)
def test_tokenizers_are_those_of_transformers(
    source: Path, tmp_path: Path, capsys: Capture, kind: str, use: str, size: int
) -> None:
    from transformers import AutoTokenizer

    command = ("tokenizer", "train", source, "data.text=body", "--kind", kind, "--for", use, "--size", size)
    for name in ("one", "two"):
        code, said, err = tiny.run(capsys, *command, "--out", tmp_path / name)
        assert code == 0, err
        assert "bytes of text a token" in said
    if kind != "unigram":
        one, two = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("one", "two"))
        assert one == two
    ours, theirs = Tokenizer(tmp_path / "one"), AutoTokenizer.from_pretrained(tmp_path / "one")
    assert theirs is not None
    assert ours.vocab_size == len(theirs) <= size
    for text in (*TEXTS[:4], "", "Another [MASK] one <|endoftext|>"):
        assert ours.ids([text])[0] == theirs(text)["input_ids"]
    assert (ours.special.mask is None) == (use == "decoder")
    assert (ours.special.end is None) == (use == "encoder")


def test_texts_of_decoders_begin_with_a_token_if_that_is_wanted(source: Path, tmp_path: Path, capsys: Capture) -> None:
    from transformers import AutoTokenizer

    command = ("tokenizer", "train", source, "data.text=body", "--kind", "bpe", "--size", 300, "--begin")
    code, _, err = tiny.run(capsys, *command, "--for", "decoder", "--out", tmp_path / "out")
    assert code == 0, err
    ours, theirs = Tokenizer(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs is not None
    assert ours.special.begin == ours.special.end == theirs.bos_token_id
    for text in TEXTS[:4]:
        ids = ours.ids([text])[0]
        assert ids == theirs(text)["input_ids"] == [ours.special.begin, *ours.plain([text])[0][0]]
    assert "is for --for decoder" in tiny.refusal(capsys, *command, "--out", tmp_path / "encoder")


def test_what_cannot_be_learnt_is_refused(source: Path, tmp_path: Path, capsys: Capture) -> None:
    command = ("tokenizer", "train", source, "data.text=body", "--kind", "wordpiece", "--out", tmp_path / "out")
    assert "the letters of the texts alone take" in tiny.refusal(capsys, *command, "--size", 10)
    assert "must lie between 1 and" in tiny.refusal(capsys, *command, "--size", 0)
    assert "no column 'text'" in tiny.refusal(
        capsys, *(one for one in command if one != "data.text=body"), "--size", 90
    )
    assert not (tmp_path / "out").exists()
