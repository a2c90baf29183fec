"""launch/tpu_pod.sh: a worker's variables from a metadata server on this machine; the workstation's side with a program in
place of gcloud that runs each command as the workers' shells would."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jaxft.machine.processes import detect

from .conftest import Recorder

pytestmark = pytest.mark.usefixtures("usual_signals")
ROOT = Path(__file__).parents[2]
SCRIPT = "launch/tpu_pod.sh"
SLICES = "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_COORDINATOR_ADDRESS: 's0w0:8081'\nMEGASCALE_NUM_SLICES: '2'\n"
ENDPOINTS = {
    "names": ("w0,w1,w2", ("w0", "w1", "w2")),
    "triples": ("unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3", ("10.0.0.2", "10.0.0.3")),
}


@contextmanager
def metadata_server(attributes: dict[str, str]) -> Iterator[str]:
    """HOST:PORT of a server that answers as that of a VM."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            known = name in attributes and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(attributes[name].encode() if known else b"<html>not found</html>")

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the launchers: a worker writes its log and its process's number beside them."""
    folder = tmp_path / "home" / "jax ft"
    shutil.copytree(ROOT / "launch", folder / "launch")
    return folder


def on_worker(env: dict[str, str], repository: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(repository / SCRIPT), "--on-worker", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)


@pytest.mark.parametrize("form", ENDPOINTS)
@pytest.mark.parametrize("worker", [0, 1])
def test_a_worker_of_one_slice(
    clean_env: dict[str, str], recorder: Recorder, repository: Path, form: str, worker: int
) -> None:
    text, hosts = ENDPOINTS[form]
    attributes = {"worker-network-endpoints": text, "agent-worker-number": str(worker), "tpu-env": "ZONE: 'here'\n"}
    with metadata_server(attributes) as at:
        env = clean_env | {"PYTHON": str(recorder.program), "GCE_METADATA_HOST": at}
        done = on_worker(env, repository, "run.yaml", "a.b=[1, 2]")
    assert done.returncode == 0, done.stderr
    (record,) = recorder.records()
    assert record["arguments"] == ["-m", "jaxft", "train", "run.yaml", "a.b=[1, 2]"]
    assert record["folder"] == str(repository)
    cluster = detect(record["environ"])
    assert cluster is not None
    assert (cluster.address, cluster.count, cluster.index) == (f"{hosts[0]}:8476", len(hosts), worker)
    assert cluster.hosts == hosts
    assert record["environ"]["JAXFT_PLATFORM"] == "tpu"


@pytest.mark.parametrize(("slice_index", "worker", "index"), [(0, 0, 0), (1, 0, 2), (1, 1, 3)])
@pytest.mark.parametrize("where", ["metadata", "environment"])
def test_a_worker_of_several_slices(
    clean_env: dict[str, str],
    recorder: Recorder,
    repository: Path,
    where: str,
    slice_index: int,
    worker: int,
    index: int,
) -> None:
    described = SLICES + f"MEGASCALE_SLICE_ID: '{slice_index}'\n"
    attributes = {"worker-network-endpoints": "w0,w1", "agent-worker-number": str(worker)}
    env = clean_env | {"PYTHON": str(recorder.program)}
    if where == "metadata":
        attributes["tpu-env"] = described
    else:
        env |= {line.split(": ")[0]: line.split("'")[1] for line in described.splitlines()}
    with metadata_server(attributes) as at:
        done = on_worker(env | {"GCE_METADATA_HOST": at}, repository, "run.yaml")
    assert done.returncode == 0, done.stderr
    (environ,) = recorder.environs()
    cluster = detect(environ)
    assert cluster is not None
    assert (cluster.address, cluster.count, cluster.index) == ("s0w0:8476", 4, index)
    # For libtpu; and what they alone say is the same.
    ours = {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
    plain = {name: value for name, value in environ.items() if name not in ours}
    by_tpu = detect(plain | {"TPU_WORKER_HOSTNAMES": "w0,w1", "TPU_WORKER_ID": str(worker)})
    assert by_tpu is not None
    assert (by_tpu.address, by_tpu.count, by_tpu.index) == (cluster.address, cluster.count, cluster.index)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "launch: this is no worker of a TPU: its metadata names no agent-worker-number"),
        ({"agent-worker-number": "0"}, "launch: this is no worker of a TPU"),
        (
            {"agent-worker-number": "0", "worker-network-endpoints": "w0", "tpu-env": SLICES},
            "launch: 2 slices, but MEGASCALE_SLICE_ID is in neither environment nor metadata",
        ),
    ],
)
def test_no_worker(
    clean_env: dict[str, str], recorder: Recorder, repository: Path, attributes: dict[str, str], message: str
) -> None:
    with metadata_server(attributes) as at:
        env = clean_env | {"PYTHON": str(recorder.program), "GCE_METADATA_HOST": at}
        done = on_worker(env, repository, "run.yaml")
    assert done.returncode == 2
    assert done.stderr.startswith(message), done.stderr
    assert recorder.records() == []


# As sshd does: a login shell's command, in the home folder, with an environment of its own; one after another would wait.
GCLOUD = """#!/bin/bash
set -u
[[ "$*" == "compute tpus tpu-vm ssh pod"?" --zone=here --worker=all --command="* ]] || { echo "gcloud: $*" >&2; exit 9; }
slice=${5#pod}
pids=()
for worker in 0 1; do
  home=$POD/$slice-$worker
  mkdir -p "$home" && [[ -e $home/jaxft ]] || cp -r "$REPOSITORY" "$home/jaxft"
  (cd "$home" && env -i PATH="$PATH" HOME="$home" MEGASCALE_SLICE_ID="$slice" MEGASCALE_NUM_SLICES="$SLICES" \\
    MEGASCALE_COORDINATOR_ADDRESS=s0w0:8081 JAX_TEST_WORKER="$worker" \\
    GCE_METADATA_HOST="$(cat "$POD/metadata-$worker")" bash -c "${8#--command=}") &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""


@contextmanager
def pod(env: dict[str, str], tmp_path: Path, repository: Path, slices: int) -> Iterator[dict[str, str]]:
    """The environment of a workstation; the workers' home folders are under tmp_path/pod."""
    commands, homes = tmp_path / "bin", tmp_path / "pod"
    commands.mkdir()
    homes.mkdir()
    (commands / "gcloud").write_text(GCLOUD)
    (commands / "gcloud").chmod(0o700)
    attributes = [{"worker-network-endpoints": "w0,w1", "agent-worker-number": str(worker)} for worker in (0, 1)]
    with metadata_server(attributes[0]) as first, metadata_server(attributes[1]) as second:
        (homes / "metadata-0").write_text(first)
        (homes / "metadata-1").write_text(second)
        names = " ".join(f"pod{i}" for i in range(slices))
        more = {
            "POD": str(homes),
            "REPOSITORY": str(repository),
            "SLICES": str(slices),
            "TPU_NAME": names,
            "ZONE": "here",
        }
        yield env | more | {"PATH": f"{commands}:{env['PATH']}"}


def test_from_a_workstation(clean_env: dict[str, str], tmp_path: Path, recorder: Recorder, repository: Path) -> None:
    with pod(clean_env, tmp_path, repository, 2) as env:
        env |= {"PYTHON": str(recorder.program), "LIBTPU_INIT_ARGS": "--a=1 --b='x y'", "JAXFT_START_TIMEOUT": "60"}
        command = ["bash", str(ROOT / SCRIPT), "run.yaml", "a.b=[1, 2]", "it's=$HOME"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    # The output of process 0, the errors of all.
    assert sorted(done.stdout.splitlines()) == [
        *(f"[{i}] error of {i}" for i in (1, 2, 3)),
        "error of 0",
        "out of 0",
    ]
    assert [(tmp_path / "pod" / f"1-{i}" / "jaxft" / "jaxft.log").read_text().count("out of") for i in (0, 1)] == [1, 1]
    found = [(one.address, one.count, one.index) for one in map(detect, recorder.environs()) if one]
    assert found == [("s0w0:8476", 4, index) for index in range(4)]
    for record in recorder.records():
        assert record["arguments"] == ["-m", "jaxft", "train", "run.yaml", "a.b=[1, 2]", "it's=$HOME"]
        assert record["environ"]["LIBTPU_INIT_ARGS"] == "--a=1 --b='x y'"
        assert record["environ"]["JAXFT_START_TIMEOUT"] == "60"


@pytest.mark.parametrize("how", ["--stop", "Ctrl-C"])
def test_stopping(clean_env: dict[str, str], tmp_path: Path, recorder: Recorder, repository: Path, how: str) -> None:
    with pod(clean_env, tmp_path, repository, 1) as env:
        env["PYTHON"] = str(recorder.program)
        command = ["bash", str(ROOT / SCRIPT), "wait"]
        running = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        deadline = time.monotonic() + 20
        while len(recorder.records()) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        if how == "--stop":
            stop = ["bash", str(ROOT / SCRIPT), "--stop"]
            assert subprocess.run(stop, env=env, timeout=20, capture_output=True).returncode == 0
        else:
            os.killpg(running.pid, signal.SIGINT)  # as a terminal does: to the whole group
        text, _ = running.communicate(timeout=30)
    assert running.returncode == 130, text
    assert "saved by 0" in text
    assert "saved by 1" in (tmp_path / "pod" / "0-1" / "jaxft" / "jaxft.log").read_text()


def test_a_failure_of_one_worker_is_the_exit_code(
    clean_env: dict[str, str], tmp_path: Path, recorder: Recorder, repository: Path
) -> None:
    with pod(clean_env, tmp_path, repository, 1) as env:
        command = ["bash", str(ROOT / SCRIPT), "exit=3"]
        done = subprocess.run(command, env=env | {"PYTHON": str(recorder.program)}, capture_output=True, timeout=30)
    assert done.returncode == 3


@pytest.mark.parametrize("arguments", [[], ["run.yaml"]])
def test_usage(clean_env: dict[str, str], arguments: list[str]) -> None:
    env = clean_env | ({} if arguments else {"TPU_NAME": "pod"})
    done = subprocess.run(["bash", str(ROOT / SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: TPU_NAME=...")
