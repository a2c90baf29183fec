"""The sinks: deterministic log, resume after a crash, non-finite values, trackers, console, clock."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxft.config import LogConfig
from jaxft.errors import UserError
from jaxft.reporting.records import log_said
from jaxft.reporting.sinks import Clock, Sinks, open_sinks, read_log

OFF = LogConfig(progress="off")


def opened(out: Path, start: int = 0, total: int = 30, config: LogConfig = OFF) -> Sinks:
    return open_sinks(out, config, start_step=start, total_steps=total, run_config={"train": {"seed": 0}})


def steps(sinks: Sinks, first: int, last: int) -> None:
    """What a loop does for the steps first..last: deterministic values and speeds that differ between runs."""
    for step in range(first, last + 1):
        sinks.timing(step, {"rows_per_s": 100.0 + id(sinks) % 97})
        sinks.log(step, "train", {"loss": np.float32(1 / (step + 2)), "learning_rate": 1e-5 / 3 * step, "skipped": 0})
        if step % 5 == 0:
            sinks.log(step, "eval", {"loss": 0.1 * step, "accuracy": step / 30})
        sinks.advance(step)


@pytest.mark.parametrize("tail", [b"", b'{"step": 9, "ki', b'{"step": 9', b"\0\0\0\0", b"\xff\xfe{"])
def test_a_resumed_run_leaves_the_same_bytes(tmp_path: Path, tail: bytes) -> None:
    with opened(tmp_path / "straight") as sinks:
        steps(sinks, 1, 12)
    with opened(tmp_path / "resumed") as sinks:
        steps(sinks, 1, 8)
    log = tmp_path / "resumed/log.jsonl"
    log.write_bytes(log.read_bytes() + tail)
    with opened(tmp_path / "resumed", start=5) as sinks:
        steps(sinks, 6, 12)
    assert log.read_bytes() == (tmp_path / "straight/log.jsonl").read_bytes()
    timing = [record["step"] for record in read_log(tmp_path / "resumed/timing.jsonl")]
    assert timing == list(range(1, 13))


def test_resume_keeps_a_line_that_lacks_only_its_newline(tmp_path: Path) -> None:
    with opened(tmp_path) as sinks:
        steps(sinks, 1, 3)
    log = tmp_path / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-1])
    opened(tmp_path, start=3).close()
    assert log.read_bytes() == whole


def test_a_start_at_zero_begins_empty_logs(tmp_path: Path) -> None:
    with opened(tmp_path) as sinks:
        sinks.log(0, "eval", {"loss": 1.0})
    opened(tmp_path).close()
    assert (tmp_path / "log.jsonl").read_bytes() == b""


def test_a_damaged_line_inside_the_log_is_left_out_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = ['{"step": 1, "kind": "train"}\n', '{"step": 2, "kind": "train"}\n']
    whole = f"{good[0]}not json\n{good[1]}"
    (tmp_path / "log.jsonl").write_text(whole)
    with pytest.raises(UserError, match=r"log\.jsonl:2"):
        read_log(tmp_path / "log.jsonl")
    opened(tmp_path, start=2).close()
    (said,) = capsys.readouterr().out.splitlines()
    assert "1 of its lines are no records (line 2 is the first): left out" in said
    assert (tmp_path / "log.jsonl").read_text() == "".join(good)
    assert (tmp_path / "log.jsonl.damaged").read_text() == whole


def test_a_log_of_a_run_that_stored_nothing_is_not_dropped_silently(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with opened(tmp_path) as sinks:
        steps(sinks, 1, 7)
    capsys.readouterr()
    opened(tmp_path).close()
    assert capsys.readouterr().out == (
        f"{tmp_path / 'log.jsonl'} of a run that stored no step (it got to step 7) is written anew\n"
    )


def whole_log(tmp_path: Path, last: int) -> tuple[Path, dict[str, Any]]:
    with opened(tmp_path, total=last) as sinks:
        steps(sinks, 1, last)
        written = sinks.written()
    assert json.loads(json.dumps(written)) == written
    return tmp_path / "log.jsonl", written


def test_a_log_as_it_was_written_is_not_complained_of(tmp_path: Path) -> None:
    log, written = whole_log(tmp_path, 12)
    assert log_said(log, written, 12) is None
    log.write_bytes(log.read_bytes() + b'{"step": 13, "kind": "tr')  # what a crash after the checkpoint leaves
    assert log_said(log, written, 12) is None
    assert log_said(log, None, 12) is None  # checkpoints of earlier versions do not say


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda raw: raw.replace(b'"step": 9, "kind": "train"', b'"step": 8, "kind": "train"'), "not what was written.* up to step 8,"),
        (lambda raw: b"".join(raw.splitlines(keepends=True)[:6]), "has [0-9]+ of [0-9,]+ bytes: it is whole up to step 5,"),
        (lambda raw: b"x" + raw[1:], "not what was written: it is whole only after step 12"),
        (lambda raw: b"", "has 0 of .* only after step 12"),
    ],
)  # fmt: skip
def test_a_log_that_differs_is_told_with_what_is_whole(tmp_path: Path, damage: Any, said: str) -> None:
    log, written = whole_log(tmp_path, 12)
    log.write_bytes(damage(log.read_bytes()))
    line = log_said(log, written, 12)
    assert line is not None
    assert re.search(said, line)
    assert "\n" not in line
    log.unlink()
    assert "log.jsonl is missing: it begins anew after step 12" in str(log_said(log, written, 12))


def test_what_a_checkpoint_keeps_of_a_log_is_bounded_and_the_same_after_a_stop(tmp_path: Path) -> None:
    log, straight = whole_log(tmp_path / "straight", 300)
    assert 30 < len(straight["marks"]) <= 64
    with opened(tmp_path / "resumed", total=300) as sinks:
        steps(sinks, 1, 150)
    with opened(tmp_path / "resumed", start=120, total=300) as sinks:
        steps(sinks, 121, 300)
        assert sinks.written() == straight
    raw = bytearray(log.read_bytes())
    raw[len(raw) // 2] ^= 1
    log.write_bytes(raw)
    found = re.search(r"whole up to step (\d+)", str(log_said(log, straight, 300)))
    assert found is not None
    assert 130 < int(found[1]) < 151


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    with opened(tmp_path) as sinks:
        sinks.log(1, "train", {"loss": 0.1})
        assert (tmp_path / "log.jsonl").read_text() == '{"step": 1, "kind": "train", "loss": 0.1}\n'
        sinks.sync()


def test_nonfinite_values_are_valid_json_and_come_back(tmp_path: Path) -> None:
    with opened(tmp_path) as sinks:
        sinks.log(1, "train", {"loss": float("nan"), "grad_norm": np.float32("inf"), "low": -math.inf})

    def refuse(name: str) -> float:
        raise AssertionError(f"bare {name} in JSON")

    text = (tmp_path / "log.jsonl").read_text()
    raw = json.loads(text, parse_constant=refuse)
    assert raw == {"step": 1, "kind": "train", "loss": "nan", "grad_norm": "inf", "low": "-inf"}
    (back,) = read_log(tmp_path / "log.jsonl")
    assert math.isnan(back["loss"])
    assert (back["grad_norm"], back["low"], back["kind"]) == (math.inf, -math.inf, "train")


def test_numpy_scalars_are_logged_and_anything_else_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as sinks:
        sinks.log(1, "train", {"a": np.float64(0.1), "b": np.int64(3), "c": np.asarray(2.5)})
        refused: list[Any] = [{"x": "text"}, {"x": True}, {"step": 1}]
        for bad in refused:
            with pytest.raises(TypeError, match="cannot log"):
                sinks.log(1, "train", bad)
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "kind": "train", "a": 0.1, "b": 3, "c": 2.5}]


def test_console_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"loss": 0.69314, "learning_rate": 4.2149e-05, "grad_norm": 1.25, "skipped": 0, "epoch": 0.3333}
    speeds = {"rows_per_s": 45.67, "tokens_per_s": 12345.6, "step_ms": 1.0, "seconds": 3.0}
    with opened(tmp_path, total=1000) as sinks:
        sinks.timing(20, speeds | {"wait_percent": 0.4})
        sinks.log(20, "train", values)
        sinks.timing(30, speeds | {"wait_percent": 40.0, "mfu_percent": 51.2})
        sinks.log(30, "train", values | {"skipped": 2})
        sinks.log(20, "eval", {"loss": 0.5, "macro_f1": 0.75, "rows": 1234})
        sinks.note("best so far")
        sinks.log(30, "eval", {f"recall_at_{n}": 0.5 for n in range(8)})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "train   20/1000 | loss 0.6931 | rate 4.21e-05 | norm 1.2500 | epoch   0.33 | rows/s   45.7",
        "train   30/1000 | loss 0.6931 | rate 4.21e-05 | norm 1.2500 | skipped      2 | epoch   0.33",
        "eval    20/1000 | loss 0.5000 | macro f1 0.7500 | rows  1,234",
        "best so far",
        "eval    30/1000 | recall at 0 0.5000 | recall at 1 0.5000 | recall at 2 0.5000 | recall at 3 0.5000",
        "                | recall at 4 0.5000 | recall at 5 0.5000 | recall at 6 0.5000 | recall at 7 0.5000",
    ]
    assert max(map(len, lines)) <= 100


def test_progress_bar_shows_steps_loss_and_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with opened(tmp_path, start=2, total=4, config=LogConfig(progress="on")) as sinks:
        steps(sinks, 3, 4)
        assert sinks._bar is not None
        sinks._bar.refresh()
    shown = stderr.getvalue()
    assert "2/4" in shown
    assert "4/4" in shown
    assert "loss 0.16" in shown
    assert "rows/s 1" in shown


def test_no_bar_without_a_terminal(tmp_path: Path) -> None:
    with opened(tmp_path, config=LogConfig(progress="auto")) as sinks:
        assert sinks._bar is None


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        opened(tmp_path / "file")


def test_tensorboard_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match="pip install tensorboardX"):
        opened(tmp_path, config=LogConfig(tensorboard=True, progress="off"))


def scalars_of(folder: Path) -> list[tuple[int, str, float]]:
    """All scalars in TFRecord event files: 8 bytes of length, 4 of checksum, the message, 4 of checksum."""
    from tensorboardX.proto import event_pb2

    message: Any = vars(event_pb2)["Event"]  # protobuf makes the class at run time
    found = []
    for file in sorted(folder.glob("events.*")):
        raw = file.read_bytes()
        while raw:
            (size,) = struct.unpack("<Q", raw[:8])
            event = message.FromString(raw[12 : 12 + size])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            raw = raw[16 + size :]
    return found


def test_tensorboard_files_hold_the_scalars(tmp_path: Path) -> None:
    with opened(tmp_path, config=LogConfig(tensorboard=True, progress="off")) as sinks:
        sinks.timing(3, {"rows_per_s": 8.0})
        sinks.log(3, "train", {"loss": 0.5})
        sinks.log(3, "eval", {"accuracy": 0.75})
    expected = [(3, "timing/rows_per_s", 8.0), (3, "train/loss", 0.5), (3, "eval/accuracy", 0.75)]
    assert scalars_of(tmp_path / "tensorboard") == expected


class FakeWandb(types.ModuleType):
    """Stands in for the wandb package, which the test environment lacks."""

    def __init__(self, failure: str | None = None) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.failure, self.started, self.logged, self.finished = failure, [], [], 0

    def init(self, **options: object) -> FakeWandb:
        if self.failure:
            raise self.errors.Error(self.failure)
        self.started.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_gets_the_same_scalars_and_resumes_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = LogConfig(wandb="demo", progress="off")
    with opened(tmp_path, config=config) as sinks:
        sinks.timing(1, {"rows_per_s": 8.0})
        sinks.log(1, "train", {"loss": 0.5})
    opened(tmp_path, start=1, config=config).close()
    opened(tmp_path, config=config).close()
    assert fake.logged == [(1, {"timing/rows_per_s": 8.0}), (1, {"train/loss": 0.5})]
    assert fake.finished == 3
    assert fake.started[0]["project"] == "demo"
    assert fake.started[0]["config"] == {"train": {"seed": 0}}
    first, resumed, fresh = (start["id"] for start in fake.started)
    assert first == resumed != fresh


def test_wandb_problems_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb("api_key not configured\nmore"))
    with pytest.raises(UserError, match=r"log\.wandb=demo: api_key not configured \("):
        opened(tmp_path, config=LogConfig(wandb="demo", progress="off"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        opened(tmp_path, config=LogConfig(wandb="demo", progress="off"))


def test_clock_counts_waiting_and_leaves_pauses_out() -> None:
    time = 0.0

    def now() -> float:
        return time

    clock = Clock(now)
    with clock.waiting():
        time += 1.0
    time += 3.0
    with clock.paused():
        time += 100.0
    speeds = clock.lap(steps=2, rows=8, tokens=200)
    wanted = {"rows_per_s": 2.0, "tokens_per_s": 50.0, "step_ms": 2000.0, "wait_percent": 25.0, "seconds": 4.0}
    assert speeds == wanted
    time += 2.0
    assert clock.lap(steps=4, rows=8, tokens=20, flops=3e12, peak=10e12) == {
        "rows_per_s": 4.0,
        "tokens_per_s": 10.0,
        "step_ms": 500.0,
        "wait_percent": 0.0,
        "seconds": 2.0,
        "mfu_percent": 15.0,
    }
    assert clock.waited == 1.0
    assert math.isfinite(clock.lap(0, 0, 0)["rows_per_s"])


def test_imports_are_cheap() -> None:
    code = "import sys, jaxft.reporting.sinks, jaxft.reporting.report; print([n for n in {names} if n in sys.modules])"
    names = ("matplotlib", "plotext", "tqdm", "tensorboardX", "wandb", "jax", "numpy")
    done = subprocess.run([sys.executable, "-c", code.format(names=names)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
