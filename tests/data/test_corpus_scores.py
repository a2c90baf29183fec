"""Corpora scored whole: each token once and as the reference scores it, whatever the batches; sources add up; what counts alone know."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from decoders import reference_folder
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data.corpus.baselines import held_out_bits, learn
from jaxft.data.corpus.build import build
from jaxft.data.corpus.files import Shard, damages
from jaxft.data.corpus.options import Options
from jaxft.data.corpus.origins import origins_of
from jaxft.data.corpus.plan import make_plan
from jaxft.data.corpus.share import Share
from jaxft.data.corpus.store import Corpus, corpus_of, open_corpus
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.inference.corpus_scores import check_task, score_corpora
from jaxft.inference.predict import open_model
from jaxft.models.families import gpt2, llama
from jaxft.tasks import causal_lm, masked_lm
from jaxft.tasks._passages import stretches_around, stretches_before

Capture = pytest.CaptureFixture[str]
GOLDEN = Path(__file__).parents[1] / "golden" / "corpus_v1"
LENGTH = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, texts of several lengths (some of many windows), and a corpus of two sources."""
    folder = tmp_path_factory.mktemp("scores")
    tiny.write_decoder_tokenizer(folder / "tokenizer")
    texts = [text for text, _ in tiny.rows(60)]
    long = [" ".join(texts[i : i + 6]) for i in (0, 10)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts[:25], *long]))
    (folder / "b.txt").write_text("\n".join([*texts[40:50], "caf\u00e9 is red", "cat"]) + "\n")
    build_corpus(folder, folder / "corpus", "a.jsonl", "b.txt")
    return folder


def build_corpus(home: Path, out: Path, *sources: str) -> Path:
    tokenizer = Tokenizer(home / "tokenizer")
    plan = make_plan(out, [str(home / source) for source in sources], tokenizer, Options())
    assert build(plan, tokenizer, Share(0, 1), 1, lambda text: None)
    return out


def decoder(home: Path, family: Any) -> tuple[Path, Any]:
    """A folder that the reference has written, and its model."""
    folder = home / family.__name__.split(".")[-1]
    return folder, reference_folder(folder, family, home / "tokenizer", max_position_embeddings=LENGTH)


def scored(folder: Path, corpora: list[Path], *overrides: str) -> dict[str, Any]:
    served = open_model(str(folder), [*overrides], lambda text: None)
    return score_corpora(served, check_task(served.task()[1], served.model.head, ""), corpora)[1]


def plain(model: Any, ids: list[int], length: int, stride: int) -> tuple[float, int]:
    """The summed loss of a document and how many tokens it is of, one window after the other, as the reference computes it."""
    torch = pytest.importorskip("torch")
    total, count, done = 0.0, 0, 0
    while done < len(ids) - 1:
        begin = 0 if done == 0 else done - stride
        if begin + length > len(ids) - 1:
            begin = max(0, len(ids) - 1 - length)
        end = min(begin + length, len(ids) - 1)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:end]])).logits[0].double().log_softmax(-1)
        for place in range(done, end):
            total -= float(logits[place - begin, ids[place + 1]])
            count += 1
        done = end
    return total, count


@pytest.mark.parametrize("family", [gpt2, pytest.param(llama, marks=pytest.mark.slow)])
def test_sums_are_those_of_the_reference_document_by_document(home: Path, family: Any) -> None:
    folder, model = decoder(home, family)
    corpus = open_corpus(home / "corpus")
    end = len(tiny.WORDS)  # the token that ends texts
    assert corpus.lengths[-1, 0] > 3 * LENGTH
    for stride in (7,) if family is gpt2 else (0, 23):
        wanted = np.zeros(2)
        for number in range(corpus.documents):
            wanted += plain(model, [end, *corpus.document(number).tolist()], LENGTH, stride)
        found = [
            scored(folder, [home / "corpus"], f"eval.stride={stride}", f"eval.batch_size={size}") for size in (3, 16)
        ]
        for one in found:
            assert one["predicted_tokens"] == wanted[1] == corpus.tokens  # each once
            assert one["loss"] * corpus.tokens == pytest.approx(wanted[0], rel=2e-6)
        assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
        assert found[0]["sources"].keys() == found[1]["sources"].keys()


def test_sources_add_up_and_have_the_bytes_of_their_texts(home: Path, tmp_path: Path) -> None:
    folder, _ = decoder(home, gpt2)
    found = scored(folder, [home / "corpus"])
    parts = found["sources"]
    texts = [json.loads(line)["text"] for line in (home / "a.jsonl").read_text().splitlines()]
    sizes = {"a.jsonl": sum(len(text.encode()) for text in texts)}
    sizes["b.txt"] = len((home / "b.txt").read_bytes().replace(b"\n", b""))
    assert {Path(name).name: part["bytes"] for name, part in parts.items()} == sizes
    for name in ("documents", "tokens", "predicted_tokens", "bytes"):
        assert found[name] == sum(part[name] for part in parts.values())
    nats = sum(part["loss"] * part["predicted_tokens"] for part in parts.values())
    assert found["loss"] == pytest.approx(nats / found["predicted_tokens"])
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"])
    assert found["bits_per_token"] == pytest.approx(math.log2(found["perplexity"]))
    # The same sources as corpora of their own.
    apart = [build_corpus(home, tmp_path / name, name) for name in ("a.jsonl", "b.txt")]
    again = scored(folder, apart)
    assert list(again["sources"]) == [str(folder) for folder in apart]
    for one, other in zip(again["sources"].values(), parts.values(), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 11))
def test_stretches_score_each_place_once_with_what_was_asked_for_around_it(size: int, length: int, stride: int) -> None:
    stride %= length
    for stretches, before, after in ((stretches_before, stride, 0), (stretches_around, stride // 2, stride // 2)):
        seen: list[int] = []
        for start, stop, first, last in stretches(size, length, stride):
            assert 0 <= start <= first < last <= stop <= size
            assert stop - start <= length
            assert first - start >= min(before, first)
            assert stop - last >= min(after, size - last)
            seen += range(first, last)
        assert seen == list(range(size))


def test_a_masked_model_sees_each_token_hidden_once_and_special_ones_never() -> None:
    task = masked_lm.Task(4, (0, 2, 3, 4), 100, rate=0.15)
    document = np.array([2, *range(10, 60), 3])
    hidden: Counter[int] = Counter()
    for passage in task.passages(document, 16, 4):
        assert (passage.tokens[passage.scored] == 4).all()
        assert (passage.tokens == passage.targets)[~passage.scored].all()
        assert passage.scored.sum() <= -(-16 // task.turns)
        hidden.update(passage.targets[passage.scored].tolist())
    assert hidden == Counter(range(10, 60))


def test_what_begins_documents_is_never_predicted() -> None:
    read = [
        [(p.tokens.tolist(), p.targets[p.scored].tolist()) for p in causal_lm.Task(before=before).passages(ids, 8, 2)]
        for before in ((9, 1), (), (7,))
        for ids in (np.array([9, 4, 5]),)
    ]
    assert read == [[([9, 4], [4, 5])], [([9, 4], [4, 5])], [([7, 9, 4], [9, 4, 5])]]


@pytest.mark.slow
def test_a_masked_model_is_scored_in_any_batches(home: Path, tmp_path: Path) -> None:
    tiny.write_tokenizer(tmp_path / "tokenizer")
    shutil.copy(home / "a.jsonl", tmp_path)
    corpus = build_corpus(tmp_path, tmp_path / "corpus", "a.jsonl")
    folder = tiny.make_folder(tmp_path / "model", "masked_lm")
    one, other = (scored(folder, [corpus], f"eval.batch_size={size}") for size in (4, 32))
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["accuracy"] == other["accuracy"]
    special = Tokenizer(tmp_path / "tokenizer").special_ids
    opened = open_corpus(corpus)
    wanted = sum(int((~np.isin(opened.document(i), special)).sum()) for i in range(opened.documents))
    assert one["predicted_tokens"] == other["predicted_tokens"] == wanted


def test_corpora_of_earlier_versions_are_read_without_bytes(tmp_path: Path, capsys: Capture) -> None:
    assert list(damages(GOLDEN)) == []
    corpus = open_corpus(GOLDEN)
    assert (corpus.documents, corpus.tokens) == (15, 211)
    assert [(one.documents, one.size) for one in origins_of([GOLDEN])[0]] == [(15, None)]
    folder = tiny.make_folder(tmp_path / "model", "masked_lm")
    code, out, err = tiny.run(capsys, "eval", folder, f"data.eval={GOLDEN}", "--out", tmp_path / "out")
    assert code == 0, err
    assert "built by an earlier version" in err
    assert "bits_per_byte" not in json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert "eval: 15 documents, 211 tokens, 181 of them scored, each once" in out


def test_the_command_tells_sources_and_refuses_what_it_cannot_score(
    home: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, _ = decoder(home, gpt2)
    corpus = f"data.eval={home / 'corpus'}"
    code, out, err = tiny.run(capsys, "eval", folder, corpus, "--out", tmp_path / "out")
    assert code == 0, err
    named = [line.split()[0] for line in out.splitlines() if ".jsonl" in line or ".txt" in line]
    assert [Path(name).name for name in named] == ["a.jsonl", "b.txt"]  # of a path that is too long, the end
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["bits_per_byte"] > 0
    assert "has no labelled rows" in tiny.refusal(capsys, "eval", folder, corpus, "--rows", "x.csv")
    assert "choose less" in tiny.refusal(capsys, "eval", folder, corpus, "eval.stride=24")
    other = tiny.make_folder(tmp_path / "model", "masked_lm")
    assert "of another tokenizer" in tiny.refusal(capsys, "eval", other, corpus)
    labelled = tiny.make_folder(tmp_path / "labelled", "classification", tiny.LABELS)
    assert "give no probability of each token of a document" in tiny.refusal(capsys, "eval", labelled, corpus)
    assert "is a corpus, other sources are not" in tiny.refusal(
        capsys, "eval", folder, f"data.eval=[{home / 'corpus'}, {home / 'b.txt'}]"
    )


# ------------------------------------------------------------------------------------------------- counts


def made(documents: list[list[int]]) -> Corpus:
    """A corpus in memory, of two shards."""
    shards = []
    for part in (documents[::2], documents[1::2]):
        tokens = np.array([token for one in part for token in one], np.uint16)
        shards.append(Shard(tokens, np.cumsum([0, *map(len, part)]).astype(np.int64)))
    return corpus_of("made", shards, np.zeros((0, 2), np.int64), "made", {})


def discounts(counts: list[int]) -> list[float]:
    """Those of modified Kneser-Ney, by the formulas of Chen & Goodman."""
    n = [sum(1 for count in counts if count == wanted) for wanted in range(5)]
    if not all(n[1:]):
        return [0.0, 0.5, 0.5, 0.5]
    y = n[1] / (n[1] + 2 * n[2])
    return [0.0, *(min(max(k - (k + 1) * y * n[k + 1] / n[k], 0.05), k - 0.05) for k in (1, 2, 3))]


def by_hand(documents: list[list[int]], vocabulary: int) -> Any:
    """The probability of a token after two others, with dictionaries."""
    triples: Counter[tuple[int, int, int]] = Counter()
    for one in documents:
        padded = [-1, -1, *one]
        triples.update(zip(padded, padded[1:], padded[2:], strict=False))
    pairs = Counter((b, c) for _, b, c in triples)
    singles = Counter(c for _, c in pairs)
    d3, d2 = discounts(list(triples.values())), discounts(list(pairs.values()))
    d1 = discounts([singles[c] for c in range(vocabulary)])
    after: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for (a, b, _), count in triples.items():
        after[a, b].append(count)
    for (b, _), count in pairs.items():
        after[(b,)].append(count)

    def level(count: int, context: tuple[int, ...], d: list[float], lower: float) -> float:
        seen = after.get(context)
        if not seen:
            return lower
        return (count - d[min(count, 3)] + sum(d[min(one, 3)] for one in seen) * lower) / sum(seen)

    def probability(a: int, b: int, c: int) -> float:
        left = sum(d1[min(singles[x], 3)] for x in range(vocabulary)) / vocabulary
        lowest = (singles[c] - d1[min(singles[c], 3)] + left) / sum(singles.values())
        return level(triples[a, b, c], (a, b), d3, level(pairs[b, c], (b,), d2, lowest))

    return probability


def test_the_trigram_is_modified_kneser_ney_and_never_zero() -> None:
    rng, vocabulary = np.random.default_rng(0), 12
    texts = [(rng.zipf(1.5, rng.integers(1, 12)) % (vocabulary - 1)).tolist() for _ in range(80)]
    model, counted = learn(made(texts), vocabulary, (11,))
    assert counted == sum(map(len, texts))
    probability = by_hand(texts, vocabulary)
    for a, b in ((-1, -1), (-1, 3), (1, 2), (2, 2), (10, 10), (11, 11)):
        first, second = (np.full(vocabulary, vocabulary if one < 0 else one) for one in (a, b))
        single, found = model.logs(first, second, np.arange(vocabulary))
        np.testing.assert_allclose(np.exp(found), [probability(a, b, c) for c in range(vocabulary)], rtol=1e-9)
        assert np.exp(found).sum() == pytest.approx(1)
        assert np.exp(single).sum() == pytest.approx(1)
        assert np.isfinite(found).all()
    held = [[11, 1, 2, 3], [5], [11]]  # what begins documents is no part of them
    bits = held_out_bits(model, made(held), (11,))
    wanted = [(-1, -1, 1), (-1, 1, 2), (1, 2, 3), (-1, -1, 5)]
    assert bits.tokens == 4
    assert bits.trigram == pytest.approx(-sum(math.log2(probability(*one)) for one in wanted))
    assert held_out_bits(model, made(held), ()).tokens == 3  # without such a token, first ones are not predicted


def test_baselines_are_shown(home: Path, tmp_path: Path, capsys: Capture) -> None:
    other = build_corpus(home, tmp_path / "other", "b.txt")
    code, out, err = tiny.run(capsys, "data", "show", home / "corpus", "--baselines", other)
    assert code == 0, err
    table = {line.split()[0]: line.split()[-1] for line in out.splitlines() if line.startswith(("uni", "tri"))}
    assert float(table["trigram"]) < float(table["unigram"]) < float(table["uniform"])
    same = tiny.refusal(capsys, "data", "show", home / "corpus", "--baselines", home / "corpus")
    assert "nothing is held out" in same
    assert "another tokenizer" in tiny.refusal(capsys, "data", "show", home / "corpus", "--baselines", GOLDEN)
    assert "is for jaxft data show" in tiny.refusal(capsys, "data", "verify", other, "--baselines", other)
