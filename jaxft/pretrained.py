"""Model folders: Hugging Face layout in (weights, config.json, tokenizer) and out again.

:func:`load` is the notebook user's entry: ``model, params, tokenizer = jaxft.load("path-or-hub-id")``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft import models
from jaxft.config import decode
from jaxft.data.tokenizer import TOKENIZER_FILES, Tokenizer
from jaxft.errors import UserError
from jaxft.files import folder_written_whole, package_folder, write_atomic
from jaxft.hf import Imported, Layout, export_tensors, import_params, nested, paths_of, stored_params
from jaxft.initial import init_params as init_params  # for those who load it beside load_params
from jaxft.initial import init_some, shapes_and_axes, spread
from jaxft.layers import Compute
from jaxft.sharding import shardings_of
from jaxft.weights import Weights, open_weights, write_safetensors
from jaxft.weights.flax_names import under_pytorch_names
from jaxft.weights.numbers import QUANTISATION_KEYS, name_non_finite, refuse_quantised
from jaxft.weights.part import Part

Note = Callable[[str], None]


def resolve_folder(reference: str) -> Path:
    """The local folder that a model reference names: a path, ``pkg:PACKAGE/FOLDER``, or a hub id ``ORG/NAME``.

    Raises:
      UserError: there is no such folder, package or hub model.
    """
    if reference.startswith("pkg:"):
        return package_folder(reference)
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"model {reference!r} is a file; name the folder that holds config.json and the weights")
    if reference.count("/") != 1 or reference.startswith((".", "/", "~")):
        raise UserError(f"model folder {reference!r} does not exist")
    return _from_hub(reference)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.txt", "*.safetensors", "*.model", "*.jinja"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(folder.glob("*.safetensors")):
            folder = Path(
                snapshot_download(name, allow_patterns=[*wanted, "pytorch_model*.bin", "flax_model*.msgpack"])
            )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"model {name!r} is neither a local folder nor to be had from the Hugging Face hub ({type(error).__name__}); "
            "check the name, the network, or download it and give the folder"
        ) from error
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: no such file, or not a JSON object.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; a model folder holds config.json, weights and tokenizer files"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a JSON object")
    return tree


# ------------------------------------------------------------------------------------------------------ what is there


@dataclass(frozen=True)
class Source:
    """A model folder, read as far as needed to decide what to build."""

    folder: Path
    hf_config: dict[str, Any]
    family: ModuleType
    family_name: str
    config: Any
    """The family's Config."""
    head: str | None
    """The head its weights have."""
    labels: tuple[str, ...] | None
    """Label names in the order of class ids, if the head has classes and they were named."""


def open_source(reference: str, note: Note, *, family: str | None = None, arch: dict[str, Any] | None = None) -> Source:
    """Reads a model folder's config.json and the names and shapes of its weights.

    Args:
      reference: see :func:`resolve_folder`.
      note: called with a line for everything that had to be guessed or corrected.
      family: module of ``jaxft.models``; None: what config.json says.
      arch: changes to the family's Config.
    """
    folder = resolve_folder(reference)
    hf_config = read_json(folder / "config.json")
    name = _family_name(hf_config, family, folder, note)
    module = models.family(name)
    refuse_quantised(hf_config, folder / "config.json")
    stated = module.config_from_hf(hf_config)
    with open_folder(folder) as weights:
        said = module.config_of_weights(weights)
        head = module.head_of(weights.names())
    if said.get("tie_word_embeddings") is False and stated.get(
        "tie_word_embeddings", module.Config.tie_word_embeddings
    ):
        note("config.json ties the embeddings, but the weights have another decoder of their own: it is kept, untied")
    labels = _labels(hf_config)
    rows = said.get("num_labels")
    if rows is not None:
        # num_labels is not always written; id2label then says it, and two is the reference's default.
        claimed = hf_config.get("num_labels", len(hf_config.get("id2label") or ()) or None)
        if claimed is None and rows != 2:
            note(f"config.json does not say how many labels there are; the weights have {rows}")
        elif claimed not in (None, rows):
            note(f"config.json says {claimed} labels, the weights have {rows}: the weights are believed")
        if labels is not None and len(labels) != rows:
            labels = None
    config = make_config(module, {**stated, **said, **(arch or {})})
    return Source(folder, hf_config, module, name, config, head, labels if rows is not None else None)


def make_config(family: ModuleType, tree: dict[str, Any]) -> Any:
    """A family's Config from a plain dict; UserError for unknown fields or wrong types."""
    return decode(family.Config, tree, "model.arch")


def _family_name(hf_config: dict[str, Any], family: str | None, folder: Path, note: Note) -> str:
    stated = hf_config.get("model_type")
    if family is not None:
        if stated not in (None, family, family.rpartition(".")[2]):
            note(f"config.json says model_type {stated!r}, model.family={family} is believed")
        return family
    if stated is not None:
        if "." in str(stated):  # a file's word is not imported
            raise UserError(f"{folder / 'config.json'}: model_type {stated!r} is not supported; set model.family")
        return str(stated)
    listed = hf_config.get("architectures")
    architectures = listed if isinstance(listed, list) else []
    for candidate in models.families():
        if any(name in architectures for name in models.family(candidate).HEADS.values()):
            note(f"config.json has no model_type: {candidate!r} follows from architectures {architectures}")
            return candidate
    raise UserError(
        f"{folder / 'config.json'}: no model_type, and architectures {architectures} are not known; set model.family"
    )


def _labels(hf_config: dict[str, Any]) -> tuple[str, ...] | None:
    """Named labels in the order of their ids; None if there are none, or only LABEL_0, LABEL_1, ..."""
    by_id = hf_config.get("id2label")
    if not isinstance(by_id, dict) or not by_id:
        return None
    try:
        ids = {int(key): str(value) for key, value in by_id.items()}
    except ValueError as error:
        raise UserError(f"config.json: id2label has a key that is not a number: {error}") from error
    if sorted(ids) != list(range(len(ids))):
        raise UserError(f"config.json: id2label must have the keys 0..{len(ids) - 1}, found {sorted(ids)}")
    names = tuple(ids[i] for i in range(len(ids)))
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def open_folder(path: Path) -> Weights:
    """The weights in a folder or file, under the reference's PyTorch names whatever the file format."""
    weights = open_weights(path)
    return under_pytorch_names(weights) if weights.format == "flax msgpack" else weights


# ------------------------------------------------------------------------------------------------------------- import


def load_params(
    source: Source,
    model: Any,
    note: Note,
    *,
    mesh: Any = None,
    seed: int = 0,
    fresh_head: bool = False,
    finite: bool = False,
) -> Any:
    """The parameters of ``model`` from a model folder.

    A head that the folder does not have, or ``fresh_head``, is initialised; one that it has must be there whole.

    Args:
      source: the opened folder.
      model: built with the source's (perhaps changed) config.
      note: called with a line for everything that was initialised or left unused.
      mesh: to spread them over; None: the default device.
      seed: of freshly initialised heads.
      fresh_head: do not read the folder's head.
      finite: refuse weights with NaN or infinity, from which no training can start; otherwise they are noted.

    Raises:
      UserError: the weights do not fit, or are not numbers that the model's parameter type can hold.
    """
    shapes, axes = shapes_and_axes(model)
    shardings = None if mesh is None else shardings_of(mesh, model.compute.rules, shapes, axes)
    placed = {} if shardings is None else paths_of(shardings)
    layout = _layout_of(source, model, fresh_head)
    with open_folder(source.folder) as weights:
        head = [name for rule in layout.rules if rule.ours.startswith("head/") for name in rule.names()]
        viewed = Part(weights, without=head) if fresh_head else weights
        got = import_params(viewed, layout, shapes, placed.get, np.dtype(model.compute.param_dtype))
    if got.non_finite and finite:
        raise UserError(f"{source.folder}: training cannot start: {name_non_finite(got.non_finite)}; use sound weights")
    if got.non_finite:
        note(f"warning: {name_non_finite(got.non_finite)}")
    return _completed(got, model, shapes, placed, seed, note)


def open_params(source: Source, model: Any, weights: Weights, note: Note, *, seed: int = 0) -> Imported:
    """The parameters of ``model`` as ``weights`` (the source's) store them, read one tensor at a time when they are used.

    Nothing is cast, and nothing but a fresh head kept in memory. ``non_finite`` of the result fills as tensors are read.

    Raises:
      UserError: the weights do not fit.
    """
    shapes, _ = shapes_and_axes(model)
    got = stored_params(weights, _layout_of(source, model, False), shapes)
    return dataclasses.replace(got, params=_completed(got, model, shapes, {}, seed, note))


def _layout_of(source: Source, model: Any, fresh_head: bool) -> Layout:
    layout = source.family.hf_layout(model.config, model.head)
    # A head that the folder claims to have is not made up where tensors of it are missing.
    return layout if fresh_head or model.head != source.head else dataclasses.replace(layout, fresh=())


def _completed(got: Imported, model: Any, shapes: Any, placed: dict[str, Any], seed: int, note: Note) -> dict[str, Any]:
    """What was read, with what was not initialised; says so."""
    flat = paths_of(got.params)
    if got.fresh:
        # Only what is missing is computed: XLA drops the rest of the initialisation.
        initial = jax.jit(init_some, static_argnums=(0, 1))(model, got.fresh, jax.random.key(seed))
        flat |= {p: v if not placed else spread(v, placed[p]) for p, v in initial.items()}
        note(f"initialised afresh: {', '.join(got.fresh)}")
    for wanted, read in got.substituted:
        note(f"{read} is read for {wanted}")
    left = [name for name in got.unused if not name.endswith(("position_ids", "token_type_ids", "inv_freq"))]
    if left:
        note(f"in the checkpoint, not used: {', '.join(left)}")
    return nested({path: flat[path] for path in paths_of(shapes)})


# ------------------------------------------------------------------------------------------------------------- export


def export_folder(
    target: Path,
    source_config: dict[str, Any],
    family: ModuleType,
    model: Any,
    params: Any,
    *,
    tokenizer_folder: Path | None,
    labels: tuple[str, ...] | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    max_length: int | None = None,
) -> None:
    """Writes a folder that `transformers` loads: config.json, model.safetensors (sharded past ``shard_bytes``), tokenizer.

    Args:
      source_config: the config.json the model came from (or {}): keys that we do not know are kept.
      labels: label names in the order of class ids.
      max_length: tokens per text that the model was trained with; becomes the tokenizer's ``model_max_length``.
      dtype: of the weights; None: as they are.

    Raises:
      UserError: ``target`` exists and is not empty.
    """
    layout = family.hf_layout(model.config, model.head)
    with folder_written_whole(target) as folder:
        tensors = export_tensors(
            params, layout, bare=model.head is None, dtype=None if dtype is None else jnp.dtype(dtype)
        )
        write_safetensors(folder, tensors, shard_bytes)
        # The reference loads all in one type: mixed ones in the first that holds them all.
        kind = str(functools.reduce(jnp.promote_types, {tensor.dtype for tensor in tensors}))
        config = _exported_config(source_config, family, model, labels, kind)
        write_atomic(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        if tokenizer_folder is not None:
            for name in TOKENIZER_FILES:
                if (tokenizer_folder / name).is_file():
                    shutil.copyfile(tokenizer_folder / name, folder / name)
            if max_length is not None:
                path = folder / "tokenizer_config.json"
                settings = (read_json(path) if path.is_file() else {}) | {"model_max_length": max_length}
                write_atomic(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _exported_config(
    before: dict[str, Any], family: ModuleType, model: Any, labels: tuple[str, ...] | None, dtype: str
) -> dict[str, Any]:
    stale = {"_name_or_path", "torch_dtype", "num_labels", "auto_map", *QUANTISATION_KEYS, *family.SUPERSEDED}
    config = {key: value for key, value in before.items() if key not in stale}
    config |= family.config_to_hf(model.config)
    config["architectures"] = [family.HEADS[model.head]]
    config["dtype"] = dtype
    for key in ("id2label", "label2id"):
        config.pop(key, None)
    if model.head == "classification":
        names = labels or tuple(f"LABEL_{i}" for i in range(model.config.num_labels))
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
        config["problem_type"] = "single_label_classification"
    return config


# ------------------------------------------------------------------------------------------------------ notebook entry


@dataclass(frozen=True)
class Loaded:
    """What :func:`load` gives; unpacks into (model, params, tokenizer)."""

    model: Any
    params: Any
    tokenizer: Tokenizer
    labels: tuple[str, ...] | None
    source: Source

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.params, self.tokenizer))


def load(
    reference: str,
    *,
    head: str | None = "stored",
    compute: Compute | None = None,
    max_length: int | None = None,
    note: Note = print,
    **arch: Any,
) -> Loaded:
    """A model with its parameters and tokenizer, from a folder in Hugging Face layout or a hub id.

    Args:
      reference: a path, ``pkg:PACKAGE/FOLDER``, or a hub id ``ORG/NAME``.
      head: ``stored``: the one the weights have; None: the bare encoder; or a head name of the family (fresh if absent).
      compute: types and execution mode; None: all float32.
      max_length: tokens kept per text; None: the model's position limit.
      note: called with a line for everything that was guessed, initialised or left unused.
      arch: changes to the architecture, for instance ``hidden_dropout_prob=0.0``, ``num_labels=8``.

    Raises:
      UserError: the folder, its config or its weights are not usable; says why.

    Example:
      >>> model, params, tokenizer = jaxft.load("runs/wordnet8/export")
      >>> out = model.apply({"params": params}, **tokenizer(["a small striped cat"]))
      >>> out.logits.argmax(-1)
    """
    source = open_source(reference, note, arch=arch)
    head = source.head if head == "stored" else head
    model = source.family.Model(source.config, head, Compute() if compute is None else compute)
    params = load_params(source, model, note)
    limit = getattr(source.config, "max_position_embeddings", None)
    tokenizer = Tokenizer(source.folder, max_length or limit)
    check_vocabulary(tokenizer, source.config)
    return Loaded(model, params, tokenizer, source.labels, source)


def check_vocabulary(tokenizer: Tokenizer, config: Any) -> None:
    """Raises UserError if the tokenizer can produce ids that the embedding table does not have."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding table {config.vocab_size}: "
            "wrong tokenizer for these weights; set data.tokenizer"
        )
