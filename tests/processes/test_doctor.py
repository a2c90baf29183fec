"""`jaxft doctor` on this machine, and the things that it is there to notice."""

from __future__ import annotations

import re

import pytest
from tiny import refusal, run

from jaxft.cli import doctor

Capture = pytest.CaptureFixture[str]
QUICK = ("doctor", "--size", "64", "--megabytes", "1")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "JAX_COORDINATOR_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_what_it_says_of_this_machine(alone: pytest.MonkeyPatch, capsys: Capture) -> None:
    alone.setattr("os.path.exists", lambda path: False)  # whatever devices this machine has beside its CPU
    code, out, err = run(capsys, *QUICK)
    assert code == 0, err
    assert "cluster: one process" in out
    assert "devices: 8 (cpu), 8 of this process" in out
    assert re.search(r"matmul 64 x 64: float32 [\d.]+ TFLOP/s, bfloat16 [\d.]+ TFLOP/s", out)
    assert re.search(r"all-reduce of 1 MB over 8 devices: [\d.]+ ms, [\d.]+ GB/s sent per device", out)
    assert "XLA_FLAGS=" in out
    assert out.rstrip().endswith("nothing looks wrong")


def test_an_allocation_without_a_step(alone: pytest.MonkeyPatch, capsys: Capture) -> None:
    alone.setenv("SLURM_JOB_ID", "7")
    alone.setenv("SLURM_NTASKS", "4")
    code, out, _ = run(capsys, *QUICK)
    assert code == 1
    assert (
        "looks wrong: this allocation is for 4 tasks, but this is one process outside of any step: start with srun"
        in out
    )


def test_an_accelerator_that_is_not_used(alone: pytest.MonkeyPatch, capsys: Capture) -> None:
    alone.setattr("os.path.exists", lambda path: path == "/dev/nvidia0")
    code, out, _ = run(capsys, *QUICK)
    assert code == 1
    assert "looks wrong: there is an accelerator, but jax runs on the CPU" in out


def test_wrong_sizes_and_half_a_cluster(alone: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert "--size and --megabytes must be at least 1" in refusal(capsys, "doctor", "--size", "0")
    alone.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    assert "JAX_COORDINATOR_ADDRESS set, but not JAX_NUM_PROCESSES and JAX_PROCESS_ID" in refusal(capsys, *QUICK)


def test_versions_that_the_tests_have_not_run_with(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"jax": "0.12.0.1", "flax": "0.12.7", "optax": "0.3.0.dev1", "numpy": doctor.TESTED["numpy"][0]}
    monkeypatch.setattr(doctor, "_version", found.get)
    assert list(doctor._untested()) == [
        "untested: flax 0.12.7 is older than what the tests have run with (0.12.8 to 0.12.12)",
        "untested: optax 0.3.0.dev1 is newer than what the tests have run with (0.2.8 to 0.2.8)",
    ]
