"""What the environment of each launcher says; contradictions; SLURM's node lists."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.errors import UserError
from jaxft.machine.processes import Cluster, detect
from jaxft.machine.processes.cluster import expand_nodes

JAX = {"JAX_COORDINATOR_ADDRESS": "node0:8476", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}
SLURM = {
    "SLURM_JOB_ID": "4099",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
TPU = {"TPU_WORKER_HOSTNAMES": "w0,w1,w2,w3", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1", "MEGASCALE_COORDINATOR_ADDRESS": "s0w0:8081"}


def found(environ: dict[str, str]) -> Cluster:
    cluster = detect(environ)
    assert cluster is not None
    return cluster


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"HOME": "/root"},
        # Inside sbatch or salloc, or by ssh into an allocation: no step.
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-4]"},
        SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_TASKS_PER_NODE": "1"},
        TPU | {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "", "JAX_NUM_PROCESSES": ""},
    ],
)
def test_alone(environ: dict[str, str]) -> None:
    assert detect(environ) is None


def test_jax_variables() -> None:
    assert found(JAX) == Cluster("environment", "node0:8476", 3, 2)
    named = found(JAX | {"JAXFT_HOSTS": "a,b,c"})
    assert named.hosts == ("a", "b", "c")
    assert named.host_of(1) == "process 1 on b"
    assert found(JAX).host_of(1) == "process 1"
    assert found(JAX | {"JAX_COORDINATOR_ADDRESS": "[::1]:9"}).address == "[::1]:9"


def test_jax_variables_win() -> None:
    assert found(TPU | SLURM | JAX).kind == "environment"
    assert found(TPU | SLURM).kind == "slurm"
    # One process by name, although SLURM's step has more: several independent runs in one step.
    assert detect(SLURM | JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None


@pytest.mark.parametrize("gone", [names for n in (1, 2) for names in itertools.combinations(JAX, n)], ids=str)
def test_some_jax_variables(gone: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match="set all three, or none") as caught:
        detect({name: value for name, value in JAX.items() if name not in gone})
    given, missing = str(caught.value).split(" set, but not ")
    assert all(name in missing for name in gone)
    assert not any(name in given for name in gone)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "node0"}, "expected HOST:PORT of process 0"),
        ({"JAX_COORDINATOR_ADDRESS": ":8476"}, "expected HOST:PORT of process 0"),
        ({"JAX_PROCESS_ID": "3"}, r"JAX_PROCESS_ID=3 must lie in 0\.\.2"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID='-1': expected a number"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two': expected a number"),
        ({"JAX_NUM_PROCESSES": "²"}, "expected a number"),
        ({"JAX_NUM_PROCESSES": "0", "JAX_PROCESS_ID": "0"}, "JAX_PROCESS_ID=0 must lie in"),
        ({"JAXFT_HOSTS": "a,b"}, "names 2 hosts for JAX_NUM_PROCESSES=3"),
    ],
)
def test_contradictions(more: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        detect(JAX | more)


def test_slurm_step() -> None:
    cluster = found(SLURM)
    # Of process 0's host; a port that depends on the job, so that two jobs on a node do not meet.
    assert cluster == Cluster("slurm", f"gpu07:{61440 + 3}", 4, 3, ("gpu07", "gpu07", "gpu08", "gpu08"))
    assert cluster.host_of(2) == "process 2 on gpu08"
    uneven = SLURM | {"SLURM_STEP_NODELIST": "a[1-3],b", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1,3"}
    uneven |= {"SLURM_STEP_NUM_TASKS": "8"}
    assert found(uneven).hosts == ("a1", "a1", "a2", "a2", "a3", "b", "b", "b")


@pytest.mark.parametrize(
    ("more", "devices"),
    [
        # As observed in steps of Slurm 22.05 on nodes of four GPUs.
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, (2, 3)),  # --gres=gpu:4: each sees all
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "2,3"}, None),  # --gpus-per-task=2: each sees its own
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "1"}, None),  # --gpu-bind=single:1
        ({"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, (1,)),
        ({"SLURM_GPUS_ON_NODE": "4"}, (2, 3)),
        ({"SLURM_GPUS_ON_NODE": "4", "ROCR_VISIBLE_DEVICES": "3"}, None),
        ({"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"}, None),
        ({}, None),
    ],
)
def test_gpus_of_a_task(more: dict[str, str], devices: tuple[int, ...] | None) -> None:
    assert found(SLURM | more).local_devices == devices


def test_gpus_of_a_node_with_one_task() -> None:
    one = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    assert found(SLURM | one | {"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1,2,3"}).local_devices is None


def test_gpus_that_cannot_be_divided() -> None:
    with pytest.raises(UserError, match="2 tasks cannot share the 3 GPUs of a node evenly"):
        detect(SLURM | {"SLURM_GPUS_ON_NODE": "3", "CUDA_VISIBLE_DEVICES": "0,1,2"})


@pytest.mark.parametrize(
    "more",
    [
        {"SLURM_STEP_NUM_TASKS": "x"},
        {"SLURM_JOB_ID": ""},
        {"SLURM_STEP_TASKS_PER_NODE": "two"},
        {"SLURM_STEP_NODELIST": ""},
    ],
)
def test_slurm_variables_that_cannot_be_read(more: dict[str, str]) -> None:
    with pytest.raises(UserError):
        detect(SLURM | more)


def test_tpu_pod() -> None:
    assert found(TPU) == Cluster("tpu", "w0:8476", 4, 1, ("w0", "w1", "w2", "w3"))


def test_tpu_slices() -> None:
    assert found(TPU | SLICES) == Cluster("tpu", "s0w0:8476", 8, 5)
    assert found(TPU | SLICES | {"MEGASCALE_COORDINATOR_ADDRESS": "s0w0"}).address == "s0w0:8476"
    assert found(TPU | {"MEGASCALE_NUM_SLICES": "1"}).count == 4
    with pytest.raises(UserError, match="but not MEGASCALE_COORDINATOR_ADDRESS"):
        detect(TPU | {"MEGASCALE_NUM_SLICES": "2"})
    with pytest.raises(UserError, match="MEGASCALE_NUM_SLICES='two'"):
        detect(TPU | {"MEGASCALE_NUM_SLICES": "two"})


NODE_LISTS = {
    # As `scontrol show hostnames` of Slurm 22.05 answers.
    "n[01-03,7],login": ["n01", "n02", "n03", "n7", "login"],
    "n[9-11]": ["n9", "n10", "n11"],
    "n[098-101]": ["n098", "n099", "n100", "n101"],
    "a[1],b,c[2-2]": ["a1", "b", "c2"],
    "rack[1-2]n[1-3]": ["rack1n1", "rack1n2", "rack1n3", "rack2n1", "rack2n2", "rack2n3"],
    "n1.cluster.org,n2": ["n1.cluster.org", "n2"],
    "gpu-a-[1-2]": ["gpu-a-1", "gpu-a-2"],
}


@pytest.mark.parametrize("text", NODE_LISTS)
def test_node_lists(text: str) -> None:
    assert expand_nodes(text) == NODE_LISTS[text]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="Slurm is not installed")
@pytest.mark.parametrize("text", NODE_LISTS)
def test_node_lists_as_slurm_reads_them(text: str) -> None:
    done = subprocess.run(["scontrol", "show", "hostnames", text], capture_output=True, text=True, timeout=20)
    if done.returncode != 0 and "conf" in done.stderr:
        pytest.skip("Slurm is not configured")
    assert done.stdout.split() == NODE_LISTS[text]


@pytest.mark.parametrize(
    "text", ["", ",", "a,,b", "n[1-3", "n1-3]", "n[]", "n[3-1]", "n[a-b]", "n[1-]", "n[1²]", "n[1-2-3]"]
)
def test_no_node_lists(text: str) -> None:
    with pytest.raises(UserError, match="SLURM node list"):
        expand_nodes(text)


PREFIXES = st.text("abcdefgh-", min_size=1, max_size=6)
RANGES = st.lists(
    st.tuples(st.integers(0, 1200), st.integers(0, 30), st.integers(1, 5)).map(lambda r: (r[0], r[0] + r[1], r[2])),
    min_size=1,
    max_size=4,
)


@given(st.lists(st.tuples(PREFIXES, RANGES | st.none()), min_size=1, max_size=5))
def test_ranges_round_trip(groups: list[tuple[str, list[tuple[int, int, int]] | None]]) -> None:
    """Hosts, written as Slurm shortens them: a padded range keeps the width of its first number."""
    hosts, parts = list[str](), list[str]()
    for prefix, ranges in groups:
        if ranges is None:
            hosts.append(prefix)
            parts.append(prefix)
            continue
        hosts += [f"{prefix}{number:0{width}d}" for first, last, width in ranges for number in range(first, last + 1)]
        texts = [f"{first:0{width}d}" + (f"-{last:0{width}d}" if last > first else "") for first, last, width in ranges]
        parts.append(f"{prefix}[{','.join(texts)}]")
    assert expand_nodes(",".join(parts)) == hosts
