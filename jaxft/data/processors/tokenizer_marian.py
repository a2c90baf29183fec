"""Marian's tokenizers: two SentencePiece models, one for each side, and a vocabulary of its own that gives their pieces ids.

Source: transformers 5, ``models/marian/tokenization_marian.py``, whose ids these are. Pieces are found by the `tokenizers` library, with
what `transformers` makes of a SentencePiece model, so that the `sentencepiece` package is not needed; importing that takes seconds.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple, cast

from jaxft.data.processors.tokenizer_classes import Settings
from jaxft.errors import UserError
from jaxft.files import MOST_VOCABULARY_BYTES, check_size, read_bytes, read_json_object

if TYPE_CHECKING:
    from tokenizers import NormalizedString, PreTokenizedString
    from tokenizers import Tokenizer as Fast

CLASS = "MarianTokenizer"
FILES = ("source.spm", "target.spm", "vocab.json")
DEFAULTS = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
_UNIGRAM = 1


class Sides(NamedTuple):
    """A tokenizer for sources, one for targets, and a hash of the files that they are made of."""

    source: Fast
    target: Fast
    made_of: str


def is_found(folder: Path) -> bool:
    """Whether a folder has the files of such a tokenizer."""
    return all((folder / name).is_file() for name in FILES)


def read(folder: Path, settings: Settings) -> Sides:
    """The two backends of a folder, before its added tokens.

    Args:
      settings: tokenizer_config.json, with :data:`DEFAULTS`.

    Raises:
      UserError: a file is missing or malformed, or the two sides have vocabularies of their own.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: no {missing[0]}: a tokenizer of class {CLASS} needs {', '.join(FILES)}; copy it, or set data.tokenizer"
        )
    if settings.get("separate_vocabs"):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: separate_vocabs=true is not supported: both sides have one table of tokens here"
        )
    vocabulary = _vocabulary(folder / "vocab.json", settings)
    source, target = (_side(folder / name, vocabulary, settings) for name in FILES[:2])
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(hashlib.sha256(read_bytes(folder / name, MOST_VOCABULARY_BYTES)).digest())
    return Sides(source, target, digest.hexdigest())


def _vocabulary(path: Path, settings: Settings) -> dict[str, int]:
    found = read_json_object(path, MOST_VOCABULARY_BYTES)
    odd = next((token for token, number in found.items() if not isinstance(number, int) or number < 0), None)
    if odd is not None:
        raise UserError(f"{path}: {odd!r} has {found[odd]!r} for its id; expected a number of 0 or more")
    for name in DEFAULTS:
        if str(settings[name]) not in found:
            raise UserError(f"{path}: has no token {str(settings[name])!r}, the {name} of tokenizer_config.json")
    return found


def _side(path: Path, vocabulary: dict[str, int], settings: Settings) -> Fast:
    from tokenizers import Regex, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as Fast

    fast = Fast(models.WordLevel(vocabulary, unk_token=str(settings["unk_token"])))
    fast.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(_Pieces(_sentence_piece(path)))
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace(Regex(r"\A\s+|\s+\z"), "")]
    )
    end = str(settings["eos_token"])
    fast.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A $B {end}", special_tokens=[(end, vocabulary[end])]
    )
    return fast


def _sentence_piece(path: Path) -> Fast:
    """What finds the pieces of texts, by ids of its own.

    Raises:
      UserError: not a SentencePiece model, or one of another kind than Unigram.
    """
    from google.protobuf.message import DecodeError
    from transformers.convert_slow_tokenizer import SpmConverter, import_protobuf

    check_size(path, MOST_VOCABULARY_BYTES)
    proto = cast(ModuleType, import_protobuf()).ModelProto()
    try:
        proto.ParseFromString(read_bytes(path, MOST_VOCABULARY_BYTES))
    except DecodeError as error:
        raise UserError(f"{path}: not a SentencePiece model: {error}") from error
    if not proto.pieces:
        raise UserError(f"{path}: a SentencePiece model without pieces; copy it again")
    if proto.trainer_spec.model_type != _UNIGRAM:
        raise UserError(f"{path}: a SentencePiece model of another kind than Unigram, which is not supported")
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    return cast("Fast", SpmConverter.build_tokenizer_from_spm_proto(proto, pieces))


class _Pieces:
    """Splits texts into the pieces of a SentencePiece model. What it has no piece for stays together, as there, and is looked up whole."""

    def __init__(self, fast: Fast) -> None:
        self._fast = fast

    def pre_tokenize(self, text: PreTokenizedString) -> None:
        """See ``tokenizers.pre_tokenizers.PreTokenizer.custom``."""
        text.split(self._split)

    def _split(self, number: int, text: NormalizedString) -> list[NormalizedString]:
        del number
        written, start = text.original, 0
        made: list[NormalizedString] = []
        if written.startswith(">>") and (close := written.find("<<")) != -1:  # which language to write
            start = close + 2
            made.append(cast("NormalizedString", text[:start]))
        found = self._fast.encode(written[start:], add_special_tokens=False)
        for token, (first, last) in zip(found.tokens, found.offsets, strict=True):
            made.append(_with_text(cast("NormalizedString", text[start + first : start + last]), token))
        return made


def _with_text(part: NormalizedString, token: str) -> NormalizedString:
    """A part of a text, written as a piece is; its place in the text stays that of its letters."""
    if len(token) > 1 and token == f"▁{part.original.lstrip()}":
        part.lstrip()
        part.prepend("▁")
    elif part.original != token:
        part.replace(part.original, token)
    return part
