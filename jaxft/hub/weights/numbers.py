"""The numbers in weights: which types are weights, NaN and infinity, equality, and rounding that loses no magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxft.errors import UserError
from jaxft.hub.weights.dtypes import FLOATS

_CHUNK = 1 << 20  # elements looked at together: what is made on the way stays small beside the tensor


def is_float(dtype: np.dtype) -> bool:
    """Whether numbers of this type can be a layer's weights; integers are codes of some quantisation."""
    return np.dtype(dtype) in FLOATS


def is_finite(array: np.ndarray) -> bool:
    """Whether a floating-point array holds neither NaN nor infinity."""
    flat = array.reshape(-1)
    return all(bool(np.isfinite(flat[i : i + _CHUNK]).all()) for i in range(0, flat.size, _CHUNK))


def name_non_finite(names: Sequence[str]) -> str:
    """The words for tensors that :func:`is_finite` denies."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"NaN or infinity in the weights: {', '.join(names[:4])}{more}"


def copy_rounded(out: np.ndarray, source: np.ndarray, name: str, path: Path | str) -> None:
    """Copies ``source`` into ``out``, of another floating-point type perhaps.

    Args:
      out: of the shape of ``source``.
      source: the numbers.
      name: of the tensor, for messages.
      path: where it is from, for messages.

    Raises:
      UserError: a finite number is beyond the range of ``out``'s type and would become infinite.
    """
    with np.errstate(over="ignore"):
        np.copyto(out, source, casting="unsafe")
    if out.dtype == source.dtype or _largest(out.dtype) >= _largest(source.dtype):
        return
    lost = ~np.isfinite(out) & np.isfinite(source)
    if lost.any():
        value = np.abs(source[lost].astype(np.float64)).max()
        raise UserError(
            f"{path}: tensor {name!r} holds {value:.6g}, which {out.dtype} cannot hold (at most {_largest(out.dtype):.6g}); "
            "keep a wider type"
        )


def _largest(dtype: np.dtype) -> float:
    return float(ml_dtypes.finfo(dtype).max)


def refuse_quantised(config: Mapping[str, object], path: Path) -> None:
    """Refuses a model whose config.json says that its weights are codes, not the numbers themselves.

    Raises:
      UserError: ``config`` has quantisation settings.
    """
    for key in QUANTISATION_KEYS:
        settings = config.get(key)
        if settings:
            method = settings.get("quant_method", "unnamed") if isinstance(settings, dict) else settings
            raise UserError(
                f"{path}: {key} says that the weights are quantised (method {method}), which jaxft does not read; "
                f"use the model's float weights (if these are float, remove {key})"
            )


QUANTISATION_KEYS = ("quantization_config", "compression_config")
"""Keys of config.json with quantisation settings; the second is an older name for the compressed-tensors library's."""
