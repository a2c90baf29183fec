"""DINOv2 (Oquab et al. 2023), as `transformers` computes it (`Dinov2Model`, `Dinov2WithRegistersModel` and heads): ViT whose attention and
MLPs are scaled by channel, with register tokens (Darcet et al. 2023) or without."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxft.errors import UserError
from jaxft.models import vision, vision_config, vision_files
from jaxft.models.checks import check_fields
from jaxft.models.contract import Head
from jaxft.models.layout import Layout, Tensors

MODEL_TYPES = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}


@dataclass(frozen=True)
class Config(vision_config.VisionConfig):
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    model_type: Literal["dinov2", "dinov2_with_registers"] = "dinov2"
    layer_norm_eps: float = 1e-6
    patch_size: int | tuple[int, int] = 14
    mlp_ratio: int = 4
    """Hidden width of MLPs, in widths of the model."""
    layerscale_value: float = 1.0
    """What attention and MLP are multiplied with before anything is learnt."""
    use_swiglu_ffn: bool = False
    """MLPs are gated by SiLU, and two thirds as wide."""
    use_mask_token: bool = True
    """Whether there is a vector for hidden patches, which pre-training has used."""
    num_register_tokens: int = 4
    """Registers, which ``dinov2_with_registers`` alone has."""

    OURS: ClassVar[tuple[str, ...]] = ("model_type", "num_labels")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ("mlp_ratio", "num_register_tokens"))
        if self.image[0] != self.image[1] or self.grid[0] != self.grid[1]:
            raise UserError(
                f"model.arch: image_size={self.image_size}, patch_size={self.patch_size}: this family's grids of patches are square"
            )
        if self.model_type == "dinov2_with_registers" and not self.use_mask_token:
            raise UserError("model.arch: use_mask_token=false is not possible with register tokens")

    @property
    def registers(self) -> int:
        return self.num_register_tokens if self.model_type == "dinov2_with_registers" else 0

    @property
    def antialiased(self) -> bool:
        return self.model_type == "dinov2_with_registers"

    @property
    def masks(self) -> bool:
        return self.use_mask_token

    @property
    def mlp_width(self) -> int:
        width = self.hidden_size * self.mlp_ratio
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width

    @property
    def gated(self) -> bool:
        return self.use_swiglu_ffn

    @property
    def layer_scale(self) -> float | None:
        return self.layerscale_value

    @property
    def residual_dropout(self) -> float:
        return 0.0  # the reference drops embeddings alone


TINY = Config(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=2, image_size=16, patch_size=4, layerscale_value=0.5,
    hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1, drop_path_rate=0.2, initializer_range=0.1,
)  # fmt: skip

# Of backbones: they name layers, whose number may have changed.
SUPERSEDED = ("out_features", "out_indices", "stage_names")
facts = vision.facts
HEADS: Mapping[str | None, Head[Config]] = {
    None: Head("Model"),
    "image_classification": vision_files.image_classification(mean=True),
}


class Model(vision.VisionModel):
    """The encoder, with a head as asked."""

    HEADS = HEADS


def config_from_hf(hf: Mapping[str, object]) -> dict[str, object]:
    """The fields of :class:`Config` that a reference config.json (of v4 or v5) states; absent ones keep our defaults,
    which are the reference's."""
    kind = hf.get("model_type")
    defaults = {"model_type": kind, "patch_size": 16} if kind == "dinov2_with_registers" else {}
    return defaults | vision_files.config_from_hf(Config, hf)


def config_to_hf(config: Config) -> dict[str, object]:
    """The reference's config.json of ``config``, without model type, label names and architecture."""
    theirs = vision_files.config_to_hf(config)
    unknown = "use_mask_token" if config.registers else "num_register_tokens"
    return {name: value for name, value in theirs.items() if name != unknown}


def config_of_weights(weights: Tensors) -> dict[str, object]:
    """What tensors alone say about the Config; believed over config.json."""
    said = vision_files.config_of_weights(weights)
    names = weights.names()
    if not any(name.endswith("embeddings.register_tokens") for name in names):
        said["use_mask_token"] = any(name.endswith("embeddings.mask_token") for name in names)
    return said


def hf_layout(config: Config, head: str | None) -> Layout:
    """The reference's checkpoint layout: weight table, prefix, and what may be missing or left over."""
    # The reference's name of gate and up, which are one tensor there, where MLPs are gated.
    wide, down = (("mlp.weights_in",), "mlp.weights_out") if config.gated else (("mlp.fc1",), "mlp.fc2")
    names = vision_files.VisionNames(config.model_type, ("norm1", "norm2"), wide, down)
    return names.layout(config, HEADS[head])
