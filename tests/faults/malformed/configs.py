"""Malformed model configurations, label lists, and files beside the weights."""

from __future__ import annotations

import json
from collections.abc import Iterator

from faults.malformed.case import MILLION, TRAIN, Case, Damage, bad_json, both, keys, put, words

CONVERT = words("convert model made")
CONFIG = "model/config.json"
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)
NO_SIZE = (0, -1, 1.5, "16", None, [], {}, True, 10**9, 10**10, 10**21, 10**400)
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob")
NO_RATE = (-0.1, 1.0, 1e308, "x", [], 10**400)
FAMILIES: dict[str, dict[str, tuple[object, ...]]] = {
    "bert": {
        "num_hidden_layers": (10**9, 10**5),
        "vocab_size": (10**10,),
        "hidden_size": (10**9,),
        "max_position_embeddings": (10**11,),
    },
    "roberta": {"vocab_size": (10**12,), "num_hidden_layers": (10**9,)},
    "albert": {"num_hidden_layers": (10**9,), "embedding_size": (0, 10**10), "num_hidden_groups": (0, 10**9)},
    "electra": {"embedding_size": (0, 10**10), "num_hidden_layers": (10**9,)},
    "distilbert": {"n_layers": (10**9,), "vocab_size": (10**10,)},
    "deberta_v2": {"num_hidden_layers": (10**9,), "position_buckets": (10**12,), "pos_att_type": ("x", ["nope"])},
    "mpnet": {"relative_attention_num_buckets": (0, 10**12), "num_hidden_layers": (10**9,)},
    "modernbert": {
        "num_hidden_layers": (10**9,),
        "local_attention": (10**30,),
        "global_attn_every_n_layers": (0, -1, 10**30),
    },
    "llama": {
        "num_hidden_layers": (10**9,),
        "num_key_value_heads": (0, 3, 10**9),
        "head_dim": (0, 10**12),
        "rope_theta": (0, -1),
        "rope_scaling": ("x", {"type": "nope"}),
    },
}


def cases() -> Iterator[Case]:
    """The cases of this kind."""
    for title, damage in bad_json(CONFIG):
        yield Case("config", f"config.json: {title}", damage, CONVERT)
    wrong: dict[str, tuple[object, ...]] = {
        **dict.fromkeys(SIZES, NO_SIZE),
        **dict.fromkeys(RATES, NO_RATE),
        "hidden_act": ("nope", 5, MILLION, ["gelu"], {}),
        "layer_norm_eps": ("x", [], 10**400),
        "pad_token_id": (10**10, -100, "x", 1.5),
        "model_type": ("nope", 5, MILLION, "os.path", ["bert"], {}, "../bert", "bert\x1b[31m"),
        "architectures": (["NopeForNothing"], [MILLION]),
        "quantization_config": ({"quant_method": "bitsandbytes"}, {"quant_method": MILLION}),
        "position_embedding_type": ("relative_key", 5, MILLION),
        "is_decoder": (True,),
        "id2label": ({"0": "a", "5": "b"}, {"x": "a", "y": "b"}, {"0": "\ud800", "1": "b"}),
    }
    for key, values in wrong.items():
        for value in values:
            if (key, value) in (("type_vocab_size", 0), ("intermediate_size", None)):
                continue  # a size that may be 0; a key that may be missing
            yield Case("config", f"{key}: {str(value)[:24]!r}", keys(CONFIG, **{key: value}), CONVERT)
    # What is odd and may be understood, or refused; never anything else.
    odd: dict[str, tuple[object, ...]] = {
        "id2label": (
            5,
            [],
            "x",
            {"0": 1, "1": 2},
            {"0": None, "1": {}},
            {"0": MILLION, "1": "b"},
            {str(i): str(i) for i in range(100_000)},
        ),
        "label2id": (5, {"a": "x"}, [MILLION]),
        "num_labels": (0, -1, 10**10, "x"),
        "architectures": (5, "x", [], [5], [None]),
        "torch_dtype": (5, "nope", MILLION),
        "dtype": (5, "nope", MILLION),
        "problem_type": (5, "nope", MILLION),
        "tie_word_embeddings": (5, "x", None),
        "use_cache": (MILLION,),
        "task_specific_params": ({"x": MILLION},),
        "auto_map": ({"AutoConfig": "evil.Config"}, MILLION),
        "initializer_range": ("x", -1, 1e308, None),
        "transformers_version": (MILLION, 5),
        MILLION: (1,),
        "\x1b[31m": (1,),
        "__class__": ("x",),
    }
    for key, values in odd.items():
        for value in values:
            name = f"odd {key[:20]!r}: {str(value)[:24]!r}"
            yield Case("config", name, keys(CONFIG, **{key: value}), CONVERT, (0, 2), writes=True)
            yield Case(
                "config", f"{name}, predicted", keys(CONFIG, **{key: value}), words("predict model --text a"), (0, 2)
            )
    for family, fields in FAMILIES.items():
        for key, values in fields.items():
            for value in values:
                changes = json.dumps({key: value})
                command = (
                    *words(TRAIN),
                    "model.init=null",
                    "data.tokenizer=base",
                    f"model.family={family}",
                    f"model.arch={changes}",
                )
                yield Case("config", f"fresh {family}: {changes[:60]}", lambda folder: None, command)
    yield from _beside()


def _beside() -> Iterator[Case]:
    """Other files of a model folder."""
    labels = both(keys(CONFIG, problem_type="multi_label_classification"))
    predict = words("predict model --text a --threshold best")
    for title, damage in bad_json("model/thresholds.json"):
        yield Case("config", f"thresholds.json: {title}", both(labels, damage), predict)
    trees: dict[str, object] = {
        "no thresholds": {"labels": ["animal", "thing"]},
        "other labels": {"labels": ["x", MILLION], "thresholds": {"x": 0.5}, "metric": "f1"},
        "out of range": {"labels": ["animal", "thing"], "thresholds": {"animal": 7, "thing": 10**400}, "metric": "f1"},
        "text": {"labels": ["animal", "thing"], "thresholds": {"animal": MILLION, "thing": None}, "metric": "f1"},
        "another metric": {
            "labels": ["animal", "thing"],
            "thresholds": {"animal": 0.5, "thing": 0.5},
            "metric": MILLION,
        },
    }
    for title, tree in trees.items():
        yield Case(
            "config", f"thresholds.json: {title}", both(labels, put("model/thresholds.json", json.dumps(tree))), predict
        )
    for name in (
        "modules.json",
        "sentence_bert_config.json",
        "1_Pooling/config.json",
        "config_sentence_transformers.json",
        "generation_config.json",
        "README.md",
    ):
        for title, damage in (*bad_json(f"model/{name}"), *_odd_files(f"model/{name}")):
            made = both(put(f"model/{name}", ""), damage)
            yield Case("config", f"{name}: {title}", made, CONVERT, (0, 2), writes=True)
    for title, raw in {
        "no sums": MILLION,
        "a path above": f"{'0' * 64}  ../base/config.json\n",
        "an absolute path": f"{'0' * 64}  /dev/zero\n",
        "another sum": f"{'0' * 64}  config.json\n",
        "a file that is not there": f"{'0' * 64}  {'x' * 5000}\n",
        "an odd name": f"{'0' * 64}  \x1b[31m\n",
        "not UTF-8": "\udcff",
        "large": f"{'0' * 64}  config.json\n" * 100_000,
        "many files": "".join(f"{i:064}  {i}\n" for i in range(10_000)),
    }.items():
        yield Case("config", f"SHA256SUMS: {title}", put("model/SHA256SUMS", raw), CONVERT)
    yield Case(
        "config",
        "SHA256SUMS: of a device",
        both(lambda folder: (folder / "model/x").symlink_to("/dev/zero"), put("model/SHA256SUMS", f"{'0' * 64}  x\n")),
        CONVERT,
    )
    card = (
        "---\na: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"b{i}: &b{i} [{','.join([f'*b{i - 1}' if i else '*a'] * 9)}]\n" for i in range(9))
        + "---\n"
    )
    yield Case("config", "README.md: an alias bomb", put("model/README.md", card), CONVERT, (0, 2), writes=True)


def _odd_files(name: str) -> Iterator[tuple[str, Damage]]:
    for title, text in {
        "numbers": "[1, 2]",
        "a path above": '[{"idx": 0, "name": "0", "path": "../../..", "type": "x"}]',
        "code": '[{"idx": 0, "name": "0", "path": "", "type": "evil.Module"}]',
    }.items():
        yield title, put(name, text)
