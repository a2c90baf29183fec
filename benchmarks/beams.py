"""How fast an encoder-decoder writes with beams, beside `transformers` on torch: random weights of T5-small's shape, float32.

Contenders take turns in one process; medians of tokens a second over whole calls, sources read anew in each.

    python benchmarks/beams.py [--rows 8] [--source 64] [--new 32] [--beams 4] [--turns 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from reported import Rows, report

from jaxft.config.generation import GenerationConfig
from jaxft.layers import Compute
from jaxft.machine.platform import set_up_jax
from jaxft.models.decoding import generate
from jaxft.models.families import t5
from jaxft.models.initial import init_params

_SHAPE = t5.Config()  # T5-small
_CACHE = Path(tempfile.gettempdir()) / "jaxft-benchmark-programs"
_HEAD = "seq2seq_lm"


def _sources(options: argparse.Namespace) -> list[list[int]]:
    return np.random.default_rng(0).integers(5, 32000, (options.rows, options.source)).tolist()


def _ours(options: argparse.Namespace, params: Any) -> Callable[[], list[list[int]]]:
    model = t5.Model(_SHAPE, _HEAD, Compute())
    config = GenerationConfig(
        max_new_tokens=options.new, min_new_tokens=options.new, num_beams=options.beams, eos_token_id=(1,)
    )
    return lambda: generate(model, params, _sources(options), config).tokens


def _theirs(options: argparse.Namespace, params: Any) -> Callable[[], list[list[int]]]:
    import torch
    import transformers

    from jaxft.hub.convert import export_tensors

    stated: dict[str, Any] = t5.config_to_hf(_SHAPE)
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**stated)).eval()
    layout = t5.hf_layout(_SHAPE, _HEAD)
    tensors: dict[str, Any] = {
        one.name: torch.tensor(np.asarray(one.read())) for one in export_tensors(params, layout, bare=False, dtype=None)
    }
    theirs.load_state_dict(tensors, strict=False)
    theirs.tie_weights()
    ids = torch.tensor(_sources(options))

    def call() -> list[list[int]]:
        with torch.no_grad():
            out = theirs.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new, min_new_tokens=options.new,
                num_beams=options.beams, do_sample=False,
            )  # fmt: skip
        return out[:, 1:].tolist()

    return call


def compare(options: argparse.Namespace) -> Rows:
    set_up_jax(str(_CACHE))
    params = jax.block_until_ready(init_params(t5.Model(_SHAPE, _HEAD, Compute()), 0))
    made = {"jaxft": _ours(options, params), "eager": _theirs(options, params)}
    said = {name: call() for name, call in made.items()}  # compiles
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(options.turns):
        for name, call in made.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    return [
        {
            "what": name,
            "tokens/s": options.rows * options.new / statistics.median(spent),
            "same": said[name] == said["jaxft"],
        }
        for name, spent in times.items()
    ]


def _text(rows: Rows) -> str:
    ours = rows[0]["tokens/s"]
    return "\n".join(
        f"{row['what']:10} {row['tokens/s']:8.1f} tokens/s {ours / row['tokens/s']:6.2f}x {'' if row['same'] else 'OTHER TOKENS'}"
        for row in rows
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, usual in (("rows", 8), ("source", 64), ("new", 32), ("beams", 4), ("turns", 5)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    parsed.run = f"T5-small shape, {parsed.rows} sources of {parsed.source} tokens, {parsed.beams} beams"
    report(parsed, ("jax", "torch", "transformers", "numpy"), compare, _text)
