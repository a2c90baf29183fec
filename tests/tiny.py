"""Tiny models, tokenizers and data for the tests of the command line; made without torch, in milliseconds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from jaxft import __main__
from jaxft.hub.pretrained import export_folder
from jaxft.hub.sums import NAME as SUMS
from jaxft.layers import Compute
from jaxft.models.families import bert
from jaxft.models.initial import shapes_and_axes

_TEXT = """
[PAD] [UNK] [CLS] [SEP] [MASK] red green blue yellow cat dog bird fish tree house road the a small big runs sleeps
sings is not very and or in on under over old new fast slow
"""
WORDS = [str(word) for word in _TEXT.split()]
LABELS = ("animal", "thing")


def write_tokenizer(folder: Path, extra: tuple[str, ...] = ()) -> None:
    """A BERT WordPiece tokenizer of whole words."""
    words = [*WORDS, *extra]
    ids = {word: i for i, word in enumerate(words)}
    fast = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    special = {
        name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 32, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")


def write_decoder_tokenizer(folder: Path) -> Path:
    """Word level, with an end token, and nothing added by the tokenizer itself."""
    write_tokenizer(folder, ("</s>",))
    tree = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    generic = {"tokenizer_class": "PreTrainedTokenizerFast"}  # BertTokenizer would put its own marks around
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "</s>", **generic}))
    return folder


def make_folder(
    folder: Path,
    head: str | None = None,
    labels: tuple[str, ...] | None = None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    source_config: dict[str, Any] | None = None,
    **arch: Any,
) -> Path:
    """A tiny random BERT in Hugging Face layout, with its tokenizer."""
    sizes: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,  # probabilities far from uniform
        "num_labels": len(labels or LABELS),
    }
    model = bert.Model(bert.Config(**(sizes | arch)), head, Compute(param_dtype=dtype))
    scratch = folder.with_name(f"{folder.name}.tokenizer")
    write_tokenizer(scratch)
    rng = np.random.default_rng(seed)  # instead of jax's own initialisation, which would have to be compiled
    spread = model.config.initializer_range
    params = jax.tree.map(
        lambda leaf: (rng.standard_normal(leaf.shape) * spread + leaf.ndim % 2 * 0.1).astype(leaf.dtype),
        shapes_and_axes(model)[0],
    )
    export_folder(folder, source_config or {}, bert, model, params, tokenizer_folder=scratch, labels=labels)
    (folder / SUMS).unlink()  # many a test changes what it was made of
    return folder


def rows(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Sentences of varied length, labelled by what a rule can tell."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(count):
        noun = str(rng.choice(["cat", "dog", "bird", "fish"] if i % 2 else ["tree", "house", "road"]))
        words = [str(word) for word in rng.choice(WORDS[15:], int(rng.integers(1, 20)))]
        made.append((" ".join(["the", noun, *words]), LABELS[(i + 1) % 2]))
    return made


def write_csv(path: Path, table: Sequence[tuple[str, ...]], header: tuple[str, ...] = ("text", "label")) -> Path:
    """Rows without commas or quotes, as CSV (or TSV, by the name)."""
    mark = "\t" if path.suffix == ".tsv" else ","
    path.write_text("".join(mark.join(row) + "\n" for row in [header, *table]), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command, in this process."""
    capsys.readouterr()
    code = __main__.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """The message of a command that must fail with an exit code and one line on stderr."""
    ended, _, err = run(capsys, *arguments)
    assert ended == code, err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith(f"jaxft {arguments[0]}: error: "), err
    return lines[0].split(": error: ", 1)[1]
