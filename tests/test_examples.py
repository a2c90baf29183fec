"""docs/add_a_task.md and docs/add_a_model.md: the modules that they show lie outside of jaxft, train, and answer."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny

import jaxft
from jaxft import models
from jaxft.models.example import example_batch
from jaxft.models.initial import init_params

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"^```python(?: file=(\S+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model, in which the pages' modules can be imported; they are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny.make_folder(tmp_path / "my-model", "classification", tiny.LABELS, num_hidden_layers=1)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
        del sys.modules[name]


def write_modules(folder: Path, page: str) -> str:
    """Writes the modules of a page, and gives the code that uses them."""
    code = []
    for name, block in _BLOCK.findall((DOCS / page).read_text()):
        if name:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(block)
        elif "import jaxft" in block:
            code.append(block)
    assert len(code) == 1
    return code[0]


def test_the_task_of_the_page_trains_and_answers(outside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = [(text, str(1 + len(text.split()) % 3)) for text, _ in tiny.rows(32)]
    tiny.write_csv(outside / "stars.csv", table)
    names: dict[str, object] = {}
    exec(write_modules(outside, "add_a_task.md"), names)
    run = names["run"]
    assert isinstance(run, jaxft.Trained)
    assert set(run.metrics) >= {"off", "loss"}
    assert 0 <= run.metrics["off"] <= 2
    assert run.labels == ("1", "2", "3")
    code, out, error = tiny.run(capsys, "predict", run.folder, "--text", "the cat")
    assert code == 0, error
    assert json.loads(out)["stars"] in run.labels
    message = tiny.refusal(capsys, "train", "task.name=mypkg.stars", "task.distance=-1", "data.train=stars.csv")
    assert message == "task.distance=-1.0: must be at least 0"


def test_the_family_of_the_page_trains_and_comes_back(outside: Path) -> None:
    tiny.write_csv(outside / "reviews.csv", tiny.rows(32))
    names: dict[str, object] = {}
    exec(write_modules(outside, "add_a_model.md"), names)
    run, params = names["run"], names["params"]
    assert isinstance(run, jaxft.Trained)
    for one, other in zip(jax.tree.leaves(run.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert json.loads((run.folder / "export/config.json").read_text())["model_type"] == "plain"


def test_the_family_of_the_page_does_not_see_padding(outside: Path) -> None:
    write_modules(outside, "add_a_model.md")
    family = models.family("mypkg.plain")
    model: Any = family.Model(family.TINY, "classification")
    params, batch = init_params(model, 0), example_batch(family.facts(family.TINY), 3, length=8)
    run = jax.jit(lambda tokens: model.apply({"params": params}, tokens, batch["mask"]).logits)
    other = np.where(batch["mask"], batch["tokens"], 7)
    assert (other != batch["tokens"]).any()
    np.testing.assert_array_equal(run(batch["tokens"]), run(other))
