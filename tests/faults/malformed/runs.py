"""Malformed run files, and settings on the command line."""

from __future__ import annotations

from collections.abc import Iterator

from faults.malformed.case import MILLION, TRAIN, Case, no_files, put, sparse, words

BIG = 10**12
SHOW = words("show-config run.yaml")


def _bomb(width: int, depth: int) -> str:
    lists = ["a0: &a0 [" + ",".join(["x"] * width) + "]"]
    lists += [f"a{i}: &a{i} [" + ",".join([f"*a{i - 1}"] * width) + "]" for i in range(1, depth)]
    return "\n".join(lists)


FILES: dict[str, str | bytes] = {
    "a number": "5",
    "a list": "[1, 2]",
    "a text": "hello",
    "not closed": "model: {init: base",
    "tabs": "model:\n\tinit: base\n",
    "not UTF-8": b"model: {init: '\xff'}",
    "UTF-16": "model: {init: base}".encode("utf-16"),
    "NUL": b"\0" * 100,
    "binary": bytes(range(256)) * 10,
    "control characters": 'model: {init: "\x07"}',
    "deep lists": "data: {labels: " + "[" * 100_000,
    "deep lists, closed": "data: {labels: " + "[" * 20_000 + "]" * 20_000 + "}",
    "deep maps": "{a: " * 100_000,
    "deep by indentation": "".join(" " * i + "a:\n" for i in range(2000)),
    "deep dashes": "- " * 100_000,
    "an alias bomb": _bomb(9, 9),
    "an alias bomb in a section": "data:\n" + "".join(f"  {line}\n" for line in _bomb(10, 9).splitlines()),
    "aliases that are no bomb": "data:\n  labels: &a [x, y]\n  buckets: [*a]\n",
    "merged bombs": "a: &a {x: 1}\n"
    + "".join(f"b{i}: &b{i}\n  <<: [*a{', *b' + str(i - 1) if i else ''}]\n  k{i}: 1\n" for i in range(2000)),
    "a list in itself": "data: &a {labels: *a}",
    "a map in itself": "&a data: *a",
    "a key twice": "train: {steps: 1}\ntrain: {steps: 2}\n",
    "a list as key": "? [a, b]\n: 1\n",
    "an alias that is not there": "data: *x",
    "an anchor of a million characters": f"data: &{MILLION} x",
    "a Python object": "a: !!python/object/apply:os.system ['touch canary']",
    "a Python name": "a: !!python/name:os.system",
    "another tag": "a: !nope x",
    "a tag of a million characters": f"a: !{MILLION} x",
    "binary tag": "a: !!binary aGk=",
    "a directive": "%YAML 99.9\n---\na: 1",
    "two documents": "train: {steps: 1}\n---\ntrain: {steps: 2}\n",
    "a key of a million characters": f"{MILLION}: 1",
    "a value of a million characters": f"train: {{steps: {MILLION}}}",
    "a value of a million digits": f"train: {{steps: {'9' * 1_000_000}}}",
    "a number of 5000 digits": f"train: {{steps: {'9' * 5000}}}",
    "a hundred thousand keys": "".join(f"k{i}: 1\n" for i in range(100_000)),
    "a hundred thousand keys of a section": "train:\n" + "".join(f"  k{i}: 1\n" for i in range(100_000)),
    "a million items": "train: {seeds: [" + "1," * 1_000_000 + "1]}",
    "unknown section": "nope: {a: 1}",
    "unknown key": "train: {nope: 1}",
    "a section that is a list": "train: [1]",
    "a section that is text": "train: x",
    "a key of control characters": '"\\e[31m": 1',
    "null": "train: null",
    "a lone surrogate": 'train: {out: "\\uD800"}',
    "infinite": "optim: {learning_rate: .inf}",
    "no number": "optim: {learning_rate: .nan}",
    "a date": "train: {steps: 2026-01-01}",
    "sixties": "train: {steps: 1:30}",
    "extends itself": "extends: run.yaml",
    "extends nothing": "extends: nowhere.yaml",
    "extends a device": "extends: /dev/zero",
    "extends a list": "extends: [a, b, c]",
    "extends a number": "extends: 5",
    "extends a map": "extends: {a: 1}",
    "extends a folder": "extends: model",
    "extends a million characters": f"extends: {MILLION}",
    "extends NUL": 'extends: "\\0"',
}
WRONG: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(
        ("train.batch_size", "eval.batch_size"), (0, -1, 1.5, "x", "null", "true", 2**31, BIG, 10**21, 10**400, MILLION)
    ),
    "train.steps": (0, -1, 1.5, "x", 2**31, BIG, 10**21, 10**400),
    "train.epochs": ("x", "1e308", ".inf", ".nan"),
    "train.accumulation": (0, 3, BIG, 10**21),
    "train.log_every": (0, 10**21),
    "train.seed": (-1, 2**32, 10**21, "x"),
    "train.seeds": ("[0,0]", "x", "[" + ",".join(str(i) for i in range(20_000)) + ",x]"),
    "train.watchdog": (0, -1, ".nan"),
    "train.max_nonfinite": (-1, 10**21),
    "train.rollbacks": (-1, 10**21),
    "train.profile": ("x", "5:1", f"1:{10**30}"),
    "train.out": ('""', "train.csv/x", "x" * 5000, "/dev/null/x", "/proc/x"),
    "eval.every": (0, 10**21),
    "eval.patience": (0, 10**21),
    "eval.metric": ("nope", MILLION),
    "checkpoint.keep": (0, 10**21),
    "checkpoint.every": (0, 10**21),
    "data.max_length": (0, 2, -1, 1.5, 2**31, BIG, 10**21, 10**400, "x"),
    "data.buckets": ("[0,16]", "[]", "[x]", f"[{BIG}]", f"[{10**21}]", 5),
    "data.lengths": ("{}", "x", "{0: 8}", f"{{0: {10**21}}}"),
    "train.batch_ramp": ("{}", "{0: 0}", f"{{0: {BIG}}}"),
    "data.read_ahead": (0, BIG, 10**21),
    "data.eval_fraction": (0, 1, ".nan", "x"),
    "data.labels": (
        "[]",
        "[a,a]",
        "[a",
        "[animal,x]",
        "[" + ",".join(f"x{i}" for i in range(30_000)) + "]",
        "{a: [b]}",
        MILLION,
    ),
    "data.label_map": ("{}", "x", "{a: {b: c}}", "{animal: null, thing: null}"),
    "data.text": ('""', "nope", MILLION, "null"),
    "data.train": (
        "nope.csv",
        MILLION,
        "/dev/zero",
        "/dev/null",
        "model",
        "*",
        "tfds:x",
        "hf:x",
        "s3://x/y.csv",
        "\0.csv",
        "[train.csv,[x]]",
    ),
    "data.tokenizer": ("nope", MILLION, "train.csv", "pkg:os", "../" * 2000),
    "optim.learning_rate": (-1, ".inf", ".nan", "x", "1e400", 10**400),
    "optim.beta1": (1, -0.1, ".nan"),
    "optim.name": ("nope", MILLION),
    "optim.freeze": ("[nope/*]", "[" + "[" * 1000 + "]", "x", f"[{'*' * 10_000}]"),
    "optim.warmup_steps": (-1, 10**21),
    "optim.exponential_steps": (0, -1, 10**21),
    "optim.step_fractions": ("[.nan]", "[2,1]", "x"),
    "optim.ema": (0, 1, ".nan"),
    "optim.layer_decay": (0, 2, ".nan"),
    "mesh.data": (0, -2, BIG, 10**21, "x"),
    "mesh.fsdp": (0, 10**21),
    "mesh.rules": ("{nope: []}", "{vocab: [nope]}", "x", "{a: {b: c}}"),
    "model.lora.rank": (0, -1, 10**9, BIG, 10**21),
    "model.lora.alpha": (".nan", "x"),
    "model.lora.targets": ("[nope]", "x", "[" * 100),
    "model.vocab_tile": (0, -1, 10**21),
    "model.reinit_layers": (-1, 10**9, 10**21),
    "model.head": ("nope", MILLION),
    "model.init": ("nope/nope/nope", MILLION, "train.csv", "pkg:os/x", "pkg:../x", "", "\0", "../" * 2000),
    "model.family": ("nope", MILLION, "os.path", "os.path:x", "../x"),
    "model.arch": ("x", "5", "[]", "{nope: 1}", "{hidden_size: {a: 1}}", '{hidden_size: ["1"]}'),
    "task.name": ("nope", MILLION, "os.path", "../x"),
    "task.label_smoothing": (1, -1, ".nan", "x"),
    "task.class_weights": ("{animal: -1}", "{nope: 1}", "{animal: .nan}", "x"),
    "nope": (1,),
    "nope.nope": (1,),
    MILLION: (1,),
    "train." + "a." * 5000: (1,),
    "train": (1,),
    "train.steps.x": (1,),
    "": (1,),
    ".": (1,),
    "\x1b[31m": (1,),
}
LOOSE = (
    "train.steps=",
    "train.steps",
    "=1",
    "=",
    "train.steps={a: 1}",
    "train.steps=[" * 100,
    "train.steps=&a 1",
    "train.steps=1 # x",
    "train.steps=!!int 1",
    "data.labels=[" + "[" * 20_000,
)


def cases() -> Iterator[Case]:
    """The cases of this kind."""
    for title, content in FILES.items():
        codes = (0, 2) if title in ("null", "a date", "merged bombs") else (2,)
        yield Case("run", f"file: {title}", put("run.yaml", content), SHOW, codes)
    for title, damage in (*no_files("run.yaml"), ("1 GB of NUL", sparse("run.yaml", 1 << 30))):
        yield Case("run", f"file: {title}", damage, SHOW)
        yield Case("run", f"file, train: {title}", damage, words("train run.yaml"))
    for key, values in WRONG.items():
        for value in values:
            shown = f"{key[:30]}={str(value)[:30]}".encode("unicode_escape").decode()
            needed = {
                "model.lora.targets": "model.lora.rank=4",
                "optim.step_fractions": "optim.schedule=step",
                "optim.exponential_steps": "optim.schedule=exponential",
                "train.epochs": "train.steps=null",
            }
            more = (needed[key],) if key in needed else ()
            yield Case("run", f"set: {shown}", _nothing, (*words(TRAIN), *more, f"{key}={value}"))
    for text in LOOSE:
        yield Case("run", f"set: {text[:40]!r} alone", _nothing, (*words(TRAIN), text))
    for title, command in _commands().items():
        yield Case("run", f"command: {title}", _nothing, command)


def _nothing(folder: object) -> None:
    """The command itself is what is wrong."""


def _commands() -> dict[str, tuple[str, ...]]:
    sweep = words("sweep run.yaml --out made")
    return {
        "no command": (MILLION,),
        "an unknown option": ("train", f"--{MILLION}"),
        "predict: batch of 10**12": words(f"predict model --text a --batch-size {BIG}"),
        "predict: batch of 10**21": words(f"predict model --text a --batch-size {10**21}"),
        "predict: top of 10**21, no number": words("predict model --text a --top x"),
        "predict: threshold of text": words("predict model --text a --threshold x"),
        "predict: a file of a million letters": ("predict", "model", MILLION),
        "predict: a model of a million letters": ("predict", MILLION, "--text", "a"),
        "predict: a model with NUL": ("predict", "\0", "--text", "a"),
        "eval: batch of 10**12": words(f"eval model data.eval=eval.csv eval.batch_size={BIG}"),
        "convert: a target of a million letters": ("convert", "model", MILLION),
        "convert: shards of 0": words("convert model made --shard-size 0"),
        "convert: shards of 10**400 GB": words(f"convert model made --shard-size {10**400}GB"),
        "convert: a head of a million letters": ("convert", "model", "made", "--head", MILLION),
        "sweep: no space": (*sweep, "--space", "nope"),
        "sweep: a key that is not there": (*sweep, "nope=log:1e-5..1e-3"),
        "checkpoint: a step of a million digits": ("checkpoint", "inspect", "checkpoint", "9" * 1_000_000),
        "checkpoint: no folder": ("checkpoint", "list", MILLION),
        "data: nothing": words("data data.train=nope.csv"),
        "cache: batch of text": words("cache build run.yaml x train.batch_size=x"),
    }
