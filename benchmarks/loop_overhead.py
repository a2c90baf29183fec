"""What the loop costs besides the compiled step: share of wall time spent outside of it.

Runs `jaxft.training.loop.fit` on a run file, blocks on each compiled step so that its time can be told from the rest, and sums up what
passes between two steps: waiting for the batch, placing it, fetching and logging numbers. Blocking takes away the overlap that
a real run has, so this is an upper bound; "as it is" is the throughput of the same run left alone, one step in flight.

    python benchmarks/loop_overhead.py [RUN_FILE] [key=value ...]
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxft.config import load_config
from jaxft.training import loop, setup
from jaxft.training.programs import compile_programs

FIRST, STEPS = 10, 80


class Timed(dict):
    """Compiled steps that block, and note when they begin and end."""

    def __init__(self, programs: Mapping[Any, Any], spans: list[tuple[float, float]], block: bool) -> None:
        super().__init__({shape: self._timed(program, spans, block) for shape, program in programs.items()})

    @staticmethod
    def _timed(program: Any, spans: list[tuple[float, float]], block: bool) -> Any:
        def call(state: Any, batch: Any, seed: Any) -> Any:
            begin = time.perf_counter()
            done = program(state, batch, seed)
            if block:
                jax.block_until_ready(done)
            spans.append((begin, time.perf_counter()))
            return done

        return call


def main(arguments: list[str]) -> None:
    run_file = next((a for a in arguments if "=" not in a), "configs/runs/wordnet8_minilm.yaml")
    overrides = [a for a in arguments if "=" in a]
    fixed = [f"train.steps={STEPS}", "train.compilation_cache=null", "log.progress=off"]
    config = load_config(run_file, [*fixed, *overrides])
    ready = setup.prepare(config, print, setup.Times())
    ready = dataclasses.replace(ready, eval_every=10**9)
    programs = compile_programs(ready, print)
    for kind, steps in (("train", programs.train), ("eval", programs.evaluate)):
        programs.compilation.wait(kind, tuple(steps))  # nothing is to run beside the steps
    with tempfile.TemporaryDirectory() as folder:
        for block in (True, False):
            spans: list[tuple[float, float]] = []
            timed = dataclasses.replace(programs, train=Timed(programs.train, spans, block))
            loop.fit(ready, timed, Path(folder) / str(block), 0, lambda text: None, setup.Times())
            # The last step is followed by evaluation and checkpoint.
            wall = spans[STEPS - 1][0] - spans[FIRST][0]
            if block:
                inside = sum(end - begin for begin, end in spans[FIRST : STEPS - 1])
                gaps = [after[0] - before[1] for before, after in zip(spans[FIRST:], spans[FIRST + 1 :], strict=False)]
                print(
                    f"steps {FIRST}-{STEPS}: {wall:.2f} s, outside the compiled step {100 * (1 - inside / wall):.2f} % "
                    f"(median {1e3 * statistics.median(gaps):.2f} ms, worst {1e3 * max(gaps):.2f} ms a step)"
                )
            else:
                print(f"as it is: {wall:.2f} s, {1e3 * wall / (STEPS - 1 - FIRST):.1f} ms a step")


if __name__ == "__main__":
    main(sys.argv[1:])
