from __future__ import annotations

from pathlib import Path

import pytest

from jaxft.checkpoint import Checkpoints


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep=2)
