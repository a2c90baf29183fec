"""Tokenizer files as they are written: copies where those mean the same, else one tokenizer.json that says all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft.data.processors.tokenizer_files import TOKENIZER_FILES, Files, read_files, read_json
from jaxft.errors import UserError
from jaxft.files import write_atomic

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast


def save_files(source: Path, files: Files, target: Path, max_length: int | None) -> None:
    """See :meth:`jaxft.data.processors.tokenizer.Tokenizer.save`."""
    copy_files(source, target, max_length)
    _adjust(target, files.stated)
    try:
        same = _meaning(read_files(target)) == _meaning(files)
    except UserError:
        same = False
    if same:
        return
    if files.target is not None:
        raise UserError(f"{source}: its tokenizer, copied to {target}, would be another one there; set data.tokenizer")
    for name in TOKENIZER_FILES:
        if not name.startswith("chat_template"):
            (target / name).unlink(missing_ok=True)
    write_atomic(target / "tokenizer.json", json.dumps(_tree(files.fast), ensure_ascii=False) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", *(["token_type_ids"] if files.types else []), "attention_mask"],
        "truncation_side": files.truncation_side,
        **({"split_special_tokens": True} if files.fast.encode_special_tokens else {}),
        **({} if files.stated_length is None else {"model_max_length": files.stated_length}),
        **{name: token for name, token in files.named.items() if name.endswith("_token")},
    }
    write_atomic(target / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    _adjust(target, _length_said(max_length))


def copy_files(source: Path, target: Path, max_length: int | None = None) -> None:
    """Copies tokenizer files unread, but for ``model_max_length``, and settings that name code."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    _adjust(target, _length_said(max_length))


def _length_said(length: int | None) -> dict[str, int]:
    return {} if length is None else {"model_max_length": length}


def _adjust(folder: Path, said: Mapping[str, object]) -> None:
    """Puts settings into tokenizer_config.json, and takes out where code for it would be."""
    path = folder / "tokenizer_config.json"
    before = read_json(path)
    settings = {name: value for name, value in before.items() if name != "auto_map"} | dict(said)
    if settings != before:
        write_atomic(path, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _meaning(files: Files) -> tuple[object, ...]:
    """What decides the ids."""
    trees = [None if fast is None else _tree(fast) for fast in (files.fast, files.target) if files.made_of is None]
    return trees, files.made_of, files.named, files.truncation_side, files.types, files.fast.encode_special_tokens


def _tree(fast: Fast) -> dict[str, object]:
    """A backend as tokenizer.json has it, without what is set for each use."""
    return json.loads(fast.to_str()) | {"truncation": None, "padding": None}
