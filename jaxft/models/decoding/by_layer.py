"""Parameters of each layer by itself, for loops that read all of them for every token.

Models keep layers stacked. XLA's CPU compiler takes a layer out of the stack by copying it, each time: for one token that is twice the
traffic of the layer's products. Outside of the loop it is done once; what is stacked and taken apart again in the loop costs nothing.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jaxft.models.contract import Model

Array = jax.Array


def apart(model: Model, params: PyTree[Array]) -> PyTree[Array]:
    """Parameters with a tuple of the layers' arrays in the place of a stacked one, where that helps: on CPUs, if layers are not scanned."""
    on_cpu = all(
        isinstance(leaf, jax.Array) and all(device.platform == "cpu" for device in leaf.devices())
        for leaf in jax.tree.leaves(params)
    )
    if not on_cpu or model.compute.layers != "unrolled":
        return params
    return _apart(tuple((stack.path, stack.own) for stack in model.facts.stacks), params)


def together(params: PyTree[Array]) -> PyTree[Array]:
    """The parameters as the model has them; in a program."""
    return jax.tree.map(
        lambda leaf: jnp.stack(leaf) if isinstance(leaf, tuple) else leaf,
        params,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


@functools.partial(jax.jit, static_argnums=0)
def _apart(stacks: tuple[tuple[str, int], ...], params: PyTree[Array]) -> PyTree[Array]:
    made = dict(params)
    for path, layers in stacks:
        if path in made:
            made[path] = jax.tree.map(
                lambda leaf, layers=layers: tuple(leaf[i] for i in range(layers)) if leaf.shape[0] == layers else leaf,
                made[path],
            )
    return made
