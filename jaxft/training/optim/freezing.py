"""Which parameters decay and which do not train, from their paths and logical axes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

import jax
import numpy as np

from jaxft.errors import UserError, nearest
from jaxft.trees import Axes, Leaf, Params, Shapes, Tree, leaves_of, map_paths

T = TypeVar("T")

Frozen = bool | np.ndarray
"""Whether a parameter is frozen; for a stack of which only some layers are, a bool per layer, [L]."""

_LAYER_PATTERN = re.compile(r"(layers|encoder|decoder)/(\d+)(?:-(\d+))?/(.+)")


def decay_mask(params: Params | Shapes, axes: Axes) -> Tree[bool]:
    """True for each parameter that takes weight decay."""
    leaves = leaves_of(params, axes)
    return map_paths(lambda path, _: leaves[path].decays, params)


def frozen_mask(params: Params | Shapes, axes: Axes, patterns: Sequence[str]) -> Tree[Frozen]:
    """For each parameter True (frozen), False (trained), or, for a partly frozen stack, a numpy bool [L].

    A pattern is a glob over paths in which ``*`` also crosses ``/``. After the name of a stack (``layers/``, ``encoder/``), one number
    (``layers/2/*``) or a range with both ends included (``layers/0-3/*``) selects layers of it.

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


def without_frozen(tree: Tree[T], frozen: Tree[bool] | None) -> tuple[list[T], Callable[[list[T]], Tree[T]]]:
    """The leaves of ``tree`` that are not frozen, and a function that puts others in their places."""
    leaves, structure = jax.tree.flatten(tree)
    stays = [False] * len(leaves) if frozen is None else jax.tree.leaves(frozen)

    def join(trained: list[T]) -> Tree[T]:
        given = iter(trained)
        return structure.unflatten([leaf if stay else next(given) for leaf, stay in zip(leaves, stays, strict=True)])

    return [leaf for leaf, stay in zip(leaves, stays, strict=True) if not stay], join


def _match(pattern: str, leaves: dict[str, Leaf]) -> dict[str, Frozen]:
    """The parameters that one pattern freezes, wholly or in part."""
    selects = _LAYER_PATTERN.fullmatch(pattern)
    glob = f"{selects[1]}/{selects[4]}" if selects else pattern
    found: dict[str, Frozen] = {
        path: _selected(pattern, int(selects[2]), int(selects[3] or selects[2]), leaf) if selects else True
        for path, leaf in leaves.items()
        if fnmatchcase(path, glob) and not (selects and leaf.layers is None)
    }
    if not found:
        raise UserError(f"optim.freeze: {pattern!r} matches no parameter: {_hint(pattern, leaves)}")
    return found


def _selected(pattern: str, first: int, last: int, leaf: Leaf) -> np.ndarray:
    end = leaf.first_layer + (leaf.layers or 0)
    if not first <= last < end:
        raise UserError(f"optim.freeze: {pattern!r}: layers are numbered from 0 to {end - 1}, first before last")
    index = np.arange(leaf.first_layer, end)
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
