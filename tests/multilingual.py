"""Tokenizers that mark texts with their languages, as `transformers` makes and writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

WORDS = ["▁red", "▁rot", "▁cat", "▁K", "atze", "e", "▁"]


def multilingual(kind: str, folder: Path) -> tuple[Path, str, str]:
    """A folder with a tokenizer that marks languages, and two of them."""
    transformers = pytest.importorskip("transformers")
    source, target = ("eng_Latn", "deu_Latn") if kind == "NllbTokenizer" else ("en_XX", "de_DE")
    named = ["<s>", "<pad>", "</s>", "<unk>", *WORDS]
    if kind == "NllbTokenizer":
        made: Any = transformers.NllbTokenizer(vocab={word: i for i, word in enumerate(named)}, merges=[])
        made.add_special_tokens({"additional_special_tokens": [source, target]})
    else:
        vocabulary = [(word, -float(i)) for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])]
        made = getattr(transformers, kind)(vocab=vocabulary)
    made.save_pretrained(str(folder))
    family = "m2m_100" if kind == "NllbTokenizer" else "mbart"
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder, source, target
