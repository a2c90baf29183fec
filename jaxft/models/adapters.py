"""Low-rank adapters (Hu et al. 2021): weights stay as they are, each gains a trained product of two thin matrices.

A kernel W of a layer becomes W + alpha / rank * A B. The sum is made in each step, before the model runs: any family can be
adapted, none knows of it, and gradients of W itself go no further than A and B. The tree of a run is ``{"base": the model's
own, "lora": A and B by the same paths}``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from string import ascii_lowercase
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jaxft.config import LoraConfig
from jaxft.errors import UserError
from jaxft.layers import Compute, Labelled, labelled, unlabel
from jaxft.models.contract import Facts, Model, Output
from jaxft.models.example import smallest_batch
from jaxft.models.initial import initialisable, shapes_and_axes
from jaxft.parallel.sharding import jitted
from jaxft.trees import Leaf, Params, Shardings, Tree, branch, leaves_of, map_paths, nested, paths_of

Array = jax.Array


@dataclass(frozen=True)
class Adapted:
    """A model with adapters; stands where the model stands."""

    base: Model
    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Paths of the adapted kernels."""

    @property
    def config(self) -> Any:
        """The model's Config."""
        return self.base.config

    @property
    def head(self) -> str | None:
        """The model's head."""
        return self.base.head

    @property
    def compute(self) -> Compute:
        """How the model is computed."""
        return self.base.compute

    @property
    def facts(self) -> Facts:
        """The model's facts."""
        return self.base.facts

    def clone(self, **fields: Any) -> Adapted:
        """The same with another ``config`` of the model, or another ``compute``."""
        return dataclasses.replace(self, base=self.base.clone(**fields))

    def apply(self, variables: Mapping[str, Params], *args: object, **kwargs: object) -> Output:
        """The model's output with merged weights."""
        return self.base.apply({"params": merged(variables["params"], self.alpha)}, *args, **kwargs)

    def init(self, key: Array, *args: object, **kwargs: object) -> dict[str, Tree[Labelled]]:
        """Labelled parameters: the model's, and adapters that change nothing yet."""
        base = self.base.init(key, *args, **kwargs)["params"]
        shapes, axes = unlabel(base)
        leaves = leaves_of(shapes, axes)
        keys = jax.random.split(jax.random.fold_in(key, len(self.targets)), len(self.targets))
        dtype = self.compute.param_dtype
        flat = {path: _init(keys[i], leaves[path], self.rank, dtype) for i, path in enumerate(self.targets)}
        return {"params": {"base": base, "lora": nested(flat)}}


def adapted(model: Model, config: LoraConfig) -> Model:
    """``model`` with adapters as the ``model.lora`` section says; the model itself if it asks for none.

    Raises:
      UserError: a pattern that matches no kernel of the layers.
    """
    if config.rank is None:
        return model
    leaves = leaves_of(*shapes_and_axes(model))
    able = [path for path, leaf in leaves.items() if leaf.layers is not None and leaf.matrix is not None]
    chosen: set[str] = set()
    for pattern in config.targets:
        found = {path for path in able for one in _of_stacks(pattern, model) if fnmatchcase(path, one)}
        if not found:
            raise UserError(f"model.lora.targets: {pattern!r} matches no kernel; there are: {', '.join(able)}")
        chosen |= found
    targets = tuple(path for path in able if path in chosen)
    return Adapted(model, config.rank, config.alpha, targets)


def _of_stacks(pattern: str, model: Model) -> list[str]:
    """A pattern, which for ``layers/`` may mean the layers of each of several stacks."""
    own = pattern.removeprefix("layers/")
    return [pattern] if own == pattern else [f"{stack.path}/{own}" for stack in model.facts.stacks]


def frozen_paths(model: Model, config: LoraConfig, labelled_task: bool) -> tuple[str, ...]:
    """Paths of a run's parameters that do not train: of the adapted model, all but the adapters and ``model.lora.train``.

    Raises:
      UserError: a pattern that matches nothing.
    """
    if not isinstance(model, Adapted):
        return ()
    paths = list(paths_of(shapes_and_axes(model.base)[0]))
    # A classifier starts from nothing: it has to be trained. A language model's head has been.
    patterns = (("head/*",) if labelled_task else ()) if config.train is None else config.train
    for pattern in patterns:
        if not any(fnmatchcase(path, pattern) for path in paths):
            raise UserError(f"model.lora.train: {pattern!r} matches no parameter; there are: {', '.join(paths[:20])}")
    return tuple(f"base/{path}" for path in paths if not any(fnmatchcase(path, pattern) for pattern in patterns))


def base_of(model: Model) -> Model:
    """The model without adapters."""
    return model.base if isinstance(model, Adapted) else model


def unadapted(model: Model, params: Params) -> tuple[Model, Params]:
    """The model without adapters, and parameters with which it does what the adapted one does."""
    return (model.base, merged(params, model.alpha)) if isinstance(model, Adapted) else (model, params)


def merged(params: Params, alpha: float) -> Params:
    """The model's own parameter tree with the adapters added in; each weight keeps its type."""
    flat = paths_of(branch(params, "lora"))

    def add(path: str, weight: Array) -> Array:
        if f"{path}/a" not in flat:
            return weight
        a, b = flat[f"{path}/a"], flat[f"{path}/b"]
        inputs, outputs = a.ndim - 2, b.ndim - 2
        left, right = ascii_lowercase[:inputs], ascii_lowercase[inputs : inputs + outputs]
        product = jnp.einsum(f"y{left}z,yz{right}->y{left}{right}", a, b, precision="highest")
        return weight + (alpha / a.shape[-1] * product).astype(weight.dtype)

    return map_paths(add, branch(params, "base"))


def merge(model: Adapted, params: Params, shardings: Shardings, mesh: Mesh) -> Params:
    """:func:`merged`, computed where the weights lie."""
    with jax.set_mesh(mesh):
        return jitted(functools.partial(merged, alpha=model.alpha), mesh, branch(shardings, "base"))(params)


def unchanged(base_params: Params, params: Params) -> Params:
    """A run's tree of these weights, with adapters like those of ``params`` that add nothing."""
    return {"base": base_params, "lora": jax.tree.map(jnp.zeros_like, params["lora"])}


def with_adapters(model: Adapted, base_params: Params, seed: int, shardings: Shardings) -> Params:
    """A run's tree of loaded weights, with fresh adapters."""
    made = jax.jit(_init_adapters, static_argnums=0, out_shardings=branch(shardings, "lora"))(
        model, jax.random.key(seed)
    )
    return {"base": base_params, "lora": made}


def _init_adapters(model: Adapted, key: Array) -> Params:
    # The model's own parameters are not computed: nothing asks for them.
    return branch(unlabel(initialisable(model).init(key, **smallest_batch(model.facts))["params"])[0], "lora")


def _init(key: Array, leaf: Leaf, rank: int, dtype: str) -> dict[str, Labelled]:
    """A uniform within 1 / sqrt(inputs), B zero: as the authors' and Hugging Face's peft libraries do."""
    assert leaf.matrix is not None
    inputs, outputs = leaf.matrix
    shape_a = (leaf.shape[0], *(leaf.shape[i] for i in inputs), rank)
    shape_b = (leaf.shape[0], rank, *(leaf.shape[i] for i in outputs))
    width = 1
    for i in inputs:
        width *= leaf.shape[i]

    def uniform(key: Array, shape: Sequence[int], dtype: DTypeLike) -> Array:
        return jax.random.uniform(key, shape, dtype, -(width**-0.5), width**-0.5)

    names_a = (leaf.axes[0], *(leaf.axes[i] for i in inputs), None)
    names_b = (leaf.axes[0], None, *(leaf.axes[i] for i in outputs))
    return {
        "a": labelled(uniform, *names_a)(key, shape_a, dtype),
        "b": labelled(lambda key, shape, dtype: jnp.zeros(shape, dtype), *names_b)(key, shape_b, dtype),
    }
