"""What the reference's files call the parts of a decoder (:mod:`jaxft.models.decoder`): config.json, weights, ready-made heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from jaxft.errors import UserError
from jaxft.layers import Compute
from jaxft.models.block_files import LLAMAS
from jaxft.models.contract import SPAN_ENDS, Head
from jaxft.models.decoder import DecoderConfig
from jaxft.models.heads import LastTokenClasses, TokenClasses, Vocabulary, dense_rules, normal
from jaxft.models.layer_types import GLOBAL, LOCAL, stated_types
from jaxft.models.layout import Layout, Rule, Tensors, has_own
from jaxft.models.rotary_files import SUPERSEDED_KEYS, rotary_from_hf, rotary_to_hf

C = TypeVar("C", bound=DecoderConfig)

_OURS = ("rope", "num_labels")
SUPERSEDED = SUPERSEDED_KEYS


def same_names(config: type[DecoderConfig], own: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Fields of a Config that config.json has under the same name.

    Args:
      own: those that it has not.
    """
    return tuple(one.name for one in dataclasses.fields(config) if one.name not in (*_OURS, *own))


def config_from_hf(
    config: type[DecoderConfig], hf: Mapping[str, object], own: tuple[str, ...] = ()
) -> dict[str, object]:
    """The fields of a Config that a reference config.json (of v4 or v5) states; absent ones keep our defaults, which are the
    reference's.

    Args:
      own: fields that the family sees to itself.

    Raises:
      UserError: rotary positions of a kind that is not supported, or without what the kind needs.
    """
    usual = config()
    same = {name: hf[name] for name in same_names(config, own) if name in hf}
    return {**same, "rope": rotary_from_hf(hf, usual.max_position_embeddings, usual.rope.theta)}


def config_to_hf(config: DecoderConfig, own: tuple[str, ...] = ()) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture; see :func:`config_from_hf`."""
    same = {name: getattr(config, name) for name in same_names(type(config), own)}
    return {**same, "num_key_value_heads": config.key_heads, "rope_parameters": rotary_to_hf(config.rope)}


def check_no_bidirectional(hf: Mapping[str, object]) -> None:
    """Raises UserError if tokens are to see those behind them."""
    if hf.get("use_bidirectional_attention"):
        raise UserError("config.json: use_bidirectional_attention=true is not supported; this family here is a decoder")


# ----------------------------------------------------------------------------------------------------- sliding windows


def types_and_window(hf: Mapping[str, object], usual_layers: int, usual_window: int | None) -> dict[str, object]:
    """``layer_types`` and ``sliding_window`` of config.json, where windows have to be turned on by ``use_sliding_window``.

    Args:
      usual_layers: ``num_hidden_layers`` where the file has none.
      usual_window: ``sliding_window`` where the file has none.

    Raises:
      UserError: types of layers that there are not, or a window that is turned off.
    """
    layers = hf.get("num_hidden_layers", usual_layers)
    types = stated_types(hf, layers) if isinstance(layers, int) else None
    window = hf.get("sliding_window", usual_window) if hf.get("use_sliding_window") else None
    if types is not None and LOCAL in types and window is None:
        raise UserError(
            f"config.json: layer_types has {LOCAL!r}, but there is no window: it takes use_sliding_window=true and a sliding_window"
        )
    return {"sliding_window": window, **({} if types is None else {"layer_types": list(types)})}


def check_types(config: DecoderConfig, types: tuple[str, ...] | None) -> None:
    """Raises UserError if types of layers, where there are some, are not of as many layers or not known."""
    if types is None:
        return
    if len(types) != config.num_hidden_layers:
        raise UserError(
            f"model.arch: layer_types names {len(types)} layers, num_hidden_layers={config.num_hidden_layers}"
        )
    if not set(types) <= {GLOBAL, LOCAL}:
        raise UserError(f"model.arch: layer_types={list(types)!r}: there are {GLOBAL} and {LOCAL}")


def every(count: int, layers: int) -> tuple[str, ...]:
    """The types of layers of which, of ``count`` each, the last is global."""
    return tuple(LOCAL if (i + 1) % count else GLOBAL for i in range(layers))


def check_caps(config: DecoderConfig, names: tuple[str, ...]) -> None:
    """Raises UserError if a soft cap is not above 0."""
    for name in names:
        if (getattr(config, name) or 1.0) <= 0 or getattr(config, name) == 0:
            raise UserError(f"model.arch: {name}={getattr(config, name)} must be above 0")


def gemma_from_hf(hf: Mapping[str, object], usual_layers: int) -> dict[str, object]:
    """What config.json of a Gemma calls otherwise, and types of layers.

    Args:
      usual_layers: ``num_hidden_layers`` where the file has none.

    Raises:
      UserError: types of layers that there are not, or tokens that see those behind them.
    """
    check_no_bidirectional(hf)
    layers = hf.get("num_hidden_layers", usual_layers)
    types = stated_types(hf, layers) if isinstance(layers, int) else None
    act = {"hidden_act": hf["hidden_activation"]} if hf.get("hidden_activation") is not None else {}
    return {**act, **({} if types is None else {"layer_types": list(types)})}


# --------------------------------------------------------------------------------------------------------------- heads


def _vocabulary(c: DecoderConfig, compute: Compute, name: str) -> Vocabulary:
    sizes = (c.hidden_size, c.vocab_size, c.tie_word_embeddings)
    return Vocabulary(*sizes, compute, normal(c), soft_cap=c.logit_cap, name=name)


CAUSAL_LM: Head[DecoderConfig] = Head(
    "ForCausalLM",
    _vocabulary,
    lambda c: () if c.tie_word_embeddings else (Rule("head/kernel", "lm_head.weight", "v d -> d v"),),
    # A head with tied embeddings has no tensor of its own: the decoder's prefix tells.
    marks=("model.*",),
)
CLASSIFICATION: Head[DecoderConfig] = Head(
    "ForSequenceClassification",
    lambda c, compute, name: LastTokenClasses(c.hidden_size, c.num_labels, compute, normal(c), name=name),
    lambda c: dense_rules("head/linear", "score", biased=False),
    marks=("score.weight",),
    classes="rows",
)
TOKEN_CLASSIFICATION: Head[DecoderConfig] = Head(
    "ForTokenClassification",
    lambda c, compute, name: TokenClasses(c.hidden_size, c.num_labels, c.class_dropout, compute, normal(c), name=name),
    lambda c: dense_rules("head/linear", "score"),
    marks=("score.weight", "score.bias"),
    classes="tokens",
)
ANSWERS: Head[DecoderConfig] = Head(
    "ForQuestionAnswering",
    lambda c, compute, name: TokenClasses(c.hidden_size, SPAN_ENDS, 0.0, compute, normal(c), name=name),
    lambda c: dense_rules("head/linear", "qa_outputs"),
    marks=("qa_outputs.weight",),
)


# ------------------------------------------------------------------------------------------------------------- weights


def hf_layout(config: C, head: str | None, heads: Mapping[str | None, Head[C]], *, answers_at: str = "model") -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over.

    Args:
      answers_at: prefix of the decoder below a head for answers, which some families call otherwise there.
    """
    at = answers_at if heads[head] is ANSWERS else "model"
    leftovers = ("*rotary_emb.inv_freq", "lm_head.*", "score.*", "qa_outputs.*")
    # A tied head may be the only one of the two that a file has.
    tied = ("lm_head.weight",) if heads[head].suffix == CAUSAL_LM.suffix and config.tie_word_embeddings else ()
    names = dataclasses.replace(LLAMAS, layer=f"{at}.layers.{{layer}}")
    rules = (
        Rule("embed/embedding", f"{at}.embed_tokens.weight", spares=tied),
        *names.rules(config.head_biases, config.mlp_biases, out_biased=config.out_bias),
        *_norm_rules(config, names.layer),
        Rule("norm/scale", f"{at}.norm.weight"),
    )
    return Layout((*rules, *heads[head].rules(config)), f"{at}.", (), leftovers, ("head/*",))


def _norm_rules(config: DecoderConfig, layer: str) -> tuple[Rule, ...]:
    """The norms' rows of the weight table. What stands behind attention in some families stands before the MLP in others."""
    behind = config.POST_NORMS
    before_mlp = "pre_feedforward_layernorm" if behind else "post_attention_layernorm"
    named = (
        ("norm", "input_layernorm", config.PRE_NORMS),
        ("attention_out_norm", "post_attention_layernorm", behind),
        ("mlp_norm", before_mlp, config.PRE_NORMS),
        ("mlp_out_norm", "post_feedforward_layernorm", behind),
        ("attention/query_norm", "self_attn.q_norm", config.query_key_norm is not None),
        ("attention/key_norm", "self_attn.k_norm", config.query_key_norm is not None),
    )
    return tuple(Rule(f"layers/{ours}/scale", f"{layer}.{theirs}.weight") for ours, theirs, there in named if there)


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    said: dict[str, object] = {}
    # transformers ties the two only where they are equal, whatever config.json says.
    if has_own(weights, "lm_head.weight", "embed_tokens.weight"):
        said["tie_word_embeddings"] = False
    if "score.weight" in weights.names():
        said["num_labels"] = weights.shape("score.weight")[0]
    return said
