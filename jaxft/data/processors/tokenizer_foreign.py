"""Tokenizers of classes that only `transformers` builds: importing it takes seconds, so the usual folder never gets here."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft.data.processors.contract import Languages
from jaxft.data.processors.tokenizer_classes import GENERIC, Settings, is_byte_level
from jaxft.errors import UserError, nearest

if TYPE_CHECKING:  # seconds
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast


def reference_tokenizer(folder: Path, name: str) -> PreTrainedTokenizerFast:
    """A tokenizer object of `transformers` itself.

    AutoTokenizer is not called: it asks on standard input whether to run a folder's code. The class used here is one of the
    library's own, and local files are all that it reads.

    Args:
      name: the class's name without "Fast".

    Raises:
      UserError: the class has no fast tokenizer, or files or packages that it needs are missing.
    """
    from transformers.utils import logging

    kind = _class(folder, name)
    _check_files(folder, kind)
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    finally:
        logging.set_verbosity(before)


def _class(folder: Path, name: str) -> type[PreTrainedTokenizerFast]:
    """The class, resolved as AutoTokenizer would."""
    from transformers.models.auto import tokenization_auto as auto
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    kind = None if name in GENERIC else auto.tokenizer_class_from_name(name)
    if kind is None or kind.__name__ in GENERIC:
        return TokenizersBackend
    if not (isinstance(kind, type) and issubclass(kind, TokenizersBackend)):
        raise UserError(
            f"{folder}: {name} of transformers has no fast tokenizer, which is all that is read here; "
            "set data.tokenizer to a folder with tokenizer.json"
        )
    return kind


def class_name(folder: Path, settings: Settings, hf_config: Settings) -> str:
    """The class's name, without "Fast", where transformers has its own opinion of a ``model_type``.

    Args:
      settings: tokenizer_config.json.
      hf_config: config.json.
    """
    from transformers.models.auto import tokenization_auto as auto

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


def marked(
    folder: Path, reference: PreTrainedTokenizerFast, languages: Languages
) -> tuple[Fast | None, Mapping[str, str]]:
    """What texts that a model writes are tokenized with, if ``reference`` marks texts with their languages; and what tokenizer_config.json
    has to say for that. ``reference`` marks those of the source's language from then on.

    Raises:
      UserError: it does not know a language, or marks none.
    """
    from tokenizers import Tokenizer as Fast

    if not hasattr(reference, "src_lang"):
        if any(languages):
            raise UserError(
                f"{folder}: its tokenizer does not mark texts with languages: name none (task.source_language, task.target_language)"
            )
        return None, {}
    named = {str(token) for token in reference._special_tokens_map.values()}
    known = [token for token in reference.all_special_tokens if token not in named]
    for name, said in languages._asdict().items():
        if said is not None and said not in known:
            raise UserError(f"{name} language {said!r} is none of the tokenizer in {folder}; {nearest(said, known)}")
    source, target = languages.source or reference.src_lang, languages.target or reference.tgt_lang
    stated = {"tokenizer_class": type(reference).__name__, "src_lang": source}
    made = None
    if target is not None:
        made = Fast.from_str(reference.backend_tokenizer.to_str())
        reference.set_tgt_lang_special_tokens(target)
        made.post_processor = reference.backend_tokenizer.post_processor
        stated["tgt_lang"] = target
    reference.src_lang = source
    return made, stated
