"""What every weights file offers: names, shapes, dtypes, and one tensor (or some of its rows) at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from jaxft.errors import UserError, nearest

MAX_RANK = 8  # far above any weight; numpy itself stops at 64


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a stored tensor; no dimension is zero."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of data in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def quoted(name: str) -> str:
    """A name from a file, fit for a one-line message: escaped and of bounded length."""
    return repr(name) if len(name) <= 120 else repr(name[:120]) + "..."


def corrupt(path: Path, reason: str) -> UserError:
    """The error for a file whose structure is wrong."""
    return UserError(f"{path} is corrupt or truncated: {reason}; download or copy it again")


def check_name(name: object, path: Path) -> str:
    """Odd names are fine, as long as they are text."""
    if not isinstance(name, str):
        raise corrupt(path, f"a tensor name is of type {type(name).__name__}, not text")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise corrupt(path, f"the tensor name {quoted(name)} is not valid Unicode") from None
    return name


def check_shape(shape: object, name: str, path: Path) -> tuple[int, ...]:
    """A shape read from a file: at most MAX_RANK positive integers."""
    if not isinstance(shape, list | tuple) or not all(type(size) is int for size in shape):
        raise corrupt(path, f"the shape of tensor {quoted(name)} is not a list of integers")
    if len(shape) > MAX_RANK:
        raise corrupt(path, f"tensor {quoted(name)} has {len(shape)} dimensions (at most {MAX_RANK} are accepted)")
    if any(not 0 < size < 1 << 62 for size in shape):
        raise corrupt(path, f"tensor {quoted(name)} has a dimension that is zero, negative or absurdly large")
    return tuple(shape)


class Weights(ABC):
    """An open set of tensors. `read*` may be called from several threads at once; use it as a context manager."""

    def __init__(self, path: Path, format: str, specs: Mapping[str, TensorSpec]) -> None:
        if not specs:
            raise UserError(f"{path} holds no tensors; name a file or a folder with weights")
        self.path = path
        self.format = format
        self._specs = dict(specs)

    def names(self) -> tuple[str, ...]:
        """Tensor names, in the order of the file."""
        return tuple(self._specs)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; UserError if there is no such tensor."""
        return self.spec(name).shape

    def dtype(self, name: str) -> np.dtype:
        """The dtype of a tensor (ml_dtypes for bfloat16); UserError if there is no such tensor."""
        return self.spec(name).dtype

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a tensor.

        Raises:
          UserError: there is no such tensor.
        """
        if name not in self._specs:
            raise UserError(f"{self.path} has no tensor {quoted(name)}; {nearest(name, self._specs)}")
        return self._specs[name]

    def read(self, name: str) -> np.ndarray:
        """The whole tensor, in memory of its own."""
        spec = self.spec(name)
        out = np.empty(spec.shape, spec.dtype)
        self._fill_checked(name, None, out)
        return out

    def read_into(self, name: str, out: np.ndarray) -> None:
        """Reads the whole tensor into ``out``, which has its shape and dtype and is C-contiguous."""
        spec = self.spec(name)
        if out.shape != spec.shape or out.dtype != spec.dtype or not out.flags.c_contiguous or not out.flags.writeable:
            raise ValueError(
                f"read_into({name!r}) needs a writeable C-contiguous array of {spec}, got {out.shape} {out.dtype}"
            )
        self._fill_checked(name, None, out)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows ``[start, stop)`` of axis 0, reading only what they need."""
        spec = self.spec(name)
        if not spec.shape or not 0 <= start < stop <= spec.shape[0]:
            raise ValueError(f"read_rows({name!r}, {start}, {stop}): the tensor has shape {spec.shape}")
        out = np.empty((stop - start, *spec.shape[1:]), spec.dtype)
        self._fill_checked(name, (start, stop), out)
        return out

    def _fill_checked(self, name: str, rows: tuple[int, int] | None, out: np.ndarray) -> None:
        self._fill(name, rows, out)
        # numpy's behaviour is undefined on booleans that are neither 0 nor 1.
        if out.dtype == np.bool_ and out.view(np.uint8).max() > 1:
            raise corrupt(self.path, f"the boolean tensor {quoted(name)} holds bytes other than 0 and 1")

    @abstractmethod
    def _fill(self, name: str, rows: tuple[int, int] | None, out: np.ndarray) -> None:
        """Fills ``out``, already of the right shape and dtype, with the tensor (``rows`` None) or rows of it."""

    @abstractmethod
    def close(self) -> None:
        """Closes the files; reading afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
