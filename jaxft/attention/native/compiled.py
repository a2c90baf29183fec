"""The C++ half of backend ``native``: compiled when it is first asked for, kept for later, loaded, and made known to XLA."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.resources
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib

SOURCES = ("native.cc", "blocks.h", "operands.h", "parallel.h", "vectors.h")
FORWARD, BACKWARD = "jaxft_attention_forward", "jaxft_attention_backward"
ENDINGS = {
    ("float32", "float32"): "",
    ("bfloat16", "bfloat16"): "_bfloat16",
    ("bfloat16", "float32"): "_bfloat16_float32",
}
"""Endings of kernels' names by the types of products and of arrays. The bfloat16 ones exist where the processor multiplies it."""
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-w")
_SECONDS = 180


@functools.cache
def unavailable() -> str | None:
    """Why there is no native attention here, as the end of a sentence; None: there is, and XLA knows it.

    The compiler is ``$CXX``, or the first of c++, g++ and clang++. Libraries lie in ``$XDG_CACHE_HOME/jaxft`` (``~/.cache/jaxft``),
    named after source, compiler, jaxlib and processor: machines that share a home do not run each other's instructions.
    ``JAXFT_NATIVE=0`` does without.
    """
    if os.environ.get("JAXFT_NATIVE") == "0":
        return "is switched off (JAXFT_NATIVE=0)"
    try:
        compiler = _compiler()
    except ValueError as error:
        return f"cannot read CXX={os.environ['CXX']}: {error}"
    if compiler is None:
        return "needs a C++ compiler, and there is no c++, g++ or clang++ (install one, or set CXX)"
    try:
        library = ctypes.CDLL(str(_library(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"could not be compiled by {shlex.join(compiler)}: {_reason(error)}"
    for name in (name + ending for name in (FORWARD, BACKWARD) for ending in ENDINGS.values()):
        if hasattr(library, name):
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
            _there.add(name)
    return None


_there: set[str] = set()


def multiplies_bfloat16() -> bool:
    """Whether the processor does, and the kernels with it."""
    return unavailable() is None and BACKWARD + ENDINGS["bfloat16", "float32"] in _there


def _compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CXX", ""))
    if named:
        return named
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def _library(compiler: list[str]) -> Path:
    """The compiled library, made if it is not there."""
    package = importlib.resources.files("jaxft.attention.native")
    sources = {name: package.joinpath(name).read_bytes() for name in SOURCES}
    version = _output([*compiler, "--version"])
    parts = (
        *sources.values(),
        version,
        shlex.join((*compiler, *_FLAGS)).encode(),
        jaxlib.__version__.encode(),
        _processor(),
    )
    name = f"attention-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:20]}.so"
    target = _folder() / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            for source, text in sources.items():
                (Path(folder) / source).write_bytes(text)
            code, made = Path(folder) / SOURCES[0], Path(folder) / name
            _output([*compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), str(code), "-o", str(made)])
            os.replace(made, target)  # other processes see all of it or nothing
    return target


def _folder() -> Path:
    """Where libraries are kept: the user's own cache, never a shared temporary folder, for what lies there is run."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxft"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _processor() -> bytes:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    return "\n".join([platform.machine(), platform.processor(), *kinds]).encode()


def _output(command: list[str]) -> bytes:
    return subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, stdin=subprocess.DEVNULL).stdout


def _reason(error: OSError | subprocess.SubprocessError) -> str:
    """One line."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").splitlines()
        return next((line for line in lines if "error" in line), f"exit code {error.returncode}")
    return str(error)
