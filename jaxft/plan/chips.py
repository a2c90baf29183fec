"""Chips and how many of them make up what is sold under a name. No jax here.

Peaks and memory: Google Cloud's TPU system architecture pages. Links: Austin et al. 2025, "How to Scale Your Model", table of
interconnect bandwidths; one ring uses both directions of a link. Clocks: found by pricing known programs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from jaxft.errors import UserError, nearest

_GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What one chip can do at its peak."""

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
    """As the names of slices count them: v4-8 is 4 chips."""
    dimensions: int
    """Of the torus that chips form."""
    wraps: int
    """Axes are closed to rings from this size on, in multiples of it; shorter ones are lines, with half the bandwidth."""


CHIPS = {
    "v4": Chip("v4", 275e12, 32 * _GIB, 1228e9, 9e10, 1.05e9, 2, 3, 4),
    "v5e": Chip("v5e", 197e12, 16 * _GIB, 819e9, 9e10, 1.5e9, 1, 2, 16),
    "v5p": Chip("v5p", 459e12, 95 * _GIB, 2765e9, 1.8e11, 1.75e9, 2, 3, 4),
    "v6e": Chip("v6e", 918e12, 32 * _GIB, 1640e9, 1.8e11, 1.75e9, 1, 2, 16),
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

# bf16 FLOP/s of GPUs, dense, by the beginning of their device_kind (makers' data sheets).
GPUS = {
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA B200": 2250e12,
}


def peak_of(device_kind: str) -> float | None:
    """bf16 FLOP/s of a device as jax names it; None where they are not known (CPUs)."""
    if device_kind in KINDS:
        return CHIPS[KINDS[device_kind]].flops
    return next((flops for name, flops in GPUS.items() if device_kind.startswith(name)), None)


@dataclass(frozen=True)
class Topology:
    """So many chips of a kind, or CPU devices."""

    text: str
    chip: Chip | None
    """None: of a CPU, nothing is known."""
    shape: tuple[int, ...]
    """Of the torus."""

    @property
    def chips(self) -> int:
        """How many there are."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def bandwidth(self, group: int) -> float:
        """Bytes per second that each of ``group`` chips can send to the others: over as many axes as the group needs."""
        assert self.chip is not None
        total, reached = 0.0, 1
        for size in sorted(self.shape, reverse=True):
            if reached >= group:
                break
            total += self.chip.link_bandwidth * (1.0 if size % self.chip.wraps == 0 else 0.5)
            reached *= size
        return total or self.chip.link_bandwidth

    @property
    def libtpu_name(self) -> str:
        """As libtpu calls it."""
        assert self.chip is not None
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def parse_topology(text: str) -> Topology:
    """``v5e-16`` (as Google Cloud names slices: v4 and v5p count two cores per chip), ``v5e:4x4``, or ``cpu:8``.

    Raises:
      UserError: no such chip or size.
    """
    match = re.fullmatch(r"(\w+?)(?:-(\d+)|:(\d+(?:x\d+)*))", text)
    if match is None:
        raise UserError(f"--topology {text!r}: expected a name such as v5e-16, v5p:2x2x4 or cpu:8")
    name, size, sizes = match.groups()
    if name == "cpu":
        shape = tuple(int(part) for part in (sizes or size).split("x"))
        if len(shape) != 1 or not 0 < shape[0] <= 512:
            raise UserError(
                f"--topology {text!r}: of CPU devices, 1 to 512 in a row can be simulated, for instance cpu:8"
            )
        return Topology(text, None, shape)
    if name not in CHIPS:
        raise UserError(f"--topology {text!r}: unknown chip {name!r}: {nearest(name, [*CHIPS, 'cpu'])}")
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
