"""``jaxft doctor``: what this machine or cluster is, how fast it is, and what looks wrong."""

from __future__ import annotations

import argparse
import os
import platform
import re
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxft.machine.processes.cluster import Cluster

PACKAGES = (
    "jaxft",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "libtpu",
    "jax-cuda13-plugin",
)
TESTED = {
    "jax": ("0.10.2", "0.12.0"),
    "flax": ("0.12.8", "0.12.12"),
    "optax": ("0.2.8", "0.2.8"),
    "orbax-checkpoint": ("0.12.8", "0.12.8"),
    "grain": ("0.2.18", "0.2.18"),
    "transformers": ("5.17.0", "5.24.0"),
    "tokenizers": ("0.23.3", "0.23.3"),
    "safetensors": ("0.8.0", "0.8.0"),
    "numpy": ("2.4.6", "2.4.6"),
    "pydantic": ("2.14.4", "2.14.4"),
}
"""The oldest and the newest version of each package that the tests, or a run on a GPU (results/accelerator_h100.json), have passed with."""
VARIABLES = (
    "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_LOCAL_DEVICE_IDS", "JAXFT_HOSTS",
    "JAXFT_START_TIMEOUT", "JAXFT_PLATFORM", "JAXFT_NATIVE", "JAX_PLATFORMS", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "CUDA_VISIBLE_DEVICES",
    "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_DEBUG", "TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES",
    "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_GPUS_ON_NODE",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("--size", type=int, default=2048, help="of the square matrices that are multiplied (2048)")
    parser.add_argument("--megabytes", type=int, default=64, help="that are all-reduced (64)")


def run(options: argparse.Namespace) -> int:
    """Prints the findings; exit code 1 if something looks wrong. Several processes are launched as for ``jaxft train``."""
    from jaxft.errors import UserError

    if options.size < 1 or options.megabytes < 1:
        raise UserError("--size and --megabytes must be at least 1")
    from jaxft.machine.platform import set_up_jax

    set_up_jax(None)
    from jaxft.machine import processes

    began = time.perf_counter()
    cluster = processes.start(lambda text: None)
    met = time.perf_counter() - began
    import jax

    first = jax.process_index() == 0

    def say(text: str = "") -> None:
        if first:
            print(text, flush=True)

    say(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPUs")
    say("versions: " + ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name))))
    for line in _untested():
        say(line)
    if cluster is None:
        say("cluster: one process")
    else:
        say(f"cluster: {cluster.count} processes ({cluster.kind}), met at {cluster.address} in {met:.1f} s")
    for line in _devices():
        say(line)
    if jax.default_backend() == "cpu":
        from jaxft.attention.native.compiled import unavailable

        say(f"attention kernels for CPUs: native {unavailable() or 'is compiled'}")
    for name in VARIABLES:
        if name in os.environ:
            say(f"  {name}={os.environ[name]}")
    rate = _matmul(options.size)
    say(
        f"matmul {options.size} x {options.size}: "
        + ", ".join(f"{name} {flops / 1e12:.2f} TFLOP/s" for name, flops in rate.items())
    )
    if jax.device_count() > 1:
        seconds, bandwidth = _all_reduce(options.megabytes)
        say(
            f"all-reduce of {options.megabytes} MB over {jax.device_count()} devices: {1e3 * seconds:.2f} ms, "
            f"{bandwidth / 1e9:.2f} GB/s sent per device"
        )
    problems = list(_problems(cluster, rate))
    for problem in problems:
        say(f"looks wrong: {problem}")
    say("nothing looks wrong" if not problems else "")
    return 1 if problems else 0


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _untested() -> Iterator[str]:
    """A line for each package whose version is outside of :data:`TESTED`: it may well work."""
    for name, (oldest, newest) in TESTED.items():
        found = _version(name)
        if found is None:
            continue
        numbers = _numbers(found)
        if not _numbers(oldest) <= numbers[:3] <= _numbers(newest):
            than = "newer" if numbers > _numbers(newest) else "older"
            yield f"untested: {name} {found} is {than} than what the tests have run with ({oldest} to {newest})"


def _numbers(text: str) -> tuple[int, ...]:
    """The first parts of a version, as far as they are numbers."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()


def _devices() -> list[str]:
    import jax

    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    lines = [f"devices: {len(devices)} ({', '.join(kinds)}), {jax.local_device_count()} of this process"]
    slices = {getattr(device, "slice_index", 0) for device in devices}
    coords = [device.coords for device in devices if hasattr(device, "coords")]
    if coords:
        shape = "x".join(str(1 + max(axis) - min(axis)) for axis in zip(*coords, strict=True))
        lines.append(f"topology: {shape}, {len(slices)} slice{'s' if len(slices) > 1 else ''}")
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        lines.append(
            f"memory: {stats['bytes_limit'] / 2**30:.2f} GiB per device, {stats['bytes_in_use'] / 2**30:.2f} in use"
        )
    return lines


def _matmul(size: int) -> dict[str, float]:
    """FLOP/s of one device by type of operand; the best of five."""
    import jax
    import jax.numpy as jnp

    found = {}
    for dtype in ("float32", "bfloat16"):
        x = jnp.ones((size, size), dtype)
        product = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
        found[dtype] = 2 * size**3 / _best(lambda product=product, x=x: product(x))
    return found


def _all_reduce(megabytes: int) -> tuple[float, float]:
    """(seconds, bytes per second that each device sends) of one all-reduce over all devices."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from jaxft.config import MeshConfig
    from jaxft.parallel.sharding import make_mesh

    config = MeshConfig(slices=len({getattr(device, "slice_index", 0) or 0 for device in jax.devices()}))
    mesh, count = make_mesh(config), jax.device_count()
    axes = PartitionSpec(mesh.axis_names)
    with jax.set_mesh(mesh):
        summed = jax.jit(
            jax.shard_map(lambda x: jax.lax.psum(x, mesh.axis_names), in_specs=axes, out_specs=PartitionSpec())
        )
        make = jax.jit(
            lambda: jnp.ones(count * megabytes * 250_000, jnp.float32), out_shardings=jax.NamedSharding(mesh, axes)
        )
        x = make()
        seconds = _best(lambda: summed(x))
    return seconds, 2 * (count - 1) / count * megabytes * 1e6 / seconds


def _best(call: Callable[[], object], times: int = 5) -> float:
    """Seconds of the fastest of a few calls, the compiling one left out."""
    import jax

    jax.block_until_ready(call())
    spans = []
    for _ in range(times):
        began = time.perf_counter()
        jax.block_until_ready(call())
        spans.append(time.perf_counter() - began)
    return min(spans)


def _problems(cluster: Cluster | None, rate: dict[str, float]) -> Iterator[str]:
    """What a person would ask about."""
    import jax

    from jaxft.machine.chips import peak_of

    kind, backend = jax.devices()[0].device_kind, jax.default_backend()
    tasks = os.environ.get("SLURM_NTASKS", "1")
    if cluster is None and "SLURM_JOB_ID" in os.environ and tasks not in ("", "1"):
        yield f"this allocation is for {tasks} tasks, but this is one process outside of any step: start with srun (launch/slurm.sbatch)"
    if backend == "cpu" and (os.path.exists("/dev/nvidia0") or os.path.exists("/dev/accel0")):
        yield "there is an accelerator, but jax runs on the CPU: install jax[cuda13] or jax[tpu], or unset JAX_PLATFORMS"
    if jax.process_count() > 1 and len({d.process_index for d in jax.devices()}) != jax.process_count():
        yield "some processes have no device: give each its own (JAX_LOCAL_DEVICE_IDS)"
    counts = [sum(d.process_index == i for d in jax.devices()) for i in range(jax.process_count())]
    if len(set(counts)) > 1:
        yield f"processes have different numbers of devices: {counts}"
    if cluster is not None and backend == "cpu" and jax.local_device_count() > 1:
        yield f"{jax.local_device_count()} CPU devices per process: such runs hang; one per process works"
    proxies = [name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")]
    if cluster is not None and proxies:
        yield f"{', '.join(proxies)} set: processes may try to meet through the proxy; unset it, or add the hosts to no_proxy"
    peak = peak_of(kind)
    if peak is not None and rate["bfloat16"] < 0.3 * peak:
        yield f"bfloat16 matmuls reach {100 * rate['bfloat16'] / peak:.0f} % of {kind}'s peak: is another program on it?"
