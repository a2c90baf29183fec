"""Tokenizer folders as their libraries first save them: BERT, RoBERTa, GPT-2, Llama, XLM-R and whole words, all tiny."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

_WORDS = "the a cat dog bird house tree red blue big small runs sleeps and to in on over mat sat café film straße naive token"


def _corpus() -> list[str]:
    rng = random.Random(0)
    words = _WORDS.split()
    return [" ".join(rng.choice(words) for _ in range(8)).capitalize() for _ in range(300)]


# ------------------------------------------------------------------------------------------- the folders, as saved first


@functools.cache
def _word_piece(cased: bool) -> tuple[str, tuple[str, ...]]:
    """tokenizer.json and vocabulary of BERT's kind."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(97, 123)] + [str(d) for d in range(10)]
    more = ["The", "CAT", "Token", "TOKEN", "İ", "é", "##é", "电", "影", "很", "好", "电影", "Straße", "strasse"]
    words = [*special, *_WORDS.split(), *letters, *(f"##{x}" for x in letters), *".,!?'-<>[]|;/", *more]
    vocabulary = list(dict.fromkeys(words))
    ids = {word: i for i, word in enumerate(vocabulary)}
    fast: Any = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=not cased)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.add_special_tokens(special)
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return fast.to_str(), tuple(vocabulary)


@functools.cache
def _byte_level(special: tuple[str, ...]) -> str:
    """tokenizer.json of GPT-2's kind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast: Any = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(_corpus(), trainer)
    return fast.to_str()


@functools.cache
def _metaspace(legacy: bool) -> str:
    """tokenizer.json of Llama 2's kind."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    fast: Any = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    fast.train_from_iterator(_corpus(), trainer)
    tree = json.loads(fast.to_str())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["id"] < 3]
    fast = Tokenizer.from_str(json.dumps(tree))
    if not legacy:
        fast.normalizer = None
        fast.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    return fast.to_str()


@functools.cache
def _unigram() -> str:
    """tokenizer.json of XLM-R's kind."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    fast: Any = Tokenizer(models.Unigram())
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    fast.train_from_iterator(_corpus(), trainer)
    fast.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return fast.to_str()


@functools.cache
def _word_level() -> str:
    """tokenizer.json of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *_WORDS.split(), *".,!?"])}
    fast: Any = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return fast.to_str()


def write(folder: Path, name: str, tree: Any) -> None:
    text = tree if isinstance(tree, str) else json.dumps(tree, ensure_ascii=False, indent=2)
    (folder / name).write_text(text, encoding="utf-8")


BRACKETS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
ANGLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_ROBERTA = {**ANGLES, "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>"}


def bert(folder: Path, cased: bool = False, kind: str = "BertTokenizer") -> None:
    tree, vocabulary = _word_piece(cased)
    write(folder, "tokenizer.json", tree)
    write(folder, "vocab.txt", "\n".join(vocabulary) + "\n")
    settings = {"tokenizer_class": kind, "do_lower_case": not cased, "model_max_length": 512, **BRACKETS}
    write(folder, "tokenizer_config.json", settings)
    write(folder, "config.json", {"model_type": "bert", "architectures": ["BertModel"]})


def _of_bytes(folder: Path, kind: str, special: tuple[str, ...], settings: dict[str, Any], model_type: str) -> None:
    tree = json.loads(_byte_level(special))
    write(folder, "tokenizer.json", tree)
    write(folder, "vocab.json", tree["model"]["vocab"])
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"]["merges"])
    write(folder, "merges.txt", "#version: 0.2\n" + "\n".join(merges) + "\n")
    write(folder, "tokenizer_config.json", {"tokenizer_class": kind, **settings})
    write(folder, "config.json", {"model_type": model_type})


def roberta(folder: Path) -> None:
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    _of_bytes(folder, "RobertaTokenizer", special, {**_ROBERTA, "add_prefix_space": False}, "roberta")


def gpt2(folder: Path) -> None:
    end = "<|endoftext|>"
    _of_bytes(folder, "GPT2Tokenizer", (end,), {f"{name}_token": end for name in ("bos", "eos", "unk")}, "gpt2")


def llama3(folder: Path) -> None:
    special = ("<|begin_of_text|>", "<|end_of_text|>")
    named = {"bos_token": special[0], "eos_token": special[1]}
    _of_bytes(folder, "PreTrainedTokenizerFast", special, named, "llama")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def llama(folder: Path, legacy: bool = True) -> None:
    write(folder, "tokenizer.json", _metaspace(legacy))
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": legacy, **ANGLES}
    write(folder, "tokenizer_config.json", settings)
    write(folder, "config.json", {"model_type": "llama"})


def xlmr(folder: Path) -> None:
    write(folder, "tokenizer.json", _unigram())
    write(folder, "tokenizer_config.json", {"tokenizer_class": "XLMRobertaTokenizer", **_ROBERTA})
    write(folder, "config.json", {"model_type": "bert"})


def words(folder: Path) -> None:
    write(folder, "tokenizer.json", _word_level())
    write(folder, "tokenizer_config.json", {"tokenizer_class": "TokenizersBackend", **ANGLES})
    write(folder, "config.json", {"model_type": "llama"})
