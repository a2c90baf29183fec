"""``jaxft bench attention``: every attention backend on this machine, beside torch where it is installed."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from jaxft.errors import UserError
from jaxft.machine.platform import look_for_no_tpu

_PACKAGES = ("jaxft", "jax", "jaxlib", "torch", "numpy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("what", choices=["attention"])
    parser.add_argument(
        "--backends",
        nargs="+",
        default=["auto", "native", "blockwise", "xla", "jax"],
        help="of model.attention; torch-eager; on GPUs torch-flash, torch-cudnn (default: %(default)s, and torch-sdpa where torch "
        "is installed)",
    )
    parser.add_argument(
        "--lengths", nargs="+", type=int, default=[128, 512, 2048], help="tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        default=["2x12x64"],
        help="rows x heads x head size, or rows x heads/key heads x head size, for instance 2x32/8x128",
    )
    parser.add_argument("--operands", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--hidden", choices=["none", "padding", "segments"], default="none", help="what the mask hides")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0, metavar="RATE")
    parser.add_argument("--bits", choices=["threefry", "hash"], default="hash", help="of dropout")
    parser.add_argument("--turns", type=int, default=5, help="how often each contender's turn comes")
    parser.add_argument("--turn-seconds", type=float, default=0.4, help="about how long a turn of a pass takes")
    parser.add_argument("--no-torch", action="store_true", help="leave torch out though it is installed")
    parser.add_argument("--out", metavar="FOLDER", help="write attention.json, .csv and .png there")
    parser.add_argument("--against", metavar="RESULT.json", help="print ratios of times to those of an earlier run")


def run(options: argparse.Namespace) -> int:
    """Prints a table per shape as soon as it is measured."""
    from jaxft.bench.attention import Result, run_cases
    from jaxft.bench.machine import machine
    from jaxft.bench.results import read_results, text_of, write_results
    from jaxft.reporting.plots import lacking

    look_for_no_tpu()
    before = read_results(Path(options.against)) if options.against else None
    groups = list(_groups(options))
    about = machine(_PACKAGES)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    print(
        "forward: 4 B N S S H useful FLOPs, forward + backward: 12; ms: median; of peak: of a 2048-cubed matmul; MiB: needed "
        "beyond inputs by both passes",
        flush=True,
    )
    results: list[Result] = []
    for group in groups:
        found = run_cases([group], options.turns, options.turn_seconds, lambda text: print(text, flush=True))
        if found:
            print(f"\n{text_of(found, before)}", flush=True)
        results += found
    if not results:
        raise UserError("nothing could be measured; see above")
    if options.out:
        print(f"\nwrote {', '.join(map(str, write_results(Path(options.out), about, results)))}")
        if (why := lacking()) is not None:
            print(why)
    return 0


def _groups(options: argparse.Namespace) -> Iterator[list]:
    """Cases that differ by contender only."""
    from jaxft.attention import NAMES
    from jaxft.bench.attention_case import TORCH, Case
    from jaxft.errors import nearest

    backends = list(dict.fromkeys(options.backends))
    for name in backends:
        if name not in ("auto", *NAMES, *TORCH):
            raise UserError(f"--backends {name}: {nearest(name, ('auto', *NAMES, *TORCH))}")
    has_torch = importlib.util.find_spec("torch") is not None
    asked_torch = [name for name in backends if name in TORCH]
    if asked_torch and (options.no_torch or not has_torch):
        raise UserError(f"--backends {asked_torch[0]}: torch is {'left out' if has_torch else 'not installed'}")
    if has_torch and not options.no_torch and TORCH[0] not in backends:
        backends.append(TORCH[0])
    if not 0.0 <= options.dropout < 1.0:
        raise UserError(f"--dropout {options.dropout}: must be at least 0 and less than 1")
    if options.turns < 1 or options.turn_seconds <= 0:
        raise UserError("--turns and --turn-seconds must be above 0")
    for shape in options.shape:
        rows, heads, key_heads, size = _shape(shape)
        for operands in options.operands:
            for length in options.lengths:
                if length < 1:
                    raise UserError(f"--lengths {length}: must be at least 1")
                yield [
                    Case(
                        name, rows, heads, key_heads, length, size, operands, options.hidden, options.causal,
                        options.dropout, options.bits,
                    )
                    for name in backends
                ]  # fmt: skip


def _shape(text: str) -> tuple[int, int, int, int]:
    """Rows, heads, key heads and head size."""
    found = re.fullmatch(r"(\d+)x(\d+)(?:/(\d+))?x(\d+)", text)
    if found is None:
        raise UserError(f"--shape {text}: must be ROWSxHEADSxSIZE or ROWSxHEADS/KEY_HEADSxSIZE, for instance 2x12x64")
    rows, heads, size = int(found[1]), int(found[2]), int(found[4])
    key_heads = heads if found[3] is None else int(found[3])
    if 0 in (rows, heads, key_heads, size) or heads % key_heads:
        raise UserError(f"--shape {text}: nothing may be 0, and key heads must divide heads")
    return rows, heads, key_heads, size
