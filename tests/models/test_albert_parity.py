"""Values and gradients of ALBERT against `transformers` on torch, in process, in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from reference import close, compare_head, drawn, make_reference, ours_of, torch_inputs

from jaxft.errors import UserError
from jaxft.hub.source import make_config, open_source
from jaxft.inference.load import load
from jaxft.layers import Compute
from jaxft.models.example import example_batch
from jaxft.models.families import albert
from jaxft.models.initial import init_params, shapes_and_axes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = dataclasses.replace(albert.TINY, num_hidden_layers=1, inner_group_num=1)
HEADS = [
    head for head in albert.HEADS if head not in (None, "sentence_order", "pretraining")
]  # tests/tasks has the last
VALUES: dict[str, list[Any]] = {
    "vocab_size": [96, 61],
    "embedding_size": [24, 32, 48],
    "hidden_size": [32, 48],
    "num_hidden_layers": [3, 4, 5],
    "num_hidden_groups": [1, 2, 3],
    "inner_group_num": [1, 2],
    "num_attention_heads": [1, 2, 4],
    "intermediate_size": [64, 24],
    "hidden_act": ["gelu_new", "gelu", "relu", "silu"],
    "max_position_embeddings": [40, 20],
    "type_vocab_size": [2, 1, 4],
    "layer_norm_eps": [1e-12, 1e-3],
    "pad_token_id": [0, 7, None],
    "tie_word_embeddings": [True, False],
}
GROUPS = {"num_hidden_layers": 3, "num_hidden_groups": 2, "inner_group_num": 2}
QUICK: list[tuple[str, dict[str, Any]]] = [
    ("classification", {"num_labels": 5, "hidden_act": "relu", "embedding_size": 32, "num_hidden_layers": 2}),
    ("masked_lm", {"tie_word_embeddings": False, "inner_group_num": 2, "type_vocab_size": 4, "layer_norm_eps": 1e-3}),
    ("token_classification", {"pad_token_id": None, "num_attention_heads": 2, "embedding_size": 48}),
]


@pytest.mark.parametrize(("head", "changes"), QUICK)
def test_values_and_gradients_equal_the_reference(head: str, changes: dict[str, Any], tmp_path: Path) -> None:
    compare_head(albert, dataclasses.replace(SMALL, **changes), head, "albert", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_random_configs_equal_the_reference(number: int, tmp_path: Path) -> None:
    compare_head(albert, drawn(SMALL, VALUES, number), HEADS[number % len(HEADS)], "albert", tmp_path)


def test_both_heads_of_pre_training(tmp_path: Path) -> None:
    theirs = make_reference(albert, SMALL, "sentence_order", "albert")
    assert type(theirs).__name__ == "AlbertForPreTraining"
    theirs.save_pretrained(tmp_path / "theirs")
    batch = example_batch(albert.facts(SMALL), 3, length=12)
    expected, seen = theirs(**torch_inputs(batch)), batch["mask"].astype(bool)
    notes: list[str] = []
    words = load(tmp_path / "theirs", note=notes.append)
    assert words.model.head == "masked_lm"
    assert any("sop_classifier.classifier.weight" in note for note in notes)
    out = words.model.apply({"params": words.params}, **batch)
    close(out.logits[seen], expected.prediction_logits[torch.tensor(seen)], "predictions")
    order = load(tmp_path / "theirs", head="sentence_order", note=lambda _: None)
    close(order.model.apply({"params": order.params}, **batch).logits, expected.sop_logits, "order")
    # Written alone, the head for order is known by its tensors.
    order.save(tmp_path / "ours")
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert written["architectures"] == ["AlbertForPreTraining"]
    assert open_source(str(tmp_path / "ours"), print).head == "sentence_order"
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    assert torch.equal(again(**torch_inputs(batch)).sop_logits, expected.sop_logits)


@pytest.mark.slow
def test_gradients_of_the_order_of_sentences_equal_the_reference(tmp_path: Path) -> None:
    theirs = make_reference(albert, SMALL, "sentence_order", "albert")
    model, params = ours_of(albert, theirs, SMALL, "sentence_order", tmp_path / "values")
    batch, labels = example_batch(albert.facts(SMALL), 4, length=12), np.array([1, 0, 0, 1])

    def loss_of(params: Any) -> jax.Array:
        return -jax.nn.log_softmax(model.apply({"params": params}, **batch).logits)[np.arange(4), labels].mean()

    loss, gradient = jax.jit(jax.value_and_grad(loss_of))(params)
    expected = torch.nn.functional.cross_entropy(theirs(**torch_inputs(batch)).sop_logits, torch.tensor(labels))
    expected.backward()
    close(loss, expected, "loss")
    grads = dict(theirs.named_parameters())
    close(gradient["head"]["linear"]["kernel"].T, grads["sop_classifier.classifier.weight"].grad, "classifier")
    close(gradient["pooler"]["kernel"].T, grads["albert.pooler.weight"].grad, "pooler")
    table = grads["albert.embeddings.word_embeddings.weight"].grad
    close(gradient["embed"]["token"]["embedding"], table, "tokens")


@pytest.mark.parametrize(
    ("layers", "groups", "inner"), [(12, 1, 1), (12, 4, 1), (5, 3, 2), (7, 5, 1), (6, 6, 1), (1, 1, 3)]
)
def test_layers_run_in_the_order_of_the_reference(layers: int, groups: int, inner: int) -> None:
    sizes = {"num_hidden_layers": layers, "num_hidden_groups": groups, "inner_group_num": inner}
    config = dataclasses.replace(SMALL, **sizes)
    theirs = transformers.AlbertModel(transformers.AlbertConfig(**albert.config_to_hf(config)))
    ran, numbers = [], {}
    for group in theirs.encoder.albert_layer_groups:
        for layer in group.albert_layers:
            numbers[layer] = len(numbers)
            layer.register_forward_hook(lambda layer, inputs, output: ran.append(numbers[layer]))
    with torch.no_grad():
        theirs(torch.ones((1, 3), dtype=torch.int64))
    assert config.order == tuple(ran)
    assert set(ran) == set(range(config.stacked_layers))
    assert albert.facts(config).stacks[0].layers == len(ran)
    shapes: Any = shapes_and_axes(albert.Model(config))[0]
    assert len(shapes["layers"]["mlp"]["up"]["bias"]) == groups * inner


@pytest.mark.parametrize("head", ["classification", pytest.param("masked_lm", marks=pytest.mark.slow)])
def test_a_folder_comes_back_as_it_was(head: str, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, classifier_dropout=0.3, pad_token_id=1, **GROUPS)
    theirs = make_reference(albert, config, head, "albert")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs", note=lambda _: None)
    pooler = head == "classification"
    assert (loaded.model.config, loaded.model.head) == (dataclasses.replace(config, pooler=pooler), head)
    loaded.save(tmp_path / "ours")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert after["architectures"] == before["architectures"]
    assert {name: after[name] for name in albert.config_to_hf(config)} == {
        name: before[name] for name in albert.config_to_hf(config)
    }
    again = type(theirs).from_pretrained(tmp_path / "ours")
    for (name, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_states_and_attentions_of_all_places_are_the_references(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, **GROUPS)
    theirs = make_reference(albert, config, None, "albert")
    params = ours_of(albert, theirs, config, None, tmp_path)[1]
    batch = example_batch(albert.facts(config), 2, length=14)
    seen = batch["mask"].astype(bool)
    wanted = theirs(**torch_inputs(batch), output_hidden_states=True, output_attentions=True)
    for layers in ("unrolled", "scanned"):
        computed: Any = albert.Model(config, None, Compute(layers=layers))
        out: Any = computed.apply({"params": params}, **batch, hidden_states=True, attentions=True)
        assert len(out.hidden_states) == len(wanted.hidden_states) == 7
        for ours, state in zip(out.hidden_states, wanted.hidden_states, strict=True):
            close(ours[seen], state[torch.tensor(seen)], "state")
        for ours, looked in zip(out.attentions, wanted.attentions, strict=True):
            close(np.asarray(ours).swapaxes(1, 2)[seen], looked.transpose(1, 2)[torch.tensor(seen)], "attention")


def test_scanned_places_hold_no_copies_of_parameters() -> None:
    config = dataclasses.replace(SMALL, num_hidden_layers=12)
    model: Any = albert.Model(config, None, Compute(layers="scanned"))
    batch = example_batch(model.facts, 1, length=4)
    params = init_params(model, 0)
    traced = str(jax.make_jaxpr(lambda params: model.apply({"params": params}, **batch).hidden)(params))
    assert "32,64]" in traced
    assert "12,32,64]" not in traced


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"num_hidden_groups": 2}, "num_hidden_groups=2 is more than num_hidden_layers=1: some groups would never run"),
        ({"inner_group_num": 0}, "inner_group_num=0 must be at least 1"),
        ({"embedding_size": 0}, "embedding_size=0 must be at least 1"),
        ({"classifier_dropout": None}, "classifier_dropout must be a number"),
        ({"classifier_dropout": 1.0}, "classifier_dropout=1.0 must lie in 0..1"),
    ],
)
def test_what_a_config_cannot_be(stated: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config(albert, dataclasses.asdict(SMALL) | stated)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
