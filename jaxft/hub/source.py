"""A model folder, read as far as needed to decide what to build: which family, which head, which labels; no weights yet.

config.json is asked first (``model_type``, ``architectures``), then names and shapes of the tensors; where the two differ,
it is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from jaxft import files, models
from jaxft.config import decode
from jaxft.data.labels import MOST_LABEL
from jaxft.data.processors import image
from jaxft.errors import UserError
from jaxft.files import package_folder
from jaxft.hub.sums import check_sums
from jaxft.hub.weights import Weights, open_weights
from jaxft.hub.weights.flax_names import under_pytorch_names
from jaxft.hub.weights.numbers import refuse_quantised
from jaxft.hub.weights.prefixed import WithoutPrefix
from jaxft.machine import buckets
from jaxft.machine.processes import is_first
from jaxft.models.contract import (
    IMAGE_SIZE,
    MODEL_TYPE,
    TIED,
    Facts,
    Family,
    architecture_of,
    architectures,
    classes_of,
    head_of,
    head_of_class,
    model_type_of,
)

Note = Callable[[str], None]

SINGLE_LABEL = "single_label_classification"
"""The ``problem_type`` of heads that give each text exactly one of several labels."""
REGRESSION = "regression"
"""The ``problem_type`` of heads that give each text a number."""
_WRAPPERS = ("module.", "_orig_mod.", "model.")  # DataParallel and kin, torch.compile, Lightning
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def resolve_folder(reference: str | Path) -> Path:
    """The local folder that a model reference names: a path, ``pkg:PACKAGE/FOLDER``, ``s3://`` or ``gs://`` (a copy of what
    lies there), or a hub id (``ORG/NAME`` or ``NAME``).

    Raises:
      UserError: there is no such folder, package or hub model.
    """
    if isinstance(reference, str) and buckets.is_address(reference):
        reference = buckets.fetched(reference)
    path = Path(reference).expanduser()
    if isinstance(reference, str) and reference.startswith("pkg:"):
        return package_folder(reference)
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"model {str(reference)!r} is a file; name the folder that holds config.json and the weights")
    if isinstance(reference, Path) or not _HUB_ID.fullmatch(reference):
        raise UserError(f"model folder {str(reference)!r} does not exist")
    return _from_hub(reference)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["*.json", "*.txt", "*.safetensors", "*.model", "*.jinja", "README.md", "LICENSE*"]
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


def read_json(path: Path) -> dict[str, object]:
    """A JSON object.

    Raises:
      UserError: no such file, or not a JSON object.
    """
    try:
        return files.read_json_object(path)
    except FileNotFoundError:
        near = sorted(other.name for other in path.parent.glob(f"*_{path.name}"))
        copy = f"; copy {near[0]} to it" if near else ""
        raise UserError(
            f"{path} does not exist; a model folder holds config.json, weights and tokenizer files{copy}"
        ) from None


@dataclass(frozen=True)
class Source:
    """A model folder, read as far as needed to decide what to build."""

    folder: Path
    hf_config: dict[str, object]
    family: Family
    family_name: str
    config: Any
    """The family's Config, changes applied."""
    head: str | None
    """The head its weights have; None: none, or one that the family does not have (``foreign``)."""
    labels: tuple[str, ...] | None
    """Label names in the order of class ids, if the head has classes and they were named."""
    foreign: str | None = None
    """What the folder's head is called, if it is one that the family does not have."""
    stored: Any = None
    """The family's Config as the folder has it."""
    changes: Mapping[str, object] = field(default_factory=dict)
    """What was changed of it on request."""
    wrapper: str = ""
    """A prefix of all tensor names that is none of the family's (``module.``, say)."""

    @property
    def model_type(self) -> str:
        """The reference's name for this kind of model; the family's own if config.json states none that it has."""
        return model_type_of(self.family, self.stored, self.hf_config.get("model_type"))

    @property
    def classes(self) -> int | None:
        """How many classes the head of the weights tells apart; None: it has none."""
        head = self.family.HEADS.get(self.head)
        return classes_of(self.stored) if head is not None and head.classes else None

    def stored_head(self) -> str | None:
        """The head its weights have.

        Raises:
          UserError: it is one that the family does not have.
        """
        if self.foreign is None:
            return self.head
        names = {head: architecture_of(self.family, head, self.model_type) for head in self.family.HEADS if head}
        have = ", ".join(f"{head} ({name})" for head, name in names.items())
        raise UserError(
            f"{self.folder}: {self.foreign} is not supported: {self.family_name} here has the heads {have}; take the encoder "
            "alone (head=None, --head none), or train one of these heads on it with model.head=fresh"
        )

    def open(self) -> Weights:
        """The weights, under the reference's PyTorch names; close them."""
        weights = open_folder(self.folder)
        return WithoutPrefix(weights, self.wrapper) if self.wrapper else weights


def open_source(
    reference: str | Path,
    note: Note,
    *,
    family: str | None = None,
    arch: dict[str, object] | None = None,
    as_shown: bool = False,
) -> Source:
    """Reads a model folder's config.json and the names and shapes of its weights.

    Args:
      reference: see :func:`resolve_folder`.
      note: called with a line for everything that had to be guessed or corrected.
      family: module of ``jaxft.models``; None: what config.json says.
      arch: changes to the family's Config.
      as_shown: a model of images reads them in the size that the folder's preprocessor_config.json makes.
    """
    folder = resolve_folder(reference)
    if not jax.distributed.is_initialized() or is_first():  # of several processes one reads all of it
        check_sums(folder)
    hf_config = read_json(folder / "config.json")
    name = _family_name(hf_config, family, folder, note)
    module = models.family(name)
    refuse_quantised(hf_config, folder / "config.json")
    stated = module.config_from_hf(hf_config)
    with open_folder(folder) as weights:
        wrapper = _wrapper_of(weights.names(), module.hf_layout(make_config(module, stated), None).prefix)
        if wrapper:
            note(f"all tensor names begin with {wrapper!r}, which {name} has not: it is left out")
        seen = WithoutPrefix(weights, wrapper) if wrapper else weights
        said = module.config_of_weights(seen)
        head, foreign = _head(hf_config, module, seen.names(), note, make_config(module, stated))
    if said.get(TIED) is False and stated.get(TIED, getattr(module.Config, TIED, False)):
        note("config.json ties the embeddings, but the weights have another decoder of their own: it is kept, untied")
    tree = {**stated, **said}
    labels, rows = _labels(hf_config), said.get("num_labels")
    if head is None or not module.HEADS[head].classes:
        rows = None
        tree.pop("num_labels", None)  # of another head
    elif rows is not None:
        _compare_counts(hf_config, rows, note)
        if labels is not None and len(labels) != rows:
            labels = None
    changes = {
        **(_size_shown(folder, module.facts(make_config(module, tree)), note) if as_shown else {}),
        **(arch or {}),
    }
    return Source(
        folder=folder,
        hf_config=hf_config,
        family=module,
        family_name=name,
        config=make_config(module, _merged(tree, changes)),
        head=head,
        labels=labels if rows is not None else None,
        foreign=foreign,
        stored=make_config(module, tree),
        changes=changes,
        wrapper=wrapper,
    )


def _size_shown(folder: Path, facts: Facts, note: Note) -> dict[str, object]:
    """The change that a model of images needs to read them as its folder makes them; none if it does already. DINOv2's are made for larger
    images than they are shown."""
    if facts.processor != "image" or not image.has_processor(folder):
        return {}
    stored, shown = facts.inputs[facts.reads].axes[1:3], image.size_made(folder)
    if shown is None or shown == stored:
        return {}
    height, width = shown
    note(
        f"images are shown in {height}x{width} pixels, as {folder / image.FILE} says; the model was made for {stored[0]}x{stored[1]}"
    )
    return {IMAGE_SIZE: height if height == width else shown}


def _compare_counts(hf_config: Mapping[str, object], rows: object, note: Note) -> None:
    """Says if config.json claims another number of labels than the weights have."""
    # num_labels is not always written; id2label then says it, and two is the reference's default.
    by_id = hf_config.get("id2label")
    claimed = hf_config.get("num_labels", len(by_id) if isinstance(by_id, dict) and by_id else None)
    if claimed is None and rows != 2:
        note(f"config.json does not say how many labels there are; the weights have {rows}")
    elif claimed not in (None, rows):
        note(f"config.json says {claimed} labels, the weights have {rows}: the weights are believed")


def make_config(family: Family, tree: dict[str, object]) -> Any:
    """A family's Config from a plain dict; UserError for unknown fields or wrong types."""
    return decode(family.Config, tree, "model.arch")


def fresh_config(name: str, arch: Mapping[str, object]) -> Any:
    """The Config of a model from random weights.

    Args:
      name: of the family; or a ``model_type`` of it, whose defaults are the reference's where kinds of model differ in their maths.
      arch: fields of the Config that are something else.
    """
    family = models.family(name)
    typed = name in family.MODEL_TYPES and MODEL_TYPE in family.Config.__dataclass_fields__
    return make_config(family, _merged(family.config_from_hf({"model_type": name}) if typed else {}, arch))


def _merged(tree: Mapping[str, object], changes: Mapping[str, object]) -> dict[str, object]:
    """``tree`` with ``changes``; of a group of settings, only those named change."""
    both = {
        key: _merged(below, value)
        for key, value in changes.items()
        if isinstance(value, Mapping) and isinstance(below := tree.get(key), Mapping)
    }
    return {**tree, **changes, **both}


def open_folder(path: Path) -> Weights:
    """The weights in a folder or file, under the reference's PyTorch names whatever the file format."""
    weights = open_weights(path)
    return under_pytorch_names(weights) if weights.format == "flax msgpack" else weights


def _wrapper_of(names: Sequence[str], prefix: str) -> str:
    """The wrappers' names that begin all tensor names; "" if there are none.

    Args:
      prefix: what the family's names of the encoder begin with in models with a head.
    """
    found = ""
    while True:
        rest = [name.removeprefix(found) for name in names]
        first = next((one for one in _WRAPPERS if all(name.startswith(one) for name in rest)), None)
        # A family may have the wrapper's name itself: model.layers.0 is its own, model.model.layers.0 is wrapped.
        own = first == prefix and not any(name.startswith(prefix * 2) for name in rest)
        if first is None or own or first in rest:
            return found
        found += first


# ------------------------------------------------------------------------------------------------------- what it says


def _family_name(hf_config: dict[str, object], family: str | None, folder: Path, note: Note) -> str:
    stated = hf_config.get("model_type")
    if family is not None:
        if stated not in (None, family, family.rpartition(".")[2], *models.family(family).MODEL_TYPES):
            note(f"config.json says model_type {stated!r}, family {family!r} is believed")
        return family
    if stated is not None:
        if "." in str(stated):  # a file's word is not imported
            raise UserError(f"{folder / 'config.json'}: model_type {stated!r} is not supported; set model.family")
        return models.model_types().get(str(stated), str(stated))
    named = _architectures(hf_config)
    for candidate in models.families():
        family_ = models.family(candidate)
        stems = tuple(f"{stem}For" for stem in family_.MODEL_TYPES.values())
        if any(name in architectures(family_) or name.startswith(stems) for name in named):
            note(f"config.json has no model_type: {candidate!r} follows from architectures {named}")
            return candidate
    raise UserError(
        f"{folder / 'config.json'}: no model_type, and architectures {named} are not known; say which of "
        f"{', '.join(models.families())} it is: jaxft convert --family, jaxft.load(..., family=), or model.family="
    )


def _architectures(hf_config: Mapping[str, object]) -> list[str]:
    """The reference's classes that config.json names; those of TensorFlow and Flax by their PyTorch names."""
    listed = hf_config.get("architectures")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    return [name.removeprefix("TF").removeprefix("Flax") for name in names]


def _head(
    hf_config: Mapping[str, object], family: Family, names: Collection[str], note: Note, config: Any
) -> tuple[str | None, str | None]:
    """The head that a folder has, and what it is called if the family has no such head."""
    seen, named, known = head_of(names, family.HEADS), _architectures(hf_config), architectures(family)
    if not named:
        return (seen, None) if seen in family.HEADS else (None, f"a head for {seen} (by its tensors)")
    stated = next((name for name in named if name in known), None)
    if stated is None:
        return None, named[0]
    head = head_of_class(family, stated, names)
    if head is None and seen is not None:
        tensors = _head_tensors(family, names, config)
        if tensors:
            note(
                f"config.json says {stated}, which has no head, the weights have {', '.join(tensors[:4])}: they are left out; "
                "if they are wanted, let architectures in config.json name the class that they belong to"
            )
    return head, None


def _head_tensors(family: Family, names: Collection[str], config: Any) -> list[str]:
    """The names that belong to a head of the family."""
    layouts = [family.hf_layout(config, head) for head in family.HEADS]
    roots = {
        r.theirs.split(".")[0] for layout in layouts for r in layout.rules if not r.theirs.startswith(layout.prefix)
    }
    return [name for name in names if name.split(".")[0] in roots]


def problem_of(hf_config: Mapping[str, object], classes: int | None) -> str:
    """What a classification head is for: the ``problem_type`` of config.json; one output without it is a regression."""
    stated = hf_config.get("problem_type")
    return str(stated) if stated else REGRESSION if classes == 1 else SINGLE_LABEL


def refuse_other_problem(
    hf_config: Mapping[str, object], classes: int | None, wanted: str | None, what: str, instead: str
) -> None:
    """Raises UserError if a classification head is for something else than a task is.

    Args:
      hf_config: config.json of the model.
      classes: rows of its head.
      wanted: the ``problem_type`` of the task; None: any.
      what: would be done with it, for the message.
      instead: what to do about it.
    """
    problem = problem_of(hf_config, classes)
    if wanted is None or (problem == wanted and not (problem == SINGLE_LABEL and classes == 1)):
        return
    outputs = "one output" if classes == 1 else f"{classes} outputs"
    raise UserError(f"the model's head is for {problem} ({outputs}), not for {wanted}: {what}; {instead}")


def _labels(hf_config: Mapping[str, object]) -> tuple[str, ...] | None:
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
    if long := [i for i, name in enumerate(names) if len(name) > MOST_LABEL]:
        raise UserError(
            f"config.json: id2label.{long[0]} has {len(names[long[0]]):,} characters, at most {MOST_LABEL:,} are possible"
        )
    return None if all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names
