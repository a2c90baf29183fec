"""Labels of words in a text: named entities, parts of speech.

Rows are lists of words with a label each, or texts with labelled stretches of characters. A word is predicted at its first piece; of a
row that is cut into windows, each word counts in one of them alone, where it has the most context: so in the loss, in scores and in
answers each word is there once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.token_classification import Config
from jaxft.data.batch import Field, Fields, text_fields
from jaxft.data.encode import Column, chunks_of
from jaxft.data.examples import Encoded, Split
from jaxft.data.labels import class_ids, label_text, renamed_labels
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.processors.windows import Window
from jaxft.data.sources.read import shown
from jaxft.data.sources.rows import Row
from jaxft.data.tag_names import ENTITY_MARKS, TagNames
from jaxft.data.tagging import Scheme, continuations, counting, entities_of, label_pieces, tags_of_spans, word_spans
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks._classes import class_names, distinct
from jaxft.tasks._entities import entity_scores, token_scores
from jaxft.tasks._focal import focal
from jaxft.tasks._texts import at_tokens
from jaxft.tasks.contract import Answer, Array, Arrays, Batch, Direction, Forward, LongTexts, Note, Sums, Targets

LONG_TEXTS: tuple[LongTexts, ...] = ("windows", "truncate")
PACKING = True
ROW_OPTIONS: tuple[str, ...] = ("scheme", "label_pieces")
PROBLEM: str | None = None
LABEL_MAP = True
"""``data.label_map`` is obeyed here: it names entities, which stand in tags."""


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    labels: tuple[str, ...]
    """Tags in the order of class ids."""
    focal_gamma: float = 0.0
    """Power of 1 - p that a token's loss is multiplied by (Lin et al. 2017)."""

    head = "token_classification"

    @property
    def _entities(self) -> bool:
        """Whether tags say where entities begin and go on."""
        return any(label.startswith(ENTITY_MARKS) for label in self.labels)

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        of_entities: dict[str, Direction] = {"f1": "max", "precision": "max", "recall": "max", "macro_entity_f1": "max"}
        of_words: dict[str, Direction] = {"accuracy": "max", "macro_f1": "max", "loss": "min"}
        return {**of_entities, **of_words} if self._entities else of_words

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch as it is."""
        del key
        return batch

    def weight(self, batch: Batch) -> Array:
        """The number of labelled tokens."""
        return _learnt(batch).sum()

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """``loss`` and ``weight`` summed over the labelled tokens of a batch."""
        logits, learnt = _logits(forward, batch, key), _learnt(batch)
        chosen = jax.nn.one_hot(jnp.maximum(batch["labels"], 0), len(self.labels))
        loss = -(chosen * focal(jax.nn.log_softmax(logits, axis=-1), self.focal_gamma)).sum(-1)
        return {"loss": (loss * learnt).sum(), "weight": learnt.sum()}

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """Numbers of each word that counts, [B * S]: its ``row`` and its place there (``word``), its label and the one that is
        ``predicted``, int32."""
        logits = _logits(forward, batch, None)
        sound = ~jnp.isnan(logits).any(-1)
        found = {
            "predicted": jnp.where(sound, logits.argmax(-1), -1).astype(jnp.int32),
            "labels": batch["labels"],
            "word": batch["word"],
            "row": jnp.broadcast_to(at_tokens(batch["row"], batch), batch["word"].shape),
            "weights": batch["counts"] * at_tokens(batch["weights"], batch),
        }
        return {name: value.reshape(-1) for name, value in found.items()}

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, Any]:
        """Scores of words: accuracy, F1 by tag. Where tags mark entities, precision, recall and F1 of these as seqeval scores them,
        ``f1`` over all of them. A score of nothing is NaN."""
        assert outputs is not None
        sentences = list(self._sentences(outputs))
        true, predicted = [one.true for one in sentences], [one.predicted for one in sentences]
        words = token_scores(true, predicted, outside="O" if self._entities else None)
        scores: dict[str, Any] = {"loss": float(sums["loss"]) / (float(sums["weight"]) or math.nan)}
        table = words["tags"]
        if self._entities:
            found = entity_scores(true, predicted)
            scores |= {name: found["micro"][name] for name in ("f1", "precision", "recall")}
            scores["macro_entity_f1"] = found["macro"]["f1"]
            table = found["labels"]
        scores |= {"accuracy": words["accuracy"], "macro_f1": words["macro"]["f1"]}
        scores |= {"rows": len(sentences), "words": sum(map(len, true))}
        scores["classes"] = {name: _with_rows(row) for name, row in table.items()}
        if self._entities:
            scores["tags"] = {name: _with_rows(row) for name, row in words["tags"].items()}
        return scores

    def _sentences(self, outputs: Arrays) -> Iterator[_Sentence]:
        """The rows in their order, with the words that count."""
        order = np.lexsort((outputs["word"], outputs["row"]))
        rows, words, true, predicted = (
            outputs[name][order].tolist() for name in ("row", "word", "labels", "predicted")
        )
        for row, group in groupby(range(len(rows)), rows.__getitem__):
            places = list(group)
            yield _Sentence(
                row,
                [words[i] for i in places],
                [self.labels[true[i]] for i in places],
                # A model whose numbers are NaN says nothing: that is never right, and no entity (as "." is none).
                [self.labels[predicted[i]] if predicted[i] >= 0 else ".NaN" for i in places],
            )

    def judged(self, outputs: Arrays, rows: Sequence[Sequence[Any]], order: np.ndarray) -> Iterator[dict[str, object]]:
        """For each row, its tags beside those predicted: see :class:`~jaxft.tasks.contract.Judging`."""
        del order
        found = {one.row: one for one in self._sentences(outputs)}
        for number, row in enumerate(rows):
            one = found.get(number, _Sentence(number, [], [], []))
            text = row[0] if isinstance(row[0], str) else " ".join(map(str, row[0]))
            right = one.true == one.predicted
            yield {"text": text, "true": " ".join(one.true), "predicted": " ".join(one.predicted), "right": right}

    def wrongness(self, judged: Mapping[str, object]) -> float | None:
        """How many words have a wrong tag: see :class:`~jaxft.tasks.contract.Grading`."""
        if judged["right"]:
            return None
        tags = (str(judged[name]).split(" ") for name in ("true", "predicted"))
        return float(sum(true != said for true, said in zip(*tags, strict=False)))

    def learnable(self, split: Split) -> int:
        """How many tokens have a label."""
        return int((split.columns["labels"] >= 0).sum())

    def predictions(self, forward: Forward, batch: Batch) -> Batch:
        """The tag of each token and its probability: ``tag`` int32 and ``score`` float32 [B, S]."""
        probabilities = jax.nn.softmax(_logits(forward, batch, None), axis=-1)
        return {"tag": probabilities.argmax(-1).astype(jnp.int32), "score": probabilities.max(-1)}

    def answer(self, texts: Sequence[Any], parts: Sequence[tuple[Encoded, Arrays]]) -> Answer:
        """The entities of a text, with their places in it; of tags that mark none, each word with its tag. A word's score is the
        probability of its tag, an entity's the mean of its words'."""
        said: dict[int, tuple[str, float]] = {}
        for encoded, outputs in parts:
            for place in np.flatnonzero(encoded.example["counts"]).tolist():
                word = int(encoded.example["word"][place])
                said[word] = self.labels[int(outputs["tag"][place])], float(outputs["score"][place])
        words = _words(texts[0], [cast(Window, encoded.origin) for encoded, _ in parts])
        unsaid = any(math.isnan(score) for _, score in said.values())
        # A word of which the tokenizer makes nothing is in no entity.
        tags, scores = (
            zip(*(said.get(i, ("O", math.nan)) for i in range(len(words))), strict=True) if words else ((), ())
        )
        if unsaid:
            nothing = {"entities" if self._entities else "words": None}
            return Answer(nothing, nothing, True)
        if self._entities:
            made = [
                _joined(words[first:stop], label, scores[first:stop], texts[0])
                for label, first, stop in entities_of(tags)
            ]
            record: dict[str, list[Said]] = {"entities": made}
        else:
            made = [
                {**word, "label": tag, "score": _rounded(score)}
                for word, tag, score in zip(words, tags, scores, strict=True)
            ]
            record = {"words": made}
        return Answer(record, {name: json.dumps(value, ensure_ascii=False) for name, value in record.items()})


Said = dict[str, Any]
"""A word or an entity as answers tell it: texts, places and a score."""


class _Sentence(NamedTuple):
    row: int
    words: list[int]
    true: list[str]
    predicted: list[str]


def _with_rows(row: Mapping[str, float]) -> dict[str, float]:
    return {**{name: row[name] for name in ("precision", "recall", "f1")}, "rows": int(row["support"])}


def _rounded(score: float) -> float | None:
    return None if math.isnan(score) else round(score, 6)


def _words(text: str | Sequence[str], windows: Sequence[Window]) -> list[Said]:
    """The words of a row: with their characters in the text, or with their number in the list."""
    if isinstance(text, str):
        return [{"text": text[a:b], "start": a, "end": b} for a, b in word_spans(text, windows)]
    return [{"text": word, "word": i} for i, word in enumerate(text)]


def _joined(words: Sequence[Said], label: str, scores: Sequence[float], text: object) -> Said:
    """An entity of some words of a row."""
    score = _rounded(float(np.mean([one for one in scores if not math.isnan(one)] or [math.nan])))
    if isinstance(text, str):
        start, end = words[0]["start"], words[-1]["end"]
        return {"label": label, "text": text[start:end], "start": start, "end": end, "score": score}
    first, last = words[0]["word"], words[-1]["word"]
    return {"label": label, "words": [word["text"] for word in words], "first": first, "last": last, "score": score}


def _logits(forward: Forward, batch: Batch, key: Array | None) -> Array:
    logits = forward(batch, key).logits
    assert logits is not None  # models with this head have logits
    return logits.astype(jnp.float32)


def _learnt(batch: Batch) -> Array:
    """[B, S] float32: 1 where a token has a label to be learnt, times the weight of its row."""
    return (batch["labels"] >= 0) * at_tokens(batch["weights"], batch)


# ------------------------------------------------------------------------------------------------------------------ rows


def columns(config: RunConfig) -> tuple[Column, ...]:
    """Words, or a text; and a label for each word, or stretches of characters with labels."""
    return Column(config.data.text, "words"), Column(config.data.label, "labels")


class _Labelled(NamedTuple):
    """A row as it is meant."""

    text: str | list[str]
    """A text, or its words."""
    labels: Sequence[object]
    """A label for each word, or stretches of characters of the text."""


def _meant(row: Row, names: TagNames) -> _Labelled:
    """A list of words has a list of labels. A text has stretches of characters, or words between blanks with as many labels.

    Raises:
      UserError: not as many labels as words.
    """
    text, labels = row.values
    if isinstance(text, str) and isinstance(labels, list) and all(isinstance(one, Mapping) for one in labels):
        return _Labelled(text, names.of_spans(labels))
    words = text.split() if isinstance(text, str) else [str(word) for word in _list(text, row, "words")]
    found = labels.split() if isinstance(labels, str) else _list(labels, row, "labels")
    if len(words) != len(found):
        raise UserError(f"{row.where}: {len(words)} words and {len(found)} labels; each word needs one")
    for place, label in enumerate(found):
        if label_text(label) == "":
            raise UserError(f"{row.where}: word {place} ({words[place]!r}) has no label")
    return _Labelled(words, names.of_tags(found, row.where))


def _read(row: Row) -> str | list[str]:
    """What there is to read of a row without labels: its text, or its words."""
    text = row.values[0]
    return text if isinstance(text, str) else [str(word) for word in _list(text, row, "words")]


def _list(value: object, row: Row, what: str) -> list[object]:
    if isinstance(value, list) and not any(isinstance(one, Mapping | list) for one in value):
        return value
    raise UserError(f"{row.where}: expected a list of {what}, found {str(value)[:60]!r}; set data.text and data.label")


def study(rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
    """The tags of the training rows, "O" first; of stretches of characters, all tags of the scheme for each of their labels."""
    options = config.task
    assert isinstance(options, Config)
    renamed = TagNames(config.data.label_map)
    meant = (_meant(row, renamed) for row in rows)
    tags = (one.labels if isinstance(one.text, list) else _tags_for(one.labels, options.scheme) for one in meant)
    values = distinct(chain.from_iterable(tags))
    for line in renamed.lines():
        note(f"{shown(config.data.train or '')}: {line}")
    if not values:
        raise UserError(f"{config.data.train}: no row has a label (column {config.data.label!r}, data.label)")
    names = class_names(values, config, stored, note)
    chosen = config.data.labels is not None or (stored is not None and names == stored.labels)
    return Targets(names if chosen or "O" not in names else ("O", *(name for name in names if name != "O")))


def _tags_for(spans: Sequence[Any], scheme: Scheme) -> list[str]:
    marks = "BI" if scheme == "BIO" else "BIES"
    labels = dict.fromkeys(label_text(span.get("label")) for span in spans)
    return ["O", *(f"{mark}-{label}" for label in labels if label for mark in marks)]


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """An example per window of each row: ``tokens``, ``types``, ``word`` (which word each token is of, -1: none), ``counts`` (1 at the
    first piece of each word, in one window), ``row`` and, with targets, ``labels`` (the class to be learnt at each token, -1: none).

    Raises:
      UserError: a label that is none of the classes, or stretches of characters that cannot be told by words.
    """
    stride, names = _stride(config, tokenizer), TagNames(config.data.label_map)
    for first, chunk in chunks_of(rows):
        meant = [_meant(row, names) if targets is not None else _Labelled(_read(row), []) for row in chunk]
        for place, windows in _windows([one.text for one in meant], tokenizer, stride):
            counts = counting(windows)
            labels = None if targets is None else _classes(chunk[place], meant[place], windows, counts, targets, config)
            yield from _examples(first + place, windows, counts, labels)


def _examples(
    row: int, windows: Sequence[Window], counts: Sequence[np.ndarray], labels: Sequence[np.ndarray] | None
) -> Iterator[Encoded]:
    """One of each window of a row."""
    for place, window in enumerate(windows):
        example = {
            "tokens": np.asarray(window.ids, np.int32),
            "types": np.asarray(window.types, np.int32),
            "word": np.asarray(window.words, np.int32),
            "counts": counts[place].astype(np.int32),
            "row": np.array(row, np.int32),
        }
        if labels is not None:
            example["labels"] = labels[place]
        yield Encoded(example, row, window.dropped, window)


def _stride(config: RunConfig, tokenizer: TextProcessor) -> int | None:
    """Tokens that windows have in common; None: what is too long is cut off."""
    if config.data.long_texts == "truncate" or tokenizer.max_length is None:
        return None
    return tokenizer.max_length // 4 if config.data.stride is None else config.data.stride


def _windows(
    texts: Sequence[str | list[str]], tokenizer: TextProcessor, stride: int | None
) -> Iterator[tuple[int, list[Window]]]:
    """(number of the row, its windows), in order."""
    found: dict[int, list[Window]] = {number: [] for number in range(len(texts))}
    for split in (False, True):
        chosen = [number for number in found if isinstance(texts[number], list) == split]
        of_kind: list[Any] = [texts[number] for number in chosen]
        for window in tokenizer.windows(of_kind, split_words=split, stride=stride):
            found[chosen[window.row]].append(window)
    yield from found.items()


def _classes(
    row: Row,
    meant: _Labelled,
    windows: Sequence[Window],
    counts: Sequence[np.ndarray],
    targets: Targets,
    config: RunConfig,
) -> list[np.ndarray]:
    """Per window, [S] int32: the class to be learnt at each token; -1: none, or it is learnt in another window."""
    options = config.task
    assert isinstance(options, Config)
    labels = meant.labels
    if isinstance(meant.text, str):
        spans = word_spans(meant.text, windows)
        labels, _ = tags_of_spans(labels, spans, options.scheme, row.where, len(meant.text))
    renamed = renamed_labels(config.data.labels, targets.labels)
    ids = class_ids(labels, [row.where] * len(labels), targets.labels, renamed)
    further = continuations(targets.labels) if options.label_pieces == "all" else None
    made = label_pieces(windows, ids, further)
    for window, pieces, first in zip(windows, made, counts, strict=True):
        words = np.asarray(window.words, np.int64)
        pieces[~np.isin(words, words[first])] = -1
    return made


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of texts, and ``labels``, ``word`` and ``counts`` [B, S] and ``row`` [B], int32."""
    del config
    places = ("batch", "length")
    of_words = {"labels": Field(places, fill=-1), "word": Field(places, fill=-1), "counts": Field(places)}
    return {**text_fields(pad_id), **of_words, "row": Field(("batch",))}


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run.

    Raises:
      UserError: fewer than two labels.
    """
    del facts, tokenizer
    if len(targets.labels) < 2:
        raise UserError(
            f"token_classification needs at least two labels, the training rows have {list(targets.labels)}"
        )
    return Task(targets.labels, options.focal_gamma)
