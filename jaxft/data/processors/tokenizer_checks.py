"""What is refused of a tokenizer's files before a text is encoded: the fault would show much later, or as something else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft.data.batch import Fields
from jaxft.data.processors.contract import TextProcessor
from jaxft.data.processors.tokenizer_classes import Kind, Settings
from jaxft.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast

_MOST_GROWTH = 1000
"""How many times as long a normalizer may make a text. Those of published tokenizers replace signs by one or two others."""


def check_settings(folder: Path, kind: Kind, settings: Settings, named: Mapping[str, object]) -> None:
    """Refuses settings that have no meaning, and whose effect would come much later.

    Args:
      named: tokens by name, as the settings have them.

    Raises:
      UserError: for the first of them.
    """
    from tokenizers import AddedToken

    where = folder / "tokenizer_config.json"
    for name, token in named.items():
        if not isinstance(token, str | AddedToken):
            raise UserError(f"{where}: {name}={token!r} is no token")
    extra = settings.get("extra_special_tokens")
    if extra is not None and not (isinstance(extra, list) and all(isinstance(t, str | AddedToken) for t in extra)):
        raise UserError(f"{where}: extra_special_tokens={extra!r}: expected a list of tokens")
    for name in ("truncation_side", "padding_side"):
        if settings.get(name, "right") not in ("left", "right"):
            raise UserError(f"{where}: {name}={settings[name]!r}: expected left or right")
    for name in ("do_lower_case", "tokenize_chinese_chars", "add_prefix_space", "split_special_tokens", "trim_offsets"):
        if not isinstance(settings.get(name, False), bool | None):
            raise UserError(f"{where}: {name}={settings[name]!r}: expected true or false")
    needed = [
        name for name in ("unk_token", "sep_token", "cls_token") if name in kind.defaults and settings[name] is None
    ]
    if needed and kind.finish is not None:
        raise UserError(f"{where}: {needed[0]} is null, but a tokenizer of class {kind.name} needs one")


def check_model(folder: Path, fast: Fast) -> None:
    """Raises UserError for a backend that gives other ids each time, or whose normalizer could fill the memory."""
    if not fast.get_vocab_size(with_added_tokens=False):
        raise UserError(f"{folder}: the tokenizer's files hold no vocabulary; copy them again, or set data.tokenizer")
    dropout = getattr(fast.model, "dropout", None)
    if dropout:
        raise UserError(
            f"{folder / 'tokenizer.json'}: its merges have dropout={dropout:g}: ids would differ each time; set it to null"
        )
    if fast.normalizer is not None:
        growth = _growth(json.loads(fast.normalizer.__getstate__()))
        if growth > _MOST_GROWTH:
            raise UserError(
                f"{folder / 'tokenizer.json'}: its normalizer could make a text {growth:.0e} times as long; more than "
                f"{_MOST_GROWTH} times is refused"
            )


def _growth(tree: object) -> float:
    """How many times as long the replacements of a normalizer may make a text."""
    if not isinstance(tree, dict):
        return 1
    if isinstance(tree.get("normalizers"), list):
        return math.prod(map(_growth, tree["normalizers"]))
    content, pattern = tree.get("content"), tree.get("pattern")
    if not isinstance(content, str):
        return 1 + len(tree["prepend"]) if isinstance(tree.get("prepend"), str) else 1
    plain = pattern.get("String") if isinstance(pattern, dict) else None
    # A regular expression may match nothing, before each letter.
    return max(1, len(content) / len(plain)) if isinstance(plain, str) and plain else 1 + len(content)


def check_vocabulary(tokenizer: TextProcessor, inputs: Fields, *, paired: bool = False) -> None:
    """Raises UserError if the tokenizer can produce tokens or types that the model's tables do not have.

    Args:
      inputs: of the model.
      paired: rows are of two texts.
    """
    rows = inputs["tokens"].count
    if rows is not None and tokenizer.vocab_size > rows:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding table {rows}: "
            "wrong tokenizer for these weights; set data.tokenizer"
        )
    check_types(tokenizer, inputs, paired=paired)


def check_types(tokenizer: TextProcessor, inputs: Fields, *, paired: bool) -> None:
    """Raises UserError if rows of one text (or of two, ``paired``) have token types that the model's table does not have."""
    rows, types = inputs["types"].count if "types" in inputs else None, tokenizer.count_types(paired=paired)
    if rows is not None and types > rows:
        texts = "two texts" if paired else "one text"
        raise UserError(
            f"{tokenizer.folder}: rows of {texts} have token types up to {types - 1}, the model's table of types has "
            f"type_vocab_size={rows} rows: this model does not tell texts apart"
        )
