"""Heads that several families share. Each maps :class:`~jaxft.models.contract.Features` and a dropout key to logits.

Dims: B batch, S length, E texts of a packed row, D model width, V vocabulary, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Integer, PRNGKeyArray, Shaped

from jaxft.layers import (
    ACTIVATIONS,
    Compute,
    Initializer,
    LayerNorm,
    Linear,
    Rate,
    TokenScore,
    declare,
    dropout,
    score_tokens,
    subkey,
    vocabulary_logits,
)
from jaxft.models.contract import PAIR_KINDS, Features, Output, TokensAndRows
from jaxft.models.layout import Rule

Array = jax.Array


def exact(compute: Compute) -> Compute:
    """How few classes are computed: in full precision, which costs nothing and keeps probabilities clean."""
    return Compute(param_dtype=compute.param_dtype, rules=compute.rules)


class PooledClasses(nn.Module):
    """Dropout and one affine map of the pooled vector: logits [B, C], or [B, E, C] for the texts of packed rows."""

    width: int
    classes: int
    rate: Rate
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self, seen: Features, key: PRNGKeyArray | None) -> Float32[Array, "B *texts C"]:
        assert seen.pooled is not None  # models with this head have a pooler
        x = dropout(seen.pooled, self.rate, key, self.compute.dropout_bits)
        shape = (self.width, self.classes)
        return Linear(shape, ("embed", "classes"), exact(self.compute), self.initial, name="linear")(x)


class FirstTokenClasses(nn.Module):
    """Dropout, affine, activation, dropout and affine on the first token's vector, or the pooled one: logits [B, C], or [B, E, C] for the
    texts of packed rows."""

    width: int
    classes: int
    rate: Rate
    compute: Compute
    initial: Initializer
    act: str = "tanh"
    first_rate: Rate | None = None
    """The first dropout, if it is another one."""
    pooled: bool = False
    """It sees the pooled vector."""

    @nn.compact
    def __call__(self, seen: Features, key: PRNGKeyArray | None) -> Float32[Array, "B *texts C"]:
        bits, first = self.compute.dropout_bits, self.rate if self.first_rate is None else self.first_rate
        x = seen.pooled if self.pooled else first_of_texts(seen.hidden, seen.starts)
        assert x is not None  # models pool for heads that ask for it
        x = dropout(x, first, subkey(key, 0), bits)
        shape, names = (self.width,) * 2, ("embed", "pooled")
        x = ACTIVATIONS[self.act](Linear(shape, names, self.compute, self.initial, name="dense")(x))
        x = dropout(x, self.rate, subkey(key, 1), bits)
        shape = (self.width, self.classes)
        return Linear(shape, ("embed", "classes"), exact(self.compute), self.initial, name="linear")(x)


class LastTokenClasses(nn.Module):
    """One linear map of the last token's vector, the only one of a decoder that has seen the whole text: logits [B, C], or [B, E, C] for
    the texts of packed rows."""

    width: int
    classes: int
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self, seen: Features, key: PRNGKeyArray | None) -> Float32[Array, "B *texts C"]:
        del key
        x, shape = last_of_texts(seen.hidden, seen.mask, seen.segments, seen.starts), (self.width, self.classes)
        linear = Linear(shape, ("embed", "classes"), exact(self.compute), self.initial, biased=False, name="linear")
        return linear(x)


class TokenClasses(nn.Module):
    """Dropout and one affine map of every token's vector: logits [B, S, C]."""

    width: int
    classes: int
    rate: Rate
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self, seen: Features, key: PRNGKeyArray | None) -> Float32[Array, "B S C"]:
        x = dropout(seen.hidden, self.rate, key, self.compute.dropout_bits)
        shape = (self.width, self.classes)
        return Linear(shape, ("embed", "classes"), exact(self.compute), self.initial, name="linear")(x)


@dataclass(frozen=True)
class Transform:
    """An affine map, an activation and a norm, which some heads begin with; declared on the module whose method calls it."""

    width: int
    act: str
    eps: float
    initial: Initializer
    dense_bias: bool = True
    norm_bias: bool = True
    outputs: int | None = None
    """Width of what comes out, if it is another one."""

    @property
    def out_width(self) -> int:
        """Width of what comes out."""
        return self.width if self.outputs is None else self.outputs

    def __call__(self, x: Float[Array, "*rows D"], compute: Compute) -> Float[Array, "*rows O"]:
        shape, names = (self.width, self.out_width), ("embed", "pooled")
        x = Linear(shape, names, compute, self.initial, biased=self.dense_bias, name="dense")(x)
        return LayerNorm(self.eps, compute, self.norm_bias, name="norm")(ACTIVATIONS[self.act](x))

    def rules(self, dense: str, norm: str) -> tuple[Rule, ...]:
        """Its rows of the weight table, from the reference's names."""
        return (*dense_rules("head/dense", dense, self.dense_bias), *norm_rules("head/norm", norm, self.norm_bias))


class TransformedClasses(nn.Module):
    """A transform, dropout and one affine map of the pooled vector, logits [B, C], or of every token's, [B, S, C]."""

    transform: Transform
    classes: int
    rate: Rate
    pooled: bool
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self, seen: Features, key: PRNGKeyArray | None) -> Float32[Array, "B *places C"]:
        x = seen.pooled if self.pooled else seen.hidden
        assert x is not None  # models pool for heads that ask for it
        x = dropout(self.transform(x, self.compute), self.rate, key, self.compute.dropout_bits)
        shape = (self.transform.out_width, self.classes)
        return Linear(shape, ("embed", "classes"), exact(self.compute), self.initial, name="linear")(x)


class MaskedLm(nn.Module):
    """A transform, then the vocabulary: logits [B, M, V], or their score in tiles."""

    transform: Transform
    vocabulary: int
    tied: bool
    """The vocabulary matrix is the table of token embeddings."""
    compute: Compute
    biased: bool = True

    @nn.compact
    def __call__(self, seen: Features, key: PRNGKeyArray | None) -> Float32[Array, "B M V"] | TokenScore:
        del key
        return self.of_tokens(seen)

    def of_tokens(self, seen: Features) -> Float32[Array, "B M V"] | TokenScore:
        """What is said of tokens; within :meth:`__call__` only."""
        x = self.transform(seen.hidden, self.compute)
        (d, v), dtype = (self.transform.out_width, self.vocabulary), self.compute.param_dtype
        bias = declare(self, "bias", nn.initializers.zeros, ("vocab",), (v,), dtype) if self.biased else None
        initial = self.transform.initial
        table = seen.table if self.tied else declare(self, "kernel", initial, ("embed", "vocab"), (d, v), dtype).T
        assert table is not None
        if seen.targets is not None and self.compute.vocab_tile is not None:
            return score_tokens(x, table, bias, seen.targets, self.compute)
        return vocabulary_logits(x, table, bias, self.compute, "predicted")


class MaskedLmAndPairs(MaskedLm):
    """The two heads of BERT's pre-training: the vocabulary for tokens, and one affine map of the pooled vector, whether the two texts of a
    row stand as they did in a document."""

    rate: Rate = 0.0
    """The rate of dropout before that map."""

    @nn.compact
    def __call__(self, seen: Features, key: PRNGKeyArray | None) -> TokensAndRows:
        assert seen.pooled is not None  # models with this head have a pooler
        x = dropout(seen.pooled, self.rate, key, self.compute.dropout_bits)
        shape = (seen.pooled.shape[-1], PAIR_KINDS)
        linear = Linear(shape, ("embed", "classes"), exact(self.compute), self.transform.initial, name="linear")
        return TokensAndRows(self.of_tokens(seen), linear(x))


class Vocabulary(nn.Module):
    """The vocabulary, with nothing before it: logits [B, M, V], or their score in tiles."""

    width: int
    vocabulary: int
    tied: bool
    """The vocabulary matrix is the table of token embeddings."""
    compute: Compute
    initial: Initializer
    biased: bool = False
    axis: str = "length"
    """The logical axis of the tokens that it sees."""
    soft_cap: float | None = None
    """Logits l become soft_cap tanh(l / soft_cap)."""
    fixed_bias: bool = False
    """A bias, one row [1, V], is added as it was read and never trained."""

    @nn.compact
    def __call__(self, seen: Features, key: PRNGKeyArray | None) -> Float32[Array, "B M V"] | TokenScore:
        del key
        (d, v), dtype = (self.width, self.vocabulary), self.compute.param_dtype
        bias = declare(self, "bias", nn.initializers.zeros, ("vocab",), (v,), dtype) if self.biased else None
        if self.fixed_bias:
            row = declare(self, "fixed_bias", nn.initializers.zeros, (None, "vocab"), (1, v), dtype)
            bias = jax.lax.stop_gradient(row[0])
        table = seen.table if self.tied else declare(self, "kernel", self.initial, ("embed", "vocab"), (d, v), dtype).T
        assert table is not None
        if seen.targets is not None and self.compute.vocab_tile is not None:
            return score_tokens(seen.hidden, table, bias, seen.targets, self.compute, self.soft_cap)
        return vocabulary_logits(seen.hidden, table, bias, self.compute, self.axis, self.soft_cap)


class DenseClasses(nn.Module):
    """An affine map, GELU and classes of each text, from its first vector, from the mean of its vectors, or, ``late``, from the mean
    behind GELU: logits [B, C], or [B, E, C] for the texts of packed rows."""

    width: int
    classes: int
    pooling: Literal["cls", "mean", "late"]
    compute: Compute
    initial: Initializer

    @nn.compact
    def __call__(self, seen: Features, key: PRNGKeyArray | None) -> Float32[Array, "B *texts C"]:
        del key
        texts, late = (seen.mask, seen.segments, seen.starts), self.pooling == "late"
        x, shape = seen.hidden if late else pooled_texts(self.pooling, seen.hidden, *texts), (self.width,) * 2
        x = ACTIVATIONS["gelu"](Linear(shape, ("embed", "pooled"), self.compute, self.initial, name="dense")(x))
        # Where the reference classifies each vector and takes the mean of that: the same, as the last map is affine.
        x, shape = mean_of_texts(x, *texts) if late else x, (self.width, self.classes)
        return Linear(shape, ("embed", "classes"), exact(self.compute), self.initial, name="linear")(x)


def first_of_texts(hidden: Float[Array, "B S D"], starts: Integer[Array, "B E"] | None) -> Float[Array, "B *texts D"]:
    """The vector of each row's first token, [B, D]; with ``starts``, of the first one of each text of packed rows, [B, E, D]."""
    return hidden[:, 0] if starts is None else jnp.take_along_axis(hidden, starts[..., None], axis=1)


def last_of_texts(
    hidden: Float[Array, "B S D"],
    mask: Shaped[Array, "B S"] | None,
    segments: Integer[Array, "B S"] | None,
    starts: Integer[Array, "B E"] | None,
) -> Float[Array, "B *texts D"]:
    """The vector of the last token of each row that is no padding, [B, D]; of packed rows, of the first text, or, with ``starts``, of each
    text, [B, E, D]. Arguments as of :func:`mean_of_texts`."""
    there = jnp.ones(hidden.shape[:2], bool) if mask is None else mask.astype(bool)
    places = jnp.arange(hidden.shape[1])
    if segments is None:
        return first_of_texts(hidden, jnp.where(there, places, 0).max(1)[:, None])[:, 0]
    numbers = jnp.arange(1, (1 if starts is None else starts.shape[1]) + 1)
    chosen = there[:, None] & (segments[:, None] == numbers[:, None])
    last = first_of_texts(hidden, jnp.where(chosen, places, 0).max(2))
    return last[:, 0] if starts is None else last


def mean_of_texts(
    hidden: Float[Array, "B S D"],
    mask: Shaped[Array, "B S"] | None,
    segments: Integer[Array, "B S"] | None,
    starts: Integer[Array, "B E"] | None,
) -> Float[Array, "B *texts D"]:
    """The mean over the tokens of each row that are no padding, [B, D]; of packed rows, over those of the first text, or, with
    ``starts``, of each text, [B, E, D].

    Args:
      mask: 0 or False where a token is padding; None: nothing is.
      segments: 1, 2, ... by text of packed rows, 0 is padding; None: each row is one text.
      starts: where each text begins. How many there are is all that is read of it: segments say which tokens are of which text.
    """
    there = jnp.ones(hidden.shape[:2], bool) if mask is None else mask.astype(bool)
    if starts is not None:
        assert segments is not None  # rows that hold several texts have segments
        numbers = jnp.arange(1, starts.shape[1] + 1)
        chosen = (there[:, None] & (segments[:, None] == numbers[:, None])).astype(jnp.float32)
        sums = jnp.einsum("bes,bsd->bed", chosen, hidden.astype(jnp.float32), precision="highest")
        return (sums / jnp.maximum(chosen.sum(-1, keepdims=True), 1.0)).astype(hidden.dtype)
    if segments is not None:
        there = there & (segments != 0)
        there = there & (segments == jnp.take_along_axis(segments, there.argmax(1)[:, None], axis=1))
    weights = there.astype(jnp.float32)[..., None]
    return ((hidden * weights).sum(1) / jnp.maximum(weights.sum(1), 1.0)).astype(hidden.dtype)


def pooled_texts(
    how: str,
    hidden: Float[Array, "B S D"],
    mask: Shaped[Array, "B S"] | None,
    segments: Integer[Array, "B S"] | None,
    starts: Integer[Array, "B E"] | None,
    behind_padding: bool = False,
) -> Float[Array, "B *texts D"]:
    """One vector per text: its first token's where ``how`` is ``cls``, else the mean over its tokens (:func:`mean_of_texts`).

    Args:
      behind_padding: the first token of a row that begins with padding is the first one behind it.
    """
    if how == "mean":
        return mean_of_texts(hidden, mask, segments, starts)
    if mask is not None and behind_padding and starts is None:
        starts = mask.astype(bool).argmax(1)[:, None]
        return first_of_texts(hidden, starts)[:, 0]
    return first_of_texts(hidden, starts)


def answered(
    head: nn.Module | None,
    seen: Features,
    key: PRNGKeyArray | None,
    predict: Integer[Array, "B M"] | None,
    hidden_states: Float[Array, "states B S D"] | None = None,
    attentions: Float32[Array, "L B N S S"] | None = None,
) -> Output:
    """What a model gives: its vectors, and what its head makes of them.

    Args:
      head: one of the model's modules; None: it is the bare encoder.
      seen: with the vectors of all tokens.
      predict: the places that the head sees alone. Most tokens are not predicted: gathered first, they never meet the vocabulary.
    """
    more = {"hidden_states": hidden_states, "attentions": attentions}
    hidden, pooled = seen.hidden, seen.pooled
    if head is None:
        return Output(hidden, pooled, **more)
    if predict is not None:
        seen = seen._replace(hidden=jnp.take_along_axis(hidden, predict[..., None], axis=1))
    made = head(seen, key)
    if isinstance(made, TokensAndRows):
        made, more["row_logits"] = made
    if isinstance(made, TokenScore):
        return Output(hidden, pooled, score=made, **more)
    return Output(hidden, pooled, made, **more)


def dense_rules(ours: str, theirs: str, biased: bool = True) -> tuple[Rule, ...]:
    """The rows of the weight table for an affine map."""
    kernel = Rule(f"{ours}/kernel", f"{theirs}.weight", "o i -> i o")
    return (kernel, Rule(f"{ours}/bias", f"{theirs}.bias")) if biased else (kernel,)


def norm_rules(ours: str, theirs: str, biased: bool = True, first_layer: int = 0) -> tuple[Rule, ...]:
    """The rows of the weight table for a layer norm; ``first_layer`` is the first that has it."""
    layers = (first_layer, None)
    scale = Rule(f"{ours}/scale", f"{theirs}.weight", layers=layers)
    return (scale, Rule(f"{ours}/bias", f"{theirs}.bias", layers=layers)) if biased else (scale,)


def decoder_rules(theirs: str, bias: str | None, *, tied: bool) -> tuple[Rule, ...]:
    """The rows of the weight table for the vocabulary of a masked-LM head.

    Args:
      theirs: the reference's decoder, which holds a matrix and a bias.
      bias: the reference's other name for that bias; None: it has no other.
      tied: the matrix is the table of token embeddings.
    """
    if bias is None:
        kernel = () if tied else (Rule("head/kernel", f"{theirs}.weight", "v d -> d v"),)
        return (*kernel, Rule("head/bias", f"{theirs}.bias"))
    if tied:
        return (Rule("head/bias", bias, preferred=(f"{theirs}.bias",)),)
    # transformers v5 reads the decoder's bias; v4 tied the two and stored the other name only.
    return Rule("head/kernel", f"{theirs}.weight", "v d -> d v"), Rule("head/bias", f"{theirs}.bias", None, (bias,))


class _Spread(Protocol):
    """A Config that says how wide its fresh weights spread."""

    @property
    def initializer_range(self) -> float: ...


def normal(config: _Spread) -> Initializer:
    """The initialiser of a Config's weights."""
    return nn.initializers.normal(config.initializer_range)
