"""launch/k8s.yaml: well formed, valid for Kubernetes, and of one mind about hosts, ports and signals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxft.config import load_config
from jaxft.machine.processes import detect

from .conftest import Recorder

ROOT = Path(__file__).parents[2]
MANIFEST = ROOT / "launch" / "k8s.yaml"


@pytest.fixture
def job_set() -> dict[str, Any]:
    (document,) = yaml.safe_load_all(MANIFEST.read_text())
    return document


@pytest.fixture
def job(job_set: dict[str, Any]) -> dict[str, Any]:
    (replicated,) = job_set["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


@pytest.fixture
def pod(job: dict[str, Any]) -> dict[str, Any]:
    return job["template"]["spec"]


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod["containers"]
    return only


def test_yamllint() -> None:
    rules = "{extends: default, rules: {line-length: {max: 140}}}"
    command = [str(Path(sys.executable).with_name("yamllint")), "--strict", "-d", rules, str(MANIFEST)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout


def test_the_job_is_valid_for_kubernetes(job: dict[str, Any]) -> None:
    """By the schemas of Kubernetes 1.31, strictly; that of JobSet, around it, is not to be had from a package."""
    validator = pytest.importorskip("kubernetes_validate")
    resource = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, "spec": job}
    validator.validate(resource, "1.31", strict=True)
    with pytest.raises(validator.ValidationError):
        validator.validate(resource | {"spec": job | {"completion": 2}}, "1.31", strict=True)


def test_job_set(job_set: dict[str, Any], job: dict[str, Any]) -> None:
    assert (job_set["apiVersion"], job_set["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert set(job_set["spec"]) == {"network", "failurePolicy", "replicatedJobs"}
    assert job_set["spec"]["network"]["enableDNSHostnames"] is True
    # All processes start again together, a failed run from its last checkpoint.
    assert job["backoffLimit"] == 0
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    policy = job_set["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    (codes,) = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert codes["values"] == [130]
    assert codes["containerName"] == job["template"]["spec"]["containers"][0]["name"]


def test_each_pod_knows_its_place(job_set: dict[str, Any], job: dict[str, Any], container: dict[str, Any]) -> None:
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    given = {one["name"]: one for one in container["env"]}
    field = given["JAX_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    environ = {name: one["value"] for name, one in given.items() if "value" in one}
    # JobSet names pods SET-JOB-REPLICA-INDEX, in the service that is named as the set.
    set_name, (replicated,) = job_set["metadata"]["name"], job_set["spec"]["replicatedJobs"]
    names = [f"{set_name}-{replicated['name']}-0-{index}" for index in range(job["completions"])]
    for index in range(job["completions"]):
        cluster = detect(environ | {"JAX_PROCESS_ID": str(index)})
        assert cluster is not None
        host, port = cluster.address.split(":")
        assert host == f"{names[0]}.{set_name}"
        assert {"containerPort": int(port)} in container["ports"]
        assert (cluster.count, cluster.index, list(cluster.hosts)) == (job["completions"], index, names)


def test_time_and_means_to_stop_and_save(pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert pod["terminationGracePeriodSeconds"] >= 120
    assert pod["shareProcessNamespace"] is True
    assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1
    assert container["resources"]["limits"]["memory"] == container["resources"]["requests"]["memory"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_command_runs(clean_env: dict[str, str], recorder: Recorder, container: dict[str, Any]) -> None:
    """As a container runs it, in the image's working directory; SIGTERM reaches python: the shell has become it."""
    running = subprocess.Popen(
        [*container["command"], *container["args"]],
        cwd=ROOT,
        env=clean_env | {"PYTHON": str(recorder.program), "JAXFT_PLATFORM": "gpu", "JAX_PROCESS_ID": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    text, _ = running.communicate(timeout=30)
    assert running.returncode == 0, text
    (record,) = recorder.records()
    assert record["arguments"] == ["-m", "jaxft", "train", *container["args"]]
    assert record["pid"] == running.pid
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in record["environ"]["XLA_FLAGS"]


def test_the_arguments_are_a_run(container: dict[str, Any], tmp_path: Path) -> None:
    path, *settings = container["args"]
    out = settings[-1].removeprefix("train.out=")
    assert load_config(str(ROOT / path), settings).train.out == out
    assert any(out.startswith(mount["mountPath"] + "/") for mount in container["volumeMounts"])
