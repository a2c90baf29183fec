"""Which share of a build is this machine's, said or read from the environment that a launcher has set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from jaxft.errors import UserError

# (index, count, the first index) of array jobs, indexed jobs and TPU pods; a SLURM array need not begin at 0.
_SLURM = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")
_KUBERNETES = ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS")


class Share(NamedTuple):
    """The ``index``-th of ``count`` shares, from 0."""

    index: int
    count: int


def share_of(said: str | None, environ: Mapping[str, str]) -> Share:
    """The share of this machine; all of it where nobody says anything else.

    Args:
      said: ``I/N``, counted from 0; None: what a SLURM array, a Kubernetes indexed job (with ``JOB_COMPLETIONS``, which it does not set
        by itself) or a TPU pod says.

    Raises:
      UserError: that makes no sense.
    """
    if said is not None:
        found = re.fullmatch(r"(\d{1,7})/(\d{1,7})", said)
        if found is None or int(found[1]) >= int(found[2]):
            raise UserError(f"--part {said}: expected I/N with I from 0 to N - 1, for instance 0/8")
        return Share(int(found[1]), int(found[2]))
    if all(environ.get(name) for name in _SLURM[:2]):
        first = _number(environ, _SLURM[2]) if environ.get(_SLURM[2]) else 0
        return _checked(_number(environ, _SLURM[0]) - first, _number(environ, _SLURM[1]), _SLURM[0])
    if environ.get(_KUBERNETES[0]):
        if not environ.get(_KUBERNETES[1]):
            raise UserError(
                "JOB_COMPLETION_INDEX is set, but not JOB_COMPLETIONS, the number of the job's completions: set it in the pod, or give "
                "--part I/N"
            )
        return _checked(_number(environ, _KUBERNETES[0]), _number(environ, _KUBERNETES[1]), _KUBERNETES[0])
    workers = [name for name in environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if name]
    if workers and environ.get("TPU_WORKER_ID"):
        return _checked(_number(environ, "TPU_WORKER_ID"), len(workers), "TPU_WORKER_ID")
    return Share(0, 1)


def _number(environ: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"\d{1,7}", environ[name]):
        raise UserError(f"{name}={environ[name]}: expected a number; give --part I/N")
    return int(environ[name])


def _checked(index: int, count: int, name: str) -> Share:
    if not 0 <= index < count:
        raise UserError(f"{name}: {index} is not below {count}, the number of tasks; give --part I/N")
    return Share(index, count)
