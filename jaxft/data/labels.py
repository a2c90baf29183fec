"""Names of classes: a label has one name, whatever the format, the type and the spelling that it comes in.

The rule, value by value:

- None, NaN, an empty or blank text, and a text of invisible characters alone are missing. Every other text is a name, ``"NaN"`` and
  ``"null"`` too.
- Booleans, and the texts ``true``, ``True`` and ``TRUE`` (as false), are ``true`` and ``false``.
- Numbers, and texts that are plainly numbers, are written in as few digits as give the number: 1, 1.0, ``"1"``, ``"1.0"`` and
  ``"+1"`` are ``1``. A number that float32 can hold is written as float32 would be: 0.1 that was stored in 32 bits is ``0.1``.
- Not numbers are texts with leading zeros (``"01"``: a code) and exponents without a sign (``"1e5"`` may be a code; programs write
  ``1e+05``).
- Other texts lose the blanks around them, and accents are composed (Unicode NFC).
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from jaxft.errors import UserError, listed, nearest

_BOOLEANS = {"true": "true", "True": "true", "TRUE": "true", "false": "false", "False": "false", "FALSE": "false"}
_WHOLE = re.compile(r"([+-]?)(0|[1-9][0-9]{0,300})(?:\.0*)?")
_NUMBER = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]{0,300})(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-][0-9]{1,3})?")
MOST_LABEL = 1000
"""Characters of a label: what is longer is a text, of another column."""
_FEW = 20  # different numbers that may still be classes, such as stars in halves


def label_text(value: object) -> str:
    """The name of a label's class, by the rule above; empty if the label is missing. The name of a name is itself."""
    if isinstance(value, np.floating):
        value = float(value) if float(value).is_integer() else float(str(value))  # np.float16(0.1) is 0.1
    elif isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return ""
    if isinstance(value, bool | int):
        return str(value).lower()
    if isinstance(value, float):
        return _number_text(value)
    return _text_name(str(value))


@functools.lru_cache(maxsize=1 << 14)  # of many rows, few labels
def _text_name(written: str) -> str:
    text = unicodedata.normalize("NFC", written).strip()
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if whole := _WHOLE.fullmatch(text):
        return str(int(whole[1] + whole[2]))
    if _NUMBER.fullmatch(text) and math.isfinite(float(text)):
        return _number_text(float(text))
    return text if _seen(text) else ""


def _number_text(value: float) -> str:
    if math.isnan(value):
        return ""
    if value.is_integer():
        return str(int(value))
    with np.errstate(over="ignore", under="ignore"):
        short = np.float32(value)
    return repr(float(str(short)) if float(short) == value else value)


def _seen(text: str) -> str:
    """What is seen of a text: without control and formatting characters, blanks alike, in lower case."""
    kept = (c for c in text if unicodedata.category(c) not in ("Cc", "Cf") and not "\ufe00" <= c <= "\ufe0f")
    return " ".join("".join(kept).casefold().split())


def sorted_labels(labels: Iterable[object]) -> tuple[str, ...]:
    """The distinct names of labels: numbers in order of value if all are numbers, else in order of code points.

    Class ids are part of a model, so the order must be one and the same in every process: names of equal value ("1",
    "01") are told apart by their code points, and NaN, which has no place in an order, counts as a word.
    """
    names = sorted({label_text(label) for label in labels})
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        return tuple(names)
    if any(math.isnan(value) for value in values.values()):
        return tuple(names)
    return tuple(sorted(names, key=lambda name: values[name]))


def declared_labels(declared: Sequence[object] | Mapping[str, object] | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Class names in the order of their ids, and the names by label of the data, both as ``data.labels`` says.

    A list gives the names. A mapping gives each label of the data its class's name; if the labels are 0, 1, ..., they are the
    class ids, else the order is that of the mapping.

    Raises:
      UserError: a name or a label is there twice, or empty.
    """
    if declared is None:
        return (), {}
    if not isinstance(declared, Mapping):
        return _distinct(map(label_text, declared), "names"), {}
    labels = _distinct(map(label_text, declared), "labels")
    renamed = dict(zip(labels, map(label_text, declared.values()), strict=True))
    ids = [str(i) for i in range(len(labels))]
    order = ids if set(ids) == set(labels) else labels
    return _distinct((renamed[label] for label in order), "names"), renamed


def renamed_labels(declared: Sequence[object] | Mapping[str, object] | None, labels: Sequence[str]) -> dict[str, str]:
    """By label of the data, the name of its class among ``labels``, for those that ``data.labels`` gives other names."""
    names, renamed = declared_labels(declared)
    return {label: labels[names.index(name)] for label, name in renamed.items()}


def _distinct(names: Iterable[str], what: str) -> tuple[str, ...]:
    found = tuple(names)
    seen = set[str]()
    for name in found:
        if not name:
            raise UserError(f"data.labels: one of its {what} is empty")
        if name in seen:
            raise UserError(f"data.labels: {name!r} is twice among its {what}")
        seen.add(name)
    return found


def class_ids(
    labels: Iterable[object], wheres: Iterable[str], names: Sequence[str], renamed: Mapping[str, str] | None = None
) -> np.ndarray:
    """[rows] int32: the class id of each label.

    Args:
      labels: of the rows.
      wheres: where each row is.
      names: of the classes, in the order of their ids; a model of elsewhere may spell them in its own way.
      renamed: names by label, if the data have others than the model.

    Raises:
      UserError: a label is of no class, or of two; says where.
    """
    ids = _ids_by_label(names, renamed or {})
    found = []
    for label, where in zip(labels, wheres, strict=True):
        name = label_text(label)
        number = ids.get(str(label).strip(), ids.get(name))
        if number is None:
            known = renamed or names
            raise UserError(f"{where}: unknown label {name!r}: {nearest(name, known)}{_advice(name, names, renamed)}")
        if number < 0:
            alike = [other for other in names if label_text(other) == name]
            raise UserError(
                f"{where}: label {name!r} may be of any of the model's classes {listed(alike)}; spell it so"
            )
        found.append(number)
    return np.array(found, np.int32)


def _ids_by_label(names: Sequence[str], renamed: Mapping[str, str]) -> dict[str, int]:
    ids: dict[str, int] = {}
    for i, name in enumerate(names):
        text = label_text(name)
        ids[text] = -1 if text in ids else i
    ids |= {name: i for i, name in enumerate(names)}
    return ids | {label: names.index(name) for label, name in renamed.items()}


def _advice(name: str, names: Sequence[str], renamed: Mapping[str, str] | None) -> str:
    if renamed or not name.isdecimal() or len(name) > len(str(_FEW)) or int(name) >= len(names) or len(names) > _FEW:
        return ""
    pairs = ", ".join(f"{i}: {other}" for i, other in enumerate(names))
    return f"; if the labels are class ids: data.labels={{{pairs}}}"


def fits(found: Iterable[str], names: Sequence[str]) -> bool:
    """Whether each of the labels found is of one of the classes."""
    ids = _ids_by_label(names, {})
    return all(ids.get(label, -1) >= 0 for label in found)


def refuse_alike(names: Sequence[str], where: str) -> None:
    """Raises UserError if two classes have one name: an answer would not say which is meant."""
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        text = unicodedata.normalize("NFC", name).strip()
        if text in first:
            raise UserError(
                f"{where}: classes {first[text]} and {i} have the same name {name!r}; give each its own in id2label"
            )
        first[text] = i


def refuse_scores(found: Sequence[str], column: str) -> None:
    """Raises UserError if labels look like scores: many different numbers, with decimals."""
    numbers = [name for name in found if _NUMBER.fullmatch(name)]
    broken = [name for name in numbers if not _WHOLE.fullmatch(name)]
    if len(found) > _FEW and len(numbers) > 0.9 * len(found) and 2 * len(broken) > len(numbers):
        raise UserError(
            f"data.label={column}: {len(found)} different numbers such as {listed(broken[:3])} look like scores to be predicted as "
            "numbers, not like classes; round them to a few, or list them all in data.labels if each is a class"
        )


def look_alikes(labels: Iterable[object], names: Sequence[str]) -> list[str]:
    """Warnings about labels that a reader would take for each other, each on one line."""
    warnings = []
    spelt: dict[str, set[str]] = {}
    for label in labels:
        if isinstance(label, str) and not label.isascii():
            spelt.setdefault(label_text(label), set()).add(label.strip())
    for _, spellings in sorted(spelt.items()):
        if len(spellings) > 1:
            ways = ", ".join(map(ascii, sorted(spellings)))
            warnings.append(f"labels {ways} are the same letters, with accents composed or not: one class")
    seen: dict[str, list[str]] = {}
    for name in names:
        seen.setdefault(_seen(name), []).append(name)
    for group in seen.values():
        if len(group) > 1:
            ways = ", ".join(map(ascii, group))
            warnings.append(f"labels {ways} differ only in case or invisible characters, and are {len(group)} classes")
    return warnings
