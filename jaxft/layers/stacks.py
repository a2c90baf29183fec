"""Layer-stacked parameters: declared once for all layers, computed unrolled or scanned."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, PRNGKeyArray, PyTree

from jaxft.layers.compute import Compute
from jaxft.layers.functions import subkey
from jaxft.layers.matmul import cpu_after
from jaxft.layers.modules import is_ours, labelled_stack, unlabel
from jaxft.layers.promotion import usual_promotion
from jaxft.parallel.sharding import no_mesh

Array = jax.Array


_INPUT = "layer_input"
_POLICIES: dict[str, Any] = {
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


def stacked_params(parent: nn.Module, name: str, layer: nn.Module, length: int, *example: object) -> PyTree[Array]:
    """Declares, on ``parent``, the parameters of ``length`` copies of ``layer``: each leaf gets a leading "layers" axis.

    Inside a ``compact`` method only. ``layer``: has a field ``compute``. ``example``: arguments with which it can be initialised.
    """

    def init(key: Array) -> Any:
        # The attention backend asked for may refuse the example.
        quick = layer.clone(compute=dataclasses.replace(layer.compute, attention="xla"))
        with no_mesh(), labelled_stack():  # the example is too small to be split
            trees = jax.vmap(lambda k: quick.init(k, *example)["params"])(jax.random.split(key, length))
        trees = nn.meta.add_axis(trees, 0, {nn.PARTITION_NAME: "layers"})
        return trees if is_ours(parent) else unlabel(trees)[0]

    return parent.param(name, init)


def apply_stack(
    layer: nn.Module,
    params: PyTree[Array],
    length: int,
    x: Float[Array, "B S D"],
    key: PRNGKeyArray | None,
    *args: object,
    keep: bool = False,
) -> tuple[Float[Array, "B S D"], Float[Array, "states B S D"] | None]:
    """Runs ``length`` stacked layers, each ``layer.apply(params_i, x, key_i, *args) -> x``.

    Unrolled or scanned, with or without remat, as ``layer.compute`` says; the values are the same.

    Returns: (x after the last layer, with ``keep`` what went into the first and came out of each: [L + 1, ...]; else None).
    """
    compute: Compute = layer.compute

    def run(layer_params: Any, x: Array, layer_key: Array | None) -> Any:
        return layer.apply({"params": layer_params}, checkpoint_name(x, _INPUT), layer_key, *args)

    if compute.remat != "none":
        run = jax.checkpoint(run, policy=_POLICIES[compute.remat])
    if compute.layers == "scanned":

        def body(x: Array, item: tuple[Any, Array]) -> tuple[Array, Array | None]:
            layer_params, index = item
            x = run(layer_params, x, subkey(key, index))
            return x, x if keep else None

        last, each = lax.scan(body, x, (params, jnp.arange(length)))
        return last, None if each is None else jnp.concatenate([x[None], each])
    states = [x]
    leaves, tree = jax.tree.flatten(params)
    for i, layer_leaves in enumerate(zip(*(unstack(length, leaf) for leaf in leaves), strict=True)):
        layer_leaves, x = _layer_by_layer(layer_leaves, x)
        x = run(tree.unflatten(layer_leaves), x, subkey(key, i))
        states.append(x)
    return x, jnp.stack(states) if keep else None


@jax.custom_vjp
def _layer_by_layer(params: tuple[Array, ...], x: Array) -> tuple[tuple[Array, ...], Array]:
    """Its arguments; in the backward pass, a layer's parameter gradients come before the gradient of its input.

    Left alone, XLA's CPU backend puts the former off to the very end, and keeps all they are made of.
    """
    return params, x


def _layer_by_layer_bwd(kept: None, g: tuple[tuple[Array, ...], Array]) -> tuple[tuple[Array, ...], Array]:
    return g[0], cpu_after(g[1], *g[0])


_layer_by_layer.defvjp(lambda params, x: ((params, x), None), usual_promotion(_layer_by_layer_bwd))
