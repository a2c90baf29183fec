"""Folders as the hub has them, with the keys that they state and tiny sizes: Ettin (Weller et al. 2025) and mmBERT (Marone et al. 2025)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

_SHARED: dict[str, Any] = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "repad_logits_with_grad": False,
    "sparse_pred_ignore_index": -100,
    "sparse_prediction": False,
    "torch_dtype": "float32",
    "transformers_version": "4.48.0",
}
SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 4}
ETTIN = _SHARED | {
    "bos_token_id": 50281,
    "causal_mask": False,
    "cls_token_id": 50281,
    "eos_token_id": 50282,
    "local_rope_theta": 160000.0,
    "max_position_embeddings": 7999,
    "pad_token_id": 50283,
    "position_embedding_type": "sans_pos",
    "sep_token_id": 50282,
    "tie_word_embeddings": True,
    "vocab_size": 50368,
}
MMBERT = _SHARED | {
    "bos_token_id": 2,
    "cls_token_id": 1,
    "eos_token_id": 1,
    "local_rope_theta": 160000.0,
    "mask_token_id": 4,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "position_embedding_type": "sans_pos",
    "sep_token_id": 1,
    "vocab_size": 256000,
}


def as_v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same, as transformers 5 writes it."""
    old = (
        "global_rope_theta",
        "local_rope_theta",
        "torch_dtype",
        "position_embedding_type",
        "global_attn_every_n_layers",
    )
    theta = {"full_attention": config["global_rope_theta"], "sliding_attention": config["local_rope_theta"]}
    count, every = config["num_hidden_layers"], config["global_attn_every_n_layers"]
    return {name: value for name, value in config.items() if name not in old} | {
        "dtype": "float32",
        "layer_types": ["sliding_attention" if i % every else "full_attention" for i in range(count)],
        "rope_parameters": {name: {"rope_theta": base, "rope_type": "default"} for name, base in theta.items()},
        "tie_word_embeddings": True,
        "transformers_version": "5.0.0",
    }


def write_gemma_tokenizer(folder: Path, words: list[str]) -> None:
    """A tokenizer of Gemma 2's kind with a mask, as mmBERT has it: pieces of words behind ``▁``, bytes for all else."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = sorted({letter for word in words for letter in word} | {"▁"})
    pieces = dict.fromkeys([*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters])
    merges: list[tuple[str, str]] = []
    for word in words:
        whole = "▁"
        for letter in word:
            if (whole, letter) not in merges:
                merges.append((whole, letter))
            whole += letter
            pieces[whole] = None
    ids = {piece: i for i, piece in enumerate(pieces)}
    fast = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>",
        pair="<bos> $A <eos> $B <eos>",
        special_tokens=[("<bos>", 2), ("<eos>", 1)],
    )
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "added_tokens_decoder": {
            str(i): {"content": name, "lstrip": name == "<mask>", "normalized": False, "special": True}
            for i, name in enumerate(special)
        },
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192,
        "spaces_between_special_tokens": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
