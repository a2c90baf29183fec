"""What a run's time went to adds up, traces open, and useful FLOPs leave padding out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from tiny import refusal, run
from tiny_run import config_of, overrides

from jaxft.data.batch import text_shape
from jaxft.machine import platform
from jaxft.machine.chips import peak_of
from jaxft.training.flops import UsefulFlops, model_flops
from jaxft.training.goodput import Lap, lap_of
from jaxft.training.setup import Times, prepare


@pytest.mark.slow
def test_a_profiled_run_leaves_a_trace_and_its_time_by_cause(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    changes = (f"train.out={out}", "train.profile=3:4", "train.steps=8", "train.export=false")
    code, text, err = run(capsys, "train", *overrides(tmp_path, *changes))
    assert code == 0, err
    assert f"wrote a trace of steps 3:4 to {out / 'profile'}" in text
    (trace,) = out.glob("profile/plugins/profile/*/*.xplane.pb")
    planes = {plane.name for plane in jax.profiler.ProfileData.from_file(str(trace)).planes}
    assert any("CPU" in name or "host" in name.lower() for name in planes)
    told = json.loads((out / "goodput.json").read_text())
    seconds = told["seconds"]
    assert {"import", "data", "compile", "steps", "waiting for data", "evaluation", "checkpoint"} <= seconds.keys()
    assert min(seconds.values()) >= 0
    assert told["goodput"] == pytest.approx(seconds["steps"] / sum(seconds.values()))
    assert f"goodput {100 * told['goodput']:.0f} % of" in text
    timing = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()]
    assert all(line["step_ms"] > 0 for line in timing)
    # Of a CPU, no peak is known: nothing is claimed.
    assert not any("mfu_percent" in line for line in timing)


@pytest.mark.slow
def test_a_profiled_run_ends_well_beside_an_installed_libtpu(tmp_path: Path) -> None:
    # As users start it: nothing in the environment says that there is no TPU. (With libtpu loaded, the trace was a
    # segmentation fault.)
    changes = (f"train.out={tmp_path / 'run'}", "train.profile=1:2", "train.steps=2", "train.export=false")
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "jaxft", "train", *overrides(tmp_path, *changes)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((tmp_path / "run").glob("profile/plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize(
    ("libtpu", "plugins", "platforms"),
    [
        (False, (), None),
        (True, (), "cpu"),
        (True, ("xla_cuda13",), "cuda,cpu"),
        (True, ("xla_cuda12", "xla_rocm7"), None),
    ],
)
def test_only_tpus_are_not_looked_for(
    monkeypatch: pytest.MonkeyPatch, libtpu: bool, plugins: tuple[str, ...], platforms: str | None
) -> None:
    entries = [SimpleNamespace(name=name) for name in plugins]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if libtpu else None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    assert platform.platforms_without_tpu() == platforms


@pytest.mark.parametrize("span", ["3", "0:4", "5:3", "a:b", "3:"])
def test_spans_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], span: str) -> None:
    assert "give START:STOP" in refusal(capsys, "train", *overrides(tmp_path, f"train.profile='{span}'"))


def test_useful_flops_leave_padding_out_and_make_the_mfu(tmp_path: Path) -> None:
    ready = prepare(config_of(tmp_path), lambda _: None, Times())
    shape, useful = text_shape(8, 12), UsefulFlops(ready)
    whole = model_flops(ready, shape)
    assert useful.of(shape, 96) == pytest.approx(whole.total)
    assert useful.of(shape, 48) == pytest.approx(whole.dense / 2 + whole.attention / 4)
    lap = Lap(useful, 1e12)
    lap.add(8, 96, shape)
    lap.add(8, 48, shape)
    speeds = lap.speeds()
    done = useful.of(shape, 96) + useful.of(shape, 48)
    assert speeds["mfu_percent"] == pytest.approx(100 * done / speeds["seconds"] / 1e12)
    assert lap_of(ready).peak is None


def test_peaks_by_device_kind() -> None:
    assert peak_of("TPU v5 lite") == 197e12
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("cpu") is None
