"""Model folders: Hugging Face layout in (weights, config.json, tokenizer) and out again; :mod:`jaxft.inference.load` has the
notebook user's entry.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from jaxft.config import to_tree
from jaxft.data.processors.contract import Processor
from jaxft.data.processors.tokenizer_files import TOKENIZER_FILES
from jaxft.data.processors.tokenizer_saving import copy_files
from jaxft.errors import UserError
from jaxft.files import folder_written_whole, write_atomic
from jaxft.hub.convert import Imported, Leaf, export_tensors, file_names, import_params, stored_params
from jaxft.hub.source import SINGLE_LABEL, Note, Source
from jaxft.hub.stored import StoredParam
from jaxft.hub.sums import NAME as SUMS
from jaxft.hub.sums import write_sums
from jaxft.hub.weights import Weights, write_safetensors
from jaxft.hub.weights.beside import CODE_SETTINGS, take_over
from jaxft.hub.weights.numbers import QUANTISATION_KEYS, name_non_finite
from jaxft.hub.weights.part import Part
from jaxft.models.contract import Family, Model, architecture_of, classes_of, model_type_of
from jaxft.models.initial import init_some, shapes_and_axes, spread
from jaxft.models.layout import Layout, Rule
from jaxft.parallel.sharding import shardings_of
from jaxft.trees import Params, Shapes, Tree, leaves_of, nested, paths_of

# ------------------------------------------------------------------------------------------------------------- import


def load_params(
    source: Source,
    model: Model,
    note: Note,
    *,
    mesh: Mesh | None = None,
    seed: int = 0,
    fresh_head: bool = False,
    finite: bool = False,
) -> Params:
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
      UserError: the weights do not fit, lack something of the head that they are said to have, or are not numbers that the
        model's parameter type can hold.
    """
    shapes, axes = shapes_and_axes(model)
    shardings = None if mesh is None else shardings_of(mesh, model.compute.rules, shapes, axes)
    placed: Mapping[str, NamedSharding] = {} if shardings is None else paths_of(shardings)
    with source.open() as weights:
        seen = _seen(source, model, weights, shapes, fresh_head)
        got = import_params(seen.weights, seen.layout, shapes, placed.get, np.dtype(model.compute.param_dtype))
    if got.non_finite and finite:
        raise UserError(f"{source.folder}: training cannot start: {name_non_finite(got.non_finite)}; use sound weights")
    if got.non_finite:
        note(f"warning: {name_non_finite(got.non_finite)}")
    return _completed(got, source, model, seen, shapes, placed, seed, note)


def open_params(
    source: Source, model: Model, weights: Weights, note: Note, *, seed: int = 0
) -> Imported[StoredParam | Array]:
    """The parameters of ``model`` as ``weights`` (the source's) store them, read one tensor at a time when they are used.

    Nothing is cast, and nothing but a fresh head kept in memory. ``non_finite`` of the result fills as tensors are read.

    Raises:
      UserError: the weights do not fit.
    """
    shapes, _ = shapes_and_axes(model)
    seen = _seen(source, model, weights, shapes, False)
    got = stored_params(seen.weights, seen.layout, shapes)
    params = _completed(got, source, model, seen, shapes, {}, seed, note)
    return Imported(params, got.fresh, got.unused, got.substituted, got.non_finite)


@dataclasses.dataclass(frozen=True)
class _Seen:
    """The tensors of a folder that a model reads."""

    weights: Weights
    layout: Layout
    hidden: tuple[str, ...]
    """Tensors of a head that is not read, by their names in the file."""
    quiet: tuple[str, ...]
    """Tensors of layers that are not used, which was said when the depth was changed."""
    whole: bool
    """The head must be there whole."""


def _seen(source: Source, model: Model, weights: Weights, shapes: Shapes, fresh_head: bool) -> _Seen:
    layout = source.family.hf_layout(model.config, model.head)
    names = file_names(weights, layout)
    # A head that the family does not have may share names with one that it has.
    hidden = _head_names(names, layout) if fresh_head or source.foreign is not None else []
    foreign = [] if source.foreign is None else [name for name in names if not name.startswith(layout.prefix)]
    deeper = _deeper_layers(names, layout, shapes) if source.changes else []
    spared = tuple(glob.escape(name) for name in (*foreign, *deeper))
    rules = _of_stored_grids(layout, source, model) if source.changes else layout.rules
    layout = dataclasses.replace(layout, rules=rules, leftovers=(*layout.leftovers, *spared))
    return _Seen(
        Part(weights, without=hidden) if hidden else weights,
        layout,
        tuple(hidden),
        tuple(names[name] for name in deeper),
        whole=not fresh_head and model.head == source.head,
    )


def _of_stored_grids(layout: Layout, source: Source, model: Model) -> tuple[Rule, ...]:
    """The rows of the weight table; those of positions in two dimensions say how many the folder has of them."""
    there = {rule.theirs: rule.grid for rule in source.family.hf_layout(source.stored, model.head).rules}
    return tuple(dataclasses.replace(rule, stored=there.get(rule.theirs)) for rule in layout.rules)


def _completed(
    got: Imported[Leaf],
    source: Source,
    model: Model,
    seen: _Seen,
    shapes: Shapes,
    placed: Mapping[str, NamedSharding],
    seed: int,
    note: Note,
) -> Tree[Leaf | Array]:
    """What was read, with what was not initialised; says so."""
    flat: dict[str, Leaf | Array] = {**paths_of(got.params)}
    if got.fresh and seen.whole:
        absent = [rule.theirs for rule in seen.layout.rules if set(rule.paths) & set(got.fresh)]
        stated = architecture_of(source.family, model.head, source.model_type)
        raise UserError(
            f"{source.folder} should be a {stated}, but its weights lack {', '.join(absent)}, and "
            "nothing is used that would be random: correct architectures in config.json, or train with model.head=fresh"
        )
    if got.fresh:
        # Only what is missing is computed: XLA drops the rest of the initialisation.
        initial = jax.jit(init_some, static_argnums=(0, 1))(model, got.fresh, jax.random.key(seed))
        flat |= {p: v if not placed else spread(v, placed[p]) for p, v in initial.items()}
        note(f"initialised afresh: {', '.join(got.fresh)}")
    for rule in seen.layout.rules:
        if rule.resampled:
            note(f"{rule.theirs} is resampled from {rule.stored} to {rule.grid} places")
    for wanted, read in got.substituted:
        note(f"{read} is read for {wanted}")
    left = [name for name in (*seen.hidden, *got.unused) if name not in seen.quiet]
    left = [name for name in left if not name.endswith(("position_ids", "token_type_ids", "inv_freq"))]
    if left:
        note(f"in the checkpoint, not used: {', '.join(left)}")
    return nested({path: flat[path] for path in paths_of(shapes)})


def _head_names(names: Mapping[str, str], layout: Layout) -> list[str]:
    """The head's tensors in the file, by their names there."""
    rules = [rule for rule in layout.rules if rule.paths[0].startswith("head/")]
    return [names[name] for rule in rules for name in rule.names() if name in names]


def _deeper_layers(names: Collection[str], layout: Layout, shapes: Shapes) -> list[str]:
    """Tensors of layers past those that the model has, by the names of the rules."""
    ours, found = paths_of(shapes), []
    for rule in layout.rules:
        if rule.stacked:
            layer = rule.layers[0] + ours[rule.paths[0]].shape[0]
            while (name := rule.of_layer(rule.theirs, layer)) in names:
                found.append(name)
                layer += 1
    return found


def check_changes(source: Source, head: str | None, note: Note) -> None:
    """Refuses changes to a folder's architecture that its weights contradict; says if only the first layers are used.

    Args:
      source: the opened folder.
      head: of the model to be loaded.
      note: called with the line.

    Raises:
      UserError: parameters would have other shapes, or there are fewer layers than were asked for.
    """
    changes = {key: value for key, value in source.changes.items() if key != "num_labels"}  # the caller's business
    if not changes:
        return
    kept = head if head == source.head else None  # another head is made afresh, as the changes want it
    family = source.family
    stored, wanted = (_layer_shapes(family, family.Model(config, kept)) for config in (source.stored, source.config))
    if stored[1] != wanted[1]:
        guilty = [key for key in changes if _layer_shapes(family, _changed(source, key, kept))[1] != stored[1]]
        guilty = guilty or list(changes)
        was, asked = to_tree(source.stored), to_tree(source.config)
        told = ", ".join(f"{key}={asked[key]} (there: {was[key]})" for key in guilty)
        raise UserError(f"{source.folder}: the weights contradict {told}; leave it out")
    for stack, there in stored[0].items():
        asked, of = wanted[0][stack], "" if len(stored[0]) == 1 else f" of the {stack}"
        if asked > there:
            raise UserError(f"{source.folder}: {asked} layers{of} are asked for, the weights have {there}")
        if asked < there:
            note(f"the first {asked} of the {there} layers{of} in {source.folder} are used")


def _changed(source: Source, key: str, head: str | None) -> Model:
    """The stored model with one change; the stored one where that is none that can stand alone."""
    try:
        config = dataclasses.replace(source.stored, **{key: getattr(source.config, key)})
    except UserError:
        config = source.stored
    return source.family.Model(config, head)


def _layer_shapes(family: Family, model: Model) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """How many layers each stack of a model has, and the shape of each parameter that must be as it is stored, of layers that of one."""
    rules = family.hf_layout(model.config, model.head).rules
    resampled = {path for rule in rules if rule.grid is not None for path in rule.paths}
    leaves = {path: leaf for path, leaf in leaves_of(*shapes_and_axes(model)).items() if path not in resampled}
    depths = {
        stack.path: max(leaf.layers or 0 for path, leaf in leaves.items() if path.startswith(f"{stack.path}/"))
        for stack in model.facts.stacks
    }
    return depths, {path: leaf.shape if leaf.layers is None else leaf.shape[1:] for path, leaf in leaves.items()}


# ------------------------------------------------------------------------------------------------------------- export


def export_folder(
    target: str | Path,
    source_config: dict[str, object],
    family: Family,
    model: Model,
    params: PyTree[Array],
    *,
    tokenizer: Processor | None = None,
    tokenizer_folder: str | Path | None = None,
    labels: Sequence[str] | None = None,
    problem_type: str | None = None,
    dtype: str | None = None,
    shard_bytes: int = 5 * 10**9,
    max_length: int | None = None,
    source_folder: Path | None = None,
    files: Mapping[str, str] | None = None,
    note: Note = print,
) -> None:
    """Writes a folder that `transformers` loads: config.json, model.safetensors (sharded past ``shard_bytes``), tokenizer; and the
    sums of all these, against which it is read again (:mod:`jaxft.hub.sums`).

    Args:
      source_config: the config.json the model came from (or {}): keys that we do not know are kept.
      tokenizer: written so that `transformers` and we get its ids from the folder.
      tokenizer_folder: without ``tokenizer``: where tokenizer files are copied from, unread.
      labels: label names in the order of class ids; None: those that ``source_config`` names.
      problem_type: what a classification head was trained for; None: what ``source_config`` says.
      dtype: of the weights; None: as they are.
      max_length: tokens per text that the model was trained with; becomes the tokenizer's ``model_max_length``.
      source_folder: where the model came from; what else lies there (model card, generation_config.json, ...) is taken over.
      files: texts of further files, by path in the folder; they stand in for what lies beside the source under these names.
      note: called with a line for what was taken over, left behind or taken out.

    Raises:
      UserError: ``target`` exists and is not empty.
    """
    layout = family.hf_layout(model.config, model.head)
    with folder_written_whole(Path(target)) as folder:
        tensors = export_tensors(
            params, layout, bare=model.head is None, dtype=None if dtype is None else jnp.dtype(dtype)
        )
        write_safetensors(folder, tensors, shard_bytes)
        # The reference loads all in one type: mixed ones in the first that holds them all.
        kind = str(functools.reduce(jnp.promote_types, {tensor.dtype for tensor in tensors}))
        config = _exported_config(source_config, family, model, labels, problem_type, kind)
        write_atomic(folder / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        dropped = [name for name in CODE_SETTINGS if name in source_config]
        if dropped:
            note(f"config.json: {', '.join(dropped)} names code, which is neither run nor exported: taken out")
        if tokenizer is not None:
            tokenizer.save(folder, max_length)
        elif tokenizer_folder is not None:
            copy_files(Path(tokenizer_folder), folder, max_length)
        for path, text in (files or {}).items():
            (folder / path).parent.mkdir(exist_ok=True)
            write_atomic(folder / path, text)
        if source_folder is not None:
            seen_to = TOKENIZER_FILES if tokenizer is None else tokenizer.files
            take_over(Path(source_folder), folder, {"config.json", SUMS, *seen_to}, note)
        write_sums(folder)


def _exported_config(
    before: dict[str, object],
    family: Family,
    model: Model,
    labels: Sequence[str] | None,
    problem_type: str | None,
    dtype: str,
) -> dict[str, object]:
    stale = {"_name_or_path", "torch_dtype", "num_labels", *CODE_SETTINGS, *QUANTISATION_KEYS, *family.SUPERSEDED}
    config = {key: value for key, value in before.items() if key not in stale}
    kind = model_type_of(family, model.config, before.get("model_type"))
    config |= {"model_type": kind, **family.config_to_hf(model.config)}
    config["architectures"] = [architecture_of(family, model.head, kind)]
    config["dtype"] = dtype
    for key in ("id2label", "label2id", "problem_type"):
        config.pop(key, None)
    classes = classes_of(model.config)
    if family.HEADS[model.head].classes and classes is not None:
        names = labels or tuple(f"LABEL_{i}" for i in range(classes))
        if len(names) != classes:
            raise UserError(f"labels: {len(names)} names for a head of {classes} classes: {', '.join(names[:20])}")
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
        config["label2id"] = {name: i for i, name in enumerate(names)}
    if family.HEADS[model.head].classes == "rows" and classes is not None:
        # What a head is for does not follow from its shape: what the source leaves open stays open.
        if problem_type is None and not before and classes > 1:
            problem_type = SINGLE_LABEL
        if problem_type is not None or "problem_type" in before:
            config["problem_type"] = problem_type or before["problem_type"]
    return config
