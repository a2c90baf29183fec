"""What the logical axes and the path of a parameter say about how it is trained.

A path is the keys of the parameter tree joined by ``/``: ``layers/attention/query/kernel``. Leaves whose first logical
axis is ``layers`` hold all layers of the network in their first dimension.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from jaxft.errors import UserError, nearest

PyTree = Any
Frozen = bool | np.ndarray
"""Whether a parameter is frozen; for a stack of which only some layers are, a bool per layer, [L]."""

_LAYER_PATTERN = re.compile(r"layers/(\d+)(?:-(\d+))?/(.+)")


@dataclass(frozen=True)
class Leaf:
    """Shape and logical axes of one parameter."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"{self.path}: {len(self.axes)} logical axes {self.axes} for shape {self.shape}")
        if "layers" in self.axes[1:]:
            raise ValueError(f"{self.path}: the axis 'layers' must come first, not {self.axes}")

    @property
    def layers(self) -> int | None:
        """Number of stacked layers; None for a parameter outside the stack."""
        return self.shape[0] if self.axes[:1] == ("layers",) else None

    @property
    def decays(self) -> bool:
        """Two or more named axes besides ``layers``: kernels and embeddings, but no bias and no norm scale.

        Rank does not tell: a stacked attention bias is [L, N, H], with names layers, heads, None.
        """
        return sum(name not in (None, "layers") for name in self.axes) >= 2

    @property
    def matrix(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Dimensions of input and of output, for a parameter that is a matrix (per layer); None for any other.

        Dimensions of input come before those of output. One of the two sides is the model width, the axis ``embed``:
        if it comes first it is the whole input and the rest is output (query: D x N H, first MLP kernel: D x F); if it
        comes last it is the whole output (attention output: N H x D, embedding: V x D). Without it, only two dimensions
        in all can be told apart. Stacked layers, and experts if there are any, count as separate matrices.
        """
        if not self.decays:
            return None
        dims = [i for i, name in enumerate(self.axes) if name not in ("layers", "experts")]
        if len(dims) < 2:
            return None
        if self.axes[dims[0]] == "embed" or len(dims) == 2:
            return (dims[0],), tuple(dims[1:])
        if self.axes[dims[-1]] == "embed":
            return tuple(dims[:-1]), (dims[-1],)
        return None


def _path_of(keys: tuple[Any, ...]) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in keys)


def map_paths(function: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``function(path, leaf, *leaves of rest)`` for each leaf."""
    return jax.tree_util.tree_map_with_path(lambda keys, *leaves: function(_path_of(keys), *leaves), tree, *rest)


def parameter_paths(tree: PyTree) -> dict[str, Any]:
    """Leaves by path: ``{"layers/attention/query/kernel": ..., ...}``."""
    return {_path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def leaves_of(params: PyTree, axes: PyTree) -> dict[str, Leaf]:
    """What is known of each parameter, by path, from arrays or shapes and the tree of logical axes."""
    described = map_paths(lambda path, leaf, names: Leaf(path, tuple(leaf.shape), tuple(names)), params, axes)
    return parameter_paths(described)


def decay_mask(params: PyTree, axes: PyTree) -> PyTree:
    """True for each parameter that takes weight decay."""
    leaves = leaves_of(params, axes)
    return map_paths(lambda path, _: leaves[path].decays, params)


def frozen_mask(params: PyTree, axes: PyTree, patterns: Sequence[str]) -> PyTree:
    """For each parameter True (frozen), False (trained), or, for a partly frozen stack, a numpy bool [L].

    A pattern is a glob over paths in which ``*`` also crosses ``/``. After ``layers/``, one number (``layers/2/*``) or
    a range with both ends included (``layers/0-3/*``) selects layers of the stack.

    Raises:
      UserError: a pattern that matches nothing, a layer that does not exist, or nothing left to train.
    """
    leaves = leaves_of(params, axes)
    frozen: dict[str, Frozen] = dict.fromkeys(leaves, False)
    for pattern in patterns:
        matched = _match(pattern, leaves)
        frozen |= {path: frozen[path] | found for path, found in matched.items()}
    # Layers frozen one by one may add up to the whole stack.
    frozen = {path: True if np.all(found) else found for path, found in frozen.items()}
    if all(found is True for found in frozen.values()):
        raise UserError(f"optim.freeze={list(patterns)}: freezes every parameter; leave something to train")
    return map_paths(lambda path, _: frozen[path], params)


def _match(pattern: str, leaves: dict[str, Leaf]) -> dict[str, Frozen]:
    """The parameters that one pattern freezes, wholly or in part."""
    selects = _LAYER_PATTERN.fullmatch(pattern)
    glob = f"layers/{selects[3]}" if selects else pattern
    found: dict[str, Frozen] = {
        path: _selected(pattern, int(selects[1]), int(selects[2] or selects[1]), leaf.layers or 0) if selects else True
        for path, leaf in leaves.items()
        if fnmatchcase(path, glob) and not (selects and leaf.layers is None)
    }
    if not found:
        raise UserError(f"optim.freeze: {pattern!r} matches no parameter: {_hint(pattern, leaves)}")
    return found


def _selected(pattern: str, first: int, last: int, layers: int) -> np.ndarray:
    if not first <= last < layers:
        raise UserError(f"optim.freeze: {pattern!r}: layers are numbered from 0 to {layers - 1}, first before last")
    index = np.arange(layers)
    return (first <= index) & (index <= last)


def _hint(pattern: str, leaves: dict[str, Leaf]) -> str:
    whole = f"{pattern.rstrip('/')}/*"
    if any(fnmatchcase(path, whole) for path in leaves) or _LAYER_PATTERN.fullmatch(whole):
        return f"did you mean {whole!r}?"
    head, _, tail = pattern.partition("/")
    if any(path.startswith(f"{head}/") for path in leaves) and tail:
        under = {path for path in leaves if path.startswith(f"{head}/")}
        return nearest(pattern, under)
    return nearest(head, {path.partition("/")[0] for path in leaves})
