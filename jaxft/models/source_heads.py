"""Heads of encoder-decoders that answer about the source: the decoder reads it again, one place to the right, or is not there at all.

Dims: B batch, S length, E texts of a packed row, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Integer, Shaped

from jaxft.layers import Initializer, Rate
from jaxft.models.contract import SPAN_ENDS, Head, OfConfig
from jaxft.models.heads import FirstTokenClasses, TokenClasses, dense_rules, first_of_texts
from jaxft.models.layout import Tensors

Array = jax.Array
Settings = TypeVar("Settings")
_LAST_MAPS = ("classification_head.out_proj.weight", "classifier.weight")
"""Tensors of heads that have a row for each class."""


@dataclass(frozen=True)
class SourceHead(Head[OfConfig]):
    """A head that answers about the source. If it reads a pooled vector, that is of the last token that ends a text."""

    side: Literal["encoder", "decoder"] = "decoder"
    """Whose vectors it sees: those of the encoder alone, or of a decoder that reads the source again."""


def classification(
    sizes: Callable[[Settings], tuple[int, int, Rate]], initial: Callable[[Settings], Initializer]
) -> SourceHead[Settings]:
    """The head of classes of each row: an affine map, tanh and another one, on the decoder's vector where the text ends.

    Args:
      sizes: width of the vector, how many classes, and the rate of dropout, by the Config.
      initial: of both maps.
    """
    return SourceHead(
        "ForSequenceClassification",
        lambda c, compute, name: FirstTokenClasses(*sizes(c), compute, initial(c), pooled=True, name=name),
        lambda c: (
            *dense_rules("head/dense", "classification_head.dense"),
            *dense_rules("head/linear", "classification_head.out_proj"),
        ),
        marks=("classification_head.out_proj.weight",),
        classes="rows",
        pooled=True,
    )


def question_answering(
    width: Callable[[Settings], int], initial: Callable[[Settings], Initializer]
) -> SourceHead[Settings]:
    """The head of where answers start and end, on the decoder's vectors.

    Args:
      width: of the vectors, by the Config. initial: of the map.
    """
    return SourceHead(
        "ForQuestionAnswering",
        lambda c, compute, name: TokenClasses(width(c), SPAN_ENDS, 0.0, compute, initial(c), name=name),
        lambda c: dense_rules("head/linear", "qa_outputs"),
        marks=("qa_outputs.weight",),
    )


def one_end(hf: Mapping[str, object], usual: int | None) -> object:
    """The token that a config.json says texts end with; ``usual`` where it says none, None where it names several, as folders of models
    that write may."""
    stated = hf.get("eos_token_id", usual)
    if isinstance(stated, list | tuple):
        return stated[0] if len(stated) == 1 else None
    return stated


def with_end(made: dict[str, object]) -> dict[str, object]:
    """The keys of a config.json, without that of the end of texts where it is not known: what a folder's file said of it stays."""
    return {name: value for name, value in made.items() if name != "eos_token_id" or value is not None}


def classes_of_weights(weights: Tensors) -> dict[str, object]:
    """How many classes a head has, by its tensors; nothing where no head has classes."""
    name = next((name for name in weights.names() if name.endswith(_LAST_MAPS)), None)
    return {} if name is None else {"num_labels": weights.shape(name)[0]}


def real(
    tokens: Integer[Array, "B S"],
    mask: Shaped[Array, "B S"] | None,
    segments: Integer[Array, "B S"] | None,
) -> Bool[Array, "B S"]:
    """Which places hold a token that is no padding."""
    there = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    return there if segments is None else there & (segments != 0)


def shifted_right(
    tokens: Integer[Array, "B S"],
    there: Bool[Array, "B S"],
    segments: Integer[Array, "B S"] | None,
    start: int | None,
) -> Integer[Array, "B S"]:
    """What a decoder reads of the source: at each place the token before it, at the first one of each text what targets begin with.

    Args:
      there: which places are no padding.
      start: what targets begin with; None: the last token of the text, as in mBART, where it is that of the language.
    """
    length = tokens.shape[1]
    texts = jnp.ones_like(tokens) if segments is None else segments
    first = jnp.pad(texts[:, 1:] != texts[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
    if start is not None:
        return jnp.where(first, start, before)
    numbers = jnp.arange(length)
    same = texts[:, :, None] == texts[:, None, :]
    last = jnp.where(same & there[:, None, :], numbers, 0).max(2)
    return jnp.where(first, jnp.take_along_axis(tokens, last, axis=1), before)


def end_of_texts(
    hidden: Float[Array, "B S D"],
    ends: Bool[Array, "B S"],
    there: Bool[Array, "B S"],
    segments: Integer[Array, "B S"] | None,
    starts: Integer[Array, "B E"] | None,
) -> Float[Array, "B *texts D"]:
    """The vector at the last token of each row that ends a text, [B, D]; of packed rows, of the first text, or, with ``starts``, of each
    text, [B, E, D]. Of a text that nothing ends, which the reference refuses, it is that at its last token.

    Args:
      ends: which tokens end texts. there: which places are no padding.
    """
    length = hidden.shape[1]
    order = jnp.where(there, jnp.arange(length) + jnp.where(ends, length, 0), 0)
    if segments is None:
        return first_of_texts(hidden, order.max(1)[:, None] % length)[:, 0]
    numbers = jnp.arange(1, (1 if starts is None else starts.shape[1]) + 1)
    chosen = segments[:, None] == numbers[:, None]
    found = first_of_texts(hidden, jnp.where(chosen, order[:, None], 0).max(2) % length)
    return found[:, 0] if starts is None else found
