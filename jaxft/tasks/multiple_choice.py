"""Which of several answers is right (Zellers et al. 2018, SWAG): a number for each, compared by a softmax.

An example is a question with each of its answers, one after the other in a row of the batch, each seen by itself alone.

Dims: B rows, X examples of a packed row, P answers that a question can have, N = B or B X examples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.multiple_choice import Config
from jaxft.data.batch import Field, Fields
from jaxft.data.encode import Column, chunks_of, label_column, text_columns
from jaxft.data.examples import Encoded, Split
from jaxft.data.labels import label_text
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks._numbers import rounded
from jaxft.tasks._several import joined, several_fields
from jaxft.tasks._texts import by_text
from jaxft.tasks.contract import Answer, Array, Arrays, Batch, Direction, Forward, LongTexts, Note, Sums, Targets

LONG_TEXTS: tuple[LongTexts, ...] = ("truncate",)
PACKING = True
ROW_OPTIONS: tuple[str, ...] = ("choices", "most_choices")
PROBLEM: str | None = None
_NEVER = -1e30  # of an answer that there is not; minus infinity would make gradients NaN


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    choices: int = 1
    """Columns of answers that a row has before its label."""

    head = "multiple_choice"

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        return {"accuracy": "max", "loss": "min"}

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch with ``starts`` as models take them: [B, P], or [B, X P] of packed rows."""
        del key
        return _flat(batch)

    def weight(self, batch: Batch) -> Array:
        """The number of questions: what the summed loss is divided by."""
        return batch["weights"].sum()

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """``loss`` and ``weight`` summed over a batch: the cross-entropy of the right answer among those of its question."""
        logits, labels = _logits(forward, batch, key), by_text(batch["labels"])
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
        return {"loss": (losses * by_text(batch["weights"])).sum(), "weight": self.weight(batch)}

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """``probabilities`` [N, P] of the answers, beside ``labels`` and ``weights`` [N]."""
        found = {"probabilities": jax.nn.softmax(_logits(forward, batch, None))}
        return found | {name: by_text(batch[name]) for name in ("labels", "weights")}

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, object]:
        """How often the likeliest answer is right; a question whose probabilities are NaN is wrong."""
        assert outputs is not None
        right, rows = _is_right(outputs), len(outputs["labels"])
        loss = float(sums["loss"]) / (float(sums["weight"]) or math.nan)
        return {"loss": loss, "accuracy": float(right.mean()) if rows else math.nan, "rows": rows}

    def learnable(self, split: Split) -> int:
        """The number of rows."""
        return len(split)

    def predictions(self, forward: Forward, batch: Batch) -> Batch:
        """``probabilities`` [B, P] of each question's answers."""
        return {"probabilities": jax.nn.softmax(_logits(forward, batch, None))}

    def answer(self, texts: Sequence[object], parts: Sequence[tuple[Encoded, Arrays]]) -> Answer:
        """The likeliest answer, its number from 0, and the probability of each, in their order."""
        encoded, found = parts[0]
        choices = encoded.origin
        assert isinstance(choices, tuple)  # as encode has left it
        shares = [rounded(float(share)) for share in found["probabilities"][: len(choices)]]
        unsaid = None in shares
        best = None if unsaid else int(np.argmax(found["probabilities"][: len(choices)]))
        said = {"choice": best, "answer": None if best is None else choices[best], "probabilities": shares}
        return Answer(said, said | {"probabilities": json.dumps(shares)}, unsaid)

    def judged(
        self, outputs: Arrays, rows: Sequence[Sequence[object]], order: np.ndarray
    ) -> Iterator[dict[str, object]]:
        """For each row its question, the right answer and the likeliest, by number, and the probability of the right one: see
        :class:`~jaxft.tasks.contract.Judging`."""
        back = order.argsort()
        shares, labels = outputs["probabilities"][back], outputs["labels"][back]
        for row, share, label in zip(rows, shares, labels.tolist(), strict=True):
            best = None if np.isnan(share).any() else int(share.argmax())
            words = [text for one in row[-1 - self.choices : -1] for text in (one if isinstance(one, list) else [one])]
            yield {
                "text": row[0],
                "true": label,
                "choice": best,
                "probability": rounded(float(share[label])),
                "right": best == label,
                "true_answer": words[label],
                "answer": None if best is None else words[best],
            }

    def wrongness(self, judged: Mapping[str, object]) -> float | None:
        """How far the right answer's probability is below 1, where another is likelier: see :class:`~jaxft.tasks.contract.Grading`."""
        probability = cast("float | None", judged["probability"])
        return None if judged["right"] else math.inf if probability is None else 1 - probability


def _is_right(outputs: Arrays) -> np.ndarray:
    shares = outputs["probabilities"]
    return (shares.argmax(1) == outputs["labels"]) & ~np.isnan(shares).any(1) if len(shares) else np.zeros(0, bool)


def _flat(batch: Batch) -> Batch:
    starts = batch["starts"]
    return batch if starts.ndim == 2 else {**batch, "starts": starts.reshape(len(starts), -1)}


def _logits(forward: Forward, batch: Batch, key: Array | None) -> Array:
    """[N, P] float32, of answers that there are not next to minus infinity."""
    logits = forward(_flat(batch), key).logits
    assert logits is not None  # its head gives one for each text
    counts = by_text(batch["counts"])[:, None]
    found = logits[..., 0].astype(jnp.float32).reshape(len(counts), -1)
    # An example that only fills up the batch has no answers: all of them are as good as none.
    return jnp.where((jnp.arange(found.shape[1]) < counts) | (counts == 0), found, _NEVER)


def texts_of_row(options: Config) -> int:
    """Pairs of a question and an answer, of up to ``data.max_length`` tokens each, that a row can have."""
    return options.most


def _options(config: RunConfig) -> Config:
    assert isinstance(config.task, Config)  # of its own module
    return config.task


def columns(config: RunConfig) -> tuple[Column, ...]:
    """The question, what each answer begins with if there is such a text, the answers, and which one is right."""
    choices = (Column(name, "words") for name in _options(config).choices)
    return (*text_columns(config.data), *choices, label_column(config.data))


def study(rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
    """Nothing: answers are told by their place.

    Raises:
      UserError: ``data.labels`` names classes.
    """
    del rows, stored, note
    if config.data.labels is not None:
        raise UserError(
            "data.labels: multiple_choice has no classes, but the number or the words of the right answer; leave it out"
        )
    return Targets()


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """An example per row: the fields of :func:`~jaxft.tasks._several.joined` for the question with each of its answers, how many there
    are (``counts``) and, with targets, the number of the right one (``labels``). ``origin`` holds the answers.

    Raises:
      UserError: a row with fewer than two answers, more than ``task.most_choices``, or a label that is none of them.
    """
    paired = config.data.text_pair is not None
    for first, chunk in chunks_of(rows):
        choices = [_choices(row, config) for row in chunk]
        before = [f"{row.values[1]} " if paired else "" for row in chunk]
        texts = [str(row.values[0]) for row, mine in zip(chunk, choices, strict=True) for _ in mine]
        answers = [start + text for start, mine in zip(before, choices, strict=True) for text in mine]
        encoded = iter(tokenizer.encode(texts, answers))
        for i, (row, mine) in enumerate(zip(chunk, choices, strict=True)):
            example, dropped = joined([next(encoded) for _ in mine], _options(config).most)
            example["counts"] = np.asarray(len(mine), np.int32)
            if targets is not None:
                example["labels"] = np.asarray(_right(row, mine, config.data.label), np.int32)
            yield Encoded(example, first + i, dropped, mine)


def _choices(row: Row, config: RunConfig) -> tuple[str, ...]:
    options, first = _options(config), 1 if config.data.text_pair is None else 2
    values = row.values[first : first + len(options.choices)]
    found = [text for value in values for text in (value if isinstance(value, list) else [value])]
    if len(found) < 2 or len(found) > options.most:
        few = f"has {len(found)} answers to choose from (columns {', '.join(options.choices)}: task.choices)"
        why = "a question needs two" if len(found) < 2 else f"task.most_choices is {options.most}"
        raise UserError(f"{row.where}: {few}; {why}")
    return tuple(map(str, found))


def _right(row: Row, choices: Sequence[str], column: str) -> int:
    """The number of the right answer: as the row has it, or that of the answer with these words."""
    value = row.values[-1]
    name = label_text(value)
    if name.isdecimal() and int(name) < len(choices) and name not in choices:
        return int(name)
    if choices.count(name) == 1:
        return choices.index(name)
    raise UserError(
        f"{row.where}: column {column!r} holds {value!r:.60}; expected the number of the right answer, 0 to {len(choices) - 1}, or its "
        "words"
    )


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of rows of several texts, and ``counts`` and ``labels`` [B]."""
    whole = Field(("batch",))
    return {**several_fields(pad_id, _options(config).most), "counts": whole, "labels": whole}


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run."""
    del targets, facts, tokenizer
    return Task(len(options.choices))
