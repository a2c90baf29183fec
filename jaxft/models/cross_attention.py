"""Attention of tokens to each other or to what an encoder has read, in any encoder-decoder.

Dims: B batch, R rows of sources, S source length, T target length, D model width, N heads, H head size.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, PRNGKeyArray

from jaxft.attention import MaskSpec, attend
from jaxft.layers import Compute, FromHeads, Initializer, Projection, Rate, project, project_together
from jaxft.models.blocks import KeysAndValues

Array = jax.Array


class Attention(nn.Module):
    """Multi-head attention of tokens to each other, or to what an encoder has read: [B, S, D] to [B, S, D]; and keys and values."""

    heads: int
    head_size: int
    compute: Compute
    initial: Initializer
    """Initialiser of keys and values."""
    query_initial: Initializer
    out_initial: Initializer
    rate: Rate = 0.0
    """Dropout of probabilities."""
    biased: bool = False
    key_biased: bool = True
    """Whether keys have a bias where the others do."""
    scale: float | None = None
    """What products of queries and keys are multiplied with; None: 1 / sqrt(head size)."""

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: MaskSpec,
        key: PRNGKeyArray | None,
        bias: Float[Array, "1 N T _"] | None = None,
        *,
        past: KeysAndValues | None = None,
        memory: Float[Array, "R S D"] | KeysAndValues | None = None,
    ) -> tuple[Float[Array, "B T D"], KeysAndValues]:
        """(the result, keys and values of what is looked at).

        Args:
          mask: which key each token may see.
          key: dropout key; None: no dropout.
          bias: added to the logits.
          past: keys and values of a cache with room for these, which stand at place ``mask.first``.
          memory: what an encoder has read, or its keys and values; each of its R rows is of B / R neighbouring ones. None: tokens look at
            each other.
        """
        rules, names, h = self.compute.rules, ("embed", "heads", None), self.head_size

        def projection(name: str, initial: Initializer) -> tuple[Array, Array | None]:
            shape = (x.shape[-1], self.heads, h)
            biased = self.biased and (self.key_biased or name != "key")
            kernel, bias = Projection(shape, names, self.compute, initial, biased, name=name)()
            # Products are made together: a bias that there is not is 0 there.
            return kernel, jnp.zeros(shape[1:], kernel.dtype) if self.biased and bias is None else bias

        def placed(y: Array, length: str) -> Array:
            return rules.constrain(y, "batch", "act_heads", length, None)

        query, seen = projection("query", self.query_initial), "target" if memory is not None else "length"
        if memory is None:
            parts = [query, projection("key", self.initial), projection("value", self.initial)]
            q, k, v = (placed(y, seen) for y in project_together(x, parts, names, self.compute))
            new = (k, v)
        else:
            q = placed(project(x, query, names, self.compute, False), seen)
            if isinstance(memory, tuple):
                k, v = memory
            else:
                parts = [projection(name, self.initial) for name in ("key", "value")]
                k, v = (placed(y, "length") for y in project_together(memory, parts, names, self.compute))
            new = (k, v)
        if past is not None:
            new = (k.astype(past[0].dtype), v.astype(past[1].dtype))
            k, v = (jax.lax.dynamic_update_slice_in_dim(*pair, mask.first, 2) for pair in zip(past, new, strict=True))
        several = q.shape[0] // k.shape[0]
        mixed = attend(_beside(q, several), k, v, mask, self.compute, self.rate, key, scale=self.scale, bias=bias)
        out = FromHeads(
            (self.heads, h, x.shape[-1]),
            ("heads", None, "embed"),
            self.compute,
            self.out_initial,
            self.biased,
            name="out",
        )
        return out(_apart(mixed, several)), new


def _beside(q: Float[Array, "B N T H"], several: int) -> Float[Array, "R N _ H"]:
    """Queries of rows that see the same keys, as queries of one row."""
    if several == 1:
        return q
    b, n, t, h = q.shape
    return q.reshape(b // several, several, n, t, h).transpose(0, 2, 1, 3, 4).reshape(b // several, n, several * t, h)


def _apart(mixed: Float[Array, "R N _ H"], several: int) -> Float[Array, "B N T H"]:
    """The inverse of :func:`_beside`."""
    if several == 1:
        return mixed
    r, n, all_of_them, h = mixed.shape
    apart = mixed.reshape(r, n, several, all_of_them // several, h).transpose(0, 2, 1, 3, 4)
    return apart.reshape(r * several, n, all_of_them // several, h)
