"""Chips and how many of them make up what is sold under a name: TPUs here, GPUs in ``gpus.py``. No jax here.

Peaks and memory: Google Cloud's TPU system architecture pages. Links: Austin et al. 2025, "How to Scale Your Model", table of
interconnect bandwidths; one ring uses both directions of a link. Clocks: found by pricing known programs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from jaxft.errors import UserError, nearest
from jaxft.machine.gpus import GPUS, Gpu, nodes_of

_GIB = 2**30


@dataclass(frozen=True)
class Tpu:
    """What one TPU chip can do at its peak."""

    platform: ClassVar[str] = "tpu"

    name: str
    flops: float
    """bf16 FLOP/s."""
    hbm_bytes: float
    hbm_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """Bytes per second along one axis of the torus, both directions together."""
    clock_hz: float
    cores: int
    """Cores per chip, as the names of slices count them: v4-8 is 4 chips."""
    dimensions: int
    """Dimensions of the torus that chips form."""
    wraps: int
    """Axes are closed to rings from this size on, in multiples of it; shorter ones are lines, with half the bandwidth."""

    def bandwidth(self, torus: tuple[int, ...], group: int) -> float:
        """Bytes per second that each of ``group`` chips can send to the others: over as many axes as the group needs."""
        total, reached = 0.0, 1
        for size in sorted(torus, reverse=True):
            if reached >= group:
                break
            total += self.link_bandwidth * (1.0 if size % self.wraps == 0 else 0.5)
            reached *= size
        return total or self.link_bandwidth


Chip = Tpu | Gpu
CHIPS = {
    "v4": Tpu("v4", 275e12, 32 * _GIB, 1228e9, 9e10, 1.05e9, 2, 3, 4),
    "v5e": Tpu("v5e", 197e12, 16 * _GIB, 819e9, 9e10, 1.5e9, 1, 2, 16),
    "v5p": Tpu("v5p", 459e12, 95 * _GIB, 2765e9, 1.8e11, 1.75e9, 2, 3, 4),
    "v6e": Tpu("v6e", 918e12, 32 * _GIB, 1640e9, 1.8e11, 1.75e9, 1, 2, 16),
}
# By the device_kind that jax reports on hardware.
KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
}

# bf16 FLOP/s of GPUs that are not planned for, dense, by the beginning of their device_kind (NVIDIA's data sheets).
_OTHER_GPUS = {"NVIDIA L4": 121e12, "NVIDIA B200": 2250e12}


def peak_of(device_kind: str) -> float | None:
    """bf16 FLOP/s of a device as jax names it; None where they are not known (CPUs)."""
    if device_kind in KINDS:
        return CHIPS[KINDS[device_kind]].flops
    peaks = {gpu.kind: gpu.flops for gpu in GPUS.values()} | _OTHER_GPUS
    return next((flops for kind, flops in peaks.items() if device_kind.startswith(kind)), None)


@dataclass(frozen=True)
class Topology:
    """So many chips of a kind, or CPU devices."""

    text: str
    chip: Chip | None
    """None: of a CPU, nothing is known."""
    shape: tuple[int, ...]
    """Sizes of a TPU's torus; for GPUs, the number of nodes and of GPUs in each."""

    @property
    def chips(self) -> int:
        """How many there are."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def layout(self) -> str:
        """For people: 4x4, or 8 nodes of 8."""
        if isinstance(self.chip, Gpu):
            nodes, each = self.shape
            return f"{nodes} node{'s' * (nodes > 1)} of {each}"
        return "x".join(map(str, self.shape))

    def nodes(self, span: int) -> int:
        """Over how many nodes of GPUs a group lies that reaches from its first to its last device over ``span``; 1 for others."""
        return -(-span // self.shape[1]) if isinstance(self.chip, Gpu) else 1

    def bandwidth(self, group: int, span: int | None = None) -> float:
        """Bytes per second that each of ``group`` chips can send to the others.

        Args:
          group: how many exchange with each other.
          span: from the first of them to the last, in the order of the devices; by default they are neighbours. TPU groups
            are taken to lie along axes of the torus, whatever it says.
        """
        assert self.chip is not None
        if isinstance(self.chip, Gpu):
            return self.chip.bandwidth(self.shape[1], group, span or group)
        return self.chip.bandwidth(self.shape, group)

    @property
    def libtpu_name(self) -> str:
        """libtpu's name for the slice."""
        assert self.chip is not None
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """``v5e-16`` (as Google Cloud names slices: v4 and v5p count two cores per chip), ``v5e:4x4``, ``h100-64``, ``h100:8x8`` (nodes
    and the GPUs of each), or ``cpu:8``.

    Raises:
      UserError: no such chip or size.
    """
    match = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+)*))", text)
    if match is None:
        raise UserError(f"--topology {text!r}: expected a name such as v5e-16, v5p:2x2x4, h100-8 or cpu:8")
    name, size, sizes = match.groups()
    if name == "cpu":
        shape = tuple(int(part) for part in (sizes or size).split("x"))
        if len(shape) != 1 or not 0 < shape[0] <= 512:
            raise UserError(
                f"--topology {text!r}: of CPU devices, 1 to 512 in a row can be simulated, for instance cpu:8"
            )
        return Topology(text, None, shape)
    if name in GPUS:
        return Topology(text, GPUS[name], nodes_of(text, name, size, sizes))
    if name not in CHIPS:
        raise UserError(f"--topology {text!r}: unknown chip {name!r}: {nearest(name, [*CHIPS, *GPUS, 'cpu'])}")
    chip = CHIPS[name]
    if sizes is not None:
        shape = tuple(int(part) for part in sizes.split("x"))
        if len(shape) != chip.dimensions or min(shape) < 1:
            raise UserError(f"--topology {text!r}: {name} chips form a torus of {chip.dimensions} dimensions")
        return Topology(text, chip, shape)
    count, rest = divmod(int(size), chip.cores)
    if rest or count < 1 or count & (count - 1):
        unit = "cores, two per chip," if chip.cores == 2 else "chips"
        raise UserError(
            f"--topology {text!r}: the number of {unit} must be a power of two; or give the torus, {name}:..."
        )
    return Topology(text, chip, _torus(count, chip.dimensions))


def _torus(count: int, dimensions: int) -> tuple[int, ...]:
    """The most cubic torus of a power of two: 32 is 2x4x4, or 4x8."""
    shape = [1] * dimensions
    while count > 1:
        shape[min(range(dimensions), key=lambda i: (shape[i], i))] *= 2
        count //= 2
    # A lone host is 2x2x1; larger ones are written with the smallest size first.
    return tuple(sorted(shape)) if min(shape) > 1 else tuple(sorted(shape, reverse=True))
