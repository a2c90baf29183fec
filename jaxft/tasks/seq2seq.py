"""Texts from texts: summaries, translations. An encoder reads the source, a decoder writes the target.

The loss is of the target's tokens; evaluation lets the model write, with the settings that its users will have, and scores the texts.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.config import LogConfig, RunConfig
from jaxft.config.generation import GenerationConfig
from jaxft.config.tasks.seq2seq import Config
from jaxft.data.batch import Field, Fields, text_fields
from jaxft.data.encode import Column, chunks_of
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.continued import Decoding
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.processors.languages import check_language, written_in_its_language
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts, Model
from jaxft.models.decoding import write
from jaxft.tasks._numbers import rounded
from jaxft.tasks._texts import at_tokens
from jaxft.tasks._tokens import TokenTask, study, token_cross_entropy
from jaxft.tasks._written import check_scores, metrics_of, row_scores, text_scores
from jaxft.tasks.contract import Array, Arrays, Batch, Direction, Forward, LongTexts, Sample, Sampler, Sums, Targets
from jaxft.trees import Params

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
    "sizes",
    "study",
]
LONG_TEXTS: tuple[LongTexts, ...] = ("truncate",)
PACKING = True
ROW_OPTIONS = ("target", "prefix", "source_language", "target_language", "max_target_length")
PROBLEM: str | None = None


@dataclass(frozen=True)
class Task(TokenTask):
    """What is learnt: the tokens of targets, each from the source and those before it. Static and hashable: part of jit cache keys."""

    start: int = 0
    """What every target begins with, for the decoder."""
    smoothing: float = 0.0
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    scores: tuple[str, ...] = ()
    """What texts are scored by that evaluation lets the model write; empty: it writes none."""
    tokenizer: TextProcessor | None = field(default=None, compare=False)

    head = "seq2seq_lm"

    @property
    def metrics(self) -> dict[str, Direction]:
        """The scalar metrics that ``eval.metric`` may name, and which way is better."""
        return {**metrics_of(self.scores), **super().metrics}

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """Adds what the decoder reads, targets one place to the right: ``decoder_tokens`` and ``decoder_mask`` [B, T], ``targets`` and
        ``target_weights`` [B, T], 0 on padding. Of packed rows each target begins anew, and sees its own source:
        ``decoder_positions`` and ``decoder_segments`` [B, T]."""
        del key
        targets, there = batch["target"], batch["target_mask"]
        shifted = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)), constant_values=self.start)
        places = {}
        if "target_segments" in batch:
            places = {f"decoder_{name}": batch[f"target_{name}"] for name in ("positions", "segments")}
            shifted = jnp.where(places["decoder_positions"] == 0, self.start, shifted)
        weights = there * at_tokens(batch["weights"], batch, "target_segments")
        made = {"decoder_tokens": shifted, "decoder_mask": there, "targets": targets, "target_weights": weights}
        return batch | made | places

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """The same as of every loss of tokens; with ``smoothing``, what is learnt has ``penalty`` more than the loss that is told."""
        if not self.smoothing:
            return super().sums(forward, batch, key)
        output = forward(batch, key)
        if output.logits is None:  # a score in tiles knows no mean over the vocabulary
            raise UserError(
                f"task.label_smoothing={self.smoothing:g} needs the logits of the whole vocabulary: leave out model.vocab_tile, or this"
            )
        logits, targets, weights = output.logits.astype(jnp.float32), batch["targets"], batch["target_weights"]
        loss = token_cross_entropy(logits, targets)
        everywhere = jax.nn.logsumexp(logits, axis=-1) - logits.mean(-1)
        learnt = (1 - self.smoothing) * loss + self.smoothing * everywhere
        return {
            "loss": (learnt * weights).sum(),
            "penalty": ((learnt - loss) * weights).sum(),
            "weight": weights.sum(),
            "correct": ((output.logits.argmax(-1) == targets) * weights).sum(),
            "rows": batch["weights"].sum(),
        }

    def written(self, model: Model, params: Params, batch: Batch) -> Batch:
        """The ids that are ``written`` [B, N] of each row, -1 behind the end, the number of its ``row``, and ``weights``."""
        if not self.scores:
            return {}
        made = write(model, params, self.generation, batch["tokens"], batch["mask"] != 0)
        return {"written": made, "row": batch["row"], "weights": batch["weights"]}

    def score_rows(self, sums: Arrays, outputs: Arrays, rows: Sequence[Sequence[object]]) -> dict[str, object]:
        """Scores of the loss, and how near the written texts are to those that are wanted."""
        if not self.scores:
            return {**self.score(sums)}
        texts = dict(self._texts(outputs))
        wanted = [self.wanted(rows[number]) for number in texts]
        return {**text_scores(self.scores, list(texts.values()), wanted), **self.score(sums)}

    @property
    def judging(self) -> bool:
        """Whether texts are written that can be judged: see :class:`~jaxft.tasks.contract.Grading`."""
        return bool(self.scores)

    def judged(
        self, outputs: Arrays, rows: Sequence[Sequence[object]], order: np.ndarray
    ) -> Iterator[dict[str, object]]:
        """For each row, its text, what was wanted, what was written, and how near that is: see
        :class:`~jaxft.tasks.contract.Judging`."""
        del order  # rows are told by their numbers
        texts, wanted = dict(self._texts(outputs)), [self.wanted(row) for row in rows]
        name, found = row_scores(self.scores, [texts[number] for number in range(len(rows))], wanted)
        for number, (row, right, score) in enumerate(zip(rows, wanted, found, strict=True)):
            source = row[0] if isinstance(row[0], str) else f"row {number}"
            same = texts[number].strip() == right.strip()
            yield {"text": source, "true": right, "written": texts[number], name: rounded(score), "right": same}

    def wrongness(self, judged: Mapping[str, object]) -> float | None:
        """How far a text is from the one that was wanted, by the first of ``scores``: see :class:`~jaxft.tasks.contract.Grading`."""
        if judged["right"]:
            return None
        name, score = next((name, judged[name]) for name in ("wer", "rougeL", "chrf") if name in judged)
        if score is None:  # something was written where nothing was wanted
            return math.inf
        return cast(float, score) if name == "wer" else 100 - cast(float, score)

    def wanted(self, row: Sequence[object]) -> str:
        """What should be written of a row."""
        return str(row[1])

    def sampler(
        self, config: LogConfig, model: Model, mesh: Mesh, tokenizer: TextProcessor, rows: Sequence[Sequence[object]]
    ) -> Sampler:
        """Texts that evaluation has written."""
        del model, mesh, tokenizer
        if config.prompts:
            raise UserError(
                "log.prompts: this task shows what evaluation writes of held-out rows; give log.samples instead"
            )
        if not self.scores:
            raise UserError(f"log.samples={config.samples}: evaluation writes no texts here; set task.generate=true")

        def sampler(params: Params, outputs: Arrays) -> list[Sample]:
            del params
            texts = dict(self._texts(outputs, len(rows)))
            return [Sample(str(row[0]), texts[i], str(row[1])) for i, row in enumerate(rows)]

        return sampler

    def _texts(self, outputs: Arrays, first: int | None = None) -> Iterator[tuple[int, str]]:
        """The number of each row with what was written of it, or of the ``first`` rows alone."""
        assert isinstance(self.tokenizer, Decoding)  # a tokenizer read of a model's folder
        for number, ids, weight in zip(outputs["row"], outputs["written"], outputs["weights"], strict=True):
            if weight > 0 and (first is None or number < first):
                yield int(number), str(self.tokenizer.decode(ids[ids >= 0].tolist()))

    def learnable(self, split: Split) -> int:
        """How many tokens targets have."""
        return int(split.sizes("target").sum())

    def remarks(self, split: Split) -> Iterator[str]:
        """How long targets are, and how many are cut."""
        sizes = split.sizes("target")
        yield f"{split.name}: targets of {int(np.median(sizes))} tokens (median), {int(sizes.max())} at most"

    def files(self, width: int, max_length: int | None) -> Mapping[str, str]:
        """``generation_config.json``: how texts are written."""
        del width, max_length
        usual = dataclasses.asdict(GenerationConfig())
        said = dataclasses.asdict(self.generation)
        told = {name: value for name, value in said.items() if value != usual[name] or name == "max_new_tokens"}
        ends = self.generation.eos_token_id
        told |= {"decoder_start_token_id": self.start} | ({"eos_token_id": ends[0]} if len(ends) == 1 else {})
        return {"generation_config.json": json.dumps(told, indent=2) + "\n"}


def columns(config: RunConfig) -> tuple[Column, ...]:
    """The columns of sources and of targets."""
    if config.data.text_pair is not None:
        raise UserError(
            f"data.text_pair={config.data.text_pair}: a source is one text; leave it out, targets are task.target"
        )
    options = config.task
    assert isinstance(options, Config)
    return Column(config.data.text, "text"), Column(options.target, "text")


def encode(
    rows: Iterable[Row], tokenizer: TextProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """Each source, behind the prefix, and what is to be written of it, as the tokenizer ends texts."""
    options = config.task
    assert isinstance(options, Config)
    del targets
    end, ends, most = tokenizer.special.end, _ends(tokenizer), options.max_target_length
    ended = end in tokenizer.around[1]
    if tokenizer.max_length is not None and most > tokenizer.max_length:
        raise UserError(
            f"task.max_target_length={most} is above data.max_length={tokenizer.max_length}: lower it, or let sources be longer"
        )
    for first, chunk in chunks_of(rows):
        sources = tokenizer.encode([options.prefix + str(row.values[0]) for row in chunk])
        wanted = None
        if len(chunk[0].values) > 1:
            check_language(tokenizer)
            wanted = [ids for ids, _, _ in tokenizer.target.encode([str(row.values[1]) for row in chunk])]
        for number, (ids, types, dropped) in enumerate(sources):
            if end is not None and not ended and ids[-1:] != [end] and len(ids) != tokenizer.max_length:
                ids, types = [*ids, end], [*types, 0]
            example = {
                "tokens": np.asarray(ids, np.int32),
                "types": np.asarray(types, np.int32),
                "row": np.array(first + number, np.int32),
            }
            if wanted is not None:
                example["target"] = np.asarray(_ended(wanted[number], ends, most), np.int32)
            yield Encoded(example, first + number, dropped)


def _ends(tokenizer: TextProcessor) -> tuple[int, ...]:
    """What stands behind the text of each target: the token that ends texts, and maybe that of a language."""
    end, behind = tokenizer.special.end, tokenizer.target.around[1]
    if end is None or end in behind:
        return behind if end is not None else ()
    return (end,)


def _ended(ids: list[int], ends: tuple[int, ...], length: int) -> list[int]:
    """A target of so many tokens at most, with those that end it."""
    text = ids[: -len(ends)] if ends and tuple(ids[-len(ends) :]) == ends else ids
    return [*text[: max(length - len(ends), 0)], *ends][:length]


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of sources and targets."""
    del config
    target = ("batch", "target")
    return {
        **text_fields(pad_id),
        "target": Field(target, fill=pad_id),
        "target_mask": Field(target, value=1),
        "row": Field(("batch",)),
    }


def sizes(options: Config) -> Mapping[str, int]:
    """Tokens of targets, at most."""
    return {"target": options.max_target_length}


def make_task(options: Config, targets: Targets, facts: Facts, tokenizer: TextProcessor) -> Task:
    """The task of a run."""
    del targets
    if facts.stacks and facts.start is None:
        raise UserError("task.name=seq2seq needs a model with an encoder and a decoder")
    generation, end = options.generation, tokenizer.special.end
    if options.generate and facts.limit is not None and generation.max_new_tokens >= facts.limit:
        raise UserError(
            f"task.generation.max_new_tokens={generation.max_new_tokens} is beyond the model's limit; set it to {facts.limit - 1} or less"
        )
    if not generation.eos_token_id and end is not None:
        generation = dataclasses.replace(generation, eos_token_id=(end,))
    generation = written_in_its_language(generation, tokenizer)
    said = generation.decoder_start_token_id
    start = (facts.start or 0) if said is None else said
    scores = options.scores if options.generate else ()
    check_scores(scores)
    return Task(start, options.label_smoothing, generation, scores, tokenizer)
