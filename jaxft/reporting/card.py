"""What a trained model says of itself: the model card beside its weights, and the report of its run, both as Markdown.

The card's head is the metadata that the Hugging Face hub reads (https://huggingface.co/docs/hub/model-cards); its sections are those of
Mitchell et al. 2019, as far as a program can fill them in. What it cannot know is not guessed: it is left for people to add.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

import yaml

from jaxft.files import JsonObject
from jaxft.reporting.scores import Known, headline

_PIPELINES = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}
"""The hub's names of what classes of transformers do, where its ``pipeline`` has one."""
_MOST_CLASSES = 50
_SPLITS = {"train": "training", "eval": "held-out", "test": "test"}
_MARKED = str.maketrans({c: f"\\{c}" for c in "\\`*_[]<>|#"} | dict.fromkeys("\r\n\t\x0b\x0c", " "))


class SplitFacts(NamedTuple):
    """Rows that a model was trained or scored on."""

    name: str
    """``train``, ``eval`` or ``test``."""
    sources: tuple[str, ...]
    """Names of files or data sets; none where the rows are a part of the training files."""
    rows: int
    digest: str
    """Hash of the encoded rows."""


@dataclass(frozen=True)
class Card:
    """What there is to be said of a trained model."""

    name: str
    architecture: str
    """The class of transformers that loads it."""
    parameters: int
    base: str | None
    """Where its weights began: a hub id, or the name of a folder. None: random ones."""
    task: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]
    """Training rows with each label, or none where labels are not counted."""
    splits: tuple[SplitFacts, ...]
    scores: Mapping[str, Mapping[str, object]]
    """By split, as the task scored it."""
    training: Mapping[str, str]
    """Facts of the training, by what they are called."""
    settings: str
    """YAML: what differs from jaxft's defaults."""
    sentences: bool = False
    """Whether the folder is one of sentence-transformers."""
    inherited: Mapping[str, object] = field(default_factory=dict)
    """``license`` and ``language`` of the card of the model that it started from."""


def card_text(card: Card) -> str:
    """``README.md`` of a model folder: metadata for the hub, how to load the model, data, training, scores, limits."""
    head = yaml.safe_dump(_metadata(card), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{head}---",
        f"# {plain(card.name)}",
        _summary(card),
        "## How to load it",
        _loading(card),
        *_sections(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def report_markdown(card: Card, pictures: Sequence[Path], samples: Sequence[JsonObject] = ()) -> str:
    """``report.md`` of a run: what the card says, with the pictures that lie beside it, and what the model wrote last."""
    shown = "\n\n".join(f"![{path.stem}]({path.name})" for path in pictures if path.suffix == ".png")
    parts = [f"# {plain(card.name)}", _summary(card), *_sections(card, shown), *_written(samples)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _written(samples: Sequence[JsonObject]) -> Iterator[str]:
    if samples:
        names = [name for name in ("prompt", "text", "wanted") if any(name in one for one in samples)]
        yield f"## What it wrote at step {samples[0]['step']}"
        yield "\n".join(_table(names, [[plain(str(one.get(name, ""))) for name in names] for one in samples]))


def plain(text: str) -> str:
    """A text as Markdown that shows just this text, on one line."""
    return " ".join(text.translate(_MARKED).split())


def card_metadata(path: Path) -> dict[str, object]:
    """License and language from the head of a model card; empty if the file has none that can be read."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(1 << 16)
    except (OSError, UnicodeDecodeError):
        return {}
    _, mark, rest = text.partition("---\n")
    head, end, _ = rest.partition("\n---")
    if not mark or not end or text[:3] != "---":
        return {}
    try:
        tree = yaml.safe_load(head) if "&" not in head else None  # a card needs no anchors, and some are bombs
    except yaml.YAMLError:
        return {}
    tree = tree if isinstance(tree, dict) else {}
    return {name: tree[name] for name in ("license", "language") if _is_text(tree.get(name))}


def _is_text(value: object) -> bool:
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(isinstance(item, str) for item in items)


def _metadata(card: Card) -> dict[str, object]:
    pipeline = _pipeline(card)
    found: dict[str, object] = dict(card.inherited)
    found["library_name"] = "sentence-transformers" if card.sentences else "transformers"
    if card.base is not None and "/" in card.base:
        found["base_model"] = card.base
    if pipeline is not None:
        found["pipeline_tag"] = pipeline
    found["tags"] = ["jaxft", card.task.rpartition(".")[2].replace("_", "-")]
    results = [_result(card, split, pipeline) for split in card.scores]
    found["model-index"] = [{"name": card.name, "results": results}]
    return found


def _result(card: Card, split: str, pipeline: str | None) -> dict[str, object]:
    sources = next(facts.sources for facts in card.splits if facts.name == split) or card.splits[0].sources
    data = ", ".join(sources) or "unnamed"
    numbers = [
        {"type": name, "name": name, "value": round(value, 6)}
        for name, _, value in headline(card.scores[split])
        if math.isfinite(value)
    ]
    task = pipeline or card.task.rpartition(".")[2].replace("_", "-")
    return {"task": {"type": task}, "dataset": {"name": data, "type": data, "split": split}, "metrics": numbers}


def _pipeline(card: Card) -> str | None:
    if card.sentences:
        return "sentence-similarity"
    found = [tag for suffix, tag in _PIPELINES.items() if card.architecture.endswith(suffix)]
    return found[0] if found else None


def _summary(card: Card) -> str:
    began = "trained from random weights" if card.base is None else f"fine-tuned from `{card.base}`"
    labels = f" It tells {len(card.labels)} labels apart: {_listed(card.labels)}." if len(card.labels) > 1 else ""
    return (
        f"A `{card.architecture}` of {card.parameters:,} parameters, {began} for {card.task.rpartition('.')[2].replace('_', ' ')} "
        f"with jaxft.{labels}"
    )


def _listed(names: Sequence[str], most: int = 20) -> str:
    shown = ", ".join(plain(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _loading(card: Card) -> str:
    if card.sentences:
        code = 'from sentence_transformers import SentenceTransformer\n\nvectors = SentenceTransformer("FOLDER").encode(["a text"])'
        return f"```python\n{code}\n```\n\n`jaxft predict FOLDER` does the same for a text per line."
    pipeline = _pipeline(card)
    if pipeline is None:
        code = (
            f"from transformers import AutoTokenizer, {card.architecture}\n\n"
            f'tokenizer, model = AutoTokenizer.from_pretrained("FOLDER"), {card.architecture}.from_pretrained("FOLDER")'
        )
    else:
        code = f'from transformers import pipeline\n\nanswer = pipeline("{pipeline}", "FOLDER")'
    return (
        f"```python\n{code}\n```\n\n`jaxft predict FOLDER` answers rows of a file or of standard input without torch."
    )


def _sections(card: Card, pictures: str = "") -> Iterator[str]:
    yield "## Data"
    yield "\n".join(
        _table(("split", "from", "rows", "hash of the encoded rows"), [_data_row(card, facts) for facts in card.splits])
    )
    if card.counts:
        pairs = sorted(zip(card.labels, card.counts, strict=True), key=lambda pair: -pair[1])
        more = (
            f"\n\nThe {len(pairs) - _MOST_CLASSES} rarest labels are left out here."
            if len(pairs) > _MOST_CLASSES
            else ""
        )
        rows = [(plain(label), f"{count:,}") for label, count in pairs[:_MOST_CLASSES]]
        yield "\n".join(_table(("label", "in training"), rows)) + more
    yield (
        "Who made these rows, from whom, with what consent and under which terms, a program cannot know: say it here before the model is "
        "passed on."
    )
    yield "## Scores"
    for split, scores in card.scores.items():
        yield from _scored(card, split, scores)
    yield pictures
    yield "## Training"
    yield "\n".join(_table(("", ""), [(name, plain(value)) for name, value in card.training.items()]))
    yield f"What differs from the defaults:\n\n```yaml\n{card.settings.rstrip()}\n```" if card.settings else ""
    yield "## Limits"
    yield "\n".join(f"- {line}" for line in _limits(card))


def _data_row(card: Card, facts: SplitFacts) -> tuple[str, ...]:
    named = ", ".join(map(plain, facts.sources)) or "a part of the training files"
    return _SPLITS[facts.name], named, f"{facts.rows:,}", f"`{facts.digest[:16]}`"


def _scored(card: Card, split: str, scores: Mapping[str, object]) -> Iterator[str]:
    known = cast(Known, scores)
    intervals = known.get("intervals", {})
    rows = [(shown, f"{value:.4f}", _interval(intervals.get(name, ()))) for name, shown, value in headline(scores)]
    yield f"On the {_SPLITS[split]} rows:"
    yield "\n".join(
        _table(("score", "value", "95 % of resamples of the rows") if intervals else ("score", "value"), rows)
    )
    classes = known.get("classes")
    if classes:
        worst = sorted(classes.items(), key=lambda pair: pair[1]["f1"])[:_MOST_CLASSES]
        yield f"Classes, the weakest first{f' ({_MOST_CLASSES} of {len(classes)})' if len(classes) > _MOST_CLASSES else ''}:"
        names = ("precision", "recall", "f1")
        lines = [(plain(name), *(f"{row[key]:.4f}" for key in names), f"{row['rows']:,}") for name, row in worst]
        yield "\n".join(_table(("class", *names, "rows"), lines))


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else ""


def _limits(card: Card) -> Iterator[str]:
    if "test" not in card.scores:
        yield (
            "The best step was chosen by the held-out rows that the scores are of, which flatters them a little; rows named as "
            "`data.test` would be scored once."
        )
    classes = cast(Known, card.scores.get("test", card.scores["eval"])).get("classes")
    if classes and len(classes) > 1:
        name, row = min(classes.items(), key=lambda pair: pair[1]["f1"])
        yield f"Weakest class: {plain(name)}, F1 {row['f1']:.4f} on {row['rows']:,} rows."
    if card.counts and min(card.counts) * 10 <= max(card.counts):
        yield "Labels are uneven: some have ten times the training rows of others or more. The scores of rare ones are uncertain."
    yield "Scores are of rows like those above. How the model does on other sources, languages or groups of people was not measured."
    yield "Nothing was done to keep single training rows from being remembered; treat the weights as confidentially as the rows."


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    return lines + [f"| {' | '.join(row[: len(heads)])} |" for row in rows]
