"""launch/slurm.sbatch: on a stand-in for SLURM (srun_stub), and on a real cluster of two nodes where Slurm is installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from quick_xla import quick_flags
from tiny_run import overrides

from jaxft.machine.processes import detect

from .conftest import Recorder

ROOT = Path(__file__).parents[2]
SCRIPT = "launch/slurm.sbatch"
COMMANDS = ("sbatch", "srun", "scancel", "scontrol")


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def stub(tmp_path: Path, clean_env: dict[str, str]) -> dict[str, str]:
    """An environment in which SLURM's commands are srun_stub, for two nodes n1 and n2."""
    commands, state = tmp_path / "bin", tmp_path / "state"
    commands.mkdir()
    state.mkdir()
    for name in COMMANDS:
        (commands / name).write_text(f'#!/bin/sh\nexec {sys.executable} -P {commands}/stub/{name} "$@"\n')
        (commands / name).chmod(0o700)
    (commands / "stub").mkdir()
    for name in COMMANDS:
        (commands / "stub" / name).symlink_to(ROOT / "tests" / "launch" / "srun_stub")
    return clean_env | {"PATH": f"{commands}:{clean_env['PATH']}", "STUB_STATE": str(state)}


def sbatch(env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    out = subprocess.PIPE
    return subprocess.Popen(["sbatch", *arguments], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, text=True)


def test_tasks_and_what_jaxft_makes_of_them(stub: dict[str, str], recorder: Recorder) -> None:
    env = stub | {"PYTHON": str(recorder.program)}
    text, _ = (running := sbatch(env, "--nodes=2", SCRIPT, "run.yaml", "a.b=[1, 2]")).communicate(timeout=30)
    assert running.returncode == 0, text
    assert sorted(text.splitlines()) == ["0: error of 0", "0: out of 0", "1: error of 1", "1: out of 1"]
    for index, record in enumerate(recorder.records()):
        assert record["arguments"] == ["-m", "jaxft", "train", "run.yaml", "a.b=[1, 2]"]
        # Although SLURM runs a copy of the script, in a folder of its own.
        assert record["folder"] == str(ROOT)
        cluster = detect(record["environ"])
        assert cluster is not None
        assert (cluster.kind, cluster.index, cluster.count) == ("slurm", index, 2)
        assert (cluster.address, cluster.hosts) == ("n1:61586", ("n1", "n2"))
        assert cluster.local_devices is None
    assert len(recorder.records()) == 2


def test_several_tasks_on_a_node(stub: dict[str, str], recorder: Recorder) -> None:
    env = stub | {"PYTHON": str(recorder.program), "SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}
    running = sbatch(env, "--nodes=2", "--ntasks-per-node=2", SCRIPT, "run.yaml")
    text, _ = running.communicate(timeout=30)
    assert running.returncode == 0, text
    found = [detect(environ) for environ in recorder.environs()]
    assert [one and (one.index, one.local_devices) for one in found] == [
        (0, (0, 1)),
        (1, (2, 3)),
        (2, (0, 1)),
        (3, (2, 3)),
    ]
    assert found[0] is not None
    assert found[0].hosts == ("n1", "n1", "n2", "n2")


def test_the_batch_script_itself_is_no_process_of_the_run(stub: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(
        "#!/bin/bash\n#SBATCH --job-name=x --nodes=2 --ntasks-per-node=1\n"
        f"{sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'\n"
    )
    text, _ = sbatch(stub, str(script)).communicate(timeout=30)
    assert json.loads(text)["SLURM_NTASKS"] == "2"
    assert detect(json.loads(text)) is None


def test_exit_code_of_the_worst_task(stub: dict[str, str], recorder: Recorder) -> None:
    running = sbatch(stub | {"PYTHON": str(recorder.program)}, "--nodes=2", SCRIPT, "exit=2")
    text, _ = running.communicate(timeout=30)
    assert running.returncode == 2, text
    assert not (Path(stub["STUB_STATE"]) / "requeued").exists()


def test_near_the_time_limit_all_save_and_the_job_comes_back(stub: dict[str, str], recorder: Recorder) -> None:
    state = Path(stub["STUB_STATE"])
    running = sbatch(stub | {"PYTHON": str(recorder.program)}, "--nodes=2", SCRIPT, "wait")
    until(lambda: (state / "tasks.pid").exists() and len(recorder.records()) == 2)
    os.kill(int((state / "batch.pid").read_text()), signal.SIGUSR1)
    text, _ = running.communicate(timeout=30)
    assert running.returncode == 130, text
    assert "0: saved by 0" in text
    assert "1: saved by 1" in text
    assert "job 4242 goes back into the queue" in text
    assert (state / "requeued").exists()


def test_scancel_saves_and_the_job_does_not_come_back(stub: dict[str, str], recorder: Recorder) -> None:
    state = Path(stub["STUB_STATE"])
    running = sbatch(stub | {"PYTHON": str(recorder.program)}, "--nodes=2", SCRIPT, "wait")
    until(lambda: (state / "tasks.pid").exists() and len(recorder.records()) == 2)
    for pid in [(state / "batch.pid").read_text(), *(state / "tasks.pid").read_text().split()]:
        os.kill(int(pid), signal.SIGTERM)
    text, _ = running.communicate(timeout=30)
    assert running.returncode == 130, text
    assert "1: saved by 1" in text
    assert not (state / "requeued").exists()


def test_an_end_near_the_time_limit_is_an_end(stub: dict[str, str], recorder: Recorder) -> None:
    """The run ends by itself while it is being told to stop."""
    program = recorder.folder / "short"
    program.write_text("#!/bin/sh\ntrap 'echo told; exit 0' TERM\necho started\nwhile :; do sleep 0.05; done\n")
    program.chmod(0o700)
    state = Path(stub["STUB_STATE"])
    running = sbatch(stub | {"PYTHON": str(program)}, "--nodes=2", SCRIPT)
    assert running.stdout is not None
    started = [running.stdout.readline(), running.stdout.readline()]
    assert sorted(started) == ["0: started\n", "1: started\n"]
    until(lambda: (state / "tasks.pid").exists())
    os.kill(int((state / "batch.pid").read_text()), signal.SIGUSR1)
    text, _ = running.communicate(timeout=30)
    assert running.returncode == 0, text
    assert not (state / "requeued").exists()


def steps_of(log: Path) -> list[int]:
    return [json.loads(line)["step"] for line in log.read_text().splitlines()]


def training(folder: Path) -> list[str]:
    more = ("train.steps=40", f"train.out={folder / 'run'}", "mesh.data=1", "mesh.fsdp=2", "eval.every=20")
    return overrides(folder, "checkpoint.every=1000", *more)


def real_env(env: dict[str, str]) -> dict[str, str]:
    flags = {"XLA_FLAGS": quick_flags(), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return env | flags | {"PYTHON": sys.executable}


@pytest.mark.slow  # the stub's signals are tried above, real training under them in tests/processes
def test_training_stops_and_saves_at_the_limit(stub: dict[str, str], tmp_path: Path) -> None:
    """Two real processes of jaxft, both told SIGTERM, as a step's tasks are."""
    env = real_env(stub) | {"STUB_NODES": "localhost"}
    command = ("--ntasks-per-node=2", SCRIPT, *training(tmp_path))
    state, log = Path(stub["STUB_STATE"]), tmp_path / "run" / "log.jsonl"
    running = sbatch(env, *command)
    until(lambda: (log.exists() and len(log.read_text().splitlines()) >= 3) or running.poll() is not None, 120)
    assert running.poll() is None, running.communicate()[0][-3000:]
    os.kill(int((state / "batch.pid").read_text()), signal.SIGUSR1)
    text, _ = running.communicate(timeout=100)
    assert running.returncode == 130, text[-3000:]
    assert "0: 2 processes (slurm): 0 on" in text
    stopped = int(text.rsplit("stopped by a signal at step ", 1)[1].split()[0])
    assert 9 <= stopped < 40
    assert (state / "requeued").exists()
    assert any((tmp_path / "run").glob(f"checkpoints/*{stopped}*"))


# A real cluster on this machine: munge, slurmctld and a slurmd for each of two nodes, all started here and ended again.
DAEMONS = ("munged", "slurmctld", "slurmd")
CONF = """
ClusterName=jaxft
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=15
ReturnToService=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=1000 Gres=gpu:4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=1000 Gres=gpu:4 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


@pytest.fixture
def slurm(tmp_path_factory: pytest.TempPathFactory, clean_env: dict[str, str]) -> Iterator[dict[str, str]]:
    """The environment of a user of the cluster."""
    if os.geteuid() != 0 or not all(shutil.which(name, path="/usr/sbin:/usr/bin") for name in (*DAEMONS, *COMMANDS)):
        pytest.skip("needs root and Debian's slurm-wlm and munge")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    for i in range(4):
        os.mknod(folder / f"nvidia{i}", 0o20666, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/nvidia[0-3] Flags=nvidia_gpu_env\n")
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=free_ports(3)))
    env = clean_env | {"SLURM_CONF": str(conf), "PATH": f"{clean_env['PATH']}:/usr/sbin"}
    munged = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket"]
    munged += [f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"]
    commands = [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]
    daemons = list[subprocess.Popen[bytes]]()
    try:
        for command in commands:
            daemons.append(subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            until(lambda: (folder / "munge.socket").exists())
        idle = ["sinfo", "--noheader", "--states=idle", "--format=%D"]
        until(lambda: subprocess.run(idle, env=env, capture_output=True, text=True).stdout.strip() == "2", 60)
        yield env
    finally:
        subprocess.run(["scancel", "--user=root"], env=env, timeout=20, check=False, capture_output=True)
        time.sleep(1)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


class Job:
    """A job of the real cluster."""

    def __init__(self, env: dict[str, str], log: Path, *arguments: str):
        self.env, self.log = env, log
        command = ["sbatch", "--parsable", f"--output={log}", "--time=5", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        self.id = done.stdout.strip()

    def state(self) -> str:
        done = subprocess.run(
            ["scontrol", "show", "job", self.id], env=self.env, capture_output=True, text=True, timeout=20
        )
        return done.stdout.split("JobState=")[1].split()[0]

    def ended(self, *states: str, seconds: float = 60.0) -> str:
        until(lambda: self.state() not in ("RUNNING", "COMPLETING", "CONFIGURING") and self.state() in states, seconds)
        return self.log.read_text()

    def signal(self, *options: str) -> None:
        subprocess.run(["scancel", *options, self.id], env=self.env, check=True, timeout=20)


@pytest.mark.slow
def test_on_real_slurm(slurm: dict[str, str], stub: dict[str, str], recorder: Recorder, tmp_path: Path) -> None:
    env = slurm | {"PYTHON": str(recorder.program)}

    # Two nodes; what SLURM sets there is what the stub sets.
    Job(env, tmp_path / "1.log", "--nodes=2", SCRIPT, "run.yaml", "a.b=[1, 2]").ended("COMPLETED")
    real = recorder.environs()
    found = [detect(environ) for environ in real]
    assert [one and (one.kind, one.index, one.count, one.hosts) for one in found] == [
        ("slurm", 0, 2, ("n1", "n2")),
        ("slurm", 1, 2, ("n1", "n2")),
    ]
    assert recorder.records()[1]["arguments"] == ["-m", "jaxft", "train", "run.yaml", "a.b=[1, 2]"]
    assert recorder.records()[1]["folder"] == str(ROOT)
    running = sbatch(stub | {"PYTHON": str(recorder.program)}, "--nodes=2", SCRIPT, "run.yaml")
    text, _ = running.communicate(timeout=30)
    assert running.returncode == 0, text
    for theirs, ours in zip(real, recorder.environs(), strict=True):
        names = [{name for name in one if name.startswith(("SLURM", "SRUN"))} for one in (theirs, ours)]
        # Of the GPUs that the real nodes have, and of the time limit given on the command line: not the stub's.
        assert {name for name in names[0] if "GPU" not in name and not name.endswith("_TIME")} == names[1]
        for name in names[1]:
            if name.startswith("SLURM_STEP_") and not name.endswith("PORT"):
                assert theirs[name] == ours[name], name
        assert theirs["SLURM_LOCALID"] == ours["SLURM_LOCALID"] == "0"

    # GPUs: shared by all tasks of a node, or each task's own.
    for options, devices, seen in (
        (["--gpus-per-node=4"], [(0, 1), (2, 3)], ["0,1,2,3", "0,1,2,3"]),
        (["--gpus-per-task=2"], [None, None], ["0,1", "2,3"]),
    ):
        job = Job(env, tmp_path / "gpu.log", "--nodes=1", "--ntasks-per-node=2", *options, SCRIPT, "run.yaml")
        job.ended("COMPLETED")
        assert [one["CUDA_VISIBLE_DEVICES"] for one in recorder.environs()] == seen
        assert [one.local_devices for one in map(detect, recorder.environs()) if one] == devices

    # The time limit: the last task saves longer than the others; the job is back in the queue.
    for path in recorder.folder.glob("*.json"):
        path.unlink()
    job = Job(env, tmp_path / "2.log", "--nodes=2", SCRIPT, "wait")
    until(lambda: len(recorder.records()) == 2)
    job.signal("--batch", "--signal=USR1")
    text = job.ended("PENDING")
    assert "0: saved by 0" in text
    assert "1: saved by 1" in text
    assert f"job {job.id} goes back into the queue" in text
    job.signal()

    # scancel: saved too, and not back.
    for path in recorder.folder.glob("*.json"):
        path.unlink()
    job = Job(env, tmp_path / "3.log", "--nodes=2", SCRIPT, "wait")
    until(lambda: len(recorder.records()) == 2)
    job.signal()
    text = job.ended("CANCELLED")
    until(lambda: "1: saved by 1" in job.log.read_text())
    assert "goes back" not in text


@pytest.mark.slow
def test_training_on_real_slurm(slurm: dict[str, str], tmp_path: Path) -> None:
    # The nodes' names are known to SLURM only: process 0's address is told through jax's own variables.
    env, given = real_env(slurm), training(tmp_path)
    resolved = socket.gethostname()
    wrapper = tmp_path / "python"
    wrapper.write_text(
        "#!/bin/bash\n"
        f"export JAX_COORDINATOR_ADDRESS={resolved}:{free_ports(1)[0]} JAX_NUM_PROCESSES=$SLURM_STEP_NUM_TASKS\n"
        f'export JAX_PROCESS_ID=$SLURM_PROCID\nexec {sys.executable} "$@"\n'
    )
    wrapper.chmod(0o700)
    log = tmp_path / "run" / "log.jsonl"
    job = Job(env | {"PYTHON": str(wrapper)}, tmp_path / "job.log", "--nodes=2", SCRIPT, *given)
    until(lambda: log.exists() and len(log.read_text().splitlines()) >= 3, 120)
    job.signal("--batch", "--signal=USR1")
    text = job.ended("PENDING", seconds=60)
    assert "stopped by a signal at step" in text
    # Back from the queue, at once instead of after SLURM's two minutes.
    subprocess.run(["scontrol", "update", f"job={job.id}", "StartTime=now"], env=env, check=True, timeout=20)
    job.ended("COMPLETED", seconds=180)
    assert steps_of(log)[-1] == 40
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
