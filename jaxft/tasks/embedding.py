"""A vector for each text, near those of texts that belong together (Reimers and Gurevych 2019, Sentence-BERT).

An example is a row's texts, one after the other in one row of the batch, each seen by itself alone: a text, its partner, and texts that
do not belong to it. So nothing is padded between short and long ones.

Dims: B rows, X examples of a packed row, P texts of an example, N = B or B X examples, D width.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.embedding import NEED_NUMBERS, Config
from jaxft.data.batch import Field, Fields
from jaxft.data.encode import Column, chunks_of, text_columns
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks import _contrastive as contrastive
from jaxft.tasks._contrastive import Compared
from jaxft.tasks._correlation import pearson, spearman
from jaxft.tasks._judged_vectors import judged_rows, wrongness
from jaxft.tasks._nearest import cosines, margins, names, nearest_scores, taught_cosines
from jaxft.tasks._numbers import number_of, rounded, vector_of
from jaxft.tasks._sentence_files import Sentences, read_sentences, sentence_files
from jaxft.tasks._several import joined, several_fields
from jaxft.tasks._texts import by_text
from jaxft.tasks._vectors import text_vectors
from jaxft.tasks.contract import Answer, Array, Arrays, Batch, Direction, Forward, LongTexts, Note, Sums, Targets

LONG_TEXTS: tuple[LongTexts, ...] = ("truncate",)
PACKING = True
PROBLEM: str | None = None
ROW_OPTIONS: tuple[str, ...] = (
    "loss",
    "negatives",
    "negatives_per_row",
    "teacher_width",
    "query_prompt",
    "text_prompt",
)


_SHARED = {
    "mask": "no negatives of each other",
    "apart": "in different batches of training, and no negatives of each other",
    "keep": "taken for negatives of each other",
}
"""What becomes of rows that share a text, by ``task.duplicates``."""


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    options: Config

    head = None
    unread = ("pooler",)
    """A pooler that the folder may have is kept as it is: no loss is of it."""

    @property
    def _numbered(self) -> bool:
        return self.options.loss in NEED_NUMBERS

    @property
    def _taught(self) -> bool:
        return self.options.loss == "distillation"

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        if self._taught:
            return {"loss": "min", "cosine": "max"}
        scored: tuple[str, ...] = ("spearman", "pearson")
        if self.options.loss == "margin_mse":
            scored = ("accuracy", *scored)
        elif not self._numbered:
            scored = (*names(self.options.at), *(("accuracy",) if self.options.negatives else ()))
        best: dict[str, Direction] = dict.fromkeys(scored, "max")
        return {**best, "loss": "min"}

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch as it is."""
        del key
        return batch

    def weight(self, batch: Batch) -> Array:
        """The number of examples: what the summed loss is divided by; 1 for a loss that is of the whole batch."""
        return jnp.ones(()) if self.options.loss == "cosent" else batch["weights"].sum()

    def represent(self, forward: Forward, batch: Batch, key: Array | None) -> Batch:
        """``vectors`` [B, P, D] float32 ([B, X P, D] of packed rows) of all texts: see :class:`~jaxft.tasks.contract.Comparing`."""
        # Texts are pooled here: the model need not know where they begin.
        output = forward({name: value for name, value in batch.items() if name != "starts"}, key)
        assert self.options.pooling is not None  # settled
        return {"vectors": text_vectors(self.options.pooling, output.hidden, batch)}

    def compare(self, found: Batch, batch: Batch) -> Sums:
        """``loss`` and ``weight`` summed over a batch, from the vectors of all of it."""
        seen, o = _compared(found["vectors"], batch), self.options
        losses = [
            self._loss(seen._replace(vectors=seen.vectors[..., :width]), batch) for width in o.matryoshka or (None,)
        ]
        return {"loss": jnp.stack(losses).sum(), "weight": self.weight(batch)}

    def _loss(self, seen: Compared, batch: Batch) -> Array:
        o = self.options
        if o.loss == "ranking":
            return contrastive.ranking(
                seen, o.scale, both=o.directions == "both", mask_duplicates=o.duplicates != "keep"
            )
        if o.loss == "triplet":
            return contrastive.triplet(seen, o.margin, euclidean=o.distance == "euclidean")
        if self._taught:
            # Of the vectors that the model gives, as a teacher's are those that it gives.
            vectors = contrastive.unit(seen.vectors) if o.normalize else seen.vectors
            return contrastive.distillation(seen._replace(vectors=vectors), _teachers(batch))
        numbers = by_text(batch["labels"])
        if o.loss == "cosent":
            return contrastive.cosent(seen, numbers, o.scale)
        return contrastive.cosine(seen, numbers) if o.loss == "cosine" else contrastive.margin_mse(seen, numbers)

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """``loss`` and ``weight`` summed over a batch. A loss that compares texts of a batch depends on what is in it: of held-out rows,
        on ``eval.batch_size`` too."""
        return self.compare(self.represent(forward, batch, key), batch)

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """``vectors`` [N, P, D] beside ``texts`` [N, P], ``weights`` and ``labels`` [N], or ``teacher`` [N, D]."""
        seen = _compared(self.represent(forward, batch, None)["vectors"], batch)
        if self._taught:
            return {**seen._asdict(), "teacher": _teachers(batch)}
        return {**seen._asdict(), **({"labels": by_text(batch["labels"])} if self._numbered else {})}

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, object]:
        """The final numbers: of rows with numbers, how well cosines follow them; of others, how well texts find their partners."""
        assert outputs is not None
        vectors, texts = outputs["vectors"], outputs["texts"]
        found: dict[str, object] = {"loss": float(sums["loss"]) / (float(sums["weight"]) or math.nan)}
        if self._taught:
            near = taught_cosines(vectors, texts, outputs["teacher"])
            return {**found, "cosine": float(near.mean()) if len(near) else math.nan, "rows": len(texts)}
        near = cosines(vectors)
        if self._numbered:
            said, labels = near[:, 0], outputs["labels"].astype(np.float64)
            if self.options.loss == "margin_mse":
                said = margins(vectors)
            found |= {"spearman": spearman(said, labels), "pearson": pearson(said, labels)}
        else:
            found |= nearest_scores(vectors, texts, self.options.at)
        if self.options.negatives:
            there = texts[:, 2:] >= 0
            wins = (near[:, :1] > near[:, 1:]) & there
            found["accuracy"] = float(wins.sum() / there.sum()) if there.any() else math.nan
        return {**found, "rows": len(texts)}

    def learnable(self, split: Split) -> int:
        """The number of rows."""
        return len(split)

    def remarks(self, split: Split) -> Iterator[str]:
        """A line on rows that share a partner or a text, which a ranking loss would otherwise take for negatives of each other."""
        if self._numbered or self._taught:
            return
        texts = split.columns["texts"]
        shared = len(texts) - min(len(np.unique(texts[:, 0])), len(np.unique(texts[:, 1])))
        if shared and self.options.loss == "ranking":
            yield (
                f"{split.name}: {shared} of {len(texts)} rows have a text or a partner that another row has; "
                f"{_SHARED[self.options.duplicates]} (task.duplicates)"
            )

    def predictions(self, forward: Forward, batch: Batch) -> Batch:
        """``vectors`` [B, P, D] of each row's texts, of length 1 if the model gives them so."""
        vectors = self.represent(forward, batch, None)["vectors"]
        return {"vectors": contrastive.unit(vectors) if self.options.normalize else vectors}

    def answer(self, texts: Sequence[object], parts: Sequence[tuple[Encoded, Arrays]]) -> Answer:
        """The vector of a text; of a pair those of both, and their cosine."""
        vectors = parts[0][1]["vectors"][: len(texts)]
        said: dict[str, object] = {
            name: [rounded(number) for number in vector.tolist()]
            for name, vector in zip(("embedding", "pair_embedding"), vectors, strict=False)
        }
        if len(texts) > 1:
            said = {"similarity": rounded(float(cosines(vectors[None])[0, 0])), **said}
        cells = {name: json.dumps(value) if isinstance(value, list) else value for name, value in said.items()}
        return Answer(said, cells, bool(np.isnan(vectors).any()))

    def judged(
        self, outputs: Arrays, rows: Sequence[Sequence[object]], order: np.ndarray
    ) -> Iterator[dict[str, object]]:
        """For each row its texts and their cosine, beside what its loss is of (:mod:`jaxft.tasks._judged_vectors`): see
        :class:`~jaxft.tasks.contract.Judging`."""
        back = order.argsort()
        return judged_rows(self.options, {name: values[back] for name, values in outputs.items()}, rows)

    def wrongness(self, judged: Mapping[str, object]) -> float | None:
        """How far off a row's vectors are: see :class:`~jaxft.tasks.contract.Grading`."""
        return wrongness(judged)

    def files(self, width: int, max_length: int | None) -> dict[str, str]:
        """What an export has besides: see :class:`~jaxft.tasks.contract.Accompanied`."""
        o = self.options
        said = Sentences(o.pooling or "mean", bool(o.normalize), o.query_prompt or "", o.text_prompt or "")
        return sentence_files(said, width, max_length)


def _compared(vectors: Array, batch: Batch) -> Compared:
    """The texts of a batch, whether rows hold one example each or several."""
    texts = batch["texts"].reshape(-1, batch["texts"].shape[-1])
    return Compared(vectors.reshape(*texts.shape, vectors.shape[-1]), texts, by_text(batch["weights"]))


def _teachers(batch: Batch) -> Array:
    """[N, D], whether rows hold one example each or several."""
    return batch["teacher"].reshape(-1, batch["teacher"].shape[-1])


def texts_of_row(options: Config) -> int:
    """Texts of up to ``data.max_length`` tokens each that a row can have."""
    return options.texts


def adopted(options: Config, folder: Path, note: Note) -> Config:
    """The options with what a model's folder says where they say nothing; mean pooling to length 1 where it says nothing either.

    Raises:
      UserError: the folder has modules of sentence-transformers that are not supported.
    """
    asked = {name: getattr(options, name) for name in ("pooling", "normalize", "query_prompt", "text_prompt")}
    if None not in asked.values():
        return options
    said = read_sentences(folder)
    if said is None:
        said = Sentences("mean", True)
        if options.pooling is None:
            note(
                f"{folder} does not say how texts become vectors (no modules.json): by the mean of their tokens (task.pooling)"
            )
    found = {name: getattr(said, name) if value is None else value for name, value in asked.items()}
    return dataclasses.replace(options, **found)


def _options(config: RunConfig) -> Config:
    assert isinstance(config.task, Config)  # of its own module
    return config.task


def columns(config: RunConfig) -> tuple[Column, ...]:
    """A text, its partner, its negatives, and the number of the row if the loss is of one; a text, its translation if one is named, and a
    teacher's vector. Without a column of partners, texts alone, which are answered but not learnt of."""
    data, options = config.data, _options(config)
    if options.loss == "distillation":
        return (*text_columns(data), Column(data.label, "numbers"))
    if data.text_pair is None:
        return text_columns(data)
    found = [*text_columns(data), *(Column(name, "texts") for name in options.negatives)]
    return (*found, Column(data.label, "number")) if options.loss in NEED_NUMBERS else tuple(found)


def study(rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
    """Nothing: there are no classes.

    Raises:
      UserError: no column is named for partners.
    """
    del rows, stored, note
    _refuse_alone(config)
    return Targets()


def _refuse_alone(config: RunConfig) -> None:
    if config.data.text_pair is None and _options(config).loss != "distillation":
        raise UserError(
            "embedding learns of texts that belong together: name the columns, for instance data.text=query data.text_pair=passage"
        )


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """An example per row: tokens and types of its texts, one after the other; which text and place each is of (``segments`` from 1,
    ``positions`` from 0), where each begins (``starts``), what text it is by number (``texts``, -1: there is none) and, if the loss is of
    one, the row's number (``labels``) or vector (``teacher``)."""
    options = _options(config)
    if targets is not None:
        _refuse_alone(config)
    numbers: dict[bytes, int] = {}
    numbered = targets is not None and options.loss in NEED_NUMBERS
    for first, chunk in chunks_of(rows):
        texts = [_texts_of(row, options, trained=targets is not None) for row in chunk]
        encoded = iter(tokenizer.encode([text for of_row in texts for text in of_row]))
        for i, (row, of_row) in enumerate(zip(chunk, texts, strict=True)):
            example, dropped = joined([next(encoded) for _ in of_row], options.texts)
            kinds = np.full(options.texts, -1, np.int32)
            kinds[: len(of_row)] = [numbers.setdefault(_digest(text), len(numbers)) for text in of_row]
            example |= {"texts": kinds}
            if targets is not None and options.teacher_width is not None:
                example["teacher"] = vector_of(row, config.data.label, options.teacher_width)
            if numbered:
                example["labels"] = np.asarray(number_of(row, config.data.label), np.float32)
            yield Encoded(example, first + i, dropped)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def _texts_of(row: Row, options: Config, *, trained: bool) -> list[str]:
    """A row's texts with their prompts, as many as it has."""
    query, other = options.query_prompt or "", options.text_prompt or ""
    if not trained and len(row.values) == 1:
        return [(query if options.embed_as == "query" else other) + str(row.values[0])]
    if trained and options.loss == "distillation":  # no text looks for the other: they are the same
        return [f"{other}{text}" for text in row.values[:-1]]
    found = [query + str(row.values[0]), other + str(row.values[1])]
    if not trained:
        return found
    for name, value in zip(options.negatives, row.values[2:], strict=False):
        listed = value if isinstance(value, list) else [value]
        if any(not isinstance(text, str) or not text.strip() for text in listed):
            raise UserError(
                f"{row.where}: column {name!r} holds {value!r:.60}; expected a text, or a list of texts (task.negatives)"
            )
        found += [f"{other}{text}" for text in listed]
    if options.loss in ("triplet", "margin_mse") and len(found) < 3:
        raise UserError(f"{row.where}: no negative, and task.loss={options.loss} is of three texts; remove the row")
    return found[: options.texts]


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of texts with ``segments`` and ``positions`` [B, S], ``starts`` and ``texts`` [B, P], and ``labels`` [B] float32
    if the loss is of numbers; ``teacher`` [B, D] float32 if it is of these."""
    options = _options(config)
    if options.teacher_width is not None:
        numbers: dict[str, Field] = {"teacher": Field(("batch", options.teacher_width), "float32")}
    else:
        numbers = {"labels": Field(("batch",), "float32")} if options.loss in NEED_NUMBERS else {}
    texts = Field(("batch", options.texts), fill=-1, apart=options.duplicates == "apart")
    return {**several_fields(pad_id, options.texts), "texts": texts, **numbers}


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run.

    Raises:
      UserError: vectors are to be cut wider than they are, or a teacher's have another width.
    """
    del targets, tokenizer
    width = facts.stacks[-1].width if facts.stacks else math.inf
    if any(cut > width for cut in options.matryoshka):
        raise UserError(f"task.matryoshka={list(options.matryoshka)}: the model's vectors have {width} numbers")
    if options.teacher_width is not None and facts.stacks and options.teacher_width != width:
        raise UserError(
            f"task.teacher_width={options.teacher_width}: the model's vectors have {width} numbers; a student learns vectors "
            "of its own width"
        )
    return Task(dataclasses.replace(options, pooling=options.pooling or "mean"))
