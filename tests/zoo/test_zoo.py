"""The zoo of folders: a cross-section in every run of the tests, all of it with `make zoo` or as a slow test."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from zoo.case import Case
from zoo.run import OUTCOMES, all_cases, outcome_of

CASES = all_cases()


def _judge(case: Case, folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers warns of much that is meant here
        outcome, text = outcome_of(case, folder / "folder")
    assert outcome in OUTCOMES[:2], text


@pytest.mark.parametrize("case", [c for c in CASES if c.quick], ids=lambda case: case.name)
def test_cross_section(case: Case, tmp_path: Path) -> None:
    _judge(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if not c.quick], ids=lambda case: case.name)
def test_all(case: Case, tmp_path: Path) -> None:
    _judge(case, tmp_path)


def test_a_fault_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that loses a bias is silently wrong: the zoo must say so."""
    from jaxft.hub.stored import copy_rounded as right

    def wrong(out: np.ndarray, source: np.ndarray, name: str, path: Path | str) -> None:
        right(out, source, name, path)
        if name.endswith("LayerNorm.bias"):
            out[...] = 0

    monkeypatch.setattr("jaxft.hub.stored.copy_rounded", wrong)
    case = next(c for c in CASES if c.name == "bert-classes/safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome, text = outcome_of(case, tmp_path / "folder")
    assert outcome == "WRONG"
    assert "differs by" in text
