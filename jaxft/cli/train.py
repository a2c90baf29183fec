"""``jaxft train``: fine-tune, report, export."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxft import __version__
from jaxft.cli.console import WIDTH, first_in_environment, lasting_output, model_lines, no_interrupt, settings_lines
from jaxft.cli.show_config import split_run_file
from jaxft.config import RunConfig, load_config, to_yaml
from jaxft.errors import UserError
from jaxft.files import write_atomic
from jaxft.machine.lock import held
from jaxft.machine.platform import set_up_jax

if TYPE_CHECKING:  # they import jax, whose import takes seconds
    from jax import Array
    from jaxtyping import PyTree

    from jaxft.models.contract import Family
    from jaxft.training.loop import Result
    from jaxft.training.programs import Programs
    from jaxft.training.scoring import Evaluation
    from jaxft.training.setup import Setup, Times

MAIN_KEYS = {
    "model.init": "weights to start from: a Hugging Face folder or hub id",
    "data.train": "rows to learn from: .csv, .tsv, .jsonl, .parquet, hf:FOLDER, tfds:NAME:SPLIT",
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


def run(options: argparse.Namespace) -> int:
    """Trains one run per seed."""
    path, overrides = split_run_file(options.run_file, options.overrides)
    config = load_config(path, overrides)
    with lasting_output("train", f"the run goes on, its log is {Path(config.train.out) / 'log.jsonl'}"):
        if first_in_environment():  # jax, whose import takes seconds, will say who really is
            print(
                f"jaxft {__version__}: train {path or '(no run file)'}", *settings_lines(config), sep="\n", flush=True
            )
        return _run(config)


def _run(config: RunConfig) -> int:
    start = time.perf_counter()
    set_up_jax(config.train.compilation_cache)
    from jaxft.machine import processes  # imports jax
    from jaxft.training import setup  # imports jax

    times = setup.Times({"import": time.perf_counter() - start + _since_start(start)})
    with times.part("meeting"):
        processes.start(_note)
    out = Path(config.train.out)
    folders = [*(_folder_of(config, seed) for seed in config.train.seeds), out]
    with _owned(folders):
        with processes.raise_together():
            ready = setup.prepare(config, _note, times)
        for line in model_lines(ready):
            _note(line)
        return _train(config, ready, out, times)


def _train(config: RunConfig, ready: Setup, out: Path, times: Times) -> int:
    from jaxft import checkpoint
    from jaxft.machine import processes
    from jaxft.training import loop, resume, scoring
    from jaxft.training.programs import compile_programs

    seeds = config.train.seeds or (config.train.seed,)
    with processes.raise_together():
        for seed in seeds:
            resume.check_folder(ready, _folder_of(config, seed), seed)
        out.mkdir(parents=True, exist_ok=True)  # before the compiler works for a folder that cannot be
    begun = max(checkpoint.step_folders(_folder_of(config, seeds[0]) / "checkpoints"), default=0)
    programs = compile_programs(ready, _note, begun)
    if not (out / "config.yaml").exists():  # another run's stays until fit() has accepted the folder
        _state(config, out)
    results, tested = dict[int, Mapping[str, object]](), dict[int, Mapping[str, object]]()
    for seed in seeds:
        folder = _folder_of(config, seed)
        seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed, out=str(folder)))
        began, test = time.perf_counter(), None
        result = loop.fit(ready, programs, folder, seed, _note, times)
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
        _finish(ready, programs, result, test, folder, trained)
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
    return Path(config.train.out) / f"seed{seed}" if config.train.seeds else Path(config.train.out)


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
                    stack.enter_context(held(folder, _note))
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


def _note(text: str) -> None:
    from jaxft.machine.processes import is_first

    if is_first():
        print(text, flush=True)


def _finish(
    ready: Setup,
    programs: Programs,
    result: Result,
    tested: Evaluation | None,
    out: Path,
    seconds: float,
) -> None:
    """Report, plots, export; ``tested``: what was found in the test."""
    from jaxft.machine.processes import is_first
    from jaxft.tasks import reported
    from jaxft.training.scoring import evaluated

    # Scores of the best step are known; what the model says of each row is kept of no evaluation, and few tasks tell it.
    told = hasattr(ready.task, "wrongness") or hasattr(ready.task, "reported")
    held_out = evaluated(ready, programs, result.params) if told else None
    metrics = result.metrics
    if is_first():
        metrics = metrics if held_out is None else reported(ready.task, metrics, held_out.outputs)
        _report(ready, result, metrics, held_out, tested, out, seconds)
    if ready.config.train.export:
        _export(ready, programs, result, metrics, out / "export")


def _report(
    ready: Setup,
    result: Result,
    metrics: Mapping[str, object],
    held_out: Evaluation | None,
    tested: Evaluation | None,
    out: Path,
    seconds: float,
) -> None:
    from jaxft.cli.row_files import write_errors
    from jaxft.machine.memory import peak_bytes
    from jaxft.reporting.plots import lacking
    from jaxft.reporting.report import report_text, write_report
    from jaxft.reporting.sinks import read_log
    from jaxft.tasks import reported

    log = read_log(out / "log.jsonl")
    print()
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, 120)
    print(report_text(metrics, ready.targets.labels, log, width))
    written = write_report(out, metrics, ready.targets.labels, log)
    if tested is not None:
        print(f"\ntest, with the parameters of step {result.best_step}:")
        scores = reported(ready.task, tested.metrics, tested.outputs, test=True)
        print(report_text(scores, ready.targets.labels, [], width))
        written += write_report(out, scores, ready.targets.labels, [], split="test")
    elif (out / "metrics_test.json").exists():
        print(f"\nwarning: {out / 'metrics_test.json'} is of an earlier part of this run, which had a test")
    peak = peak_bytes() / 2**30
    print(f"\nbest step {result.best_step} of {result.step}; trained in {seconds:.1f} s; peak memory {peak:.2f} GiB")
    for path in written:
        print(f"wrote {path}")
    for split, found in (("eval", held_out), ("test", tested)):
        if found is not None:
            for line in write_errors(out, ready.task, found.outputs, found.rows, found.order, split=split):
                print(line)
    if (why := lacking()) is not None:
        print(why)


def _export(ready: Setup, programs: Programs, result: Result, told: Mapping[str, object], target: Path) -> None:
    """Writes the Hugging Face folder, loads it back and compares parameters and held-out metrics.

    Args:
      told: what the report has; thresholds among it are kept beside the weights.
    """
    from jaxft.machine import processes

    merged, metrics = _exported(ready, programs, result)
    params = processes.fetch(merged)
    if processes.is_first():
        _write_export(ready, params, told, target)
    processes.barrier("export")
    _compare(ready, programs, merged, metrics, result, target)
    _export_adapter(ready, result, target.with_name("adapter"))


def _export_adapter(ready: Setup, result: Result, target: Path) -> None:
    """Writes a run's adapters by themselves, as peft stores them, beside the export that has them merged in."""
    from jaxft.hub.peft import not_storable, write_adapter
    from jaxft.machine import processes
    from jaxft.models import adapters
    from jaxft.trees import branch, paths_of

    model, config = ready.model, ready.config.model
    if not isinstance(model, adapters.Adapted):
        return
    if config.init is None:
        _note("no adapters are exported: without model.init there is no model to load them onto")
        return
    frozen = set(adapters.frozen_paths(model, config.lora, bool(ready.targets.labels)))
    own = {path: leaf for path, leaf in paths_of(branch(result.params, "base")).items() if f"base/{path}" not in frozen}
    if (why := not_storable(_family(ready), model, own)) is not None:
        _note(f"no adapters are exported for peft: {why}; the merged export is whole")
        return
    params = processes.fetch({"base": own, "lora": result.params["lora"]})
    if processes.is_first():
        with _replaced(target) as fresh:
            write_adapter(fresh, _family(ready), model, params, tuple(own), config.init)
        _note(f"exported {target} (adapters alone, for peft)")


def _exported(ready: Setup, programs: Programs, result: Result) -> tuple[PyTree[Array], Mapping[str, object]]:
    """What is exported, adapters merged in, and its held-out metrics."""
    from jaxft.models import adapters
    from jaxft.training.scoring import evaluate

    if not isinstance(ready.model, adapters.Adapted):
        return result.params, result.metrics
    merged = adapters.merge(ready.model, result.params, ready.shardings, ready.mesh)
    return merged, evaluate(ready, programs, adapters.unchanged(merged, result.params))


def _write_export(ready: Setup, params: PyTree[Array], told: Mapping[str, object], target: Path) -> None:
    from jaxft.hub.pretrained import export_folder
    from jaxft.hub.source import SINGLE_LABEL
    from jaxft.models import adapters
    from jaxft.training.setup import files_beside

    source = ready.source
    with _replaced(target) as fresh:
        export_folder(
            fresh,
            {} if source is None else source.hf_config,
            _family(ready),
            adapters.base_of(ready.model),
            params,
            tokenizer=ready.tokenizer,
            labels=ready.targets.labels,
            # A task of another package that has labels and does not say what for gives each text one of them.
            problem_type=ready.targets.problem or (SINGLE_LABEL if ready.targets.labels else None),
            max_length=ready.config.data.max_length,
            source_folder=None if source is None else source.folder,
            files={**files_beside(ready.task, ready.model, ready.config), **_thresholds(ready.targets.labels, told)},
            note=_note,
        )


def _thresholds(labels: tuple[str, ...], told: Mapping[str, object]) -> dict[str, str]:
    """The file of the thresholds that a report tells of, by its name; nothing if it tells of none."""
    from jaxft.data.thresholds import FILE, thresholds_text

    found = cast("Mapping[str, Any] | None", told.get("thresholds"))
    if found is None:
        return {}
    cuts = {name: row["threshold"] for name, row in found["labels"].items()}
    return {FILE: thresholds_text(labels, cuts, found["rows"])}


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of ``target``, that of an earlier, shorter part of this run, in one rename."""
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    yield fresh
    if target.exists():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
        os.replace(target, old)
        os.replace(fresh, target)
        shutil.rmtree(old)
    else:
        os.replace(fresh, target)


def _family(ready: Setup) -> Family:
    from jaxft import models

    return models.family(ready.family_name)


def _compare(
    ready: Setup,
    programs: Programs,
    exported: PyTree[Array],
    metrics: Mapping[str, object],
    result: Result,
    target: Path,
) -> None:
    import jax
    import jax.numpy as jnp

    from jaxft.hub.pretrained import load_params
    from jaxft.hub.source import open_source
    from jaxft.models import adapters
    from jaxft.parallel.sharding import jitted, replicated
    from jaxft.reporting.records import to_json
    from jaxft.training.scoring import evaluate

    source = open_source(str(target), _note, family=ready.family_name)
    base = adapters.base_of(ready.model)
    params = load_params(source, base, _note, mesh=ready.mesh)

    def equal(a: PyTree[Array], b: PyTree[Array]) -> Array:
        return jnp.array([jnp.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)]).all()

    with jax.set_mesh(ready.mesh):
        same = bool(jitted(equal, ready.mesh, replicated(ready.mesh))(exported, params))
    again = evaluate(ready, programs, params if base is ready.model else adapters.unchanged(params, result.params))
    labels = ready.targets.labels
    named = source.labels or tuple(f"LABEL_{i}" for i in range(len(labels)))  # such names count as none
    # As JSON: a score of nothing is NaN, which is not equal to itself.
    if not same or to_json(again) != to_json(metrics) or named != labels:
        raise UserError(
            f"{target}: the exported model differs from the trained one; this is a bug in jaxft, please report it"
        )
    _note(f"exported {target} (Hugging Face layout); loaded back: parameters bit-equal, held-out metrics identical")
