"""What sentence-transformers keeps beside a model's weights: how tokens become one vector, and what is put before texts.

Folders are written in the spelling that all its versions read. Nothing of it is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from jaxft.errors import UserError
from jaxft.files import read_json
from jaxft.tasks._vectors import POOLINGS

_MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last", "weightedmean": "weighted"}
"""Its names of poolings, and ours; in the older spelling, keys like ``pooling_mode_cls_token`` are true instead."""
_OLDER = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class Sentences:
    """How a model's texts become vectors."""

    pooling: str
    normalize: bool
    query_prompt: str = ""
    text_prompt: str = ""


def read_sentences(folder: Path) -> Sentences | None:
    """What a folder's files say; None: it is no folder of sentence-transformers.

    Raises:
      UserError: files that cannot be read, or modules that jaxft does not have.
    """
    path = folder / "modules.json"
    if not path.is_file():
        return None
    modules = _read(path)
    entries = [entry for entry in modules if isinstance(entry, dict)] if isinstance(modules, list) else []
    kinds = [str(entry.get("type", "")).rpartition(".")[2] for entry in entries]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown or kinds.count("Transformer") != 1 or kinds.count("Pooling") != 1:
        raise UserError(
            f"{path}: its modules are {', '.join(kinds) or 'none'}; jaxft has Transformer, Pooling and Normalize: without the others, "
            "vectors would be other ones"
        )
    inside = str(entries[kinds.index("Pooling")].get("path", ""))
    if Path(inside).name != inside:  # a name in the folder, never a way out of it
        raise UserError(f"{path}: the path {inside!r:.60} is no folder beside it")
    pooling = _pooling(folder / inside / "config.json")
    prompts = _prompts(folder / "config_sentence_transformers.json")
    text = next((prompts[name] for name in ("document", "passage", "corpus") if name in prompts), "")
    return Sentences(pooling, "Normalize" in kinds, prompts.get("query", ""), text)


def _read(path: Path) -> object:
    try:
        return read_json(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist, though modules.json names it") from error


def _pooling(path: Path) -> str:
    said = _read(path)
    said = cast(dict[str, object], said) if isinstance(said, dict) else {}
    # Files that say nothing mean the mean: sentence-transformers' own default.
    modes = said.get("pooling_mode") or [name for name, key in _OLDER.items() if said.get(key) is True] or ["mean"]
    named = [modes] if isinstance(modes, str) else modes
    if not isinstance(named, list) or len(named) != 1 or str(named[0]) not in _MODES:
        raise UserError(f"{path}: pools by {modes!s:.60}; jaxft pools by {', '.join(POOLINGS)}, one of them")
    if said.get("include_prompt") is False:
        raise UserError(f"{path}: include_prompt is false; jaxft pools over all tokens, those of a prompt too")
    return _MODES[str(named[0])]


def _prompts(path: Path) -> dict[str, str]:
    said = _read(path) if path.is_file() else {}
    prompts = said.get("prompts") if isinstance(said, dict) else None
    if prompts is None:
        return {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise UserError(f"{path}: prompts must map names to texts")
    return cast(dict[str, str], prompts)


def sentence_files(said: Sentences, width: int, max_length: int | None) -> dict[str, str]:
    """The files of a folder, by path: stock modules alone.

    Args:
      width: of vectors.
      max_length: tokens kept per text; None: not stated.
    """
    modules = ["Transformer", "Pooling", *(("Normalize",) if said.normalize else ())]
    theirs = next(name for name, ours in _MODES.items() if ours == said.pooling)
    prompts = {"query": said.query_prompt, "document": said.text_prompt}
    files: dict[str, object] = {
        "modules.json": [
            {
                "idx": i,
                "name": str(i),
                "path": f"{i}_{name}" if i else "",
                "type": f"sentence_transformers.models.{name}",
            }
            for i, name in enumerate(modules)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            **{key: name == theirs for name, key in _OLDER.items()},
            "include_prompt": True,
        },
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": prompts,
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    }
    if said.normalize:
        files["2_Normalize/config.json"] = {}
    return {path: json.dumps(tree, indent=2, ensure_ascii=False) + "\n" for path, tree in files.items()}
