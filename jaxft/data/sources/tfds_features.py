"""A check before a folder of TensorFlow Datasets is opened: its features.json may name any Python module, which tfds imports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jaxft.errors import UserError
from jaxft.files import parse_json, present, read_json

# Spellings of today's protocol buffers as JSON, and of files before them.
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")


def refuse_foreign_features(path: Path, reference: str) -> None:
    """Raises UserError if a features.json names a feature class that is not tfds's own: code of data is never run."""
    if not present(path):
        return  # tfds says what is missing
    named = sorted(set(_classes(read_json(path))))
    foreign = [name for name in named if not name.startswith("tensorflow_datasets.")]
    if foreign:
        raise UserError(
            f"{reference}: {path} names the feature class {foreign[0]!r}, which is not tfds's own; "
            "code that data name is never run"
        )


def _classes(value: object) -> Iterator[str]:
    """Names of feature classes anywhere in a features.json, those in JSON inside of strings too."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if key in _CLASS_KEYS and isinstance(entry, str) and "." in entry:
                yield entry
            yield from _classes(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _classes(entry)
    elif isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            inner = parse_json(value, "a text of it")
        except UserError:
            return  # a description that looks like it
        yield from _classes(inner)
