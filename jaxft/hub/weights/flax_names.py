"""Flax checkpoints of Hugging Face models (``FlaxBert*`` and kin) under their PyTorch names and layouts.

Flax calls every matrix ``kernel`` and stores it (in, out); PyTorch calls it ``weight`` and stores (out, in). The module
paths are the same in both, so the rule needs only the last part of a name and the rank:

| flax                | PyTorch | layout                            |
| ------------------- | ------- | --------------------------------- |
| kernel, 2-D         | weight  | transposed                        |
| kernel, 4-D (conv)  | weight  | (H, W, in, out) to (out, in, H, W) |
| scale (LayerNorm)   | weight  | as it is                          |
| embedding           | weight  | as it is                          |
| anything else       | same    | as it is                          |

GPT-2's Conv1D, the one PyTorch layer stored (in, out), is stored (out, in) by its Flax twin: the same rule holds.
"""

from __future__ import annotations

import numpy as np

from jaxft.errors import UserError
from jaxft.hub.weights.contract import TensorSpec, Weights, quoted
from jaxft.hub.weights.flax_file import FORMAT

_RENAMED = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_KERNEL_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}  # rank -> the flax axis that each PyTorch axis is


def under_pytorch_names(weights: Weights) -> Weights:
    """``weights`` (of format "flax msgpack") as if they had been saved by PyTorch; closing it closes ``weights``.

    A leading ``params.`` (the collection name, when all of a model's variables were saved) is dropped.

    Raises:
      UserError: two names would become one, a kernel has a rank with no rule, or there are collections beside params.
    """
    if weights.format != FORMAT:
        raise ValueError(f"{weights.path} is of format {weights.format!r} and has PyTorch names already")
    return _PytorchNamed(weights)


class _PytorchNamed(Weights):
    def __init__(self, inner: Weights) -> None:
        self._inner = inner
        self._sources: dict[str, str] = {}
        self._axes: dict[str, tuple[int, ...] | None] = {}  # None: as it is
        specs: dict[str, TensorSpec] = {}
        in_collection = [name.startswith("params.") for name in inner.names()]
        if any(in_collection) and not all(in_collection):
            other = inner.names()[in_collection.index(False)]
            raise UserError(f"{inner.path} holds {quoted(other)} beside params; save the params collection alone")
        for source in inner.names():
            parts = source.removeprefix("params.").split(".")
            spec = inner.spec(source)
            axes = _kernel_axes(inner, source, spec) if parts[-1] == "kernel" else None
            name = ".".join((*parts[:-1], _RENAMED.get(parts[-1], parts[-1])))
            if name in specs:
                raise UserError(
                    f"{inner.path}: {quoted(self._sources[name])} and {quoted(source)} would both become "
                    f"{quoted(name)} in PyTorch; remove one of them"
                )
            self._sources[name], self._axes[name] = source, axes
            shape = spec.shape if axes is None else tuple(spec.shape[axis] for axis in axes)
            specs[name] = TensorSpec(shape, spec.dtype)
        super().__init__(inner.path, inner.format, specs)

    def _fill(self, name: str, rows: tuple[int, int] | None, out: np.ndarray) -> None:
        source, axes = self._sources[name], self._axes[name]
        if axes is None:
            self._inner._fill(source, rows, out)
            return
        tensor = self._inner.read(source).transpose(axes)
        np.copyto(out, tensor if rows is None else tensor[rows[0] : rows[1]])

    def close(self) -> None:
        self._inner.close()


def _kernel_axes(inner: Weights, source: str, spec: TensorSpec) -> tuple[int, ...]:
    if len(spec.shape) not in _KERNEL_AXES:
        raise UserError(
            f"{inner.path}: the kernel {quoted(source)} has {len(spec.shape)} dimensions; a PyTorch layout is known "
            "for 2 (dense) and 4 (2-D convolution) only"
        )
    return _KERNEL_AXES[len(spec.shape)]
