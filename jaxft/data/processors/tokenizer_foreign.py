"""Tokenizers of classes that only `transformers` builds: importing it takes seconds, so the usual folder never gets here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from jaxft.data.processors.tokenizer_classes import GENERIC, Settings, is_byte_level
from jaxft.errors import UserError

if TYPE_CHECKING:  # seconds
    from transformers import PreTrainedTokenizerFast


def reference_tokenizer(
    folder: Path, name: str | None, settings: Settings, hf_config: Settings
) -> PreTrainedTokenizerFast:
    """A tokenizer object of `transformers` itself.

    AutoTokenizer is not called: it asks on standard input whether to run a folder's code. The class used here is one of the
    library's own, and local files are all that it reads.

    Args:
      name: the class's name without "Fast"; None: what config.json's ``model_type`` stands for.
      settings: tokenizer_config.json.

    Raises:
      UserError: the class has no fast tokenizer, or files or packages that it needs are missing.
    """
    from transformers.utils import logging

    kind = _class(folder, name, settings, hf_config)
    _check_files(folder, kind)
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(before)


def _class(folder: Path, name: str | None, settings: Settings, hf_config: Settings) -> type[PreTrainedTokenizerFast]:
    """The class, resolved as AutoTokenizer would."""
    from transformers.models.auto import tokenization_auto as auto
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    name = _name(folder, settings, hf_config, auto) if name is None else name
    kind = None if name in GENERIC else auto.tokenizer_class_from_name(name)
    if kind is None or kind.__name__ in GENERIC:
        return TokenizersBackend
    if not (isinstance(kind, type) and issubclass(kind, TokenizersBackend)):
        raise UserError(
            f"{folder}: {name} of transformers has no fast tokenizer, which is all that is read here; "
            "set data.tokenizer to a folder with tokenizer.json"
        )
    return kind


def _name(folder: Path, settings: Settings, hf_config: Settings, auto: ModuleType) -> str:
    """The class's name where transformers has its own opinion of a ``model_type``."""
    model_type = str(hf_config.get("model_type"))
    stated = str(settings.get("tokenizer_class") or hf_config.get("tokenizer_class") or "").removesuffix("Fast")
    registered = str(auto.TOKENIZER_MAPPING_NAMES.get(model_type) or "").removesuffix("Fast")
    if registered == "MistralCommonBackend":
        registered = GENERIC[0]
    elif stated == "LlamaTokenizer" and is_byte_level(folder):
        stated = GENERIC[0]
    if model_type in auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS or not stated:
        return registered or GENERIC[0]
    return stated


def _check_files(folder: Path, kind: type[PreTrainedTokenizerFast]) -> None:
    """Refuses a class without its vocabulary, which it would replace by a handful of tokens without a word."""
    if (folder / "tokenizer.json").is_file():
        return
    files = [name for key, name in kind.vocab_files_names.items() if key != "tokenizer_file"]
    missing = [name for name in files if not (folder / name).is_file()]
    if missing or not files:
        raise UserError(
            f"{folder}: no vocabulary: {kind.__name__} needs tokenizer.json, or {', '.join(files) or 'nothing else'}; "
            "set data.tokenizer"
        )
    if any(name.endswith(".model") for name in files) and find_spec("sentencepiece") is None:
        raise UserError(
            f"{folder}: {files[0]} is a SentencePiece model, and there is no tokenizer.json; try: pip install sentencepiece, "
            "or save the tokenizer once with transformers"
        )
