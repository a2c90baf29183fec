"""Values and gradients of RoBERTa, XLM-RoBERTa and CamemBERT against `transformers` on torch, in process, in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from reference import close, compare, compare_choices, compare_spans, make_reference, ours_of, torch_inputs

from jaxft.errors import UserError
from jaxft.inference.load import load
from jaxft.layers import Compute
from jaxft.models.contract import architecture_of
from jaxft.models.example import example_batch
from jaxft.models.families import roberta
from jaxft.models.initial import init_params

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SMALL = dataclasses.replace(roberta.TINY, num_hidden_layers=2)
HEADS = [head for head in roberta.HEADS if head not in (None, "question_answering", "multiple_choice")]
VARIANTS: dict[str, dict[str, Any]] = {
    "two types": {"type_vocab_size": 2},
    "padding is 0": {"pad_token_id": 0},
    "padding is 5": {"pad_token_id": 5},
    "untied": {"tie_word_embeddings": False},
    "nine labels": {"num_labels": 9},
    "another activation": {"hidden_act": "gelu_new"},
    "large eps": {"layer_norm_eps": 1e-3},
    "one layer, one head": {"num_hidden_layers": 1, "num_attention_heads": 1},
    "wide mlp": {"intermediate_size": 160},
    "short position table": {"max_position_embeddings": 14},
}
CONCERNED = {"untied": "masked_lm", "nine labels": "token_classification"}
# BERT's tests vary the encoder that both have.
OWN = ("two types", "padding is 0", "padding is 5", "untied", "short position table")
CASES = [({}, head, kind) for head, kind in zip(HEADS, [*roberta.MODEL_TYPES], strict=True)] + [
    pytest.param(
        changes,
        CONCERNED.get(name, HEADS[i % len(HEADS)]),
        "roberta",
        marks=[] if name in OWN else [pytest.mark.slow],
    )
    for i, (name, changes) in enumerate(VARIANTS.items())
]


@pytest.mark.parametrize(("changes", "head", "model_type"), CASES)
def test_loss_logits_and_every_gradient_equal_the_reference(
    changes: dict[str, Any], head: str, model_type: str, tmp_path: Path
) -> None:
    compare(roberta, dataclasses.replace(SMALL, **changes), head, model_type, tmp_path)


@pytest.mark.slow  # BERT's
def test_starts_and_ends_of_answers_equal_the_reference(tmp_path: Path) -> None:
    compare_spans(roberta, SMALL, "roberta", tmp_path)


@pytest.mark.parametrize(
    "model_type",
    [next(iter(roberta.MODEL_TYPES)), *(pytest.param(k, marks=pytest.mark.slow) for k in [*roberta.MODEL_TYPES][1:])],
)
def test_scores_of_choices_equal_the_reference(model_type: str, tmp_path: Path) -> None:
    compare_choices(roberta, dataclasses.replace(SMALL, num_hidden_layers=1), model_type, tmp_path)


def test_padding_inside_a_row_moves_positions_as_in_the_reference(tmp_path: Path) -> None:
    theirs = make_reference(roberta, SMALL, None, "roberta")
    model, params = ours_of(roberta, theirs, SMALL, None, tmp_path)
    batch = example_batch(roberta.facts(SMALL), 3, length=12)
    batch["tokens"][0, 4] = batch["tokens"][1, 0] = 1
    out = model.apply({"params": params}, **batch)
    expected = theirs(**torch_inputs(batch))
    seen = batch["mask"].astype(bool)
    close(out.hidden[seen], expected.last_hidden_state[torch.tensor(seen)], "hidden states")
    close(out.pooled, expected.pooler_output, "pooled")


@pytest.mark.slow  # rows that hold several texts are tried in tests/tasks/test_packed_texts.py
def test_packed_texts_equal_texts_of_their_own() -> None:
    model: Any = roberta.Model(SMALL, "token_classification", Compute())
    params = init_params(model, 0)
    tokens = np.random.default_rng(0).integers(5, 96, (1, 15)).astype(np.int32)
    segments = np.repeat([1, 2, 3], [4, 6, 5])[None]
    positions = np.concatenate([np.arange(n) for n in (4, 6, 5)])[None]
    packed = model.apply({"params": params}, tokens, segments=segments, positions=positions).logits[0]
    for number in (1, 2, 3):
        chosen = segments[0] == number
        alone = model.apply({"params": params}, tokens[:, chosen]).logits[0]
        np.testing.assert_allclose(packed[chosen], alone, atol=2e-6)


@pytest.mark.parametrize("model_type", roberta.MODEL_TYPES)
def test_a_folder_comes_back_as_the_class_that_it_was(model_type: str, tmp_path: Path) -> None:
    theirs = make_reference(roberta, SMALL, "classification", model_type)
    theirs.save_pretrained(tmp_path / "theirs")
    said: list[str] = []
    load(tmp_path / "theirs", note=said.append).save(tmp_path / "ours")
    config = json.loads((tmp_path / "ours/config.json").read_text())
    assert config["model_type"] == model_type
    assert config["architectures"] == [architecture_of(roberta, "classification", model_type)]
    again = type(theirs).from_pretrained(tmp_path / "ours")
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_row_has_as_many_tokens_as_there_are_rows_behind_padding() -> None:
    config = dataclasses.replace(SMALL, max_position_embeddings=514)
    assert roberta.facts(config).limit == 512
    model: Any = roberta.Model(SMALL)
    with pytest.raises(UserError, match="beyond the model's position table of 40"):
        jax.eval_shape(model.init, jax.random.key(0), np.ones((1, 41), np.int32))


def test_positions_need_a_padding_token() -> None:
    with pytest.raises(UserError, match="positions are counted from it"):
        dataclasses.replace(SMALL, pad_token_id=None)
