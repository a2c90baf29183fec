"""A discriminator together with the generator that it is trained with (ELECTRA: Clark et al. 2020).

Both are encoders of one kind. The generator reads the discriminator's tables of tokens, positions and types and the norm behind them;
what it has of its own lies under ``generator`` beside the discriminator's parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import jax
from jaxtyping import Integer, PRNGKeyArray

from jaxft.layers import Compute, Labelled
from jaxft.models.contract import Facts, FamilyConfig, Model, Output
from jaxft.trees import Params, Tree, branch

Array = jax.Array
C = TypeVar("C", bound=FamilyConfig)
GENERATOR = "generator"
_SHARED = ("token", "position", "type", "norm")
"""The embeddings' parts that the discriminator shares; the map to the model's width is not among them."""


@dataclass(frozen=True)
class Pair(Generic[C]):
    """Stands where a model stands. With ``predict`` the generator answers, with logits over the vocabulary at these places; else the
    discriminator, for each token."""

    config: C
    head: str
    compute: Compute
    discriminator_of: Callable[[C, Compute], Model]
    generator_of: Callable[[C, Compute], Model]
    """The generator, from the discriminator's Config."""

    @property
    def discriminator(self) -> Model:
        """It alone."""
        return self.discriminator_of(self.config, self.compute)

    @property
    def generator(self) -> Model:
        """It alone, with tables of its own."""
        return self.generator_of(self.config, self.compute)

    @property
    def facts(self) -> Facts:
        """The discriminator's, with the layers of both."""
        own, more = self.discriminator.facts, self.generator.facts.stacks
        further = tuple(dataclasses.replace(stack, path=f"{GENERATOR}/{stack.path}") for stack in more)
        return dataclasses.replace(own, stacks=(*own.stacks, *further))

    def clone(self, *, config: C | None = None, compute: Compute | None = None) -> Pair[C]:
        """The same, of another Config, or computed otherwise."""
        changed = {"config": config, "compute": compute}
        return dataclasses.replace(self, **{name: value for name, value in changed.items() if value is not None})

    def init(self, key: PRNGKeyArray, /, *args: object, **kwargs: object) -> dict[str, Tree[Labelled]]:
        """Labelled parameters of both."""
        own = dict(self.discriminator.init(key, *args, **kwargs)["params"])
        made = dict(self.generator.init(jax.random.fold_in(key, 1), *args, **kwargs)["params"])
        embed = {name: value for name, value in branch(made, "embed").items() if name not in _SHARED}
        rest = {name: value for name, value in made.items() if name != "embed"}
        return {"params": {**own, GENERATOR: {**rest, **({"embed": embed} if embed else {})}}}

    def apply(
        self,
        variables: Mapping[str, Params],
        /,
        *args: object,
        predict: Integer[Array, "B M"] | None = None,
        **kwargs: object,
    ) -> Output:
        """The discriminator's output, or, where there are places to ``predict``, the generator's."""
        params = variables["params"]
        if predict is None:
            return self.discriminator.apply({"params": without_generator(params)}, *args, **kwargs)
        return self.generator.apply({"params": generator_params(params)}, *args, predict=predict, **kwargs)


def without_generator(params: Params) -> Params:
    """The discriminator's parameters, from those of a pair."""
    return {name: value for name, value in params.items() if name != GENERATOR}


def generator_params(params: Params) -> Params:
    """The generator's parameters, as it has them alone, from those of a pair."""
    own, tables = branch(params, GENERATOR), branch(params, "embed")
    shared = {name: tables[name] for name in _SHARED if name in tables}
    project = branch(own, "embed") if "embed" in own else {}
    return {**own, "embed": {**shared, **project}}


def parts(model: Model, params: Params) -> Mapping[str, tuple[Model, Params]]:
    """The models that a pair is made of, each with its parameters, by name; of other models none."""
    if not isinstance(model, Pair):
        return {}
    return {
        "discriminator": (model.discriminator, without_generator(params)),
        GENERATOR: (model.generator, generator_params(params)),
    }
