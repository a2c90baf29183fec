"""What every model checks of a call before it computes: its arguments, its dropout key, and the mesh."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType
from jaxtyping import PRNGKeyArray, Shaped

from jaxft.errors import UserError, nearest

Array = jax.Array

_THEIRS = {
    "input_ids": "tokens",
    "pixel_values": "pixels",
    "attention_mask": "mask",
    "token_type_ids": "types",
    "position_ids": "positions",
    "output_hidden_states": "hidden_states",
    "output_attentions": "attentions",
    "dropout_rng": "key",
}
"""Arguments of transformers' Flax models, and what they are called here."""


def checked_call(
    module: nn.Module,
    given: Shaped[Array | np.ndarray, "*shape"],
    key: PRNGKeyArray | None,
    unknown: Mapping[str, object],
    names: Sequence[str],
) -> PRNGKeyArray | None:
    """The dropout key of a model's call: ``key``, or what Linen was given as ``rngs={"dropout": ...}``; None: no dropout.

    Args:
      given: what the model reads: tokens, say.
      unknown: keyword arguments that the model does not have. names: those that it has.

    Raises:
      UserError: an argument that there is not, two keys, or a mesh of explicit axes.
    """
    for name in unknown:
        raise UserError(f"{type(module).__module__}.Model takes no {name}=: {_instead(name, names)}")
    _refuse_explicit(given)
    if not module.has_rng("dropout"):
        return key
    if key is not None:
        raise UserError('two dropout keys: give key= or rngs={"dropout": ...}, not both')
    return module.make_rng("dropout")


def _instead(name: str, names: Sequence[str]) -> str:
    if name in ("deterministic", "train", "training"):
        return "dropout is on where there is a key=, off without one"
    if name in _THEIRS:
        return f"it is called {_THEIRS[name]}= here" if _THEIRS[name] in names else "this model has none"
    return nearest(name, names)


def _refuse_explicit(given: Array | np.ndarray) -> None:
    """Where axes are explicit, look-ups, products and attention would each have to be told where their results lie."""
    meshes = (jax.typeof(given).sharding.mesh, jax.sharding.get_abstract_mesh())
    for mesh in meshes:
        if not mesh.empty and mesh.size > 1 and AxisType.Explicit in mesh.axis_types:
            axes = ", ".join(mesh.axis_names)
            raise UserError(
                f"the mesh has explicit axes ({axes}), and a model lets the compiler place its arrays: make the mesh with "
                "axis_types=(jax.sharding.AxisType.Auto,) for each axis, or call the model inside jax.sharding.auto_axes"
            )
