"""Masked language modelling: which tokens are hidden, and that the loss is the reference's."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_folder, refusal, rows, run, write_csv
from token_batches import VOCAB, batch_of

from jaxft.config import OptimConfig, load_config
from jaxft.errors import UserError
from jaxft.hub.convert import export_tensors
from jaxft.hub.pretrained import export_folder
from jaxft.models.families import bert
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.tasks._tokens import token_cross_entropy
from jaxft.tasks.masked_lm import Task, continuing_ids
from jaxft.training.gradients import of_batch
from jaxft.training.optim import make_optimizer, make_schedule
from jaxft.training.state import init_state
from jaxft.training.step import apply_model, forward_of, make_train_step, prepared_at

TASK = Task(mask_id=4, special_ids=(0, 2, 3, 4), vocab_size=VOCAB)


@functools.partial(jax.jit, static_argnums=0)
def prepared(task: Any, batch: dict[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    """What a compiled step makes of a batch."""
    return task.prepare(batch, key)


PIECES = np.arange(VOCAB) % 3 == 1  # go on with a word
WORDS = dataclasses.replace(TASK, continuing=np.packbits(PIECES).tobytes(), rate=0.3)


def words_of(tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """The word of each token, counted in a loop; -1 for those that are never hidden."""
    found, number = np.full(len(tokens), -1), -1
    for i, token in enumerate(tokens.tolist()):
        if token not in (0, 2, 3, 4):
            alone = i == 0 or found[i - 1] < 0 or segments[i] != segments[i - 1]
            number += bool(alone or not PIECES[token])
            found[i] = number
    return found


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.integers(3, 24), min_size=1, max_size=5),
    span=st.sampled_from([1.0, 3.0]),
)
def test_words_are_hidden_whole(seed: int, lengths: list[int], span: float) -> None:
    before = batch_of(lengths, 24, seed)
    segments = np.where(np.asarray(before["mask"]), 1 + (np.arange(24) >= 8), 0).astype(np.int32)
    task = dataclasses.replace(WORDS, span_words=span)
    after = prepared(task, before | {"segments": jnp.asarray(segments)}, jax.random.key(seed))
    for row, length in enumerate(lengths):
        chosen = np.asarray(after["target_weights"][row]) > 0
        places = np.asarray(after["predict"][row])[chosen]
        words = words_of(np.asarray(before["tokens"][row]), segments[row])
        wanted = max(1, round(0.3 * (length - 2)))
        assert 1 <= len(places) <= wanted
        hidden = set(words[places].tolist())
        cut = [word for word in hidden if (words == word).sum() > (words[places] == word).sum()]
        assert cut in ([], list(hidden))  # unless it is the only one


def test_spans_are_longer_than_words() -> None:
    before = batch_of([24] * 64, 24)
    runs = {}
    for span in (1.0, 4.0):
        task = dataclasses.replace(WORDS, span_words=span, rate=0.4)
        after = prepared(task, before, jax.random.key(0))
        hidden = np.zeros((64, 24), bool)
        for row in range(64):
            chosen = np.asarray(after["target_weights"][row]) > 0
            hidden[row, np.asarray(after["predict"][row])[chosen]] = True
        edges = np.diff(np.pad(hidden, ((0, 0), (1, 1))).astype(int), axis=1)
        runs[span] = hidden.sum() / (edges == 1).sum()
    assert runs[4.0] > 1.4 * runs[1.0]


@pytest.mark.parametrize(
    ("vocabulary", "goes_on"),
    [
        (["a", "##b", "c"], [0, 1, 0]),
        (["\u0120a", "b", "\u0120c"], [0, 1, 0]),
        (["\u2581a", "b", "\u2581"], [0, 1, 0]),
        (["a", "b"], None),
    ],
)
def test_what_goes_on_with_a_word(vocabulary: list[str], goes_on: list[int] | None) -> None:
    class Written:
        folder, vocab_size = Path("model"), len(vocabulary)

        def pieces(self, ids: np.ndarray) -> list[str]:
            return [vocabulary[i] for i in ids]

    tokenizer: Any = Written()
    if goes_on is None:
        with pytest.raises(UserError, match="does not say which tokens begin a word"):
            continuing_ids(tokenizer)
    else:
        found = np.unpackbits(np.frombuffer(continuing_ids(tokenizer), np.uint8))[: len(vocabulary)]
        assert found.tolist() == goes_on


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(3, 24), min_size=1, max_size=5))
def test_what_is_hidden(seed: int, lengths: list[int]) -> None:
    before = batch_of(lengths, 24, seed)
    after = prepared(TASK, before, jax.random.key(seed))
    old, new = np.asarray(before["tokens"]), np.asarray(after["tokens"])
    for row, length in enumerate(lengths):
        chosen = np.asarray(after["target_weights"][row]) > 0
        places = np.asarray(after["predict"][row])[chosen]
        assert len(places) == len(set(places)) == max(1, round(0.15 * (length - 2)))
        assert all(0 < place < length - 1 for place in places)  # neither specials nor padding
        np.testing.assert_array_equal(np.asarray(after["targets"][row])[chosen], old[row, places])
        untouched = np.setdiff1d(np.arange(24), places)
        np.testing.assert_array_equal(new[row, untouched], old[row, untouched])


def test_shares_are_those_of_the_paper() -> None:
    before = batch_of([128] * 256, 128)
    after = prepared(TASK, before, jax.random.key(0))
    chosen = np.asarray(after["target_weights"]) > 0
    shown = np.take_along_axis(np.asarray(after["tokens"]), np.asarray(after["predict"]), 1)[chosen]
    same = shown == np.asarray(after["targets"])[chosen]
    count = chosen.sum()
    assert count == 256 * round(0.15 * 126)
    for share, expected in ((np.mean(shown == 4), 0.8), (same.mean(), 0.1 + 0.1 / VOCAB)):
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count)


def test_masks_follow_key_and_text_alone() -> None:
    key = jax.random.key(1)
    together = TASK.prepare(batch_of([9, 16, 12], 16), key)
    shuffled = {name: value[::-1] for name, value in batch_of([9, 16, 12], 16).items()}
    np.testing.assert_array_equal(TASK.prepare(shuffled, key)["tokens"][::-1], together["tokens"])
    wide = {name: jnp.pad(x, ((0, 0), (0, 8))) if x.ndim == 2 else x for name, x in batch_of([9, 16, 12], 16).items()}
    np.testing.assert_array_equal(TASK.prepare(wide, key)["tokens"][:, :16], together["tokens"])
    other = TASK.prepare(batch_of([9, 16, 12], 16), jax.random.key(2))
    assert (np.asarray(other["tokens"]) != np.asarray(together["tokens"])).any()


def test_rows_of_specials_only_and_padding_rows_count_nothing() -> None:
    batch = batch_of([2, 10], 16)
    batch["weights"] = jnp.asarray([1.0, 0.0])
    assert float(TASK.weight(TASK.prepare(batch, jax.random.key(0)))) == 0.0


def test_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    logits, targets = jnp.asarray(30 * rng.standard_normal((3, 5, 11)), jnp.float32), rng.integers(0, 11, (3, 5))
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_cross_entropy(logits, jnp.asarray(targets)), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def model() -> Any:
    sizes = dataclasses.replace(bert.TINY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return bert.Model(sizes, "masked_lm")


@pytest.fixture(scope="module")
def params(model: Any) -> Any:
    return jax.tree.map(lambda x: x + 0.05, init_params(model, 0))


def test_gathering_first_changes_nothing(model: Any, params: Any) -> None:
    batch = TASK.prepare(batch_of([9, 16, 12], 16), jax.random.key(0))
    apply = jax.jit(lambda batch: apply_model(model, params, batch, None).logits)
    gathered, everything = apply(batch), apply({k: v for k, v in batch.items() if k != "predict"})
    assert gathered is not None
    assert everything is not None
    assert gathered.shape == (3, 2, VOCAB)
    np.testing.assert_allclose(
        gathered, jnp.take_along_axis(everything, batch["predict"][..., None], axis=1), atol=1e-5
    )


def test_loss_and_gradient_are_those_of_the_reference(model: Any, params: Any, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import BertForMaskedLM

    export_folder(tmp_path / "hf", {}, bert, model, params, tokenizer_folder=None)
    theirs = BertForMaskedLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").train()
    batch = TASK.prepare(batch_of([9, 16, 12], 16), jax.random.key(0))
    labels = np.full(batch["tokens"].shape, -100)
    chosen = np.asarray(batch["target_weights"]) > 0
    rows = np.nonzero(chosen)[0]
    labels[rows, np.asarray(batch["predict"])[chosen]] = np.asarray(batch["targets"])[chosen]
    inputs = {"input_ids": batch["tokens"], "attention_mask": batch["mask"], "token_type_ids": batch["types"]}
    tensors = {name: torch.tensor(np.asarray(value)).long() for name, value in inputs.items()}
    wanted = theirs(**tensors, labels=torch.tensor(labels)).loss
    wanted.backward()

    def loss(params: Any) -> jax.Array:
        sums = TASK.sums(forward_of(model, params), batch, None)
        return sums["loss"] / sums["weight"]

    ours, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert float(ours) == pytest.approx(wanted.item(), abs=2e-5)
    named = dict(theirs.named_parameters())
    for tensor in export_tensors(gradient, bert.hf_layout(model.config, "masked_lm"), bare=False):
        if tensor.name in named:
            wanted_gradient = named[tensor.name].grad
            assert wanted_gradient is not None
            np.testing.assert_allclose(tensor.read(), wanted_gradient.numpy(), atol=2e-5, err_msg=tensor.name)


@pytest.mark.parametrize("accumulation", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_micro_batches_equal_one_batch(model: Any, params: Any, accumulation: int) -> None:
    config = OptimConfig(learning_rate=1e-2, schedule="constant", warmup_steps=0)
    schedule = make_schedule(config, 10)
    optimizer = make_optimizer(config, schedule, *shapes_and_axes(model))
    batch = batch_of([9, 16, 12, 3, 5, 14, 16, 7], 16)
    batch["weights"] = batch["weights"].at[-1].set(0.0)
    ends = []
    for k in (1, accumulation):
        step = jax.jit(make_train_step(TASK, of_batch(model, TASK, accumulation=k), optimizer, schedule))
        state = init_state(params, optimizer, False)
        for _ in range(2):
            state, metrics = step(state, batch, np.uint32(0))
        ends.append((state.params, metrics["loss"]))
    np.testing.assert_allclose(ends[0][1], ends[1][1], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ends[0][0], ends[1][0])


def write_texts(path: Path, count: int, words: int = 1) -> Path:
    """Plain text, a document per line."""
    table = rows(count)
    path.write_text("".join(" ".join([text] * words) + "\n" for text, _ in table))
    return path


def test_train_eval_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "bert")
    long = write_texts(tmp_path / "long.txt", 32, words=3)
    settings = [
        "task.name=masked_lm", f"model.init={folder}", f"data.train={long}", "data.max_length=12", "data.buckets=[12]",
        "data.long_texts=split", "train.batch_size=16", "train.epochs=4", "train.compilation_cache=null",
        "eval.batch_size=8", "optim.learning_rate=1e-2", "log.progress=off",
        f"train.out={tmp_path / 'out'}",
    ]  # fmt: skip
    code, out, err = run(capsys, "train", *settings)
    assert code == 0, err
    assert "initialised afresh: head/dense/kernel" in out
    assert " 0 truncated" in out
    assert "held-out metrics identical" in out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    evals = [record["loss"] for record in log if record["kind"] == "eval"]
    assert evals[-1] < evals[0]
    assert not (tmp_path / "out" / "confusion.png").exists()
    # The same texts, in one batch size or another, hide the same tokens.
    held = write_texts(tmp_path / "held.txt", 20)
    found = [
        run(capsys, "eval", tmp_path / "out", f"data.eval={held}", f"eval.batch_size={size}")[1].splitlines()[-1]
        for size in (4, 16)
    ]
    assert found[0] == found[1]
    assert "perplexity" in found[0]
    exported = json.loads((tmp_path / "out" / "export" / "config.json").read_text())
    assert exported["architectures"] == ["BertForMaskedLM"]
    assert "id2label" not in exported


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_folder(tmp_path / "bert")
    table = write_csv(tmp_path / "rows.csv", rows(40))
    common = [f"model.init={folder}", f"data.train={table}", "data.max_length=16", "train.compilation_cache=null"]
    assert "label_smoothing" in refusal(capsys, "train", "task.name=masked_lm", *common, "task.label_smoothing=0.1")
    assert "long_texts=split" in refusal(capsys, "train", *common, "data.long_texts=split")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"mask_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "no mask token" in refusal(capsys, "train", "task.name=masked_lm", *common)


# -------------------------------------------------------------------------------------------------- rates by schedule


RATES = ((0, 0.4), (10, 0.2), (20, 0.1))
STEPPED = dataclasses.replace(TASK, rates=RATES)
LINEAR = dataclasses.replace(STEPPED, linear=True)


@functools.partial(jax.jit, static_argnums=0)
def prepared_at_step(task: Any, batch: dict[str, jax.Array], step: jax.Array) -> dict[str, jax.Array]:
    return prepared_at(task, batch, jax.random.key(1), step)


@pytest.mark.parametrize(
    ("task", "step", "rate"),
    [
        *((STEPPED, 0, 0.4), (STEPPED, 9, 0.4), (STEPPED, 10, 0.2), (STEPPED, 19, 0.2), (STEPPED, 999, 0.1)),
        *((LINEAR, 0, 0.4), (LINEAR, 5, 0.3), (LINEAR, 15, 0.15), (LINEAR, 20, 0.1), (LINEAR, 999, 0.1)),
    ],
)
def test_a_step_hides_its_own_share_in_one_shape(task: Task, step: int, rate: float) -> None:
    batch = batch_of([42, 102], 120)
    after = prepared_at_step(task, batch, jnp.asarray(step))
    assert after["predict"].shape == (2, 48)  # of the highest share
    np.testing.assert_array_equal(after["target_weights"].sum(1), [round(rate * 40), round(rate * 100)])
    # What is not predicted stays as it was.
    changed = np.asarray(after["tokens"] != batch["tokens"])
    for row, places, there in zip(changed, after["predict"], after["target_weights"], strict=True):
        assert set(np.flatnonzero(row)) <= set(np.asarray(places)[np.asarray(there) > 0].tolist())


def test_evaluations_and_tasks_without_schedule_hide_one_share() -> None:
    batch = batch_of([42, 102], 120)
    plain = prepared(TASK, batch, jax.random.key(1))
    for found in (prepared(STEPPED, batch, jax.random.key(1)), prepared_at_step(TASK, batch, jnp.asarray(7))):
        jax.tree.map(np.testing.assert_array_equal, found, plain)
    assert TASK.schedule == ""
    assert STEPPED.schedule == (
        "tokens hidden in training: 40 % from step 0, 20 % from step 10, 10 % from step 20; of held-out texts: 15 % (task.mask_rate)"
    )
    assert "at step 10, 10 % at step 20 (linear between); of held-out" in LINEAR.schedule


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("task.mask_rates={5: 0.3}", "task.mask_rates: says no share for step 0"),
        ("task.mask_rates={}", "task.mask_rates: says no share for step 0"),
        ("task.mask_rates={0: 1.5}", "task.mask_rates.0=1.5: must lie between 0 and 1"),
        ("task.mask_rates={0: 0.3, soon: 0.2}", "task.mask_rates.soon: must be the step that a share holds from"),
        ("task.mask_rates={0: 0.3, 00: 0.2}", "task.mask_rates: has a step twice"),
        ("task.mask_rates_between=linear", "task.mask_rates_between=linear: there are no task.mask_rates"),
    ],
)
def test_rates_that_make_no_sense_are_refused(option: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        load_config(None, ["task.name=masked_lm", option])
