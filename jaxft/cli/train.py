"""``jaxft train``: fine-tune, report, export."""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft import __version__
from jaxft.checkpoint import run_folder
from jaxft.cli.bucket_run import in_bucket
from jaxft.cli.console import (
    first_in_environment,
    lasting_output,
    model_lines,
    no_interrupt,
    note,
    settings_lines,
)
from jaxft.cli.show_config import split_run_file
from jaxft.config import RunConfig, load_config, to_yaml
from jaxft.errors import UserError
from jaxft.files import remove_unfinished, write_atomic
from jaxft.machine.lock import held
from jaxft.machine.platform import set_up_jax

if TYPE_CHECKING:  # they import jax, whose import takes seconds
    from jaxft.checkpoint import RunBucket
    from jaxft.training.setup import Setup, Times

MAIN_KEYS = {
    "model.init": "weights to start from: a Hugging Face folder or hub id",
    "data.train": "rows to learn from: .csv, .tsv, .jsonl, .parquet, hf:FOLDER, s3://, tfds:NAME",
    "data.eval": "held-out rows; without: a tenth of data.train",
    "data.test": "rows scored once, at the end; data.test_fraction: a part of data.train",
    "data.text": "column of the text; data.text_pair: of a second one",
    "data.label": "column of the label",
    "data.max_length": "tokens kept of a row",
    "task.name": "what is learnt: a module of jaxft/tasks",
    "train.out": "the run folder; an interrupted run goes on there",
    "train.epochs": "passes over the rows; train.steps: steps instead",
    "train.batch_size": "rows per step; train.accumulation: in so many parts",
    "optim.learning_rate": "peak rate; optim.schedule: its course",
    "eval.every": "steps between evaluations; without: once per epoch",
    "eval.metric": "what the best checkpoint is the best by",
    "model.lora.rank": "train thin adapters instead of all weights",
    "mesh.fsdp": "devices that share parameters; mesh.data, mesh.tensor: other splits",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    table = "\n".join(f"  {key:<20} {meaning}" for key, meaning in MAIN_KEYS.items())
    parser.epilog = f"the main keys (jaxft show-config prints all, with their defaults):\n{table}"
    parser.add_argument("run_file", nargs="?", help="YAML run file, for instance configs/runs/wordnet8_minilm.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for instance data.train=my.csv mesh.fsdp=8")
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start again, at most N times, after a crash, a hang, the death of another process, or failing storage (0)",
    )
    parser.add_argument(
        "--debug-nans",
        action="store_true",
        help="end at the first step whose loss or gradient is not finite, and name the first operation that was not (code 5)",
    )


def run(options: argparse.Namespace) -> int:
    """Trains one run per seed."""
    path, overrides = split_run_file(options.run_file, options.overrides)
    config = load_config(path, overrides)
    if options.restarts < 0:
        raise UserError(f"--restarts {options.restarts}: must be 0 or more")
    if options.restarts and options.debug_nans:
        raise UserError("--debug-nans ends the run where --restarts would start it again; leave one of them out")
    if options.restarts:
        given = [*([] if options.run_file is None else [options.run_file]), *options.overrides]
        return _supervised(config, given, options.restarts)
    with lasting_output("train", f"the run goes on, its log is {run_folder(config.train.out) / 'log.jsonl'}"):
        if first_in_environment():  # jax, whose import takes seconds, will say who really is
            print(
                f"jaxft {__version__}: train {path or '(no run file)'}", *settings_lines(config), sep="\n", flush=True
            )
        return _run(config, options.debug_nans)


def _supervised(config: RunConfig, given: list[str], restarts: int) -> int:
    from jaxft.cli.restarts import supervise
    from jaxft.machine.processes import bring_up, cluster

    place = cluster.detect(os.environ)
    folders = [run_folder(config.train.out), *(_folder_of(config, seed) for seed in config.train.seeds)]
    silence = None if place is None else bring_up.silence_of() or None
    return supervise(given, folders, restarts, 0 if place is None else place.index, silence)


def _run(config: RunConfig, debug_nans: bool = False) -> int:
    start = time.perf_counter()
    set_up_jax(config.train.compilation_cache)
    from jaxft.machine import processes  # imports jax
    from jaxft.training import setup  # imports jax

    times = setup.Times({"import": time.perf_counter() - start + _since_start(start)})
    with times.part("meeting"):
        cluster = processes.start(note)
    if debug_nans and cluster is not None and cluster.count > 1:
        raise UserError(
            f"--debug-nans computes a step again on one device, and this run has {cluster.count} processes; start it as one process"
        )
    out = run_folder(config.train.out)
    folders = [*(_folder_of(config, seed) for seed in config.train.seeds), out]
    with _owned(folders), in_bucket(config, out) as bucket:
        with processes.raise_together():
            ready = setup.prepare(config, note, times)
        for line in model_lines(ready):
            note(line)
        return _train(config, ready, out, times, debug_nans, bucket)


def _train(config: RunConfig, ready: Setup, out: Path, times: Times, debug_nans: bool, bucket: RunBucket | None) -> int:
    from jaxft import checkpoint
    from jaxft.cli.finish import finish
    from jaxft.machine import processes
    from jaxft.training import loop, resume, scoring
    from jaxft.training.programs import compile_programs

    seeds = config.train.seeds or (config.train.seed,)
    with processes.raise_together():
        for seed in seeds:
            resume.check_folder(ready, _folder_of(config, seed), seed)
        out.mkdir(parents=True, exist_ok=True)  # before the compiler works for a folder that cannot be
    begun = max(checkpoint.step_folders(_folder_of(config, seeds[0]) / "checkpoints"), default=0)
    programs = compile_programs(ready, note, begun)
    if not (out / "config.yaml").exists():  # another run's stays until fit() has accepted the folder
        _state(config, out)
    results, tested = dict[int, Mapping[str, object]](), dict[int, Mapping[str, object]]()
    for seed in seeds:
        folder = _folder_of(config, seed)
        named = f"{config.train.out}/seed{seed}" if config.train.seeds else config.train.out
        seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed, out=named))
        began, test = time.perf_counter(), None
        result = loop.fit(ready, programs, folder, seed, note, times, debug_nans=debug_nans, bucket=bucket)
        times = type(times)()  # what came before the first step was the first seed's
        _state(seeded, folder)
        trained = time.perf_counter() - began
        if ready.test is not None and not result.interrupted:
            test = scoring.evaluated(ready, programs, result.params, test=True)
            tested[seed] = test.metrics
        if seed == seeds[-1]:
            programs.compilation.stop()  # steps of shapes that no batch had
        if result.interrupted:
            return 130
        results[seed] = result.metrics
        finish(ready, programs, result, test, folder, trained, bucket)
    _state(config, out)
    if len(results) > 1 and processes.is_first():
        from jaxft.reporting.report import seeds_text, write_seeds

        write_seeds(out, results)
        print(seeds_text(results))
        if tested:
            write_seeds(out, tested, split="test")
            print(f"\ntest:\n{seeds_text(tested)}")
    return 0


def _state(config: RunConfig, folder: Path) -> None:
    from jaxft.machine.processes import is_first

    if is_first():
        write_atomic(folder / "config.yaml", to_yaml(config))


def _folder_of(config: RunConfig, seed: int) -> Path:
    out = run_folder(config.train.out)
    return out / f"seed{seed}" if config.train.seeds else out


@contextmanager
def _owned(folders: list[Path]) -> Iterator[None]:
    """Holds a run's folders, the run's own last. If the block fails before the first step, they are as they were: what was there
    stays, what is new goes."""
    from jaxft.machine import processes  # imports jax

    parents = [folder for folder in (*folders, *folders[-1].parents) if not folder.exists()]
    with ExitStack() as stack:
        stack.callback(_remove_empty, parents)
        with processes.raise_together():
            if processes.is_first():
                for folder in reversed(folders):
                    stack.enter_context(held(folder, note))
                    remove_unfinished(folder)
        stated = {folder for folder in folders if (folder / "config.yaml").exists()}
        try:
            yield
        except BaseException:
            if processes.is_first():
                with no_interrupt():
                    _remove_unused(folders, stated)
            raise


def _remove_unused(folders: list[Path], stated: set[Path]) -> None:
    for folder in folders:
        # A log means that training began: it, and what says how, are worth keeping.
        if folder not in stated and not any(folder.rglob("log.jsonl")):
            (folder / "config.yaml").unlink(missing_ok=True)
            _remove_if_empty(folder / "checkpoints")


def _remove_empty(folders: list[Path]) -> None:
    from jaxft.machine.processes import is_first

    if is_first():
        with no_interrupt():
            for folder in folders:
                _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _since_start(now: float) -> float:
    from jaxft.__main__ import STARTED

    return max(0.0, now - STARTED)
