"""Other names that files have for keys of config.json and for tensors: those from before `transformers` had NomicBERT, GTE and
EuroBERT, whose authors' code the files came with, and those of its modules where it writes older ones."""

from __future__ import annotations

from collections.abc import Mapping

from jaxft.errors import UserError

KEYS = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "layer_norm_epsilon": "layer_norm_eps",
    "resid_pdrop": "hidden_dropout_prob",
    "embd_pdrop": "hidden_dropout_prob",
    "attn_pdrop": "attention_probs_dropout_prob",
    "rotary_emb_base": "rope_theta",
    "clf_pooling": "classifier_pooling",
}
"""Older keys, and the reference's."""
_GATE, _GATES = "activation_function", {"swiglu": "silu", "geglu": "gelu"}
_OFF = (
    *("is_decoder", "add_cross_attention", "causal", "prenorm", "use_rms_norm", "parallel_block", "hidden_dropout"),
    *("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "rotary_emb_interleaved", "rotary_emb_scale_base"),
    *("num_experts", "moe_every_n_layers", "logn_attention_scale"),
)
_ONLY: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(_OFF, (False, 0)),
    "position_embedding_type": ("rope",),
    "layer_norm_type": ("layer_norm",),
    "rotary_emb_fraction": (1,),
}
"""Keys for what the reference does not have, and values with which it is not there."""
_TRAINED = ("rotary_scaling_factor", "max_trained_positions")
"""Positions of longer rows are stretched by a factor that depends on the row."""
ALL_KEYS = (*KEYS, *_ONLY, *_TRAINED, _GATE)
"""Keys that no file of the reference has."""


def with_known_keys(hf: Mapping[str, object]) -> dict[str, object]:
    """A config.json with the reference's keys.

    Raises:
      UserError: it asks for what the reference does not have, or has two values of one setting.
    """
    for name, few in _ONLY.items():
        if hf.get(name) is not None and hf[name] not in few:
            raise UserError(f"config.json: {name}={hf[name]!r} is not supported, only {few[0]!r}")
    found, stated_as = dict(hf), {name: name for name in hf}
    if (gate := hf.get(_GATE)) is not None:
        if gate not in _GATES:
            raise UserError(f"config.json: {_GATE}={gate!r} is not supported, only {', '.join(_GATES)}")
        found[_GATE] = _GATES[str(gate)]
    for old, name in {**KEYS, _GATE: "hidden_act"}.items():
        if (value := found.pop(old, None)) is None:
            continue
        if found.setdefault(name, value) != value:
            raise UserError(
                f"config.json: {old}={hf[old]!r} and {stated_as[name]}={hf[stated_as[name]]!r} are one setting: remove one"
            )
        stated_as.setdefault(name, old)
    factor, trained = (found.pop(name, None) for name in _TRAINED)
    if factor is not None and factor != 1:
        # Rows up to the length of training have the positions that they had there.
        limits = [value for value in (trained or 2048, found.get("max_position_embeddings")) if isinstance(value, int)]
        found["max_position_embeddings"] = min(limits)
    return found


_LAYERS = r"(?<!encoder\.)\blayers\.(?=\d)"
_HEADS = r"\bself_attn\.(?=[qkv]_proj\.)"
NOMIC = (
    (r"^bert\.", "nomic_bert."),
    (_LAYERS, "encoder.layers."),
    (r"\bembeddings\.LayerNorm\.", "emb_ln."),
    (r"\bself_attn\.o_proj\.", "attn.out_proj."),
    (_HEADS, "attn."),
    (r"\bmlp\.up_proj\.", "mlp.fc11."),
    (r"\bmlp\.gate_proj\.", "mlp.fc12."),
    (r"\bmlp\.down_proj\.", "mlp.fc2."),
    (r"\bpost_attention_layernorm\.", "norm1."),
    (r"\bpost_mlp_layernorm\.", "norm2."),
)
"""NomicBERT's tensors: names that are read, and those that are written (``Layout.respelt``)."""
GTE = (
    (r"^new\.", "gte."),
    (_LAYERS, "encoder.layer."),
    (r"\bself_attn\.o_proj\.", "attention.o_proj."),
    (_HEADS, "attention."),
    (r"\bpost_attention_layernorm\.", "attn_ln."),
    (r"\bpost_mlp_layernorm\.", "mlp_ln."),
    (r"^lm_head\.layer_norm\.", "lm_head.norm."),
)
"""GTE's."""
