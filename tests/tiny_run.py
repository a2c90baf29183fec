"""A run small enough for tests: a word-level tokenizer, rows with something to learn, and the overrides that use them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from jaxft.config import RunConfig, load_config

CLASSES = ("animal", "food", "tool")
_OF_CLASS = {name: [f"{name}{i}" for i in range(6)] for name in CLASSES}
_COMMON = [f"word{i}" for i in range(20)]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_COMMON, *(w for words in _OF_CLASS.values() for w in words)]

ARCH = (
    "model.arch={vocab_size: 48, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: 32, max_position_embeddings: 32, initializer_range: 0.2}"
)


def write_tokenizer(folder: Path) -> Path:
    """A WordPiece tokenizer.json as BERT's, over a few words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: i for i, word in enumerate(WORDS)}
    fast: Any = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    return folder


def write_rows(path: Path, rows: int, seed: int) -> Path:
    """A CSV of ``text,label``: 1 to 10 words, half of which tell the class."""
    rng = random.Random(seed)
    lines = ["text,label"]
    for _ in range(rows):
        label = rng.choice(CLASSES)
        words = [rng.choice(_OF_CLASS[label] if rng.random() < 0.5 else _COMMON) for _ in range(rng.randint(1, 10))]
        lines.append(f"{' '.join(words)},{label}")
    path.write_text("\n".join(lines) + "\n")
    return path


def overrides(folder: Path, *more: str) -> list[str]:
    """``key=value`` arguments of a run on files that are made in ``folder``: 13 steps per epoch, the last of 2 rows."""
    write_tokenizer(folder / "tokenizer")
    write_rows(folder / "train.csv", 98, seed=1)
    write_rows(folder / "eval.csv", 21, seed=2)
    return [
        "model.family=bert",
        ARCH,
        "model.layers=scanned",
        f"data.train={folder / 'train.csv'}",
        f"data.eval={folder / 'eval.csv'}",
        f"data.tokenizer={folder / 'tokenizer'}",
        "data.max_length=12",
        "data.buckets=[12]",
        "train.batch_size=8",
        "train.steps=30",
        "train.log_every=3",
        "train.compilation_cache=null",
        "eval.batch_size=8",
        "eval.every=5",
        "optim.learning_rate=1e-2",
        "optim.ema=0.9",
        "log.progress=off",
        *more,
    ]


def config_of(folder: Path, *more: str) -> RunConfig:
    return load_config(None, overrides(folder, *more))
