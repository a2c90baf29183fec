"""What a Config of a Vision Transformer has (:mod:`jaxft.models.vision`): images, patches, layers, what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np

from jaxft.errors import UserError
from jaxft.layers.functions import ALWAYS
from jaxft.models.checks import MOST_SIZE, check_fields
from jaxft.models.grids import Grid


@dataclass(frozen=True)
class VisionConfig:
    """Everything that changes the maths. Field names follow the reference's config.json where it has the field."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: int | tuple[int, int] = 224
    """Height and width of images, in pixels; one number: of square ones."""
    patch_size: int | tuple[int, int] = 16
    """Height and width of patches; what an image has beyond a whole number of them is not looked at."""
    num_channels: int = 3
    qkv_bias: bool = True
    drop_path_rate: float = 0.0
    """How often an image skips attention, or MLP, of the last layer in training; 0 in the first, rising with depth (Huang et al. 2016)."""
    num_labels: int = 2

    OURS: ClassVar[tuple[str, ...]] = ("drop_path_rate", "num_labels", "pooler")
    """Fields that are no keys of config.json."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_channels", "num_labels")
        check_fields(
            self, sizes, ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"), ("hidden_act",)
        )
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"model.arch: hidden_size={self.hidden_size} is not a multiple of num_attention_heads={self.num_attention_heads}"
            )
        for name in ("image_size", "patch_size"):
            if not all(1 <= side <= MOST_SIZE for side in _sides(getattr(self, name))):
                raise UserError(
                    f"model.arch: {name}={getattr(self, name)}: sides must be at least 1 and at most {MOST_SIZE}"
                )
        if 0 in self.grid:
            raise UserError(
                f"model.arch: image_size={self.image_size} is smaller than a patch (patch_size={self.patch_size})"
            )

    @property
    def image(self) -> tuple[int, int]:
        """Height and width of an image."""
        return _sides(self.image_size)

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch."""
        return _sides(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        (height, width), (tall, wide) = self.image, self.patch
        return height // tall, width // wide

    @property
    def specials(self) -> tuple[str, ...]:
        """Tokens before the patches that have positions; the first one's vector stands for the image."""
        return ("class_token",)

    @property
    def registers(self) -> int:
        """Tokens between these and the patches that have no positions (Darcet et al. 2023)."""
        return 0

    @property
    def masks(self) -> bool:
        """Whether there is a vector for hidden patches: pre-training has used it, nothing here does."""
        return False

    @property
    def positions(self) -> Grid:
        """What the table of positions is of."""
        return Grid(*self.grid, alone=len(self.specials), antialiased=self.antialiased)

    @property
    def antialiased(self) -> bool:
        """The same in :class:`Grid`."""
        return False

    @property
    def places(self) -> int:
        """Rows of the table of positions."""
        return self.positions.places

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.places + self.registers

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def mlp_width(self) -> int:
        """Hidden width of an MLP."""
        raise NotImplementedError

    @property
    def gated(self) -> bool:
        """Whether MLPs are gated by SiLU."""
        return False

    @property
    def layer_scale(self) -> float | None:
        """What attention and MLP are multiplied with at first, by channel (Touvron et al. 2021); None: they are not."""
        return None

    @property
    def residual_dropout(self) -> float:
        """Dropout of what attention and MLPs add."""
        return self.hidden_dropout_prob

    @property
    def pool_width(self) -> int | None:
        """Width of the pooler beside the bare encoder; None: the first token's vector is the pooled one as it is."""
        return None

    @property
    def pool_act(self) -> str:
        """The pooler's activation."""
        return "tanh"

    @property
    def pools(self) -> bool:
        """Whether the bare encoder gives a pooled vector."""
        return True

    def kept(self) -> np.ndarray:
        """How often each layer is there in training, [L], in parts of :data:`ALWAYS`."""
        rates = np.linspace(0.0, self.drop_path_rate, self.num_hidden_layers)
        return np.round((1.0 - rates) * ALWAYS).astype(np.uint32)


V = TypeVar("V", bound=VisionConfig)


@dataclass(frozen=True)
class PooledConfig(VisionConfig):
    """A Config with the MLP's width, and a pooler beside the bare encoder."""

    intermediate_size: int = 3072
    pooler_output_size: int | None = None
    """Width of the pooled vector; None: ``hidden_size``."""
    pooler_act: str = "tanh"
    pooler: bool = True
    """Whether there is a pooler beside the bare encoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, ("intermediate_size", "pooler_output_size"), (), ("pooler_act",))

    @property
    def mlp_width(self) -> int:
        return self.intermediate_size

    @property
    def pool_width(self) -> int | None:
        return self.hidden_size if self.pooler_output_size is None else self.pooler_output_size

    @property
    def pool_act(self) -> str:
        return self.pooler_act

    @property
    def pools(self) -> bool:
        return self.pooler


def _sides(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size
