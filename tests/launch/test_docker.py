"""launch/Dockerfile: instructions that exist, and files that are there and sent to the builder; no docker needed."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "launch/Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """(name, arguments), continued lines joined, comments left out."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in joined]


def test_it_is_a_dockerfile() -> None:
    names = [name for name, _ in instructions()]
    assert names[0] == "FROM"
    assert set(names) <= {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    for name, arguments in instructions():
        if name in ("ENTRYPOINT", "CMD"):
            assert json.loads(arguments), "the form of JSON: signals reach python, not a shell"


def test_what_it_copies_is_there_and_sent() -> None:
    ignored = (ROOT / "launch/Dockerfile.dockerignore").read_text().splitlines()
    sent = {line[1:] for line in ignored if line.startswith("!")}
    copied = {name for kind, rest in instructions() if kind == "COPY" for name in rest.split()[:-1]}
    assert copied == sent
    assert all((ROOT / name).exists() for name in copied)
    # All that the build of the package reads.
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"]} <= copied


def test_its_extras_exist_and_its_python_is_one_of_ours() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (extras,) = (rest.removeprefix("EXTRAS=") for kind, rest in instructions() if rest.startswith("EXTRAS="))
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    base = next(rest for kind, rest in instructions() if kind == "FROM")
    version = tuple(map(int, base.removeprefix("python:").split("-")[0].split(".")))
    assert version >= (3, 11)


def test_the_working_directory_has_what_the_manifest_sources() -> None:
    (folder,) = (rest for kind, rest in instructions() if kind == "WORKDIR")
    assert folder.startswith("/")
    assert "source launch/env.sh" in (ROOT / "launch/k8s.yaml").read_text()
    assert ("COPY", "launch launch") in instructions()
