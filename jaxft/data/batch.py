"""What a batch is made of, declared once: the fields of a batch, the shapes that are compiled, and rows collated into arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.parallel.sharding import AxisRules, batch_sharding

HostBatch = dict[str, np.ndarray]
Example = Mapping[str, np.ndarray]
"""One row, unpadded: an array for each field that rows store."""


class Field(NamedTuple):
    """One array of a batch."""

    axes: tuple[str | int, ...]
    """A logical name per dimension (``batch`` first), or a fixed size that is never split."""
    dtype: str = "int32"
    fill: float = 0
    """What padding is made of."""
    value: float | None = None
    """What the entries of every row are, if rows do not store this field (masks and weights: 1)."""
    count: int | None = None
    """Ids are below this: rows of the table that they are looked up in. None: anything goes."""
    apart: bool = False
    """Whether rows that share one of its values, negative ones aside, are kept in different training batches where that can be."""

    def shape(self, shape: Shape) -> tuple[int, ...]:
        """The padded array's shape."""
        sizes = {"batch": shape.rows, **dict(shape.sizes)}
        return tuple(axis if isinstance(axis, int) else sizes[axis] for axis in self.axes)


Fields = Mapping[str, Field]
"""By name; ``weights`` is always among them: 1 for each row, 0 for rows that only fill up a batch."""

WEIGHTS = Field(("batch",), "float32", value=1)


@dataclass(frozen=True)
class Shape:
    """A compiled shape: the key of a program."""

    rows: int
    sizes: tuple[tuple[str, int], ...] = ()
    """Padded size of each axis besides ``batch``, for instance ``(("length", 128),)``."""

    @property
    def tokens(self) -> int:
        """Rows times the padded length of the inputs."""
        return self.rows * dict(self.sizes).get("length", 1)

    def __str__(self) -> str:
        return "x".join(map(str, (self.rows, *(size for _, size in self.sizes))))


def text_shape(rows: int, length: int) -> Shape:
    """The shape of a batch of texts."""
    return Shape(rows, (("length", length),))


def text_fields(pad_id: int) -> dict[str, Field]:
    """The fields of rows of text, padded with ``pad_id``."""
    places = ("batch", "length")
    return {
        "tokens": Field(places, fill=pad_id),
        "mask": Field(places, value=1),
        "types": Field(places),
        "weights": WEIGHTS,
    }


def shaped(fields: Fields, shape: Shape, mesh: Mesh, rules: AxisRules) -> dict[str, jax.ShapeDtypeStruct]:
    """A batch as shapes with shardings."""
    return {
        name: jax.ShapeDtypeStruct(
            field.shape(shape), np.dtype(field.dtype), sharding=batch_sharding(mesh, rules, field.axes)
        )
        for name, field in fields.items()
    }


def collate(rows: Sequence[Example], fields: Fields, shape: Shape) -> HostBatch:
    """Rows padded to a shape; rows that are lacking are padding as a whole."""
    return {name: _padded(name, rows, fields, shape) for name in fields}


def _padded(name: str, rows: Sequence[Example], fields: Fields, shape: Shape) -> np.ndarray:
    field = fields[name]
    out = np.full(field.shape(shape), field.fill, field.dtype)
    for i, row in enumerate(rows):
        if name in row:
            value = row[name]
            out[(i, *map(slice, np.shape(value)))] = value
        elif field.value is not None:
            sizes = sizes_of(row, fields)
            out[(i, *(slice(axis if isinstance(axis, int) else sizes[axis]) for axis in field.axes[1:]))] = field.value
        else:
            raise ValueError(f"a row has no {name!r}, only {', '.join(row)}")
    return out


def sizes_of(row: Example, fields: Fields) -> dict[str, int]:
    """The size of an unpadded row along each named axis."""
    return {
        axis: size
        for name, value in row.items()
        for axis, size in zip(fields[name].axes[1:], np.shape(value), strict=True)
        if isinstance(axis, str)
    }
