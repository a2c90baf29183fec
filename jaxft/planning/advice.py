"""What to change, from the numbers of a plan."""

from __future__ import annotations

from jaxft import tasks
from jaxft.config import RunConfig
from jaxft.machine.chips import Tpu
from jaxft.machine.gpus import Gpu
from jaxft.planning.measure import Plan

_MIB, _GIB = 2**20, 2**30


def advice_for(plan: Plan, config: RunConfig) -> list[str]:
    """Sentences, the most useful first."""
    memory = plan.memory
    found = []
    if not memory.fits:
        found += _to_fit(plan, config)
    found += _of_weights(plan, config)
    if plan.topology.chip is not None:
        found += _of_waiting(plan)
    if plan.unpriced and isinstance(plan.topology.chip, Tpu):
        found.append(f"est leaves out {len(plan.unpriced)} operations without an estimate (kernels); --llo prices them")
    found += _of_gpus(plan, config)
    return found


def _of_waiting(plan: Plan) -> list[str]:
    """Exchanges in the open, small ones left out."""
    waits = [(one, seconds) for one in plan.collectives if (seconds := plan.open_seconds(one)) > 0]
    waits = [(one, seconds) for one, seconds in waits if one.bytes * one.count > 2**20]
    if not waits:
        return []
    kinds = ", ".join(sorted({one.kind for one, _ in waits}))
    seconds = sum(seconds for _, seconds in waits)
    return [f"{kinds} not overlapped with computation: {1e3 * seconds:.2f} ms a step"]


def _of_gpus(plan: Plan, config: RunConfig) -> list[str]:
    if not isinstance(plan.topology.chip, Gpu):
        return []
    found = []
    if plan.roofline is not None and plan.roofline.opaque:
        found.append(f"roofline counts only the bytes of {len(plan.roofline.opaque)} operations (kernels)")
    nodes = plan.topology.shape[0]
    if nodes > 1 and config.mesh.slices != nodes:
        # jax numbers devices by what NVLink connects; jaxft.parallel.sharding.make_mesh then wants as many slices.
        found.append(f"on hardware each node counts as a slice: jaxft train will ask for mesh.slices={nodes}")
    return found


def _to_fit(plan: Plan, config: RunConfig) -> list[str]:
    memory, found = plan.memory, []
    over = memory.total - (memory.limit or 0)
    found.append(f"does not fit: {over / _GIB:.2f} GiB too much per chip; each of these saves about as much as it says")
    options: list[tuple[float, str]] = []
    if config.model.remat == "none":
        options.append((0.8 * memory.activations, "model.remat=full"))
    options.append((memory.activations / 2, f"train.accumulation={2 * config.train.accumulation}"))
    resident = memory.parameters + memory.optimizer + memory.gradients
    if plan.mesh.get("fsdp", 1) < plan.topology.chips and plan.split_percent < 50:
        options.append((resident * (1 - 1 / plan.topology.chips), "mesh.data=1 mesh.fsdp=-1"))
    if (config.optim.momentum_dtype or config.model.param_dtype) == "float32" and memory.optimizer > 0:
        options.append((memory.optimizer / 4, "optim.momentum_dtype=bfloat16"))
    if tasks.task(config.task.name).PACKING and config.model.vocab_tile is None:
        options.append((0.2 * memory.activations, "model.vocab_tile=4096"))
    found += [f"{text}: {saved / _GIB:.2f} GiB" for saved, text in sorted(options, reverse=True) if saved > 0.01 * over]
    return found


_FEW_WAYS = 8
"""Ways of fsdp up to which libtpu scatters gradients by its own means; over all chips of a slice of 16 it does so by chains of
permutes, or sums them up whole (docs/planning.md)."""


def _of_weights(plan: Plan, config: RunConfig) -> list[str]:
    """Gradients summed up whole on every chip, though each keeps a part only."""
    if plan.source != "compiled" or plan.topology.chip is None or plan.traffic.gradients_scattered == 0:
        return []
    expected = plan.traffic.gradients_reduced + plan.traffic.tensor_parallel
    found = sum(one.count * one.wire_bytes for one in plan.collectives if one.kind == "all-reduce")
    if found <= 1.5 * expected + 2**20:
        return []
    told = (
        f"all-reduces send {found / _MIB:.0f} MiB where {expected / _MIB:.0f} would do: gradients of some weights are summed "
        "up whole on every chip"
    )
    return [told + _instead(plan, config)]


def _instead(plan: Plan, config: RunConfig) -> str:
    """Another layout that would send less, if there is one; else why it is as it is."""
    data, fsdp = plan.mesh.get("data", 1), plan.mesh.get("fsdp", 1)
    if fsdp > _FEW_WAYS and fsdp % _FEW_WAYS == 0:
        return f"; try mesh.fsdp={_FEW_WAYS} mesh.data={data * fsdp // _FEW_WAYS}"
    sent, total = sum(one.count * one.wire_bytes for one in plan.collectives), plan.memory.total
    reduced, needed = _without_fsdp(plan, config, fsdp)
    fits = plan.memory.limit is None or needed <= plan.memory.limit
    if fits and reduced < 0.9 * (sent - plan.traffic.tensor_parallel - plan.traffic.context_ring):
        return (
            f"; with mesh.fsdp=1 mesh.data={data * fsdp} all of them are, yet chips send {reduced / _MIB:.0f} MiB in all instead "
            f"of {sent / _MIB:.0f}, for about {needed / _GIB:.2f} GiB instead of {total / _GIB:.2f}"
        )
    if isinstance(plan.topology.chip, Tpu):
        return " (libtpu does so with those below 4 MiB, where that is faster)"
    return ""


def _without_fsdp(plan: Plan, config: RunConfig, fsdp: int) -> tuple[float, float]:
    """(bytes that each chip would send for gradients, bytes that it would hold) with whole parameters on each chip."""
    whole = plan.traffic.gradients_scattered * fsdp / (fsdp - 1) / config.train.accumulation
    ways = plan.mesh.get("slices", 1) * plan.mesh.get("data", 1) * fsdp * plan.mesh.get("context", 1)
    memory = plan.memory
    split = memory.parameters + memory.optimizer + memory.average + memory.gradients
    return 2 * (ways - 1) / ways * whole, memory.total + (fsdp - 1) * split * plan.split_percent / 100
