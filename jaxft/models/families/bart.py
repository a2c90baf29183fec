"""BART (Lewis et al. 2019) and mBART (Liu et al. 2020; Tang et al. 2020), as `transformers` computes them (`BartModel`,
`BartForConditionalGeneration`, `BartForSequenceClassification`, `BartForQuestionAnswering`, and those of `MBart`).

An encoder-decoder with learned positions. BART normalises what each part of a layer gives, mBART what goes into it and what comes out of
the last layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxft.errors import UserError
from jaxft.models import bart_like, bart_like_files
from jaxft.models.bart_like import BartLikeConfig, vocabulary
from jaxft.models.checks import check_fields
from jaxft.models.contract import Head
from jaxft.models.encoder_decoder import SEQ2SEQ_LM
from jaxft.models.heads import normal
from jaxft.models.layout import Layout, Tensors
from jaxft.models.source_heads import classes_of_weights, classification, one_end, question_answering, with_end

MODEL_TYPES = {"bart": "Bart", "mbart": "MBart"}


@dataclass(frozen=True)
class Config(BartLikeConfig):
    """Everything that changes the maths."""

    model_type: str = "bart"
    """mBART has its norms before what they are behind in BART, and one after each side."""
    eos_token_id: int | None = 2
    """The token that texts end with: a head of classes reads the vector of its last one."""
    classifier_dropout: float = 0.0
    num_labels: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model_type not in MODEL_TYPES:
            raise UserError(f"model.arch: model_type={self.model_type!r} is neither bart nor mbart")
        check_fields(self, ("num_labels",), ("classifier_dropout",))

    @property
    def pre_norms(self) -> bool:
        return self.model_type == "mbart"


TINY = Config(
    vocab_size=96, hidden_size=32, num_hidden_layers=2, num_decoder_layers=3, num_attention_heads=4, num_decoder_heads=2,
    intermediate_size=64, decoder_intermediate_size=48, max_position_embeddings=64, initializer_range=0.1,
    attention_dropout=0.1, activation_dropout=0.1,
)  # fmt: skip

HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    SEQ2SEQ_LM: Head("ForConditionalGeneration", vocabulary, bart_like_files.head_rules, marks=("final_logits_bias",)),
    "classification": classification(lambda c: (c.hidden_size, c.num_labels, c.classifier_dropout), normal),
    "question_answering": question_answering(lambda c: c.hidden_size, normal),
}


class Model(bart_like.BartLikeModel[Config]):
    """The encoder-decoder, with a head as asked."""

    HEADS = HEADS

    @property
    def begins(self) -> int | None:
        return None if self.config.model_type == "mbart" else self.config.decoder_start_token_id


facts = bart_like.facts

# ------------------------------------------------------------------------------------------------ Hugging Face layout

SUPERSEDED = bart_like_files.SUPERSEDED
_NAMES = {**bart_like_files.NAMES, **{name: name for name in ("eos_token_id", "classifier_dropout")}}


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's. A start of targets that mBART's file does not state is the token that ends texts.

    Raises:
      UserError: what :func:`jaxft.models.bart_like_files.config_from_hf` refuses.
    """
    kind = str(hf.get("model_type", "bart"))
    before = kind == "mbart"
    norms = {"normalize_before": before, "add_final_layer_norm": before, "normalize_embedding": True}
    found = bart_like_files.config_from_hf(Config, hf, {**norms, "static_position_embeddings": False}, _NAMES)
    found |= {
        "eos_token_id": one_end(hf, Config.eos_token_id),
        "classifier_dropout": hf.get("classifier_dropout") or 0.0,
    }
    return found | {"model_type": kind}


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    return with_end(bart_like_files.config_to_hf(config, _NAMES))


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json.

    Raises:
      UserError: the two sides have tables of tokens that differ.
    """
    return classes_of_weights(weights) | bart_like_files.config_of_weights(weights)


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return bart_like_files.hf_layout(config, HEADS[head].rules(config))
