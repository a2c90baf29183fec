"""The notebook user's entry: ``model, params, tokenizer = jaxft.load("path-or-hub-id")``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax import Array
from jaxtyping import PyTree

from jaxft.data.processors.opened import FILES, has_processor, open_processor
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.data.processors.tokenizer_checks import check_vocabulary
from jaxft.data.thresholds import beside
from jaxft.errors import UserError, nearest
from jaxft.hub.pretrained import check_changes, export_folder, load_params
from jaxft.hub.source import Note, Source, open_source
from jaxft.layers import Compute
from jaxft.models.contract import Model, classes_of
from jaxft.trees import paths_of


@dataclass(frozen=True)
class Loaded:
    """What :func:`load` gives; unpacks into (model, params, tokenizer)."""

    model: Model
    """A Linen module: ``model.apply({"params": params}, **inputs)`` is an :class:`~jaxft.models.contract.Output`."""
    params: PyTree[Array]
    tokenizer: Any
    """Tokenizer, or :class:`~jaxft.data.processors.image.ImageProcessor` of a model that reads images; None: the folder has no files of
    one."""
    labels: tuple[str, ...] | None
    source: Source

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.params, self.tokenizer))

    def save(
        self, folder: str | Path, params: PyTree[Array] | None = None, labels: Sequence[str] | None = None
    ) -> None:
        """Writes a folder in Hugging Face layout, with the tokenizer and config.json of the folder it was loaded from.

        Args:
          folder: to write; must not exist, or be empty.
          params: of the same tree, trained since, say; None: as loaded.
          labels: names of the classes in the order of their ids; None: as loaded.

        Raises:
          UserError: the folder exists, or parameters or labels do not fit the model.
        """
        params = self.params if params is None else params
        ours, given = ({path: leaf.shape for path, leaf in paths_of(tree).items()} for tree in (self.params, params))
        if ours != given:
            other = sorted(path for path in {*ours, *given} if ours.get(path) != given.get(path))
            raise UserError(
                f"params are not of this model: {', '.join(other[:4])} differ; give the tree that load gave"
            )
        if labels is not None and not self.source.family.HEADS[self.model.head].classes:
            raise UserError(f"labels: the model's head is {self.model.head}, which has no classes")
        export_folder(
            folder,
            self.source.hf_config,
            self.source.family,
            self.model,
            params,
            tokenizer=self.tokenizer,
            tokenizer_folder=self.source.folder,
            source_folder=self.source.folder,
            note=lambda text: None,
            labels=self.labels if labels is None else tuple(labels),
            files=beside(self.source.folder) if self._is_stored(params, labels) else None,
        )

    def _is_stored(self, params: PyTree[Array], labels: Sequence[str] | None) -> bool:
        """Whether parameters, head and labels are those of the folder, so that what was tuned for them still holds."""
        return (
            params is self.params
            and self.model.head == self.source.head
            and not self.source.changes
            and self.labels == self.source.labels  # of a fresh head, the folder's are not known
            and (labels is None or tuple(labels) == self.labels)
        )


def load(
    reference: str | Path,
    *,
    head: str | None = "stored",
    family: str | None = None,
    labels: Sequence[str] | None = None,
    compute: Compute | None = None,
    max_length: int | None = None,
    note: Note = print,
    **arch: object,
) -> Loaded:
    """A model with its parameters and tokenizer, from a folder in Hugging Face layout or a hub id.

    Args:
      reference: a path, ``pkg:PACKAGE/FOLDER``, or a hub id ``ORG/NAME`` or ``NAME``.
      head: ``stored``: the one the weights have, nothing of it random; None: the bare model; or a head name of the family
        (fresh if absent).
      family: module of ``jaxft.models``, for folders that do not say; None: what config.json says.
      labels: names of the classes, in the order of their ids. The stored head is kept if its own names are these, or if it
        has none and as many classes; with ``head="classification"`` another one is made afresh.
      compute: types and execution mode; None: all float32.
      max_length: tokens kept per text; None: the model's position limit.
      note: called with a line for everything that was guessed, initialised or left unused.
      arch: changes to the architecture that the weights allow, for instance ``hidden_dropout_prob=0.0``,
        ``num_hidden_layers=6`` (the first six).

    Raises:
      UserError: the folder, its config or its weights are not usable, or contradict what is asked for; says why.

    Example:
      >>> model, params, tokenizer = jaxft.load("runs/wordnet8/export")
      >>> out = model.apply({"params": params}, **tokenizer(["a small striped cat"]))
      >>> out.logits.argmax(-1)
    """
    if labels is not None:
        arch = {**arch, "num_labels": _class_count(labels, arch)}
    source = open_source(reference, note, family=family, arch=arch, as_shown=True)
    wanted = source.stored_head() if head == "stored" else head
    if wanted not in source.family.HEADS:
        raise UserError(f"head={wanted!r}: {nearest(str(wanted), [name for name in source.family.HEADS if name])}")
    check_changes(source, wanted, note)
    fresh = _needs_fresh_head(source, wanted, labels, stored=head == "stored")
    if fresh:
        hf_config = {key: value for key, value in source.hf_config.items() if key != "problem_type"}
        source = dataclasses.replace(source, hf_config=hf_config, labels=None)
    model = source.family.Model(source.config, wanted, Compute() if compute is None else compute)
    params = load_params(source, model, note, fresh_head=fresh)
    processor, facts = None, model.facts
    if not has_processor(source.folder, facts.inputs):
        what = "tokenizer" if facts.processor == "text" else "processor"
        note(f"{source.folder} has no {FILES[facts.processor]}: the {what} is None")
    elif facts.processor == "text":
        processor = Tokenizer(source.folder, max_length or facts.limit, facts.inputs, source.family_name)
        check_vocabulary(processor, facts.inputs)
    else:
        stored = source.family.facts(source.stored).inputs if source.changes else None
        processor = open_processor(source.folder, None, facts.inputs, source.family_name, stored)
    return Loaded(model, params, processor, source.labels if labels is None else tuple(labels), source)


def _class_count(labels: Sequence[str], arch: Mapping[str, object]) -> int:
    names = list(labels)
    if isinstance(labels, str) or len(set(names)) != len(names) or not names:
        raise UserError(f"labels={labels!r}: expected a list of different names")
    if arch.get("num_labels", len(names)) != len(names):
        raise UserError(f"labels names {len(names)} classes, num_labels={arch['num_labels']}; leave num_labels out")
    return len(names)


def _needs_fresh_head(source: Source, head: str | None, labels: Sequence[str] | None, *, stored: bool) -> bool:
    """Whether the head that was asked for is another than the folder's.

    Args:
      head: to be loaded.
      labels: of its classes, if they were given.
      stored: refuse rather than make a head.
    """
    heads = source.family.HEADS
    if not heads[head].classes:
        if labels is not None or "num_labels" in source.changes:
            have = " or ".join(f'head="{name}"' for name, one in heads.items() if one.classes)
            raise UserError(
                f"{source.folder}: labels and num_labels are of heads with classes, this is {head or 'none'}; for a fresh one "
                f"add {have or 'none: the family has no such head'}"
            )
        return False
    if source.head != head:
        return True
    classes, wanted = source.classes, classes_of(source.config)
    if wanted == classes and (labels is None or source.labels in (None, tuple(labels))):
        return False
    if stored:
        names = f" ({', '.join(source.labels[:20])})" if source.labels else ""
        raise UserError(
            f"{source.folder}: the stored head has {classes} classes{names}, not those asked for ({wanted}); for a fresh head "
            f'add head="{head}"'
        )
    return True
