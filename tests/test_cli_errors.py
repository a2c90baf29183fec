"""What a user can get wrong: one line on stderr, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import WORDS, make_folder, refusal, rows, run, write_csv, write_tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("errors")
    make_folder(folder / "base")
    make_folder(folder / "classifier", "classification", ("animal", "thing"))
    write_tokenizer(folder / "other_tokenizer", ("zebra",))
    write_csv(folder / "train.csv", rows(24))
    write_csv(folder / "eval.csv", rows(11, seed=1))
    (folder / "header.csv").write_text("text,label\n")
    (folder / "nothing.csv").write_text("")
    (folder / "open.csv").write_text('text,label\na,b\n"unclosed,c\n')
    (folder / "cells.csv").write_text("text,label\na,b,c\n")
    (folder / "bad.jsonl").write_text('{"text": "a", "label": "b"}\n{oops\n')
    (folder / "number.jsonl").write_text('{"text": "a", "label": "b"}\n{"text": 5, "label": "b"}\n')
    (folder / "label.csv").write_text("text,label\na cat,animal\na cat,anmal\n")
    (folder / "one.csv").write_text("text,label\na cat,x\na dog,x\n")
    (folder / "bad.parquet").write_bytes(b"junk")
    (folder / "bad.csv.gz").write_bytes(b"junk")
    return folder


@pytest.fixture
def here(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shared)
    return shared


def _train(capsys: Capture, *overrides: str) -> str:
    """The message of a training command that must fail and leave the folder as it was."""
    before = set(Path().rglob("*"))
    usual = (
        "model.init=base data.train=train.csv data.eval=eval.csv data.max_length=16 data.buckets=[16] "
        "train.batch_size=8 eval.batch_size=8 train.steps=2 train.out=made/out train.compilation_cache=null log.progress=off"
    )
    message = refusal(capsys, "train", *usual.split(), *overrides)
    assert set(Path().rglob("*")) == before
    return message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.train=nope.csv", "data file 'nope.csv' does not exist"),
        ("data.train=train.docx", "the suffix does not tell the format"),
        ("data.text=txt", "train.csv:1: no column 'txt': did you mean 'text'?"),
        ("data.label=labels", "did you mean 'label'?"),
        ("data.text_pair=second", "no column 'second'"),
        ("data.eval=label.csv", "label.csv:3: unknown label 'anmal': did you mean 'animal'?"),
        ("data.labels=[animal,thng]", "unknown label 'thing': did you mean 'thng'?"),
        ("data.train=header.csv", "header.csv: the data set is empty"),
        ("data.eval=header.csv", "header.csv: the data set is empty"),
        ("data.train=nothing.csv", "nothing.csv:1: there is no header"),
        ("data.train=open.csv", "open.csv:3: not valid CSV"),
        ("data.train=cells.csv", "cells.csv:2: expected 2 cells"),
        ("data.train=bad.jsonl", "bad.jsonl:2:2: not valid JSON"),
        ("data.train=number.jsonl", "number.jsonl:2: column 'text' holds 5, which is not text"),
        ("data.train=one.csv data.eval=one.csv", "at least two labels"),
        ("data.train=bad.parquet", "cannot be read as Parquet"),
        ("data.train=bad.csv.gz", "broken gzip data"),
        ("data.tokenizer=other_tokenizer", "wrong tokenizer for these weights"),
        ("data.tokenizer=nope", "'nope' is neither a local folder nor"),
        ("data.max_length=33 data.buckets=[33]", "data.max_length=33 is beyond the model's position table of 32"),
        ("data.buckets=[64]", "data.buckets: 64 is beyond the model's position table of 32"),
        ("train.batch_size=9", "= 9 cannot be split 8 ways"),
        ("eval.batch_size=9", "eval.batch_size = 9 cannot be split 8 ways"),
        ("mesh.data=3", "does not fit 8 devices"),
        ("mesh.fsdp=-1", "only one size may be -1"),
        ("mesh.tensor=8 mesh.data=1", "cannot be split 8 ways"),
        ("task.name=clasification", "did you mean 'classification'?"),
        ("eval.metric=acc", "eval.metric='acc': the task has accuracy, macro_f1, micro_f1, weighted_f1, mcc, loss"),
        (
            "eval.mode=min",
            "eval.mode is gone: the task says for each metric whether less (loss) or more (accuracy) is better;",
        ),
        ("task.class_weights={animl:\u00a01.0}", "task.class_weights.animl: unknown label: did you mean 'animal'?"),
        ("optim.freeze=[nope/*]", "matches no parameter"),
        ("model.init=nope", "model 'nope' is neither a local folder nor"),
        ("model.init=./nope", "model folder './nope' does not exist"),
        ("model.init=train.csv", "is a file"),
        ("model.init=pkg:no_such_package/x", "is not installed"),
        ("model.init=null", "data.tokenizer is not set"),
        ("model.init=null data.tokenizer=base", "model.family and model.arch"),
        ("model.init=null data.tokenizer=base model.family=brt", "did you mean 'bert'?"),
        ("model.arch={hidden_size:\u00a032}", "the weights contradict hidden_size=32 (there: 16); leave it out"),
        ("model.arch={num_hidden_layers:\u00a05}", "5 layers are asked for, the weights have 2"),
        ("model.arch={hiden_size:\u00a03}", "model.arch.hiden_size': did you mean 'hidden_size'?"),
        ("train.out=train.csv", "train.csv"),
        ("train.out=train.csv/x", "train.csv"),
    ],
)
def test_train(here: Path, capsys: Capture, overrides: str, message: str) -> None:
    assert message in _train(
        capsys, *(override.replace("\u00a0", " ") for override in overrides.split(" ") if override)
    )


def _config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        tree = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "absent"}
        path.write_text(json.dumps(tree))

    return change


def _file(name: str, content: bytes | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)

    return change


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "is corrupt or truncated"),
        (_file("model.safetensors", b"\xff" * 500), "is corrupt or truncated"),
        (_file("model.safetensors", b""), "is corrupt or truncated"),
        (_file("model.safetensors", None), "has no weights file"),
        (_file("config.json", None), "config.json does not exist"),
        (_file("config.json", b"{nope"), "config.json: not valid JSON"),
        (_file("config.json", b"[]"), "expected a JSON object"),
        (_file("tokenizer.json", b"{"), "tokenizer.json: not valid JSON"),
        (_file("tokenizer_config.json", b"{"), "tokenizer_config.json: not valid JSON"),
        (_without_tokenizer, "no tokenizer files"),
        (_config(model_type="deberta"), "model family 'deberta' is not supported"),
        (_config(model_type="absent", architectures="absent"), "no model_type"),
        (_config(num_hidden_layers=3), "16 missing: bert.encoder.layer.2."),
        (_config(num_hidden_layers=1), "16 unused: encoder.layer.1."),
        (_config(hidden_size=32), "37 mis-shaped: embeddings.word_embeddings.weight is [36, 16], expected [36, 32]"),
        (_config(hidden_size="16"), "input should be a valid integer"),
        (_config(hidden_act="gleu"), "did you mean 'gelu'?"),
        (_config(num_attention_heads=3), "is not a multiple of num_attention_heads=3"),
        (_config(position_embedding_type="relative_key"), "only 'absolute'"),
        (_config(vocab_size=10), "1 mis-shaped: embeddings.word_embeddings.weight is [36, 16], expected [10, 16]"),
        (_config(id2label={"0": "a", "5": "b"}), "id2label must have the keys 0..1"),
    ],
)
def test_model_folders(
    shared: Path, tmp_path: Path, capsys: Capture, damage: Callable[[Path], None], message: str
) -> None:
    """`convert` reads all that `train` reads, and compiles nothing."""
    shutil.copytree(shared / "base", tmp_path / "model")
    damage(tmp_path / "model")
    command = ["predict", tmp_path / "model", "--text", "a"]
    if "tokenizer" not in message:
        command = ["convert", tmp_path / "model", tmp_path / "target"]
    assert message in refusal(capsys, *command)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_that_do_not_fit_leave_no_run_folder(here: Path, capsys: Capture, tmp_path: Path) -> None:
    shutil.copytree("base", tmp_path / "model")
    _config(hidden_size=32)(tmp_path / "model")
    assert "37 mis-shaped" in _train(capsys, f"model.init={tmp_path / 'model'}")


def test_a_hub_id_without_network_is_answered_at_once(capsys: Capture) -> None:
    message = refusal(capsys, "predict", "some-org/some-model", "--text", "a")
    assert "neither a local folder nor to be had from the Hugging Face hub" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("predict classifier", "give one INPUT"),
        ("predict classifier train.csv eval.csv", "give one INPUT"),
        ("predict classifier train.csv --text a", "give one INPUT"),
        ("predict classifier --text a --text b --pair c", "give one --pair for each --text"),
        ("predict classifier --text a --top 0", "must be at least 1"),
        ("predict classifier --text a --out nope/x.jsonl", "nope/x.jsonl: cannot be written"),
        ("predict classifier --text a --out base", "base: cannot be written: it is a folder"),
        ("predict classifier nope.csv", "'nope.csv' does not exist"),
        ("predict classifier train.csv data.text=txt", "did you mean 'text'?"),
        ("predict classifier number.jsonl --out made.jsonl", "number.jsonl:2: column 'text' holds 5"),
        ("predict classifier --text a data.max=3", "unknown config key 'data.max'"),
        ("predict classifier --text \udcff", "is not valid UTF-8"),
        ("predict nope --text a", "'nope' is neither a local folder nor"),
        ("eval classifier", "data.eval is not set"),
        ("eval classifier data.eval=label.csv", "label.csv:3: unknown label 'anmal'"),
        ("eval classifier data.eval=eval.csv data.labels=[thing,animal]", "the model's labels are ['animal', 'thing']"),
        ("eval classifier data.eval=eval.csv --out eval.csv", "eval.csv: File exists"),
        ("convert classifier train.csv", "already exists"),
        ("convert classifier base", "already exists"),
        ("convert classifier train.csv/x", "cannot be written"),
        ("convert classifier made --head clasification", "did you mean 'classification'?"),
        ("convert classifier made --shard-size 5XB", "expected a size such as"),
        ("convert nope made", "'nope' is neither a local folder nor"),
        ("show-config nope.yaml", "'nope.yaml' does not exist"),
    ],
)
def test_other_commands(here: Path, capsys: Capture, arguments: str, message: str) -> None:
    before = set(Path().rglob("*"))
    assert message in refusal(capsys, *arguments.split(" "))
    assert set(Path().rglob("*")) == before


def test_a_text_in_place_of_a_file_is_recognised(here: Path, capsys: Capture) -> None:
    assert "--text 'the cat runs'" in refusal(capsys, "predict", "classifier", "the cat runs")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        ([], "the following arguments are required: COMMAND"),
        (["predict"], "the following arguments are required"),
        (["predict", "m", "--batch-size", "x"], "invalid int value"),
        (["convert", "a", "b", "--dtype", "int8"], "invalid choice"),
        (["train", "--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_wrong_usage_is_one_line_too(capsys: Capture, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as end:
        run(capsys, *arguments)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert message in err
    assert len(err.splitlines()) == 1


def test_messages_of_many_lines_and_errors_of_the_system_are_one_line(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxft.cli import show_config
    from jaxft.errors import UserError

    def fail(error: Exception) -> None:
        def load(*_: object) -> None:
            raise error

        monkeypatch.setattr(show_config, "load_config", load)

    fail(UserError("one\n  two"))
    assert refusal(capsys, "show-config") == "one two"
    fail(OSError(28, "No space left on device", "runs/x/log.jsonl"))
    assert refusal(capsys, "show-config", code=4) == "runs/x/log.jsonl: No space left on device"
    fail(PermissionError(13, "Permission denied", "runs/x/log.jsonl"))
    assert refusal(capsys, "show-config") == "runs/x/log.jsonl: Permission denied"
    fail(ValueError("a bug keeps its traceback"))
    with pytest.raises(ValueError, match="a bug"):
        run(capsys, "show-config")


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    os.chmod(tmp_path, 0o755)
    drop = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", "--reuid=65534"] if os.geteuid() == 0 else []
    command = (
        "from jaxft.files import folder_written_whole as f\nfrom pathlib import Path\nwith f(Path('locked/x')): pass"
    )
    done = subprocess.run([*drop, sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True)
    if "No such file" in done.stderr or "setpriv" in done.stderr or "can't open" in done.stderr:
        pytest.skip("another user may not run this Python")
    assert "locked/x: cannot be written: Permission denied" in done.stderr
    assert len(WORDS) == 36
