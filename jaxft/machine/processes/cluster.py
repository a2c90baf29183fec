"""Which processes make up a run, read from the environment that a launcher has set. No jax here."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from jaxft.errors import UserError

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TPU_PORT = 8476


@dataclass(frozen=True)
class Cluster:
    """One process's place among those of a run."""

    kind: str
    """What said so: ``environment``, ``slurm`` or ``tpu``."""
    address: str
    """HOST:PORT of process 0, where all meet."""
    count: int
    index: int
    hosts: tuple[str, ...] = ()
    """The host of each process, where the launcher tells; for messages."""
    local_devices: tuple[int, ...] | None = None
    """Which of the host's devices are this process's; None: all that it sees."""

    def host_of(self, index: int) -> str:
        """``process 3 on node17``, as far as known."""
        return f"process {index}" + (f" on {self.hosts[index]}" if index < len(self.hosts) else "")


def detect(environ: Mapping[str, str]) -> Cluster | None:
    """The cluster that the environment describes; None: this process is alone.

    Looked at, in this order: jax's own variables (``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES``,
    ``JAX_PROCESS_ID``; ``JAXFT_HOSTS`` may name the hosts, one per process), a step of SLURM's ``srun``, and the variables
    of Cloud TPU pods (several slices too).

    Raises:
      UserError: the variables contradict each other.
    """
    for of_kind in (_from_variables, _from_slurm, _from_tpu_pod):
        found = of_kind(environ)
        if found is not None:
            return found if found.count > 1 else None
    return None


def _from_variables(environ: Mapping[str, str]) -> Cluster | None:
    given = [name for name in _VARIABLES if environ.get(name)]
    if not given:
        return None
    missing = [name for name in _VARIABLES if name not in given]
    if missing:
        raise UserError(f"{' and '.join(given)} set, but not {' and '.join(missing)}: set all three, or none")
    address = environ[_VARIABLES[0]]
    count, index = (_number(environ, name) for name in _VARIABLES[1:])
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address}: expected HOST:PORT of process 0")
    if not 0 <= index < count:
        raise UserError(f"JAX_PROCESS_ID={index} must lie in 0..{count - 1} (JAX_NUM_PROCESSES={count})")
    hosts = tuple(name for name in environ.get("JAXFT_HOSTS", "").split(",") if name)
    if hosts and len(hosts) != count:
        raise UserError(f"JAXFT_HOSTS names {len(hosts)} hosts for JAX_NUM_PROCESSES={count}: name one per process")
    return Cluster("environment", address, count, index, hosts)


def _from_slurm(environ: Mapping[str, str]) -> Cluster | None:
    # Variables of a *step*: inside sbatch or salloc, before srun, there is only the script itself.
    if not all(name in environ for name in ("SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST", "SLURM_PROCID")):
        return None
    count, index = _number(environ, "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_PROCID")
    nodes = expand_nodes(environ["SLURM_STEP_NODELIST"])
    per_node = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), len(nodes))
    hosts = tuple(node for node, tasks in zip(nodes, per_node, strict=True) for _ in range(tasks))
    # A port of its own for each job on a node, as jax chooses it.
    port = _number(environ, "SLURM_JOB_ID") % 2**12 + (65535 - 2**12 + 1)
    devices = _share_of_gpus(environ, max(per_node))
    return Cluster("slurm", f"{nodes[0]}:{port}", count, index, hosts if len(hosts) == count else (), devices)


def _share_of_gpus(environ: Mapping[str, str], tasks: int) -> tuple[int, ...] | None:
    """Which of the GPUs that it sees are this task's, when all tasks of a node see all of them."""
    if tasks == 1 or not environ.get("SLURM_GPUS_ON_NODE") or not environ.get("SLURM_LOCALID"):
        return None
    gpus, local = _number(environ, "SLURM_GPUS_ON_NODE"), _number(environ, "SLURM_LOCALID")
    seen = environ.get("CUDA_VISIBLE_DEVICES") or environ.get("ROCR_VISIBLE_DEVICES")
    # With --gpus-per-task or --gpu-bind each task sees fewer than the node has: its own, counted from 0.
    if gpus < tasks or (seen and len(seen.split(",")) < gpus):
        return None
    if gpus % tasks:
        raise UserError(
            f"{tasks} tasks cannot share the {gpus} GPUs of a node evenly: set --ntasks-per-node to divide {gpus}"
        )
    share = gpus // tasks
    return tuple(range(local * share, (local + 1) * share))


def _from_tpu_pod(environ: Mapping[str, str]) -> Cluster | None:
    workers = tuple(name for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name)
    if not workers or "TPU_WORKER_ID" not in environ:
        return None
    worker = _number(environ, "TPU_WORKER_ID")
    slices = _number(environ, "MEGASCALE_NUM_SLICES") if environ.get("MEGASCALE_NUM_SLICES") else 1
    if slices == 1:
        return Cluster("tpu", f"{workers[0]}:{_TPU_PORT}", len(workers), worker, workers)
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS", "").rsplit(":", 1)[0]
    if not first:
        raise UserError("MEGASCALE_NUM_SLICES set, but not MEGASCALE_COORDINATOR_ADDRESS: set both, or none")
    index = _number(environ, "MEGASCALE_SLICE_ID") * len(workers) + worker
    return Cluster("tpu", f"{first}:{_TPU_PORT}", slices * len(workers), index)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not re.fullmatch(r"[0-9]+", text):
        raise UserError(f"{name}={text!r}: expected a number")
    return int(text)


def expand_nodes(text: str) -> list[str]:
    """The hosts that a SLURM node list names: ``n[01-03,7],login`` is n01, n02, n03, n7, login.

    Raises:
      UserError: it is not a node list.
    """
    part = r"(?:[^,\[\]]|\[[^\[\]]*\])+"
    if re.fullmatch(f"{part}(?:,{part})*", text) is None:
        raise UserError(f"SLURM node list {text!r}: cannot be read; expected such as n[01-03,7],login")
    found: list[str] = []
    for one in re.findall(part, text):
        # Text and numbers in turn; of several brackets the last one runs fastest, as in Slurm.
        pieces = [_numbers(piece, text) if i % 2 else [piece] for i, piece in enumerate(re.split(r"[\[\]]", one))]
        found += map("".join, itertools.product(*pieces))
    return found


def _numbers(ranges: str, text: str) -> list[str]:
    """``01-03,7`` is 01, 02, 03, 7."""
    found: list[str] = []
    for piece in ranges.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", piece)
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if match is None or not numbers:
            raise UserError(f"SLURM node list {text!r}: cannot be read at {piece!r}")
        found += [f"{number:0{len(match[1])}d}" for number in numbers]
    return found


def _tasks_per_node(text: str, nodes: int) -> list[int]:
    """``2(x3),1`` is 2, 2, 2, 1."""
    counts = []
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text!r}: cannot be read at {part!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts if len(counts) == nodes else [1] * nodes
