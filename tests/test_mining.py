"""Hard negatives: against one anchor after the other by hand, and against sentence-transformers; rows that training reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import WORDS, make_folder, refusal, run

from jaxft.config import load_config
from jaxft.data.encode import read_rows
from jaxft.data.examples import make_split
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.inference import mining
from jaxft.inference.mining import Mined, Mining, mine, numbered
from jaxft.tasks import Targets, embedding
from jaxft.tasks._sentence_files import Sentences, sentence_files

Capture = pytest.CaptureFixture[str]


def allowed_by_hand(
    anchor: int, near: np.ndarray, pairs: np.ndarray, itself: np.ndarray, options: Mining, among: int
) -> list[int]:
    """The texts that one anchor's negatives may be, the nearest first."""
    own = pairs[pairs[:, 0] == anchor, 1].tolist()
    partner = float(min(near[anchor, text] for text in own))
    found = []
    for text in range(among):
        score = float(near[anchor, text])
        fine = text not in own and text != itself[anchor]
        fine = fine and (options.max_score is None or score <= options.max_score)
        fine = fine and (options.margin is None or score <= partner - options.margin)
        share = options.relative_margin
        if fine and (share is None or score <= (partner * (1 - share) if partner > 0 else partner * (1 + share))):
            found.append(text)
    found.sort(key=lambda text: (-near[anchor, text], text))
    return found[options.from_rank - 1 : options.to_rank]


OPTIONS = [
    Mining(negatives=4),
    Mining(negatives=2, from_rank=3),
    Mining(negatives=3, max_score=0.25),
    Mining(negatives=3, margin=0.1, from_rank=2),
    Mining(negatives=3, relative_margin=0.05),
    Mining(negatives=3, relative_margin=0.5, margin=0.01, max_score=0.1, to_rank=20),
    Mining(negatives=60),
    Mining(negatives=3, sampling="random", to_rank=8, seed=5),
    Mining(negatives=3, sampling="random", from_rank=4, to_rank=30, max_score=0.3),
]


def made(seed: int, anchors: int = 45, texts: int = 61) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Anchors with one to three partners, some of them texts themselves; texts with few different vectors, so that scores are equal."""
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(texts, 6)).astype(np.float32)
    table[rng.random(texts) < 0.3] = table[0]
    pairs = np.array([(a, t) for a in range(anchors) for t in rng.choice(texts, rng.integers(1, 4), replace=False)])
    asked = table[pairs[np.searchsorted(pairs[:, 0], np.arange(anchors)), 1]] + rng.normal(size=(anchors, 6)) / 2
    itself = np.where(rng.random(anchors) < 0.5, rng.integers(0, texts, anchors), -1)
    return asked.astype(np.float32), table, pairs[rng.permutation(len(pairs))], itself


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options.sampling}{options.negatives}")
@pytest.mark.parametrize("block", [(512, 8192), (7, 13)])
def test_negatives_are_those_found_by_hand(
    options: Mining, block: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mining, "_ANCHORS", block[0])
    monkeypatch.setattr(mining, "_TEXTS", block[1])
    for seed, among in ((0, 61), (1, 40)):
        anchors, texts, pairs, itself = made(seed)
        found = mine(anchors, texts, pairs, itself, options, among)
        units = [one / np.linalg.norm(one, axis=1, keepdims=True) for one in (anchors, texts)]
        near = units[0] @ units[1].T
        np.testing.assert_allclose(found.partners, near[pairs[:, 0], pairs[:, 1]], atol=1e-6)
        for anchor in range(len(anchors)):
            may = allowed_by_hand(anchor, near, pairs, itself, options, among)
            taken = [int(text) for text in found.chosen[anchor] if text >= 0]
            assert len(taken) == min(options.negatives, len(may)) == found.counts[anchor]
            np.testing.assert_allclose(found.scores[anchor, : len(taken)], near[anchor, taken], atol=1e-6)
            assert taken == may[: len(taken)] if options.sampling == "top" else set(taken) <= set(may)
            assert taken == sorted(taken, key=may.index)


def test_a_draw_is_fair_and_its_own_for_each_seed() -> None:
    anchors, texts, pairs, itself = made(2)

    def drawn(seed: int) -> Mined:
        return mine(anchors, texts, pairs, itself, Mining(3, to_rank=10, sampling="random", seed=seed))

    np.testing.assert_array_equal(drawn(0).chosen, drawn(0).chosen)
    assert (drawn(0).chosen != drawn(1).chosen).any()
    ranked = mine(anchors, texts, pairs, itself, Mining(10)).chosen
    places = [np.argwhere(ranked[:, :, None] == drawn(seed).chosen[:, None])[:, 1] for seed in range(40)]
    counts = np.bincount(np.concatenate(places), minlength=10)
    # 540 of each rank are expected (45 anchors, 40 seeds, 3 of 10); the deviation is about 20.
    assert abs(counts - 540).max() < 90


def test_texts_are_one_but_for_blanks_around_them() -> None:
    found = numbered([("cat", "dog"), ("cat ", " fish"), ("dog", "cat"), ("cow", "dog\n")])
    assert (found.anchors, found.texts) == (["cat", "dog", "cow"], ["dog", " fish", "cat"])
    assert found.pairs.tolist() == [[0, 0], [0, 1], [1, 2], [2, 0]]
    assert found.spelt[1] == ("cat ", " fish")
    assert found.itself.tolist() == [2, 0, -1]
    apart = numbered([("cat", "dog"), ("cow", "horse")], ["sheep", "horse ", "sheep"])
    assert (apart.texts, apart.among) == (["sheep", "horse ", "dog"], 2)
    assert apart.pairs.tolist() == [[0, 2], [1, 1]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"negatives": 0}, "--negatives 0: must be at least 1"),
        ({"from_rank": 0}, "--from-rank 0: must be at least 1"),
        ({"negatives": 5, "from_rank": 4, "to_rank": 7}, "ranks 4 to 7 hold fewer than --negatives 5; it must be at least 8"),
        ({"sampling": "random"}, "say where it ends, for instance --to-rank 50"),
        ({"max_score": 1.5}, "--max-score 1.5: scores are cosines; must be from -1 to 1"),
        ({"margin": -0.1}, "--margin -0.1: a difference of cosines; must be from 0 to 2"),
        ({"margin": float("nan")}, "--margin nan: a difference of cosines"),
        ({"relative_margin": 1.0}, "--relative-margin 1.0: a share of the partner's score"),
    ],
)  # fmt: skip
def test_ranges_that_hold_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        Mining(**options)
    assert said in str(error.value)


def texts_of(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS[5:], int(rng.integers(2, 9)))) for _ in range(count)]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_source(folder: Path) -> Path:
    """A folder of embeddings whose texts are far from each other: what all texts have in common is taken out of its norms."""
    source = make_folder(folder / "source", None)
    weights = load_file(source / "model.safetensors")
    norms = {name: value for name, value in weights.items() if "LayerNorm" in name}
    weights |= {name: np.full_like(value, float(name.endswith("weight"))) for name, value in norms.items()}
    save_file(weights, source / "model.safetensors")
    for name, text in sentence_files(Sentences("mean", True, "the ", "a "), 16, 12).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    return source


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_pairs_are_mined_as_sentence_transformers_does_and_read_back(tmp_path: Path, capsys: Capture) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    datasets = pytest.importorskip("datasets")
    source, queries = make_source(tmp_path), texts_of(30, 0)
    rows = [{"query": queries[i % 30], "passage": f"{queries[i % 30]} {WORDS[5 + i % 29]}"} for i in range(40)]
    data, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "mined.jsonl"
    names = ["data.text=query", "data.text_pair=passage", "data.max_length=12"]
    code, said, err = run(
        capsys, "mine", source, data, out, *names, "--negatives", 2, "--relative-margin", 0.01, "--from-rank", 2,
        "--max-score", 0.985, "--scores", "--batch-size", 16,
    )  # fmt: skip
    assert code == 0, err
    found = [json.loads(line) for line in out.read_text().splitlines()]

    model = sentence_transformers.SentenceTransformer(str(source), device="cpu")
    theirs = sentence_transformers.util.mine_hard_negatives(
        datasets.Dataset.from_list(rows), model, range_min=1, range_max=40, max_score=0.985, relative_margin=0.01,
        num_negatives=2, output_format="n-tuple", output_scores=True, verbose=False,
    )  # fmt: skip
    wanted = {(row["query"], row["passage"]): row for row in theirs}
    assert 5 < len(wanted) < 40  # some lack negatives
    assert [(row["query"], row["passage"]) for row in found] == [
        pair for row in rows if (pair := (*row.values(),)) in wanted
    ]
    for row in found:
        other = wanted[row["query"], row["passage"]]
        assert row["negatives"] == [other["negative_1"], other["negative_2"]]
        np.testing.assert_allclose([row["score"], *row["negative_scores"]], other["scores"], atol=3e-6)
    assert f"wrote {out}: {len(found)} of 40 pairs" in said
    assert "have fewer than 2 negatives" in said
    assert "pairs are left out (--fewer)" in said

    settings = said.splitlines()[-1].removeprefix("train on them with: ").split()
    config = load_config(None, ["task.name=embedding", *settings])
    back = read_rows(str(out), config.data, embedding.columns(config))
    split = make_split(
        "train", embedding.encode(back, Tokenizer(source, 12), Targets(), config), embedding.fields(config, 0)
    )
    assert (split.columns["texts"] >= 0).sum(1).tolist() == [4] * len(found)


def test_what_cannot_be_mined_is_one_line(tmp_path: Path, capsys: Capture) -> None:
    source = make_source(tmp_path)
    labelled = make_folder(tmp_path / "labelled", "classification", ("a", "b"))
    more = {"score": "x", "none": " "}
    rows = [{"query": "red cat", "passage": "a fish", **more}, {"query": "red", "passage": "a tree", **more}]
    data, out = write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "mined.jsonl"
    names = ["data.text=query", "data.text_pair=passage"]
    cases: list[tuple[list[object], str]] = [
        ([source, data, out], "mine reads texts that belong together: name the columns, for instance data.text=query"),
        ([source, data, tmp_path / "mined.csv", *names], "negatives are written as JSON Lines; name a file that ends in .jsonl"),
        ([source, data, data, *names], "is one of the files that are read; name another one"),
        ([source, data, tmp_path / "no/mined.jsonl", *names], "cannot be written: its folder is not there"),
        ([source, data, out, "data.text=query", "data.text_pair=passages"], "no column 'passages': did you mean 'passage'?"),
        ([source, data, out, "data.text=query", "data.text_pair=score"], "'score' is the name of a column that is written"),
        ([source, data, out, "data.text=query", "data.text_pair=none"], ":1: column 'none' holds an empty text; remove the row"),
        ([source, data, out, *names, "--corpus", tmp_path / "no.txt"], "no.txt"),
        ([source, data, out, *names, "--corpus-column", "text"], "there is no --corpus; leave it out"),
        ([labelled, data, out, *names], "the model answers with classification, not with vectors of texts"),
    ]  # fmt: skip
    for arguments, said in cases:
        assert said in refusal(capsys, "mine", *arguments)
    assert not out.exists()


def test_a_corpus_of_its_own_and_pairs_with_fewer(tmp_path: Path, capsys: Capture) -> None:
    source = make_source(tmp_path)
    data = write_rows(
        tmp_path / "pairs.jsonl", [{"text": "red cat", "pair": "a fish"}, {"text": "red", "pair": "a tree"}]
    )
    corpus, out = tmp_path / "corpus.txt", tmp_path / "mined.jsonl"
    corpus.write_text("a tree\nold house\nred\n")
    code, said, err = run(
        capsys,
        "mine",
        source,
        data,
        out,
        "data.text_pair=pair",
        "--corpus",
        corpus,
        "--fewer",
        "keep",
        "--negatives",
        3,
    )
    assert code == 0, err
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [set(row["negatives"]) for row in found] == [{"a tree", "old house", "red"}, {"old house"}]
    assert "1 of 2 anchors have fewer than 3 negatives (0 have none): their 1 pairs are written with those" in said
