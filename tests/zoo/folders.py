"""Tiny random models in Hugging Face layout, and the ways in which people store and damage them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import torch
import transformers
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]

SIZES: Config = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
LLAMA: Config = SIZES | {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
MODERN: Config = {"num_hidden_layers": 4, "pad_token_id": 0}
TYPES = ("full_attention", "sliding_attention")
NOMIC: Config = {"pad_token_id": 0}
EURO: Config = {"pad_token_id": 0, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}
DISTIL: Config = {"hidden_dim": 32}
NARROW: Config = {"embedding_size": 12}
GROUPS: Config = {"embedding_size": 16, "num_hidden_layers": 3, "num_hidden_groups": 2, "inner_group_num": 2}
DEBERTA: Config = {
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "conv_kernel_size": 3,
    "position_biased_input": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# name -> (architecture, changes to the sizes, whether jaxft is known to read it)
MODELS: dict[str, tuple[str, Config, bool]] = {
    "bert": ("BertModel", {}, True),
    "bert-no-pooler": ("BertModel", {}, True),
    "bert-mlm": ("BertForMaskedLM", {}, True),
    "bert-mlm-untied": ("BertForMaskedLM", {"tie_word_embeddings": False}, True),
    "bert-pretraining": ("BertForPreTraining", {}, True),
    "bert-nsp": ("BertForNextSentencePrediction", {}, True),
    "bert-classes": ("BertForSequenceClassification", {"num_labels": 3}, True),
    "bert-score": ("BertForSequenceClassification", {"num_labels": 1, "problem_type": "regression"}, False),
    "bert-multi-label": (
        "BertForSequenceClassification",
        {"num_labels": 4, "problem_type": "multi_label_classification"},
        False,
    ),
    "bert-tokens": ("BertForTokenClassification", {"num_labels": 3}, True),
    "bert-spans": ("BertForQuestionAnswering", {}, True),
    "bert-choices": ("BertForMultipleChoice", {}, True),
    "bert-decoder": ("BertLMHeadModel", {"is_decoder": True}, False),
    "modernbert": ("ModernBertModel", MODERN, True),
    "modernbert-mlm": ("ModernBertForMaskedLM", MODERN | {"local_attention": 8, "mlp_bias": True}, True),
    "modernbert-classes": (
        "ModernBertForSequenceClassification",
        MODERN | {"num_labels": 3, "classifier_pooling": "mean"},
        True,
    ),
    "modernbert-mmbert": (
        "ModernBertForMaskedLM",
        MODERN | {"rope_parameters": {name: {"rope_type": "default", "rope_theta": 160000.0} for name in TYPES}},
        True,
    ),
    "nomic": ("NomicBertModel", NOMIC, True),
    "nomic-mlm": ("NomicBertForMaskedLM", NOMIC, True),
    "nomic-mlm-untied": ("NomicBertForMaskedLM", NOMIC | {"tie_word_embeddings": False}, True),
    "nomic-classes": ("NomicBertForSequenceClassification", NOMIC | {"num_labels": 3, "head_dim": 4}, True),
    "gte": ("GteModel", NOMIC, True),
    "gte-mlm": ("GteForMaskedLM", NOMIC | {"type_vocab_size": 0}, True),
    "gte-mlm-untied": ("GteForMaskedLM", NOMIC | {"tie_word_embeddings": False}, True),
    "gte-tokens": ("GteForTokenClassification", NOMIC | {"num_labels": 3}, True),
    "eurobert": ("EuroBertModel", EURO, True),
    "eurobert-mlm": ("EuroBertForMaskedLM", EURO | {"mlp_bias": True}, True),
    "eurobert-mlm-tied": ("EuroBertForMaskedLM", EURO | {"tie_word_embeddings": True}, True),
    "eurobert-classes": ("EuroBertForSequenceClassification", EURO | {"num_labels": 3}, True),
    "distilbert": ("DistilBertModel", DISTIL, True),
    "distilbert-mlm": ("DistilBertForMaskedLM", DISTIL, True),
    "distilbert-mlm-untied": ("DistilBertForMaskedLM", DISTIL | {"tie_word_embeddings": False}, True),
    "distilbert-classes": ("DistilBertForSequenceClassification", DISTIL | {"num_labels": 3}, True),
    "distilbert-spans": ("DistilBertForQuestionAnswering", DISTIL, True),
    "distilbert-choices": ("DistilBertForMultipleChoice", DISTIL, True),
    "electra": ("ElectraModel", NARROW, True),
    "electra-mlm": ("ElectraForMaskedLM", NARROW, True),
    "electra-mlm-untied": ("ElectraForMaskedLM", NARROW | {"tie_word_embeddings": False}, True),
    "electra-classes": ("ElectraForSequenceClassification", {"num_labels": 3, "embedding_size": 16}, True),
    "electra-choices": ("ElectraForMultipleChoice", NARROW, True),
    "electra-replaced": ("ElectraForPreTraining", NARROW, True),
    "albert": ("AlbertModel", NARROW, True),
    "albert-mlm": ("AlbertForMaskedLM", NARROW, True),
    "albert-mlm-untied": ("AlbertForMaskedLM", NARROW | {"tie_word_embeddings": False}, True),
    "albert-pretraining": ("AlbertForPreTraining", NARROW, True),
    "albert-classes": ("AlbertForSequenceClassification", GROUPS | {"num_labels": 3}, True),
    "albert-choices": ("AlbertForMultipleChoice", GROUPS, True),
    "deberta": ("DebertaV2Model", DEBERTA, True),
    "deberta-absolute": ("DebertaV2Model", {"type_vocab_size": 2}, True),
    "deberta-mlm": ("DebertaV2ForMaskedLM", DEBERTA, True),
    "deberta-mlm-v3": ("DebertaV2ForMaskedLM", DEBERTA | {"legacy": False, "conv_kernel_size": 0}, True),
    "deberta-mlm-untied": ("DebertaV2ForMaskedLM", DEBERTA | {"tie_word_embeddings": False}, True),
    "deberta-classes": (
        "DebertaV2ForSequenceClassification",
        DEBERTA | {"num_labels": 3, "share_att_key": False},
        True,
    ),
    "deberta-tokens": ("DebertaV2ForTokenClassification", DEBERTA | {"num_labels": 3, "embedding_size": 8}, True),
    "deberta-spans": ("DebertaV2ForQuestionAnswering", DEBERTA | {"position_buckets": -1}, True),
    "deberta-choices": ("DebertaV2ForMultipleChoice", DEBERTA, True),
    "mpnet": ("MPNetModel", {}, True),
    "mpnet-mlm": ("MPNetForMaskedLM", {}, True),
    "mpnet-mlm-untied": ("MPNetForMaskedLM", {"tie_word_embeddings": False}, True),
    "mpnet-classes": ("MPNetForSequenceClassification", {"num_labels": 3}, True),
    "mpnet-tokens": ("MPNetForTokenClassification", {"num_labels": 3}, True),
    "mpnet-spans": ("MPNetForQuestionAnswering", {}, True),
    "mpnet-choices": ("MPNetForMultipleChoice", {}, True),
    "llama": ("LlamaModel", {}, True),
    "llama-lm": ("LlamaForCausalLM", {}, True),
    "llama-lm-tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}, True),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, True),
    "llama-all-heads": ("LlamaForCausalLM", {"num_key_value_heads": 4}, True),
    "llama-wide-heads": ("LlamaForCausalLM", {"head_dim": 12}, True),
    "llama-classes": ("LlamaForSequenceClassification", {"num_labels": 3, "pad_token_id": 0}, False),
}


@dataclass(frozen=True)
class Made:
    """A model before it is stored."""

    architecture: str
    config: Config
    tensors: Tensors


@functools.cache
def made(name: str) -> Made:
    """One of MODELS, with random numbers everywhere."""
    architecture, changes, _ = MODELS[name]
    kind = getattr(transformers, architecture)
    config = kind.config_class(**((LLAMA if name.startswith("llama") else SIZES) | changes))
    torch.manual_seed(sum(map(ord, name)))
    model = kind(config, **({"add_pooling_layer": False} if name == "bert-no-pooler" else {}))
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh biases are all 0 and fresh norm scales all 1: swapped or dropped ones would not be noticed.
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    stored: Config = json.loads(config.to_json_string(use_diff=False))
    stored["architectures"] = [architecture]
    tied = {name for name in (model._tied_weights_keys or {}) if config.tie_word_embeddings}
    return Made(architecture, stored, {n: t.detach().clone() for n, t in model.state_dict().items() if n not in tied})


# ------------------------------------------------------------------------------------------------------------- formats


def write_config(folder: Path, config: Config | str) -> None:
    """config.json; text is written as it is."""
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config, indent=1))


def _halves(tensors: Tensors) -> tuple[Tensors, Tensors]:
    names = list(tensors)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    return {n: tensors[n] for n in first}, {n: tensors[n] for n in second}


def _sharded(folder: Path, tensors: Tensors, stem: str, ending: str, save: Callable[[Tensors, Path], None]) -> None:
    index: dict[str, str] = {}
    for number, part in enumerate(_halves(tensors), 1):
        file = f"{stem}-{number:05d}-of-00002.{ending}"
        save(part, folder / file)
        index |= dict.fromkeys(part, file)
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
    (folder / f"{stem}.{ending}.index.json").write_text(text)


def _safetensors(tensors: Tensors, path: Path) -> None:
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, path, metadata={"format": "pt"})


def _flax(tensors: Tensors, path: Path) -> None:
    tree: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *parents, last = name.split(".")
        value = tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()
        if "embedding" in parents[-1] or "embed_" in parents[-1]:
            last = "embedding"
        elif "LayerNorm" in parents[-1]:
            last = {"weight": "scale"}.get(last, last)
        elif last == "weight" and value.ndim == 2:
            last, value = "kernel", value.T
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        packed = msgpack.packb((value.shape, value.dtype.name, np.ascontiguousarray(value).tobytes()))
        node[last] = msgpack.ExtType(1, packed)
    path.write_bytes(bytes(msgpack.packb(tree) or b""))


def _legacy(tensors: Tensors, path: Path) -> None:
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


FORMATS: dict[str, Callable[[Path, Tensors], None]] = {
    "safetensors": lambda folder, t: _safetensors(t, folder / "model.safetensors"),
    "sharded": lambda folder, t: _sharded(folder, t, "model", "safetensors", _safetensors),
    "bin": lambda folder, t: torch.save(t, folder / "pytorch_model.bin"),
    "bin-sharded": lambda folder, t: _sharded(folder, t, "pytorch_model", "bin", torch.save),
    "bin-legacy": lambda folder, t: _legacy(t, folder / "pytorch_model.bin"),
    "msgpack": lambda folder, t: _flax(t, folder / "flax_model.msgpack"),
}

# ------------------------------------------------------------------------------------------------------ types, damages


def as_type(kind: str) -> Callable[[Tensors], Tensors]:
    """All tensors in one type; "mixed": the norms stay float32, the rest is bfloat16."""

    def change(tensors: Tensors) -> Tensors:
        if kind == "mixed":
            return {n: t if t.ndim == 1 else t.to(torch.bfloat16) for n, t in tensors.items()}
        if kind == "int8":
            return {n: (t * 20).to(torch.int8) for n, t in tensors.items()}
        if kind == "one-int8":
            largest = max(tensors, key=lambda n: tensors[n].numel())
            return {n: (t * 20).to(torch.int8) if n == largest else t for n, t in tensors.items()}
        return {n: t.to(getattr(torch, kind)) for n, t in tensors.items()}

    return change


def some_matrix(tensors: Tensors) -> str:
    """The name of a matrix inside the first layer."""
    return next(n for n in tensors if (".0." in n) and n.endswith(".weight") and tensors[n].ndim == 2)


def without(*endings: str) -> Callable[[Tensors], Tensors]:
    """Leaves out tensors whose names end so."""
    return lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(endings)}


def filled(value: float) -> Callable[[Tensors], Tensors]:
    """One number of one matrix is replaced."""

    def change(tensors: Tensors) -> Tensors:
        name = some_matrix(tensors)
        changed = tensors[name].clone()
        changed.view(-1)[3] = value
        return tensors | {name: changed}

    return change


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    """Other names."""
    return lambda tensors: {rename(n): t for n, t in tensors.items()}


def old_norm_name(name: str) -> str:
    """gamma and beta, as the original TensorFlow port called them."""
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def cut_short(folder: Path) -> None:
    """Halves the last weights file."""
    path = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".msgpack"))[-1]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(folder: Path) -> None:
    """Empties the last weights file."""
    path = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".msgpack"))[-1]
    path.write_bytes(b"")
