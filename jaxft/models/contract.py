"""What a family of models is to the rest of jaxft (docs/add_a_model.md): facts, heads, one kind of output.

Nothing outside a family's own file reads a field of its Config.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, Self, TypeAlias, TypeVar

import flax.linen as nn
import jax
from jaxtyping import Float, Float32, Integer, PRNGKeyArray, Shaped

from jaxft.data.batch import Field, Fields
from jaxft.errors import UserError, nearest
from jaxft.layers import Compute, Labelled, TokenScore
from jaxft.models.caches import Cache
from jaxft.models.layout import Layout, Rule, Tensors
from jaxft.trees import Params, Tree

Array = jax.Array

__all__ = ["Facts", "Family", "Features", "Field", "Fields", "Head"]
__all__ += ["Layout", "Model", "Output", "Rule", "Stack", "Tensors"]
"""What a family from outside of jaxft is made of (docs/api.md)."""


class Output(NamedTuple):
    """What a forward pass gives. B rows, S tokens, E texts of a row, D width, C classes, V vocabulary, L layers."""

    hidden: Float[Array, "B S D"]
    """After the last layer and its norm."""
    pooled: Float[Array, "B *texts D"] | None = None
    """One vector per row, or [B, E, D] where the model was told where each of E texts of a row starts; None: the model makes none."""
    logits: Float32[Array, "B *places C"] | None = None
    """What the head gives: [B, C] for a row ([B, E, C] for its texts), [B, S, C] for its tokens, [B, S (or M), V] for a vocabulary."""
    score: TokenScore | None = None
    """A vocabulary head's score instead of logits, where there are targets and ``compute.vocab_tile`` is set."""
    hidden_states: Float[Array, "states B S D"] | None = None
    """L + 1 states: the embeddings and what each layer gives; None unless asked for."""
    attentions: Float32[Array, "L B N S S"] | None = None
    """How much each token looks at each other one in each layer and head; None unless asked for."""
    cache: Cache | None = None
    """What the model keeps of all tokens so far; None unless one was given."""
    row_logits: Float32[Array, "B row_classes"] | None = None
    """What a head gives of each row beside the logits, or the score, of its tokens; None: it gives one of the two alone."""
    memory: Float[Array, "B source D"] | None = None
    """What an encoder has made of the tokens that a decoder looks at; ``hidden`` is the decoder's then."""


class Features(NamedTuple):
    """What a head may look at."""

    hidden: Float[Array, "B M D"]
    """Vectors of each token, M = S; of M ones where positions to predict were given."""
    pooled: Float[Array, "B *texts D"] | None = None
    """One vector per row, or per text of packed rows, where the head reads it."""
    table: Float[Array, "V D"] | None = None
    """The embeddings of tokens."""
    targets: Integer[Array, "B M"] | None = None
    """What the head's logits are scored against."""
    starts: Integer[Array, "B E"] | None = None
    """Where each text of packed rows begins; None: rows hold one text each."""
    mask: Shaped[Array, "B S"] | None = None
    """0 or False where a token is padding; None: nothing is, or the head pools nothing."""
    segments: Integer[Array, "B S"] | None = None
    """1, 2, ... by text of packed rows, 0 is padding; None: rows hold one text each, or the head pools nothing."""


class TokensAndRows(NamedTuple):
    """What a head gives that answers of the tokens of a row and of the row."""

    tokens: Float32[Array, "B M V"] | TokenScore
    rows: Float32[Array, "B C"]


@dataclass(frozen=True)
class Stack:
    """Layers of one kind, one after the other."""

    path: str
    """Path of their stacked parameters, for instance ``layers``."""
    layers: int
    width: int
    heads: int
    key_heads: int
    head_size: int
    causal: bool = False
    """A token sees only those before it."""
    windows: tuple[int | None, ...] = ()
    """What ``MaskSpec.window`` is in each layer; empty: no layer has one."""
    stored: int | None = None
    """Layers that have parameters of their own, where some run at several places; None: all."""
    axis: str = "length"
    """The axis of a batch whose tokens go through them."""
    looks_at: str | None = None
    """The axis of a batch that each layer looks at besides; None: none."""
    tokens: int | None = None
    """Tokens that a row has in them, where no axis of a batch says so (patches of images of one size)."""

    @property
    def own(self) -> int:
        """How many layers the stacked parameters are of."""
        return self.layers if self.stored is None else self.stored

    def seen(self, length: int) -> float:
        """The share of query-key pairs that attention looks at in rows of a length, over all layers; half where it is causal."""
        windows = self.windows or (None,) * self.layers
        return sum(self._seen(length, window) for window in windows) / len(windows)

    def _seen(self, length: int, window: int | None) -> float:
        if window is None or window >= length:
            return 0.5 if self.causal else 1.0
        before = window * (window - 1) / 2  # places that the window of the first tokens has beyond the row
        pairs = length * window - before if self.causal else length * (2 * window - 1) - 2 * before
        return pairs / length**2


Modality: TypeAlias = Literal["text", "image", "audio"]
"""What rows are, before they are arrays."""


@dataclass(frozen=True)
class Facts:
    """Everything that the rest of jaxft may know of a model."""

    inputs: Fields
    """What its forward pass takes, by name; ``count`` of a field bounds its ids."""
    stacks: tuple[Stack, ...]
    limit: int | None = None
    """Tokens that a row may have; None: any number."""
    start: int | None = None
    """What every target of an encoder-decoder begins with; None: the model has one side."""
    end: int | None = None
    """The token that texts end with, where a head reads what the model made of it; None: none does."""
    processor: Modality = "text"
    """What its rows are made of: tokens, ``pixels`` [B, height, width, channels], or ``frames`` of sound [B, T, bins]."""

    @property
    def reads(self) -> str:
        """The input that no call can do without."""
        return {"text": "tokens", "image": "pixels", "audio": "frames"}[self.processor]

    @property
    def vocabulary(self) -> int | None:
        """Rows of the table of tokens."""
        return next((self.inputs[name].count for name in ("tokens", "decoder_tokens") if name in self.inputs), None)

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return all(stack.causal for stack in self.stacks)

    @property
    def writes(self) -> bool:
        """Whether its last layers can go on token by token: those of a decoder, with an encoder before it or without."""
        return bool(self.stacks) and self.stacks[-1].causal and (len(self.stacks) == 1 or self.start is not None)


STARTS = Field(("batch", "texts"))
"""The input ``starts`` of models that can tell the texts of packed rows apart."""


def text_inputs(vocabulary: int, padding: int | None, limit: int | None, *, scored: str, **more: Field) -> Fields:
    """The inputs of a model of texts.

    Args:
      vocabulary: rows of the table of tokens.
      padding: id of padding; None: 0.
      limit: tokens that a row may have; None: any number.
      scored: axis of the targets: each token's (``length``), or those ``predicted``, whose places are an input too.
      more: further inputs.
    """
    places, targets = ("batch", "length"), ("batch", scored)
    return {
        "tokens": Field(places, fill=padding or 0, count=vocabulary),
        "mask": Field(places, value=1),
        **more,
        "positions": Field(places, count=limit),
        "segments": Field(places),
        **({"predict": Field(targets)} if scored != "length" else {}),
        "targets": Field(targets, count=vocabulary),
    }


ONE_CHOICE = 1
"""Logits of a row of a head for multiple choice: how well the row answers. Rows of one question are compared by a softmax."""
PAIR_KINDS = 2
"""Logits of a row of two texts of a head for pre-training: that they stand as they did in a document, and that they do not."""
SPAN_ENDS = 2
"""Logits of each token of a head for spans: that an answer starts there, and that it ends there."""


class FamilyConfig(Protocol):
    """A family's Config as others see it: a dataclass, whatever its fields."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]


C = TypeVar("C", bound=FamilyConfig)
OfConfig = TypeVar("OfConfig", contravariant=True)
"""The Config that a head is made from."""


class Model(Protocol):
    """A model, with adapters or without: a family's Linen module, or what stands where it stands."""

    @property
    def config(self) -> Any:
        """The family's Config, with the fields that it has there."""
        ...

    @property
    def head(self) -> str | None:
        """The name of its head; None: the bare encoder."""
        ...

    @property
    def compute(self) -> Compute:
        """How it is computed."""
        ...

    @property
    def facts(self) -> Facts:
        """What the rest of jaxft may know of it."""
        ...

    def clone(self, *, config: Any = ..., compute: Compute = ...) -> Self:
        """The same, of another Config, or computed otherwise."""
        ...

    def init(self, rngs: PRNGKeyArray, /, *args: Any, **kwargs: Any) -> Mapping[str, Tree[Labelled]]:
        """``{"params": labelled parameters}``."""
        ...

    def apply(self, variables: Mapping[str, Params], /, *args: Any, **kwargs: Any) -> Any:
        """The :class:`Output` of a batch; Linen's own signature does not say so."""
        ...


def _no_rules(config: object) -> tuple[Rule, ...]:
    del config
    return ()


@dataclass(frozen=True)
class Head(Generic[OfConfig]):
    """What a family can put on top of its encoder."""

    suffix: str
    """Ending of the reference's class, for instance ``ForMaskedLM``."""
    make: Callable[[OfConfig, Compute, str], nn.Module] | None = None
    """``(config, compute, name)`` to a module that maps (Features, dropout key or None) to logits, to a TokenScore, or to TokensAndRows.
    None: the bare encoder."""
    rules: Callable[[OfConfig], tuple[Rule, ...]] = _no_rules
    """The head's rows of the weight table."""
    marks: tuple[str, ...] = ()
    """Patterns of tensor names; a file that has all of them has this head. Heads that no tensor tells apart have the same ones; one
    that only config.json shows has none."""
    classes: Literal["rows", "tokens"] | None = None
    """What its outputs are classes of, as many as ``num_labels`` of the Config says, with names; None: no classes."""
    pooled: bool = False
    """It reads the pooled vector."""
    read_as: tuple[str, ...] = ()
    """Suffixes of further classes of the reference that are read as this head."""


AnyModel: TypeAlias = Model  # a Family has a property of that name


class Family(Protocol):
    """A module of ``jaxft.models.families``, or of another package."""

    @property
    def MODEL_TYPES(self) -> Mapping[str, str]:
        """``model_type`` of a config.json to the stem of the reference's classes; the first is the family's own."""
        ...

    @property
    def HEADS(self) -> Mapping[str | None, Head]:
        """By name; None is the bare encoder."""
        ...

    @property
    def SUPERSEDED(self) -> tuple[str, ...]:
        """Older keys of config.json for what ``config_to_hf`` writes, which an export leaves out."""
        ...

    @property
    def Config(self) -> type[FamilyConfig]:
        """Frozen dataclass of everything that changes the maths; ``num_labels`` if a head has classes."""
        ...

    @property
    def Model(self) -> Callable[..., AnyModel]:
        """``Model(config, head, compute)``; its ``facts`` are those of its config."""
        ...

    @property
    def TINY(self) -> FamilyConfig:
        """A Config that tests can afford."""
        ...

    def facts(self, config: Any) -> Facts:
        """What the rest of jaxft may know of a model of this Config."""
        ...

    def config_from_hf(self, hf: dict[str, object]) -> dict[str, object]:
        """Fields of Config that a config.json states; UserError for what is not supported."""
        ...

    def config_to_hf(self, config: Any) -> dict[str, object]:
        """The keys of config.json, without ``model_type``, ``architectures`` and names of labels."""
        ...

    def config_of_weights(self, weights: Tensors) -> dict[str, object]:
        """Fields of Config that tensors alone show; believed over config.json."""
        ...

    def hf_layout(self, config: Any, head: str | None) -> Layout:
        """The weight table, see :mod:`jaxft.hub.convert`."""
        ...


FOREIGN_HEADS: Mapping[str, tuple[str, ...]] = {
    "question_answering": ("qa_outputs.weight",),
    "sequence_classification": ("score.weight",),
}
"""Heads of the reference that a family may lack, and the tensors that show them."""


def head_of(names: Collection[str], heads: Mapping[str | None, Head]) -> str | None:
    """The head that tensor names show, of several the first; a name that ``heads`` lacks is one that is not supported, or several
    that have the same tensors."""
    marked = {name: head.marks for name, head in heads.items() if name and head.marks}
    foreign = {name: marks for name, marks in FOREIGN_HEADS.items() if marks not in marked.values()}
    known = {**foreign, **marked}
    for marks in known.values():
        if _shown(marks, names):
            return " or ".join(name for name, others in known.items() if others == marks)
    return None


def head_named(family: str, name: str | None, heads: Mapping[str | None, Head]) -> Head:
    """A family's head.

    Raises:
      UserError: the family has no such head.
    """
    if name not in heads:
        raise UserError(f"{family} has no head {name!r}: {nearest(str(name), [head for head in heads if head])}")
    return heads[name]


def architecture_of(family: Family, head: str | None, model_type: str | None = None) -> str:
    """The reference's class for a head, of a ``model_type`` of the family (None: its own)."""
    own = next(iter(family.MODEL_TYPES))
    return family.MODEL_TYPES[own if model_type is None else model_type] + family.HEADS[head].suffix


def model_type_of(family: Family, config: FamilyConfig, stated: object = None) -> str:
    """The reference's name for the kind of model that a Config is of: its own, where the family's kinds differ in their maths; else the
    one ``stated``, if the family has it; else the family's own."""
    own = getattr(config, MODEL_TYPE, stated)
    return next((kind for kind in family.MODEL_TYPES if kind == own), next(iter(family.MODEL_TYPES)))


def architectures(family: Family) -> dict[str, str | None]:
    """Every class of the reference that the family reads, and the head that it is read as: of several, the first in ``HEADS``."""
    return {name: heads[0] for name, heads in _heads_of_classes(family).items()}


def head_of_class(family: Family, stated: str, names: Collection[str]) -> str | None:
    """The head that a class of the reference is read as: of several, the first whose tensors are among ``names``."""
    heads = _heads_of_classes(family)[stated]
    return next((head for head in heads if _shown(family.HEADS[head].marks, names)), heads[0])


def _heads_of_classes(family: Family) -> dict[str, list[str | None]]:
    found: dict[str, list[str | None]] = {}
    for stem in family.MODEL_TYPES.values():
        for name, head in family.HEADS.items():
            for suffix in (head.suffix, *head.read_as):
                found.setdefault(stem + suffix, []).append(name)
    return found


def _shown(marks: Collection[str], names: Collection[str]) -> bool:
    return all(any(fnmatch.fnmatchcase(tensor, mark) for tensor in names) for mark in marks)


TIED = "tie_word_embeddings"
"""The field of a Config, where its family has the choice, that makes the table of tokens the vocabulary matrix too."""


IMAGE_SIZE = "image_size"
"""The field of a Config, where its family reads images, that says how high and wide they are."""


MODEL_TYPE = "model_type"
"""The field of a Config, where the kinds of model in its family differ in their maths, that says which one it is of."""


def classes_of(config: FamilyConfig) -> int | None:
    """How many classes the heads of a Config tell apart; None: no head of its family has classes."""
    return getattr(config, "num_labels", None)


def with_classes(config: C, count: int) -> C:
    """The Config with another number of classes."""
    return dataclasses.replace(config, num_labels=count)
