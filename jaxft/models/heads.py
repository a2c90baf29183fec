"""Heads that several families share. Each maps :class:`~jaxft.models.contract.Features` and a dropout key to logits.

Dims: B batch, S length, D model width, V vocabulary, C classes.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxft.layers import (
    ACTIVATIONS,
    Compute,
    Initializer,
    LayerNorm,
    Linear,
    TokenScore,
    declare,
    dropout,
    score_tokens,
    subkey,
    vocabulary_logits,
)
from jaxft.models.contract import Features
from jaxft.models.layout import Rule

Array = jax.Array


def _exact(compute: Compute) -> Compute:
    """How few classes are computed: in full precision, which costs nothing and keeps probabilities clean."""
    return Compute(param_dtype=compute.param_dtype, rules=compute.rules)


class PooledClasses(nn.Module):
    """Dropout and one affine map of the pooled vector: logits [B, C]."""

    width: int
    classes: int
    rate: float
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self, seen: Features, key: Array | None) -> Array:
        assert seen.pooled is not None  # models with this head have a pooler
        x = dropout(seen.pooled, self.rate, key, self.compute.dropout_bits)
        shape = (self.width, self.classes)
        return Linear(shape, ("embed", "classes"), _exact(self.compute), self.initial, name="linear")(x)


class FirstTokenClasses(nn.Module):
    """Dropout, affine, tanh, dropout and affine on the first token's vector: logits [B, C]."""

    width: int
    classes: int
    rate: float
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self, seen: Features, key: Array | None) -> Array:
        bits = self.compute.dropout_bits
        x = dropout(seen.hidden[:, 0], self.rate, subkey(key, 0), bits)
        x = jnp.tanh(Linear((self.width,) * 2, ("embed", "pooled"), self.compute, self.initial, name="dense")(x))
        x = dropout(x, self.rate, subkey(key, 1), bits)
        shape = (self.width, self.classes)
        return Linear(shape, ("embed", "classes"), _exact(self.compute), self.initial, name="linear")(x)


class TokenClasses(nn.Module):
    """Dropout and one affine map of every token's vector: logits [B, S, C]."""

    width: int
    classes: int
    rate: float
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self, seen: Features, key: Array | None) -> Array:
        x = dropout(seen.hidden, self.rate, key, self.compute.dropout_bits)
        shape = (self.width, self.classes)
        return Linear(shape, ("embed", "classes"), _exact(self.compute), self.initial, name="linear")(x)


class MaskedLm(nn.Module):
    """Affine, activation, norm, then the vocabulary: logits [B, M, V], or their score in tiles."""

    width: int
    vocabulary: int
    act: str
    eps: float
    tied: bool
    """The vocabulary matrix is the table of token embeddings."""
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self, seen: Features, key: Array | None) -> Array | TokenScore:
        del key
        d, v = self.width, self.vocabulary
        x = Linear((d, d), ("embed", "pooled"), self.compute, self.initial, name="dense")(seen.hidden)
        x = LayerNorm(self.eps, self.compute, name="norm")(ACTIVATIONS[self.act](x))
        dtype = self.compute.param_dtype
        bias = declare(self, "bias", nn.initializers.zeros, ("vocab",), (v,), dtype)
        table = seen.table if self.tied else declare(self, "kernel", self.initial, ("embed", "vocab"), (d, v), dtype).T
        assert table is not None
        if seen.targets is not None and self.compute.vocab_tile is not None:
            return score_tokens(x, table, bias, seen.targets, self.compute)
        return vocabulary_logits(x, table, bias, self.compute, "predicted")


def dense_rules(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """The rows of the weight table for an affine map."""
    return Rule(f"{ours}/kernel", f"{theirs}.weight", "o i -> i o"), Rule(f"{ours}/bias", f"{theirs}.bias")


def norm_rules(ours: str, theirs: str) -> tuple[Rule, Rule]:
    """The rows of the weight table for a layer norm."""
    return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


def decoder_rules(theirs: str, bias: str, *, tied: bool) -> tuple[Rule, ...]:
    """The rows of the weight table for the vocabulary of a masked-LM head.

    Args:
      theirs: the reference's decoder, which holds a matrix and a bias.
      bias: the reference's other name for that bias.
      tied: the matrix is the table of token embeddings.
    """
    if tied:
        return (Rule("head/bias", bias, preferred=(f"{theirs}.bias",)),)
    # transformers v5 reads the decoder's bias; v4 tied the two and stored the other name only.
    return Rule("head/kernel", f"{theirs}.weight", "v d -> d v"), Rule("head/bias", f"{theirs}.bias", None, (bias,))


def normal(config: Any) -> Initializer:
    """The initialiser of a Config's weights."""
    return nn.initializers.normal(config.initializer_range)
