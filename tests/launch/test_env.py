"""launch/env.sh: what it sets, what it leaves; every shell script is clean by shellcheck."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Recorder

ROOT = Path(__file__).parents[2]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch" / "slurm.sbatch"]
GPU = [
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_enable_pipelined_all_gather=true",
    "--xla_gpu_enable_pipelined_all_reduce=true",
]


def sourced(env: dict[str, str], **more: str) -> subprocess.CompletedProcess[str]:
    command = 'set -euo pipefail; source launch/env.sh; echo "${XLA_FLAGS-unset} ${LIBTPU_INIT_ARGS-unset}"'
    env = env | {"PYTHON": sys.executable} | more
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=20)


def test_shellcheck() -> None:
    # SC2329, "never invoked": it does not see that a trap calls a function.
    command = [
        str(Path(sys.executable).with_name("shellcheck")),
        "--external-sources",
        "--exclude=SC2329",
        *map(str, SCRIPTS),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_end_in_one_command_and_hold_no_hyper_parameters(script: Path) -> None:
    code = [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
    started = [line for line in code if "-m jaxft" in line]
    assert all('"$PYTHON" -m jaxft train "$@"' in line for line in started)
    assert script.name == "env.sh" or started
    settings = [line for line in code if re.search(r"\b(train|data|optim|model|mesh|eval|checkpoint)\.\w+=", line)]
    assert settings == []


@pytest.mark.parametrize("platform", [{}, {"JAXFT_PLATFORM": "cpu"}, {"JAXFT_PLATFORM": "tpu"}])
def test_nothing_is_set_for_cpu_and_tpu(clean_env: dict[str, str], platform: dict[str, str]) -> None:
    assert sourced(clean_env, **platform).stdout == "unset unset\n"


def test_flags_for_gpu_after_those_of_the_user(clean_env: dict[str, str]) -> None:
    assert sourced(clean_env, JAXFT_PLATFORM="gpu").stdout.split() == [*GPU, "unset"]
    one = sourced(clean_env, JAXFT_PLATFORM="gpu", XLA_FLAGS="--xla_dump_to=/x").stdout.split()
    assert one == ["--xla_dump_to=/x", *GPU, "unset"]


@pytest.mark.parametrize("form", ["=false", "", "=true --xla_dump_to=/x"])
def test_a_flag_of_the_user_stays(clean_env: dict[str, str], form: str) -> None:
    own = f"--xla_gpu_enable_latency_hiding_scheduler{form}"
    assert sourced(clean_env, JAXFT_PLATFORM="gpu", XLA_FLAGS=own).stdout.split() == [*own.split(), *GPU[1:], "unset"]


def test_sourced_twice_sets_once(clean_env: dict[str, str]) -> None:
    assert sourced(clean_env, JAXFT_PLATFORM="gpu", XLA_FLAGS=" ".join(GPU)).stdout.split() == [*GPU, "unset"]


def test_what_cannot_be(clean_env: dict[str, str]) -> None:
    done = sourced(clean_env, JAXFT_PLATFORM="rocm")
    assert (done.returncode, done.stderr) == (2, "launch: JAXFT_PLATFORM=rocm: expected cpu, gpu or tpu\n")
    done = sourced(clean_env, PYTHON="/no/python")
    assert (done.returncode, done.stderr) == (2, "launch: /no/python not found; set PYTHON=/path/to/python\n")


@pytest.fixture
def bare(tmp_path: Path, clean_env: dict[str, str]) -> dict[str, str]:
    """An environment whose PATH has what env.sh needs and no Python; launch/ lies in ``tmp_path``."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "readlink"):
        (tools / name).symlink_to(str(shutil.which(name)))
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    return clean_env | {"PATH": str(tools)}


def _python(path: Path, has_jaxft: bool = True) -> Path:
    """A program in place of a Python, whose `import jaxft` works or not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\nexit {0 if has_jaxft else 1}\n")
    path.chmod(0o700)
    return path


def _found(tmp_path: Path, env: dict[str, str], folder: str = "elsewhere") -> subprocess.CompletedProcess[str]:
    (tmp_path / folder).mkdir(exist_ok=True)
    command = f'set -euo pipefail; source {tmp_path}/launch/env.sh; command -v "$PYTHON"'
    bash = str(shutil.which("bash"))
    return subprocess.run([bash, "-c", command], cwd=tmp_path / folder, env=env, capture_output=True, text=True)


def test_the_python_of_the_jaxft_on_the_path_comes_first(tmp_path: Path, bare: dict[str, str]) -> None:
    own = _python(tmp_path / "installed/python")
    (tmp_path / "installed/jaxft").write_text("")
    (tmp_path / "installed/jaxft").chmod(0o700)
    _python(tmp_path / ".venv/bin/python")
    assert _found(tmp_path, bare | {"PATH": f"{bare['PATH']}:{own.parent}"}).stdout == f"{own}\n"
    # As pipx has it: a link in a folder without a Python.
    (tmp_path / "links").mkdir()
    (tmp_path / "links/jaxft").symlink_to(own.parent / "jaxft")
    assert _found(tmp_path, bare | {"PATH": f"{bare['PATH']}:{tmp_path / 'links'}"}).stdout == f"{own}\n"


def test_then_that_of_a_venv_beside_the_launchers_or_here(tmp_path: Path, bare: dict[str, str]) -> None:
    _python(tmp_path / "tools/python", has_jaxft=False)
    here = _python(tmp_path / "elsewhere/.venv/bin/python")
    assert _found(tmp_path, bare).stdout == ".venv/bin/python\n"
    beside = _python(tmp_path / ".venv/bin/python")
    assert Path(_found(tmp_path, bare).stdout.strip()).resolve() == beside
    beside.unlink()
    here.unlink()
    other = _python(tmp_path / "tools/python3")
    assert _found(tmp_path, bare).stdout == f"{other}\n"


def test_without_a_python_that_has_jaxft_it_says_what_to_do(tmp_path: Path, bare: dict[str, str]) -> None:
    _python(tmp_path / "tools/python", has_jaxft=False)
    done = _found(tmp_path, bare)
    assert done.returncode == 2
    assert done.stderr.startswith("launch: no Python here has jaxft: run `make train` or pip install it")
    assert done.stderr.count("\n") == 1


def test_jax_accepts_the_flags_for_gpu(clean_env: dict[str, str]) -> None:
    """An unknown one in XLA_FLAGS ends the process, whatever its devices."""
    program = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    known, unknown = (
        subprocess.run(
            [sys.executable, "-c", program],
            env=clean_env | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
            capture_output=True,
            text=True,
            timeout=60,
        )
        for flags in (" ".join(GPU), "--xla_gpu_no_such_flag=true")
    )
    assert (known.returncode, known.stdout) == (0, "2\n"), known.stderr
    assert unknown.returncode != 0


def test_local_starts_the_processes_asked_for(clean_env: dict[str, str], recorder: Recorder) -> None:
    env = clean_env | {"PYTHON": str(recorder.program)}
    command = [str(ROOT / "launch" / "local.sh"), "3", "run.yaml", "a.b=[1, 2]"]
    # A socket of its own is found by asking PYTHON, which is the recorder here.
    env["JAX_COORDINATOR_ADDRESS"] = "127.0.0.1:9999"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "out of 0\n"
    assert sorted(done.stderr.splitlines()) == ["[1] error of 1", "[2] error of 2", "error of 0"]
    assert [record["arguments"] for record in recorder.records()] == [
        ["-m", "jaxft", "train", "run.yaml", "a.b=[1, 2]"]
    ] * 3
    assert [env["JAX_PROCESS_ID"] for env in recorder.environs()] == ["0", "1", "2"]
    assert {env["JAX_NUM_PROCESSES"] for env in recorder.environs()} == {"3"}


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "run.yaml"], ["run.yaml", "2"], ["-1", "run.yaml"]])
def test_wrong_usage_of_local(clean_env: dict[str, str], arguments: list[str]) -> None:
    command = [str(ROOT / "launch" / "local.sh"), *arguments]
    done = subprocess.run(
        command, env=clean_env | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stderr) == (2, "usage: launch/local.sh PROCESSES RUN.yaml [key=value ...]\n")
