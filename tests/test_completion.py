"""What the shell completes, what --help names, and what show-config refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from tiny import refusal, run

from jaxft.__main__ import COMMANDS
from jaxft.cli.completion import choices, script
from jaxft.cli.train import MAIN_KEYS

Capture = pytest.CaptureFixture[str]
KEYS = dict(choices())


def completed(*words: str) -> set[str]:
    """What bash offers for the last of the words, which it has taken apart as it does."""
    line = " ".join(f"'{word}'" for word in words)
    text = (
        f'{script("bash")}\nCOMP_WORDS=({line}) COMP_CWORD={len(words) - 1}\n_jaxft\nprintf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_keys_and_values() -> None:
    assert completed("jaxft", "") == set(COMMANDS)
    assert completed("jaxft", "tr") == {"train", "transcribe"}
    assert completed("jaxft", "plan", "--") == {"--help", "--topology", "--fit", "--llo", "--analytic", "--json"}
    assert completed("jaxft", "train", "run.yaml", "optim.l") == {"optim.learning_rate=", "optim.layer_decay="}
    assert completed("jaxft", "train", "") == {f"{key}=" for key in KEYS}
    assert completed("jaxft", "train", "model.remat", "=") == {"none", "full", "dots", "offload"}
    assert completed("jaxft", "train", "model.remat", "=", "d") == {"dots"}
    assert completed("jaxft", "train", "train.export", "=") == {"true", "false"}
    assert completed("jaxft", "train", "model.gradient_dtype", "=", "b") == {"bfloat16"}
    assert completed("jaxft", "train", "data.train", "=", "my") == set()  # then bash offers files


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_takes_its_script() -> None:
    done = subprocess.run(["zsh", "-c", script("zsh")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_prints_the_script(capsys: Capture) -> None:
    code, out, _ = run(capsys, "completion", "zsh")
    assert code == 0
    assert out == script("zsh") + "\n"
    assert out.startswith("autoload -U +X bashcompinit && bashcompinit\n_jaxft() {")


def test_help_names_the_main_keys() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jaxft", "train", "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert set(MAIN_KEYS) <= set(KEYS)
    for key, meaning in MAIN_KEYS.items():
        assert any(line.split() == [key, *meaning.split()] for line in done.stdout.splitlines()), key
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("eval.metric=acc", "eval.metric='acc': the task has accuracy, "),
        ("task.name=masked_lm eval.metric=macro_f1", "eval.metric='macro_f1': the task has "),
        ("task.name=clasification", "task.name='clasification': did you mean 'classification'?"),
        ("model.family=brt", "brt"),
        ("model.family=bert model.arch.hidden_siz=4", "hidden_siz"),
        ("mesh.fsdp=3", "train.batch_size / train.accumulation = 32 cannot be split 3 ways"),
        ("mesh.data=-1 mesh.fsdp=-1", "mesh: only one size may be -1"),
        ("mesh.context=3", "cannot be split 3 ways (mesh context)"),
        ("mesh.rules={vocabulary: []}", "mesh.rules.vocabulary: unknown logical axis"),
        ("data.packing=best_fits", "data.packing"),
        ("train.steps=20 optim.warmup_steps=50", "optim.warmup_steps=50: longer than the whole run of 20 steps"),
        ("task.name=masked_lm eval.metric=loss task.label_smoothing=0.1", "label_smoothing"),
    ],
)
def test_show_config_refuses_what_train_would(capsys: Capture, overrides: str, message: str) -> None:
    parts = overrides.replace("{vocabulary: []}", "{vocabulary:~[]}").split()
    assert message in refusal(capsys, "show-config", *(part.replace("~", " ") for part in parts))


def test_show_config_accepts_what_only_data_can_decide(capsys: Capture) -> None:
    given = ("task.class_weights={bad: 2.0}", "data.labels=[good, bad]", "mesh.tensor=2", "mesh.fsdp=4")
    assert run(capsys, "show-config", *given)[0] == 0
