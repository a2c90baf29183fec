"""What the tokenizer files of a folder amount to: the ids that AutoTokenizer of `transformers` 5 would give, or a refusal.

tokenizer.json alone does not decide: tokenizer_config.json, special_tokens_map.json, added_tokens.json and config.json name the
class, and with it normalizer, added tokens and truncation. Source: transformers 5, ``tokenization_utils_base.py:
_from_pretrained`` and ``models/auto/tokenization_auto.py``. Code that a folder names or holds is never run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jaxft.data.processors import tokenizer_marian
from jaxft.data.processors.contract import AS_FILES_SAY, Languages
from jaxft.data.processors.panics import first_line, told_as_errors
from jaxft.data.processors.tokenizer_checks import check_model, check_settings
from jaxft.data.processors.tokenizer_classes import NAMED, Kind, Settings, build, class_of, native
from jaxft.errors import UserError
from jaxft.files import MOST_VOCABULARY_BYTES, JsonObject, check_size, present, read_json_object

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Fast
    from transformers import PreTrainedTokenizerFast

    Token = str | AddedToken

# What a tokenizer may consist of; copied as they are on export.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "spm.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "tiktoken.model",
    "chat_template.jinja",
    "chat_template.json",
)
_VOCABULARIES = tuple(
    name
    for name in TOKENIZER_FILES
    if name.endswith((".model", "vocab.txt", "vocab.json", "tokenizer.json", "tekken.json"))
)
# Settings that would stand in for files, which no file written by transformers has.
_NOT_SETTINGS = (
    "vocab",
    "merges",
    "tokenizer_object",
    "post_processor",
    "gguf_file",
    "fast_tokenizer_files",
    "init_inputs",
)


@dataclass(frozen=True)
class Files:
    """A tokenizer as its files describe it."""

    fast: Fast
    """The ``tokenizers.Tokenizer``, without padding and truncation."""
    named: dict[str, str]
    """Content of named tokens: ``pad_token``, ``mask_token``, ..."""
    truncation_side: str
    types: bool
    """Whether the model is fed token types; where not, all are 0."""
    stated_length: int | None
    """``model_max_length``, if it is a number that means something."""
    denied: frozenset[str] = frozenset()
    """Names of tokens that the files say there is none of."""
    target: Fast | None = None
    """What texts that a model writes are tokenized with, where that is not ``fast``."""
    stated: Mapping[str, str] = field(default_factory=dict)
    """What tokenizer_config.json must say for the two sides to be told apart again: the class, and languages that texts are marked with."""
    made_of: str | None = None
    """A hash of the files that it is made of, where tokenizer.json could not hold it."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer's vocabulary."""
    return any(present(folder / name) for name in _VOCABULARIES)


def read_files(folder: Path, model_type: str | None = None, languages: Languages = AS_FILES_SAY) -> Files:
    """Reads the tokenizer in ``folder``.

    Args:
      model_type: of the model, for folders whose config.json does not say.
      languages: that texts are marked with, where not as the files say.

    Raises:
      UserError: there is none, it is malformed, it is made by code, or it does not know a language.
    """
    settings = read_json(folder / "tokenizer_config.json")
    hf_config = read_json(folder / "config.json")
    if model_type is not None and not hf_config.get("model_type"):
        hf_config |= {"model_type": model_type}
    _refuse_code(folder, settings)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        raise UserError(
            f"{folder}: no tokenizer files with a vocabulary (looked for {', '.join(_VOCABULARIES[:4])}, ...); set data.tokenizer"
        )
    for vocabulary in filter(present, (folder / name for name in _VOCABULARIES)):
        check_size(vocabulary, MOST_VOCABULARY_BYTES)
    try:
        with told_as_errors():
            files = _read(folder, settings, hf_config, languages)
            for fast in filter(None, (files.fast, files.target)):
                check_model(folder, fast)
                fast.encode("", "")  # a template's tokens are looked up here only
            return files
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(f"{folder}: not a tokenizer that can be read: {first_line(error)}") from error


def _read(folder: Path, settings: JsonObject, hf_config: JsonObject, languages: Languages) -> Files:
    name = class_of(folder, settings, hf_config)
    kind = native(name)
    if kind is None or settings.get("fix_mistral_regex") or _only_sentencepiece(folder):
        from jaxft.data.processors.tokenizer_foreign import class_name, reference_tokenizer

        if name is None:
            # The tables of transformers know of it only with the sentencepiece package.
            known = tokenizer_marian.is_found(folder)
            name = tokenizer_marian.CLASS if known else class_name(folder, settings, hf_config)
        if name != tokenizer_marian.CLASS:
            return _of_reference(folder, reference_tokenizer(folder, name), languages)
        kind = None
    if any(languages):
        raise UserError(
            f"{folder}: a tokenizer of class {name} does not mark texts with languages: name none, or give texts the marks "
            "themselves (task.prefix)"
        )
    return _two_sided(folder, settings) if kind is None else _built(folder, kind, settings)


def read_json(path: Path) -> JsonObject:
    """A JSON object; {} if there is no such file.

    Raises:
      UserError: not a JSON object.
    """
    return read_json_object(path) if present(path) else {}


def _refuse_code(folder: Path, settings: Settings) -> None:
    path = folder / "tokenizer_config.json"
    mapped = settings.get("auto_map")
    if mapped is not None and (not isinstance(mapped, dict) or mapped.get("AutoTokenizer") is not None):
        raise UserError(
            f"{path}: auto_map says that the tokenizer is code, which is never run; save one of a class of transformers, "
            "or remove auto_map if tokenizer.json is all that it needs"
        )
    odd = [name for name in _NOT_SETTINGS if settings.get(name)]
    if odd:
        raise UserError(f"{path}: {odd[0]!r} is not read from this file; remove it")


def _only_sentencepiece(folder: Path) -> bool:
    """Whether the vocabulary is a SentencePiece model, which transformers reads whatever the class."""
    return (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()


# ------------------------------------------------------------------------------------------- settings and added tokens


def _built(folder: Path, kind: Kind, stored: Settings) -> Files:
    """The tokenizer of a class that is known here."""
    has_json = (folder / "tokenizer.json").is_file()
    settings = _arguments(stored, has_json)
    added = _added_tokens(folder, settings, has_json)
    settings |= {name: token for name, token in kind.defaults.items() if name not in settings}
    check_settings(folder, kind, settings, _named(settings))
    built = build(kind, folder, settings)
    if built.pad_token is not None:
        settings.setdefault("pad_token", built.pad_token)
    named = _named(settings)
    explicit_ends = "add_bos_token" in settings or "add_eos_token" in settings
    template = explicit_ends or built.fast.post_processor is None
    built.fast.encode_special_tokens = bool(settings.get("split_special_tokens"))
    _add_tokens(built.fast, added, named, settings.get("extra_special_tokens") or ())
    if template:
        _set_ends(built.fast, named, settings)
    if kind.finish is not None:
        kind.finish(built.fast, {**settings, **named})
    side = settings.get("truncation_side", built.truncation_side or "right")
    types = "token_type_ids" in settings.get("model_input_names", ["token_type_ids"] if kind.types else [])
    contents = {name: str(token) for name, token in named.items()}
    length = _length(settings.get("model_max_length", settings.get("max_len")))
    denied = frozenset(name for name in NAMED if name in settings and settings[name] is None)
    return Files(_plain(built.fast), contents, side, types, length, denied)


def _arguments(stored: Settings, has_json: bool) -> JsonObject:
    """The class's arguments as tokenizer_config.json gives them."""
    settings = {name: value for name, value in stored.items() if name not in ("tokenizer_class", "auto_map")}
    if has_json:  # there its post-processor decides
        settings.pop("add_bos_token", None)
        settings.pop("add_eos_token", None)
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    own = {n: v for n, v in settings.items() if n not in NAMED and n.endswith("_token") and isinstance(v, str)}
    for name in own:
        del settings[name]
    if isinstance(settings.get("extra_special_tokens"), dict):
        own |= settings.pop("extra_special_tokens")
    if own:
        settings["model_specific_special_tokens"] = own
    return settings


def _added_tokens(folder: Path, settings: JsonObject, has_json: bool) -> dict[int, AddedToken]:
    """Added tokens by the ids that the files state (their order is what counts); changes ``settings`` as these files do."""
    from tokenizers import AddedToken

    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in settings:
        for number, token in settings.pop("added_tokens_decoder").items():
            added[int(number)] = AddedToken(**token)
    else:
        _merge_special_tokens_map(folder, settings)
        special = {str(settings[name]) for name in NAMED if settings.get(name)}
        special |= {str(token) for token in settings.get("extra_special_tokens") or ()}
        for content, number in read_json(folder / "added_tokens.json").items():
            one = content in special
            added[number] = AddedToken(content, rstrip=False, lstrip=False, normalized=not one, special=one)
        if has_json:
            for token in read_json_object(folder / "tokenizer.json", MOST_VOCABULARY_BYTES).get("added_tokens", ()):
                added[token["id"]] = AddedToken(**{name: value for name, value in token.items() if name != "id"})
    for name, value in settings.items():
        settings[name] = _tokens_of(value)
    if "additional_special_tokens" in settings and "extra_special_tokens" not in settings:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    by_content = {str(token): token for token in added.values()}
    for name in NAMED:
        if settings.get(name) is not None:
            settings[name] = by_content.get(str(settings[name]), settings[name])
    return added


def _merge_special_tokens_map(folder: Path, settings: JsonObject) -> None:
    from tokenizers import AddedToken

    for name, value in read_json(folder / "special_tokens_map.json").items():
        if isinstance(value, dict) and name != "extra_special_tokens":
            value = AddedToken(**{key: entry for key, entry in value.items() if key != "special"}, special=True)
        elif name == "extra_special_tokens" and isinstance(value, list):
            tokens = [AddedToken(**token, special=True) if isinstance(token, dict) else token for token in value]
            before = list(settings.get(name) or ())
            value = before + [token for token in tokens if token not in before]
        settings[name] = value
    if isinstance(settings.get("extra_special_tokens"), dict):
        settings.setdefault("model_specific_special_tokens", {}).update(settings.pop("extra_special_tokens"))


def _tokens_of(value: object) -> object:
    """A setting with the tokens in it as such: JSON spells them as objects marked ``"__type": "AddedToken"``."""
    from tokenizers import AddedToken

    if isinstance(value, dict) and value.get("__type") == "AddedToken":
        return AddedToken(**{name: entry for name, entry in value.items() if name != "__type"})
    if isinstance(value, dict):
        return {name: _tokens_of(entry) for name, entry in value.items()}
    return [_tokens_of(entry) for entry in value] if isinstance(value, list) else value


def _named(settings: Settings) -> dict[str, Token]:
    """Tokens by name, those that a model defines for itself last."""
    from tokenizers import AddedToken

    standard = {name: settings.get(name) for name in NAMED}
    own = {n: v for n, v in settings.items() if n.endswith("_token") and n not in NAMED}
    others = {name: token for name, token in own.items() if isinstance(token, str | AddedToken)}
    named = {**standard, **others, **(settings.get("model_specific_special_tokens") or {})}
    return {name: token for name, token in named.items() if token is not None}


def _add_tokens(fast: Fast, added: dict[int, AddedToken], named: dict[str, Token], extra: Sequence[Token]) -> None:
    """Adds what is not there yet: first what the files list, by id, then named and other special tokens."""
    from tokenizers import AddedToken

    tokens: list[Token] = [token for _, token in sorted(added.items(), key=lambda item: item[0])]
    there = {token.content for token in fast.get_added_tokens_decoder().values()} | {str(token) for token in tokens}
    for token in (*named.values(), *extra):
        if str(token) not in there and token not in tokens:
            tokens.append(token)
    special = {str(token) for token in named.values()}
    made = []
    for token in tokens:
        if isinstance(token, str):
            token = AddedToken(token, special=True)
        elif not token.special and str(token) in special:
            token.special = True
        made.append(token)
    if made:
        fast.add_tokens(made)


def _set_ends(fast: Fast, named: dict[str, Token], settings: Settings) -> None:
    """Sets the post-processor that puts start and end tokens where ``add_bos_token`` and ``add_eos_token`` ask for them."""
    from tokenizers import processors

    ends = {
        name: str(named[name]) for name in ("bos_token", "eos_token") if settings.get(f"add_{name}") and name in named
    }
    start, end = ends.get("bos_token"), ends.get("eos_token")

    def text(letter: str, kind: int) -> str:
        parts = [f"{start}:{kind}" if start else "", f"${letter}:{kind}", f"{end}:{kind}" if end else ""]
        return " ".join(filter(None, parts))

    fast.post_processor = processors.TemplateProcessing(
        single=text("A", 0),
        pair=f"{text('A', 0)} {text('B', 1)}",
        special_tokens=[(token, fast.token_to_id(token)) for token in dict.fromkeys(ends.values())],
    )


# --------------------------------------------------------------------------------------------------------------- ends


def _of_reference(folder: Path, reference: PreTrainedTokenizerFast, languages: Languages) -> Files:
    """What a tokenizer of transformers amounts to."""
    from jaxft.data.processors.tokenizer_foreign import marked

    named = {name: str(token) for name, token in reference._special_tokens_map.items() if token is not None}
    types = "token_type_ids" in reference.model_input_names
    length = _length(reference.model_max_length)
    target, stated = marked(folder, reference, languages)
    fast = _plain(reference.backend_tokenizer)
    return Files(fast, named, reference.truncation_side, types, length, target=target, stated=stated)


def _two_sided(folder: Path, stored: Settings) -> Files:
    """Marian's tokenizer."""
    settings = _arguments(stored, has_json=False)
    added = _added_tokens(folder, settings, has_json=False)
    settings = {**tokenizer_marian.DEFAULTS, **settings}
    sides, named = tokenizer_marian.read(folder, settings), _named(settings)
    for fast in (sides.source, sides.target):
        fast.encode_special_tokens = bool(settings.get("split_special_tokens"))
        _add_tokens(fast, added, named, settings.get("extra_special_tokens") or ())
        _plain(fast)
    contents = {name: str(token) for name, token in named.items()}
    side = settings.get("truncation_side", "right")
    length = _length(settings.get("model_max_length", 512))
    stated = {"tokenizer_class": tokenizer_marian.CLASS}
    return Files(sides.source, contents, side, False, length, target=sides.target, stated=stated, made_of=sides.made_of)


def _plain(fast: Fast) -> Fast:
    # Settings of whoever saved the file (sentence-transformers stores its own) must not act unseen.
    fast.no_padding()
    fast.no_truncation()
    return fast


def _length(stated: object) -> int | None:
    # The reference writes 1e30 for "unknown".
    return int(stated) if isinstance(stated, int | float) and 2 < stated < 1_000_000 else None
