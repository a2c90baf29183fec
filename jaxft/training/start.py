"""Where a run begins: afresh, or at a checkpoint; and what its checkpoints say of it."""

from __future__ import annotations

import math
from pathlib import Path

from jaxft import checkpoint, tasks
from jaxft.config import to_tree
from jaxft.config.stored import RunMeta, checked_meta
from jaxft.training.programs import Programs
from jaxft.training.progress import Progress, stored_progress
from jaxft.training.resume import changes_said, check_folder, check_goes_on, log_said, scores_differ
from jaxft.training.scoring import evaluate
from jaxft.training.setup import Note, Setup
from jaxft.training.state import TrainState


def started(
    setup: Setup, programs: Programs, out: Path, seed: int, note: Note, store: checkpoint.Checkpoints
) -> tuple[TrainState, Progress, int]:
    """A fresh state, or the newest checkpoint's."""
    check_folder(setup, out, seed)
    if store.empty():
        metric = tasks.metric_of(setup.task, setup.config.eval.metric)
        return programs.init(setup.start_params(seed, note)), Progress(metric), 0
    restored = store.restore(programs.shapes)
    meta = checked_meta(restored.meta, store.folder / str(restored.step), of_run=True)
    check_goes_on(setup, meta, restored.step, seed, out)
    note(f"resuming from step {restored.step}")
    for line in (*changes_said(setup, meta, restored.step, seed), *log_said(out, meta, restored.step)):
        note(line)
    progress = stored_progress(meta, store.folder / str(restored.step), note)
    reason = scores_differ(setup, meta, seed)
    progress.metric = setup.config.eval.metric or progress.metric
    if reason is not None and progress.best_step is not None:
        _score_best_anew(setup, programs, progress, restored, store)
        note(
            f"{reason}: by them, the best step so far ({progress.best_step}) has {progress.metric} {progress.best_value}"
        )
    return restored.state, progress, restored.step


def _score_best_anew(
    setup: Setup, programs: Programs, progress: Progress, restored: checkpoint.Restored, store: checkpoint.Checkpoints
) -> None:
    """Makes the best value one that evaluations from now on can be compared with."""
    best = restored if progress.best_step == restored.step else store.restore(programs.shapes, progress.best_step)
    value = tasks.scalar(evaluate(setup, programs, best.state.best_params), str(progress.metric))
    progress.best_value, progress.bad_evals = value if math.isfinite(value) else None, 0


def run_meta(setup: Setup, out: Path, seed: int) -> RunMeta:
    """What a checkpoint says about itself: enough to go on, and to serve the model without the run's files."""
    source = setup.source
    return {
        "config": to_tree(setup.config),
        "seed": seed,
        "family": setup.family_name,
        "arch": to_tree(setup.model.config),
        "head": setup.model.head,
        "labels": list(setup.targets.labels),
        "train_rows": setup.train.digest(),
        "eval_rows": setup.held_out.digest(),
        "hf_config": {} if source is None else source.hf_config,
        **checkpoint.tokenizer_place(setup.processor.folder, out),
        "tokenizer_digest": setup.processor.digest(),
        "max_length": setup.config.data.max_length,
    }
