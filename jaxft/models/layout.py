"""Where a family's parameters lie in the reference's checkpoint: one table of rules, run forwards to import and backwards to export.

A rule says where one of our parameters lives there and how it is rearranged (an einops pattern, theirs -> ours). Names with
``{layer}`` stand for one tensor per layer; ours is their stack. One tensor of theirs may hold several of ours, one
below the other.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Shaped

from jaxft.models.grids import Grid
from jaxft.models.patterns import Pattern, parsed, unchanged

_CHUNK = 1 << 20  # elements looked at together: what is made on the way stays small beside the tensor


class Tensors(Protocol):
    """An open checkpoint, as far as a family may ask it what its tensors say of the model."""

    def names(self) -> tuple[str, ...]:
        """The tensor names."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        ...

    def read(self, name: str) -> Shaped[np.ndarray, "*shape"]:
        """The whole tensor."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> Shaped[np.ndarray, "*shape"]:
        """Rows ``[start, stop)`` of its first axis."""
        ...


@dataclass(frozen=True)
class Rule:
    """One tensor of the reference's checkpoint, and the parameter of ours that it is, or those that it holds."""

    ours: str | tuple[str, ...]
    """Path in our tree, for instance ``layers/mlp/up/kernel``. Several: their tensor holds them as rows, in this order."""
    theirs: str
    """Tensor name in models with a head; ``{layer}`` stands for 0, 1, ..."""
    pattern: str | None = None
    """einops pattern of one tensor (of the part of it that is one of ours), theirs -> ours; None: as it is."""
    copies: tuple[str, ...] = ()
    """Names under which the reference stores the same tensor again; written on export, read where the first is missing."""
    preferred: tuple[str, ...] = ()
    """Names that the reference believes over ``theirs`` where a file has both; never written."""
    spares: tuple[str, ...] = ()
    """Names under which a file may hold the same tensor; read where ``theirs`` is missing, never written."""
    layers: tuple[int, int | None] = (0, None)
    """Layers that have the tensor, first and end; None: up to the last. Our stack holds these layers and no others."""
    apart: tuple[str, ...] = ()
    """Names under which a file may hold each of several parameters of ours by itself; read where ``theirs`` is missing, never written."""
    inner: int = 1
    """How many layers of ours have one number there, and are told apart by ``{inner}`` in its name."""
    turned: bool = False
    """Their tensor, a matrix, is the transpose of what the pattern says, and several of ours are its columns (`Conv1D`)."""
    grid: Grid | None = None
    """It is a table of positions in two dimensions, as large as this."""
    stored: Grid | None = None
    """How large the table in the file is, which is resampled where that is another size; None: as ``grid``."""

    @property
    def resampled(self) -> bool:
        """Whether what is read is not yet what is wanted."""
        return self.grid is not None and self.stored is not None and self.grid != self.stored

    @property
    def paths(self) -> tuple[str, ...]:
        """The parameters of ours."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor per layer."""
        return "{layer}" in self.theirs

    def names(self) -> tuple[str, ...]:
        """Names that the tensor may have in a file; the first one that is there is read."""
        return (*self.preferred, self.theirs, *self.copies, *self.spares)

    def of_layers(self, name: str, count: int) -> list[str]:
        """A name of the tensor in each of the ``count`` layers of our stack, or alone where there are no layers."""
        if not self.stacked:
            return [name]
        first, end = self.layers
        if end is not None and end - first != count:
            raise ValueError(f"{self.theirs}: the rule is of layers {first} to {end - 1}, our stack has {count}")
        return [self.of_layer(name, layer) for layer in range(first, first + count)]

    def of_layer(self, name: str, layer: int) -> str:
        """A name of the tensor in one layer."""
        return name.format(layer=layer // self.inner, inner=layer % self.inner)

    def as_stored(self, names: Container[str]) -> tuple[Rule, ...]:
        """This rule; or, of a file that holds its parameters apart, one for each of them.

        Args:
          names: of the file's tensors.
        """
        first = [self.of_layer(name, self.layers[0]) for name in (self.theirs, *self.apart)]
        if first[0] in names or not any(name in names for name in first[1:]):
            return (self,)
        parts = zip(self.paths, self.apart, strict=True)
        return tuple(dataclasses.replace(self, ours=ours, theirs=theirs, apart=()) for ours, theirs in parts)

    def one(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a parameter of ours in one layer, from that of the stack."""
        return shape[1:] if self.stacked else shape

    def arrangement(self, rank: int) -> Pattern:
        """How one tensor, or a part of it, is rearranged; ``rank`` is that of ours in one layer."""
        return unchanged(rank) if self.pattern is None else parsed(self.pattern)

    def in_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of their tensor in a file, from that of :meth:`parts`."""
        if self.resampled and self.stored is not None:
            return (shape[0], self.stored.places, *shape[2:])
        return shape[::-1] if self.turned else shape

    def parts(self, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
        """The shape of their tensor, and from where to where each of ours lies in its rows.

        Args:
          shapes: of ours in one layer.
        """
        theirs = [self.arrangement(len(shape)).their_shape(shape) for shape in shapes]
        if not theirs[0]:
            return (), []
        ends = list(itertools.accumulate(shape[0] for shape in theirs))
        return (ends[-1], *theirs[0][1:]), list(zip([0, *ends[:-1]], ends, strict=True))


@dataclass(frozen=True)
class Layout:
    """How a family's tensors are named in checkpoint files."""

    rules: tuple[Rule, ...]
    prefix: str
    """Prefix of the encoder inside models with a head; absent in files of the bare encoder."""
    aliases: tuple[tuple[str, str], ...] = ()
    """(ending found in old files, ending in the rules)."""
    leftovers: tuple[str, ...] = ()
    """Patterns of tensors that may be there unused."""
    fresh: tuple[str, ...] = ()
    """Patterns of our paths that may be missing and are then initialised."""
    respelt: tuple[tuple[str, str], ...] = ()
    """(regular expression that some files' names match, what the rules have there), applied in this order before all else."""

    def spelt(self, name: str) -> str:
        """A name in a file, as :attr:`respelt` has it."""
        for found, ours in self.respelt:
            name = re.sub(found, ours, name)
        return name


def same_numbers(weights: Tensors, first: str, second: str) -> bool:
    """Whether two tensors have one shape and equal numbers; reads no further than the first difference."""
    shape = weights.shape(first)
    if shape != weights.shape(second):
        return False
    if not shape:
        return bool(np.array_equal(weights.read(first), weights.read(second)))
    step = max(1, _CHUNK // math.prod(shape[1:]))
    spans = ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))
    return all(np.array_equal(weights.read_rows(first, *s), weights.read_rows(second, *s)) for s in spans)


def has_own(weights: Tensors, copy: str, original: str) -> bool:
    """Whether a checkpoint has a tensor whose name ends in ``copy`` that is not the one that ends in ``original``."""
    copies, originals = ([n for n in weights.names() if n.endswith(ending)] for ending in (copy, original))
    return len(copies) == len(originals) == 1 and not same_numbers(weights, copies[0], originals[0])
