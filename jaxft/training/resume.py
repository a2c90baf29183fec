"""Whether a run can go on in a folder that holds its checkpoints, and what has changed for it since.

A checkpoint holds weights, optimizer and position. What it depends on besides is named by its hash, not by where it lies:
rows, and all else that a path stands for, may have moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxft import checkpoint
from jaxft.config import RunConfig, flat, run_config, to_tree
from jaxft.config.stored import RunMeta, checked_meta, said_by, stored_config
from jaxft.data.examples import Examples
from jaxft.data.packing import Packed
from jaxft.errors import UserError
from jaxft.machine import processes
from jaxft.reporting import records
from jaxft.training.optim import make_schedule
from jaxft.training.setup import Setup, steps_of

# What may differ between a run and its resumption without changing the course of its parameters.
_FREE_SECTIONS = ("mesh", "log", "checkpoint")
_FREE_KEYS = (
    *("train.out", "train.profile", "train.compilation_cache", "train.export", "train.seeds", "train.log_every"),
    *("train.watchdog", "train.max_nonfinite", "train.rollbacks", "data.read_ahead", "data.repeats"),
    *("eval.every", "eval.batch_size", "eval.patience", "eval.stride"),
)
_LENGTH = ("train.steps", "train.epochs")
# Where rows and first weights come from. Rows are compared by their hash, the architecture by its numbers; first weights
# do not matter any more once there is a checkpoint.
_SOURCES = (
    *("data.train", "data.eval", "data.eval_fraction", "data.text", "data.text_pair", "data.label", "data.tokenizer"),
    *("data.header", "data.quotes", "data.missing_text", "data.missing_label"),
    *("data.test", "data.test_fraction", "data.split_group"),
    "model.init",
)
_HELD_OUT = ("data.eval", "data.eval_fraction", "data.test", "data.test_fraction", "data.split_group")


def check_folder(setup: Setup, out: Path, seed: int) -> None:
    """Refuses, before anything is compiled, a run folder that this run cannot go on in.

    Raises:
      UserError: ``out`` holds another run's checkpoints, or any at all while ``checkpoint.resume`` is ``never``.
      NothingUsable: it holds steps, and no manifest of theirs can be read.
    """
    found = checkpoint.step_folders(out / "checkpoints")
    reasons = []
    for _, folder in sorted(found.items(), reverse=True):
        if setup.config.checkpoint.resume == "never":
            raise UserError(
                f"{out} already holds checkpoints; set checkpoint.resume=auto to go on, or another train.out"
            )
        try:
            manifest = checkpoint.read_manifest(folder)
        except checkpoint.DamagedCheckpoint as error:
            reasons.append(error.reason)
            continue  # restoring falls back in the same order, with its warning
        check_goes_on(setup, checked_meta(manifest.meta, folder, of_run=True), manifest.step or 0, seed, out)
        return
    if found:
        raise checkpoint.nothing_usable(out / "checkpoints", found, reasons[0])


def check_goes_on(setup: Setup, meta: RunMeta, step: int, seed: int, out: Path) -> None:
    """Refuses to go on from a checkpoint of another run.

    Args:
      meta: what the checkpoint says of itself (:func:`jaxft.training.start.run_meta`).
      step: its number.

    Raises:
      UserError: with the key that differs, and how to go on.
    """
    with said_by(out / "checkpoints" / str(step)):
        run_config(stored_config(meta))
    rows_known = "train_rows" in meta  # checkpoints of the first versions do not say
    free = (*_FREE_KEYS, *_LENGTH, "eval.metric", *(_SOURCES if rows_known else ()))
    differing = [
        (key, was, now)
        for key, was, now in _changes(meta, setup.config, seed)
        if key not in free and key.split(".")[0] not in _FREE_SECTIONS
    ]
    if differing:
        key, was, now = differing[0]
        more = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
        raise UserError(
            f"{out} holds a run with another configuration: {key} was {was}, now {now}{more}; "
            f"give the old value to go on with it, or another train.out to begin anew"
        )
    if rows_known and not _are(setup.train, meta["train_rows"]):
        what = f"{setup.config.data.train} (or its tokenizer) has changed"
        give = "the rows it was trained on, wherever they lie,"
        if _other_tokenizer(setup, meta):
            what = f"the tokenizer in {setup.processor.folder} gives other ids than the one it was begun with"
            give = "that tokenizer (data.tokenizer)"
        raise UserError(
            f"{out} holds a run on other rows: {what}; give {give} to go on with it, or another train.out to begin anew"
        )
    _check_model(setup, meta, out)
    if setup.total_steps < step:
        raise UserError(
            f"{out} holds a run that has done {step} steps, it cannot end at {setup.total_steps}; "
            f"set train.steps={step} or more (or train.epochs) to go on with it, or another train.out to begin anew"
        )


def _are(examples: Examples, digest: str) -> bool:
    """Whether a digest in a checkpoint is of these rows."""
    return examples.is_of(digest) if isinstance(examples, Packed) else examples.digest() == digest


def _other_tokenizer(setup: Setup, meta: RunMeta) -> bool:
    """Whether the tokenizer means something else than when the checkpoint was made; earlier versions' do not say."""
    return meta.get("tokenizer_digest") not in (None, setup.processor.digest())


def _check_model(setup: Setup, meta: RunMeta, out: Path) -> None:
    """Raises UserError if the checkpoint's model is not the one that ``model.init`` and the data now lead to."""
    old, new = flat(meta["arch"], "arch"), flat(to_tree(setup.model.config), "arch")
    was = {"family": meta["family"], "head": meta["head"], "labels": list(meta["labels"])} | old
    now = {"family": setup.family_name, "head": setup.model.head, "labels": list(setup.targets.labels)} | new
    # Fields of the architecture that a later version added had the value that is now their default.
    for name in was.keys() & now.keys():
        if was[name] != now[name]:
            raise UserError(
                f"{out} holds a run of another model: {name} was {was[name]!r}, now {now[name]!r}; give the model.init "
                "(and data) it was started with to go on with it, or another train.out to begin anew"
            )


def _changes(meta: RunMeta, config: RunConfig, seed: int) -> Iterator[tuple[str, str, str]]:
    """(key, value in the checkpoint, value now) of all settings that differ, values as Python prints them."""
    # Keys that a run of an earlier version did not have yet had the value that is now their default.
    old, new = flat(to_tree(run_config(stored_config(meta)))), flat(to_tree(config))
    if new["eval.metric"] is None:  # as the run was begun
        new["eval.metric"] = old["eval.metric"]
    # Not config.train.seed: with several seeds in one command it is not the one that this folder is of.
    old["train.seed"], new["train.seed"] = meta["seed"], seed
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            was, now = (repr(tree[key]) if key in tree else "not set" for tree in (old, new))
            yield key, was, now


def changes_said(setup: Setup, meta: RunMeta, step: int, seed: int) -> Iterator[str]:
    """What has changed since the checkpoint, a line each: what moved, and what another length does to the rates.

    Args:
      meta: of a checkpoint that :func:`check_goes_on` accepts.
      step: the number of the checkpoint.
    """
    changes = list(_changes(meta, setup.config, seed))
    for key, was, now in changes:
        if key == "model.init":
            yield f"{key} was {was}, now {now}: the weights are the checkpoint's; architecture and rows are the same"
        elif key in _SOURCES and key not in _HELD_OUT:
            yield f"{key} was {was}, now {now}: the training rows are the same"
    if _other_tokenizer(setup, meta):
        yield (
            f"warning: {setup.processor.folder}: the tokenizer has changed since this run was begun: the training rows have "
            "the same ids, other texts may not"
        )
    before = steps_of(run_config(stored_config(meta)), setup.train)
    if before != setup.total_steps:
        yield from _length_said(setup, before, step)


def log_said(out: Path, meta: RunMeta, step: int) -> Iterator[str]:
    """What is wrong with the log of a run that goes on from a checkpoint, if anything is; said by whoever writes it."""
    if processes.is_first():
        said = records.log_said(out / "log.jsonl", meta.get("log"), step)
        yield from () if said is None else (said,)


def _length_said(setup: Setup, before: int, step: int) -> Iterator[str]:
    optim, total = setup.config.optim, setup.total_steps
    old, new = make_schedule(optim, before), make_schedule(optim, total)
    yield (
        f"{total} steps in all, not {before}: the rate of step {step + 1} is {float(new(step)):.2e}, "
        f"was to be {float(old(step)):.2e} (optim.schedule={optim.schedule})"
    )
    past = np.arange(step)
    kept = np.array_equal(np.asarray(old(past)), np.asarray(new(past)))
    yield f"the rates so far were those of the {'new' if kept else 'old'} length{'' if kept else ', not of the new one'}"


def scores_differ(setup: Setup, meta: RunMeta, seed: int) -> str | None:
    """Why the best value that a checkpoint knows cannot be compared with evaluations from now on; None: it can."""
    changed = {key: (was, now) for key, was, now in _changes(meta, setup.config, seed)}
    if "eval.metric" in changed:
        return f"eval.metric was {changed['eval.metric'][0]}, now {changed['eval.metric'][1]}"
    rows = meta.get("eval_rows")  # checkpoints of earlier versions do not say
    moved = any(key in changed for key in _HELD_OUT)
    if (rows is None and moved) or (rows is not None and not _are(setup.held_out, rows)):
        return "the held-out rows have changed"
    return None
