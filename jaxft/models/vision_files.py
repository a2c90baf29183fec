"""What the reference's files call the parts of a Vision Transformer (:mod:`jaxft.models.vision`): config.json and weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from jaxft.models.block_files import BlockNames
from jaxft.models.contract import Head
from jaxft.models.heads import dense_rules, norm_rules
from jaxft.models.layout import Layout, Rule, Tensors
from jaxft.models.vision import ImageClasses
from jaxft.models.vision_config import V, VisionConfig


def config_from_hf(config: type[VisionConfig], hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of a Config that a reference config.json (of v4 or v5) states; absent ones keep our defaults, which are the
    reference's."""
    return {name: hf[name] for name in _keys(config) if name in hf}


def config_to_hf(config: VisionConfig) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    values = {name: getattr(config, name) for name in _keys(type(config))}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _keys(config: type[VisionConfig]) -> tuple[str, ...]:
    """Fields of a Config that are keys of config.json."""
    return tuple(field.name for field in dataclasses.fields(config) if field.name not in config.OURS)


@dataclass(frozen=True)
class VisionNames:
    """What the reference calls the parts of a model."""

    prefix: str
    """The prefix of the encoder in models with a head, for instance ``vit``."""
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    """The norms of a layer, before attention and MLP."""
    wide: tuple[str, ...] = ("intermediate.dense",)
    down: str = "output.dense"
    scales: tuple[str, str] = ("layer_scale1", "layer_scale2")

    def layout(self, config: V, head: Head[V]) -> Layout:
        """The weight table, prefix, and what may be missing or left over."""
        dense = dense_rules("pooler", f"{self.prefix}.pooler.dense") if self._pools(config, head) else ()
        rules = (
            *self._embeddings(config),
            *self._layers(config),
            *norm_rules("norm", f"{self.prefix}.layernorm"),
            *dense,
            *head.rules(config),
        )
        return Layout(rules, f"{self.prefix}.", leftovers=_LEFTOVERS, fresh=("head/*", "pooler/*"))

    def _pools(self, config: V, head: Head[V]) -> bool:
        return head.make is None and config.pools and config.pool_width is not None

    def _embeddings(self, c: VisionConfig) -> tuple[Rule, ...]:
        at = f"{self.prefix}.embeddings"
        names = {"class_token": "cls_token"}
        mask = (Rule("embed/mask_token", f"{at}.mask_token"),) if c.masks else ()
        registers = (Rule("embed/register_tokens", f"{at}.register_tokens"),) if c.registers else ()
        return (
            *(Rule(f"embed/{name}", f"{at}.{names.get(name, name)}") for name in c.specials),
            *mask,
            *registers,
            Rule("embed/position_table", f"{at}.position_embeddings", grid=c.positions),
            Rule("embed/patch/kernel", f"{at}.patch_embeddings.projection.weight", "d z y x -> y x z d"),
            Rule("embed/patch/bias", f"{at}.patch_embeddings.projection.bias"),
        )

    def _layers(self, c: VisionConfig) -> tuple[Rule, ...]:
        at = f"{self.prefix}.encoder.layer.{{layer}}"
        heads = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
        order = ("gate", "up") if c.gated else ("up",)
        names = BlockNames(at, heads, "attention.output.dense", self.wide, self.down, order)
        scaled = zip(("attention_scale", "mlp_scale"), self.scales if c.layer_scale is not None else (), strict=False)
        return (
            *norm_rules("layers/norm", f"{at}.{self.norms[0]}"),
            *names.rules(c.qkv_bias, True, out_biased=True),
            *norm_rules("layers/mlp_norm", f"{at}.{self.norms[1]}"),
            *(Rule(f"layers/{ours}/scale", f"{at}.{theirs}.lambda1") for ours, theirs in scaled),
        )


# Known, harmless leftovers: heads that the task does not use, and what only pre-training has read.
_LEFTOVERS = ("*pooler.dense.*", "*embeddings.mask_token", "*classifier.*", "decoder.*")


def image_classification(*, mean: bool = False) -> Head[VisionConfig]:
    """The head with classes of images.

    Args:
      mean: it reads the mean of the patches' vectors beside the first token's.
    """
    return Head(
        "ForImageClassification",
        lambda c, compute, name: ImageClasses(c, compute, mean, name=name),
        lambda c: dense_rules("head/linear", "classifier"),
        marks=("classifier.weight",),
        classes="rows",
    )


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    names = weights.names()
    said: dict[str, object] = {}
    for name in ("classifier.weight", "cls_classifier.weight"):
        if name in names:
            said["num_labels"] = weights.shape(name)[0]
    return said


def config_of_pooled_weights(weights: Tensors) -> dict[str, object]:
    """The same of a family whose bare encoder may have a pooler."""
    pooler = any(name.endswith("pooler.dense.weight") for name in weights.names())
    return {"pooler": pooler, **config_of_weights(weights)}
