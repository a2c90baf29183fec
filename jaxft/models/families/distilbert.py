"""DistilBERT (Sanh et al. 2019), as `transformers` computes it (`DistilBertModel` and its heads).

An encoder like BERT's, without token types and pooler. Attention adds what it gives without dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxft.errors import UserError
from jaxft.layers import Compute, Initializer
from jaxft.models import encoder, encoder_files
from jaxft.models.checks import check_rate
from jaxft.models.contract import ONE_CHOICE, SPAN_ENDS, Array, Head
from jaxft.models.heads import FirstTokenClasses, TokenClasses, dense_rules, normal
from jaxft.models.layout import Layout, Rule, Tensors

MODEL_TYPES = {"distilbert": "DistilBert"}
_NAMES = {
    **{name: name for name in ("vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id")},
    **{name: name for name in ("tie_word_embeddings", "sinusoidal_pos_embds", "qa_dropout", "seq_classif_dropout")},
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
"""Fields of :class:`Config`, and what config.json calls them."""
_ALSO = ("hidden_size", "num_hidden_layers", "num_attention_heads")
"""Fields that the reference reads under our names, too."""


@dataclass(frozen=True)
class Config(encoder.EncoderConfig):
    """Everything that changes the maths. Field names are those of BERT; config.json has others for some (``_NAMES``)."""

    num_hidden_layers: int = 6
    type_vocab_size: int = 0
    pooler: bool = False
    sinusoidal_pos_embds: bool = False
    """Fresh positions are sines and cosines; they are trained like others."""
    qa_dropout: float = 0.1
    """Dropout before the two ends of an answer."""
    seq_classif_dropout: float = 0.2
    """Dropout before the classes of a row, and before the score of a choice."""

    FIXED: ClassVar[Mapping[str, object]] = {
        "type_vocab_size": 0, "pooler": False, "layer_norm_eps": 1e-12, "classifier_dropout": None
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("qa_dropout", "seq_classif_dropout"):
            check_rate(name, getattr(self, name))

    @property
    def attention_out_dropout(self) -> float:
        """There is none."""
        return 0.0

    @property
    def position_initial(self) -> Initializer:
        """The initialiser of the table of positions."""
        return _sinusoids if self.sinusoidal_pos_embds else normal(self)


def _sinusoids(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Sines in even columns and cosines in odd ones (Vaswani et al. 2017)."""
    del key
    places, width = shape
    column = jnp.arange(width)
    angles = jnp.arange(places)[:, None] / 10000.0 ** (2 * (column // 2) / width)
    return jnp.where(column % 2 == 0, jnp.sin(angles), jnp.cos(angles)).astype(dtype)


TINY = Config(
    vocab_size=96,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=40,
)

SUPERSEDED = _ALSO
facts = encoder.facts


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's.

    Raises:
      UserError: one setting has two names there, and two values.
    """
    found = {ours: hf[theirs] for ours, theirs in _NAMES.items() if theirs in hf}
    for name in _ALSO:
        if hf.get(name) is not None and found.setdefault(name, hf[name]) != hf[name]:
            raise UserError(
                f"config.json: {name}={hf[name]} and {_NAMES[name]}={found[name]} are one setting: remove one"
            )
    return found


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    return {theirs: getattr(config, ours) for ours, theirs in _NAMES.items()}


def _of_rows(suffix: str, classes: Literal["rows"] | None, marks: tuple[str, ...]) -> Head[Config]:
    """A head on the first token: with classes, or, without them, with the score of a choice."""

    def make(c: Config, compute: Compute, name: str) -> FirstTokenClasses:
        sizes, rate = (c.hidden_size, c.num_labels if classes else ONE_CHOICE), c.seq_classif_dropout
        return FirstTokenClasses(*sizes, rate, compute, normal(c), "relu", first_rate=0.0, name=name)

    def rules(c: Config) -> tuple[Rule, ...]:
        del c
        return (*dense_rules("head/dense", "pre_classifier"), *dense_rules("head/linear", "classifier"))

    return Head(suffix, make, rules, marks, classes)


HEADS: Mapping[str | None, Head] = {
    None: Head("Model"),
    # The classifier of single tokens has the same name, and nothing before it.
    "classification": _of_rows("ForSequenceClassification", "rows", ("pre_classifier.weight", "classifier.weight")),
    "token_classification": encoder_files.TOKEN_CLASSIFICATION,
    "question_answering": Head(
        "ForQuestionAnswering",
        lambda c, compute, name: TokenClasses(c.hidden_size, SPAN_ENDS, c.qa_dropout, compute, normal(c), name=name),
        lambda c: dense_rules("head/linear", "qa_outputs"),
        marks=("qa_outputs.weight",),
    ),
    "multiple_choice": _of_rows("ForMultipleChoice", None, ()),
    "masked_lm": encoder_files.masked_lm("vocab_transform", "vocab_layer_norm", "vocab_projector", None),
}


class Model(encoder.EncoderModel):
    """The encoder, with a head as asked."""

    HEADS = HEADS


_LAYERS = encoder_files.LayerNames(
    layer="transformer.layer.{layer}",
    heads=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    out="attention.out_lin",
    attention_norm="sa_layer_norm",
    up="ffn.lin1",
    down="ffn.lin2",
    mlp_norm="output_layer_norm",
)


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    others = ("pre_classifier.*", "vocab_transform.*", "vocab_layer_norm.*", "vocab_projector.*")
    return encoder_files.hf_layout(
        config, head, HEADS, "distilbert", decoder="vocab_projector.weight", others=others, layers=_LAYERS
    )


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    return encoder_files.config_of_weights(weights, ("classifier.weight",), "vocab_projector.weight", pooler=None)
