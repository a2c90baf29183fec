"""GPUs: what one can do, how many make up a cluster, and how XLA's CUDA compiler is told of one that is not there. No jax here.

Peaks (dense, without sparsity), memory bandwidth and NVLink: NVIDIA's data sheets "H100 Tensor Core GPU", "H200 Tensor Core GPU"
and "A100 80GB Tensor Core GPU", all of the SXM boards. Network: one card for each GPU, as NVIDIA builds its DGX machines (DGX H100
and H200: ConnectX-7 at 400 Gb/s; DGX A100: ConnectX-6 at 200 Gb/s); other machines have less. Memory, cores and their limits: as
CUDA reports them (``cudaDeviceProp``) and "CUDA C++ Programming Guide", table of technical specifications by compute capability.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxft.errors import UserError

_GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """What one GPU can do at its peak, and what a compiler has to know of it."""

    platform: ClassVar[str] = "gpu"

    name: str
    kind: str
    """The beginning of the device_kind that jax reports."""
    flops: float
    """FLOP/s with bf16 operands."""
    tf32_flops: float
    """FLOP/s with float32 operands of which the matrix units take 19 bits: what XLA makes of them by default."""
    float32_flops: float
    """FLOP/s with float32 operands as they are (precision HIGHEST), outside of the matrix units."""
    hbm_bytes: float
    hbm_bandwidth: float
    """Bytes per second."""
    nvlink_bandwidth: float
    """Bytes per second that one GPU can send to the others of its node."""
    network_bandwidth: float
    """Bytes per second that one GPU can send to other nodes."""
    capability: tuple[int, int]
    """Compute capability."""
    cores: int
    """Streaming multiprocessors."""
    lanes: int
    """float32 units of one core."""
    clock_hz: float
    l2_bytes: int
    shared_bytes_per_core: int
    shared_bytes_per_block: int
    """The most that a kernel may ask for."""

    def bandwidth(self, per_node: int, group: int, span: int) -> float:
        """Bytes per second that each of ``group`` GPUs can send around a ring of them, of which ``span`` lie between first and last.

        Inside a node that is NVLink. A ring that leaves it passes all of the group's GPUs of a node before it goes on to the next,
        and as many rings as these have network cards share the data (NCCL): what one GPU sends to the next leaves the node over
        all of their cards.
        """
        if span <= per_node:
            return self.nvlink_bandwidth
        cards = max(1, group * per_node // span)
        return min(self.nvlink_bandwidth, cards * self.network_bandwidth)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "h100", "NVIDIA H100", 989e12, 494e12, 67e12, 79.1 * _GIB, 3352e9, 450e9, 50e9,
            (9, 0), 132, 128, 1.98e9, 50 * 2**20, 228 * 2**10, 227 * 2**10,
        ),
        Gpu(
            "h200", "NVIDIA H200", 989e12, 494e12, 67e12, 139.8 * _GIB, 4800e9, 450e9, 50e9,
            (9, 0), 132, 128, 1.98e9, 60 * 2**20, 228 * 2**10, 227 * 2**10,
        ),
        Gpu(
            "a100", "NVIDIA A100", 312e12, 156e12, 19.5e12, 79.2 * _GIB, 2039e9, 300e9, 25e9,
            (8, 0), 108, 64, 1.41e9, 40 * 2**20, 164 * 2**10, 163 * 2**10,
        ),
    )
}  # fmt: skip

_NODE_SIZES = (1, 2, 4, 8)


def nodes_of(text: str, name: str, size: str, sizes: str | None) -> tuple[int, int]:
    """(nodes, GPUs of each) of ``h100-64``, whose ``size`` is 64, or of ``h100:4x8``, whose ``sizes`` are 4x8.

    Raises:
      UserError: no such number of GPUs.
    """
    if sizes is None:
        count = int(size)
        if count in _NODE_SIZES:
            return 1, count
        if count < 1 or count % 8:
            raise UserError(
                f"--topology {text!r}: one node has 1, 2, 4 or 8 GPUs, several have a multiple of 8; for other nodes write "
                f"{name}:NODESxGPUS, for instance {name}:4x4"
            )
        return count // 8, 8
    parts = [int(part) for part in sizes.split("x")]
    if len(parts) != 2 or parts[0] < 1 or parts[1] not in _NODE_SIZES:
        raise UserError(
            f"--topology {text!r}: expected {name}:NODESxGPUS with 1, 2, 4 or 8 GPUs of a node, for instance {name}:4x8"
        )
    return parts[0], parts[1]


# What a run has at least: jax[cuda13] brings newer ones. XLA takes cuDNN's fused attention by its version.
_CUDA, _CUDNN = (13, 0), (9, 10)


def target_config(gpu: Gpu) -> str:
    """A ``GpuTargetConfigProto`` as text, of the fields that decide about the program
    (xla/stream_executor/device_description.proto)."""
    major, minor = gpu.capability
    # From 9.0 on, XLA names GPUs with their own instructions (sm_90a).
    extension = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_core: {gpu.shared_bytes_per_core}
  shared_memory_per_block_optin: {gpu.shared_bytes_per_block}
  threads_per_core_limit: 2048
  core_count: {gpu.cores}
  fpus_per_core: {gpu.lanes}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  memory_bandwidth: {gpu.hbm_bandwidth:.0f}
  l2_cache_size: {gpu.l2_bytes}
  clock_rate_ghz: {gpu.clock_hz / 1e9:g}
  device_memory_size: {gpu.hbm_bytes:.0f}
  cuda_compute_capability {{ major: {major} minor: {minor}{extension} }}
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
}}
platform_name: "CUDA"
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} }}
runtime_version {{ major: {_CUDA[0]} minor: {_CUDA[1]} patch: 0 }}
device_description_str: "{gpu.kind}"
"""
