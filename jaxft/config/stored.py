"""Configurations that earlier versions wrote: keys that have gone since are taken out before they are read."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NotRequired, TypedDict, cast

from jaxft.config.schema import TaskConfig
from jaxft.config.tasks import task_options
from jaxft.errors import UserError
from jaxft.files import JsonObject, fits

GONE = {
    "eval.mode": "the task says for each metric whether less (loss) or more (accuracy) is better; leave it out",
}
"""Keys of earlier versions, and what a run file that still has one is told."""

_ONCE_SHARED = ("label_smoothing", "class_weights", "mask_rate")  # options of tasks
_LESS_IS_BETTER = ("loss", "perplexity")  # of the metrics that versions with eval.mode had


class RunMeta(TypedDict):
    """What a checkpoint says of its run (:func:`jaxft.training.start.run_meta`), as JSON holds it."""

    config: dict[str, JsonObject]
    """By section and key."""
    seed: int
    family: str
    arch: dict[str, object]
    """The family's Config."""
    head: str | None
    labels: list[str]
    hf_config: dict[str, object]
    """The config.json of the folder that the run started from; empty if there was none."""
    tokenizer: str
    max_length: int
    tokenizer_inside: NotRequired[str]
    """Where the tokenizer lies inside the run's folder."""
    progress: NotRequired[JsonObject]
    """Fields of the loop's Progress."""
    log: NotRequired[JsonObject]
    """What log.jsonl held (:class:`jaxft.reporting.records.Written`); versions before this one's do not say."""
    train_rows: NotRequired[str]
    """Digest of the encoded rows; versions before this one's do not say."""
    eval_rows: NotRequired[str]
    tokenizer_digest: NotRequired[str]


_OF_MODELS = ("config", "family", "arch", "head", "labels", "hf_config", "tokenizer")
_OF_RUNS = (*_OF_MODELS, "seed")


def checked_meta(said: Mapping[str, object], where: object, *, of_run: bool = False) -> RunMeta:
    """What a checkpoint says of its model, or of its run, once it is known to say it.

    Args:
      said: its meta. Whoever saves in a loop of their own stores what they like there.
      where: the checkpoint, for messages.
      of_run: it is to be gone on from.

    Raises:
      UserError: something is missing, or of another type.
    """
    kinds = typing.get_type_hints(RunMeta)
    for name in _OF_RUNS if of_run else _OF_MODELS:
        if name not in said:
            kind = "run" if of_run else "model"
            raise UserError(
                f"{where}: this checkpoint says no {name!r} of its {kind}: jaxft train or convert did not write it"
            )
    for name, kind in kinds.items():
        if name in said and not fits(said[name], kind):
            raise UserError(
                f"{where}: this checkpoint's {name} is {said[name]!r:.80}: jaxft train or convert did not write it"
            )
    return cast(RunMeta, said)


@contextmanager
def said_by(where: object) -> Iterator[None]:
    """Errors in here are about what a checkpoint has stored, and say so.

    Raises:
      UserError: as the one in here, begun with the checkpoint.
    """
    try:
        yield
    except UserError as error:
        raise UserError(
            f"{where}: this checkpoint's configuration cannot be used (of a newer jaxft?): {error}"
        ) from error


def without_gone(tree: Mapping[str, object]) -> dict[str, object]:
    """A stored configuration without the keys that are gone; ``tree`` itself stays as it is."""
    kept = dict(tree)
    for path in GONE:
        section, key = path.split(".")
        found = kept.get(section)
        if isinstance(found, dict):
            kept[section] = {name: value for name, value in found.items() if name != key}
    return kept


def without_other_options(tree: Mapping[str, object]) -> dict[str, object]:
    """A stored configuration without the options of other tasks, which the section had when all tasks shared it."""
    section = tree.get("task")
    if not isinstance(section, dict):
        return dict(tree)
    name = section.get("name", TaskConfig.name)
    options = task_options(str(getattr(name, "value", name)))
    known = {field.name for field in dataclasses.fields(options)}
    kept = {key: value for key, value in section.items() if key in known or key not in _ONCE_SHARED}
    return {**tree, "task": kept}


def as_today(tree: Mapping[str, object]) -> dict[str, object]:
    """A stored configuration as today's versions read it."""
    return with_its_split(without_other_options(without_gone(tree)))


def with_its_split(tree: Mapping[str, object]) -> dict[str, object]:
    """A stored configuration that says how its rows were held out, if it is of a version that held them out otherwise than today's."""
    data, section = tree.get("data"), tree.get("task")
    if not isinstance(data, dict) or not isinstance(section, dict) or "stratify" in data:
        return dict(tree)
    parted = data.get("eval") is None or data.get("test_fraction") is not None
    at_random = getattr(task_options(str(section.get("name", TaskConfig.name))), "HELD_OUT_AT_RANDOM", False)
    return {**tree, "data": {**data, "stratify": False}} if parted and at_random else dict(tree)


def wrong_best(tree: Mapping[str, object]) -> str | None:
    """What was wrong with the choice of the best checkpoint in a run of an earlier version; None if nothing was.

    Those versions took ``eval.mode`` from the run file, ``max`` by default, whatever the metric was.
    """
    section = tree.get("eval")
    if not isinstance(section, dict) or "mode" not in section:
        return None
    metric = section.get("metric", "accuracy")
    best = "min" if metric in _LESS_IS_BETTER else "max"
    if section["mode"] == best:
        return None
    kind = "highest" if section["mode"] == "max" else "lowest"
    return f"this run of an earlier version (eval.mode={section['mode']}) kept the checkpoint of the {kind} {metric}, its worst"


def stored_config(meta: RunMeta) -> dict[str, object]:
    """The configuration in a checkpoint's ``meta`` as today's versions write it, with ``eval.metric`` named."""
    tree = as_today(meta["config"])
    section = cast(dict[str, object], tree.get("eval", {}))
    return tree | {"eval": section | {"metric": stored_metric(meta)}}


def stored_metric(meta: RunMeta) -> str:
    """The metric that chose the best checkpoint of the run that a checkpoint's ``meta`` is of."""
    before = meta["config"].get("eval", {}).get("metric")  # versions that did not write the other always had this one
    return meta.get("progress", {}).get("metric") or before or "accuracy"
