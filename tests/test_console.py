"""The console of a run: what it is told at the start, odd encodings, readers that go away, Ctrl-C while compiling."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny import rows, write_csv
from tiny_run import overrides

from jaxft import __main__
from jaxft.cli import console
from jaxft.config import RunConfig, load_config
from jaxft.files import is_unicode
from jaxft.machine.threads import Ahead, still_working
from jaxft.reporting.report import report_text
from jaxft.training import setup

pytestmark = pytest.mark.usefixtures("usual_signals")
USUAL = ["train.steps=2", "train.export=false", "eval.every=2"]


@pytest.fixture(scope="module")
def accented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder, and the arguments of a run in it whose labels no ASCII console shows."""
    folder = tmp_path_factory.mktemp("accented")
    words = [(text, "réussi" if label == "animal" else "raté") for text, label in rows(16)]
    table = write_csv(folder / "rows.csv", words)
    return folder, [*overrides(folder, *USUAL), f"data.train={table}", f"data.eval={table}", f"train.out={folder}/run"]


class Console(io.TextIOWrapper):
    """A console of some encoding, as Python opens it."""

    def __init__(self, encoding: str) -> None:
        self.raw_bytes = io.BytesIO()
        super().__init__(self.raw_bytes, encoding=encoding, errors="strict", write_through=True)

    def text(self) -> str:
        return self.raw_bytes.getvalue().decode(self.encoding)


def test_a_console_of_another_encoding_ends_nothing(
    accented: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, arguments = accented
    console = Console("ascii")
    monkeypatch.setattr(sys, "stdout", console)
    assert __main__.main(["train", *arguments]) == 0
    text = console.text()
    assert {"metrics.json", "confusion.png", "curves.png"} <= {path.name for path in (folder / "run").iterdir()}
    assert "r\\xe9ussi" in text
    assert "# train, smoothed   o eval" in text
    assert "+----" in text
    # The beginning: what differs from the defaults, then the network, what trains, where.
    lines = text.splitlines()
    assert lines[0] == "jaxft 0.1.0: train (no run file)"
    count = next(i for i, line in enumerate(lines[2:]) if not line.startswith("  "))
    assert lines[1] == f"config: {count} settings differ from the defaults; all are in {folder}/run/config.yaml"
    assert "  optim.learning_rate=0.01" in lines
    at = lines.index("model: bert, 2 layers, width 16, 2 heads, head classification")
    assert lines[at + 1].startswith("parameters: ")
    assert lines[at + 2].startswith("mesh: data 8 on 8 devices (cpu)")
    long = [line for line in lines if len(line) > 100 and str(folder) not in line]
    assert not long


def test_a_run_outlives_its_console(
    accented: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, arguments = accented
    (folder / "run/metrics.json").unlink(missing_ok=True)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert __main__.main(["train", *arguments]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told == [
        f"jaxft train: standard output: No space left on device; the run goes on, its log is {folder}/run/log.jsonl"
    ]
    assert (folder / "run/metrics.json").exists()


@pytest.mark.slow
def test_a_run_needs_no_console_at_all(accented: tuple[Path, list[str]], tmp_path: Path) -> None:
    _, arguments = accented
    out, told = tmp_path / "run", tmp_path / "told"
    command = [sys.executable, "-m", "jaxft", "train", *arguments, f"train.out={out}"]
    script = f"exec {shlex.join(command)} <&- >&- 2>{told}"
    assert subprocess.run(["sh", "-c", script], timeout=200).returncode == 0
    line = f"jaxft train: standard output is closed; the run goes on, its log is {out}/log.jsonl\n"
    assert told.read_text() == line
    assert (out / "metrics.json").exists()
    assert not (out / "log.jsonl").read_text().startswith("jaxft")


def test_other_commands_name_what_could_not_be_written() -> None:
    command = [sys.executable, "-m", "jaxft", "show-config"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (
        4,
        "jaxft show-config: error: standard output: No space left on device\n",
    )


@pytest.mark.parametrize(
    ("encoding", "plain"), [("utf-8", True), ("utf-16", True), ("ascii", False), ("cp1252", False)]
)
def test_json_is_escaped_where_a_console_lacks_letters(encoding: str, plain: bool) -> None:
    assert is_unicode(Console(encoding)) == plain
    # What is written is JSON in any case, whatever stream errors are replaced by.
    stream = Console(encoding)
    stream.write(json.dumps({"text": "café 日本"}, ensure_ascii=not plain))
    assert json.loads(stream.text().removeprefix("\ufeff")) == {"text": "café 日本"}


@pytest.mark.parametrize(("encoding", "blocks"), [("utf-8", True), ("latin-1", False), ("ascii", False)])
def test_curves_are_drawn_with_what_the_console_has(
    monkeypatch: pytest.MonkeyPatch, encoding: str, blocks: bool
) -> None:
    log = [{"step": step, "kind": kind, "loss": 1 / step} for step in range(1, 9) for kind in ("train", "eval")]
    metrics = {"loss": 0.5, "perplexity": 1.6, "rows": 3}
    monkeypatch.setattr(sys, "stdout", Console(encoding))
    text = report_text(metrics, (), log)
    assert text.isascii() != blocks
    if not blocks:
        assert sum(line.count("#") for line in text.splitlines()) > 40


def test_settings_are_those_that_differ_and_can_be_given_again() -> None:
    assert console.settings_lines(RunConfig()) == ["config: the defaults; all are in runs/run/config.yaml"]
    given = [
        "data.buckets=[8, 128]",
        "train.out='x: y'",
        "log.progress=off",
        "model.arch={hidden_size: 16}",
        "eval.every=3",
    ]
    lines = console.settings_lines(load_config(None, given))
    assert lines[0] == "config: 5 settings differ from the defaults; all are in x: y/config.yaml"
    again = load_config(None, [line.strip() for line in lines[1:]])
    assert again == load_config(None, given)
    long = console.settings_lines(load_config(None, [f"train.out={'x' * 200}"]))
    assert len(long[1]) == 100
    assert long[1].endswith("...")


def test_parameters_that_train_are_counted(tmp_path: Path) -> None:
    ready = setup.prepare(
        load_config(None, [*overrides(tmp_path), "optim.freeze=['embed/*', 'layers/0-0/*']"]),
        lambda _: None,
        setup.Times(),
    )
    trained, total = console.parameters_of(ready)
    sizes = {"/".join(str(k.key) for k in path): leaf.size for path, leaf in _leaves(ready.shapes)}
    assert total == sum(sizes.values())
    frozen = sum(size for path, size in sizes.items() if path.startswith("embed/"))
    frozen += sum(size // 2 for path, size in sizes.items() if path.startswith("layers/"))  # one of two layers
    assert trained == total - frozen
    assert f"parameters: {trained:,} of {total:,} train" in console.model_lines(ready)


def _leaves(tree: object) -> list:
    import jax

    return jax.tree_util.tree_flatten_with_path(tree)[0]


def test_work_is_done_ahead_in_the_order_given_and_what_is_waited_for_comes_next() -> None:
    may_go_on, begun = threading.Event(), []

    def work(item: int) -> int:
        begun.append(item)
        assert may_go_on.wait(10)
        return item * item

    ahead = Ahead(work, range(5), 1)
    assert not ahead.wait(3, lambda: begun == [0])
    assert (ahead.ready(0), ahead.news()) == (False, [])
    may_go_on.set()
    assert ahead.result(3) == 9
    assert begun[:2] == [0, 3]
    assert [ahead.result(item) for item in range(5)] == [0, 1, 4, 9, 16]
    assert sorted(begun) == [0, 1, 2, 3, 4]
    assert ahead.news() == [(item, item * item) for item in begun]
    assert (ahead.news(), len(ahead)) == ([], 5)


def test_what_is_needed_first_may_be_made_alone() -> None:
    first_is_done, both_at_work, begun = threading.Event(), threading.Barrier(2), []

    def work(item: int) -> int:
        begun.append(item)
        if item == 0:
            assert first_is_done.wait(10)
        else:
            both_at_work.wait(10)  # broken unless two threads are at work
        return item

    ahead = Ahead(work, [0, 1, 2], 2, first_alone=True)
    assert not ahead.wait(1, lambda: bool(begun))
    time.sleep(0.1)
    assert begun == [0]
    first_is_done.set()
    assert [ahead.result(item) for item in (2, 1, 0)] == [2, 1, 0]


def test_an_error_of_work_ahead_is_told_to_whoever_asks() -> None:
    seen = []

    def fail(item: int) -> int:
        seen.append(item)
        if item == 1:
            raise ValueError(item)
        return item

    ahead = Ahead(fail, [0, 1, 2], 1)
    with pytest.raises(ValueError, match="1"):
        ahead.wait(2)
    with pytest.raises(ValueError, match="1"):
        ahead.news()
    assert (ahead.result(0), seen) == (0, [0, 1])
    for thread in [thread for thread in threading.enumerate() if thread.name == "jaxft-worker"]:
        thread.join(10)
    assert not still_working()


def test_work_that_was_stopped_is_not_waited_for() -> None:
    go = threading.Event()
    ahead = Ahead(lambda item: go.wait(10), [0, 1], 1)
    ahead.stop()
    go.set()
    assert ahead.result(0)
    with pytest.raises(ValueError, match="never begun"):
        ahead.wait(1)


CHILD = """
import sys, threading, time
from jaxft import __main__
from jaxft.machine import threads
from jaxft.cli import train
def run(options):
    print("compiling", flush=True)
    threads.Ahead(lambda item: time.sleep(60), [0, 1, 2], 2).wait(2)
    return 0
train.run = run
sys.argv = ["jaxft", "train"]
sys.exit(__main__.main())
"""


def test_ctrl_c_while_compiling_ends_the_process_at_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CHILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "compiling\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)  # its threads would take minutes
    assert (child.returncode, err) == (130, "jaxft train: interrupted\n")


def test_only_the_first_process_speaks_before_they_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JAX_PROCESS_ID", "SLURM_PROCID", "TPU_WORKER_ID", "MEGASCALE_SLICE_ID"):
        monkeypatch.delenv(name, raising=False)
    assert console.first_in_environment()
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert console.first_in_environment()
    monkeypatch.setitem(os.environ, "JAX_PROCESS_ID", "3")
    assert not console.first_in_environment()
