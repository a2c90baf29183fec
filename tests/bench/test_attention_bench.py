"""`jaxft bench attention` as its users run it: tables, files, ratios, refusals."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from jaxft.__main__ import main
from jaxft.bench import attention as bench
from jaxft.bench.attention_case import Case
from jaxft.bench.results import read_results, text_of

pytestmark = pytest.mark.usefixtures("painted")
SMALL = ["bench", "attention", "--shape", "1x4/2x16", "--turns", "1", "--turn-seconds", "0.01"]
HAS_TORCH = importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench")
    arguments = ["--lengths", "24", "40", "--backends", "blockwise", "--hidden", "segments", "--causal"]
    assert main([*SMALL, *arguments, "--out", str(out)]) == 0
    return out


def test_every_contender_is_timed_in_both_passes(folder: Path) -> None:
    tree = json.loads((folder / "attention.json").read_text())
    names = {"blockwise"} | ({"torch-sdpa"} if HAS_TORCH else set())
    assert {(r["case"]["backend"], r["case"]["length"]) for r in tree["results"]} == {
        (name, length) for name in names for length in (24, 40)
    }
    assert tree["machine"]["jax"]
    for result in read_results(folder / "attention.json").values():
        assert 0 < result.forward.least <= result.forward.median <= result.forward.most
        assert result.both.median > 0
        assert result.matmul_peak > 1e8
        assert result.backend in ("native", "blockwise", "xla", "jax", "torch-sdpa")


def test_files_for_spreadsheets_and_eyes(folder: Path) -> None:
    lines = list(csv.DictReader((folder / "attention.csv").read_text().splitlines()))
    assert len(lines) == 2 * len(read_results(folder / "attention.json"))
    assert {line["pass"] for line in lines} == {"forward", "both"}
    assert all(float(line["median_ms"]) > 0 for line in lines)
    assert (folder / "attention.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_to_an_earlier_run(folder: Path) -> None:
    results = read_results(folder / "attention.json")
    faster = {
        key: dataclasses.replace(r, both=dataclasses.replace(r.both, median=2 * r.both.median))
        for key, r in results.items()
    }
    text = text_of(list(results.values()), faster)
    both = [line.split() for line in text.splitlines() if " both " in line]
    assert both
    assert {line[-1] for line in both} == {"0.50"}
    assert "/ before" in text
    assert ("/ torch" in text) == HAS_TORCH


def test_useful_flops() -> None:
    case = Case("xla", rows=2, heads=3, key_heads=3, length=8, size=4)
    assert case.flops("forward") == 4 * 2 * 3 * 8 * 8 * 4
    assert case.flops("both") == 3 * case.flops("forward")
    assert dataclasses.replace(case, causal=True).flops("forward") == 4 * 2 * 3 * 36 * 4


def test_what_cannot_run_is_told_and_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(bench, "available_memory", lambda: 10_000_000)
    assert main([*SMALL, "--lengths", "2048", "--backends", "xla", "--no-torch"]) == 2
    shown = capsys.readouterr()
    assert "xla at 2048: left out, may need 0.3 GiB of 0.0 that are free" in shown.out
    assert "nothing could be measured" in shown.err


def test_a_backend_that_refuses_says_why(capsys: pytest.CaptureFixture) -> None:
    assert main([*SMALL, "--lengths", "16", "--backends", "splash", "--no-torch"]) == 2
    assert "splash at 16: left out: model.attention=splash: splash runs on TPUs only" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--backends", "blokwise"], "blockwise"),
        (["--shape", "2x12"], "ROWSxHEADSxSIZE"),
        (["--shape", "2x12/5x64"], "key heads must divide heads"),
        (["--lengths", "0"], "at least 1"),
        (["--dropout", "1"], "less than 1"),
        (["--turns", "0"], "above 0"),
        (["--backends", "torch-eager", "--no-torch"], "torch is "),
        (["--against", "pyproject.toml"], "not a result of jaxft bench attention"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], reason: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "attention", *arguments]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
