"""Instruction tuning: conversations as the reference writes them, the loss of replies alone, and the path to an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import refusal, run, write_decoder_tokenizer

from jaxft.config import load_config
from jaxft.data.processors.chat import ChatTemplate, check_messages
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.tasks.chat import Task, encode

Capture = pytest.CaptureFixture[str]
PLAIN = (
    "{% for m in messages %}the {{ m['role'] }} is {% if m['role'] == 'assistant' %}{{ m['content'] }}</s>"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}the assistant is {% endif %}"
)
MARKED = PLAIN.replace("{{ m['content'] }}</s>", "{% generation %}{{ m['content'] }}</s>{% endgeneration %}")
TALK = [
    {"role": "system", "content": "a small animal"},
    {"role": "user", "content": "red cat"},
    {"role": "assistant", "content": "the old fish sings"},
    {"role": "user", "content": "not big"},
    {"role": "assistant", "content": "a house"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = write_decoder_tokenizer(tmp_path / "tokenizer")
    (made / "chat_template.jinja").write_text(PLAIN)
    return made


def encoded(folder: Path, messages: Any, *more: str, length: int | None = None) -> dict[str, np.ndarray]:
    config = load_config(None, ["task.name=chat", *more])
    row = Row((messages,), "talk.jsonl:1")
    (one,) = encode([row], Tokenizer(folder, length), None, config)
    return dict(one.example)


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_tokens_and_replies_are_those_of_the_reference(folder: Path, template: str) -> None:
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").write_text(template)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = reference.apply_chat_template(
        TALK, chat_template=MARKED, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encoded(folder, TALK)
    assert ours["tokens"].tolist() == theirs["input_ids"]
    assert ours["replies"].tolist() == theirs["assistant_masks"]
    asked = ChatTemplate(folder).text(TALK[:2], reply=True)
    assert asked == reference.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)


def test_templates_of_settings_are_read_too(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"its tokenizer has no chat template; put one into chat_template\.jinja"):
        ChatTemplate(folder)
    for found in (PLAIN, [{"name": "tool", "template": "x"}, {"name": "default", "template": PLAIN}]):
        path.write_text(json.dumps({**settings, "chat_template": found}))
        assert ChatTemplate(folder).text(TALK[:2]) == "the system is a small animal the user is red cat "
    path.write_text(json.dumps({**settings, "chat_template": "{{ eos_token }}{{ bos_token }}"}))
    assert ChatTemplate(folder).text(TALK) == "</s>"


def test_replies_that_begin_inside_a_token_are_warned_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Seen with a template that ends in a blank, which byte-level vocabularies put to the next word."""
    encoded(folder, TALK)
    assert caplog.text == ""
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}the ca{% if m['role'] == 'assistant' %}{% generation %}t {{ m['content'] }}{% endgeneration %} {% endif %}"
        "{% endfor %}"
    )
    encoded(folder, TALK)
    assert caplog.text.count("a reply begins inside a token (talk.jsonl:1)") == 1


def test_the_loss_is_of_replies_alone() -> None:
    batch = {
        "tokens": jnp.asarray([[5, 6, 7, 8, 9, 0]]),
        "mask": jnp.asarray([[1, 1, 1, 1, 1, 0]]),
        "replies": jnp.asarray([[0, 0, 1, 0, 1, 0]]),
        "weights": jnp.ones(1),
    }
    alone = Task().prepare(batch, jax.random.key(0))
    np.testing.assert_array_equal(alone["targets"], [[6, 7, 8, 9, 0, 0]])
    np.testing.assert_array_equal(alone["target_weights"], [[0, 1, 0, 1, 0, 0]])
    packed = batch | {"segments": jnp.asarray([[1, 1, 1, 1, 2, 0]])}
    np.testing.assert_array_equal(Task().prepare(packed, jax.random.key(0))["target_weights"], [[0, 1, 0, 0, 0, 0]])


def test_templates_that_forget_what_was_said_are_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[-1]['content'] }}</s>")
    with pytest.raises(UserError, match="writes earlier messages otherwise once others follow"):
        encoded(folder, TALK)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{% for a in range(10**9) %}{% endfor %}",
        "{% if %}",
        "{{ raise_exception('no') }}",
    ],
)
def test_templates_that_do_what_they_may_not_are_one_line(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="its chat template does not take the messages: ") as caught:
        ChatTemplate(folder).text(TALK)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "messages", [None, [], "hello", ["hello"], [{"role": "user"}], [{"content": "x"}], [{"role": 1, "content": "x"}]]
)
def test_what_is_no_conversation_is_told(messages: object) -> None:
    with pytest.raises(UserError, match=r"^talk.jsonl:3: .*a conversation is a list of messages"):
        check_messages(messages, "talk.jsonl:3")


def talks(path: Path, count: int, seed: int = 0) -> Path:
    rng, pairs = (
        np.random.default_rng(seed),
        [("cat", "animal"), ("house", "thing"), ("fish", "animal"), ("car", "thing")],
    )
    chosen = [pairs[i] for i in rng.integers(0, len(pairs), count)]
    made = [[{"role": "user", "content": f"the {a}"}, {"role": "assistant", "content": f"a {b}"}] for a, b in chosen]
    path.write_text("".join(json.dumps({"messages": one}) + "\n" for one in made))
    return path


@pytest.mark.parametrize("packing", ["best_fit", pytest.param("none", marks=pytest.mark.slow)])
def test_train_export_and_answer(folder: Path, packing: str, tmp_path: Path, capsys: Capture) -> None:
    settings = [
        "task.name=chat", "model.family=llama", f"data.train={talks(tmp_path / 'talks.jsonl', 120)}", "data.text=messages",
        "model.arch={vocab_size: 64, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2, "
        "intermediate_size: 32, max_position_embeddings: 32}", f"data.tokenizer={folder}",
        "data.max_length=24", f"data.packing={packing}", "train.batch_size=8", "train.epochs=2", "log.progress=off",
        "train.compilation_cache=null", "eval.batch_size=8", "optim.learning_rate=1e-2", f"train.out={tmp_path / 'out'}",
        "log.samples=2", "log.prompts=[the cat]", "log.sample_tokens=4",
    ]  # fmt: skip
    code, out, err = run(capsys, "train", *settings)
    assert code == 0, err
    assert "tokens are of replies" in out
    assert "held-out metrics identical" in out
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    evals = [record["loss"] for record in log if record["kind"] == "eval"]
    assert evals[-1] < evals[0]
    model = tmp_path / "out" / "export"
    assert (model / "chat_template.jinja").read_text() == PLAIN
    code, alone, err = run(capsys, "generate", model, "--chat", "--prompt", "the cat", "--max-new-tokens", 4)
    assert code == 0, err
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()][-3:]
    assert (samples[0]["prompt"], samples[0]["text"] + "\n", "wanted" in samples[0]) == ("the cat", alone, False)
    assert [(one["prompt"][:4], one["wanted"] in ("a animal", "a thing")) for one in samples[1:]] == [
        ("the ", True)
    ] * 2
    asked = [{"role": "user", "content": "the cat"}]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"text": asked}) + "\n" + json.dumps({"text": "the cat"}) + "\n")
    code, out, err = run(capsys, "generate", model, tmp_path / "asked.jsonl", "--chat", "--max-new-tokens", 4)
    assert code == 0, err
    assert [json.loads(line)["text"] + "\n" for line in out.splitlines()] == [alone, alone]
    assert "--system is for conversations; give --chat too" in refusal(
        capsys, "generate", model, "--prompt", "x", "--system", "y"
    )
    told = refusal(capsys, "generate", model, tmp_path / "asked.jsonl", "--max-new-tokens", 4)
    assert "column 'text' holds a list; expected a string" in told
