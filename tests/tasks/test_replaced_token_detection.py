"""Replaced-token detection: loss and gradients of both networks are the reference's, and what is drawn follows from (seed, step)."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import WORDS, rows, run, write_csv, write_tokenizer
from token_batches import VOCAB, batch_of

from jaxft.config import OptimConfig, load_config
from jaxft.errors import UserError
from jaxft.hub.pretrained import export_folder
from jaxft.hub.weights import open_weights
from jaxft.inference.load import load
from jaxft.models.families import electra
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.tasks.replaced_token_detection import Hidden, Task, sampled
from jaxft.training.gradients import of_batch
from jaxft.training.optim import make_optimizer, make_schedule
from jaxft.training.state import init_state
from jaxft.training.step import forward_of, make_train_step
from jaxft.trees import paths_of

TASK = Task(Hidden(mask_id=4, special_ids=(0, 2, 3, 4), vocab_size=VOCAB, rate=0.3))
CONFIG = dataclasses.replace(
    electra.TINY,
    num_hidden_layers=2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.3,
)
MODEL: Any = electra.Model(CONFIG, electra.PAIR)


@functools.cache
def params() -> Any:
    """Fresh ones, whose generator has a liking for some tokens, so that it is right at times."""
    made: Any = init_params(MODEL, 3)
    made["generator"]["head"]["bias"] = made["generator"]["head"]["bias"].at[5:9].set(8.0)
    return made


def few_words(lengths: list[int], width: int) -> dict[str, jax.Array]:
    """Texts of the tokens that it likes."""
    batch = batch_of(lengths, width)
    return batch | {"tokens": jnp.where(batch["tokens"] > 8, 5 + batch["tokens"] % 4, batch["tokens"])}


def test_the_generator_is_narrower_and_shares_the_tables() -> None:
    paths = paths_of(params())
    assert paths["generator/layers/attention/query/kernel"].shape == (2, 16, 2, 8)
    assert paths["generator/embed/project/kernel"].shape == (24, 16)
    assert not [path for path in paths if path.startswith("generator/embed/") and "/project/" not in path]
    assert [stack.path for stack in MODEL.facts.stacks] == ["layers", "generator/layers"]


def written_of(batch: dict[str, jax.Array]) -> np.ndarray:
    """What the generator writes, with the task's own draws."""
    return np.asarray(_written(params(), batch))


@jax.jit
def _written(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    text = {name: value for name, value in batch.items() if name != "targets"}
    logits = forward_of(MODEL, params)(text, None).logits
    assert logits is not None
    return sampled(logits, batch["sampling"])


prepared = jax.jit(TASK.prepare)
sums_of = jax.jit(lambda params, batch: TASK.sums(forward_of(MODEL, params), batch, None))


def test_loss_and_gradients_equal_the_reference(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name, (model, own) in electra.parts(MODEL, params()).items():
        export_folder(tmp_path / name, {}, electra, model, own, note=lambda _: None)
    generator = transformers.ElectraForMaskedLM.from_pretrained(tmp_path / "generator").eval()
    discriminator = transformers.ElectraForPreTraining.from_pretrained(tmp_path / "discriminator").eval()
    # Shared as in the paper: tokens, positions, types, and their norm.
    generator.electra.embeddings = discriminator.electra.embeddings
    generator.generator_lm_head.weight = discriminator.electra.embeddings.word_embeddings.weight

    batch = prepared(few_words([9, 16, 12], 16), jax.random.key(0))
    gradient, sums = jax.jit(of_batch(MODEL, TASK))(params(), batch, jax.random.key(1), TASK.weight(batch))

    chosen, places = np.asarray(batch["target_weights"]) > 0, np.asarray(batch["predict"])
    written = np.where(chosen, written_of(batch), batch["targets"])
    tokens, labels, replaced = np.array(batch["tokens"]), np.full((3, 16), -100), np.zeros((3, 16), np.float32)
    shown = torch.tensor(tokens.copy()).long()
    np.put_along_axis(tokens, places, written, 1)
    np.put_along_axis(labels, places, np.where(chosen, batch["targets"], -100), 1)
    np.put_along_axis(replaced, places, (written != np.asarray(batch["targets"])).astype(np.float32), 1)
    assert 0 < replaced.sum() < chosen.sum()  # some of what is drawn is right
    mask = torch.tensor(np.asarray(batch["mask"]))
    first = generator(shown, attention_mask=mask, labels=torch.tensor(labels)).loss
    second = discriminator(torch.tensor(tokens).long(), attention_mask=mask, labels=torch.tensor(replaced)).loss
    loss = first + 50.0 * second
    loss.backward()

    assert float(sums["loss"] / sums["weight"]) == pytest.approx(loss.item(), rel=2e-5)
    score = TASK.score(jax.device_get(sums_of(params(), batch)))
    assert score["generator_loss"] == pytest.approx(first.item(), rel=2e-5)
    assert score["discriminator_loss"] == pytest.approx(second.item(), rel=2e-5)
    assert score["loss"] == pytest.approx(loss.item(), rel=2e-5)
    found = paths_of(jax.tree.unflatten(jax.tree.structure(params()), gradient))
    theirs = {
        **{name: one.grad for name, one in discriminator.named_parameters()},
        **{f"generator.{name.removeprefix('electra.')}": one.grad for name, one in generator.named_parameters()},
    }
    assert_gradients(found, theirs)


def assert_gradients(found: dict[str, jax.Array], theirs: dict[str, Any]) -> None:
    """Our gradients, in the reference's names and shapes, against its own."""
    from jaxft.hub.convert import export_tensors
    from jaxft.trees import nested

    tensors = export_tensors(nested(found), electra.hf_layout(CONFIG, electra.PAIR), bare=False)
    ours = {tensor.name: np.asarray(tensor.read()) for tensor in tensors}
    assert len(ours) > 60
    scale = max(float(np.abs(one).max()) for one in ours.values())
    for name, one in ours.items():
        wanted = theirs[name.replace("generator.electra.", "generator.")]
        np.testing.assert_allclose(one, wanted.numpy(), rtol=2e-5, atol=2e-5 * scale, err_msg=name)


@pytest.mark.slow
def test_nothing_is_passed_back_through_what_is_written() -> None:
    """Without its own loss the generator learns nothing."""
    batch = prepared(batch_of([9, 16], 16), jax.random.key(0))

    def discriminators(params: Any) -> jax.Array:
        sums = TASK.sums(forward_of(MODEL, params), batch, None)
        return sums["loss"] - sums["generator"]

    gradient = paths_of(jax.grad(discriminators)(params()))
    assert all(not np.any(leaf) for path, leaf in gradient.items() if path.startswith("generator/"))
    assert np.any(gradient["embed/token/embedding"])


def test_draws_follow_from_key_and_text_alone() -> None:
    key = jax.random.key(5)
    together = prepared(batch_of([9, 16, 12], 16), key)
    turned = prepared(jax.tree.map(lambda x: x[::-1], batch_of([9, 16, 12], 16)), key)
    np.testing.assert_array_equal(written_of(turned)[::-1], written_of(together))
    other = prepared(batch_of([9, 16, 12], 16), jax.random.key(6))
    assert np.any(together["sampling"] != other["sampling"])
    # Eight tokens in ten and a half of those that are predicted are behind the mask, and none is another one.
    many = prepared(batch_of([400] * 8, 400), key)
    there = np.asarray(many["target_weights"]) > 0
    shown = np.take_along_axis(np.asarray(many["tokens"]), np.asarray(many["predict"]), 1)[there]
    kept = shown == np.asarray(many["targets"])[there]
    assert np.all((shown == 4) | kept)
    assert 0.80 < np.mean(shown == 4) < 0.90


def test_draws_are_of_the_softmax() -> None:
    logits = jnp.log(jnp.broadcast_to(jnp.asarray([0.5, 0.3, 0.2]), (1, 4000, 3)))
    key = jax.random.key_data(jax.random.key(0))[None]
    shares = np.bincount(np.asarray(sampled(logits, key))[0], minlength=3) / 4000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.03)


@pytest.mark.slow
def test_nothing_to_score_is_said_so() -> None:
    batch = prepared(batch_of([9], 16) | {"weights": jnp.zeros(1)}, jax.random.key(0))
    sums = jax.device_get(sums_of(params(), batch))
    assert sums["loss"] == 0
    assert math.isnan(TASK.score(sums)["loss"])


@pytest.mark.slow
def test_both_networks_learn_what_a_text_with_a_rule_has() -> None:
    """Each token is the one before plus 1: hidden ones can be told, and others found."""
    config = dataclasses.replace(CONFIG, initializer_range=0.1, hidden_size=64)
    model: Any = electra.Model(config, electra.PAIR)
    settings = OptimConfig(learning_rate=1e-3, schedule="constant", warmup_steps=50)
    schedule = make_schedule(settings, 1000)
    optimizer = make_optimizer(settings, schedule, *shapes_and_axes(model))
    state = init_state(init_params(model, 0), optimizer, False)
    step = jax.jit(make_train_step(TASK, of_batch(model, TASK), optimizer, schedule), donate_argnums=0)
    for number in range(1000):
        state, _ = step(state, ruled(number), np.uint32(0))
    found = TASK.score(jax.device_get(evaluate(model, state.params)))
    assert found["generator_accuracy"] > 0.5
    assert found["discriminator_loss"] < 0.2
    assert found["detection_precision"] > 0.9
    assert found["detection_recall"] > 0.7


def ruled(seed: int) -> dict[str, jax.Array]:
    batch = batch_of([24] * 64, 24)
    first = np.random.default_rng(seed).integers(0, 20, (64, 1))
    return batch | {"tokens": batch["tokens"].at[:, 1:-1].set(jnp.asarray(5 + (first + np.arange(22)) % 20, jnp.int32))}


def evaluate(model: Any, params: Any) -> Any:
    """Sums over texts with the rule that training has not seen."""
    batch = prepared(ruled(10**6), jax.random.key(9))
    return jax.jit(lambda params: TASK.sums(forward_of(model, params), batch, None))(params)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("task.discriminator_weight=0", "task.discriminator_weight=0.0: must be above 0"),
        ("task.mask_rate=1.5", "task.mask_rate=1.5: must lie between 0 and 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(option: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        load_config(None, ["task.name=replaced_token_detection", option])
    with pytest.raises(UserError, match="generator_fraction=0 must be above 0"):
        dataclasses.replace(CONFIG, generator_fraction=0)


@pytest.mark.parametrize("further", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_leaves_both_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str], further: bool) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    table, out = write_csv(tmp_path / "rows.csv", rows(48)), tmp_path / "out"
    arch = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "embedding_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    sizes = {**arch, "intermediate_size": 32, "max_position_embeddings": 32, "generator_fraction": 0.5}
    settings = [
        "task.name=replaced_token_detection", "model.family=electra", f"data.tokenizer={tmp_path / 'tokenizer'}",
        *(f"model.arch.{name}={value}" for name, value in sizes.items()), f"data.train={table}", "data.max_length=16",
        "data.buckets=[16]", "train.batch_size=16", "train.epochs=2", "train.compilation_cache=null", "eval.batch_size=8",
        "optim.learning_rate=1e-2", "log.progress=off", f"train.out={out}", "task.mask_rates={0: 0.4, 2: 0.2}",
    ]  # fmt: skip
    code, said, err = run(capsys, "train", *settings)
    assert code == 0, err
    assert "40 % from step 0, 20 % from step 2; of held-out texts: 15 %" in said
    assert "held-out metrics identical" in said
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["loss"] == pytest.approx(metrics["generator_loss"] + 50 * metrics["discriminator_loss"], rel=1e-6)
    # The export has both, each part one; all read the same tables.
    whole, one, other = (
        load(out / name, note=lambda _: None) for name in ("export", "parts/discriminator", "parts/generator")
    )
    assert [found.model.head for found in (whole, one, other)] == [electra.PAIR, "replaced_tokens", "masked_lm"]
    tokens = jnp.asarray([[2, 9, 4, 12, 3]])
    np.testing.assert_array_equal(
        whole.model.apply({"params": whole.params}, tokens).logits,
        one.model.apply({"params": one.params}, tokens).logits,
    )
    places = jnp.asarray([[1, 2]])
    np.testing.assert_array_equal(
        whole.model.apply({"params": whole.params}, tokens, predict=places).logits,
        other.model.apply({"params": other.params}, tokens, predict=places).logits,
    )
    with open_weights(out / "parts/discriminator") as weights:
        assert not [name for name in weights.names() if "generator" in name]
    # It is trained further from what it left, and from a discriminator alone, which gets a fresh generator.
    same = [one for one in settings if not one.startswith(("model.", "train.out", "data.tokenizer"))]
    for start, fresh in (("export", False), ("parts/discriminator", True)) if further else ():
        more = (f"model.init={out / start}", f"train.out={tmp_path / start}", "train.steps=1", "train.export=false")
        code, said, err = run(capsys, "train", *same, *more)
        assert code == 0, err
        assert ("initialised afresh: generator/" in said) == fresh
