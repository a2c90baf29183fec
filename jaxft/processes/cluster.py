"""Which processes make up a run, read from the environment that a launcher has set. No jax here."""

from __future__ import annotations

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
    devices = None
    if max(per_node) > 1 and "SLURM_LOCALID" in environ and int(environ.get("SLURM_GPUS_ON_NODE", "0")) > 1:
        devices = (_number(environ, "SLURM_LOCALID"),)
    return Cluster("slurm", f"{nodes[0]}:{port}", count, index, hosts if len(hosts) == count else (), devices)


def _from_tpu_pod(environ: Mapping[str, str]) -> Cluster | None:
    workers = tuple(name for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name)
    if not workers or "TPU_WORKER_ID" not in environ:
        return None
    worker = _number(environ, "TPU_WORKER_ID")
    slices = int(environ.get("MEGASCALE_NUM_SLICES", "1"))
    if slices == 1:
        return Cluster("tpu", f"{workers[0]}:{_TPU_PORT}", len(workers), worker, workers)
    first = environ.get("MEGASCALE_COORDINATOR_ADDRESS", "").rsplit(":", 1)[0]
    if not first:
        raise UserError("MEGASCALE_NUM_SLICES set, but not MEGASCALE_COORDINATOR_ADDRESS: set both, or none")
    index = _number(environ, "MEGASCALE_SLICE_ID") * len(workers) + worker
    return Cluster("tpu", f"{first}:{_TPU_PORT}", slices * len(workers), index)


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not re.fullmatch(r"\d+", text):
        raise UserError(f"{name}={text!r}: expected a number")
    return int(text)


def expand_nodes(text: str) -> list[str]:
    """The hosts that a SLURM node list names: ``n[01-03,7],login`` is n01, n02, n03, n7, login.

    Raises:
      UserError: it is not a node list.
    """
    found: list[str] = []
    for part in re.findall(r"[^,\[\]]+(?:\[[^\]]*\][^,\[\]]*)?", text):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if match is None:
            found.append(part)
            continue
        prefix, ranges, suffix = match.groups()
        for piece in ranges.split(","):
            first, _, last = piece.partition("-")
            if not first.isdigit() or not (last or first).isdigit():
                raise UserError(f"SLURM node list {text!r}: cannot be read at {piece!r}")
            numbers = range(int(first), int(last or first) + 1)
            found += [f"{prefix}{number:0{len(first)}d}{suffix}" for number in numbers]
    if not found:
        raise UserError(f"SLURM node list {text!r} names no host")
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
