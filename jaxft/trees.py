"""Parameter trees: paths of their leaves, and what shape and logical axes say of each.

A path is the keys of the tree joined by ``/``: ``layers/attention/query/kernel``. Leaves whose first logical axis is ``layers`` hold
all layers of the network in their first dimension; ``layers:1`` those from layer 1 on, where layer 0 has no such parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast, overload

import jax
from jaxtyping import PyTree
from typing_extensions import TypeAliasType

T = TypeVar("T")

Tree = TypeAliasType("Tree", "Mapping[str, T | Tree[T]]", type_params=(T,))
"""A plain nested dict: parameters, or something of each of them."""
Params = Tree[jax.Array]
"""The parameters of a model, or numbers of their shapes: gradients, averages."""
Shapes = Tree[jax.ShapeDtypeStruct]
"""Their shapes and types."""
Shardings = Tree[jax.sharding.NamedSharding]
"""How they lie on a mesh."""
Axes = Tree[tuple[str | None, ...]]
"""The logical names of their axes."""


@dataclass(frozen=True)
class Leaf:
    """Shape and logical axes of one parameter."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"{self.path}: {len(self.axes)} logical axes {self.axes} for shape {self.shape}")
        if any(of_layers(name) for name in self.axes[1:]):
            raise ValueError(f"{self.path}: the axis 'layers' must come first, not {self.axes}")

    @property
    def layers(self) -> int | None:
        """Number of stacked layers; None for a parameter outside the stack."""
        return self.shape[0] if self.axes and of_layers(self.axes[0]) else None

    @property
    def first_layer(self) -> int:
        """The layer that the first row of a stack belongs to; layers before it have no such parameter."""
        return int((self.axes[0] or "").partition(":")[2] or 0) if self.layers is not None else 0

    @property
    def decays(self) -> bool:
        """Two or more named axes besides ``layers``: kernels and embeddings, but no bias and no norm scale.

        Rank does not tell: a stacked attention bias is [L, N, H], with names layers, heads, None.
        """
        return sum(name is not None and not of_layers(name) for name in self.axes) >= 2

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
        dims = [i for i, name in enumerate(self.axes) if not of_layers(name) and name != "experts"]
        if len(dims) < 2:
            return None
        if self.axes[dims[0]] == "embed" or len(dims) == 2:
            return (dims[0],), tuple(dims[1:])
        if self.axes[dims[-1]] == "embed":
            return tuple(dims[:-1]), (dims[-1],)
        return None


def of_layers(name: str | None) -> bool:
    """Whether a logical axis is that of stacked layers."""
    return name is not None and name.partition(":")[0] == "layers"


def _path_of(keys: tuple[object, ...]) -> str:
    return "/".join(str(getattr(key, "key", key)) for key in keys)


def map_paths(function: Callable[..., T], tree: PyTree, *rest: PyTree) -> Tree[T]:
    """``function(path, leaf, *leaves of rest)`` for each leaf."""
    return jax.tree_util.tree_map_with_path(lambda keys, *leaves: function(_path_of(keys), *leaves), tree, *rest)


@overload
def paths_of(tree: Tree[T]) -> dict[str, T]: ...
@overload
def paths_of(tree: PyTree[jax.Array]) -> dict[str, jax.Array]: ...
def paths_of(tree: PyTree) -> dict[str, Any]:
    """Leaves by path: ``{"layers/attention/query/kernel": ..., ...}``."""
    return {_path_of(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def leaves_of(params: Params | Shapes, axes: Axes) -> dict[str, Leaf]:
    """What is known of each parameter, by path, from arrays or shapes and the tree of logical axes."""
    described = map_paths(lambda path, leaf, names: Leaf(path, tuple(leaf.shape), tuple(names)), params, axes)
    return paths_of(described)


def branch(tree: Tree[T], name: str) -> Tree[T]:
    """What a key holds that is not a leaf's."""
    return cast(Tree[T], tree[name])


def nested(flat: Mapping[str, T]) -> Tree[T]:
    """The inverse of :func:`paths_of`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
