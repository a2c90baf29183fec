"""Text infilling, the pre-training of BART (Lewis et al. 2019, section 2.2): stretches of a text become one mask each, however long they
are, some of no token, and the decoder writes the text as it was.

Texts are rows, or a corpus cut into rows (``data.packing=concatenated``); a row is one text here.

Dims: S tokens of a row, K stretches at most.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.denoising import Config
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks._tokens import LONG_TEXTS, PROBLEM, ROW_OPTIONS, TokenTask, columns, encode_all, fields, study
from jaxft.tasks.contract import Array, Batch, Targets

__all__ = [
    "LONG_TEXTS",
    "PACKING",
    "PROBLEM",
    "ROW_OPTIONS",
    "Config",
    "Task",
    "columns",
    "encode",
    "fields",
    "make_task",
    "study",
]
PACKING = False


@dataclass(frozen=True)
class Task(TokenTask):
    """What is masked in texts. Static and hashable: part of jit cache keys."""

    density: float
    mean: float
    mask_id: int
    special_ids: tuple[int, ...]
    """Never masked."""
    start: int
    """What every target begins with, for the decoder."""

    head = "seq2seq_lm"

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch with stretches masked anew. Which ones follows from ``key`` and the text of the row alone.

        Adds ``decoder_tokens`` and ``decoder_mask`` [B, S], ``targets`` [B, S] int32 and ``target_weights`` [B, S] float32: the row as it
        was.
        """
        tokens, real = batch["tokens"], batch["mask"] != 0
        text = real & ~jnp.isin(tokens, jnp.asarray(self.special_ids, jnp.int32))
        # The sum is the same on any layout; padding counts nothing.
        place = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.uint32)
        number = (jnp.where(real, tokens, 0).astype(jnp.uint32) * place).sum(-1)

        def of_row(tokens: Array, text: Array, real: Array, number: Array) -> tuple[Array, Array]:
            return infilled(tokens, text, real, self.density, self.mean, self.mask_id, jax.random.fold_in(key, number))

        source, there = jax.vmap(of_row)(tokens, text, real, number)
        shifted = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=self.start)
        rest = {name: value for name, value in batch.items() if name not in ("segments", "positions")}
        return rest | {
            "tokens": source,
            "mask": there.astype(jnp.int32),
            "decoder_tokens": shifted,
            "decoder_mask": real.astype(jnp.int32),
            "targets": tokens,
            "target_weights": real * batch["weights"][:, None],
        }

    def learnable(self, split: Split) -> int:
        """How many tokens may be masked."""
        return int((~np.isin(split.columns["tokens"], self.special_ids)).sum())


def infilled(
    tokens: Array, text: Array, real: Array, density: float, mean: float, mask_id: int, key: Array
) -> tuple[Array, Array]:
    """(tokens [S] int32, which of them are there [S] bool) of a row with stretches of its text masked.

    ``density`` of its tokens in stretches whose lengths are Poisson's, the last one cut; each may begin wherever a token stays, with equal
    chances, and those of no token put a mask between two. There are no more of these than leave the row as long as it was.

    Args:
      text: [S] bool, which tokens may be masked.
      real: [S] bool, which are no padding.
    """
    size = tokens.shape[0]
    count = text.sum()
    noise = jnp.round(count * density).astype(jnp.int32)
    lengths, begins = jax.random.split(key)
    drawn = jnp.searchsorted(_shares(mean), jax.random.uniform(lengths, (size,)), side="right", method="compare_all")
    drawn = drawn.astype(jnp.int32)
    before = jnp.cumsum(drawn) - drawn
    # No more masks than tokens that they stand for: a row never grows.
    stretch = (before < noise) & (jnp.arange(size) < noise)
    # Where the masks that there may be do not reach it, the last one takes the rest.
    last = jnp.arange(size) == stretch.sum() - 1
    long = jnp.where(stretch, jnp.where(last, noise - before, drawn), 0)
    stay = count - noise
    # After how many of the tokens that stay: sorted, those that there are not behind all others.
    chosen = jnp.floor(jax.random.uniform(begins, (size,)) * (stay + 1)).astype(jnp.int32)
    after = jnp.sort(jnp.where(stretch, jnp.minimum(chosen, stay), size + 1))
    first = jnp.where(stretch, after + jnp.cumsum(long) - long, size)  # among the tokens of the text
    order = jnp.cumsum(text) - 1
    hidden = jnp.zeros(size + 1, jnp.int32).at[first].add(long > 0)
    hidden = hidden.at[jnp.where(long > 0, first + long, size)].add(-(long > 0).astype(jnp.int32))
    noisy = text & (jnp.cumsum(hidden)[jnp.clip(order, 0, size)] > 0)
    # The place in the row before which a mask stands: that of the text's token of this number, or behind its last one.
    places = jnp.searchsorted(jnp.cumsum(text), jnp.minimum(first, count - 1) + 1) + (first >= count)
    keys = jnp.concatenate(
        [jnp.where(stretch, 2 * places, 4 * size), jnp.where(real & ~noisy, 2 * jnp.arange(size) + 1, 4 * size)]
    )
    values = jnp.concatenate([jnp.full(size, mask_id, jnp.int32), tokens.astype(jnp.int32)])
    taken = jnp.argsort(keys, stable=True)[:size]
    there = keys[taken] < 4 * size
    return jnp.where(there, values[taken], 0), there


@functools.cache
def _shares(mean: float) -> np.ndarray:
    """[K] float32, the shares of Poisson's lengths up to each. ``jax.random.poisson`` draws in loops whose ends all devices would have to
    agree on."""
    most = int(mean + 12 * mean**0.5) + 20
    logs = np.arange(most) * math.log(mean) - mean - np.array([math.lgamma(k + 1) for k in range(most)])
    return np.exp(logs).cumsum().astype(np.float32)


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """Each text, with the token that ends it where there is room."""
    del targets
    return encode_all(rows, tokenizer, config, end_id=tokenizer.special.end)


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run.

    Raises:
      UserError: the model has no decoder besides its encoder, or the tokenizer no mask.
    """
    del targets
    if facts.stacks and facts.start is None:
        raise UserError("task.name=denoising needs a model with an encoder and a decoder")
    if tokenizer.special.mask is None:
        raise UserError(f"{tokenizer.folder}: the tokenizer has no mask token, which denoising needs")
    special = (*tokenizer.special_ids,)
    return Task(options.noise_density, options.mean_span, tokenizer.special.mask, special, facts.start or 0)
