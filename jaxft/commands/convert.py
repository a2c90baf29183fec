"""``jaxft convert``: Hugging Face folder, old Flax or PyTorch file, run or checkpoint in; Hugging Face folder or jaxft checkpoint out."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument(
        "source",
        help="Hugging Face folder or hub id (safetensors, pytorch_model.bin, flax_model.msgpack), run, or checkpoint",
    )
    parser.add_argument("target", help="folder to write; must not exist, or be empty")
    parser.add_argument("--to", choices=("hf", "jaxft"), default="hf", help="layout of the target (default: hf)")
    parser.add_argument(
        "--head", default="stored", help="head to write: none, classification, masked_lm, ... (default: the stored one)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the written weights (default: as stored)"
    )
    parser.add_argument("--shard-size", default="5GB", help="largest safetensors file (default: 5GB)")
    parser.add_argument(
        "--check", action="store_true", help="compare with transformers on torch; exit code 1 if they differ"
    )


def run(options: argparse.Namespace) -> int:
    """Converts, and says what was guessed, initialised or left out."""
    from jaxft.commands.train import set_up_jax
    from jaxft.files import refuse_existing

    target = Path(options.target)
    shard_bytes = parse_size(options.shard_size)
    refuse_existing(target)
    if options.check:
        _check_possible(options)
    set_up_jax(None)
    from jaxft import models
    from jaxft.pretrained import export_folder

    got = _open(options)
    family = models.family(got.family_name)
    if options.to == "hf":
        export_folder(
            target,
            got.hf_config,
            family,
            got.model,
            got.params,
            tokenizer_folder=got.tokenizer_folder,
            labels=got.labels,
            dtype=options.dtype,
            shard_bytes=shard_bytes,
        )
    else:
        _write_checkpoint(target, got, options.dtype)
    print(f"wrote {target}")
    return _check(target if options.to == "hf" else got.folder, got, options.dtype) if options.check else 0


def parse_size(text: str) -> int:
    """Bytes of "500MB", "5GB", "1.5 GB" or a plain number.

    Raises:
      UserError: anything else.
    """
    from jaxft.errors import UserError

    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|TB)?", text.strip(), re.IGNORECASE)
    size = (
        0
        if match is None
        else int(float(match[1]) * 1000 ** ("B", "KB", "MB", "GB", "TB").index((match[2] or "B").upper()))
    )
    if size < 1:
        raise UserError(f"--shard-size {text!r}: expected a size such as 500MB or 5GB")
    return size


class _Opened:
    """A model to convert: ``family_name, model, params, hf_config, labels, tokenizer_folder, folder``."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


def _open(options: argparse.Namespace) -> Any:
    from jaxft import checkpoint
    from jaxft.errors import UserError, nearest

    path = Path(options.source).expanduser()
    run = (path / "config.yaml").is_file() or checkpoint.is_checkpoint(path)
    if path.is_dir() and not (path / "config.json").is_file() and run:
        return _open_checkpoint(path, options)
    from jaxft.layers import Compute
    from jaxft.pretrained import load_params, open_folder, open_source

    source = open_source(options.source, print)
    head = {"stored": source.head, "none": None}.get(options.head, options.head)
    if head not in source.family.HEADS:
        raise UserError(f"--head {options.head}: {nearest(options.head, [h for h in source.family.HEADS if h])}")
    with open_folder(source.folder) as weights:
        kinds = {str(weights.dtype(name)) for name in weights.names() if "float" in str(weights.dtype(name))}
    # Stored types are kept, so that a round trip is bit-equal; mixed ones meet in float32.
    stored = kinds.pop() if len(kinds) == 1 else "float32"
    model = source.family.Model(source.config, head, Compute(param_dtype=stored))
    params = load_params(source, model, print)
    return _Opened(
        family_name=source.family_name,
        model=model,
        params=params,
        hf_config=source.hf_config,
        labels=source.labels,
        tokenizer_folder=source.folder,
        folder=source.folder,
    )


def _open_checkpoint(path: Path, options: argparse.Namespace) -> Any:
    from jaxft.errors import UserError
    from jaxft.serving import open_model

    served = open_model(str(path), [], print)
    if options.head not in ("stored", str(served.model.head or "none")):
        raise UserError(
            f"--head {options.head}: the checkpoint has head {served.model.head or 'none'}; "
            "convert it to a Hugging Face folder first, then that with --head"
        )
    return _Opened(
        family_name=served.family_name,
        model=served.model,
        params=served.params,
        hf_config=served.hf_config,
        labels=served.labels or None,
        tokenizer_folder=served.tokenizer.folder,
        folder=None,
    )


def _write_checkpoint(target: Path, got: Any, dtype: str | None) -> None:
    import jax

    from jaxft import checkpoint
    from jaxft.config import RunConfig, to_tree

    params = got.params if dtype is None else jax.tree.map(lambda p: p.astype(dtype), got.params)
    meta = {
        "config": to_tree(RunConfig()),
        "family": got.family_name,
        "arch": to_tree(got.model.config),
        "head": got.model.head,
        "labels": list(got.labels or ()),
        "hf_config": got.hf_config,
        "tokenizer": str(got.tokenizer_folder.resolve()),
    }
    checkpoint.save_params(target, params, meta)


def _check_possible(options: argparse.Namespace) -> None:
    """Refuses --check before anything is written."""
    from importlib.util import find_spec

    from jaxft.errors import UserError

    if find_spec("torch") is None:
        raise UserError("--check compares with transformers on torch, which is not installed; pip install torch")
    path = Path(options.source).expanduser()
    if options.to == "jaxft" and path.is_dir() and not (path / "config.json").is_file():
        raise UserError("--check needs a Hugging Face folder on one side; use --to hf")


def _check(folder: Path, got: Any, dtype: str | None) -> int:
    import jax
    import jax.numpy as jnp

    from jaxft.parity import compare, report_text

    # What was written, rounding included, as the reference reads it.
    written = got.params if dtype is None else jax.tree.map(lambda p: p.astype(dtype), got.params)
    wide = jax.tree.map(lambda p: p.astype(jnp.float32), written)
    differences = compare(folder, got.model, wide)
    print(report_text(differences))
    return 0 if all(d.passed for d in differences) else 1
