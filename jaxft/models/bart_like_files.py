"""What the reference's files call the parts of an encoder-decoder like BART (:mod:`jaxft.models.bart_like`): config.json and weights."""

from __future__ import annotations

from collections.abc import Mapping

from jaxft.errors import UserError
from jaxft.models.bart_like import BartLikeConfig
from jaxft.models.heads import dense_rules, norm_rules
from jaxft.models.layout import Layout, Rule, Tensors, has_own

NAMES = {
    "hidden_size": "d_model",
    "num_hidden_layers": "encoder_layers",
    "num_decoder_layers": "decoder_layers",
    "num_attention_heads": "encoder_attention_heads",
    "num_decoder_heads": "decoder_attention_heads",
    "intermediate_size": "encoder_ffn_dim",
    "decoder_intermediate_size": "decoder_ffn_dim",
    "hidden_act": "activation_function",
    "hidden_dropout": "dropout",
    "initializer_range": "init_std",
    **{
        name: name
        for name in ("vocab_size", "max_position_embeddings", "attention_dropout", "activation_dropout", "encoder_layerdrop",
                     "decoder_layerdrop", "scale_embedding", "tie_word_embeddings", "pad_token_id", "decoder_start_token_id")
    },
}  # fmt: skip
"""Fields of a Config, and what config.json calls them."""
_ALSO = ("hidden_size", "num_hidden_layers", "num_attention_heads")
"""Fields that the reference reads under our names, too, and believes over its own."""
SUPERSEDED = (*_ALSO, "decoder_vocab_size")
TABLE, HEAD_TABLE = "shared.weight", "lm_head.weight"
_SIDES = ("encoder", "decoder")


def config_from_hf(
    config: type[BartLikeConfig],
    hf: Mapping[str, object],
    always: Mapping[str, object],
    names: Mapping[str, str] = NAMES,
) -> dict[str, object]:
    """The fields of a Config that a reference config.json (of v4 or v5) states; absent ones keep our defaults, which are the reference's.

    Args:
      always: keys of files from before v4 that the reference ignores, and the value with which they say what is computed.
      names: fields, and what config.json calls them.

    Raises:
      UserError: a decoder or an encoder alone, another order of norms or kind of positions, or one setting that has two names there, and
        two values.
    """
    if hf.get("is_encoder_decoder", True) is False:
        raise UserError("config.json: is_encoder_decoder=false is not supported; this family here has both sides")
    for name, usual in always.items():
        if hf.get(name, usual) not in (usual, None):
            raise UserError(
                f"config.json: {name}={hf[name]!r} is not supported: the reference computes {usual!r} whatever the file says; remove "
                "the key if the model was trained so"
            )
    found = {ours: hf[theirs] for ours, theirs in names.items() if theirs in hf}
    for name in _ALSO:
        if hf.get(name) is not None and found.setdefault(name, hf[name]) != hf[name]:
            raise UserError(
                f"config.json: {name}={hf[name]!r} and {names[name]}={found[name]!r} are one setting: remove one"
            )
    if found.get("decoder_start_token_id") is None:
        found["decoder_start_token_id"] = config.decoder_start_token_id
    return found


def config_to_hf(config: BartLikeConfig, names: Mapping[str, str] = NAMES) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    return {theirs: getattr(config, ours) for ours, theirs in names.items()} | {"is_encoder_decoder": True}


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json.

    Raises:
      UserError: the two sides have tables of tokens that differ.
    """
    for side in _SIDES:
        if has_own(weights, f"{side}.embed_tokens.weight", TABLE):
            raise UserError(
                f"{side}.embed_tokens.weight differs from {TABLE}: sides with tables of tokens of their own are not supported"
            )
    # transformers ties the two only where they are equal, whatever config.json says.
    return {"tie_word_embeddings": False} if has_own(weights, HEAD_TABLE, TABLE) else {}


def head_rules(config: BartLikeConfig) -> tuple[Rule, ...]:
    """The rows of the weight table of the vocabulary's head."""
    bias = Rule("head/fixed_bias", "final_logits_bias")
    return (bias,) if config.tie_word_embeddings else (bias, Rule("head/kernel", HEAD_TABLE, "v d -> d v"))


def hf_layout(config: BartLikeConfig, head: tuple[Rule, ...], *, learned_positions: bool = True) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over.

    Args:
      head: the head's rows.
      learned_positions: tables of positions are parameters; if not, the file's are left over.
    """
    tables = tuple(f"model.{side}.embed_tokens.weight" for side in _SIDES)
    # Where the vocabulary is not tied, the reference ties nothing: it wants the table once for each side.
    copies = () if config.tie_word_embeddings else tables
    spares = (*(tables if config.tie_word_embeddings else ()), *((HEAD_TABLE,) if config.tie_word_embeddings else ()))
    rules = [Rule("embed/embedding", f"model.{TABLE}", copies=copies, spares=spares)]
    for side in _SIDES:
        rules += side_rules(config, side, learned_positions)
    positions = () if learned_positions else tuple(f"model.{side}.embed_positions.weight*" for side in _SIDES)
    leftovers = (
        HEAD_TABLE,
        *tables,
        *positions,
        "final_logits_bias",
        "classification_head.*",
        "qa_outputs.*",
        "*.version",
    )
    return Layout((*rules, *head), "model.", (), leftovers, ("head/*",))


def side_rules(config: BartLikeConfig, side: str, learned_positions: bool = True) -> tuple[Rule, ...]:
    """The rows of the weight table of one side."""
    at = f"model.{side}.layers.{{layer}}"
    attentions = {"attention": "self_attn"} | ({"cross": "encoder_attn"} if side == "decoder" else {})
    rules: list[Rule] = []
    for ours, theirs in attentions.items():
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            path, tensor = f"{side}/{ours}/{name}", f"{at}.{theirs}.{letter}_proj"
            rules += [Rule(f"{path}/kernel", f"{tensor}.weight", "(n h) d -> d n h")]
            if config.KEY_BIASES or name != "key":
                rules += [Rule(f"{path}/bias", f"{tensor}.bias", "(n h) -> n h")]
        rules += [Rule(f"{side}/{ours}/out/kernel", f"{at}.{theirs}.out_proj.weight", "d (n h) -> n h d")]
        rules += [Rule(f"{side}/{ours}/out/bias", f"{at}.{theirs}.out_proj.bias")]
        norm = "norm" if ours == "attention" else "cross_norm"
        rules += norm_rules(f"{side}/{norm}", f"{at}.{theirs}_layer_norm")
    for ours, theirs in (("up", "fc1"), ("down", "fc2")):
        rules += dense_rules(f"{side}/{ours}", f"{at}.{theirs}")
    rules += norm_rules(f"{side}/mlp_norm", f"{at}.final_layer_norm")
    if learned_positions:
        rules += [Rule(f"{side}_positions/embedding", f"model.{side}.embed_positions.weight")]
    if config.EMBEDDING_NORMS:
        rules += norm_rules(f"{side}_embed_norm", f"model.{side}.layernorm_embedding")
    if config.pre_norms:
        rules += norm_rules(f"{side}_norm", f"model.{side}.layer_norm")
    return tuple(rules)
