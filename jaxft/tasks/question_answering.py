"""Extractive question answering: the stretch of a context that answers a question, or that there is none (SQuAD v1 and v2).

A question and its context are a row; what is too long becomes windows of the context that overlap, each with the whole question. A
window is learnt to point at the first and the last token of the answer, and at its own first token ([CLS]) where it does not hold
the whole answer.

The n best answers of a question are exact: on the device, each window's n best spans are found among all spans of up to
``max_answer_length`` tokens of context (not among the best starts and ends, which could miss one). A span that several windows hold
counts with its highest score, so the n best of all windows are among the n best of each. The score of "no answer" is the lowest
that a window gives its first token.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.question_answering import Config
from jaxft.data.batch import Field, Fields, text_fields
from jaxft.data.encode import Column, chunks_of
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.processors.windows import Window, stripped
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks._answers import Placed, answers_of, placed_answer, tokens_of
from jaxft.tasks._squad import (
    Scored,
    after_threshold,
    answer_f1,
    averages,
    best_threshold,
    exact_match,
    gold_answers,
    normalised,
)
from jaxft.tasks.contract import Answer, Array, Arrays, Batch, Direction, Forward, LongTexts, Note, Sums, Targets

LONG_TEXTS: tuple[LongTexts, ...] = ("windows", "truncate")
PACKING = False
ROW_OPTIONS: tuple[str, ...] = ("no_answer", "unplaced_answers")
PROBLEM: str | None = None

_STRIDE = 128  # tokens that windows have in common, as in the reference's recipe; of short rows, a third of them


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    no_answer: bool = False
    null_threshold: float = 0.0
    n_best: int = 20
    max_answer_length: int = 30
    top: int | None = None
    """How many candidates an answer lists. None: it is told alone."""

    head = "question_answering"

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        best: dict[str, Direction] = {"best_f1": "max", "best_exact": "max"} if self.no_answer else {}
        return {"f1": "max", "exact_match": "max", "loss": "min", **best}

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch as it is."""
        del key
        return batch

    def weight(self, batch: Batch) -> Array:
        """The number of windows that are learnt."""
        return (batch["weights"] * batch["learnt"]).sum()

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """``loss`` and ``weight`` summed over windows: the mean of the two cross-entropies, of first and last token among all tokens
        that are no padding."""
        logits = _logits(forward, batch, key)
        logp = jax.nn.log_softmax(jnp.where(batch["mask"][..., None] > 0, logits, -1e30), axis=1)
        chosen = jax.nn.one_hot(batch["span"], logits.shape[1], axis=1)  # [B, S, 2]
        loss = -(chosen * logp).sum((1, 2)) / 2
        return {"loss": (loss * batch["weights"] * batch["learnt"]).sum(), "weight": self.weight(batch)}

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """The n best spans of each window (:meth:`predictions`), and its ``row`` [B] int32."""
        return self.predictions(forward, batch) | {"row": batch["row"], "weights": batch["weights"]}

    def predictions(self, forward: Forward, batch: Batch) -> Batch:
        """The n best spans of each window: their ``score`` [B, n] float32, -inf where there are fewer, and the characters of the context
        that they ``begin`` and ``finish`` at [B, n] int32; ``null`` [B], the score of "no answer"."""
        logits = _logits(forward, batch, None)
        starts, ends = logits[..., 0], logits[..., 1]
        there, length = batch["begin"] >= 0, logits.shape[1]
        reach = min(self.max_answer_length, length)
        ends_there = jnp.pad(jnp.where(there, ends, -jnp.inf), ((0, 0), (0, reach - 1)), constant_values=-jnp.inf)
        later = jnp.stack([ends_there[:, i : i + length] for i in range(reach)], axis=-1)  # [B, S, reach]
        scores = (jnp.where(there, starts, -jnp.inf)[..., None] + later).reshape(len(logits), length * reach)
        lacking = max(0, self.n_best - length * reach)
        scores = jnp.pad(scores, ((0, 0), (0, lacking)), constant_values=-jnp.inf)
        best, places = jax.lax.top_k(scores, self.n_best)
        first = jnp.minimum(places // reach, length - 1)
        last = jnp.minimum(first + places % reach, length - 1)
        return {
            "score": best,
            "begin": jnp.take_along_axis(batch["begin"], first, axis=1),
            "finish": jnp.take_along_axis(batch["finish"], last, axis=1),
            "null": starts[:, 0] + ends[:, 0],
        }

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, Any]:
        """The loss alone: all other scores compare texts, see :meth:`score_rows`."""
        del outputs
        return {"loss": float(sums["loss"]) / (float(sums["weight"]) or math.nan)}

    def score_rows(self, sums: Arrays, outputs: Arrays, rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """Exact match and F1 as SQuAD's official scripts define them (v2's with ``no_answer``), as shares of 1.

        With ``no_answer`` also those of questions that have an answer and of those that have none, and the best ones over all
        thresholds with these (v2's ``best_exact_thresh`` and ``best_f1_thresh``). A score of nothing is NaN.
        """
        raw = [self._scored(found, rows[row]) for row, found in self._found(outputs)]
        scored = [after_threshold(one, self.null_threshold) for one in raw] if self.no_answer else raw
        scores: dict[str, Any] = self.score(sums)
        scores["exact_match"], scores["f1"] = averages(scored)
        if self.no_answer:
            for name, has in (("HasAns", True), ("NoAns", False)):
                if kind := [one for one in scored if one.answerable == has]:
                    scores[f"{name}_exact"], scores[f"{name}_f1"] = averages(kind)
                    scores[f"{name}_rows"] = len(kind)
            for name in ("exact", "f1"):
                best, cut = best_threshold(raw, name) if raw else (math.nan, math.nan)
                scores |= {f"best_{name}": best, f"best_{name}_threshold": cut if math.isfinite(cut) else math.nan}
        return scores | {"rows": len(scored)}

    def _found(self, outputs: Arrays) -> Iterator[tuple[int, _Found]]:
        """What is said of each row, in their order."""
        order = np.argsort(outputs["row"], kind="stable")
        for row, group in groupby(order.tolist(), outputs["row"].__getitem__):
            windows = list(group)
            yield int(row), self._merged([{name: outputs[name][i] for name in _PREDICTED} for i in windows])

    def _merged(self, windows: Sequence[Arrays]) -> _Found:
        """The n best spans of all windows of a row."""
        best: dict[tuple[int, int], float] = {}
        for one in windows:
            spans = zip(one["begin"].tolist(), one["finish"].tolist(), one["score"].tolist(), strict=True)
            for begin, finish, score in spans:
                if score != -math.inf:
                    best[begin, finish] = max(score, best.get((begin, finish), score))
        order = sorted(best.items(), key=lambda item: (-item[1], item[0]))[: self.n_best]
        null = min((float(one["null"]) for one in windows), default=math.nan)
        unsaid = any(np.isnan(one["null"]) or np.isnan(one["score"]).any() for one in windows)
        return _Found([_Candidate(*span, score) for span, score in order], null, bool(unsaid))

    def _scored(self, found: _Found, row: Sequence[Any]) -> Scored:
        """How well a row is answered, before the threshold; numbers that are NaN say nothing, which is never right."""
        given = answers_of(row[2])
        golds, answerable = gold_answers([one.text for one in given], self.no_answer), bool(given)
        if found.unsaid:
            return Scored(answerable, 0.0, 0.0, -math.inf)
        text = found.text(row[1])
        said = normalised(text)
        scores = exact_match(said, golds), answer_f1(said, golds, self.no_answer)
        return Scored(answerable, *scores, found.margin, bool(text))

    def judged(self, outputs: Arrays, rows: Sequence[Sequence[Any]], order: np.ndarray) -> Iterator[dict[str, object]]:
        """For each row, its answers beside the one that is predicted: see :class:`~jaxft.tasks.contract.Judging`."""
        del order
        found = dict(self._found(outputs))
        for number, row in enumerate(rows):
            one = found[number]
            scored = self._scored(one, row)
            if self.no_answer:
                scored = after_threshold(scored, self.null_threshold)
            said = None if one.unsaid else "" if self._is_none(one) else one.text(row[1])
            yield {
                "question": row[0],
                "true": json.dumps([answer.text for answer in answers_of(row[2])], ensure_ascii=False),
                "predicted": said,
                "right": bool(scored.exact),
                "f1": round(scored.f1, 6),
                **({"null_margin": _rounded(one.margin)} if self.no_answer else {}),
            }

    def wrongness(self, judged: Mapping[str, object]) -> float | None:
        """By how much the F1 of a wrong answer is below 1: see :class:`~jaxft.tasks.contract.Grading`."""
        return None if judged["right"] else 1.0 - cast(float, judged["f1"])

    def _is_none(self, found: _Found) -> bool:
        """Whether the answer is that there is none."""
        return not found.best or (self.no_answer and found.margin > self.null_threshold)

    def learnable(self, split: Split) -> int:
        """How many windows are learnt."""
        return int(split.columns["learnt"].sum())

    def remarks(self, split: Split) -> Iterator[str]:
        """Lines on answers that are not learnt: those without a place in their context, and those that no window holds."""
        rows, learnt, answered = (split.columns[name] for name in ("row", "learnt", "answered"))
        held = split.columns["span"][:, 0] > 0
        everyone = len(np.unique(rows))
        if unplaced := len(np.unique(rows[learnt == 0])):
            yield f"{split.name}: {unplaced} of {everyone} rows have no answer that has a place in the context: they are not learnt"
        if lost := len(np.setdiff1d(rows[answered > 0], rows[held])):
            yield (
                f"{split.name}: the answers of {lost} of {everyone} rows are in no window as a whole (cut off, or longer than "
                "what windows have in common): these are learnt as having none"
            )

    def answer(self, texts: Sequence[Any], parts: Sequence[tuple[Encoded, Arrays]]) -> Answer:
        """The answer to a question, its characters in the context, and its probability among the n best (and "no answer", if that may
        be); None where there is none."""
        found = self._merged([outputs for _, outputs in parts])
        if found.unsaid:
            nothing = dict.fromkeys(("answer", "start", "end", "probability"))
            return Answer(nothing, nothing, True)
        shares = _softmax([one.score for one in found.best] + ([found.null] if self.no_answer else []))
        listed = [_told(one, texts[1], share) for one, share in zip(found.best, shares, strict=False)]
        nothing = {
            "answer": None,
            "start": None,
            "end": None,
            "probability": _rounded(shares[-1]) if self.no_answer else None,
        }
        said = nothing if self._is_none(found) else listed[0]
        cells = {**said, **({"no_answer": _rounded(shares[-1])} if self.no_answer else {})}
        return Answer(cells if self.top is None else {**cells, "candidates": listed[: self.top]}, cells)


_PREDICTED = ("score", "begin", "finish", "null")


class _Candidate(NamedTuple):
    begin: int
    finish: int
    score: float


class _Found(NamedTuple):
    """What a model says of a row."""

    best: list[_Candidate]
    """The best spans, best first; empty: the context has none."""
    null: float
    """The score of "no answer"."""
    unsaid: bool
    """The model's numbers are NaN."""

    @property
    def margin(self) -> float:
        """By how much the score of "no answer" is higher than that of the best span."""
        return self.null - self.best[0].score if self.best else math.inf

    def text(self, context: str) -> str:
        """The best span's text."""
        return context[self.best[0].begin : self.best[0].finish] if self.best else ""


def _softmax(scores: Sequence[float]) -> list[float]:
    if not scores:
        return [math.nan]
    shares = np.exp(np.array(scores) - max(scores))
    return (shares / shares.sum()).tolist()


def _told(one: _Candidate, context: str, share: float) -> dict[str, object]:
    text = context[one.begin : one.finish]
    return {"answer": text, "start": one.begin, "end": one.finish, "probability": _rounded(share)}


def _rounded(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _logits(forward: Forward, batch: Batch, key: Array | None) -> Array:
    logits = forward(batch, key).logits
    assert logits is not None  # models with this head have logits
    return logits.astype(jnp.float32)


# ------------------------------------------------------------------------------------------------------------------ rows


def columns(config: RunConfig) -> tuple[Column, ...]:
    """A question, its context, and answers.

    Raises:
      UserError: no column is named for contexts.
    """
    if config.data.text_pair is None:
        raise UserError(
            "question_answering reads a question and its context: name the columns, for instance data.text=question "
            "data.text_pair=context data.label=answers"
        )
    return Column(config.data.text, "text"), Column(config.data.text_pair, "text"), Column(config.data.label, "labels")


def study(rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
    """Nothing: questions have no classes."""
    del rows, config, stored, note
    return Targets()


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """An example per window of each row: ``tokens``, ``types``, ``begin`` and ``finish`` (the characters of the context that each token
    spans, -1: not of the context), ``row`` and, with targets, ``span`` (first and last token of the answer; both 0: the window does
    not hold it), ``answered`` (1: the row has an answer that has a place) and ``learnt`` (0: it has answers, and none with a place).

    Raises:
      UserError: answers that are none, or that are not where they are said to be; a question that leaves no room for its context.
    """
    options = config.task
    assert isinstance(options, Config)
    stride = _stride(config, tokenizer)
    for first, chunk in chunks_of(rows):
        if len(chunk[0].values) < 2:
            raise UserError(
                f"{chunk[0].where}: question_answering needs a question and its context: --text and --pair, or columns by data.text "
                "and data.text_pair"
            )
        questions, contexts = ([str(row.values[i]) for row in chunk] for i in (0, 1))
        # Before any is tokenised: what is wrong with rows is said at once.
        places = None if targets is None else [placed_answer(row, options) for row in chunk]
        found: list[list[Window]] = [[] for _ in chunk]
        for window in tokenizer.pair_windows(questions, contexts, [row.where for row in chunk], stride=stride):
            found[window.row].append(window)
        for i, windows in enumerate(found):
            yield from _examples(first + i, windows, contexts[i], None if places is None else places[i])


def _stride(config: RunConfig, tokenizer: TextProcessor) -> int | None:
    """Tokens that windows have in common; None: what is too long is cut off."""
    if config.data.long_texts == "truncate" or tokenizer.max_length is None:
        return None
    return min(_STRIDE, tokenizer.max_length // 3) if config.data.stride is None else config.data.stride


def _examples(row: int, windows: Sequence[Window], context: str, placed: Placed | None) -> Iterator[Encoded]:
    """One of each window of a row."""
    for window in windows:
        offsets = np.array(
            [stripped(context, *place) if place[0] >= 0 else place for place in window.offsets], np.int32
        ).reshape(-1, 2)
        offsets[offsets[:, 0] >= offsets[:, 1]] = -1  # tokens of blanks alone begin and end no answer
        example = {
            "tokens": np.asarray(window.ids, np.int32),
            "types": np.asarray(window.types, np.int32),
            "begin": offsets[:, 0],
            "finish": offsets[:, 1],
            "row": np.array(row, np.int32),
        }
        if placed is not None:
            last = window is windows[-1] and not window.dropped
            span = tokens_of(placed.span, offsets, window.first == 0, last)
            example |= {
                "span": np.array(span, np.int32),
                "answered": np.array(placed.span is not None, np.int32),
                "learnt": np.array(placed.span is not None or not placed.answerable, np.int32),
            }
        yield Encoded(example, row, window.dropped, window)


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of texts; ``begin`` and ``finish`` [B, S], ``span`` [B, 2], ``answered``, ``learnt`` and ``row`` [B], int32."""
    del config
    places, row = ("batch", "length"), Field(("batch",))
    of_context = {"begin": Field(places, fill=-1), "finish": Field(places, fill=-1)}
    return {
        **text_fields(pad_id),
        **of_context,
        "span": Field(("batch", 2)),
        "answered": row,
        "learnt": row,
        "row": row,
    }


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run."""
    del targets, facts, tokenizer
    return Task(options.no_answer, options.null_threshold, options.n_best, options.max_answer_length)
