"""``jaxft plan``: memory, traffic and time of a run's train step on hardware that need not be there."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jaxft.cli.show_config import split_run_file
from jaxft.config import RunConfig, load_config
from jaxft.errors import UserError
from jaxft.files import write_atomic
from jaxft.machine.platform import COMPILE_ENV
from jaxft.planning.hlo.llo import llo_flags

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jaxft.machine.chips import Topology
    from jaxft.training.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("run_file", nargs="?", help="YAML run file, as for jaxft train")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for instance mesh.fsdp=16 train.batch_size=512"
    )
    parser.add_argument(
        "--topology", required=True, help="v5e-16, v5p-64, v4-32, v6e-8, v5e:4x4, h100-8, h200-64, a100-8, cpu:8"
    )
    parser.add_argument("--fit", action="store_true", help="look for the largest train.batch_size that fits")
    parser.add_argument("--llo", action="store_true", help="price machine code too (TPUs only; slower; prices kernels)")
    parser.add_argument("--analytic", action="store_true", help="formulas only, nothing compiled; needs no compiler")
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON")
    parser.epilog = (
        "exit code: 0 the run fits, 6 it does not (the plan is printed all the same), 2 something to correct"
    )


DOES_NOT_FIT = 6
"""Exit code: the plan is printed, and says that the run needs more memory than a chip has."""


def run(options: argparse.Namespace) -> int:
    """Prints the plan; 0 if the run fits (or nothing is known of the memory), 6 if it does not."""
    from jaxft.machine.chips import parse_topology

    path, overrides = split_run_file(options.run_file, options.overrides)
    config = load_config(path, overrides)
    topology = parse_topology(options.topology)
    if options.fit and topology.chip is None:
        raise UserError(
            f"--fit: nothing says how much memory {options.topology} has; name chips, for instance v5e-8 or h100-8"
        )
    if options.llo and topology.chip is not None and topology.chip.platform == "gpu":
        raise UserError(f"--llo: there is no price of machine code for GPUs ({options.topology}): leave it out")
    folder = Path(tempfile.mkdtemp(prefix="jaxft-plan-")) if options.llo and not options.analytic else None
    try:
        _set_up(topology.chips, folder)
        return _run(options, config, topology, folder)
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _set_up(devices: int, llo_folder: Path | None) -> None:
    """Before jax does anything: no device is touched, CPU devices are simulated, libtpu is told what to write."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    for name, value in COMPILE_ENV.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    if llo_folder is not None:
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {llo_flags(llo_folder)}"


def _run(options: argparse.Namespace, config: RunConfig, topology: Topology, llo_folder: Path | None) -> int:
    import dataclasses

    from jaxft import tasks
    from jaxft.parallel.sharding import make_abstract_mesh, make_mesh, make_rules, ways
    from jaxft.planning.advice import advice_for
    from jaxft.planning.measure import DoesNotFit, Plan, devices_of, largest_batch, make_plan
    from jaxft.planning.table import plan_json, plan_text
    from jaxft.training.batch_shapes import buckets_of, check_batch_shapes
    from jaxft.training.packing import refuse_unknown_rows

    refuse_unknown_rows(config, tasks.task(config.task.name).fields(config, 0))
    length = max(buckets_of(config))
    platform = "cpu" if topology.chip is None else topology.chip.platform
    mesh = (
        make_abstract_mesh(config.mesh, topology.chips)
        if options.analytic
        else make_mesh(config.mesh, devices_of(topology))
    )
    rules = make_rules(config.mesh)
    check_batch_shapes(config, mesh, rules)
    # A mesh of devices that are not there places shapes as one of devices does.
    recipe = _recipe(config, cast("Mesh", mesh), platform)

    def plan_of(rows: int, analytic: bool = options.analytic) -> Plan:
        if llo_folder is not None:
            for old in llo_folder.iterdir():  # of one program only
                old.unlink()
        return make_plan(recipe, topology, rows, length, compiled=not analytic, llo_folder=llo_folder)

    rows = config.train.batch_size
    try:
        unit = ways(mesh, rules, "batch") * config.train.accumulation
        plan = largest_batch(plan_of, rows, unit, _note) if options.fit else plan_of(rows)
    except DoesNotFit as error:
        plan = plan_of(rows, analytic=True)
        memory = dataclasses.replace(plan.memory, total=error.used, limit=error.limit)
        plan = dataclasses.replace(plan, memory=memory)
        _note("the compiler refuses the program: it needs more memory than a chip has; below, its total and formulas")
    advice = advice_for(plan, config)
    print(plan_text(plan, advice))
    if options.json:
        write_atomic(Path(options.json), json.dumps(plan_json(plan, advice, _versions()), indent=2) + "\n")
        print(f"\nwrote {options.json}")
    return 0 if plan.memory.fits else DOES_NOT_FIT


def _note(text: str) -> None:
    print(text, flush=True)


def _recipe(config: RunConfig, mesh: Mesh, platform: str) -> Recipe:
    """The run's recipe, without reading its rows: how many labels there are changes next to nothing."""
    from jaxft import tasks
    from jaxft.training.batch_shapes import check_lengths
    from jaxft.training.processors import stand_in_processor
    from jaxft.training.recipe import make_recipe, open_start, planned_targets

    source = open_start(config, _note)
    facts, targets = planned_targets(config, source)
    processor = stand_in_processor(tasks.task(config.task.name), facts.vocabulary or 0, facts.inputs)
    recipe = make_recipe(config, mesh, source, targets, processor, config.train.steps or 1000, platform)
    check_lengths(config, facts)
    return recipe


_PACKAGES = (
    *("jaxft", "jax", "jaxlib", "libtpu"),
    *("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt"),
)


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
