"""Tasks and families from other packages: what they must define, and who may name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from jaxft import models, tasks
from jaxft.errors import UserError


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path, for modules that only one test sees."""
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    folder = tmp_path / f"path/pkg_{tmp_path.name.replace('-', '_')}"
    folder.mkdir(parents=True)
    return folder


def test_a_module_that_has_everything_is_taken(package: Path) -> None:
    (package / "task.py").write_text("from jaxft.tasks.classification import *\n")
    (package / "family.py").write_text("from jaxft.models.families.bert import *\n")
    own: Any = tasks.task(f"{package.name}.task")
    family: Any = models.family(f"{package.name}.family")
    assert own.__name__ == f"{package.name}.task"
    assert family.__name__ == f"{package.name}.family"
    assert tasks.task_of_head("classification", own.__name__) is own
    assert tasks.task_of_head("classification", "classification") is tasks.task("classification")
    assert tasks.task_of_head("masked_lm", own.__name__) is tasks.task("masked_lm")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("", "lacks Task, LONG_TEXTS, PACKING, columns, study, encode, fields, make_task, Task.head"),
        ("from jaxft.tasks.classification import *\ndel make_task", "lacks make_task; docs/add_a_task.md says"),
        (
            "from jaxft.tasks.classification import *\nclass Task:\n head = 'classification'\n",
            "lacks Task.prepare, Task.weight, Task.learnable, Task.sums",
        ),
        ("import no_such_package", "cannot be imported: No module named 'no_such_package'"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero (task.py:1)"),
        ("def", "cannot be imported: SyntaxError"),
    ],
)
def test_a_task_that_cannot_be_used_is_told_in_one_line(package: Path, code: str, reason: str) -> None:
    (package / "task.py").write_text(code)
    with pytest.raises(UserError) as caught:
        tasks.task(f"{package.name}.task")
    assert str(caught.value).startswith(f"task.name={package.name}.task: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_a_family_that_cannot_be_used_is_told_in_one_line(package: Path) -> None:
    (package / "family.py").write_text("from jaxft.models.families.bert import *\ndel hf_layout\n")
    with pytest.raises(UserError, match=r"model\.family=.*lacks hf_layout; docs/add_a_model.md"):
        models.family(f"{package.name}.family")


@pytest.mark.parametrize("name", ["no_such.task", "jaxft.tasks.no_such"])
def test_a_module_that_is_not_there(name: str) -> None:
    with pytest.raises(UserError, match=r"there is no module .*PYTHONPATH"):
        tasks.task(name)


@pytest.mark.parametrize("name", ["a..b", ".a", "a.", "os.path;x", "a b.c", "../a.py"])
def test_what_is_no_module_name(name: str) -> None:
    for find in (tasks.task, models.family):
        with pytest.raises(UserError, match="not the name of a module"):
            find(name)


def test_the_command_line_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_csv(tmp_path / "rows.csv", tiny.rows(8))
    common = ("train", f"data.train={data}", f"train.out={tmp_path / 'run'}")
    folder = tiny.make_folder(tmp_path / "model")
    assert "no module 'mypkg'" in tiny.refusal(capsys, *common, f"model.init={folder}", "task.name=mypkg.task")
    assert "no module 'mypkg'" in tiny.refusal(capsys, *common, f"model.init={folder}", "model.family=mypkg.family")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["predict", "convert", "eval"])
def test_what_a_model_folder_says_is_never_imported(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (package / "evil.py").write_text(
        f"open({str(tmp_path / 'imported')!r}, 'w')\nfrom jaxft.models.families.bert import *\n"
    )
    folder = tiny.make_folder(tmp_path / "model", "classification", tiny.LABELS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": f"{package.name}.evil"}))
    rest = {"predict": ["--text", "a"], "convert": [tmp_path / "other"], "eval": [f"data.eval={tmp_path / 'x.csv'}"]}
    assert "is not supported" in tiny.refusal(capsys, command, folder, *rest[command])
    assert not (tmp_path / "imported").exists()
