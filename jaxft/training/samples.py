"""Texts that show, while a run goes on, what its model writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from jaxft.config import RunConfig
from jaxft.data.processors.contract import Processor
from jaxft.data.processors.opened import as_text
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.parallel.sharding import ways
from jaxft.tasks.contract import Sampler, Sampling
from jaxft.training.recipe import Recipe


def asked(config: RunConfig) -> bool:
    """Whether a run is to show samples."""
    return bool(config.log.samples or config.log.prompts)


def open_sampler(recipe: Recipe, processor: Processor, rows: Sequence[Row]) -> Sampler | None:
    """What writes a run's samples; None: nobody asks for any.

    Args:
      rows: that are held out, as far as they are in memory.

    Raises:
      UserError: the task writes none, or there are no such rows.
    """
    config, log = recipe.config, recipe.config.log
    if not asked(config):
        return None
    key = f"log.samples={log.samples}" if log.samples else "log.prompts"
    if not hasattr(recipe.task, "sampler"):
        raise UserError(f"{key}: the task {config.task.name} writes no texts; leave it out")
    if log.samples and not rows:
        raise UserError(f"{key}: the held-out rows are of a token cache or a corpus, which keep no texts; leave it out")
    if ways(recipe.mesh, recipe.model.compute.rules, "length") > 1:
        raise UserError(f"{key}: texts are not written on a mesh with mesh.context={config.mesh.context}; leave it out")
    chosen = [row.values for row in rows[: log.samples]]
    return cast(Sampling, recipe.task).sampler(log, recipe.model, recipe.mesh, as_text(processor), chosen)
