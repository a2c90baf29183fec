"""What a run knows of its model, for the model card and the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft import __version__
from jaxft.config import RunConfig, flat, to_tree, to_yaml_line

if TYPE_CHECKING:  # they import jax, whose import takes seconds
    from jaxft.reporting.card import Card, SplitFacts
    from jaxft.training.loop import Result
    from jaxft.training.setup import Setup

CARD = "README.md"
BASE_CARD = "BASE_MODEL_README.md"
"""Where the card of the model that a run started from is kept: its own takes the place."""
_LARGEST = 1 << 20
_ELSEWHERE = (
    "train.out",
    "train.compilation_cache",
    "data.train",
    "data.eval",
    "data.test",
    "data.tokenizer",
    "model.init",
)
"""Settings that are told otherwise, or that are of the machine."""


def card_of(ready: Setup, result: Result, scores: Mapping[str, Mapping[str, object]], seconds: float) -> Card:
    """The card of a trained model.

    Args:
      scores: of its splits, by their names.
      seconds: that training took.
    """
    import jax

    from jaxft.models import adapters, family
    from jaxft.models.contract import architecture_of, model_type_of
    from jaxft.reporting.card import Card, card_metadata
    from jaxft.training.setup import files_beside
    from jaxft.trees import branch

    config, source = ready.config, ready.source
    base = adapters.base_of(ready.model)
    made = family(ready.family_name)
    kind = model_type_of(made, base.config, None if source is None else source.hf_config.get("model_type"))
    shapes = ready.shapes if base is ready.model else branch(ready.shapes, "base")
    return Card(
        name=Path(config.train.out).name,
        architecture=architecture_of(made, base.head, kind),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        base=None if config.model.init is None else _base_name(config.model.init),
        task=config.task.name,
        labels=ready.targets.labels,
        counts=ready.targets.counts,
        splits=tuple(_splits(ready)),
        scores=scores,
        training=_training(ready, result, seconds),
        settings=_settings(config),
        sentences="modules.json" in files_beside(ready.task, ready.model, config),
        inherited={} if source is None else card_metadata(source.folder / CARD),
    )


def base_card(ready: Setup) -> str | None:
    """The card of the model that a run started from, if there is one that can be read."""
    if ready.source is None:
        return None
    path = ready.source.folder / CARD
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size <= _LARGEST else None
    except (OSError, UnicodeDecodeError):
        return None


def _base_name(init: str) -> str:
    """A hub id as it is; the name of a Python package; of a folder its name alone, for where it lies is the machine's business."""
    if init.startswith("pkg:"):
        return init.removeprefix("pkg:").partition("/")[0]
    is_id = init.count("/") == 1 and not init.startswith((".", "~", "/")) and not Path(init).exists()
    return init if is_id else Path(init).name


def _splits(ready: Setup) -> Iterator[SplitFacts]:
    from jaxft.reporting.card import SplitFacts
    from jaxft.training.packing import all_examples

    data = ready.config.data
    named = {"train": data.train, "eval": data.eval, "test": data.test}
    found = {"train": ready.train, "eval": ready.held_out, "test": ready.test}
    for name, split in found.items():
        if split is not None:
            yield SplitFacts(name, _sources(named[name]), all_examples(split), split.digest())


def _sources(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Names of files and data sets, without the folders of this machine."""
    each = () if given is None else (given,) if isinstance(given, str) else given
    return tuple(one if one.startswith("tfds:") else Path(one).name for one in each)


def _training(ready: Setup, result: Result, seconds: float) -> dict[str, str]:
    import jax

    from jaxft.data.corpus.course import course_of

    mesh, lora = ready.mesh, ready.config.model.lora.rank
    adapters = {} if lora is None else {"adapters": f"of rank {lora}, merged into the weights"}
    course, rows = course_of(ready.config), f", of {ready.config.train.batch_size} rows each"
    staged = len(course.stages) > 1
    return {
        "steps": f"{result.step:,}{'' if staged else rows}; the weights are those of step {result.best_step:,}",
        **({"stages (rows x tokens)": course.text()} if staged else {}),
        **adapters,
        "seed": str(ready.config.train.seed),
        "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "time": f"{seconds:,.0f} s",
        "versions": f"jaxft {__version__}, jax {jax.__version__}",
    }


def _settings(config: RunConfig) -> str:
    """What differs from the defaults, but for what is of the machine, as YAML."""
    usual, tree = flat(to_tree(RunConfig())), flat(to_tree(config))
    changed = {key: value for key, value in tree.items() if key not in _ELSEWHERE and usual.get(key, usual) != value}
    return "\n".join(f"{key}: {to_yaml_line(value)}" for key, value in changed.items())
