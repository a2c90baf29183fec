"""What is left at the end of a run: its report, the model card, the exported model."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jaxft.cli.console import WIDTH, note
from jaxft.cli.run_card import BASE_CARD, CARD, base_card, card_of
from jaxft.errors import UserError
from jaxft.files import JsonObject, write_atomic

if TYPE_CHECKING:  # they import jax, whose import takes seconds
    from jax import Array
    from jaxtyping import PyTree

    from jaxft.checkpoint import RunBucket
    from jaxft.models.contract import Family
    from jaxft.training.loop import Result
    from jaxft.training.programs import Programs
    from jaxft.training.scoring import Evaluation
    from jaxft.training.setup import Setup


def finish(
    ready: Setup,
    programs: Programs,
    result: Result,
    tested: Evaluation | None,
    out: Path,
    seconds: float,
    bucket: RunBucket | None = None,
) -> None:
    """Report, pictures, model card, export.

    Args:
      tested: what was found in the test.
      out: the run's folder.
      seconds: that training took.
      bucket: where the folder's content is put; None: nowhere.
    """
    from jaxft.machine.processes import is_first
    from jaxft.tasks import judges, reported
    from jaxft.training.scoring import evaluated

    # Scores of the best step are known; what the model says of each row is kept of no evaluation, and few tasks tell it.
    told = judges(ready.task) or hasattr(ready.task, "reported")
    held_out = evaluated(ready, programs, result.params) if told else None
    scores = {"eval": result.metrics}
    if is_first():
        if held_out is not None:
            scores["eval"] = reported(ready.task, result.metrics, held_out.outputs)
        if tested is not None:
            scores["test"] = reported(ready.task, tested.metrics, tested.outputs, test=True)
        _report(ready, result, scores, {"eval": held_out, "test": tested}, out, seconds)
    if ready.config.train.export:
        _export(ready, programs, result, scores, seconds, out / "export", bucket)


def _report(
    ready: Setup,
    result: Result,
    scores: Mapping[str, Mapping[str, object]],
    found: Mapping[str, Evaluation | None],
    out: Path,
    seconds: float,
) -> None:
    from jaxft.cli.row_files import write_errors
    from jaxft.machine.memory import peak_bytes
    from jaxft.reporting.card import report_markdown
    from jaxft.reporting.plots import lacking
    from jaxft.reporting.report import report_text, write_report
    from jaxft.reporting.samples_text import last_samples
    from jaxft.reporting.sinks import read_log

    log, labels, written = read_log(out / "log.jsonl"), ready.targets.labels, list[Path]()
    samples = last_samples(out) if ready.sampler is not None else []
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, 120)
    for split, metrics in scores.items():
        print("" if split == "eval" else f"\n{split}, with the parameters of step {result.best_step}:")
        print(report_text(metrics, labels, log if split == "eval" else [], width))
        written += write_report(out, metrics, labels, log if split == "eval" else [], split=split)
    if "test" not in scores and (out / "metrics_test.json").exists():
        print(f"\nwarning: {out / 'metrics_test.json'} is of an earlier part of this run, which had a test")
    write_atomic(out / "report.md", report_markdown(card_of(ready, result, scores, seconds), written, samples))
    peak = peak_bytes() / 2**30
    print(f"\nbest step {result.best_step} of {result.step}; trained in {seconds:.1f} s; peak memory {peak:.2f} GiB")
    for path in (*written, out / "report.md"):
        print(f"wrote {path}")
    for split, one in found.items():
        if one is not None:
            for line in write_errors(out, ready.task, one.outputs, one.rows, one.order, split=split):
                print(line)
    if (why := lacking()) is not None:
        print(why)


def _export(
    ready: Setup,
    programs: Programs,
    result: Result,
    scores: Mapping[str, Mapping[str, object]],
    seconds: float,
    target: Path,
    bucket: RunBucket | None,
) -> None:
    """Writes the Hugging Face folder, loads it back and compares parameters and held-out metrics.

    Args:
      scores: what the report has, for the model card; thresholds among it are kept beside the weights.
    """
    from jaxft.machine import processes

    merged, metrics = _exported(ready, programs, result)
    params = processes.fetch(merged)
    if processes.is_first():
        beside = {**_thresholds(ready.targets.labels, scores["eval"]), **_cards(ready, result, scores, seconds)}
        _write_export(ready, params, beside, target)
    processes.barrier("export")
    if bucket is not None:
        bucket.share(target)
    _compare(ready, programs, merged, metrics, result, target)
    _export_adapter(ready, result, target.with_name("adapter"))
    _export_parts(ready, params, target)


def _export_parts(ready: Setup, params: PyTree[Array], target: Path) -> None:
    """Writes the models that a run's model is made of, if its family says that it is made of several, each to a folder of its own."""
    from jaxft.hub.pretrained import export_folder
    from jaxft.machine import processes
    from jaxft.models import adapters

    family, source = _family(ready), ready.source
    found = getattr(family, "parts", lambda model, params: {})(adapters.base_of(ready.model), params)
    for name, (model, own) in found.items() if processes.is_first() else ():
        part = target.with_name("parts") / name
        part.parent.mkdir(exist_ok=True)
        with _replaced(part) as fresh:
            export_folder(
                fresh,
                {} if source is None else source.hf_config,
                family,
                model,
                own,
                tokenizer=ready.processor,
                max_length=ready.config.data.max_length,
                note=note,
            )
        note(f"exported {part} (the {name} alone, Hugging Face layout)")


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
        note("no adapters are exported: without model.init there is no model to load them onto")
        return
    frozen = set(adapters.frozen_paths(model, config.lora, bool(ready.targets.labels)))
    own = {path: leaf for path, leaf in paths_of(branch(result.params, "base")).items() if f"base/{path}" not in frozen}
    if (why := not_storable(_family(ready), model, own)) is not None:
        note(f"no adapters are exported for peft: {why}; the merged export is whole")
        return
    params = processes.fetch({"base": own, "lora": result.params["lora"]})
    if processes.is_first():
        with _replaced(target) as fresh:
            write_adapter(fresh, _family(ready), model, params, tuple(own), config.init)
        note(f"exported {target} (adapters alone, for peft)")


def _exported(ready: Setup, programs: Programs, result: Result) -> tuple[PyTree[Array], Mapping[str, object]]:
    """What is exported, adapters merged in, and its held-out metrics."""
    from jaxft.models import adapters
    from jaxft.training.scoring import evaluate

    if not isinstance(ready.model, adapters.Adapted):
        return result.params, result.metrics
    merged = adapters.merge(ready.model, result.params, ready.shardings, ready.mesh)
    return merged, evaluate(ready, programs, adapters.unchanged(merged, result.params))


def _write_export(ready: Setup, params: PyTree[Array], beside: Mapping[str, str], target: Path) -> None:
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
            tokenizer=ready.processor,
            labels=ready.targets.labels,
            # A task of another package that has labels and does not say what for gives each text one of them.
            problem_type=ready.targets.problem or (SINGLE_LABEL if ready.targets.labels else None),
            max_length=ready.config.data.max_length,
            source_folder=None if source is None else source.folder,
            files={**files_beside(ready.task, ready.model, ready.config), **beside},
            note=note,
        )


def _thresholds(labels: tuple[str, ...], told: Mapping[str, object]) -> dict[str, str]:
    """The file of the thresholds that a report tells of, by its name; nothing if it tells of none."""
    from jaxft.data.thresholds import FILE, thresholds_text

    found = cast("JsonObject | None", told.get("thresholds"))
    if found is None:
        return {}
    cuts = {name: row["threshold"] for name, row in found["labels"].items()}
    return {FILE: thresholds_text(labels, cuts, found["rows"])}


def _cards(ready: Setup, result: Result, scores: Mapping[str, Mapping[str, object]], seconds: float) -> dict[str, str]:
    """The model card by its name, and that of the model it started from, which it takes the place of."""
    from jaxft.reporting.card import card_text

    before = base_card(ready)
    if before is None and ready.source is not None and (ready.source.folder / CARD).exists():
        note(f"left behind in {ready.source.folder}: {CARD} (no text, or too large); the export has a card of its own")
    return {CARD: card_text(card_of(ready, result, scores, seconds)), **({} if before is None else {BASE_CARD: before})}


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

    source = open_source(str(target), note, family=ready.family_name)
    base = adapters.base_of(ready.model)
    params = load_params(source, base, note, mesh=ready.mesh)

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
    note(f"exported {target} (Hugging Face layout); loaded back: parameters bit-equal, held-out metrics identical")
