"""Values and gradients of NomicBERT, GTE and EuroBERT against `transformers` on torch, in process, in float32."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from kinds import tiny_config
from reference import close, compare, drawn, make_reference, ours_of, torch_inputs
from safetensors.torch import load_file, save_file

from jaxft.errors import UserError
from jaxft.hub.source import fresh_config, make_config
from jaxft.inference.load import load
from jaxft.layers import Compute, Rotary
from jaxft.models.example import example_batch
from jaxft.models.families import rotary_bert
from jaxft.models.initial import init_params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

NONE: dict[str, Any] = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
KINDS = ("nomic_bert", "gte", "eurobert")
SMALL = {kind: dataclasses.replace(tiny_config(kind), num_hidden_layers=1, **NONE) for kind in KINDS}
HEADS = [head for head in rotary_bert.HEADS if head is not None]
LLAMA3 = Rotary(10_000.0, "llama3", 8.0, 1.0, 4.0, 32)
VALUES: dict[str, list[Any]] = {
    "vocab_size": [96, 61],
    "hidden_size": [32, 48],
    "num_hidden_layers": [1, 2, 3],
    "num_attention_heads": [4, 2],
    "head_dim": [None, 6],
    "intermediate_size": [64, 24],
    "hidden_act": ["silu", "gelu", "relu"],
    "max_position_embeddings": [64, 20],
    "layer_norm_eps": [1e-12, 1e-3],
    "tie_word_embeddings": [True, False],
    "rope": [Rotary(1000.0), Rotary(30.0), Rotary(500.0, "linear", 4.0), LLAMA3],
    "num_labels": [2, 5],
}
OWN: dict[str, dict[str, list[Any]]] = {
    "nomic_bert": {"type_vocab_size": [2, 1, 4], "pad_token_id": [0, 7]},
    "gte": {"type_vocab_size": [1, 0, 3], "pad_token_id": [1, 7, None]},
    "eurobert": {
        "pad_token_id": [0, 7, None],
        "num_key_value_heads": [None, 1, 2],
        "attention_bias": [False, True],
        "mlp_bias": [True, False],
        "classifier_pooling": ["late", "mean", "bos"],
    },
}
QUICK: list[tuple[str, str, dict[str, Any]]] = [
    ("nomic_bert", "classification", {"num_labels": 5, "type_vocab_size": 4, "pad_token_id": 7, "head_dim": 6}),
    ("gte", "masked_lm", {"type_vocab_size": 0, "hidden_act": "gelu", "tie_word_embeddings": False, "rope": LLAMA3}),
    ("eurobert", "classification", {"num_labels": 5, "pad_token_id": 7, "layer_norm_eps": 1e-3}),
]


@pytest.mark.parametrize(("kind", "head", "changes"), QUICK)
def test_values_and_gradients_equal_the_reference(
    kind: str, head: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    compare(rotary_bert, dataclasses.replace(SMALL[kind], **changes), head, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
@pytest.mark.parametrize("kind", KINDS)
def test_random_configs_equal_the_reference(kind: str, number: int, tmp_path: Path) -> None:
    config = drawn(SMALL[kind], VALUES | OWN[kind], number)
    compare(rotary_bert, config, HEADS[number % len(HEADS)], kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_states_and_attentions_of_all_layers_are_the_references(kind: str, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL[kind], num_hidden_layers=3)
    theirs = make_reference(rotary_bert, config, None, kind)
    params = ours_of(rotary_bert, theirs, config, None, tmp_path)[1]
    batch = example_batch(rotary_bert.facts(config), 2, length=14)
    seen = batch["mask"].astype(bool)
    wanted = theirs(**torch_inputs(batch), output_hidden_states=True, output_attentions=True)
    for layers in ("unrolled", "scanned"):
        computed: Any = rotary_bert.Model(config, None, Compute(layers=layers))
        out: Any = computed.apply({"params": params}, **batch, hidden_states=True, attentions=True)
        assert len(out.hidden_states) == len(wanted.hidden_states) == 4
        for ours, state in zip(out.hidden_states, wanted.hidden_states, strict=True):
            close(ours[seen], state[torch.tensor(seen)], "state")
        for ours, looked in zip(out.attentions, wanted.attentions, strict=True):
            close(np.asarray(ours).swapaxes(1, 2)[seen], looked.transpose(1, 2)[torch.tensor(seen)], "attention")


@pytest.mark.parametrize("pooling", ["late", *(pytest.param(how, marks=pytest.mark.slow) for how in ("bos", "mean"))])
def test_packed_texts_are_classified_as_texts_of_their_own(pooling: Any) -> None:
    config = dataclasses.replace(SMALL["eurobert"], classifier_pooling=pooling)
    model: Any = rotary_bert.Model(config, "classification", Compute())
    params, rng = init_params(model, 0), np.random.default_rng(0)
    first, second = (rng.integers(5, 96, n).astype(np.int32) for n in (5, 9))
    alone = {"tokens": np.stack([np.pad(text, (0, 9 - len(text))) for text in (first, second)])}
    alone["mask"] = (np.arange(9) < np.array([[5], [9]])).astype(np.int32)
    packed = {
        "tokens": np.concatenate([first, second, [0, 0]])[None].astype(np.int32),
        "segments": np.repeat([1, 2, 0], [5, 9, 2])[None],
        "positions": np.concatenate([np.arange(n) for n in (5, 9, 2)])[None],
        "starts": np.array([[0, 5]]),
    }
    wanted, found = (jax.jit(model.apply)({"params": params}, **batch).logits for batch in (alone, packed))
    assert found.shape == (1, 2, 2)
    np.testing.assert_allclose(found[0], wanted, atol=2e-6)


# ------------------------------------------------------------------------------------------------ Hugging Face layout


def equal_folders(one: Path, other: Path) -> None:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype
        assert torch.equal(second[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "head", [*(pytest.param(name, marks=pytest.mark.slow) for name in (None, *HEADS[:2])), "masked_lm"]
)
def test_a_folder_comes_back_bit_for_bit_and_computes_the_same(kind: str, head: str | None, tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL[kind], num_hidden_layers=2, rope=Rotary(70.0, "linear", 2.0))
    theirs = make_reference(rotary_bert, config, head, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    notes: list[str] = []
    loaded = load(tmp_path / "theirs", note=notes.append)
    assert (loaded.model.config, loaded.model.head) == (config, head)
    assert not [note for note in notes if "no tokenizer files" not in note]
    loaded.save(tmp_path / "ours")
    equal_folders(tmp_path / "theirs", tmp_path / "ours")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert (after["model_type"], after["architectures"]) == (kind, before["architectures"])
    assert {name: before.get(name, after[name]) for name in rotary_bert.config_to_hf(config)} == {
        name: after[name] for name in rotary_bert.config_to_hf(config)
    }
    again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    inputs = torch_inputs(example_batch(rotary_bert.facts(config), 3, length=12))
    with torch.no_grad():
        assert torch.equal(theirs(**inputs)[0], again(**inputs)[0])


def test_a_tied_head_of_eurobert_has_no_tensor_of_its_own(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL["eurobert"], tie_word_embeddings=True, mlp_bias=False)
    make_reference(rotary_bert, config, "masked_lm", "eurobert").save_pretrained(tmp_path)
    assert all(name.startswith("model.") for name in load_file(tmp_path / "model.safetensors"))
    notes: list[str] = []
    loaded = load(tmp_path, note=notes.append)
    assert (loaded.model.config, loaded.model.head) == (config, "masked_lm")
    assert not [note for note in notes if "no tokenizer files" not in note]


def before_transformers(name: str) -> str:
    """A tensor's name in the files that the authors' own code wrote."""
    return name.replace("nomic_bert.", "bert.", 1).replace("gte.", "new.", 1)


@pytest.mark.parametrize("kind", ["nomic_bert", "gte"])
def test_names_of_modules_and_of_the_authors_files_are_read_too(kind: str, tmp_path: Path) -> None:
    theirs = make_reference(rotary_bert, SMALL[kind], "masked_lm", kind)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "modules", save_original_format=False)
    theirs.save_pretrained(tmp_path / "authors")
    path = tmp_path / "authors/model.safetensors"
    renamed = {before_transformers(name): tensor for name, tensor in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("theirs", "modules", "authors")]
    assert not names[0] & names[2] - {name for name in names[0] if name.startswith(("cls.", "lm_head."))}
    assert any("self_attn.q_proj" in name for name in names[1])
    for folder in ("modules", "authors"):
        load(tmp_path / folder, note=lambda _: None).save(tmp_path / f"{folder}-ours")
        equal_folders(tmp_path / "theirs", tmp_path / f"{folder}-ours")


NOMIC_EMBED: dict[str, Any] = {
    "model_type": "nomic_bert", "architectures": ["NomicBertModel"], "activation_function": "swiglu", "attn_pdrop": 0.0,
    "causal": False, "embd_pdrop": 0.0, "layer_norm_epsilon": 1e-12, "max_trained_positions": 2048, "mlp_fc1_bias": False,
    "mlp_fc2_bias": False, "n_embd": 32, "n_head": 4, "n_inner": 64, "n_layer": 2, "n_positions": 8192, "parallel_block": False,
    "prenorm": False, "qkv_proj_bias": False, "resid_pdrop": 0.0, "rotary_emb_base": 1000, "rotary_emb_fraction": 1.0,
    "rotary_emb_interleaved": False, "rotary_emb_scale_base": None, "rotary_scaling_factor": None, "type_vocab_size": 2,
    "use_rms_norm": False, "vocab_size": 96,
}  # fmt: skip
"""The keys of nomic-embed-text-v1.5, of a smaller model."""


def test_the_authors_keys_are_read_and_those_of_the_reference_written(tmp_path: Path) -> None:
    config = make_config(rotary_bert, rotary_bert.config_from_hf(NOMIC_EMBED))
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 8192, "initializer_range": 0.02}
    assert config == dataclasses.replace(SMALL["nomic_bert"], **sizes)
    make_reference(rotary_bert, config, None, "nomic_bert").save_pretrained(tmp_path / "old")
    (tmp_path / "old/config.json").write_text(json.dumps(NOMIC_EMBED))
    load(tmp_path / "old", note=lambda _: None).save(tmp_path / "new")
    written = json.loads((tmp_path / "new/config.json").read_text())
    assert not set(rotary_bert.SUPERSEDED) & set(written)
    assert (written["hidden_size"], written["rope_parameters"]["rope_theta"]) == (32, 1000)
    equal_folders(tmp_path / "old", tmp_path / "new")
    stretched = rotary_bert.config_from_hf(NOMIC_EMBED | {"rotary_scaling_factor": 2.0})
    assert stretched["max_position_embeddings"] == 2048


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_keys_of_every_version_mean_what_they_mean_to_the_reference(kind: str) -> None:
    made: Any = transformers.AutoConfig.for_model(kind).__class__
    for stated in (
        {},
        {"rope_theta": 55.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_theta": 9.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 8.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 8.0},
    ):
        wanted = made(**json.loads(json.dumps(stated))).rope_parameters
        found: Any = rotary_bert.config_from_hf({"model_type": kind, **stated})["rope"]
        assert (found["theta"], found["kind"]) == (wanted["rope_theta"], wanted["rope_type"]), stated
        assert found.get("factor") == wanted.get("factor")


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_are_the_references(kind: str) -> None:
    theirs = transformers.AutoConfig.for_model(kind).to_dict()
    ours = rotary_bert.config_to_hf(fresh_config(kind, {}))
    assert {name: theirs.get(name, ours[name]) for name in ours} == ours


@pytest.mark.parametrize(
    ("kind", "stated", "message"),
    [
        ("nomic_bert", {"moe_every_n_layers": 2}, "moe_every_n_layers=2 is not supported, only False"),
        ("nomic_bert", {"activation_function": "gelu"}, "activation_function='gelu' is not supported, only swiglu, geglu"),
        ("nomic_bert", {"n_embd": 64}, "n_embd=64 and hidden_size=32 are one setting: remove one"),
        ("nomic_bert", {"resid_pdrop": 0.0, "hidden_dropout_prob": 0.5}, "resid_pdrop=0.0 and hidden_dropout_prob=0.5 are"),
        ("nomic_bert", {"type_vocab_size": 0}, "type_vocab_size=0 must be at least 1"),
        ("nomic_bert", {"pad_token_id": None}, "pad_token_id must be a number in nomic_bert"),
        ("nomic_bert", {"rotary_emb_fraction": 0.5}, "rotary_emb_fraction=0.5 is not supported, only 1"),
        ("gte", {"position_embedding_type": "absolute"}, "'absolute' is not supported, only 'rope'"),
        ("gte", {"rope_scaling": {"type": "ntk", "factor": 8.0}}, "rope_type='ntk' is not supported"),
        ("gte", {"logn_attention_scale": True}, "logn_attention_scale=True is not supported"),
        ("gte", {"head_dim": 5}, "the head size 5 must be even"),
        ("eurobert", {"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ("eurobert", {"classifier_pooling": "max"}, "classifier_pooling"),
        ("eurobert", {"clf_pooling": "mean"}, "clf_pooling='mean' and classifier_pooling='late' are one setting"),
        ("eurobert", {"hidden_act": "silo"}, "hidden_act='silo'"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_ask_for(kind: str, stated: dict[str, Any], message: str) -> None:
    tree = {**rotary_bert.config_to_hf(SMALL[kind]), "model_type": kind, **stated}
    with pytest.raises(UserError) as caught:
        make_config(rotary_bert, rotary_bert.config_from_hf(tree))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gte", {"attention_bias": True}, "attention_bias=True is not supported: it is False in gte"),
        ("eurobert", {"type_vocab_size": 2}, "type_vocab_size=2 is not supported: it is 0 in eurobert"),
        ("eurobert", {"classifier_pooling": None}, "classifier_pooling must be 'bos', 'mean' or 'late' in eurobert"),
        ("nomic_bert", {"pooler": True}, "pooler=True is not supported: it is False in this family"),
    ],
)
def test_what_a_config_of_one_kind_cannot_be(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL[kind], **changes)
