"""One case of the attention benchmark, and the process that times it: ``python -m jaxft.bench.attention_case CASE``.

Dims: B batch, S length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from jaxft.bench.workers import PeakMemory, answer, keep_freed_memory
from jaxft.errors import UserError

if TYPE_CHECKING:  # workers of one library do not import the other
    import jax
    import torch

TORCH = ("torch-sdpa", "torch-eager", "torch-flash", "torch-cudnn")
"""torch's choice of a kernel, plain products, and on GPUs the kernels of one library alone."""
QUADRATIC = ("reference", "xla", "jax", "tokamax", "torch-eager")
"""Contenders whose memory grows with the square of the length."""

_KERNELS = {"torch-flash": "FLASH_ATTENTION", "torch-cudnn": "CUDNN_ATTENTION"}
_QUEUE_SECONDS = 5e-3
"""On an accelerator, calls are sent off one after the other for about so long before they are waited for, as in a training
step: what a single short call takes is mostly the way to the device and back."""


@dataclass(frozen=True)
class Ready:
    """A contender that can be timed."""

    passes: Mapping[str, Callable[[], object]]
    """``forward`` and ``both``: send off one call."""
    wait: Callable[[object], object]
    """Returns when a call's result is there."""
    about: dict[str, str | float]
    memory: Callable[[], int | None]
    """Bytes that both passes needed beyond their inputs."""

    def seconds(self, name: str, count: int) -> list[float]:
        """Times a pass ``count`` times: on an accelerator, the mean of calls in a queue."""
        queue = 1
        if self.about["platform"] != "cpu":
            queue = min(max(1, round(_QUEUE_SECONDS / self._once(name, 1))), 100)
        return [self._once(name, queue) for _ in range(count)]

    def _once(self, name: str, queue: int) -> float:
        begin = time.perf_counter()
        out = None
        for _ in range(queue):
            out = self.passes[name]()
        self.wait(out)
        return (time.perf_counter() - begin) / queue


@dataclass(frozen=True)
class Case:
    """What is timed."""

    backend: str
    rows: int
    heads: int
    key_heads: int
    length: int
    size: int
    operands: Literal["float32", "bfloat16"] = "float32"
    hidden: Literal["none", "padding", "segments"] = "none"
    causal: bool = False
    dropout: float = 0.0
    bits: Literal["threefry", "hash"] = "hash"

    @property
    def pairs(self) -> int:
        """Query-key pairs that may see each other by direction, padding and segments left out: B N S S, about half if causal."""
        seen = self.length * (self.length + 1) // 2 if self.causal else self.length**2
        return self.rows * self.heads * seen

    def flops(self, passes: str) -> int:
        """Useful ones: two products forwards, four backwards; what is computed again does not count."""
        return 4 * self.size * self.pairs * (3 if passes == "both" else 1)

    @property
    def key(self) -> str:
        """The same case of another run has the same key."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def needed_bytes(self) -> int:
        """A guess of what it needs at most."""
        logits = 4 * self.rows * self.heads * self.length**2
        return 5 * logits if self.backend in QUADRATIC else 64 * self.rows * self.heads * self.length * self.size

    def inputs(self) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Random q, k, v [B, N or K, S, H] and a random cotangent (one of all ones lets compilers simplify), and mask data: rows
        of three quarters of the length, or two documents a row."""
        rng = np.random.default_rng(0)
        shapes = [(self.rows, h, self.length, self.size) for h in (self.heads, self.key_heads, self.key_heads)]
        arrays = [rng.standard_normal(shape, dtype=np.float32) for shape in (*shapes, shapes[0])]
        place = np.broadcast_to(np.arange(self.length), (self.rows, self.length))
        real = place < max(1, 3 * self.length // 4)
        if self.hidden == "padding":
            return arrays, {"padding": real}
        if self.hidden == "segments":
            return arrays, {"segments": np.where(real, 1 + (place > self.length // 3), 0).astype(np.int32)}
        return arrays, {}


def main(text: str) -> None:
    """Says ready, then times a pass for each line: ``forward N`` or ``both N``; answers with the seconds of each of N."""
    case = Case(**json.loads(text))
    keep_freed_memory()
    start = time.perf_counter()
    try:
        ready = make_ready(case)
    except UserError as error:
        answer({"error": str(error)})
        return
    answer({**ready.about, "ready_seconds": time.perf_counter() - start})
    for line in sys.stdin:
        if not line.strip():
            break
        name, count = line.split()
        answer({"seconds": ready.seconds(name, int(count)), "peak_bytes": ready.memory()})


def make_ready(case: Case) -> Ready:
    """Compiles a case and runs each pass once.

    Raises:
      UserError: the contender cannot compute it; says why.
    """
    ready = (_torch_ready if case.backend in TORCH else _jax_ready)(case)
    for run in ready.passes.values():
        ready.wait(run())
    return ready


def _jax_ready(case: Case) -> Ready:
    import jax
    import jax.numpy as jnp

    from jaxft.attention import MaskSpec, attend, choices
    from jaxft.layers import Compute

    platform = jax.default_backend()
    accelerated = platform != "cpu"
    compute = Compute(
        attention=case.backend,
        matmul_dtype=case.operands,
        activation_dtype=case.operands if accelerated else "float32",
        dropout_bits=case.bits,
        padding_last=True,
        platform=platform,
        device=jax.devices()[0].device_kind if accelerated else None,
    )
    arrays, mask = case.inputs()
    key = jax.random.key(0) if case.dropout else None
    # On accelerators heads lie as a model's products leave them; what a kernel wants otherwise, it has to turn.
    turned = (lambda x: x.swapaxes(1, 2)) if accelerated else (lambda x: x)
    q, k, v, g = (turned(jnp.asarray(x, compute.activation_dtype)) for x in arrays)
    padding, segments = (jnp.asarray(mask[name]) if name in mask else None for name in ("padding", "segments"))
    spec = MaskSpec(padding, segments, case.causal)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, spec: MaskSpec) -> jax.Array:
        return turned(attend(turned(q), turned(k), turned(v), spec, compute, case.dropout, key))

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, spec: MaskSpec) -> tuple[jax.Array, ...]:
        out, vjp = jax.vjp(lambda q, k, v: forward(q, k, v, spec), q, k, v)
        return out, *vjp(g)

    start = time.perf_counter()
    with choices() as seen:
        one = jax.jit(forward).lower(q, k, v, spec).compile()
        two = jax.jit(both).lower(q, k, v, g, spec).compile()
    compiled = time.perf_counter() - start
    (choice,) = seen.values()
    about = {
        "platform": platform,
        "device": jax.devices()[0].device_kind,
        "backend": choice.backend.name,
        "compile_seconds": compiled,
        "peak_flops": _matmul_peak(compute.matmul_dtype),
    }
    # A device's own count of its memory never goes down: the program says what it takes itself.
    stats = two.memory_analysis() if accelerated else None
    needed = 0 if stats is None else stats.temp_size_in_bytes + stats.output_size_in_bytes
    return Ready(
        {"forward": lambda: one(q, k, v, spec), "both": lambda: two(q, k, v, g, spec)},
        jax.block_until_ready,
        about,
        (lambda: needed) if accelerated else PeakMemory().bytes,
    )


def _matmul_peak(operands: str) -> float:
    """FLOP/s of the best of a few large matmuls."""
    import jax
    import jax.numpy as jnp

    size = 2048
    x = jnp.ones((size, size), operands)
    run = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32)).lower(x).compile()
    return _best_flops(lambda: jax.block_until_ready(run(x)), 2 * size**3)


def _best_flops(run: Callable[[], object], flops: int) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return flops / min(seconds)


def _torch_ready(case: Case) -> Ready:
    import torch

    gpu = torch.cuda.is_available() and os.environ.get("JAX_PLATFORMS", "") != "cpu"
    if case.backend in _KERNELS and not gpu:
        raise UserError(f"{case.backend} runs on GPUs only")
    device = "cuda" if gpu else "cpu"
    dtype = getattr(torch, case.operands)
    arrays, mask = case.inputs()
    q, k, v, g = (torch.tensor(x, dtype=dtype, device=device) for x in arrays)
    if gpu:  # heads as a model's products leave them, seen as the kernels want them
        q, k, v, g = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, g))
    run = _torch_attention(case, _torch_mask(mask, case, device))

    def forward() -> None:
        with torch.no_grad():
            run(q, k, v)

    def both() -> None:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        run(*inputs).backward(g)

    def wait(out: object) -> None:
        if gpu:
            torch.cuda.synchronize()

    x = torch.ones(2048, 2048, dtype=dtype, device=device)

    def matmul() -> None:
        x @ x
        wait(None)

    about = {
        "platform": "gpu" if gpu else "cpu",
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "backend": case.backend,
        "compile_seconds": 0.0,
        "peak_flops": _best_flops(matmul, 2 * 2048**3),
    }
    if gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return Ready(
            {"forward": forward, "both": both}, wait, about, lambda: torch.cuda.max_memory_allocated() - before
        )
    return Ready({"forward": forward, "both": both}, wait, about, PeakMemory().bytes)


def _torch_attention(
    case: Case, allowed: torch.Tensor | None
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """``(q, k, v) -> out`` of a contender in torch."""
    import torch

    causal = case.causal and allowed is None

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        grouped = case.heads != case.key_heads
        function = torch.nn.functional.scaled_dot_product_attention
        return function(q, k, v, attn_mask=allowed, dropout_p=case.dropout, is_causal=causal, enable_gqa=grouped)

    def of_library(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, _KERNELS[case.backend])):
            try:
                return sdpa(q, k, v)
            except RuntimeError as error:
                raise UserError(f"{case.backend}: {str(error).splitlines()[0]}") from error

    def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        groups = case.heads // case.key_heads
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        logits = q @ k.transpose(-1, -2) * case.size**-0.5
        hidden = allowed
        if causal:
            hidden = torch.ones(case.length, case.length, dtype=torch.bool, device=q.device).tril()
        logits = logits if hidden is None else logits.masked_fill(~hidden, torch.finfo(q.dtype).min)
        return torch.dropout(torch.softmax(logits, -1), case.dropout, case.dropout > 0) @ v

    return eager if case.backend == "torch-eager" else of_library if case.backend in _KERNELS else sdpa


def _torch_mask(mask: dict[str, np.ndarray], case: Case, device: str) -> torch.Tensor | None:
    """[B, 1, 1 or S, S] bool, or None; queries of padding see themselves, for torch gives nan where nothing is seen."""
    import torch

    if not mask:
        return None
    if "padding" in mask:
        allowed = mask["padding"][:, None, None, :]
    else:
        segments = mask["segments"]
        allowed = (segments[:, :, None] == segments[:, None, :])[:, None]
    if case.causal:
        allowed = allowed & np.tril(np.ones((case.length, case.length), bool))
    return torch.tensor(allowed, device=device)


if __name__ == "__main__":
    main(sys.argv[1])
