"""Preferences: of two replies to a prompt the better one becomes more probable, measured against a reference (Rafailov et al. 2023, DPO).

An example is a prompt with each of its two replies, one after the other in a row of the batch, each seen by itself alone. What the
reference says of them does not change, so that it is computed once, before training (``jaxft score``).

Dims: B rows, S tokens, X examples of a packed row, N = B or B X examples; 2: the better reply and the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.preference import Config
from jaxft.data.batch import Field, Fields
from jaxft.data.encode import Column, chunks_of
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.processors.replies import Asked, Replies, shared_prompt
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks._numbers import rounded
from jaxft.tasks._replies import REPLIES, next_tokens, reply_logps, reply_tokens
from jaxft.tasks._several import joined, several_fields
from jaxft.tasks._texts import by_text
from jaxft.tasks._tokens import study
from jaxft.tasks.contract import Array, Arrays, Batch, Direction, Forward, LongTexts, Sums, Targets

__all__ = [
    "LONG_TEXTS",
    "PACKING",
    "PROBLEM",
    "ROW_OPTIONS",
    "Config",
    "Task",
    "columns",
    "encode",
    "fields",
    "make_task",
    "study",
    "texts_of_row",
]
LONG_TEXTS: tuple[LongTexts, ...] = ("truncate",)
PACKING = True
ROW_OPTIONS: tuple[str, ...] = ("prompt", "reference")
PROBLEM: str | None = None
_SUFFIXES = ("logp", "tokens")
"""Endings of the columns that ``jaxft score`` adds for each reply."""


class _Pairs(NamedTuple):
    """What is said of N examples."""

    logps: Array
    """[N, 2] float32, the summed log-probability of each reply."""
    reference: Array
    """[N, 2] float32, that under the reference."""
    tokens: Array
    """[N, 2] float32, how many each is of."""
    weights: Array
    """[N] float32, 0 for an example that only fills up a batch, or of whose replies one has no token left."""


@dataclass(frozen=True)
class Task:
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    options: Config = Config(name="preference")  # noqa: RUF009 - frozen

    head = "causal_lm"

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        return {"accuracy": "max", "margin": "max", "loss": "min"}

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch with the next token of each."""
        del key
        return next_tokens(batch)

    def weight(self, batch: Batch) -> Array:
        """The number of pairs: what the summed loss is divided by."""
        return _counted(batch, reply_tokens(batch, _texts(batch))).sum()

    def _pairs(self, forward: Forward, batch: Batch, key: Array | None) -> _Pairs:
        # Replies are told apart by their segments: the model need not know where they begin.
        seen = {name: value for name, value in batch.items() if name != "starts"}
        logps = reply_logps(forward, seen, key, _texts(batch)).reshape(-1, 2)
        tokens = reply_tokens(batch, _texts(batch)).reshape(-1, 2)
        reference = batch["reference"].reshape(-1, 2) if "reference" in batch else jnp.zeros_like(logps)
        return _Pairs(logps, reference, tokens, _counted(batch, tokens))

    def _losses(self, pairs: _Pairs) -> Array:
        """[N] float32."""
        o = self.options
        gains = pairs.logps - pairs.reference
        if o.loss == "ipo":
            gains = gains / jnp.maximum(pairs.tokens, 1)
        margin = gains[:, 0] - gains[:, 1]
        if o.loss == "ipo":
            return jnp.square(margin - 1 / (2 * o.beta))
        if o.loss == "hinge":
            return jax.nn.relu(1 - o.beta * margin)
        # -log sigmoid(x) is softplus(-x)
        right, wrong = jax.nn.softplus(-o.beta * margin), jax.nn.softplus(o.beta * margin)
        return (1 - o.label_smoothing) * right + o.label_smoothing * wrong

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """Summed over the pairs of a batch: ``loss``, ``weight``, how many are told apart rightly (``correct``), and the ``rewards`` [2]
        and log-probabilities (``logps`` [2]) of their replies."""
        pairs = self._pairs(forward, batch, key)
        rewards, weights = self.options.beta * (pairs.logps - pairs.reference), pairs.weights
        return {
            "loss": (self._losses(pairs) * weights).sum(),
            "weight": weights.sum(),
            "correct": ((rewards[:, 0] > rewards[:, 1]) * weights).sum(),
            "rewards": (rewards * weights[:, None]).sum(0),
            "logps": (pairs.logps * weights[:, None]).sum(0),
        }

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """``rewards`` [N, 2] of the replies of each pair, and whether it is ``counted`` [N], beside ``weights`` [N]."""
        pairs = self._pairs(forward, batch, None)
        rewards = self.options.beta * (pairs.logps - pairs.reference)
        return {"rewards": rewards, "counted": pairs.weights, "weights": by_text(batch["weights"])}

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, object]:
        """Means over pairs: how often the better reply has the higher reward, rewards (beta times the log of how much more probable a reply
        is than under the reference) and their difference, the ``margin``; and the log-probabilities of the replies."""
        del outputs
        count = float(sums["weight"]) or math.nan
        (chosen, rejected), (logp, other) = (
            np.asarray(sums[name], np.float64) / count for name in ("rewards", "logps")
        )
        return {
            "loss": float(sums["loss"]) / count,
            "accuracy": float(sums["correct"]) / count,
            "margin": float(chosen - rejected),
            "chosen_reward": float(chosen),
            "rejected_reward": float(rejected),
            "chosen_logp": float(logp),
            "rejected_logp": float(other),
            "rows": int(np.rint(sums["weight"])),
        }

    def judged(
        self, outputs: Arrays, rows: Sequence[Sequence[object]], order: np.ndarray
    ) -> Iterator[dict[str, object]]:
        """For each row its prompt, if that has a column, and its replies, with their rewards and the ``margin`` between these: see
        :class:`~jaxft.tasks.contract.Judging`. A pair of which one reply has no token left is not told apart."""
        back = order.argsort()
        names = ("chosen", "rejected") if self.options.prompt is None else ("prompt", "chosen", "rejected")
        rewards, counted = outputs["rewards"][back].astype(np.float64), outputs["counted"][back] > 0
        for row, (chosen, rejected), there in zip(rows, rewards.tolist(), counted.tolist(), strict=True):
            yield {
                **{name: _shown(value) for name, value in zip(names, row, strict=False)},
                "chosen_reward": rounded(chosen),
                "rejected_reward": rounded(rejected),
                "margin": rounded(chosen - rejected) if there else None,
                "right": chosen > rejected if there else None,
            }

    def wrongness(self, judged: Mapping[str, object]) -> float | None:
        """How much higher the worse reply's reward is: see :class:`~jaxft.tasks.contract.Grading`."""
        margin = cast("float | None", judged["margin"])
        if judged["right"] is not False:
            return None
        return math.inf if margin is None else -margin

    def learnable(self, split: Split) -> int:
        """How many pairs have tokens of both replies."""
        return int((_kept_tokens(split) > 0).all(1).sum())

    def remarks(self, split: Split) -> Iterator[str]:
        """How many pairs have nothing to learn, and how long replies are."""
        tokens = _kept_tokens(split)
        mean = tokens.mean(0)
        yield f"{split.name}: {len(tokens):,} pairs, {mean[0]:.1f} tokens in a chosen reply, {mean[1]:.1f} in a rejected one"
        if silent := int((tokens == 0).any(1).sum()):
            yield (
                f"warning: {split.name}: {silent:,} of {len(tokens):,} pairs have a reply without a token within data.max_length, and "
                "teach nothing"
            )


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _texts(batch: Batch) -> int:
    """How many texts a row has room for."""
    return 2 * math.prod(batch["weights"].shape[1:])


def _counted(batch: Batch, tokens: Array) -> Array:
    """[N] the weights of examples, 0 where a reply has no token."""
    return by_text(batch["weights"]) * (tokens.reshape(-1, 2) > 0).all(1)


def _kept_tokens(split: Split) -> np.ndarray:
    """[rows, 2] how many tokens each reply has."""
    offsets = split.offsets["length"]
    chosen = split.columns[REPLIES] * (split.columns["segments"] == 1)
    every = np.add.reduceat(split.columns[REPLIES].astype(np.int64), offsets[:-1])
    first = np.add.reduceat(chosen.astype(np.int64), offsets[:-1])
    return np.stack([first, every - first], 1)


def texts_of_row(options: Config) -> int:
    """Prompts with a reply, of up to ``data.max_length`` tokens each, that a row has."""
    del options
    return 2


def _options(config: RunConfig) -> Config:
    assert isinstance(config.task, Config)  # of its own module
    return config.task


def columns(config: RunConfig) -> tuple[Column, ...]:
    """The prompt if it has a column, the better reply, the other, and what the reference says of the two.

    Raises:
      UserError: no column is named for the other reply.
    """
    data, options = config.data, _options(config)
    if data.text_pair is None:
        raise UserError(
            "preference reads two replies, the better one first: name the columns, for instance data.text=chosen data.text_pair=rejected "
            "task.prompt=prompt"
        )
    names = (*(() if options.prompt is None else (options.prompt,)), data.text, data.text_pair)
    if len(set(names)) < len(names):
        raise UserError(
            f"task.prompt, data.text and data.text_pair name a column twice ({', '.join(names)}); name each once"
        )
    found = [Column(name, "messages") for name in names]
    if options.reference == "columns":
        cure = _cure(config)
        found += [
            Column(f"{name}_{what}", "number", cure) for name in (data.text, data.text_pair) for what in _SUFFIXES
        ]
    return tuple(found)


def _cure(config: RunConfig) -> str:
    """What adds the columns of the reference."""
    data, prompt = config.data, _options(config).prompt
    asked = "" if prompt is None else f" --prompt {prompt}"
    return (
        f"let the reference add it: jaxft score {config.model.init or 'MODEL'} ROWS OUT.jsonl{asked} data.text={data.text} "
        f"data.text_pair={data.text_pair} data.max_length={data.max_length} (or task.reference=none)"
    )


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """An example per row: the fields of :func:`~jaxft.tasks._several.joined` for the prompt with each reply, which tokens are of these
    (``replies``), and, with targets, the ``reference``.

    Raises:
      UserError: a row's reference is no number, or of replies of other lengths.
    """
    replies, referred = Replies(tokenizer), targets is not None and _options(config).reference == "columns"
    for first, chunk in chunks_of(rows):
        encoded = iter(replies.encode([asked for row in chunk for asked in asked_of(row, config)]))
        for number, row in enumerate(chunk):
            both = next(encoded), next(encoded)
            example, dropped = joined([(one.ids.tolist(), [0] * len(one.ids), one.dropped) for one in both], 2)
            example[REPLIES] = np.concatenate([one.replies for one in both])
            if referred:
                example["reference"] = _reference(row, [int(one.replies[1:].sum()) for one in both], config)
            yield Encoded(example, first + number, dropped)


def asked_of(row: Row, config: RunConfig) -> tuple[Asked, Asked]:
    """The prompt of a row with each of its replies."""
    values = row.values
    prompted = _options(config).prompt is not None
    prompt, chosen, rejected = values[:3] if prompted else shared_prompt(values[0], values[1], row.where)
    return Asked(prompt, chosen, row.where), Asked(prompt, rejected, row.where)


def _reference(row: Row, tokens: Sequence[int], config: RunConfig) -> np.ndarray:
    """[2] float32, the log-probabilities of a row's replies under the reference."""
    names = [f"{name}_{what}" for name in (config.data.text, config.data.text_pair) for what in _SUFFIXES]
    found = [_number(value, name, row.where) for value, name in zip(row.values[-4:], names, strict=True)]
    for name, there, counted in zip(names[1::2], tokens, found[1::2], strict=True):
        if there != counted:
            raise UserError(
                f"{row.where}: column {name!r} says {counted:g} tokens, and the reply has {there}: the reference read other tokens; score "
                f"again with the same tokenizer and data.max_length={config.data.max_length}"
            )
    return np.asarray(found[::2], np.float32)


def _number(value: object, column: str, where: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(str(value).strip())
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: column {column!r} holds {value!r:.60}; expected a number, as jaxft score adds it")
    return number


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of rows of several texts, ``replies`` [B, S], and ``reference`` [B, 2] float32 if there is one."""
    referred = _options(config).reference == "columns"
    more = {"reference": Field(("batch", 2), "float32")} if referred else {}
    return {**several_fields(pad_id, 2), REPLIES: Field(("batch", "length")), **more}


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run."""
    del targets, facts, tokenizer
    return Task(options)
