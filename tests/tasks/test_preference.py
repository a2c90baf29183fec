"""Preferences: tokens of pairs, loss and gradients against torch, how rows are scored, and the path from pairs to a tuned model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import close, make_reference, ours_of
from tasks.test_causal_lm import write_decoder_tokenizer
from tasks.test_chat import MARKED, PLAIN, TALK
from tiny import refusal, run

from jaxft.config import load_config
from jaxft.data.batch import collate, text_shape
from jaxft.data.examples import make_split
from jaxft.data.packing import pack
from jaxft.data.processors.replies import Asked, Replies, shared_prompt
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.hub.convert import export_tensors
from jaxft.hub.pretrained import export_folder
from jaxft.layers import Compute
from jaxft.models.families import llama
from jaxft.models.initial import init_params
from jaxft.tasks import preference
from jaxft.tasks.contract import Targets
from jaxft.training.step import forward_of

Capture = pytest.CaptureFixture[str]
NAMES = ["task.name=preference", "data.text=chosen", "data.text_pair=rejected"]
PROMPT = "task.prompt=prompt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_decoder_tokenizer(tmp_path / "tokenizer")
    (made / "chat_template.jinja").write_text(PLAIN)
    return made


def read(folder: Path, asked: Asked, length: int | None = None) -> tuple[list[str], list[str]]:
    """All tokens of a prompt with its reply, and those of the reply."""
    tokenizer = Tokenizer(folder, length)
    (one,) = Replies(tokenizer).encode([asked])
    tokens = tokenizer.pieces(one.ids)
    return tokens, [token for token, mine in zip(tokens, one.replies, strict=True) if mine]


def test_texts_and_messages_are_told_apart_from_their_replies(folder: Path) -> None:
    assert read(folder, Asked("the cat", " is red", "x")) == (
        ["the", "cat", "is", "red", "</s>"],
        ["is", "red", "</s>"],
    )
    assert read(folder, Asked("the cat", " is red", "x"), 3) == (["the", "cat", "is"], ["is"])
    assert read(folder, Asked(None, "red cat", "x"))[1] == ["red", "cat", "</s>"]
    replies = ["the", "old", "fish", "sings", "</s>", "a", "house", "</s>"]
    for template in (PLAIN, MARKED):
        (folder / "chat_template.jinja").write_text(template)
        whole, of_all = read(folder, Asked(None, TALK, "x"))
        assert of_all == replies
        assert read(folder, Asked(TALK[:4], TALK[4:], "x")) == (whole, replies[5:])
        assert read(folder, Asked(TALK[:4], "a house", "x")) == (whole, replies[5:])
        assert read(folder, Asked("red cat", TALK[2:3], "x"))[1] == replies[:5]


def test_texts_around_which_the_tokenizer_puts_tokens_keep_them(folder: Path) -> None:
    from tiny import write_tokenizer

    write_tokenizer(folder / "bert")
    assert read(folder / "bert", Asked("the", " cat", "x")) == (["[CLS]", "the", "cat", "[SEP]"], ["cat", "[SEP]"])


def test_the_shared_prompt_is_what_both_begin_with() -> None:
    assert shared_prompt("the cat runs", "the cat is", "x") == ("the cat", " runs", " is")
    assert shared_prompt("red", "red", "x") == ("re", "d", "d")
    assert shared_prompt("", "red", "x") == ("", "", "red")
    other = [*TALK[:4], {"role": "assistant", "content": "a road"}]
    assert shared_prompt(TALK, other, "x") == (TALK[:4], TALK[4:], other[4:])
    assert shared_prompt(TALK, TALK, "x") == (TALK[:4], TALK[4:], TALK[4:])
    assert shared_prompt(TALK[:1], TALK[1:2], "x") == (None, TALK[:1], TALK[1:2])
    with pytest.raises(UserError, match=r"^x: one reply is a text and the other is a list"):
        shared_prompt("red", TALK, "x")


class Torch(NamedTuple):
    """A model of the reference and ours of the same parameters, on some pairs."""

    theirs: Any
    model: Any
    params: Any
    batch: dict[str, np.ndarray]
    logps: Any
    """[N, 2] of replies."""
    reference: Any
    tokens: Any
    """[N, 2] how many these are of."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Torch:
    """Seven pairs in packed rows; the last one has a reply without a token, and counts nothing."""
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(llama.TINY, num_hidden_layers=2)
    theirs, before = (make_reference(llama, config, "causal_lm", "llama", seed) for seed in (0, 1))
    model, params = ours_of(llama, theirs, config, "causal_lm", tmp_path_factory.mktemp("values"))
    rng, examples, texts = np.random.default_rng(0), [], []
    for number in range(7):
        prompt = rng.integers(5, 96, rng.integers(2, 6)).astype(np.int32)
        both = [np.concatenate([prompt, rng.integers(5, 96, rng.integers(1, 7)).astype(np.int32)]) for _ in range(2)]
        masks = [np.arange(len(ids)) >= len(prompt) for ids in both]
        masks[1] &= number < 6
        example, _ = preference.joined([(ids.tolist(), [0] * len(ids), 0) for ids in both], 2)
        examples.append({**example, "replies": np.concatenate(masks).astype(np.int32)})
        texts.append(list(zip(both, masks, strict=True)))

    def said(model: Any) -> Any:
        found = []
        for ids, mask in (one for several in texts[:6] for one in several):
            tokens = torch.tensor(ids.astype(np.int64))
            logps = torch.log_softmax(model(tokens[None]).logits[0], -1)[:-1].gather(1, tokens[1:, None])[:, 0]
            found.append((logps * torch.tensor(mask[1:])).sum())
        return torch.stack(found).reshape(-1, 2)

    reference = said(before).detach()
    for number, example in enumerate(examples):
        example["reference"] = np.asarray(reference[number] if number < 6 else [9.0, -9.0], np.float32)
    fields = preference.fields(load_config(None, NAMES), 0)
    packed = pack(make_split("train", [preference.Encoded(e, i) for i, e in enumerate(examples)], fields), 40)
    sizes = {"length": 40, "texts": int(packed.sizes("texts").max())}
    shape = dataclasses.replace(text_shape(len(packed), 40), sizes=tuple(sizes.items()))
    batch = collate([packed[i] for i in range(len(packed))], packed.fields, shape)
    assert batch["reference"].shape == (len(packed), sizes["texts"], 2)
    tokens = torch.tensor([[mask.sum() for _, mask in several] for several in texts[:6]])
    return Torch(theirs, model, params, batch, said(theirs), reference, tokens)


def wanted(pairs: Torch, options: preference.Config) -> tuple[Any, Any]:
    """The losses of pairs as their papers have them, and rewards."""
    import torch

    beta, smoothing = options.beta, options.label_smoothing
    gains = pairs.logps - (pairs.reference if options.reference == "columns" else 0)
    rewards = beta * gains
    if options.loss == "ipo":
        gains = gains / pairs.tokens
    margin = gains[:, 0] - gains[:, 1]
    if options.loss == "ipo":
        return (margin - 1 / (2 * beta)) ** 2, rewards
    if options.loss == "hinge":
        return torch.relu(1 - beta * margin), rewards
    of = torch.nn.functional.logsigmoid
    return -of(beta * margin) * (1 - smoothing) - of(-beta * margin) * smoothing, rewards


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="sigmoid"),
        pytest.param({"beta": 0.5, "label_smoothing": 0.2}, id="smoothed"),
        pytest.param({"loss": "ipo", "beta": 0.3}, id="ipo"),
        pytest.param({"loss": "hinge", "beta": 0.4}, id="hinge", marks=pytest.mark.slow),
        pytest.param({"reference": "none"}, id="no reference", marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_torch(pairs: Torch, options: dict[str, Any]) -> None:
    task = preference.Task(preference.Config("preference", **options))
    losses, rewards = wanted(pairs, task.options)
    pairs.theirs.zero_grad()
    losses.mean().backward(retain_graph=True)
    batch = {name: jnp.asarray(value) for name, value in pairs.batch.items()}
    if task.options.reference == "none":
        del batch["reference"]

    def loss(params: Any) -> tuple[jax.Array, Any]:
        sums = task.sums(forward_of(pairs.model, params), task.prepare(batch, jax.random.key(0)), None)
        return sums["loss"] / sums["weight"], sums

    (value, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(pairs.params)
    close(value, losses.mean(), "loss")
    scores: Any = task.score(jax.device_get(sums))
    assert scores["rows"] == 6
    assert scores["accuracy"] == pytest.approx(float((rewards[:, 0] > rewards[:, 1]).double().mean()))
    np.testing.assert_allclose(scores["chosen_reward"], rewards[:, 0].mean().item(), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(scores["margin"], (rewards[:, 0] - rewards[:, 1]).mean().item(), rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(scores["rejected_logp"], pairs.logps[:, 1].mean().item(), rtol=2e-5, atol=2e-5)
    named = dict(pairs.theirs.named_parameters())
    for tensor in export_tensors(gradient, llama.hf_layout(pairs.model.config, "causal_lm"), bare=False):
        close(tensor.read(), named[tensor.name].grad, tensor.name)


@pytest.mark.slow
def test_tiles_of_the_vocabulary_change_nothing(pairs: Torch) -> None:
    task, found = preference.Task(), []
    for tile in (None, 32):
        model = llama.Model(pairs.model.config, "causal_lm", Compute(vocab_tile=tile))
        batch = task.prepare({name: jnp.asarray(value) for name, value in pairs.batch.items()}, jax.random.key(0))
        found.append(jax.device_get(task.sums(forward_of(model, pairs.params), batch, None)))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, atol=1e-5, err_msg=name)


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder with a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("decoder")
    config = dataclasses.replace(llama.TINY, vocab_size=64, max_position_embeddings=40, num_hidden_layers=2)
    model = llama.Model(config, "causal_lm", Compute())
    tokenizer = write_decoder_tokenizer(folder / "tokenizer")
    (tokenizer / "chat_template.jinja").write_text(PLAIN)
    export_folder(folder / "model", {}, llama, model, init_params(model, 1), tokenizer_folder=tokenizer)
    return folder / "model"


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Animals run, and never are red."""
    rng = np.random.default_rng(seed)
    animals, rows = ["cat", "dog", "bird", "fish"], []
    for number in range(count):
        one = {"prompt": f"the {rng.choice(animals)}", "chosen": " runs fast", "rejected": " is red"}
        rows.append({**one, "more": {"id": number, "of": ["[1]", None]}, "text": "[1]"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(capsys: Capture, model: Path, rows: Path, out: Path, *more: object) -> list[dict[str, Any]]:
    code, _, err = run(capsys, "score", model, rows, out, "data.max_length=16", *more)
    assert code == 0, err
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_rows_keep_what_they_have_beside_their_scores(decoder: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = write_pairs(tmp_path / "pairs.jsonl", 5)
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    names = [*NAMES[1:], "--prompt", "prompt"]
    found = scored(capsys, decoder, rows, tmp_path / "a.jsonl", *names, "--batch-size", 2)
    added = ("chosen_logp", "chosen_tokens", "rejected_logp", "rejected_tokens")
    assert [{name: row[name] for name in row if name not in added} for row in found] == given
    assert all(row["chosen_tokens"] == row["rejected_tokens"] == 3 and row["chosen_logp"] < 0 for row in found)
    # The prompt is counted where a text stands alone: what is before its reply, and the reply.
    together = tmp_path / "together.jsonl"
    together.write_text("".join(json.dumps({"text": row["prompt"] + row["chosen"]}) + "\n" for row in given))
    alone = scored(capsys, decoder, together, tmp_path / "b.jsonl")
    assert all(
        row["text_tokens"] == 4 and row["text_logp"] < other["chosen_logp"]
        for row, other in zip(alone, found, strict=True)
    )
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(row["prompt"] + row["chosen"] + "\n" for row in given))
    assert scored(capsys, decoder, lines, tmp_path / "e.jsonl") == alone
    # Conversations, whole or with a prompt of their own, are scored alike.
    talks = tmp_path / "talks.jsonl"
    talks.write_text(json.dumps({"prompt": TALK[1:2], "chosen": TALK[2:3], "messages": TALK[1:3]}) + "\n")
    parted = scored(capsys, decoder, talks, tmp_path / "c.jsonl", "data.text=chosen", "--prompt", "prompt")
    whole = scored(capsys, decoder, talks, tmp_path / "d.jsonl", "data.text=messages")
    assert parted[0]["chosen_logp"] == pytest.approx(whole[0]["messages_logp"], rel=1e-6)
    assert parted[0]["chosen_tokens"] == whole[0]["messages_tokens"] == 5


def test_what_cannot_be_scored_is_one_line(decoder: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = write_pairs(tmp_path / "pairs.jsonl", 2)
    score = ["score", decoder, rows]
    assert "scored rows are written as JSON Lines" in refusal(capsys, *score, tmp_path / "out.csv")
    assert "is the file that is read" in refusal(capsys, *score, rows)
    assert "its folder is not there" in refusal(capsys, *score, tmp_path / "none" / "out.jsonl")
    assert "--batch-size 0: must lie in" in refusal(capsys, *score, tmp_path / "out.jsonl", "--batch-size", 0)
    told = refusal(capsys, *score, tmp_path / "out.jsonl", "data.text=reply")
    assert "pairs.jsonl:1: no column 'reply'" in told
    (tmp_path / "empty.jsonl").write_text("")
    told = refusal(capsys, "score", decoder, tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
    assert "the data set is empty" in told
    (tmp_path / "empty.jsonl").unlink()
    told = refusal(capsys, *score, tmp_path / "out.jsonl", "data.text=more")
    assert "column 'more' holds a mapping" in told
    assert not [path for path in tmp_path.iterdir() if path != rows]


def test_pairs_are_scored_and_learnt(decoder: Path, tmp_path: Path, capsys: Capture) -> None:
    pairs = tmp_path / "scored.jsonl"
    scored(capsys, decoder, write_pairs(tmp_path / "pairs.jsonl", 48), pairs, *NAMES[1:], "--prompt", "prompt")
    settings = [
        *NAMES, PROMPT, f"model.init={decoder}", f"data.train={pairs}", "data.max_length=16", "data.packing=none",
        "model.lora.rank=4", "train.batch_size=8", "train.epochs=3", "log.progress=off", "train.compilation_cache=null",
        "eval.batch_size=8", "eval.metric=loss", "optim.learning_rate=2e-2", f"train.out={tmp_path / 'out'}",
    ]  # fmt: skip
    code, out, err = run(capsys, "train", *settings)
    assert code == 0, err
    assert "3.0 tokens in a chosen reply, 3.0 in a rejected one" in out
    assert "held-out metrics identical" in out
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    evals = [record for record in log if record["kind"] == "eval"]
    assert evals[-1]["loss"] < 0.4
    assert evals[-1]["accuracy"] == 1


@pytest.mark.parametrize(
    ("more", "column", "said"),
    [
        (["data.text_pair=null"], None, "preference reads two replies, the better one first: name the columns"),
        (["data.text_pair=chosen"], None, "name a column twice (prompt, chosen, chosen)"),
        (["task.beta=0"], None, "task.beta=0.0: must be above 0"),
        (["task.loss=hinge", "task.label_smoothing=0.1"], None, "is of task.loss=sigmoid, not of hinge"),
        (["task.label_smoothing=0.5"], None, "must lie in 0..0.5"),
        ([], ("chosen_logp", None), "no column 'chosen_logp': let the reference add it: jaxft score "),
        ([], ("rejected_logp", "x"), "column 'rejected_logp' holds 'x'; expected a number, as jaxft score adds it"),
        ([], ("rejected_tokens", 4), "column 'rejected_tokens' says 4 tokens, and the reply has 3"),
    ],
)
def test_what_is_no_preference_is_one_line(
    decoder: Path, more: list[str], column: Any, said: str, tmp_path: Path, capsys: Capture
) -> None:
    row = {"prompt": "the", "chosen": " cat runs", "rejected": " dog runs"}
    row |= {"chosen_logp": -1, "chosen_tokens": 3, "rejected_logp": -2.5, "rejected_tokens": 3}
    row |= {} if column is None else {column[0]: column[1]}
    row = {name: value for name, value in row.items() if value is not None}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    settings = [
        *NAMES,
        PROMPT,
        f"model.init={decoder}",
        f"data.train={tmp_path / 'rows.jsonl'}",
        f"train.out={tmp_path / 'out'}",
    ]
    code, _, err = run(capsys, "train", *settings, "data.max_length=16", "log.progress=off", *more)
    assert code == 2
    told = err.splitlines()[-1]
    assert said in told
    assert len(told) <= 300


def test_pairs_without_a_reply_are_told(folder: Path) -> None:
    config = load_config(None, [*NAMES, PROMPT, "task.reference=none"])
    rows = [Row(("the cat is", " red", " not red"), "a"), Row(("the cat is very very big", " red", " big"), "b")]
    encoded = preference.encode(rows, Tokenizer(folder, 5), Targets(), config)
    split = make_split("train", encoded, preference.fields(config, 0))
    assert preference.Task().learnable(split) == 1
    first, second = preference.Task().remarks(split)
    assert first == "train: 2 pairs, 1.0 tokens in a chosen reply, 1.0 in a rejected one"
    assert "1 of 2 pairs have a reply without a token" in second
