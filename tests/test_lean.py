"""What only some users need is imported, and asked for, only where it is used; its absence ends nothing that is finished."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_run
from test_report import CONFUSION, LABELS, log_of, metrics_of

from jaxft.reporting.report import report_text, write_report

OPTIONAL = ("matplotlib", "PIL", "plotext", "pyarrow", "tensorflow_datasets", "datasets", "wandb", "tensorboardX")


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "PIL", "PIL.Image", "plotext"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("without_plots")
def test_a_report_without_pictures(tmp_path: Path) -> None:
    assert [path.name for path in write_report(tmp_path, metrics_of(CONFUSION), LABELS, log_of())] == ["metrics.json"]
    text = report_text(metrics_of(CONFUSION), LABELS, log_of())
    assert text.count("no curves: ") == 1
    assert text.count("pip install 'jaxft[plots]'") == 1


@pytest.mark.usefixtures("without_plots")
def test_a_finished_training_says_what_it_could_not_draw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = tiny_run.overrides(tmp_path, "train.steps=2", f"train.out={tmp_path / 'run'}")
    code, said, _ = tiny.run(capsys, "train", *arguments)
    assert code == 0
    assert "no PNGs: " in said
    assert "pip install 'jaxft[plots]'" in said
    assert "loaded back: parameters bit-equal" in said
    assert not list((tmp_path / "run").glob("*.png"))


@pytest.mark.usefixtures("without_plots")
def test_a_picture_that_was_asked_for_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("show-config", "--plot-schedule", tmp_path / "rate.png", "--steps", "5")
    assert "no PNGs: " in tiny.refusal(capsys, *asked)


def test_no_module_of_jaxft_needs_them() -> None:
    script = (
        f"import sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\n"
        "import pkgutil, importlib, jaxft\n"
        "for m in pkgutil.walk_packages(jaxft.__path__, 'jaxft.'):\n"
        "    m.name.endswith('__main__') or importlib.import_module(m.name)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""})
