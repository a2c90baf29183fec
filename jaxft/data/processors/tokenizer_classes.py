"""Backends of the `tokenizers` library, built as the tokenizer classes of `transformers` 5 build theirs.

A class with a constructor of its own takes no more than vocabulary, merges and post-processor from tokenizer.json; all else
follows from its settings. Source: transformers 5, ``tokenization_utils_tokenizers.py: TokenizersBackend`` and
``models/*/tokenization_*.py``. Nothing here imports `transformers`, which takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jaxft.errors import UserError
from jaxft.files import MOST_VOCABULARY_BYTES, JsonObject, present, read_json_object, read_text

if TYPE_CHECKING:  # a compiled library, which those who have no text do without
    from tokenizers import Tokenizer

Merges = list[tuple[str, str]]
Settings = Mapping[str, Any]

# The tokens that transformers knows by name, in its order; others are added after them.
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Classes that take tokenizer.json as it is.
GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer", "PythonBackend")

_ALIASES = {
    "ElectraTokenizer": "BertTokenizer",
    "ConvBertTokenizer": "BertTokenizer",
    "MobileBertTokenizer": "BertTokenizer",
    "SqueezeBertTokenizer": "BertTokenizer",
    "LongformerTokenizer": "RobertaTokenizer",
    "BartTokenizer": "RobertaTokenizer",
}

# The class of a model_type whose files name none: part of transformers' own table.
_CLASS_OF_MODEL_TYPES = {
    "BertTokenizer": "bert distilbert electra convbert squeezebert layoutlm megatron-bert nomic_bert",
    "RobertaTokenizer": "roberta bart longformer roberta-prelayernorm data2vec-text",
    "GPT2Tokenizer": "gpt2 gpt_neo gptj opt",
    GENERIC[0]: "llama smollm3 eurobert",
}
_ALWAYS_GENERIC = "modernbert modernbert-decoder"
"""Model types whose tokenizer.json is taken as it is, whatever class their files name (mmBERT's name Gemma's)."""


@dataclass(frozen=True)
class Built:
    """A backend, and what its post-processor still needs."""

    fast: Tokenizer
    """A ``tokenizers.Tokenizer`` without added tokens (from a class) or with those of its file."""
    truncation_side: str | None = None
    pad_token: str | None = None
    """From the padding stored in tokenizer.json."""


@dataclass(frozen=True)
class Kind:
    """A tokenizer class."""

    name: str
    types: bool = False
    """Whether the model is fed token types."""
    defaults: Mapping[str, str | None] = field(default_factory=dict)
    files: tuple[str, ...] = ()
    """What it is built from where there is no tokenizer.json."""
    build: Callable[[dict[str, int], Merges, Settings], Tokenizer] | None = None
    """(vocabulary, merges, settings) -> backend; None: tokenizer.json as it is."""
    finish: Callable[[Tokenizer, Settings], None] | None = None
    """Sets the post-processor, once the named tokens have their ids."""


def class_of(folder: Path, settings: Settings, hf_config: Settings) -> str | None:
    """The name of the tokenizer class that a folder's tokenizer_config.json and config.json ask for, without "Fast".

    None: only transformers' own tables tell.
    """
    stated = settings.get("tokenizer_class") or hf_config.get("tokenizer_class")
    model_type = str(hf_config.get("model_type") or "")
    if model_type in _ALWAYS_GENERIC.split():
        return GENERIC[0]
    known = {kind: name for name, kinds in _CLASS_OF_MODEL_TYPES.items() for kind in kinds.split()}
    if model_type and model_type not in known:
        return None  # some model types overrule what the tokenizer's files say
    name = str(stated or known.get(model_type, GENERIC[0])).removesuffix("Fast")
    return GENERIC[0] if name == "LlamaTokenizer" and is_byte_level(folder) else _ALIASES.get(name, name)


def is_byte_level(folder: Path) -> bool:
    """Whether tokenizer.json is of Llama 3's kind, which says LlamaTokenizer and is none."""
    path = folder / "tokenizer.json"
    return present(path) and '"ByteLevel"' in read_text(path, MOST_VOCABULARY_BYTES)


def native(name: str | None) -> Kind | None:
    """The class of that name, if it can be built here."""
    return GENERIC_KIND if name in GENERIC else _KINDS.get(name or "")


def build(kind: Kind, folder: Path, settings: Settings) -> Built:
    """The backend of ``kind`` from the files in ``folder``, before added tokens and post-processor.

    Args:
      settings: the class's arguments, defaults included.

    Raises:
      UserError: the files that it needs are not there.
      Exception: of the tokenizers library, where files are malformed.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import models

    path = folder / "tokenizer.json"
    if kind.build is None:
        if not path.is_file():
            raise UserError(f"{folder}: no tokenizer.json, which a tokenizer of class {kind.name} needs")
        fast = Fast.from_file(str(path))
        return Built(fast, *_stored(fast))
    if path.is_file():
        tree = read_json_object(path, MOST_VOCABULARY_BYTES)
        model = tree.get("model") or {}
        vocabulary = _by_token(model.get("vocab"), path)
        fast = kind.build(vocabulary, _pairs(model.get("merges") or ()), settings)
        parts = _without_vocabulary(tree, path)
        fast.post_processor = parts.post_processor or fast.post_processor
        return Built(fast, *_stored(parts))
    missing = [name for name in kind.files if not (folder / name).is_file()]
    if missing or not kind.files:
        needed = f"tokenizer.json, or {' and '.join(kind.files)}" if kind.files else "tokenizer.json"
        raise UserError(f"{folder}: no vocabulary: a tokenizer of class {kind.name} needs {needed}; set data.tokenizer")
    paths = [str(folder / name) for name in kind.files]
    if len(paths) == 1:
        return Built(kind.build(models.WordPiece.read_file(paths[0]), [], settings))
    return Built(kind.build(*models.BPE.read_file(*paths), settings))


def _stored(fast: Tokenizer) -> tuple[str | None, str | None]:
    """Truncation side and padding token that tokenizer.json carries."""
    return (fast.truncation or {}).get("direction"), (fast.padding or {}).get("pad_token")


def _by_token(vocabulary: object, path: Path) -> dict[str, int]:
    """Ids by token: a Unigram vocabulary is a list of (token, score)."""
    if isinstance(vocabulary, list):
        return {token[0] if isinstance(token, list) else token: i for i, token in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise UserError(f"{path}: no vocabulary in it")
    return vocabulary


def _pairs(merges: Sequence[str | Sequence[str]]) -> Merges:
    return cast(Merges, [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges])


def _without_vocabulary(tree: JsonObject, path: Path) -> Tokenizer:
    """A backend with the post-processor, truncation and padding of a tokenizer.json, quickly."""
    from tokenizers import Tokenizer as Fast

    model = tree["model"]
    if model.get("type") in (None, "Unigram"):  # these do not load without their vocabulary
        return Fast.from_file(str(path))
    bare = {**model, "vocab": {}} | ({"merges": []} if model["type"] == "BPE" else {})
    return Fast.from_str(json.dumps({**tree, "model": bare, "added_tokens": []}))


# ---------------------------------------------------------------------------------------------------------- the classes


def _word_piece(vocabulary: dict[str, int], merges: Merges, settings: Settings) -> Tokenizer:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    fast = Fast(models.WordPiece(vocabulary, unk_token=str(settings["unk_token"])))
    fast.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece(prefix="##")
    return fast


def _with_types(fast: Tokenizer, settings: Settings) -> None:
    from tokenizers import processors

    start, end = str(settings["cls_token"]), str(settings["sep_token"])
    fast.post_processor = processors.TemplateProcessing(
        single=f"{start}:0 $A:0 {end}:0",
        pair=f"{start}:0 $A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(token, fast.token_to_id(token)) for token in (start, end)],
    )


def _byte_level(vocabulary: dict[str, int], merges: Merges, settings: Settings) -> Tokenizer:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    bpe = models.BPE(
        vocab=vocabulary,
        merges=merges,
        dropout=None,
        continuing_subword_prefix="",
        end_of_word_suffix="",
        fuse_unk=False,
    )
    fast = Fast(bpe)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    fast.decoder = decoders.ByteLevel()
    return fast


def _with_doubled_separator(fast: Tokenizer, settings: Settings) -> None:
    from tokenizers import processors

    names = (str(settings[name]) for name in ("sep_token", "cls_token"))
    end, start = ((name, cast(int, fast.token_to_id(name))) for name in names)
    trim, prefix = settings.get("trim_offsets", True), settings.get("add_prefix_space", False)
    fast.post_processor = processors.RobertaProcessing(end, start, trim, prefix)


def _metaspace(vocabulary: dict[str, int], merges: Merges, settings: Settings) -> Tokenizer:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers

    bpe = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True, dropout=None)
    fast = Fast(bpe)
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else prefix
    scheme = ("always" if settings.get("legacy", False) else "first") if prefix else "never"
    fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*parts, *([decoders.Strip(content=" ", left=1)] if prefix else [])])
    return fast


def _names(**tokens: str | None) -> dict[str, str | None]:
    return {f"{name}_token": token for name, token in tokens.items()}


_BRACKETS = _names(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]")
_ANGLES = _names(bos="<s>", eos="</s>", sep="</s>", cls="<s>", unk="<unk>", pad="<pad>", mask="<mask>")
_ONE_MARK = _names(unk="<|endoftext|>", bos="<|endoftext|>", eos="<|endoftext|>", pad=None)
_BYTE_FILES = ("vocab.json", "merges.txt")

GENERIC_KIND = Kind(GENERIC[0])
_KINDS = {
    kind.name: kind
    for kind in (
        Kind("BertTokenizer", True, _BRACKETS, ("vocab.txt",), _word_piece, _with_types),
        Kind("DistilBertTokenizer", False, _BRACKETS, ("vocab.txt",), _word_piece, _with_types),
        Kind("RobertaTokenizer", False, _ANGLES, _BYTE_FILES, _byte_level, _with_doubled_separator),
        Kind("GPT2Tokenizer", False, _ONE_MARK, _BYTE_FILES, _byte_level),
        # Without tokenizer.json it is made of a SentencePiece model, which transformers reads.
        Kind("LlamaTokenizer", False, _names(unk="<unk>", bos="<s>", eos="</s>"), (), _metaspace),
    )
}
