"""One step of texts: what a model says after their next tokens."""

from __future__ import annotations

from typing import cast

import jax
from jaxtyping import Bool, Int32, PyTree

from jaxft.models.caches import Cache
from jaxft.models.contract import Model, Output
from jaxft.models.decoding.by_layer import together

Array = jax.Array


def after(
    model: Model, params: PyTree[Array], tokens: Int32[Array, "B S"], there: Bool[Array, "B S"], cache: Cache
) -> tuple[Array, Cache]:
    """(logits [B, S, V] after the next tokens of texts, the cache that has read them, too)."""
    variables = {"params": together(params)}
    if model.facts.start is None:
        out = cast(Output, model.apply(variables, tokens, there, cache=cache))
    else:
        out = cast(Output, model.apply(variables, None, decoder_tokens=tokens, decoder_mask=there, cache=cache))
    assert out.logits is not None
    assert out.cache is not None
    return out.logits, out.cache
