"""Local and global layers in one stack, and the rotary positions of each type, as config.json states them.

A local layer is one of ``sliding_attention``: its tokens see those near by. A global one, of ``full_attention``, sees all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from jaxft.attention import MaskSpec
from jaxft.errors import UserError, nearest
from jaxft.layers import Rotary
from jaxft.models.checks import check_layers
from jaxft.models.rotary_files import rotary_from_hf, rotary_to_hf

GLOBAL, LOCAL = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Kind:
    """What differs by layer."""

    rope: Rotary
    window: int | None
    """Tokens are seen that are fewer than so many places away; None: all."""
    normed: bool = True
    """Whether there is a norm before attention."""

    def mask(self, mask: MaskSpec, length: int) -> MaskSpec:
        """What the layer sees of rows of a length. A window as wide as the row is none: more backends can do without."""
        near = self.window if self.window is not None and self.window < length else None
        return dataclasses.replace(mask, window=near)


def alternating(every: int, layers: int) -> tuple[str, ...]:
    """The types of layers of which 0, ``every``, 2 ``every``, ... are global."""
    return tuple(LOCAL if i % every else GLOBAL for i in range(layers))


def types_from_hf(hf: Mapping[str, object], layers: int, usual: int) -> dict[str, object]:
    """``global_attn_every_n_layers`` where types come in such an order, else ``layer_types``.

    Args:
      hf: config.json; where it has both, the reference believes ``layer_types``.
      layers: how many there are.
      usual: ``global_attn_every_n_layers`` where the file has neither.

    Raises:
      UserError: a type that there is not, another number of types than layers, an order that is no number.
    """
    every, stated = hf.get("global_attn_every_n_layers", usual), stated_types(hf, layers)
    if type(every) is not int or every < 1:
        raise UserError(f"config.json: global_attn_every_n_layers={every!r} must be a whole number, 1 or more")
    if stated is None:
        return {"global_attn_every_n_layers": every}
    fits = [n for n in (every, *range(1, layers + 1)) if alternating(n, layers) == stated]
    return {"global_attn_every_n_layers": fits[0]} if fits else {"layer_types": list(stated)}


def stated_types(hf: Mapping[str, object], layers: int) -> tuple[str, ...] | None:
    """``layer_types`` of config.json; None: it has none.

    Args:
      layers: how many there are.

    Raises:
      UserError: a type that there is not, or another number of types than layers.
    """
    check_layers(layers)
    stated = hf.get("layer_types")
    if stated is None:
        return None
    if not isinstance(stated, list | tuple) or len(stated) != layers:
        shown = f"names {len(stated)} layers" if isinstance(stated, list | tuple) else f"={stated!r} is no list"
        raise UserError(f"config.json: layer_types {shown}, num_hidden_layers is {layers}")
    for name in stated:
        if name not in (GLOBAL, LOCAL):
            raise UserError(
                f"config.json: layer_types: {name!r} is not supported: {nearest(str(name), (GLOBAL, LOCAL))}"
            )
    return tuple(stated)


def rotaries_from_hf(
    hf: Mapping[str, object], usual: Mapping[str, tuple[str, float]], usual_limit: int
) -> dict[str, dict[str, object]]:
    """The fields of :class:`~jaxft.layers.Rotary` of each type of layer.

    Args:
      hf: config.json; ``rope_parameters`` has an object for each type (transformers 5), or a base stands by itself (4).
      usual: type of layer -> the older key of its base, and the base where the file has none.
      usual_limit: ``max_position_embeddings`` where the file has none.

    Raises:
      UserError: rotary positions of a kind that is not supported, or settings that belong to no type of layer.
    """
    if hf.get("rope_scaling"):
        raise UserError("config.json: rope_scaling is not supported here; state rope_parameters for each type of layer")
    stated = hf.get("rope_parameters") or {}
    if not isinstance(stated, Mapping) or not set(stated) <= set(usual):
        raise UserError(f"config.json: rope_parameters={stated!r} must have an object for each of {', '.join(usual)}")
    made = {}
    for name, (key, theta) in usual.items():
        rope = {"rope_theta": hf.get(key, theta), **(stated.get(name) or {})}
        limit = hf.get("max_position_embeddings", usual_limit)
        made[name] = rotary_from_hf({"rope_parameters": rope, "max_position_embeddings": limit}, usual_limit)
    return made


def rotaries_to_hf(rotaries: Mapping[str, Rotary]) -> dict[str, object]:
    """``rope_parameters`` of a config.json, by type of layer."""
    return {name: rotary_to_hf(rotary) for name, rotary in rotaries.items()}
