"""Pre-training on pairs of texts: losses and gradients are the reference's, and pairs follow from (seed, epoch, row)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import WORDS, refusal, write_tokenizer
from token_batches import VOCAB, batch_of

from jaxft.data.batch import Field, text_fields
from jaxft.data.corpus.batches import StreamBatches
from jaxft.data.corpus.files import Shard
from jaxft.data.corpus.mixture import Mixture
from jaxft.data.corpus.order import uniforms
from jaxft.data.corpus.paired import Paired, PairStream
from jaxft.data.corpus.pairs import FRAME, LEAST, SHORTEST, Pairing, pieces_of
from jaxft.data.corpus.store import corpus_of
from jaxft.data.examples import offsets_of
from jaxft.inference.load import load
from jaxft.models.families import albert, bert
from jaxft.tasks.sentence_pairs import Task
from jaxft.training.step import forward_of
from jaxft.trees import paths_of

TASK = Task(mask_id=4, special_ids=(0, 2, 3, 4), vocab_size=VOCAB, rate=0.3)
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
CASES = [
    pytest.param(bert, "BertForPreTraining", "next_sentence_label", id="bert"),
    pytest.param(albert, "AlbertForPreTraining", "sentence_order_label", id="albert"),
]
END = 5
PAIRING = Pairing(
    "next", 2, 3, np.packbits(np.arange(64) == END).tobytes(), np.packbits(np.arange(64) % 2 == 0).tobytes()
)


def reference(family: ModuleType, name: str, folder: Path) -> Any:
    """A model of the reference with random weights, and its folder."""
    import torch
    import transformers

    torch.manual_seed(1)
    config = dataclasses.replace(family.TINY, num_hidden_layers=2, initializer_range=0.3, **STILL)
    made = getattr(transformers, name)(
        getattr(transformers, name.replace("ForPreTraining", "Config"))(**family.config_to_hf(config))
    )
    made.save_pretrained(folder)
    return made.eval()


def pairs_batch() -> dict[str, jax.Array]:
    batch = batch_of([12, 9, 5], 12)
    types = ((jnp.arange(12) > 5) & (batch["mask"] != 0)).astype(jnp.int32)
    return TASK.prepare(batch | {"types": types, "labels": jnp.asarray([0, 1, 1])}, jax.random.key(0))


@pytest.mark.parametrize(("family", "name", "labelled"), CASES)
def test_loss_and_gradients_are_the_references(family: ModuleType, name: str, labelled: str, tmp_path: Path) -> None:
    import torch

    theirs, batch = reference(family, name, tmp_path), pairs_batch()
    model, params, _ = load(tmp_path, head="pretraining", note=lambda _: None)

    def loss_of(params: Any) -> Any:
        sums = TASK.sums(forward_of(model, params), batch, None)
        return sums["loss"] / sums["weight"], sums

    (loss, sums), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    labels = np.full((3, 12), -100)
    np.put_along_axis(
        labels, np.asarray(batch["predict"]), np.where(batch["target_weights"] > 0, batch["targets"], -100), 1
    )
    text = {"input_ids": batch["tokens"], "attention_mask": batch["mask"], "token_type_ids": batch["types"]}
    given = {key: torch.tensor(np.asarray(value), dtype=torch.long) for key, value in text.items()}
    out = theirs(
        **given, labels=torch.tensor(labels), **{labelled: torch.tensor(np.asarray(batch["labels"]), dtype=torch.long)}
    )
    out.loss.backward()
    assert float(loss) == pytest.approx(out.loss.item(), abs=2e-5)
    assert TASK.score({key: np.asarray(value) for key, value in sums.items()})["loss"] == pytest.approx(
        out.loss.item(), abs=2e-5
    )

    layout, found = family.hf_layout(model.config, "pretraining"), paths_of(gradient)
    whole = {key: value.grad.numpy() for key, value in theirs.named_parameters() if value.grad is not None}
    checked = [
        rule for rule in layout.rules if rule.ours.startswith(("head/linear", "head/dense", "pooler", "embed/token"))
    ]
    assert len(checked) >= 6
    for rule in checked:
        one = np.asarray(found[rule.ours])
        np.testing.assert_allclose(
            one.T if "kernel" in rule.ours else one, whole[rule.theirs], atol=2e-5, err_msg=rule.ours
        )


@pytest.mark.parametrize(("family", "name", "labelled"), CASES)
def test_folders_come_back_bit_equal_and_open_for_other_tasks(
    family: ModuleType, name: str, labelled: str, tmp_path: Path
) -> None:
    from jaxft.hub.weights import open_weights

    del labelled
    reference(family, name, tmp_path / "theirs")
    both = load(tmp_path / "theirs", head="pretraining", note=lambda _: None)
    both.save(tmp_path / "ours", both.params)
    assert json.loads((tmp_path / "ours/config.json").read_text())["architectures"] == [name]
    with (
        open_weights(tmp_path / "theirs/model.safetensors") as one,
        open_weights(tmp_path / "ours/model.safetensors") as two,
    ):
        assert set(one.names()) == set(two.names())
        for tensor in one.names():
            np.testing.assert_array_equal(one.read(tensor), two.read(tensor))
    alone = load(tmp_path / "ours", note=lambda _: None)
    assert alone.model.head == "masked_lm"
    tokens = jnp.asarray([[2, 7, 8, 3]])
    words = alone.model.apply({"params": alone.params}, tokens)
    np.testing.assert_array_equal(words.logits, both.model.apply({"params": both.params}, tokens).logits)
    said: list[str] = []
    without = load(tmp_path / "theirs", head="classification", note=said.append)
    assert without.model.head == "classification"


def texts(count: int, size: int) -> list[np.ndarray]:
    """Texts of tokens that no other text has, where sentences of 7 tokens end."""
    made = [6 + np.arange(size, dtype=np.int32) % 5 + 5 * (number % 10) for number in range(count)]
    for text in made:
        text[6::7] = END
    return made


def test_pieces_are_of_whole_sentences_and_have_room() -> None:
    text, room = texts(1, 200)[0], 36
    pieces = [PAIRING.piece(lambda a, b: text[a:b], 200, number, room) for number in range(pieces_of(200, room))]
    assert max(map(len, pieces)) <= room
    assert all(piece[-1] == END for piece in pieces[:-1])
    assert sum(map(len, pieces)) >= 0.8 * 200
    assert pieces_of(2 * LEAST - 1, room) == 0


@pytest.mark.parametrize("kind", ["next", "order"])
def test_half_of_the_pairs_are_as_they_were(kind: Any) -> None:
    pairing, room, labels = dataclasses.replace(PAIRING, kind=kind), 40, []
    one, two = texts(2, 40)
    for number in range(400):
        pair = pairing.pair(one, room, uniforms((3, number)), lambda draw: two)
        cut = int(pair.types.argmax())
        first, second = pair.tokens[1 : cut - 1], pair.tokens[cut:-1]
        assert pair.tokens[0] == 2
        assert pair.tokens[cut - 1] == pair.tokens[-1] == 3
        assert len(pair.tokens) <= room + FRAME
        assert min(len(first), len(second)) >= LEAST
        if pair.label == 0:
            np.testing.assert_array_equal(np.concatenate([first, second]), one)
        elif kind == "order":
            np.testing.assert_array_equal(np.concatenate([second, first]), one)
        else:
            assert set(second.tolist()) <= set(two.tolist())
        labels.append(pair.label)
    assert 0.4 < np.mean(labels) < 0.6
    again = pairing.pair(one, room, uniforms((3, 399)), lambda draw: two)
    np.testing.assert_array_equal(again.tokens, pair.tokens)


def paired(kind: Any, sizes: list[int], length: int = 40) -> Paired:
    """A corpus of documents between marks, in two shards."""
    made = [np.r_[2, text, 3].astype(np.uint16) for text in (texts(1, size)[0] for size in sizes)]
    half, shards = len(made) // 2, []
    for part in (made[:half], made[half:]):
        shards.append(Shard(np.concatenate(part), offsets_of(np.array([len(one) for one in part]))))
    lengths = np.stack(np.unique([len(one) for one in made], return_counts=True), 1).astype(np.int64)
    return Paired(corpus_of("made", shards, lengths, "made", {}), length, dataclasses.replace(PAIRING, kind=kind))


@pytest.mark.parametrize("kind", ["next", "order"])
def test_batches_are_the_same_on_any_number_of_hosts_and_from_any_step(kind: Any) -> None:
    source = paired(kind, [3, 50, 20, 7, 100, 8, 30])
    assert source.short == 2
    assert source.count == sum(pieces_of(size, source.room) for size in (50, 20, 100, 8, 30))
    fields = {**text_fields(0), "labels": Field(("batch",))}
    stream = PairStream("train", fields, (source,), Mixture(), ("made",))
    whole = StreamBatches(stream, 8, (40,), seed=3)
    batches = [whole[step] for step in range(6)]
    halves = [StreamBatches(stream, 8, (40,), 3, part) for part in ((0, 4), (4, 8))]
    for step in (5, 0, 3):
        for name, value in batches[step].items():
            np.testing.assert_array_equal(np.concatenate([half[step][name] for half in halves]), value)
    assert {int(label) for batch in batches for label in batch["labels"]} == {0, 1}
    rows = [stream.batch(np.array([place]), 3)["tokens"].tobytes() for place in range(2 * source.count)]
    assert rows[: source.count] != rows[source.count :]
    assert sorted(stream.fields) == sorted(batches[0])


@pytest.mark.parametrize("marked", [False, True])
def test_any_text_that_is_long_enough_can_be_parted(marked: bool) -> None:
    room = SHORTEST - FRAME
    for size in range(2 * LEAST, 5 * room):
        text = texts(1, size)[0] if marked else np.full(size, 7, np.int32)
        for number in range(pieces_of(size, room)):
            piece = PAIRING.piece(lambda a, b, text=text: text[a:b], size, number, room)
            cuts = {PAIRING.parted(piece, draw) for draw in (0.0, 0.5, 0.999)}
            assert min(cuts) >= LEAST
            assert max(cuts) <= len(piece) - LEAST <= room - LEAST


def test_every_piece_is_read_once_an_epoch() -> None:
    source = paired("order", [50, 20, 100, 8, 30])
    cut = [source.pair(row, None) for row in range(source.count)]
    read = [np.sort(pair.tokens).tobytes() for pair in cut]
    shuffled = [np.sort(source.pair(row, 9).tokens).tobytes() for row in range(source.count)]
    assert sorted(read) == sorted(shuffled)


def test_what_cannot_be_paired_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "short.txt").write_text("red cat\n" * 30)
    (tmp_path / "long.txt").write_text("the red cat runs and the old dog sleeps\n" + "red cat\n" * 30)
    arch = f"model.arch={{vocab_size: {len(WORDS)}, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}}"
    usual = (
        "task.name=sentence_pairs",
        "model.family=bert",
        arch,
        f"data.tokenizer={tmp_path / 'tokenizer'}",
        "train.steps=1",
    )
    usual = (*usual, f"train.out={tmp_path / 'run'}", "data.max_length=40")

    def said(name: str, *more: str) -> str:
        data = (f"data.train={tmp_path / name}", f"data.eval={tmp_path / name}")
        return refusal(capsys, "train", *usual, *data, *more)

    assert "two texts need" in said("short.txt")
    assert "there is no other text near it" in said("long.txt")
    assert "at least" in said("long.txt", "data.max_length=10")
