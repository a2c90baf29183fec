"""What a model has written, as a short table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxft.files import JsonObject
from jaxft.reporting.cells import fit
from jaxft.reporting.records import read_log

SAMPLES = "samples.jsonl"
"""The file of a run's samples."""
_SHARES = {"prompt": 0.35, "text": 0.4, "wanted": 0.25}


def samples_text(samples: Sequence[JsonObject], width: int = 100) -> str:
    """A line for each sample, cut to the width: what it was written of, the text, and what is wanted if there is something."""
    shown = [name for name in _SHARES if any(name in one for one in samples)]
    whole = sum(_SHARES[name] for name in shown)
    sizes = {name: int((width - 3 * len(shown)) * _SHARES[name] / whole) for name in shown}
    lines = [{name: name for name in shown}, *samples]
    return "\n".join(
        "  " + " | ".join(fit(_line(one.get(name, "")), sizes[name]) for name in shown).rstrip() for one in lines
    )


def _line(text: object) -> str:
    """A text on one line, without what moves a terminal's cursor."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(text).split()))


def last_samples(out: Path) -> list[JsonObject]:
    """What the model of a run's folder wrote last."""
    found = read_log(out / SAMPLES) if (out / SAMPLES).exists() else []
    return [one for one in found if one["step"] == found[-1]["step"]]
