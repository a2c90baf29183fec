"""``jaxft convert``: Hugging Face folder, old Flax or PyTorch file, run or checkpoint in; Hugging Face folder or jaxft checkpoint out."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:  # they import jax
    from jax import Array
    from jaxtyping import PyTree

    from jaxft.config import RunConfig
    from jaxft.config.stored import RunMeta
    from jaxft.data.batch import HostBatch
    from jaxft.data.processors.tokenizer import Tokenizer
    from jaxft.hub.parity import Difference
    from jaxft.hub.source import Source
    from jaxft.hub.weights import Weights
    from jaxft.models.contract import Model


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
    parser.add_argument("--family", help="model family, for folders that do not say (default: what config.json says)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the written weights (default: as stored)"
    )
    parser.add_argument("--shard-size", default="5GB", help="largest safetensors file (default: 5GB)")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare what transformers reads in the source with what was written; exit code 1 if they differ",
    )


def run(options: argparse.Namespace) -> int:
    """Converts, and says what was guessed, initialised or left out."""
    from jaxft.files import refuse_existing
    from jaxft.machine.platform import set_up_jax

    target = Path(options.target)
    shard_bytes = parse_size(options.shard_size)
    refuse_existing(target)
    if options.check:
        _check_possible(options)
    set_up_jax(None)
    from jaxft.data.processors.opened import FILES, has_processor

    with ExitStack() as opened:
        got = _open(options, opened)
        if not has_processor(got.tokenizer_folder, got.model.facts.inputs):
            print(f"{got.tokenizer_folder} has no {FILES[got.model.facts.processor]}: none are written")
        if options.to == "hf":
            _write_folder(target, got, options.dtype, shard_bytes)
        else:
            _write_checkpoint(target, got, options.dtype)
    print(f"wrote {target}")
    return _check(target, got, options) if options.check else 0


def parse_size(text: str) -> int:
    """Bytes of "500MB", "5GB", "1.5 GB" or a plain number.

    Raises:
      UserError: anything else.
    """
    from jaxft.errors import UserError

    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*(B|KB|MB|GB|TB)?", text.strip(), re.IGNORECASE)
    size = (
        0
        if match is None
        else int(float(match[1]) * 1000 ** ("B", "KB", "MB", "GB", "TB").index((match[2] or "B").upper()))
    )
    if size < 1:
        raise UserError(f"--shard-size {text!r}: expected a size such as 500MB or 5GB")
    return size


@dataclass(frozen=True)
class _Opened:
    """A model to convert."""

    family_name: str
    model: Model
    params: PyTree[Array]
    hf_config: dict[str, object]
    labels: tuple[str, ...] | None
    tokenizer: Tokenizer | None
    """None where it cannot be read."""
    tokenizer_folder: Path
    beside: Path | None
    """The folder whose other files are taken over."""
    source: Source | None
    """The opened model folder, None for a checkpoint."""
    non_finite: list[str]
    """Names of tensors with NaN or infinity."""
    files: Mapping[str, str] = field(default_factory=dict)
    """What the task of a checkpoint's run has to say beside the weights."""


def _open(options: argparse.Namespace, opened: ExitStack) -> _Opened:
    """Opens the source; tensors of a model folder are read when they are written, from files that ``opened`` closes."""
    from jaxft import checkpoint
    from jaxft.errors import UserError, nearest

    path = Path(checkpoint.local_model(options.source)).expanduser()
    run = (path / "config.yaml").is_file() or checkpoint.is_checkpoint(path)
    if path.is_dir() and not (path / "config.json").is_file() and run:
        if not (path / "config.yaml").is_file() or not (path / "export/config.json").is_file():
            return _open_checkpoint(path, options)
        path = path / "export"
    from jaxft.data.thresholds import beside
    from jaxft.hub.pretrained import load_params, open_params
    from jaxft.hub.source import open_source
    from jaxft.layers import Compute

    source = open_source(path if path.is_dir() else options.source, print, family=options.family)
    head = source.stored_head() if options.head == "stored" else None if options.head == "none" else options.head
    if head not in source.family.HEADS:
        raise UserError(f"--head {options.head}: {nearest(options.head, [h for h in source.family.HEADS if h])}")
    weights = opened.enter_context(source.open())
    made = options.dtype or _common_type(weights, options.to)
    model = source.family.Model(source.config, head, Compute(param_dtype=made))
    if options.to == "hf":
        got = open_params(source, model, weights, print)
        params, non_finite = got.params, got.non_finite
    else:
        opened.close()
        params, non_finite = load_params(source, model, print), []
    return _Opened(
        family_name=source.family_name,
        model=model,
        params=params,
        hf_config=source.hf_config,
        labels=source.labels,
        tokenizer=_tokenizer_in(source.folder, source.family_name),
        tokenizer_folder=source.folder,
        beside=source.folder,
        source=source,
        non_finite=non_finite,
        # Thresholds are of these weights, to the last bit.
        files=beside(source.folder) if head == source.head and options.dtype is None else {},
    )


def _tokenizer_in(folder: Path, model_type: str, languages: Sequence[str | None] = ()) -> Tokenizer | None:
    """The tokenizer beside the weights; None, with a line that says so, if it cannot be read: weights need none."""
    from jaxft.data.processors.contract import Languages
    from jaxft.data.processors.tokenizer import Tokenizer, has_tokenizer
    from jaxft.errors import UserError

    if not has_tokenizer(folder):
        return None
    try:
        return Tokenizer(folder, model_type=model_type, languages=Languages(*languages))
    except UserError as error:
        print(f"tokenizer files are copied as they are: {error}")
        return None


def _common_type(weights: Weights, to: str) -> str:
    """The type of new tensors, and of all that go into a checkpoint: the stored one, or float32 where it is not one."""
    from jaxft.hub.weights.numbers import is_float

    kinds = sorted({str(weights.dtype(name)) for name in weights.names() if is_float(weights.dtype(name))})
    if len(kinds) == 1 and kinds[0] in ("float32", "bfloat16", "float16"):
        return kinds[0]
    if to == "jaxft":
        print(
            f"weights of type {', '.join(kinds)} are all stored as float32: a jaxft checkpoint has one type, at most that wide"
        )
    return "float32"


def _open_checkpoint(path: Path, options: argparse.Namespace) -> _Opened:
    from jaxft.errors import UserError
    from jaxft.inference.predict import restored
    from jaxft.training.setup import files_of_run

    config, family_name, model, params, tokenizer_folder, labels, hf_config = restored(path, [], print)
    if options.head not in ("stored", str(model.head or "none")):
        raise UserError(
            f"--head {options.head}: the checkpoint has head {model.head or 'none'}; "
            "convert it to a Hugging Face folder first, then that with --head"
        )
    if options.family not in (None, family_name):
        raise UserError(f"--family {options.family}: the checkpoint is of family {family_name}; leave it out")
    tokenizer = _tokenizer_in(tokenizer_folder, family_name, config.task.languages)
    return _Opened(
        family_name=family_name,
        model=model,
        params=params,
        hf_config=hf_config,
        labels=labels or None,
        tokenizer=tokenizer,
        tokenizer_folder=tokenizer_folder,
        beside=_beside(config, tokenizer_folder),
        source=None,
        non_finite=[],
        files=files_of_run(config, model, tokenizer),
    )


def _beside(config: RunConfig, tokenizer_folder: Path) -> Path | None:
    """The folder whose model card and other files belong to a checkpoint, if it is still there."""
    from jaxft.errors import UserError
    from jaxft.hub.source import resolve_folder

    try:
        folder = tokenizer_folder if config.model.init is None else resolve_folder(config.model.init)
    except UserError as error:
        print(f"no model card or other files are carried over: {error}")
        return None
    return folder if (folder / "config.json").is_file() else None


def _write_folder(target: Path, got: _Opened, dtype: str | None, shard_bytes: int) -> None:
    from jaxft import models
    from jaxft.hub.pretrained import export_folder
    from jaxft.hub.weights.numbers import name_non_finite

    export_folder(
        target,
        got.hf_config,
        models.family(got.family_name),
        got.model,
        got.params,
        tokenizer=got.tokenizer,
        tokenizer_folder=got.tokenizer_folder,
        labels=got.labels,
        dtype=dtype,
        shard_bytes=shard_bytes,
        source_folder=got.beside,
        files=got.files,
        note=print,
    )
    if got.non_finite:
        print(f"warning: {name_non_finite(got.non_finite)}; they are written as they are")


def _write_checkpoint(target: Path, got: _Opened, dtype: str | None) -> None:
    import jax
    import numpy as np

    from jaxft import checkpoint
    from jaxft.config import RunConfig, to_tree
    from jaxft.data.processors.opened import write_processor

    meta = {
        "config": to_tree(RunConfig()),
        "family": got.family_name,
        "arch": to_tree(got.model.config),
        "head": got.model.head,
        "labels": list(got.labels or ()),
        "hf_config": got.hf_config,
        # Inside the checkpoint, which may be moved or sent.
        "tokenizer": "tokenizer",
    }
    with TemporaryDirectory() as folder:
        write_processor(got.tokenizer, got.tokenizer_folder, Path(folder), got.model.facts.inputs)
        files = {f"tokenizer/{path.name}": path for path in sorted(Path(folder).iterdir())}
        params = (
            jax.tree.map(np.asarray, _rounded(got.params, dtype)) if got.source is None else _rounded(got.params, dtype)
        )
        checkpoint.save_params(target, params, meta, files)


def _rounded(params: PyTree[Array], dtype: str | None) -> PyTree[Array]:
    """Parameters in another type; those that have it already, or with no type asked for, as they are."""
    import jax
    import numpy as np

    from jaxft.hub.weights.numbers import copy_rounded
    from jaxft.trees import nested, paths_of

    if dtype is None:
        return params
    cast = {}
    for path, leaf in paths_of(params).items():
        cast[path] = leaf
        if leaf.dtype != dtype:
            out = np.empty(leaf.shape, jax.numpy.dtype(dtype))
            copy_rounded(out, np.asarray(leaf), path, "parameters")
            cast[path] = jax.numpy.asarray(out)
    return nested(cast)


def _check_possible(options: argparse.Namespace) -> None:
    """Refuses --check before anything is written."""
    from importlib.util import find_spec

    from jaxft.errors import UserError

    if find_spec("torch") is None:
        raise UserError("--check compares with transformers on torch, which is not installed; pip install torch")
    path = Path(options.source).expanduser()
    if options.to == "jaxft" and path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError("--check needs a Hugging Face folder on one side; use --to hf")
        if not _reference_reads(path):
            raise UserError("--check: transformers reads neither flax_model.msgpack nor jaxft checkpoints; use --to hf")


def _check(target: Path, got: _Opened, options: argparse.Namespace) -> int:
    """Compares what was written with the source, and says what was compared with what."""
    from jaxft.errors import UserError
    from jaxft.hub import parity
    from jaxft.models.example import example_batch

    batch = example_batch(got.model.facts, rows=4)
    try:
        if got.source is not None and _reference_reads(got.source.folder):
            differences = _against_source(target, got, got.source, options, batch)
        else:
            differences = _against_target(target, got, options, batch)
    except UserError as error:
        raise UserError(f"{target} is written, but not checked: {error}") from error
    print(parity.report_text(differences))
    return 0 if all(d.passed for d in differences) else 1


def _reference_reads(folder: Path) -> bool:
    """Whether transformers reads the weights in a folder; since version 5 it reads no Flax files."""
    from jaxft.hub.weights import open_weights

    with open_weights(folder) as weights:
        return weights.format != "flax msgpack"


def _against_source(
    target: Path, got: _Opened, opened: Source, options: argparse.Namespace, batch: HostBatch
) -> list[Difference]:
    """The source, by transformers, against what was written, by jaxft and (a Hugging Face folder) by transformers."""
    from jaxft.hub import parity
    from jaxft.models.contract import architecture_of, classes_of

    family, head = opened.family, got.model.head
    names = architecture_of(family, head, opened.model_type)
    # config.json may say another number of labels; the weights are believed.
    changes = {"num_labels": classes_of(got.model.config)} if family.HEADS[head].classes else {}
    source = parity.load_reference(opened.folder, names, rounded_to=options.dtype, **changes)
    theirs = parity.outputs_of_reference(source, batch)
    ours = parity.outputs(*_written(target, got, options), batch)
    print(f"compared: {opened.folder} as transformers reads it, with {target} as each reads it")
    differences = parity.compare(ours, theirs, parity.seen_in(batch), "jaxft")
    if options.to == "hf":
        again = parity.outputs_of_reference(parity.load_reference(target, names), batch)
        differences += parity.compare(again, theirs, parity.seen_in(batch), "transformers")
        made = {name: value for name, value in again.items() if name not in theirs}
        differences += parity.compare(ours, made, parity.seen_in(batch), "jaxft")
    else:
        made = {}
    if source.made_up:
        compared = f"; {', '.join(made)}: jaxft with transformers, both on {target}" if made else ""
        print(f"not in the source, so not compared with it: {', '.join(source.made_up)}{compared}")
    return differences


def _against_target(target: Path, got: _Opened, options: argparse.Namespace, batch: HostBatch) -> list[Difference]:
    """What was written, by transformers, against the source, by jaxft: for sources that transformers does not read."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxft.hub import parity
    from jaxft.hub.pretrained import load_params
    from jaxft.layers import Compute

    params = got.params
    if got.source is not None:
        params = load_params(got.source, got.model.clone(compute=Compute()), lambda text: None)
    wide = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), jnp.float32), _rounded(params, options.dtype))
    from jaxft.hub.source import read_json

    architectures = cast(list[str], read_json(target / "config.json")["architectures"])
    reference = parity.load_reference(target, architectures[0])
    print(
        f"compared: {options.source} as jaxft reads it, since transformers cannot, with {target} as transformers reads it"
    )
    theirs = parity.outputs_of_reference(reference, batch)
    return parity.compare(parity.outputs(got.model, wide, batch), theirs, parity.seen_in(batch), "jaxft")


def _written(target: Path, got: _Opened, options: argparse.Namespace) -> tuple[Model, PyTree[Array]]:
    """The model and its parameters, opened from what was written."""
    import jax
    import jax.numpy as jnp

    from jaxft import checkpoint, models
    from jaxft.hub.pretrained import load_params
    from jaxft.hub.source import make_config, open_source
    from jaxft.layers import Compute

    if options.to == "hf":
        source = open_source(target, lambda text: None, family=got.family_name)
        model = source.family.Model(source.config, got.model.head, Compute())
        return model, load_params(source, model, lambda text: None)
    params, said = checkpoint.restore_params(target)
    meta = cast("RunMeta", said)
    kind: Callable[..., Model] = type(got.model)
    model = kind(make_config(models.family(meta["family"]), meta["arch"]), meta["head"], Compute())
    return model, jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
