"""XLA flags with which a program is compiled several times quicker, and runs slower: most of the suite's run once or twice."""

from __future__ import annotations

import functools
import importlib.util
import mmap
from pathlib import Path

# LLVM need not polish. Loops are emitted without MLIR, and a program is one LLVM module: each more costs as much as the code
# in it. These two are read by some versions of XLA only, and an unknown flag ends the process.
_ALWAYS = ("--xla_backend_optimization_level=0",)
# Eight devices on two cores that do other work as well: one of them may be late, and the others, after 40 s, would end the process.
_WHERE_KNOWN = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_collective_call_terminate_timeout_seconds=300",
)


@functools.cache
def quick_flags() -> str:
    """For ``XLA_FLAGS``, of the suite and of the processes that it starts."""
    jaxlib = importlib.util.find_spec("jaxlib")
    folder = Path(jaxlib.origin).parent if jaxlib and jaxlib.origin else Path("nowhere")
    known = [flag for flag in _WHERE_KNOWN if _holds(folder / "libjax_common.so", flag[2:].split("=")[0].encode())]
    return " ".join([*_ALWAYS, *known])


def _holds(path: Path, name: bytes) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name) >= 0
