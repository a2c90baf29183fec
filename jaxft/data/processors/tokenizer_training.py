"""Tokenizers learnt of texts with the `tokenizers` library, written as a folder that `transformers` and jaxft read alike."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from jaxft.data.processors.panics import Panic, told_as_errors
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.files import folder_written_whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Fast
    from tokenizers.trainers import Trainer

Algorithm = Literal["wordpiece", "bpe", "unigram"]
Use = Literal["encoder", "decoder", "encoder-decoder"]
MOST_SIZE = 1 << 22
"""Tokens of a vocabulary."""
_MOST_LETTERS = 1000
_BATCH = 1000  # texts that the library is given together
_NAMES: Mapping[Use, Mapping[str, str]] = {
    "encoder": {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    "decoder": {"pad_token": "<|pad|>", "unk_token": "<|unk|>", "eos_token": "<|endoftext|>"},
    # In T5's order: targets begin with the token of padding, whose number is 0.
    "encoder-decoder": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}


class Wanted(NamedTuple):
    """What is to be learnt."""

    algorithm: Algorithm
    size: int
    """Tokens of the vocabulary, special ones among them."""
    use: Use = "encoder"
    """``encoder``: texts stand between [CLS] and [SEP], and there is a [MASK]. ``decoder``: texts end with <|endoftext|>.
    ``encoder-decoder``: for encoder-decoders, as T5's; texts, and pairs as one, end with </s>."""
    lowercase: bool = False
    max_length: int = 512
    """Stated as ``model_max_length``."""
    begin: bool = False
    """Whether texts of a decoder begin with <|endoftext|> too, so that their first token is predicted like any other."""
    sentinels: int = 0
    """Tokens <extra_id_0>, <extra_id_1>, ... that stand for what is taken out of texts (the task ``span_corruption``)."""

    @property
    def special(self) -> dict[str, str]:
        """The special tokens by their names; bytes are never unknown."""
        begin = {"bos_token": _NAMES["decoder"]["eos_token"]} if self.begin and self.use == "decoder" else {}
        names = {**_NAMES[self.use], **begin}
        return {name: token for name, token in names.items() if self.algorithm != "bpe" or name != "unk_token"}

    @property
    def no_text(self) -> list[str]:
        """Tokens that are not text."""
        return [*dict.fromkeys(self.special.values()), *self.extra]

    @property
    def extra(self) -> list[str]:
        """Special tokens without a name."""
        return [f"<extra_id_{number}>" for number in range(self.sentinels)]


def train_tokenizer(texts: Callable[[], Iterable[str]], wanted: Wanted, out: Path) -> Tokenizer:
    """Learns a vocabulary of texts and writes the tokenizer to ``out``. WordPiece and BPE come out the same, byte for byte; of Unigram, the
    library adds probabilities in any order, which shows in the fourth digit of its scores.

    Args:
      texts: gives them; WordPiece reads them twice.
      wanted: what is to be learnt.
      out: a folder that is not there.

    Raises:
      UserError: there is nothing to learn of, the size is too small for the letters of the texts, or ``out`` holds something.
    """
    try:
        with told_as_errors():
            fast, trainer = _untrained(wanted, texts)
            fast.train_from_iterator(_batches(texts()), trainer)
    except UserError:
        raise
    except (Panic, ValueError, RuntimeError) as error:
        raise UserError(f"tokenizer train: {error}; give more text, or another --size") from error
    special, found = wanted.no_text, fast.get_vocab_size()
    if found <= len(special) + (256 if wanted.algorithm == "bpe" else 0):
        raise UserError("tokenizer train: the texts hold nothing to learn of; give more of them")
    if found > wanted.size:
        raise UserError(f"--size {wanted.size}: the letters of the texts alone take {found} tokens; give more")
    if wanted.algorithm == "wordpiece":
        fast = _without_marks(fast, wanted)
    _put_around(fast, wanted)
    with folder_written_whole(out) as folder:
        fast.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(_settings(wanted), indent=2) + "\n", encoding="utf-8")
        Tokenizer(folder)  # what cannot be read again is not left behind
    return Tokenizer(out)


def _settings(wanted: Wanted) -> dict[str, object]:
    inputs = ["input_ids", *(["token_type_ids"] if wanted.use == "encoder" else []), "attention_mask"]
    return {
        **dict(wanted.special),
        **({"additional_special_tokens": wanted.extra} if wanted.extra else {}),
        "model_max_length": wanted.max_length,
        "model_input_names": inputs,
        "clean_up_tokenization_spaces": False,
        # A class that takes tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _batches(texts: Iterable[str]) -> Iterator[Sequence[str]]:
    held: list[str] = []
    for text in texts:
        held.append(text)
        if len(held) == _BATCH:
            yield held
            held = []
    if held:
        yield held


def _untrained(wanted: Wanted, texts: Callable[[], Iterable[str]]) -> tuple[Fast, Trainer]:
    from tokenizers import Tokenizer as Made
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    special, size = wanted.no_text, wanted.size
    unknown = wanted.special.get("unk_token")
    if wanted.algorithm == "wordpiece":
        assert unknown is not None
        made = Made(models.WordPiece(unk_token=unknown))
        made.normalizer = normalizers.BertNormalizer(lowercase=wanted.lowercase)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        letters = _letters(made.normalizer.normalize_str, texts())
        # Left to itself, the library numbers letters inside words in the order of a hash table, another one each time.
        named = [*special, *letters, *(f"##{letter}" for letter in letters)]
        return made, trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=named, limit_alphabet=0, show_progress=False
        )
    lower = [normalizers.Lowercase()] if wanted.lowercase else []
    if wanted.algorithm == "bpe":
        made = Made(models.BPE())
        made.normalizer = normalizers.Sequence([normalizers.NFC(), *lower])
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        return made, trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    assert unknown is not None
    made = Made(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), *lower])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return made, trainers.UnigramTrainer(
        vocab_size=size, special_tokens=special, unk_token=unknown, show_progress=False
    )


def _letters(normalize: Callable[[str], str], texts: Iterable[str]) -> list[str]:
    """The letters that occur most often, in the order of Unicode."""
    found = Counter[str]()
    for text in texts:
        found.update(normalize(text))
    often = sorted((letter for letter in found if not letter.isspace()), key=lambda letter: (-found[letter], letter))
    return sorted(often[:_MOST_LETTERS])


def _without_marks(fast: Fast, wanted: Wanted) -> Fast:
    """The same WordPiece tokenizer, whose letters are no special tokens."""
    from tokenizers import Tokenizer as Made
    from tokenizers import models

    made = Made(models.WordPiece(fast.get_vocab(), unk_token=wanted.special["unk_token"]))
    made.normalizer, made.pre_tokenizer, made.decoder = fast.normalizer, fast.pre_tokenizer, fast.decoder
    made.add_special_tokens(wanted.no_text)
    return made


def _put_around(fast: Fast, wanted: Wanted) -> None:
    """Makes encoders' texts begin with [CLS] and end with [SEP], those of encoder-decoders end with </s>; decoders' begin with
    <|endoftext|> if that is wanted."""
    from tokenizers import processors

    if wanted.use == "decoder":
        if begin := wanted.special.get("bos_token"):
            fast.post_processor = processors.TemplateProcessing(
                single=f"{begin} $A", pair=f"{begin} $A $B:1", special_tokens=[(begin, fast.token_to_id(begin))]
            )
        return
    if wanted.use == "encoder-decoder":
        end = wanted.special["eos_token"]
        ids = [(end, fast.token_to_id(end))]
        fast.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=ids
        )
        return
    first, last = (wanted.special[name] for name in ("cls_token", "sep_token"))
    ids = [(token, fast.token_to_id(token)) for token in (first, last)]
    single, pair = f"{first} $A {last}", f"{first} $A {last} $B:1 {last}:1"
    fast.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


class Tried(NamedTuple):
    """What a tokenizer makes of some texts."""

    texts: int
    bytes: int
    tokens: int
    """Without special ones."""
    unknown: int

    def said(self) -> str:
        """On one line."""
        share = f", {self.unknown / max(self.tokens, 1):.3%} unknown" if self.unknown else ", none unknown"
        return f"{self.bytes / max(self.tokens, 1):.2f} bytes of text a token on {self.texts:,} of the texts{share}"


def tried(tokenizer: Tokenizer, texts: Sequence[str]) -> Tried:
    """Tokenises some texts."""
    special, unknown, tokens, lost = set(tokenizer.special_ids), tokenizer.special.unknown, 0, 0
    for ids in tokenizer.ids(texts):
        tokens += sum(one not in special for one in ids)
        lost += 0 if unknown is None else ids.count(unknown)
    return Tried(len(texts), sum(len(text.encode()) for text in texts), tokens, lost)
