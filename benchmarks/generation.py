"""How fast a decoder goes on with a prompt, beside `transformers` on torch: random weights of SmolLM2-135M's shape, greedy, float32.

Contenders take turns in one process; medians of tokens a second over whole calls (the prompt is short), and the seconds to the first token
of a process whose programs were compiled before.

    python benchmarks/generation.py [--rows 1] [--new 128] [--turns 5] [--contenders jaxft eager static draft] [--json FILE]

``draft`` proposes tokens with the first layers of the same weights (``--draft-layers``, ``--draft-tokens``, ``--later``).
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from reported import Rows, report

from jaxft.inference.generation import Draft, GenerationConfig, generate, generate_with_draft
from jaxft.layers import Compute
from jaxft.machine.platform import set_up_jax
from jaxft.models.families import llama
from jaxft.models.initial import init_params

_SHAPE = llama.Config(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
_PROMPT = 32
_CACHE = Path(tempfile.gettempdir()) / "jaxft-benchmark-programs"


def _prompts(rows: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(5, _SHAPE.vocab_size, (rows, _PROMPT)).tolist()


def _ours(options: argparse.Namespace, new: int) -> Callable[[], list[list[int]]]:
    set_up_jax(str(_CACHE))
    model = llama.Model(_SHAPE, "causal_lm", Compute())
    params = _params(model, options)
    return lambda: generate(model, params, _prompts(options.rows), GenerationConfig(max_new_tokens=new)).tokens


def _drafted(options: argparse.Namespace) -> Callable[[], list[list[int]]]:
    set_up_jax(str(_CACHE))
    model = llama.Model(_SHAPE, "causal_lm", Compute())
    small = llama.Model(dataclasses.replace(_SHAPE, num_hidden_layers=options.draft_layers), "causal_lm", Compute())
    params = _params(model, options)
    first = {**params, "layers": jax.tree.map(lambda leaf: leaf[: options.draft_layers], params["layers"])}
    draft = Draft(small, jax.block_until_ready(first), options.draft_tokens)
    config = GenerationConfig(max_new_tokens=options.new)
    return lambda: generate_with_draft(model, params, draft, _prompts(options.rows), config).tokens


def _params(model: Any, options: argparse.Namespace) -> Any:
    """Random weights; what the layers behind the draft's add to the residual stream is scaled: the less, the oftener it is right."""
    params, layers = init_params(model, 0), options.draft_layers
    if options.later == 1:
        return jax.block_until_ready(params)

    def scaled(path: Any, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path)
        return leaf.at[layers:].multiply(options.later) if "'out'" in name or "'down'" in name else leaf

    return jax.block_until_ready(jax.tree_util.tree_map_with_path(scaled, params))


def _theirs(rows: int, new: int, how: str) -> Callable[[], list[list[int]]]:
    import torch
    import transformers

    from jaxft.hub.convert import export_tensors

    model = llama.Model(_SHAPE, "causal_lm", Compute())
    params, layout = init_params(model, 0), llama.hf_layout(_SHAPE, "causal_lm")
    stated: dict[str, Any] = llama.config_to_hf(_SHAPE)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**stated)).eval()
    tensors: dict[str, Any] = {
        one.name: torch.tensor(np.asarray(one.read())) for one in export_tensors(params, layout, bare=False, dtype=None)
    }
    theirs.load_state_dict(tensors, strict=False)
    theirs.tie_weights()
    ids = torch.tensor(_prompts(rows))
    more = {"cache_implementation": "static"} if how == "static" else {}

    def call() -> list[list[int]]:
        with torch.no_grad():
            out = theirs.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                pad_token_id=0, **more,
            )  # fmt: skip
        return out[:, _PROMPT:].tolist()

    return call


def compare(options: argparse.Namespace) -> Rows:
    made = {
        name: _ours(options, options.new)
        if name == "jaxft"
        else _drafted(options)
        if name == "draft"
        else _theirs(options.rows, options.new, name)
        for name in options.contenders
    }
    said = {name: call() for name, call in made.items()}  # compiles
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(options.turns):
        for name, call in made.items():
            began = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - began)
    rows: Rows = [
        {
            "what": name,
            "tokens/s": options.rows * options.new / statistics.median(spent),
            "same": said[name] == said[options.contenders[0]],
        }
        for name, spent in times.items()
    ]
    if "jaxft" in made and "draft" not in made:
        child = [sys.executable, __file__, "--first", "--rows", str(options.rows), "--new", str(options.new)]
        told = subprocess.run(child, capture_output=True, text=True, check=True).stdout
        rows.append({"what": "jaxft: first token", "seconds": float(told.split()[-1])})
    return rows


def _first(options: argparse.Namespace) -> None:
    """Seconds from the call to the first token, in a process whose programs lie in the cache."""
    call = _ours(options, 1)
    began = time.perf_counter()
    call()
    print(time.perf_counter() - began)


def _text(rows: Rows) -> str:
    ours = next((row["tokens/s"] for row in rows if row["what"] == "jaxft"), None)
    lines = []
    for row in rows:
        if "seconds" in row:
            lines.append(f"{row['what']:20} {row['seconds']:8.2f} s from a warm cache of programs")
            continue
        ratio = "" if ours is None else f"{ours / row['tokens/s']:6.2f}x"
        lines.append(
            f"{row['what']:20} {row['tokens/s']:8.1f} tokens/s {ratio} {'' if row['same'] else 'OTHER TOKENS'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument(
        "--contenders", nargs="+", default=["jaxft", "eager"], choices=["jaxft", "eager", "static", "draft"]
    )
    parser.add_argument(
        "--draft-layers", type=int, default=_SHAPE.num_hidden_layers // 3, help="the first ones of the model"
    )
    parser.add_argument("--draft-tokens", type=int, default=5)
    parser.add_argument(
        "--later", type=float, default=1.0, help="scale of what the other layers add (with jaxft and draft alone)"
    )
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    parsed = parser.parse_args()
    parsed.run = f"SmolLM2-135M shape, {parsed.rows} rows"
    if parsed.first:
        _first(parsed)
        _first(parsed)
    else:
        report(parsed, ("jax", "torch", "transformers", "numpy"), compare, _text)
