"""DeiT (Touvron et al. 2020), as `transformers` computes it (`DeiTModel` and its heads): ViT with a second special token, which has learnt
from a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import flax.linen as nn
from jaxtyping import Array, Float32, PRNGKeyArray

from jaxft.layers import Compute, Linear
from jaxft.models import vision, vision_config, vision_files
from jaxft.models.contract import Features, Head
from jaxft.models.heads import dense_rules, exact, normal
from jaxft.models.layout import Layout

MODEL_TYPES = {"deit": "DeiT"}


@dataclass(frozen=True)
class Config(vision_config.PooledConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    @property
    def specials(self) -> tuple[str, ...]:
        return ("class_token", "distillation_token")


TINY = Config(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
    hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, drop_path_rate=0.2, initializer_range=0.1,
)  # fmt: skip

SUPERSEDED = ()
facts = vision.facts


class BothClasses(nn.Module):
    """The mean of two classifiers' logits, one of each special token: logits [B, C]."""

    config: Config
    compute: Compute

    @nn.compact
    def __call__(self, seen: Features, key: PRNGKeyArray | None) -> Float32[Array, "B C"]:
        del key
        c, how = self.config, exact(self.compute)
        shape = (c.hidden_size, c.num_labels)
        first, second = (
            Linear(shape, ("embed", "classes"), how, normal(c), name=name)(seen.hidden[:, place])
            for place, name in enumerate(("linear", "distilled"))
        )
        return (first + second) / 2


HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    "image_classification": vision_files.image_classification(),
    "distilled_classification": Head(
        "ForImageClassificationWithTeacher",
        lambda c, compute, name: BothClasses(c, compute, name=name),
        lambda c: (
            *dense_rules("head/linear", "cls_classifier"),
            *dense_rules("head/distilled", "distillation_classifier"),
        ),
        marks=("cls_classifier.weight", "distillation_classifier.weight"),
        classes="rows",
    ),
}
_NAMES = vision_files.VisionNames("deit")


class Model(vision.VisionModel):
    """The encoder, with a head as asked."""

    HEADS = HEADS


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's."""
    return vision_files.config_from_hf(Config, hf)


config_to_hf, config_of_weights = vision_files.config_to_hf, vision_files.config_of_pooled_weights


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    return _NAMES.layout(config, HEADS[head])
