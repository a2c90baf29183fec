"""Values that no run can use, refused before anything is read or computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxft.config.schema import DataConfig, RunConfig
from jaxft.errors import UserError, redacted


def check_ranges(config: RunConfig) -> None:
    """Raises UserError for the first value out of range; names its key."""
    # First: some of the rules compute with them.
    _check_values(dataclasses.asdict(config), "")
    for of_section in (_of_training, _of_evaluation, _of_data, _of_optimizer, _of_model):
        for rule in of_section(config):
            if not rule.holds:
                raise UserError(f"{rule.key}={rule.value}: {rule.problem}")


MOST_ROWS = 1 << 20
"""Rows of a batch: more than any published run has had, and few enough that their token ids fit a machine."""
MOST_TOKENS = 1 << 20
"""Tokens of a row."""
MOST_RANK = 1 << 16
"""The rank of adapters: above the width of any model."""
MOST_AHEAD = 1 << 16
"""Batches that are prepared ahead, and held."""
MOST_NUMBER = 2**31 - 1
"""Steps, sizes and counts are computed with in 32 bits."""


class _Rule(NamedTuple):
    holds: bool
    key: str
    value: object
    problem: str


def _of_training(config: RunConfig) -> list[_Rule]:
    train = config.train
    return [
        _within("train.batch_size", train.batch_size, MOST_ROWS),
        _Rule(
            train.batch_ramp is None or len(train.batch_ramp) > 0,
            "train.batch_ramp",
            train.batch_ramp,
            "names no stage",
        ),
        _Rule(train.accumulation > 0, "train.accumulation", train.accumulation, "must be at least 1"),
        _Rule(
            train.batch_size % max(train.accumulation, 1) == 0,
            "train.accumulation",
            train.accumulation,
            f"must divide train.batch_size={train.batch_size}",
        ),
        _Rule(
            train.steps is not None or train.epochs is not None,
            "train.epochs",
            None,
            "give train.epochs or train.steps",
        ),
        _Rule(train.steps is None or train.steps > 0, "train.steps", train.steps, "must be at least 1"),
        _Rule(
            train.steps is not None or train.epochs is None or train.epochs > 0,
            "train.epochs",
            train.epochs,
            "must be above 0",
        ),
        _Rule(
            train.watchdog is None or train.watchdog > 0,
            "train.watchdog",
            train.watchdog,
            "must be more than 0 seconds; null turns it off",
        ),
        _Rule(train.log_every > 0, "train.log_every", train.log_every, "must be at least 1"),
        _Rule(
            train.profile is None or _is_span(train.profile),
            "train.profile",
            train.profile,
            "give START:STOP, the first and the last step of the trace, for instance 10:13",
        ),
        _Rule(train.max_nonfinite >= 0, "train.max_nonfinite", train.max_nonfinite, "must be at least 0"),
        _Rule(
            train.spike_skip is None or train.spike_skip > 0,
            "train.spike_skip",
            train.spike_skip,
            "must be above 0 standard deviations, for instance 6; null turns it off",
        ),
        _Rule(train.rollbacks >= 0, "train.rollbacks", train.rollbacks, "must be at least 0"),
        _Rule(len(set(train.seeds)) == len(train.seeds), "train.seeds", list(train.seeds), "has a seed twice"),
        _Rule(train.out != "", "train.out", repr(train.out), "name a folder"),
        _Rule(
            all(0 <= seed < 2**32 for seed in (train.seed, *train.seeds)),
            "train.seed",
            train.seed if not train.seeds else list(train.seeds),
            "seeds must lie in 0..4294967295",
        ),
    ]


def _of_evaluation(config: RunConfig) -> list[_Rule]:
    ev, stored, log = config.eval, config.checkpoint, config.log
    return [
        _within("eval.batch_size", ev.batch_size, MOST_ROWS),
        _Rule(log.samples >= 0, "log.samples", log.samples, "must not be negative"),
        _Rule(log.sample_tokens > 0, "log.sample_tokens", log.sample_tokens, "must be at least 1"),
        _Rule(all(log.prompts), "log.prompts", list(log.prompts), "has one without text"),
        _Rule(ev.every is None or ev.every > 0, "eval.every", ev.every, "must be at least 1"),
        _Rule(ev.stride is None or ev.stride >= 0, "eval.stride", ev.stride, "must not be negative"),
        _Rule(ev.patience is None or ev.patience > 0, "eval.patience", ev.patience, "must be at least 1"),
        _Rule(
            stored.every is None or stored.every > 0,
            "checkpoint.every",
            stored.every,
            "must be at least 1",
        ),
        _Rule(
            stored.keep_every is None or stored.keep_every > 0,
            "checkpoint.keep_every",
            stored.keep_every,
            "must be at least 1",
        ),
        _Rule(stored.keep > 0, "checkpoint.keep", stored.keep, "must be at least 1"),
    ]


def _of_data(config: RunConfig) -> list[_Rule]:
    return [*_of_lengths(config.data), *_of_shares(config.data), *_of_rows(config.data)]


def _of_lengths(data: DataConfig) -> list[_Rule]:
    return [
        _Rule(
            data.max_length > 2, "data.max_length", data.max_length, "must leave room for text beside special tokens"
        ),
        _Rule(data.max_length <= MOST_TOKENS, "data.max_length", data.max_length, f"must be at most {MOST_TOKENS}"),
        _Rule(
            data.buckets is None or (len(data.buckets) > 0 and min(data.buckets) > 0),
            "data.buckets",
            data.buckets,
            "must name positive lengths",
        ),
        _Rule(
            data.buckets is None or max(data.buckets, default=0) >= data.max_length,
            "data.buckets",
            data.buckets,
            f"must reach data.max_length={data.max_length}",
        ),
        _Rule(
            data.buckets is None or data.packing not in ("best_fit", "concatenated"),
            "data.buckets",
            data.buckets,
            "has no use with data.packing; leave it out",
        ),
        _Rule(
            data.buckets is None or max(data.buckets, default=0) <= MOST_TOKENS,
            "data.buckets",
            data.buckets,
            f"must name lengths up to {MOST_TOKENS}",
        ),
        _Rule(
            data.long_texts != "split" or data.text_pair is None,
            "data.long_texts",
            data.long_texts,
            "is for single texts; leave out data.text_pair, or use truncate",
        ),
    ]


def _of_shares(data: DataConfig) -> list[_Rule]:
    return [
        _Rule(0 < data.eval_fraction < 1, "data.eval_fraction", data.eval_fraction, "must lie between 0 and 1"),
        _Rule(
            data.test_fraction is None or 0 < data.test_fraction < 1,
            "data.test_fraction",
            data.test_fraction,
            "must lie between 0 and 1",
        ),
        _Rule(
            data.test_fraction is None or data.test is None,
            "data.test_fraction",
            data.test_fraction,
            "holds out a part of data.train, and data.test names other rows; leave out one of them",
        ),
        _Rule(
            data.test_fraction is None or data.eval is not None or data.eval_fraction + data.test_fraction < 1,
            "data.test_fraction",
            data.test_fraction,
            f"leaves nothing to train on beside data.eval_fraction={data.eval_fraction}",
        ),
    ]


def _of_rows(data: DataConfig) -> list[_Rule]:
    return [
        _Rule(data.label_map is None or len(data.label_map) > 0, "data.label_map", data.label_map, "names no label"),
        _Rule(
            data.labels is None or len(data.labels) > 0,
            "data.labels",
            data.labels,
            "names no label",
        ),
        _Rule(
            data.labels is None or len(set(_names_of(data.labels))) == len(data.labels),
            "data.labels",
            data.labels,
            "has a label twice",
        ),
        _Rule(data.mixture is None or len(data.mixture) > 0, "data.mixture", data.mixture, "names no stage"),
        _Rule(data.lengths is None or len(data.lengths) > 0, "data.lengths", data.lengths, "names no stage"),
        _Rule(data.repeats is None or data.repeats > 0, "data.repeats", data.repeats, "must be above 0"),
        _within("data.read_ahead", data.read_ahead, MOST_AHEAD),
    ]


def _of_optimizer(config: RunConfig) -> list[_Rule]:
    optim = config.optim
    return [
        _Rule(optim.learning_rate >= 0, "optim.learning_rate", optim.learning_rate, "must not be negative"),
        _Rule(0 <= optim.warmup_fraction <= 1, "optim.warmup_fraction", optim.warmup_fraction, "must lie in 0..1"),
        _Rule(
            optim.warmup_steps is None or optim.warmup_steps >= 0,
            "optim.warmup_steps",
            optim.warmup_steps,
            "must not be negative",
        ),
        _Rule(0 <= optim.decay_fraction <= 1, "optim.decay_fraction", optim.decay_fraction, "must lie in 0..1"),
        _Rule(0 <= optim.beta1 < 1, "optim.beta1", optim.beta1, "must lie in 0..1"),
        _Rule(0 <= optim.beta2 < 1, "optim.beta2", optim.beta2, "must lie in 0..1"),
        _Rule(
            optim.clip_norm is None or optim.clip_norm > 0,
            "optim.clip_norm",
            optim.clip_norm,
            "must be above 0 (null: off)",
        ),
        _Rule(0 < optim.layer_decay <= 1, "optim.layer_decay", optim.layer_decay, "must lie in 0..1"),
        _Rule(optim.ema is None or 0 < optim.ema < 1, "optim.ema", optim.ema, "must lie between 0 and 1"),
    ]


def _of_model(config: RunConfig) -> list[_Rule]:
    model, optim = config.model, config.optim
    return [
        _Rule(
            model.vocab_tile is None or model.vocab_tile > 0,
            "model.vocab_tile",
            model.vocab_tile,
            "must be at least 1 (null: all at once)",
        ),
        _Rule(
            model.reinit_layers >= 0,
            "model.reinit_layers",
            model.reinit_layers,
            "must not be negative (0: none)",
        ),
        _Rule(
            model.reinit_layers == 0 or model.init is not None,
            "model.reinit_layers",
            model.reinit_layers,
            "draws layers of loaded weights afresh, and without model.init all are; leave it out",
        ),
        _Rule(
            model.lora.rank is None or model.lora.rank > 0,
            "model.lora.rank",
            model.lora.rank,
            "must be at least 1 (null: no adapters)",
        ),
        _Rule(
            model.lora.rank is None or model.lora.rank <= MOST_RANK,
            "model.lora.rank",
            model.lora.rank,
            f"must be at most {MOST_RANK}",
        ),
        _Rule(
            model.lora.rank is None or (not optim.freeze and optim.layer_decay == 1),
            "model.lora.rank",
            model.lora.rank,
            "adapters say what trains: leave out optim.freeze and optim.layer_decay",
        ),
        _Rule(
            all(size == -1 or size > 0 for size in dataclasses.astuple(config.mesh)[:5]),
            "mesh",
            dict(list(dataclasses.asdict(config.mesh).items())[:5]),
            "sizes must be positive, one may be -1",
        ),
    ]


def _within(key: str, value: int, most: int) -> _Rule:
    return _Rule(0 < value <= most, key, value, f"must be at most {most}" if value > 0 else "must be at least 1")


def _names_of(labels: Mapping[str, str] | Sequence[str]) -> list[str]:
    """The class names that ``data.labels`` gives, in its order."""
    return list(labels.values() if isinstance(labels, Mapping) else labels)


def _is_span(text: str) -> bool:
    first, _, last = text.partition(":")
    few = max(len(first), len(last)) <= len(str(MOST_NUMBER))  # Python itself reads no more than 4300 digits
    return first.isdecimal() and last.isdecimal() and few and 0 < int(first) <= int(last) <= MOST_NUMBER


def _check_values(tree: object, path: str) -> None:
    """Raises UserError for a number that nothing can be computed with (seeds have a rule of their own), and for a secret."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            _check_values(value, f"{path}.{key}".strip("."))
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            _check_values(value, f"{path}.{i}")
    elif isinstance(tree, str) and redacted(tree) != tree:
        raise UserError(
            f"{path}={redacted(tree)}: holds what looks like a password or token, and a run's configuration is stored in its folder and "
            "in checkpoints; give it in the environment (docs/storage.md)"
        )
    elif isinstance(tree, float) and not math.isfinite(tree):
        raise UserError(f"{path}={tree}: must be a finite number")
    elif isinstance(tree, int) and abs(tree) > MOST_NUMBER and not path.startswith("train.seed"):
        raise UserError(f"{path}={tree}: must lie in {-MOST_NUMBER}..{MOST_NUMBER}")
