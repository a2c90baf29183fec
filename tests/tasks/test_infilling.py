"""Fill in the middle: no token is lost wherever texts are read from, draws that no host changes, and refusals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from data.test_corpus import made, stream_of
from tasks.test_causal_lm import write_decoder_tokenizer
from tiny import refusal, write_tokenizer

from jaxft.config import load_config
from jaxft.config.tasks.causal_lm import Config
from jaxft.data.corpus.batches import StreamBatches
from jaxft.data.corpus.order import uniforms
from jaxft.data.corpus.reading import BestFit, Concatenated
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.tasks import causal_lm
from jaxft.tasks._infilling import Infilling, infilling

PREFIX, MIDDLE, SUFFIX, BEGIN, END = range(1_000_001, 1_000_006)
HALF = Infilling(0.5, PREFIX, MIDDLE, SUFFIX, BEGIN, END)
Capture = pytest.CaptureFixture[str]


def restored(tokens: Sequence[int]) -> tuple[list[int], str]:
    """A text as it was before, and how it was read: ``psm``, ``spm`` or nothing."""
    if PREFIX not in tokens:
        return [*tokens], ""
    at, suffix, middle = (list(tokens).index(one) for one in (PREFIX, SUFFIX, MIDDLE))
    last = len(tokens) - (tokens[-1] == END)
    head, tail = tokens[:at], tokens[last:]
    if suffix == at + 1:  # its prefix and middle stand together
        return [*head, *tokens[middle + 1 : last], *tokens[suffix + 1 : middle], *tail], "spm"
    prefix, after = tokens[at + 1 : suffix], tokens[suffix + 1 : middle]
    return [*head, *prefix, *tokens[middle + 1 : last], *after, *tail], "psm"


def test_draws_are_even_and_of_their_key_alone() -> None:
    found = np.array([[next(draws) for _ in range(4)] for draws in (uniforms((3, 0, one)) for one in range(4000))])
    assert found.min() >= 0
    assert found.max() < 1
    counts = np.histogramdd(found[:, :2], bins=4, range=[(0, 1)] * 2)[0]  # 250 each
    assert ((counts - 250) ** 2 / 250).sum() < 40  # chi-squared of 15 degrees: 1 in 2000
    assert np.abs(np.corrcoef(found.T) - np.eye(4)).max() < 0.06
    assert next(uniforms((3, 0, 1))) == found[1, 0] != next(uniforms((3, 1, 0)))


def test_parts_make_up_the_text_again_and_both_orders_come() -> None:
    rng, how = np.random.default_rng(0), []
    for number in range(2000):
        inner = rng.permutation(50)[: rng.integers(0, 12)].tolist()
        text = [*[BEGIN] * (number % 2), *inner, *[END] * (number % 3 % 2)]
        found = HALF(np.array(text, np.int32), uniforms((7, number))).tolist()
        back, order = restored(found)
        assert back == text
        assert len(found) == len(text) + (3 if order else 0)
        how.append(order)
    assert how.count("") / len(how) == pytest.approx(0.5, abs=0.04)
    assert min(how.count("psm"), how.count("spm")) > 300  # an empty prefix looks like the second


@pytest.mark.parametrize("seed", [None, 7])
def test_documents_of_a_corpus_are_read_once_an_epoch_whatever_is_drawn(seed: int | None) -> None:
    rng = np.random.default_rng(0)
    corpus = made(rng.geometric(0.05, 9000).tolist())
    rows, epochs = BestFit(corpus, 24, HALF), []
    assert rows.count > 4096  # several groups
    stream = stream_of(rows)
    for epoch in range(2):
        seen, how, cut = [], [], 0
        for first in range(epoch * rows.count, (epoch + 1) * rows.count, 512):
            batch = stream.batch(np.arange(first, min(first + 512, (epoch + 1) * rows.count)), seed)
            kept = batch["mask"] != 0
            place = np.flatnonzero(kept & (batch["positions"] == 0))
            ends = np.append(place[1:], batch["tokens"].size)
            for start, end in zip(place.tolist(), ends.tolist(), strict=True):
                tokens = batch["tokens"].reshape(-1)[start:end]
                back, order = restored(tokens[kept.reshape(-1)[start:end]].tolist())
                assert (np.diff(back) == 1).all()  # a stretch of one document
                seen.append(back)
                how.append(order)
                cut += len(back) > rows.longest
        assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(1, corpus.tokens + 1))
        assert cut == 0
        assert how.count("") / len(how) == pytest.approx(0.5, abs=0.02)
        assert min(how.count("psm"), how.count("spm")) > 0.15 * len(how)
        epochs.append({one[0]: order for one, order in zip(seen, how, strict=True)})
    assert (epochs[0] == epochs[1]) is (seed is None)


def test_any_number_of_hosts_draws_the_same_from_any_step() -> None:
    sizes = np.random.default_rng(2).geometric(0.05, 3000).tolist()
    stream = stream_of(BestFit(made(sizes), 24, HALF))
    whole = StreamBatches(stream, 64, (24,), 5)
    assert (whole[3]["tokens"] == PREFIX).any()
    for step in np.random.default_rng(3).integers(0, 1000, 4).tolist():
        for hosts in (2, 64):
            each = 64 // hosts
            parts = [
                StreamBatches(stream, 64, (24,), 5, (i * each, (i + 1) * each))[step]["tokens"] for i in range(hosts)
            ]
            assert np.array_equal(np.concatenate(parts), whole[step]["tokens"])
    plain = stream_of(BestFit(made(sizes), 24))
    assert plain.digest() != stream.digest()
    assert stream_of(Concatenated(made(sizes), 24)).digest() == stream_of(Concatenated(made(sizes), 24)).digest()


# --------------------------------------------------------------------------------------------- tokenizers and rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer with the three tokens."""
    names = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
    write_tokenizer(tmp_path / "words", ("</s>", *names))
    made = write_decoder_tokenizer(tmp_path / "tokenizer")
    tree = json.loads((tmp_path / "words" / "tokenizer.json").read_text()) | {"post_processor": None}
    vocabulary = tree["model"]["vocab"]
    said = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tree["added_tokens"] = [{"id": vocabulary[name], "content": name, **said} for name in names]
    (made / "tokenizer.json").write_text(json.dumps(tree))
    return made


def test_rows_are_filled_in_by_what_they_say(folder: Path) -> None:
    texts = ["the red cat sings", "a small dog runs and sleeps", "the old road is not very big", "fish"] * 3
    tokenizer = Tokenizer(folder, 8)
    config = load_config(None, ["task.name=causal_lm", "task.fill_in_the_middle=1"])
    rows = [Row((text,), "x") for text in texts]
    found = [one.example["tokens"].tolist() for one in causal_lm.encode(rows, tokenizer, None, config)]
    assert found[:4] == found[4:8] == found[8:]
    plain = load_config(None, ["task.name=causal_lm"])
    whole = [one.example["tokens"].tolist() for one in causal_lm.encode(rows, tokenizer, None, plain)]
    made = infilling(Config("causal_lm", fill_in_the_middle=1.0), tokenizer)
    assert made is not None
    marks = {made.prefix, made.middle, made.suffix}
    assert tokenizer.pieces(np.array([made.prefix, made.middle, made.suffix])) == [
        "<|fim_prefix|>",
        "<|fim_middle|>",
        "<|fim_suffix|>",
    ]
    for one, other in zip(found, whole, strict=True):
        assert marks <= set(one)
        assert len(one) <= 8
        assert sorted(token for token in one if token not in marks) == sorted(other[:5])
    half = load_config(None, ["task.name=causal_lm", "task.fill_in_the_middle=0.5", "data.long_texts=split"])
    with pytest.raises(UserError, match=r"have no room for more tokens; set data.long_texts=truncate"):
        causal_lm.encode(rows, tokenizer, None, half)


def test_what_cannot_be_filled_in_is_one_line(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    bare = Tokenizer(write_decoder_tokenizer(tmp_path / "bare"))
    with pytest.raises(UserError, match=r"has neither <\|fim_prefix\|> nor <fim_prefix>; name the tokens"):
        infilling(Config("causal_lm", fill_in_the_middle=0.5), bare)
    named = Config("causal_lm", fill_in_the_middle=0.5, fill_in_the_middle_tokens=("red", "green", "<none>"))
    with pytest.raises(UserError, match="has no token '<none>'"):
        infilling(named, bare)
    for setting, said in (
        ("task.fill_in_the_middle=2", "task.fill_in_the_middle=2.0: must lie in 0..1"),
        ("task.fill_in_the_middle_tokens=[a, b]", "name the three that begin prefix, middle and suffix"),
        ("task.fill_in_the_middle_tokens=[a, b, b]", "name the three that begin prefix, middle and suffix"),
    ):
        assert said in refusal(capsys, "show-config", "task.name=causal_lm", setting)
