"""What config.json calls rotary positions, in the layouts of transformers 4 and 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxft.errors import UserError
from jaxft.layers import Rotary

_ROPE_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ORIGINAL = _ROPE_KEYS[-1]
_ROPE_KEYS_OF = {
    **{"default": (), "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor", _ORIGINAL)},
    "llama3": _ROPE_KEYS,
}
_MAY_BE_0 = ("mscale", "mscale_all_dim")
_MAY_LACK = {"yarn": ("beta_fast", "beta_slow", "attention_factor", *_MAY_BE_0)}
"""Numbers that a kind may have; null is as good as nothing."""
SUPERSEDED_KEYS = ("rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Older keys of config.json for what :func:`rotary_to_hf` writes; the reference would believe some of them."""


def rotary_from_hf(hf: Mapping[str, object], usual_limit: int, usual_theta: float = Rotary.theta) -> dict[str, object]:
    """The fields of :class:`~jaxft.layers.Rotary` that a config.json states, by the rules of `modeling_rope_utils.py` of
    transformers 5.24.

    Args:
      hf: the file.
      usual_limit: ``max_position_embeddings`` where the file has none.
      usual_theta: ``rope_theta`` where the file has none.

    Raises:
      UserError: rotary positions of a kind that is not supported, or without what the kind needs.
    """
    # v5 has rope_parameters; v4 has rope_theta beside rope_scaling, whose kind was called "type" at first. Where a file has
    # both, the reference reads rope_scaling alone.
    stated = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    if not isinstance(stated, dict):
        raise UserError(f"config.json: rope_scaling={stated!r} is not an object of keys and values")
    rope: dict[str, Any] = {"rope_theta": hf.get("rope_theta", usual_theta), **stated}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in tuple(_ROPE_KEYS_OF):
        raise UserError(f"config.json: rope_type={kind!r} is not supported (only {', '.join(_ROPE_KEYS_OF)})")
    if any(tree.get("partial_rotary_factor") not in (None, 1) for tree in (hf, rope)):
        raise UserError("config.json: partial_rotary_factor is not supported")
    if _ORIGINAL in _ROPE_KEYS_OF[kind]:
        rope.setdefault(_ORIGINAL, hf.get("max_position_embeddings", usual_limit))
        if _ORIGINAL in hf:
            rope[_ORIGINAL] = hf[_ORIGINAL]
    more = [key for key in _MAY_LACK.get(kind, ()) if rope.get(key) is not None and (rope[key] or key not in _MAY_BE_0)]
    for key in ("rope_theta", *_ROPE_KEYS_OF[kind], *more):
        value: Any = rope.get(key)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            shown = f"{value!r}, not a number above 0" if key in rope else "missing"
            raise UserError(f"config.json: rotary positions of rope_type={kind!r}: {key} is {shown}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError("config.json: rope_type='llama3' needs a low_freq_factor below its high_freq_factor")
    found = {"kind": kind, "theta": rope["rope_theta"]} | {key: rope[key] for key in (*_ROPE_KEYS_OF[kind], *more)}
    if kind == "yarn" and rope.get("truncate") is not None:
        if not isinstance(rope["truncate"], bool):
            raise UserError(
                f"config.json: rotary positions of rope_type='yarn': truncate={rope['truncate']!r} is not true or false"
            )
        found["truncate"] = rope["truncate"]
    return found


def rotary_to_hf(rotary: Rotary) -> dict[str, object]:
    """``rope_parameters`` of a config.json."""
    own = {key: getattr(rotary, key) for key in (*_ROPE_KEYS_OF[rotary.kind], *_MAY_LACK.get(rotary.kind, ()))}
    own |= {"truncate": rotary.truncate} if rotary.kind == "yarn" else {}
    stated = {key: value for key, value in own.items() if value is not None}
    return {"rope_type": rotary.kind, "rope_theta": rotary.theta, **stated}
