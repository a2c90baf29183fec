"""Vectors of texts: losses and gradients of sentence-transformers, who finds whom counted by hand, runs, and exports that it loads."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_folder, refusal, run

from jaxft.config import load_config
from jaxft.config.tasks.embedding import Config
from jaxft.data.examples import make_split
from jaxft.data.packing import pack
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Output
from jaxft.tasks import Targets, embedding, texts_of_row
from jaxft.tasks import _contrastive as contrastive
from jaxft.tasks._nearest import nearest_scores
from jaxft.tasks._sentence_files import Sentences, read_sentences
from jaxft.tasks._vectors import text_vectors
from jaxft.tasks.embedding import Task

Capture = pytest.CaptureFixture[str]


def batch_of(rng: np.random.Generator, examples: int, texts: int, numbered: bool) -> dict[str, jax.Array]:
    """Texts of one token each, and no two alike; the last two examples only fill up the batch."""
    places = np.broadcast_to(np.arange(texts), (examples, texts))
    found: dict[str, np.ndarray] = {
        "tokens": np.zeros((examples, texts)), "mask": np.ones((examples, texts)), "segments": places + 1,
        "positions": np.zeros((examples, texts)), "starts": places,
        "texts": np.arange(examples * texts).reshape(examples, texts),
    }  # fmt: skip
    made = {name: jnp.asarray(value, jnp.int32) for name, value in found.items()}
    made["weights"] = jnp.asarray(np.arange(examples) < examples - 2, jnp.float32)
    return {**made, "labels": jnp.asarray(rng.random(examples), jnp.float32)} if numbered else made


LOSSES: dict[str, tuple[Config, Any]] = {
    "ranking": (Config(loss="ranking"), lambda losses, model: losses.MultipleNegativesRankingLoss(model)),
    "ranking with negatives": (
        Config(loss="ranking", negatives=("a", "b"), scale=7.0),
        lambda losses, model: losses.MultipleNegativesRankingLoss(model, scale=7.0),
    ),
    "ranking both ways": (
        Config(loss="ranking", directions="both"),
        lambda losses, model: losses.MultipleNegativesSymmetricRankingLoss(model),
    ),
    "cosent": (Config(loss="cosent"), lambda losses, model: losses.CoSENTLoss(model)),
    "cosine": (Config(loss="cosine"), lambda losses, model: losses.CosineSimilarityLoss(model)),
    "triplet": (Config(loss="triplet", negatives=("a",)), lambda losses, model: losses.TripletLoss(model)),
    "triplet of cosines": (
        Config(loss="triplet", negatives=("a",), distance="cosine", margin=0.5),
        lambda losses, model: losses.TripletLoss(model, losses.TripletDistanceMetric.COSINE, 0.5),
    ),
    "margin_mse": (Config(loss="margin_mse", negatives=("a",)), lambda losses, model: losses.MarginMSELoss(model)),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("widths", [(), (8, 3)], ids=["whole", "matryoshka"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_losses_and_gradients_are_those_of_sentence_transformers(name: str, widths: tuple[int, ...]) -> None:
    torch = pytest.importorskip("torch")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    options, make = LOSSES[name]
    options = dataclasses.replace(options, matryoshka=widths, pooling="mean")
    rng = np.random.default_rng(0)
    examples, texts = 9, options.texts
    batch = batch_of(rng, examples, texts, options.loss in ("cosent", "cosine", "margin_mse"))
    hidden = rng.normal(size=(examples, texts, 8)).astype(np.float32)

    def mean(hidden: jax.Array) -> jax.Array:
        sums = Task(options).sums(lambda *_: Output(hidden), batch, None)
        return sums["loss"] / sums["weight"]

    loss, gradient = jax.jit(jax.value_and_grad(mean))(jnp.asarray(hidden))

    theirs = torch.tensor(hidden[:-2], requires_grad=True)
    labels = torch.tensor(np.asarray(batch["labels"][:-2])) if "labels" in batch else None
    vectors = [theirs[:, i] for i in range(texts)]
    expected = torch.zeros(())
    for width in widths or (8,):
        made = make(losses, SimpleNamespace())
        expected = expected + made.compute_loss_from_embeddings([vector[:, :width] for vector in vectors], labels)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=2e-6)
    reach = max(1.0, float(theirs.grad.abs().max()))
    np.testing.assert_allclose(gradient[:-2], theirs.grad.numpy(), rtol=0, atol=2e-6 * reach)
    assert not np.asarray(gradient[-2:]).any()


def ranked_by_hand(vectors: np.ndarray, texts: np.ndarray, rows: int, scale: float, mask: bool) -> float:
    """One text after the other: the loss of the first ``rows`` examples, by partners and negatives."""
    units, total = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), 0.0
    for i in range(rows):
        query, right = texts[i, 0], texts[i, 1]
        among = []
        for j in range(rows):
            for k in range(1, texts.shape[1]):
                other, itself = texts[j, k], (i, 1) == (j, k)
                too = other in (query, right) or (k == 1 and texts[j, 0] == query)
                if other >= 0 and (itself or not (mask and too)):
                    among.append(scale * units[i, 0] @ units[j, k])
        total += np.log(np.exp(np.array(among)).sum()) - scale * units[i, 0] @ units[i, 1]
    return total


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("parts", [1, 5])
def test_texts_that_are_right_as_well_are_no_negatives(parts: int, mask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(10, 4, 6)).astype(np.float32)
    texts = rng.integers(0, 12, (10, 4)).astype(np.int32)
    texts[:, 2:][rng.random((10, 2)) < 0.3] = -1
    weights = (np.arange(10) < 8).astype(np.float32)
    seen = contrastive.Compared(jnp.asarray(vectors), jnp.asarray(texts), jnp.asarray(weights))
    monkeypatch.setattr(contrastive, "_AT_ONCE", 30 * 10 // parts)
    found = contrastive.ranking(seen, 5.0, both=False, mask_duplicates=mask)
    assert float(found) == pytest.approx(ranked_by_hand(vectors, texts, 8, 5.0, mask), rel=1e-5)


def test_losses_in_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    vectors, numbers = jnp.asarray(rng.normal(size=(12, 3, 6)), jnp.float32), jnp.asarray(rng.random(12), jnp.float32)
    texts, weights = jnp.asarray(rng.integers(0, 20, (12, 3)), jnp.int32), jnp.ones(12)

    def both(vectors: jax.Array) -> jax.Array:
        seen = contrastive.Compared(vectors, texts, weights)
        ranked = contrastive.ranking(seen, 20.0, both=True, mask_duplicates=True)
        return ranked + contrastive.cosent(seen, numbers, 20.0)

    whole = jax.jit(jax.value_and_grad(both))(vectors)
    monkeypatch.setattr(contrastive, "_AT_ONCE", 30)
    for a, b in zip(whole, jax.jit(jax.value_and_grad(both))(vectors), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["mean", "cls", "last", "weighted"])
def test_tokens_become_vectors_as_by_hand(how: str) -> None:
    rng = np.random.default_rng(3)
    hidden, sizes = rng.normal(size=(2, 9, 4)).astype(np.float32), [[3, 2, 4], [1, 5]]
    segments, positions, starts = np.zeros((2, 9), int), np.zeros((2, 9), int), np.zeros((2, 3), int)
    expected = []
    for row, of_row in enumerate(sizes):
        place = 0
        for i, size in enumerate(of_row):
            chosen = slice(place, place + size)
            segments[row, chosen], positions[row, chosen], starts[row, i] = i + 1, np.arange(size), place
            own, weights = hidden[row, chosen], np.arange(1, size + 1)[:, None]
            by_hand = {
                "mean": own.mean(0),
                "cls": own[0],
                "last": own[-1],
                "weighted": (own * weights).sum(0) / weights.sum(),
            }
            expected.append((row, i, by_hand[how]))
            place += size
    batch = {"segments": jnp.asarray(segments), "positions": jnp.asarray(positions), "starts": jnp.asarray(starts)}
    found = text_vectors(how, jnp.asarray(hidden), batch)
    for row, i, vector in expected:
        np.testing.assert_allclose(found[row, i], vector, atol=1e-6)


def nearest_by_hand(vectors: np.ndarray, texts: np.ndarray, at: int) -> dict[str, float]:
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    found = {int(t): units[i, k] for (i, k), t in reversed([*np.ndenumerate(texts)]) if k and t >= 0}
    asked = {int(t): units[i, 0] for i, t in reversed([*enumerate(texts[:, 0])])}
    each: dict[str, list[float]] = {name: [] for name in ("hit@1", f"mrr@{at}", f"ndcg@{at}", "map", f"recall@{at}")}
    for query, vector in asked.items():
        right = {int(t) for t in texts[texts[:, 0] == query, 1]}
        others = [t for t in found if t != query or t in right]
        order = sorted(others, key=lambda t: (-float(np.float32(vector @ found[t])), t in right))
        places = [place for place, t in enumerate(order, 1) if t in right]
        each["hit@1"].append(places[0] == 1)
        each[f"mrr@{at}"].append(1 / places[0] if places[0] <= at else 0)
        each["map"].append(sum((n + 1) / place for n, place in enumerate(places)) / len(places))
        each[f"recall@{at}"].append(sum(place <= at for place in places) / len(places))
        best = sum(1 / math.log2(place + 1) for place in range(1, min(len(places), at) + 1))
        each[f"ndcg@{at}"].append(sum(1 / math.log2(p + 1) for p in places if p <= at) / best)
    return {name: float(np.mean(values)) for name, values in each.items()}


@pytest.mark.parametrize("at", [1, 5])
@pytest.mark.parametrize("kinds", [8, 40, 1000])
def test_who_finds_whom_is_counted_as_by_hand(kinds: int, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(kinds)
    table = rng.normal(size=(kinds, 5)).astype(np.float32)
    texts = rng.integers(0, kinds, (30, 3)).astype(np.int32)
    vectors = table[texts]
    texts[rng.random(30) < 0.3, 2] = -1
    monkeypatch.setattr("jaxft.tasks._nearest._AT_ONCE", 100)
    found, expected = nearest_scores(vectors, texts, at), nearest_by_hand(vectors, texts, at)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_a_model_that_tells_nothing_apart_earns_nothing() -> None:
    texts = np.arange(40).reshape(20, 2)
    found = nearest_scores(np.ones((20, 2, 4), np.float32), texts, 10)
    assert found["hit@1"] == found["mrr@10"] == 0
    assert found["map"] == pytest.approx(1 / 20)
    assert math.isnan(nearest_scores(np.zeros((0, 2, 4)), np.zeros((0, 2), np.int32), 10)["map"])


TEXTS = [
    "the red cat sleeps",
    "a fish sings",
    "old house",
    "the tree",
    "big blue fish runs fast",
    "cat",
    "tree house",
    "red",
]


def write_pairs(folder: Path, **more: list[Any]) -> Path:
    path = folder / "pairs.jsonl"
    rows = [{"query": text, "passage": f"{text} {TEXTS[i - 1]}"} for i, text in enumerate(TEXTS)]
    for name, values in more.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


NAMES = ["task.name=embedding", "data.text=query", "data.text_pair=passage", "data.max_length=12"]
TRAIN = [
    "train.batch_size=8", "train.steps=3", "optim.learning_rate=5e-3", "optim.warmup_steps=0", "eval.every=3",
    "train.compilation_cache=null", "log.progress=off", "optim.weight_decay=0.1",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("pooling", "settings"),
    [
        ("mean", ["task.query_prompt='the '", "task.duplicates=apart", "task.text_prompt='a '", "train.batch_size=8"]),
        pytest.param(
            "weighted",
            ["task.normalize=false", "data.packing=best_fit", "train.batch_size=16", "eval.batch_size=16"],
            marks=pytest.mark.slow,
        ),
        pytest.param("last", ["task.loss=cosent", "data.label=score"], marks=pytest.mark.slow),
        pytest.param("cls", ["task.loss=triplet", "task.negatives=[wrong]"], marks=pytest.mark.slow),
    ],
)
def test_a_run_exports_what_sentence_transformers_loads(
    pooling: str, settings: list[str], tmp_path: Path, capsys: Capture
) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    data = write_pairs(tmp_path, score=[i / 10 for i in range(8)], wrong=["the cat"] * 8)
    source = make_folder(tmp_path / "source", None)
    code, out, err = run(
        capsys, "train", f"model.init={source}", *NAMES, f"data.train={data}", f"data.eval={data}", *TRAIN,
        f"train.out={tmp_path / 'run'}", f"task.pooling={pooling}", *settings,
    )  # fmt: skip
    assert code == 0, err
    exported = tmp_path / "run/export"

    code, out, err = run(capsys, "predict", exported, "--text", "red cat", "--pair", "a fish")
    assert code == 0, err
    said = json.loads(out)
    theirs = sentence_transformers.SentenceTransformer(str(exported), device="cpu")
    assert theirs.max_seq_length == 12
    query, document = theirs.encode_query("red cat"), theirs.encode_document("a fish")
    np.testing.assert_allclose(said["embedding"], query, atol=2e-6)
    np.testing.assert_allclose(said["pair_embedding"], document, atol=2e-6)
    assert said["similarity"] == pytest.approx(float(theirs.similarity(query, document)), abs=2e-6)

    code, out, err = run(capsys, "predict", exported, "--text", "red cat", "task.name=embedding", "task.embed_as=query")
    assert code == 0, err
    np.testing.assert_allclose(json.loads(out)["embedding"], query, atol=2e-6)


def test_what_is_never_read_does_not_decay(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    from jaxft.training.setup import Times, prepare
    from jaxft.trees import paths_of

    data, source = write_pairs(tmp_path), make_folder(tmp_path / "source", None)
    config = load_config(None, [f"model.init={source}", *NAMES, f"data.train={data}", f"data.eval={data}", *TRAIN])
    frozen = paths_of(prepare(config, lambda text: None, Times()).frozen)
    assert "pooler.dense.weight" in load_file(source / "model.safetensors")
    assert {path for path, still in frozen.items() if still} == {"pooler/kernel", "pooler/bias"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.text_pair=null"], "embedding learns of texts that belong together: name the columns, for instance"),
        (["task.loss=triplet"], "task.loss=triplet is of three texts: name one column in task.negatives (now 0)"),
        (["task.loss=cosine", "task.negatives=[a]"], "task.loss=cosine is of two texts and a number: leave task.negatives out"),
        (["task.loss=cosine", "task.directions=both"], "task.directions=both is of task.loss=ranking, not of cosine"),
        (["task.matryoshka=[64]"], "task.matryoshka=[64]: the model's vectors have 16 numbers"),
        (["task.negatives=[wrong]"], ":1: column 'wrong' holds None; expected a text, or a list of texts (task.negatives)"),
        (["task.loss=cosine", "data.label=wrong"], ":1: column 'wrong' is empty; every row needs a number"),
        (["task.scale=0"], "task.scale=0.0: must be above 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(settings: list[str], said: str, tmp_path: Path, capsys: Capture) -> None:
    data = write_pairs(tmp_path, wrong=[None] * 8)
    source = make_folder(tmp_path / "source", None)
    line = refusal(
        capsys, "train", f"model.init={source}", *NAMES, f"data.train={data}", f"data.eval={data}", *TRAIN, *settings
    )
    assert said in line


@pytest.mark.parametrize(
    ("modules", "pooling", "said"),
    [
        (["Transformer", "Pooling", "Dense"], {}, "its modules are Transformer, Pooling, Dense; jaxft has"),
        (["Transformer", "Pooling"], {"pooling_mode": "max"}, "pools by max; jaxft pools by mean, cls, last, weighted"),
        (
            ["Transformer", "Pooling"],
            {"pooling_mode_mean_tokens": True, "include_prompt": False},
            "include_prompt is false",
        ),
    ],
)
def test_folders_with_other_modules_are_refused(
    modules: list[str], pooling: dict[str, Any], said: str, tmp_path: Path, capsys: Capture
) -> None:
    source = make_folder(tmp_path / "source", None)
    listed = [{"path": f"{i}_{name}" if i else "", "type": f"x.{name}"} for i, name in enumerate(modules)]
    (source / "modules.json").write_text(json.dumps(listed))
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling/config.json").write_text(json.dumps(pooling))
    assert said in refusal(capsys, "predict", source, "--text", "red cat")


def test_odd_files_of_a_folder_are_refused(tmp_path: Path) -> None:
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text("{}")
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    assert read_sentences(tmp_path) == Sentences("mean", False)
    (tmp_path / "config_sentence_transformers.json").write_text('{"prompts": ["query"]}')
    with pytest.raises(UserError, match="prompts must map names to texts"):
        read_sentences(tmp_path)
    modules[1]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="elsewhere' is no folder beside it"):
        read_sentences(tmp_path)


def test_rows_have_as_many_negatives_as_they_have(tmp_path: Path) -> None:
    more: list[Any] = [["a tree", "red", "blue"], "a fish", [], ["house"], ["a", "b", "c", "d"], "red", "red", "red"]
    data, source = write_pairs(tmp_path, wrong=more), make_folder(tmp_path / "source", None)
    settings = ["task.negatives=[wrong]", "task.negatives_per_row=3", "data.packing=best_fit", "train.batch_size=16"]
    config = load_config(
        None, [f"model.init={source}", *NAMES, f"data.train={data}", f"data.eval={data}", "mesh.data=1", *settings]
    )
    assert texts_of_row(config.task) == 5
    tokenizer = Tokenizer(source, 12)
    rows = [Row((f"red {i}", "cat", value), "") for i, value in enumerate(more)]
    split = make_split("train", embedding.encode(rows, tokenizer, Targets(), config), embedding.fields(config, 0))
    assert [(of_row >= 0).sum() for of_row in split.columns["texts"]] == [5, 3, 2, 3, 5, 3, 3, 3]
    assert [int(split[i]["segments"].max()) for i in range(8)] == [5, 3, 2, 3, 5, 3, 3, 3]
    together = pack(split, 60)
    assert len(together[0]["starts"]) > 1
    segments = together[0]["segments"]
    for example, starts in enumerate(together[0]["starts"]):
        mine = np.unique(segments[(segments - 1) // 5 == example])
        np.testing.assert_array_equal(segments[starts[: len(mine)]], mine)
