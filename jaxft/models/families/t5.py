"""T5 (Raffel et al. 2020), its versions 1.1 and Flan, and mT5 (Xue et al. 2021), as `transformers` computes them (`T5Model`,
`T5ForConditionalGeneration`, `T5ForSequenceClassification`, `T5ForTokenClassification`, `T5ForQuestionAnswering`, and those of `MT5`).

A pre-norm encoder-decoder without positions: of each side, the first layer's table of distances is added to the logits of attention in
all layers. These are not scaled.

Dims: B batch, S source length, T target length, D model width, N heads, H head size, F MLP width, V vocabulary, L layers.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Integer, PRNGKeyArray

from jaxft.attention import MaskSpec
from jaxft.attention.relative import buckets, by_distance, distances
from jaxft.errors import UserError
from jaxft.layers import ACTIVATIONS, Compute, Embed, Linear, RMSNorm, declare, dropout, subkey
from jaxft.models import encoder_decoder
from jaxft.models.blocks import GatedMlp
from jaxft.models.checks import check_fields
from jaxft.models.contract import Head
from jaxft.models.cross_attention import Attention
from jaxft.models.encoder_decoder import SEQ2SEQ_LM, State
from jaxft.models.heads import TokenClasses, Vocabulary, dense_rules
from jaxft.models.layout import Layout, Rule, Tensors, has_own
from jaxft.models.source_heads import (
    SourceHead,
    classes_of_weights,
    classification,
    one_end,
    question_answering,
    with_end,
)

Array = jax.Array

MODEL_TYPES = {"t5": "T5", "mt5": "MT5"}


@dataclass(frozen=True)
class Config:
    """Everything that changes the maths. Field names are those of other families; config.json has others (``_NAMES``)."""

    model_type: str = "t5"
    """mT5 differs in that it never scales what the vocabulary sees."""
    vocab_size: int = 32128
    hidden_size: int = 512
    num_hidden_layers: int = 6
    """Layers of the encoder."""
    num_decoder_layers: int = 6
    num_attention_heads: int = 8
    head_size: int = 64
    intermediate_size: int = 2048
    hidden_act: str = "relu"
    gated: bool = False
    """The MLP is down(act(gate(x)) * up(x)), not down(act(up(x)))."""
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_eps: float = 1e-6
    initializer_factor: float = 1.0
    scale_decoder_outputs: bool = True
    """The vocabulary sees vectors divided by the square root of their width."""
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    decoder_start_token_id: int = 0
    """What every target begins with."""
    eos_token_id: int | None = 1
    """The token that texts end with: a head of classes reads the vector of its last one."""
    classifier_dropout: float = 0.0
    num_labels: int = 2

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_decoder_layers",
            "num_attention_heads",
            "head_size",
        )
        sizes, rates = (*sizes, "intermediate_size", "num_labels"), ("dropout_rate", "classifier_dropout")
        check_fields(self, sizes, rates, ("hidden_act",))
        count, farthest = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if count < 4 or count % 2 or farthest <= count // 2:
            raise UserError(
                f"model.arch: relative_attention_num_buckets={count} and relative_attention_max_distance={farthest}: an even number from 4 "
                "on, and more than half of it"
            )
        if self.model_type == "mt5" and self.scale_decoder_outputs:
            raise UserError(
                "model.arch: scale_decoder_outputs=true: mt5 never does; set it to false, or model_type to t5"
            )
        if not 0 <= self.decoder_start_token_id < self.vocab_size:
            raise UserError(
                f"model.arch: decoder_start_token_id={self.decoder_start_token_id} is not among {self.vocab_size} tokens"
            )

    @property
    def decoder_heads(self) -> int:
        """Heads of the decoder's layers."""
        return self.num_attention_heads

    @property
    def decoder_head_size(self) -> int:
        """Width of a head of the decoder's."""
        return self.head_size

    @property
    def limit(self) -> int | None:
        """Tokens that a row may have: any number."""
        return None

    def normal(self, *widths: int) -> nn.initializers.Initializer:
        """The initialiser of a matrix: its spread falls with the square root of each width."""
        spread = self.initializer_factor
        for width in widths:
            spread *= width**-0.5
        return nn.initializers.normal(spread)


TINY = Config(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_decoder_layers=3, num_attention_heads=4, head_size=8,
    intermediate_size=64, relative_attention_num_buckets=8, relative_attention_max_distance=20,
)  # fmt: skip


def _attention(c: Config, compute: Compute, name: str) -> Attention:
    inner, rate = c.num_attention_heads * c.head_size, c.dropout_rate
    initial = (c.normal(c.hidden_size), c.normal(c.hidden_size, c.head_size), c.normal(inner))
    return Attention(c.num_attention_heads, c.head_size, compute, *initial, rate, scale=1.0, name=name)


class Mlp(nn.Module):
    """Two linear maps with an activation between, gated or not."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, x: Float[Array, "B S D"], key: PRNGKeyArray | None) -> Float[Array, "B S D"]:
        c, how, (d, f) = self.config, self.compute, (self.config.hidden_size, self.config.intermediate_size)
        up, down = c.normal(d), c.normal(f)
        if c.gated:
            return GatedMlp(f, c.hidden_act, how, up, down, rate=c.dropout_rate, name="gated")(x, key)
        wide = Linear((d, f), ("embed", "mlp"), how, up, biased=False, name="up")(x)
        wide = how.rules.constrain(wide, "batch", "length", "act_mlp")
        act = ACTIVATIONS[c.hidden_act]
        drops = key is not None and c.dropout_rate > 0.0
        inner = dropout(act(wide), c.dropout_rate, key, how.dropout_bits) if drops else wide
        last = Linear((f, d), ("mlp", "embed"), how, down, None if drops else act, biased=False, name="down")
        return last(inner)


class Layer(nn.Module):
    """A layer of either side: attention of tokens to each other, in a decoder to the source, then the MLP; a norm before each."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S D"],
        key: PRNGKeyArray | None,
        mask: MaskSpec,
        bias: Float[Array, "1 N S _"] | None,
        memory: Float[Array, "B S D"] | None = None,
        source: MaskSpec | None = None,
        state: State | None = None,
    ) -> Float[Array, "B S D"] | tuple[Float[Array, "B S D"], State]:
        """The next layer's input; with ``state``, keys and values of these tokens, and of the source if they are new, too."""
        c, how = self.config, self.compute

        def added(x: Array, more: Array, number: int) -> Array:
            return x + dropout(more, c.dropout_rate, subkey(key, number), how.dropout_bits)

        def normed(name: str) -> Array:
            return RMSNorm(c.layer_norm_eps, how, name=name)(x)

        past = None if state is None else (state[0], state[1])
        mixed, new = _attention(c, how, "attention")(normed("norm"), mask, subkey(key, 0), bias, past=past)
        x = added(x, mixed, 1)
        of_source: tuple[Array | None, Array | None] = (None, None)
        if source is not None:
            known = None if state is None or state[2] is None or state[3] is None else (state[2], state[3])
            seen = memory if known is None else known
            mixed, read = _attention(c, how, "cross")(normed("cross_norm"), source, subkey(key, 2), memory=seen)
            x, of_source = added(x, mixed, 3), read if known is None else of_source
        x = added(x, Mlp(c, how, name="mlp")(normed("mlp_norm"), subkey(key, 4)), 5)
        x = how.rules.constrain(x, "batch", "length" if source is None else "target", "act_embed")
        return x if state is None else (x, (new[0], new[1], of_source[0], of_source[1]))


class RelativeBias(nn.Module):
    """What is added to the logits of attention, [1, N, S, T] float32: of each head, a number for each range of distances."""

    config: Config
    compute: Compute
    causal: bool

    @nn.compact
    def __call__(self, first: Array | int, queries: int, keys: int) -> Float[Array, "1 N S T"]:
        c, dtype = self.config, self.compute.param_dtype
        shape = (c.relative_attention_num_buckets, c.num_attention_heads)
        table = declare(self, "embedding", c.normal(c.hidden_size), (None, "heads"), shape, dtype)
        far = distances(keys)
        which = buckets(far, shape[0], c.relative_attention_max_distance, behind=not self.causal)
        each = table[which].astype(jnp.float32).T
        if queries == keys and isinstance(first, int):
            rows = jnp.broadcast_to(each[:, None], (each.shape[0], queries, each.shape[1]))
            made = by_distance(rows)
        else:  # a few queries among the places of a cache
            places = jnp.arange(keys) - (first + jnp.arange(queries))[:, None] + keys - 1
            made = each[:, jnp.clip(places, 0, len(far) - 1)]
        return self.compute.rules.constrain(made[None], None, "act_heads", "target" if self.causal else "length", None)


TOKEN_CLASSIFICATION = "token_classification"
HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    SEQ2SEQ_LM: Head(
        "ForConditionalGeneration",
        lambda c, compute, name: Vocabulary(
            c.hidden_size, c.vocab_size, c.tie_word_embeddings, compute, c.normal(), axis="target", name=name
        ),
        lambda c: () if c.tie_word_embeddings else (Rule("head/kernel", "lm_head.weight", "v d -> d v"),),
    ),
    "classification": classification(
        lambda c: (c.hidden_size, c.num_labels, c.classifier_dropout), lambda c: c.normal(c.hidden_size)
    ),
    TOKEN_CLASSIFICATION: SourceHead(
        "ForTokenClassification",
        lambda c, compute, name: TokenClasses(
            c.hidden_size, c.num_labels, c.classifier_dropout, compute, c.normal(), name=name
        ),
        lambda c: dense_rules("head/linear", "classifier"),
        marks=("classifier.weight",),
        classes="tokens",
        side="encoder",
    ),
    "question_answering": question_answering(lambda c: c.hidden_size, lambda c: c.normal(c.hidden_size)),
}


class Model(encoder_decoder.EncoderDecoder[Config]):
    """The encoder-decoder, with a head as asked."""

    HEADS = HEADS

    def table(self) -> Embed:
        c = self.config
        return Embed(c.vocab_size, c.hidden_size, ("vocab", "embed"), self.compute, c.normal(), name="embed")

    def embedded(
        self,
        table: Embed,
        side: str,
        tokens: Integer[Array, "B S"],
        positions: Integer[Array, "B S"],
        key: PRNGKeyArray | None,
    ) -> Float[Array, "B S D"]:
        del positions
        length = "length" if side == "encoder" else "target"
        x = self.compute.rules.constrain(table(tokens), "batch", length, "act_embed")
        return dropout(x, self.config.dropout_rate, key, self.compute.dropout_bits)

    def layer(self, side: str) -> nn.Module:
        del side
        return Layer(self.config, self.compute, parent=None)

    def bias(self, side: str, first: Array | int, queries: int, keys: int) -> Float[Array, "1 N T _"]:
        table = RelativeBias(self.config, self.compute, side == "decoder", name=f"{side}_relative")
        return table(first, queries, keys)

    def normed(self, side: str, x: Float[Array, "B S D"], key: PRNGKeyArray | None) -> Float[Array, "B S D"]:
        norm = RMSNorm(self.config.layer_norm_eps, self.compute, name=f"{side}_norm")
        return dropout(norm(x), self.config.dropout_rate, key, self.compute.dropout_bits)

    def scored(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x * self.config.hidden_size**-0.5 if self.config.scale_decoder_outputs else x


facts = encoder_decoder.facts

# ------------------------------------------------------------------------------------------------ Hugging Face layout

_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "head_size": "d_kv",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_decoder_layers": "num_decoder_layers",
    "num_attention_heads": "num_heads",
    "layer_norm_eps": "layer_norm_epsilon",
    **{
        name: name
        for name in ("relative_attention_num_buckets", "relative_attention_max_distance", "dropout_rate", "initializer_factor",
                     "tie_word_embeddings", "pad_token_id", "decoder_start_token_id", "eos_token_id", "classifier_dropout")
    },
}  # fmt: skip
"""Fields of :class:`Config`, and what config.json calls them."""
_ALSO = ("hidden_size", "num_hidden_layers", "num_attention_heads")
SUPERSEDED = (*_ALSO, "head_dim", "dense_act_fn", "is_gated_act", "n_positions")
_OLD_GELU = "gated-gelu"


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: a decoder or an encoder alone, or an activation that is written in another way than ``relu`` and ``gated-gelu``.
    """
    stated = hf.get("architectures")
    named = stated if isinstance(stated, list) else []
    # The reference's classes of words have the encoder alone, and their files say so.
    alone = any(str(name).endswith(HEADS[TOKEN_CLASSIFICATION].suffix) for name in named)
    if hf.get("is_encoder_decoder", True) is False and not alone:
        raise UserError("config.json: is_encoder_decoder=false is not supported; this family here has both sides")
    found = {ours: hf[theirs] for ours, theirs in _NAMES.items() if theirs in hf}
    if found.get("num_decoder_layers") is None:
        found["num_decoder_layers"] = found.get("num_hidden_layers", Config.num_decoder_layers)
    if found.get("decoder_start_token_id") is None:
        found["decoder_start_token_id"] = found.get("pad_token_id") or 0
    found |= {
        "eos_token_id": one_end(hf, Config.eos_token_id),
        "classifier_dropout": hf.get("classifier_dropout") or 0.0,
    }
    kind = str(hf.get("model_type", "t5"))
    usual = "gated-gelu" if kind == "mt5" else "relu"
    written = str(hf.get("feed_forward_proj", usual))
    *gate, act = written.split("-")
    if gate not in ([], ["gated"]):
        raise UserError(f"config.json: feed_forward_proj={written!r}: must be an activation, or gated-ACTIVATION")
    # Of models from before the key, the reference scales those whose vocabulary is tied.
    scales = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True) is not False)
    more = {"gated": bool(gate), "hidden_act": "gelu_new" if written == _OLD_GELU else act}
    return found | more | {"model_type": kind, "scale_decoder_outputs": scales if kind == "t5" else False}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    act = "gelu" if config.gated and config.hidden_act == "gelu_new" else config.hidden_act
    made = with_end({theirs: getattr(config, ours) for ours, theirs in _NAMES.items()})
    made |= {"feed_forward_proj": f"gated-{act}" if config.gated else act, "is_encoder_decoder": True}
    return made if config.model_type == "mt5" else made | {"scale_decoder_outputs": config.scale_decoder_outputs}


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    # transformers ties the two only where they are equal, whatever config.json says.
    untied = has_own(weights, "lm_head.weight", "shared.weight")
    return classes_of_weights(weights) | ({"tie_word_embeddings": False} if untied else {})


_INSIDE, _PREFIX = ("classification", TOKEN_CLASSIFICATION), "transformer."
"""Heads whose classes hold the rest as a part, and what its tensors are called there."""


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    tied = ("lm_head.weight",) if head == SEQ2SEQ_LM and config.tie_word_embeddings else ()
    tables = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    rules = (Rule("embed/embedding", "shared.weight", spares=(*tables, *tied)), *_side_rules(config, "encoder", 1))
    if head != TOKEN_CLASSIFICATION:
        rules = (*rules, *_side_rules(config, "decoder", 2))
    # The first release's decoders had a table of distances to the source, which nothing reads.
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    leftovers = ("lm_head.*", *tables, "decoder.*" if head == TOKEN_CLASSIFICATION else unread)
    others = ("classification_head.*", "classifier.*", "qa_outputs.*")
    if head not in _INSIDE:
        layout = Layout((*rules, *HEADS[head].rules(config)), "", (), (*leftovers, *others), ("head/*",))
        return dataclasses.replace(layout, respelt=((rf"^{re.escape(_PREFIX)}", ""),))
    inside = [
        dataclasses.replace(rule, theirs=_PREFIX + rule.theirs, spares=tuple(_PREFIX + name for name in rule.spares))
        for rule in rules
    ]
    within = tuple(_PREFIX + name for name in (*leftovers, *others))
    return Layout((*inside, *HEADS[head].rules(config)), _PREFIX, (), (*within, *others), ("head/*",))


def _side_rules(config: Config, side: str, mlp: int) -> tuple[Rule, ...]:
    """The rows of the weight table of one side's layers, whose MLP has the number ``mlp``."""
    at = f"{side}.block.{{layer}}.layer"
    attentions = [("attention", "norm", f"{at}.0.SelfAttention", f"{at}.0.layer_norm")]
    if side == "decoder":
        attentions.append(("cross", "cross_norm", f"{at}.1.EncDecAttention", f"{at}.1.layer_norm"))
    rules: list[Rule] = []
    for ours, norm, theirs, their_norm in attentions:
        for name, letter in (("query", "q"), ("key", "k"), ("value", "v")):
            heads = "(n h) d -> d n h"
            rules.append(Rule(f"{side}/{ours}/{name}/kernel", f"{theirs}.{letter}.weight", heads))
        rules.append(Rule(f"{side}/{ours}/out/kernel", f"{theirs}.o.weight", "d (n h) -> n h d"))
        rules.append(Rule(f"{side}/{norm}/scale", f"{their_norm}.weight"))
    parts = (
        {"gated/gate": "wi_0", "gated/up": "wi_1", "gated/down": "wo"} if config.gated else {"up": "wi", "down": "wo"}
    )
    for ours, theirs in parts.items():
        rules.append(Rule(f"{side}/mlp/{ours}/kernel", f"{at}.{mlp}.DenseReluDense.{theirs}.weight", "o i -> i o"))
    table = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return (
        *rules,
        Rule(f"{side}/mlp_norm/scale", f"{at}.{mlp}.layer_norm.weight"),
        Rule(f"{side}_relative/embedding", table),
        Rule(f"{side}_norm/scale", f"{side}.final_layer_norm.weight"),
    )
