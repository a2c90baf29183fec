"""Layer-stacked parameters: declared once for all layers, computed unrolled or scanned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamShapeError
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, PRNGKeyArray, PyTree

from jaxft.layers.compute import Compute
from jaxft.layers.functions import subkey
from jaxft.layers.matmul import cpu_after
from jaxft.layers.modules import Labelled, is_ours, labelled_stack, stored, unlabel
from jaxft.layers.promotion import usual_promotion
from jaxft.parallel.sharding import no_mesh
from jaxft.trees import Params, Tree, paths_of

Array = jax.Array


_Run = Callable[[Params, Array, Array | None, PyTree[Array]], tuple[Array, PyTree[Array]]]
"""One layer: ``(its parameters, x, dropout key, its state) -> (x, what it says of its state)``."""

_ALL: Mapping[str, int] = MappingProxyType({})
"""Every layer has all parameters."""
_INPUT = "layer_input"
_POLICIES: dict[str, Callable[..., bool] | None] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def unstack(length: int, x: Array) -> tuple[Array, ...]:
    """The ``length`` slices of ``x`` along its first axis."""
    return tuple(lax.index_in_dim(x, i, keepdims=False) for i in range(length))


def _unstack_fwd(length: int, x: Array) -> tuple[tuple[Array, ...], None]:
    return unstack(length, x), None


def _unstack_bwd(length: int, kept: None, g: tuple[Array, ...]) -> tuple[Array]:
    # One concatenation. Autodiff of slicing would add up L zero-padded copies of the whole stack.
    return (jnp.stack(g),)


unstack.defvjp(usual_promotion(_unstack_fwd), usual_promotion(_unstack_bwd))


def stacked_params(
    parent: nn.Module, name: str, layer: nn.Module, length: int, *example: object, begins: Mapping[str, int] = _ALL
) -> PyTree[Array]:
    """Declares, on ``parent``, the parameters of ``length`` copies of ``layer``: each leaf gets a leading "layers" axis.

    Inside a ``compact`` method only. ``layer``: has a field ``compute``. ``example``: arguments with which it can be initialised.

    Args:
      begins: child of the layer -> first layer that has its parameters, where the first ones have none; their stacks hold the
        others alone, and their axis is called "layers:1", with that layer's number.
    """

    def init(key: Array) -> Tree[Labelled] | Params:
        # The attention backend asked for may refuse the example.
        quick = layer.clone(compute=dataclasses.replace(layer.compute, attention="xla"))
        with no_mesh(), labelled_stack():  # the example is too small to be split
            trees = jax.vmap(lambda k: quick.init(k, *example)["params"])(jax.random.split(key, length))
        made = {}
        for child, tree in trees.items():
            first = begins.get(child, 0)
            axis = f"layers:{first}" if first else "layers"
            if first < length:
                tree = jax.tree.map(lambda leaf, first=first: leaf[first:], tree) if first else tree
                made[child] = nn.meta.add_axis(tree, 0, {nn.PARTITION_NAME: axis})
        return made if is_ours(parent) else unlabel(made)[0]

    if not parent.has_variable("params", name):
        return parent.param(name, init)
    params = stored(parent, name)  # the layers compare the shapes of their own
    for child, tree in params.items():
        own = length - begins.get(child, 0)
        for path, leaf in paths_of(tree).items():
            if leaf.shape[:1] != (own,):
                where = "/".join((*parent.path, name, child))
                raise ScopeParamShapeError(path, where, leaf.shape, (own, *leaf.shape[1:]))
    return params


def apply_stack(
    layer: nn.Module,
    params: PyTree[Array],
    length: int,
    x: Float[Array, "B S D"],
    key: PRNGKeyArray | None,
    *args: object,
    keep: bool = False,
    kinds: Sequence[Hashable] | None = None,
    begins: Mapping[str, int] = _ALL,
    state: PyTree[Array] | None = None,
    order: Sequence[int] | None = None,
) -> tuple[Float[Array, "B S D"], Float[Array, "states B S D"] | None, PyTree[Array] | None]:
    """Runs ``length`` stacked layers, one after the other, each ``layer.apply(params_i, x, key_i, *args) -> x``.

    Unrolled or scanned, with or without remat, as ``layer.compute`` says; the values are the same.

    Args:
      kinds: what is static and differs by layer: ``layer.apply(params_i, x, key_i, *args, kinds[i])``. Scanned, they repeat with
        some period, which is the body of the scan; layers before and behind are apart.
      begins: as of :func:`stacked_params`.
      state: arrays [L, ...] of which each layer gets its own (a cache, for instance): ``layer.apply(..., state=state_i)``, which
        then returns (x, what it has to say of its state).
      order: which layer of the stack runs at each of the ``length`` places, where some run at several; None: each at its own. Keys,
        kinds and state are those of places. The gradient of a layer is the sum over its places; scanned, a run of places that repeats
        is one scan, which has no copies of their parameters.

    Returns: (x after the last layer, with ``keep`` what went into the first and came out of each: [L + 1, ...]; else None, what
      layers said of their state, stacked [L, ...]; None without ``state``).
    """
    compute: Compute = layer.compute

    def runner(*kind: Hashable) -> _Run:
        def run(
            layer_params: Params, x: Array, layer_key: Array | None, own: PyTree[Array]
        ) -> tuple[Array, PyTree[Array]]:
            given = {} if own is None else {"state": own}
            out: Any = layer.apply(
                {"params": layer_params}, checkpoint_name(x, _INPUT), layer_key, *args, *kind, **given
            )
            return (out, None) if own is None else out

        return run if compute.remat == "none" else jax.checkpoint(run, policy=_POLICIES[compute.remat])

    # One function per kind: traced once, however many layers are of it.
    known = {kind: runner(kind) for kind in dict.fromkeys(kinds)} if kinds is not None else {None: runner()}
    runs = [known[kind] for kind in kinds] if kinds is not None else [known[None]] * length
    if len(runs) != length:
        raise ValueError(f"{len(runs)} kinds of {length} layers")
    if order is not None and tuple(order) != tuple(range(length)):
        if begins or len(order) != length:
            raise ValueError(f"an order of {len(order)} of {length} layers, begins={dict(begins)}")
        stored = _by_layer(params, _ALL, len(jax.tree.leaves(params)[0]))
        signs = tuple(zip(kinds or (None,) * length, order, strict=True))
        pieces = _repeats(signs) if compute.layers == "scanned" else [_Piece(0, length, 1)]
        return _shared(runs, [stored[number] for number in order], pieces, x, key, keep, state)
    if compute.layers == "scanned":
        lacks = [tuple(sorted(child for child, first in begins.items() if layer < first)) for layer in range(length)]
        signs = tuple(zip(kinds or (None,) * length, lacks, strict=True))
        return _scanned(runs, _period_of(signs), params, begins, x, key, keep, state)
    x, seen, said = _unrolled(runs, _by_layer(params, begins, length), range(length), x, key, state)
    return x, jnp.stack(seen) if keep else None, said


def _unrolled(
    runs: Sequence[_Run],
    layers: Sequence[Params],
    numbers: Iterable[int | Array],
    x: Array,
    key: Array | None,
    state: PyTree[Array],
) -> tuple[Array, list[Array], PyTree[Array]]:
    """(x after the last of some layers, what went into the first and came out of each, what each said of its state, stacked).

    Args:
      layers: parameters of each.
      numbers: of the layers in the whole stack, for their dropout keys.
      state: of these layers, [L, ...].
    """
    seen, said = [x], []
    for i, (run, layer_params, number) in enumerate(zip(runs, layers, numbers, strict=True)):
        leaves, tree = jax.tree.flatten(layer_params)
        leaves, x = _layer_by_layer(tuple(leaves), x)
        own = jax.tree.map(lambda leaf, i=i: leaf[i], state)
        with jax.named_scope(f"layer_{number}" if isinstance(number, int) else f"part_{i}"):
            x, one = run(tree.unflatten(leaves), x, subkey(key, number), own)
        seen.append(x)
        said.append(one)
    return x, seen, jax.tree.map(lambda *each: jnp.stack(each), *said) if said else state


def _scanned(
    runs: Sequence[_Run],
    period: _Period,
    params: Params,
    begins: Mapping[str, int],
    x: Array,
    key: Array | None,
    keep: bool,
    state: PyTree[Array],
) -> tuple[Array, Array | None, PyTree[Array]]:
    """Some layers, a scan over periods of layers, some layers."""
    before, size, times = period
    end, length = before + size * times, len(runs)
    if not times:
        x, seen, said = _unrolled(runs, _by_layer(params, begins, length), range(length), x, key, state)
        return x, jnp.stack(seen) if keep else None, said

    def body(x: Array, item: tuple[Params, Array, PyTree[Array]]) -> tuple[Array, tuple[Array | None, PyTree[Array]]]:
        stacked, numbers, own = item
        if size == 1:
            x, said = runs[before](stacked, x, subkey(key, numbers), own)
            return x, (x if keep else None, said)
        layers = _by_layer(stacked, _ALL, size)
        x, seen, said = _unrolled(runs[before:end][:size], layers, numbers, x, key, own)
        return x, (jnp.stack(seen[1:]) if keep else None, said)

    def part(first: int, last: int) -> PyTree[Array]:
        return jax.tree.map(lambda leaf: leaf[first:last], state)

    pieces = _cut(params, begins, (*range(before), before, *range(end, length + 1)))
    firsts, lasts = (
        [jax.tree.map(lambda leaf: leaf[0], one) for one in some] for some in (pieces[:before], pieces[before + 1 :])
    )
    x, seen, said = _unrolled(runs[:before], firsts, range(before), x, key, part(0, before))
    of_scan = pieces[before], jnp.arange(before, end), part(before, end)
    if size > 1:
        of_scan = jax.tree.map(lambda leaf: leaf.reshape(times, size, *leaf.shape[1:]), of_scan)
    with jax.named_scope(f"layers_{before}_{size}"):  # turn i is layer before + size * i
        x, (each, of_each) = lax.scan(body, x, of_scan)
    x, more, of_more = _unrolled(runs[end:], lasts, range(end, length), x, key, part(end, length))
    if size > 1:
        of_each = jax.tree.map(lambda leaf: leaf.reshape(size * times, *leaf.shape[2:]), of_each)
    if state is not None and length > size * times:
        said = [one for one, count in ((said, before), (of_each, 1), (of_more, length - end)) if count]
        of_each = jax.tree.map(lambda *parts: jnp.concatenate(parts), *said)
    if each is None:
        return x, None, of_each
    each = each.reshape(size * times, *x.shape)
    kept = jnp.concatenate([*(one[None] for one in seen), each, *(one[None] for one in more[1:])])
    return x, kept, of_each


class _Piece(NamedTuple):
    """Places that repeat."""

    start: int
    size: int
    """Places of what repeats."""
    times: int

    @property
    def end(self) -> int:
        return self.start + self.size * self.times


def _repeats(signs: tuple[Hashable, ...], start: int = 0) -> list[_Piece]:
    """The pieces that all places are run in, with as few layers compiled as possible.

    Args:
      signs: of each place; equal where places differ in their numbers alone.
      start: number of the first.
    """
    before, size, times = _period_of(signs) if signs else (0, 0, 0)
    if times < 2:
        return [_Piece(start, len(signs), 1)] if signs else []
    piece = _Piece(start + before, size, times)
    return [*_repeats(signs[:before], start), piece, *_repeats(signs[piece.end - start :], piece.end)]


def _shared(
    runs: Sequence[Callable[..., Any]],
    layers: Sequence[Any],
    pieces: Sequence[_Piece],
    x: Array,
    key: Array | None,
    keep: bool,
    state: Any,
) -> tuple[Array, Array | None, Any]:
    """Layers of which some run at several places: piece by piece, parameters stand outside of the scans.

    Args:
      layers: parameters at each place.
    """

    def body(piece: _Piece, x: Array, item: tuple[Any, Any]) -> tuple[Array, tuple[Array | None, Any]]:
        numbers, own = item
        inside = slice(piece.start, piece.start + piece.size)
        x, seen, said = _unrolled(runs[inside], layers[inside], numbers, x, key, own)
        return x, (jnp.stack(seen[1:]) if keep else None, said)

    kept: list[Any] = [x[None]]
    told: list[Any] = []
    for piece in pieces:
        own = jax.tree.map(lambda leaf, piece=piece: leaf[piece.start : piece.end], state)
        one = functools.partial(body, piece)
        if piece.times == 1:
            x, (each, said) = one(x, (range(piece.start, piece.end), own))
        else:
            folded = (piece.times, piece.size)
            items = (jnp.arange(piece.start, piece.end), own)
            with jax.named_scope(f"layers_{piece.start}_{piece.size}"):
                x, made = lax.scan(
                    one, x, jax.tree.map(lambda leaf, folded=folded: leaf.reshape(*folded, *leaf.shape[1:]), items)
                )
            each, said = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), made)
        kept.append(each)
        told.append(said)
    said = None if state is None else jax.tree.map(lambda *parts: jnp.concatenate(parts), *told)
    return x, jnp.concatenate(kept) if keep else None, said


class _Period(NamedTuple):
    """How a stack is scanned."""

    before: int
    """Layers before the first period."""
    size: int
    """Layers of a period."""
    times: int
    """Periods; 0: there is nothing to scan."""


@functools.lru_cache
def _period_of(signs: tuple[Hashable, ...]) -> _Period:
    """The period with which the fewest layers are compiled.

    Args:
      signs: of each layer; equal where layers differ in their numbers alone.
    """
    length = len(signs)
    best, fewest = _Period(length, 1, 0), length + (length == 1)
    for size in range(1, length + 1):
        for before in range(length - size + 1):
            times = 1
            while signs[before + times * size : before + (times + 1) * size] == signs[before : before + size]:
                times += 1
            if length - (times - 1) * size < fewest:
                best, fewest = _Period(before, size, times), length - (times - 1) * size
    return best


def _by_layer(params: Params, begins: Mapping[str, int], length: int) -> list[dict[str, Params]]:
    """The parameters of each layer."""
    made: list[dict[str, Params]] = [{} for _ in range(length)]
    for child, stacked in sorted(params.items()):
        first = begins.get(child, 0)
        leaves, tree = jax.tree.flatten(stacked)
        for i, layer_leaves in enumerate(zip(*(unstack(length - first, leaf) for leaf in leaves), strict=True)):
            made[first + i][child] = tree.unflatten(layer_leaves)
    return made


def _cut(params: Params, begins: Mapping[str, int], cuts: Sequence[int]) -> list[dict[str, Params]]:
    """The parameters of layers from each cut to the next, still stacked. Each ``begins`` is at a cut, or behind the last."""
    made: list[dict[str, Params]] = [{} for _ in cuts[1:]]
    for child, stacked in sorted(params.items()):
        pieces = [i for i, cut in enumerate(cuts[:-1]) if cut >= begins.get(child, 0)]
        sizes = tuple(cuts[i + 1] - cuts[i] for i in pieces)
        leaves, tree = jax.tree.flatten(stacked)
        for i, part in zip(pieces, zip(*(_split(sizes, leaf) for leaf in leaves), strict=True), strict=True):
            made[i][child] = tree.unflatten(part)
    return made


def _split(sizes: tuple[int, ...], x: Array) -> tuple[Array, ...]:
    return (x,) if len(sizes) == 1 else _split_in(sizes, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _split_in(sizes: tuple[int, ...], x: Array) -> tuple[Array, ...]:
    """Parts of ``x`` along its first axis; the gradient is one concatenation, as that of :func:`unstack`."""
    return tuple(jnp.split(x, np.cumsum(sizes)[:-1]))


_split_in.defvjp(
    usual_promotion(lambda sizes, x: (_split_in(sizes, x), None)),
    usual_promotion(lambda sizes, kept, g: (jnp.concatenate(g),)),
)


@jax.custom_vjp
def _layer_by_layer(params: tuple[Array, ...], x: Array) -> tuple[tuple[Array, ...], Array]:
    """Its arguments; in the backward pass, a layer's parameter gradients come before the gradient of its input.

    Left alone, XLA's CPU backend puts the former off to the very end, and keeps all they are made of.
    """
    return params, x


def _layer_by_layer_bwd(kept: None, g: tuple[tuple[Array, ...], Array]) -> tuple[tuple[Array, ...], Array]:
    return g[0], cpu_after(g[1], *g[0])


_layer_by_layer.defvjp(lambda params, x: ((params, x), None), usual_promotion(_layer_by_layer_bwd))
