"""One case of the attention benchmark, and the process that times it: ``python -m jaxft.bench.attention_case CASE``.

Dims: B batch, S length, N query heads, K key/value heads, H head size.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxft.bench.workers import PeakMemory, answer, keep_freed_memory
from jaxft.errors import UserError

TORCH = ("torch-sdpa", "torch-eager")
QUADRATIC = ("reference", "xla", "jax", "tokamax", "torch-eager")
"""Contenders whose memory grows with the square of the length."""

Passes = dict[str, Callable[[], Any]]


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
        passes, about, memory = (_torch_passes if case.backend in TORCH else _jax_passes)(case)
    except UserError as error:
        answer({"error": str(error)})
        return
    for run in passes.values():
        run()
    answer({**about, "ready_seconds": time.perf_counter() - start})
    for line in sys.stdin:
        if not line.strip():
            break
        name, count = line.split()
        seconds = []
        for _ in range(int(count)):
            begin = time.perf_counter()
            passes[name]()
            seconds.append(time.perf_counter() - begin)
        answer({"seconds": seconds, "peak_bytes": memory()})


def _jax_passes(case: Case) -> tuple[Passes, dict[str, Any], Callable[[], int | None]]:
    import jax
    import jax.numpy as jnp

    from jaxft.attention import MaskSpec, attend, choices
    from jaxft.layers import Compute
    from jaxft.memory import device_bytes

    platform = jax.default_backend()
    accelerated = platform != "cpu"
    compute = Compute(
        attention=case.backend,
        matmul_dtype=case.operands,
        activation_dtype=case.operands if accelerated else "float32",
        dropout_bits=case.bits,
        platform=platform,
    )
    arrays, mask = case.inputs()
    key = jax.random.key(0) if case.dropout else None
    q, k, v, g = (jnp.asarray(x, compute.activation_dtype) for x in arrays)
    padding, segments = (jnp.asarray(mask[name]) if name in mask else None for name in ("padding", "segments"))
    spec = MaskSpec(padding, segments, case.causal)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, spec: MaskSpec) -> jax.Array:
        return attend(q, k, v, spec, compute, case.dropout, key)

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, spec: MaskSpec) -> Any:
        out, vjp = jax.vjp(lambda q, k, v: forward(q, k, v, spec), q, k, v)
        return out, *vjp(g)

    start = time.perf_counter()
    with choices() as seen:
        one = jax.jit(forward).lower(q, k, v, spec).compile()
        two = jax.jit(both).lower(q, k, v, g, spec).compile()
    compiled = time.perf_counter() - start
    (choice,) = seen.values()
    matmul_peak = _matmul_peak(jax, jnp, compute.matmul_dtype)
    peak = PeakMemory()
    passes: Passes = {
        "forward": lambda: jax.block_until_ready(one(q, k, v, spec)),
        "both": lambda: jax.block_until_ready(two(q, k, v, g, spec)),
    }
    about = {
        "platform": platform,
        "device": jax.devices()[0].device_kind,
        "backend": choice.backend.name,
        "compile_seconds": compiled,
        "peak_flops": matmul_peak,
    }
    return passes, about, (device_bytes if accelerated else peak.bytes)


def _matmul_peak(jax: Any, jnp: Any, operands: str) -> float:
    """FLOP/s of the best of a few large matmuls."""
    size = 2048
    x = jnp.ones((size, size), operands)
    run = jax.jit(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32)).lower(x).compile()
    return _best_flops(lambda: jax.block_until_ready(run(x)), 2 * size**3)


def _best_flops(run: Callable[[], Any], flops: int) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return flops / min(seconds)


def _torch_passes(case: Case) -> tuple[Passes, dict[str, Any], Callable[[], int | None]]:
    import torch

    dtype = getattr(torch, case.operands)
    arrays, mask = case.inputs()
    q, k, v, g = (torch.tensor(x, dtype=dtype) for x in arrays)
    allowed = _torch_mask(torch, mask, case)

    def run(q: Any, k: Any, v: Any) -> Any:
        if case.backend == "torch-sdpa":
            sdpa = torch.nn.functional.scaled_dot_product_attention
            causal = case.causal and allowed is None
            grouped = case.heads != case.key_heads
            return sdpa(q, k, v, attn_mask=allowed, dropout_p=case.dropout, is_causal=causal, enable_gqa=grouped)
        groups = case.heads // case.key_heads
        k, v = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
        logits = q @ k.transpose(-1, -2) * case.size**-0.5
        hidden = allowed
        if hidden is None and case.causal:
            hidden = torch.ones(case.length, case.length, dtype=torch.bool).tril()
        logits = logits if hidden is None else logits.masked_fill(~hidden, torch.finfo(dtype).min)
        return torch.dropout(torch.softmax(logits, -1), case.dropout, case.dropout > 0) @ v

    def forward() -> None:
        with torch.no_grad():
            run(q, k, v)

    def both() -> None:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        run(*inputs).backward(g)

    x = torch.ones(2048, 2048, dtype=dtype)
    matmul_peak = _best_flops(lambda: x @ x, 2 * 2048**3)
    peak = PeakMemory()
    about = {
        "platform": "cpu",
        "device": "cpu",
        "backend": case.backend,
        "compile_seconds": 0.0,
        "peak_flops": matmul_peak,
    }
    return {"forward": forward, "both": both}, about, peak.bytes


def _torch_mask(torch: Any, mask: dict[str, np.ndarray], case: Case) -> Any:
    """[B, 1, 1 or S, S] bool, or None; queries of padding see themselves, for torch gives nan where nothing is seen."""
    if not mask:
        return None
    if "padding" in mask:
        allowed = mask["padding"][:, None, None, :]
    else:
        segments = mask["segments"]
        allowed = (segments[:, :, None] == segments[:, None, :])[:, None]
    if case.causal:
        allowed = allowed & np.tril(np.ones((case.length, case.length), bool))
    return torch.tensor(allowed)


if __name__ == "__main__":
    main(sys.argv[1])
