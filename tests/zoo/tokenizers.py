"""Cases of tokenizers: classes and files as each library saved them x settings beside them, ids against AutoTokenizer.

What is compared: ids and token types of texts, pairs and truncated rows, ids of named tokens; then the same of the folder that
jaxft writes from it, read by transformers and by jaxft.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from zoo.case import Case
from zoo.tokenizer_folders import ANGLES, BRACKETS, bert, gpt2, llama, llama3, roberta, words, write, xlmr

TEXTS = (
    "The CAT sleeps, café Straße!",
    "the [MASK] cat [SEP] dog [PAD] x",
    "<s> the <mask> cat </s> <unk> <pad>",
    "电影很好 the cat",
    "naïve e\u0301 zero\u200bwidth nbsp\u00a0tab\tnul\x00end",
    "😀 👩‍👩‍👧 the cat",
    "שלום العربية the",
    "ﬁlm \uff46\uff55\uff4c\uff4c",
    "",
    "   ",
    "a" * 150 + " cat",
    "<ent> the cat<ent>dog  <ent>",
    "the new TOKEN Token token here",
    "don't can't 3.14 e-mail",
    "\ufeffthe cat",
    "x\r\ny\x85z\u2028w",
    "İstanbul ǅ ß",
    "  two  spaces  and the end ",
    "<|endoftext|>the cat<|endoftext|>",
    "the cat sat on the mat and the dog ran to the big red house over there",
)
SECOND = "the dog runs fast and far"

# --------------------------------------------------------------------------------------------------------------- edits

Edit = Callable[[Path], None]


def _changed(name: str, drop: tuple[str, ...] = (), **keys: Any) -> Edit:
    """Changes keys of a JSON file."""

    def edit(folder: Path) -> None:
        path = folder / name
        tree = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write(folder, name, {key: value for key, value in {**tree, **keys}.items() if key not in drop})

    return edit


_settings = functools.partial(_changed, "tokenizer_config.json")
_config = functools.partial(_changed, "config.json")
_json = functools.partial(_changed, "tokenizer.json")


def _without(*names: str) -> Edit:
    def edit(folder: Path) -> None:
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return edit


def _with(name: str, tree: Any) -> Edit:
    return lambda folder: write(folder, name, tree)


def _all(*edits: Edit) -> Edit:
    def edit(folder: Path) -> None:
        for one in edits:
            one(folder)

    return edit


def _as_is(folder: Path) -> None:
    """No change."""


def _windows_lines(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    path = folder / "vocab.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def _token(content: str, **flags: bool) -> dict[str, Any]:
    names = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return {"content": content, **{name: flags.get(name, False) for name in names}}


def _typed(content: str, **flags: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **_token(content, **flags)}


_NO_NAMES = tuple(BRACKETS)
_LEFT = {"direction": "Left", "max_length": 5, "strategy": "LongestFirst", "stride": 2}
_PADDED = {"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0}

# Settings that any class knows, under names of the table's kind.
_ANY: dict[str, tuple[str, Edit]] = {
    "as saved": ("as saved", _as_is),
    "truncation_side=left": ("truncation", _settings(truncation_side="left", model_max_length=9)),
    "padding_side=left": ("truncation", _settings(padding_side="left")),
    "json with truncation and padding": (
        "truncation",
        _json(truncation=_LEFT, padding={**_PADDED, "pad_token": "<ent>"}),
    ),
    "additional_special_tokens": ("added tokens", _settings(additional_special_tokens=["<ent>", "new"])),
    "extra_special_tokens": ("added tokens", _settings(extra_special_tokens=["<ent>"])),
    "extra_special_tokens by name": ("added tokens", _settings(extra_special_tokens={"ent_token": "<ent>"})),
    "a token of its own": ("added tokens", _settings(image_token="<ent>")),
    "added_tokens_decoder": ("added tokens", _settings(added_tokens_decoder={"9000": _token("<ent>", special=True)})),
    "added_tokens_decoder stripping": (
        "added tokens",
        _settings(
            added_tokens_decoder={
                "800": _token("<ent>", lstrip=True, rstrip=True),
                "900": _token("new", single_word=True),
            }
        ),
    ),
    "added_tokens.json": ("added tokens", _with("added_tokens.json", {"<ent>": 901, "token": 900})),
    "special_tokens_map.json": (
        "added tokens",
        _with(
            "special_tokens_map.json", {"additional_special_tokens": ["<ent>"], "eos_token": _token("new", lstrip=True)}
        ),
    ),
    "split_special_tokens": ("added tokens", _settings(split_special_tokens=True)),
    "no tokenizer_config.json": ("class", _without("tokenizer_config.json")),
    "no config.json": ("class", _without("config.json")),
    "generic class": ("class", _settings(tokenizer_class="PreTrainedTokenizerFast")),
    "unknown class": ("class", _settings(tokenizer_class="FooTokenizer")),
    "json without post-processor": ("post-processor", _json(post_processor=None)),
    "add_eos_token": ("post-processor", _settings(add_eos_token=True)),
}

_BERT: dict[str, tuple[str, Edit]] = {
    "do_lower_case=false": ("lower case", _settings(do_lower_case=False)),
    "strip_accents=false": ("lower case", _settings(strip_accents=False)),
    "cased, strip_accents=true": ("lower case", _settings(do_lower_case=False, strip_accents=True)),
    "tokenize_chinese_chars=false": ("lower case", _settings(tokenize_chinese_chars=False)),
    "generic class, do_lower_case=false": (
        "lower case",
        _settings(tokenizer_class="PreTrainedTokenizerFast", do_lower_case=False),
    ),
    "vocab.txt alone": ("files", _without("tokenizer.json", "tokenizer_config.json")),
    "vocab.txt, cased": ("files", _all(_without("tokenizer.json"), _settings(do_lower_case=False))),
    "vocab.txt with line ends of Windows": ("files", _windows_lines),
    "vocab.txt, added_tokens.json": (
        "files",
        _all(_without("tokenizer.json"), _with("added_tokens.json", {"<ent>": 140, "new": 141})),
    ),
    "special_tokens_map.json alone names": (
        "named tokens",
        _all(_settings(drop=_NO_NAMES), _with("special_tokens_map.json", BRACKETS)),
    ),
    "other mask token": ("named tokens", _settings(mask_token="[UNK]")),
    "other pad token": ("named tokens", _settings(pad_token="[SEP]")),
    "other separator": ("named tokens", _settings(sep_token="[MASK]")),
    "new mask token": ("named tokens", _settings(mask_token="<mask>")),
    "mask token that strips": ("named tokens", _settings(mask_token=_typed("[MASK]", lstrip=True))),
    "model_input_names without types": ("types", _settings(model_input_names=["input_ids", "attention_mask"])),
    "generic class with types": (
        "types",
        _settings(tokenizer_class="PreTrainedTokenizerFast", model_input_names=["input_ids", "token_type_ids"]),
    ),
    "DistilBertTokenizer": ("class", _settings(tokenizer_class="DistilBertTokenizer")),
    "ElectraTokenizerFast": ("class", _settings(tokenizer_class="ElectraTokenizerFast")),
    "RobertaTokenizer": ("class", _settings(tokenizer_class="RobertaTokenizer")),
    "class named by config.json": (
        "class",
        _all(_settings(drop=("tokenizer_class",)), _config(tokenizer_class="DistilBertTokenizer")),
    ),
    "model_type qwen2": ("class", _config(model_type="qwen2")),
    "model_type unknown": ("class", _config(model_type="foo")),
    "MPNetTokenizer": ("class", _settings(tokenizer_class="MPNetTokenizer", mask_token="<mask>")),
    "FunnelTokenizer": ("class", _settings(tokenizer_class="FunnelTokenizer")),
}

_PREFIX: dict[str, tuple[str, Edit]] = {
    "add_prefix_space=true": ("prefix space", _settings(add_prefix_space=True)),
    "add_prefix_space=false": ("prefix space", _settings(add_prefix_space=False)),
    "no tokenizer.json": ("files", _without("tokenizer.json")),
    "no tokenizer.json, add_bos_token": ("files", _all(_without("tokenizer.json"), _settings(add_bos_token=True))),
    "no tokenizer.json, added_tokens.json": (
        "files",
        _all(_without("tokenizer.json"), _with("added_tokens.json", {"<ent>": 900, "new": 901})),
    ),
}

_LLAMA: dict[str, tuple[str, Edit]] = {
    "add_prefix_space=false": ("prefix space", _settings(add_prefix_space=False)),
    "legacy=false": ("prefix space", _settings(legacy=False)),
    "legacy left out": ("prefix space", _settings(drop=("legacy",))),
    "LlamaTokenizerFast": ("class", _settings(tokenizer_class="LlamaTokenizerFast")),
    "eos_token as an object": ("named tokens", _settings(eos_token=_typed("</s>"))),
    "named by special_tokens_map.json": (
        "named tokens",
        _all(
            _settings(drop=tuple(ANGLES)),
            _with("special_tokens_map.json", {name: _token(token) for name, token in ANGLES.items()}),
        ),
    ),
    "CodeLlamaTokenizer": ("class", _settings(tokenizer_class="CodeLlamaTokenizer")),
}

_BASES: dict[str, tuple[Callable[[Path], None], dict[str, tuple[str, Edit]]]] = {
    "bert": (bert, {**_ANY, **_BERT}),
    "bert cased": (
        functools.partial(bert, cased=True),
        {n: _ANY[n] for n in itertools.islice(_ANY, 1)}
        | {
            name: {**_ANY, **_BERT}[name]
            for name in ("no tokenizer_config.json", "generic class", "do_lower_case=false")
        },
    ),
    "roberta": (roberta, {**_ANY, **_PREFIX}),
    "gpt2": (gpt2, {**_ANY, **_PREFIX}),
    "llama": (llama, {**_ANY, **_LLAMA}),
    "llama, not legacy": (
        functools.partial(llama, legacy=False),
        {name: {**_ANY, **_LLAMA}[name] for name in ("as saved", "generic class", "no tokenizer_config.json")},
    ),
    "llama 3": (
        llama3,
        {
            **{
                name: _ANY[name]
                for name in ("as saved", "truncation_side=left", "extra_special_tokens", "add_eos_token")
            },
            "LlamaTokenizer of bytes": ("class", _settings(tokenizer_class="LlamaTokenizer")),
        },
    ),
    "xlm-r": (
        xlmr,
        {
            name: _ANY[name]
            for name in ("as saved", "truncation_side=left", "additional_special_tokens", "generic class")
        },
    ),
    "words": (
        words,
        {name: _ANY[name] for name in ("as saved", "extra_special_tokens", "json without post-processor")},
    ),
}

# (base, what is wrong with it, words of the refusal)
_REFUSED: dict[str, tuple[Callable[[Path], None], Edit, str]] = {
    "bert without vocabulary": (bert, _without("tokenizer.json", "vocab.txt"), "no tokenizer files"),
    "gpt2 without merges": (gpt2, _without("tokenizer.json", "merges.txt"), "merges.txt"),
    "bert with files of gpt2": (
        gpt2,
        _all(_without("tokenizer.json"), _settings(tokenizer_class="BertTokenizer")),
        "vocab.txt",
    ),
    "llama of vocab.json": (llama, _all(_without("tokenizer.json"), _with("vocab.json", {"a": 0})), "tokenizer.json"),
    "tokenizer.model that is none": (
        llama,
        _all(_without("tokenizer.json"), _with("tokenizer.model", "x")),
        "tokenizer",
    ),
    "generic class without json": (
        bert,
        _all(_without("tokenizer.json"), _settings(tokenizer_class="PreTrainedTokenizerFast")),
        "tokenizer.json",
    ),
    "auto_map": (bert, _settings(auto_map={"AutoTokenizer": ["code.Tok", None]}), "never run"),
    "auto_map of old": (bert, _settings(auto_map=["code.Tok", None]), "never run"),
    "no JSON": (bert, _with("tokenizer.json", "{"), "not a tokenizer"),
    "settings are no JSON": (bert, _with("tokenizer_config.json", "{"), "not valid JSON"),
    "settings are a list": (bert, _with("tokenizer_config.json", "[]"), "expected a JSON object"),
    "truncation_side=up": (bert, _settings(truncation_side="up"), "truncation_side"),
    "do_lower_case is a word": (bert, _settings(do_lower_case="no"), "do_lower_case"),
    "cls_token=null": (bert, _settings(cls_token=None), "cls_token"),
    "pad_token is a number": (bert, _settings(pad_token=0), "pad_token"),
    "extra_special_tokens is a word": (bert, _settings(extra_special_tokens="<ent>"), "extra_special_tokens"),
    "slow tokenizers alone": (bert, _settings(tokenizer_class="BertJapaneseTokenizer"), "no fast tokenizer"),
    "a model as a class": (bert, _settings(tokenizer_class="BertModel"), "no fast tokenizer"),
    "dropout of merges": (llama3, lambda folder: _dropout(folder), "dropout"),
}

_QUICK = {
    "bert": ("as saved", "do_lower_case=false", "truncation_side=left", "added_tokens.json", "vocab.txt alone"),
    "roberta": ("add_prefix_space=true", "no tokenizer.json"),
    "llama": ("as saved", "special_tokens_map.json"),
    "llama 3": ("LlamaTokenizer of bytes",),
    "xlm-r": ("as saved",),
}


def _dropout(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tree["model"]["dropout"] = 0.5
    write(folder, "tokenizer.json", tree)


# --------------------------------------------------------------------------------------------------------------- judge


def judge(folder: Path) -> str | None:
    """What differs between the ids of jaxft and those of AutoTokenizer; then between these and what jaxft's export gives."""
    from jaxft.data.processors.tokenizer import Tokenizer

    try:
        reference = _reference(folder)
    except Exception as error:  # noqa: BLE001 - whatever it is, the reference reads no tokenizer there
        reference = f"the reference refuses: {(str(error).splitlines() or [type(error).__name__])[0]}"
    mine = Tokenizer(folder)
    if isinstance(reference, str):
        return reference
    found = _difference(reference, folder)
    if found is not None:
        return found
    export = folder.with_name("export")
    export.mkdir()
    # A model's own folder: its config.json says nothing of tokenizers.
    write(export, "config.json", {"model_type": "bert", "architectures": ["BertModel"]})
    mine.save(export, 77)
    found = _difference(reference, export) or _difference(_reference(export), export)
    if found is None and Tokenizer(export).stated_length != 77:
        found = "model_max_length was not written"
    return None if found is None else f"after export: {found}"


def _reference(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def _difference(reference: Any, folder: Path) -> str | None:
    from jaxft.data.processors.tokenizer import Tokenizer

    named = Tokenizer(folder)
    for name, theirs, ours in (
        ("pad", reference.pad_token_id, named.special.pad),
        ("mask", reference.mask_token_id, named.special.mask),
        ("eos", reference.eos_token_id, named.special.end),
        ("size", max(reference.get_vocab().values()) + 1, named.vocab_size),
    ):
        if theirs is not None and theirs != ours:  # [MASK] and its like count for us where no file names them
            return f"{name}: {ours}, reference {theirs}"
    for length, paired in itertools.product((None, 12, 7), (False, True)):
        tokenizer = Tokenizer(folder, length)
        seconds = [SECOND] * len(TEXTS) if paired else None
        how = {} if length is None else {"truncation": True, "max_length": length}
        given = (list(TEXTS), seconds) if paired else (list(TEXTS),)
        theirs = reference(*given, **how)
        types = theirs.get("token_type_ids") or [[0] * len(ids) for ids in theirs["input_ids"]]
        for text, ids, kinds, row in zip(
            TEXTS, theirs["input_ids"], types, tokenizer.encode(TEXTS, seconds), strict=True
        ):
            if (ids, kinds) != (row[0], row[1]):
                return f"{text[:24]!r} length={length} paired={paired}: {row[0][:12]} {row[1][-3:]}, reference {ids[:12]} {kinds[-3:]}"
    return None


def cases() -> Iterable[Case]:
    """The cases of tokenizers."""

    for name, (base, edits) in _BASES.items():
        for change, (kind, edit) in edits.items():
            quick = change in _QUICK.get(name, ())
            yield Case(f"tokenizer/{name}/{change}", f"tokenizer: {kind}", _all(base, edit), judge, quick=quick)
    for name, (base, edit, says) in _REFUSED.items():
        quick = name in ("bert without vocabulary", "auto_map")
        yield Case(f"tokenizer/refused/{name}", "tokenizer: refused", _all(base, edit), judge, "refused", says, quick)
