"""Malformed tokenizers: tokenizer.json, its settings, vocabularies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.malformed.case import MILLION, Case, Damage, bad_json, both, gone, keys, put, words

TOKENIZER, SETTINGS = "model/tokenizer.json", "model/tokenizer_config.json"
PREDICT = words("predict model --text zebra")
GENERIC = keys(SETTINGS, tokenizer_class="PreTrainedTokenizerFast")
"""Its tokenizer.json is then taken as it is."""
HARD = "(a+)+(b+)+(a*)*$"


def cases() -> Iterator[Case]:
    """The cases of this kind."""
    for title, damage in bad_json(TOKENIZER):
        yield Case("tokenizer", f"tokenizer.json: {title}", damage, PREDICT)
    for title, damage in bad_json(SETTINGS):
        yield Case("tokenizer", f"tokenizer_config.json: {title}", damage, PREDICT)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        for title, damage in bad_json(f"model/{name}"):
            made = both(put(f"model/{name}", ""), damage)
            yield Case("tokenizer", f"{name}: {title}", made, PREDICT, (0, 2))
    for title, change, codes in _trees():
        for kind, damage in {"as it is": both(GENERIC, _tree(change)), "of a class": _tree(change)}.items():
            yield Case("tokenizer", f"{title}, {kind}", damage, PREDICT, codes if kind == "as it is" else (0, 2))
    for title, damage, codes in _settings():
        yield Case("tokenizer", title, damage, PREDICT, codes)


def _tree(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Something else in tokenizer.json."""

    def damage(folder: Path) -> None:
        tree = json.loads((folder / TOKENIZER).read_text())
        change(tree)
        (folder / TOKENIZER).write_text(json.dumps(tree))

    return damage


def _hard(tree: dict[str, Any]) -> None:
    tree["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": HARD}, "behavior": "Removed", "invert": False}
    tree["normalizer"] = {"type": "Prepend", "prepend": "a" * 40 + "c"}


def _trees() -> Iterator[tuple[str, Callable[[dict[str, Any]], object], tuple[int, ...]]]:
    def part(name: str, value: object) -> Callable[[dict[str, Any]], object]:
        return lambda tree: tree.update({name: value})

    def model(name: str, value: object) -> Callable[[dict[str, Any]], object]:
        return lambda tree: tree["model"].update({name: value})

    def split(pattern: object) -> dict[str, object]:
        return {"type": "Split", "pattern": pattern, "behavior": "Removed", "invert": False}

    for value in (None, 5, [], {}, {"type": "Nope"}, {"type": MILLION}):
        yield f"model: {str(value)[:20]}", part("model", value), (2,)
    for value in (
        None,
        5,
        [],
        {},
        "x",
        {"a": "x"},
        {"a": -1},
        {"a": 2**40},
        {"a": 1.5},
        {"": 0},
        {MILLION: 0},
        {"[UNK]": 10**9},
        {"a": 0, "b": 0},
    ):
        yield f"vocab: {str(value)[:20]}", model("vocab", value), (2,)
    yield "no [UNK]", lambda tree: tree["model"]["vocab"].pop("[UNK]"), (2,)
    yield "no [CLS]", lambda tree: tree["model"]["vocab"].pop("[CLS]"), (0, 2)
    yield "no [PAD]", lambda tree: tree["model"]["vocab"].pop("[PAD]"), (0, 2)
    yield (
        "no added tokens, no [UNK]",
        lambda tree: (tree.update(added_tokens=[]), tree["model"]["vocab"].pop("[UNK]")),
        (2,),
    )
    yield "unk_token that is not there", model("unk_token", "<nope>"), (2,)
    yield "unk_token: a million characters", model("unk_token", MILLION), (2,)
    for value in (-1, "x", 10**30):
        yield f"max_input_chars_per_word: {value}", model("max_input_chars_per_word", value), (2,)
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for value in (5, [], {}, {"type": "Nope"}, {"type": "Sequence"}, {"type": MILLION}):
            yield f"{name}: {str(value)[:22]}", part(name, value), (2,)
    for pattern in ("(", "[", "(?P<x", "\\", "a{99999999}", "(" * 10_000, "*", "\\p{Nope}", "\ud800"):
        yield f"pattern {pattern[:12]!a}", part("pre_tokenizer", split({"Regex": pattern})), (2,)
        replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}
        yield f"replaced pattern {pattern[:12]!a}", part("normalizer", replace), (2,)
    for pattern in ("", "(?:)", "a*", "(?=a)", "$"):
        yield f"empty match {pattern!a}", part("pre_tokenizer", split({"Regex": pattern})), (0, 2)
        replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": "x"}
        yield f"empty match {pattern!a} replaced", part("normalizer", replace), (0, 2)
    yield "a pattern that is hard to match", _hard, (2,)
    yield "a long pattern", part("pre_tokenizer", split({"Regex": "|".join(str(i) for i in range(100_000))})), (0, 2)
    for value in ("!!!", 5, "AAAA", "A" * 1_000_000):
        yield (
            f"charsmap: {str(value)[:10]}",
            part("normalizer", {"type": "Precompiled", "precompiled_charsmap": value}),
            (0, 2),
        )
    growth = {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}] * 12,
    }
    yield "a normalizer that multiplies", part("normalizer", growth), (2,)
    yield "an added token that multiplies", part("normalizer", {"type": "Prepend", "prepend": MILLION}), (0, 2)
    for value in (5, {}, ["x"], [{"id": 0}], [{"id": -1, "content": "x"}], [{"id": 2**40, "content": "x"}]):
        yield f"added_tokens: {str(value)[:24]}", part("added_tokens", value), (2,)
    flags = {"special": True, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    yield "an added token with a far id", part("added_tokens", [{"id": 10**6, "content": "a", **flags}]), (0, 2)
    yield "an empty added token", part("added_tokens", [{"id": 36, "content": "", **flags}]), (0, 2)
    for name in ("truncation", "padding"):
        for value in (5, [], {}, {"max_length": -1}, {"strategy": {"Fixed": 10**12}}, MILLION):
            yield f"{name}: {str(value)[:20]}", part(name, value), (2,)
    longest = {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}
    yield "truncation: a stride beyond its length", part("truncation", longest), (0, 2)
    padding = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": 0,
        "pad_id": 10**9,
        "pad_type_id": 7,
        "pad_token": "x",
    }
    yield "padding: 10**9", part("padding", padding), (0, 2)
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[NOPE]", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    yield "a template of tokens that are not there", part("post_processor", template), (2,)
    far = {**template, "special_tokens": {"[NOPE]": {"id": "[NOPE]", "ids": [10**6], "tokens": ["[NOPE]"]}}}
    yield "a template of far ids", part("post_processor", far), (2,)
    types = {"type": "BertProcessing", "sep": ["[SEP]", 10**6], "cls": ["[CLS]", 2]}
    yield "a post-processor of far ids", part("post_processor", types), (2,)
    unigram = {"type": "Unigram", "unk_id": 99, "vocab": [["a", 0.0]]}
    yield "unigram: unk_id beyond", part("model", unigram), (2,)
    yield "unigram: empty", part("model", {"type": "Unigram", "unk_id": 0, "vocab": []}), (2,)
    yield (
        "unigram: infinite scores",
        part("model", {"type": "Unigram", "unk_id": 0, "vocab": [["a", 1e308], ["b", -1e308]]}),
        (0, 2),
    )
    bpe = {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a z"]}
    yield "BPE: a merge of what is not there", part("model", bpe), (2,)
    yield "BPE: merges that are none", part("model", {**bpe, "merges": ["a", "", 5]}), (2,)
    yield "BPE: dropout of 7", part("model", {**bpe, "merges": [], "dropout": 7}), (2,)
    yield (
        "word level without unknown",
        part("model", {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "<unk>"}),
        (2,),
    )
    yield "version 99", part("version", "99"), (2,)
    yield "version: a million characters", part("version", MILLION), (2,)


def _settings() -> Iterator[tuple[str, Damage, tuple[int, ...]]]:
    wrong: dict[str, tuple[object, ...]] = {
        "tokenizer_class": (5, [], {}, "Nope", MILLION, "os.path", "\x1b[31m"),
        "model_max_length": ("x", [], {}, -5, 0),
        "unk_token": (5, [], {}, MILLION, "", {"content": 5}),
        "cls_token": (5, [], {}, MILLION, "", {"content": None}),
        "pad_token": (5, [], {}, MILLION),
        "added_tokens_decoder": (
            5,
            [1],
            {"x": {}},
            {"0": 5},
            {"-1": {"content": "x"}},
            {"99999999999": {"content": "x"}},
        ),
        "additional_special_tokens": (5, {"x": 1}, [5], [MILLION]),
        "do_lower_case": (5, "x", []),
        "strip_accents": (5, "x"),
        "truncation_side": (5, "up", []),
        "padding_side": (5, "up"),
        "auto_map": (5, {"AutoTokenizer": ["evil.Tok", None]}),
        "chat_template": (5, MILLION, "{% for a in range(10**9) %}{% endfor %}"),
        "extra_special_tokens": (5, [MILLION], {"x": 5}),
        MILLION: (1,),
    }
    for key, values in wrong.items():
        for value in values:
            yield f"{key[:24]}: {str(value)[:24]!a}", keys(SETTINGS, **{key: value}), (0, 2)
    bare = gone(TOKENIZER)
    lines = {
        "empty": "",
        "not UTF-8": b"\xff\xfe\xff",
        "one line": MILLION,
        "NUL": b"\0" * 1000,
        "no [UNK]": "[PAD]\n[CLS]\n[SEP]\n[MASK]\na\n",
        "twice": "[PAD]\n[UNK]\n[CLS]\n[SEP]\na\na\n",
    }
    for title, text in lines.items():
        yield f"vocab.txt: {title}", both(bare, put("model/vocab.txt", text)), (0, 2)
    yield "vocab.txt: gone", both(bare, gone("model/vocab.txt")), (2,)
    roberta = both(bare, keys(SETTINGS, tokenizer_class="RobertaTokenizer"))
    good = {token: i for i, token in enumerate(("<s>", "<pad>", "</s>", "<unk>", "<mask>", "a", "b", "ab"))}
    pairs: dict[str, tuple[object, str]] = {
        "no merge": (good, "#version: 0.2\na\n"),
        "a merge of what is not there": (good, "#version: 0.2\na z\n"),
        "a vocabulary that is a list": (["a"], ""),
        "ids that are text": ({"a": "x"}, ""),
        "negative ids": ({**good, "a": -1}, ""),
        "no special tokens": ({"a": 0}, ""),
        "a long merge": (good, MILLION),
        "empty": ({}, ""),
    }
    for title, (vocabulary, merges) in pairs.items():
        files = both(roberta, put("model/vocab.json", json.dumps(vocabulary)), put("model/merges.txt", merges))
        yield f"byte-level BPE: {title}", files, (0, 2) if title == "no special tokens" else (2,)
    yield (
        "a class with code alone",
        both(
            bare,
            gone("model/vocab.txt"),
            keys(SETTINGS, auto_map={"AutoTokenizer": ["tok.Tok", None]}),
            put("model/tok.py", "open('canary', 'w')"),
        ),
        (2,),
    )
