"""ViT (Dosovitskiy et al. 2020), as `transformers` computes it (`ViTModel` and its heads)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxft.models import vision, vision_config, vision_files
from jaxft.models.contract import Head
from jaxft.models.layout import Layout

MODEL_TYPES = {"vit": "ViT"}


@dataclass(frozen=True)
class Config(vision_config.PooledConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""


TINY = Config(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4,
    hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, drop_path_rate=0.2, initializer_range=0.1,
)  # fmt: skip

SUPERSEDED = ()
facts = vision.facts
HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    "image_classification": vision_files.image_classification(),
}
_NAMES = vision_files.VisionNames("vit")


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
