"""Gives every malformed input to the command that meets it: python tests/faults/run_malformed.py [--only TEXT] [--json FILE].

Each case runs in a child of its own, forked when everything is imported: what it takes is then beyond start-up.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypedDict

if __name__ == "__main__":
    # Those of this checkout, whatever is installed.
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")

from faults.malformed import Case, all_cases
from faults.malformed.case import make_sound

LONGEST = 300
"""Characters of the one line."""
SECONDS = 2.0
"""Of work beyond start-up: of the processors' time, whatever else the machine is doing."""
WAIT = 60
"""Seconds after which a case is ended; half of them are too many, too: it has waited for something."""
MEMORY = 512 << 20
"""Bytes that a refusal may take beyond what the imports took."""
ROOM = 6 << 30
"""Address space beyond what the imports took: what is out of bounds ends here, and not with the machine's memory."""
IMPORTS = (
    *(
        f"jaxft.cli.{name}"
        for name in ("train", "eval", "predict", "convert", "checkpoint", "data", "show_config", "cache", "sweep")
    ),
    *(
        "jaxft.inference.predict",
        "jaxft.training.start",
        "jaxft.training.rows",
        "jaxft.hub.pretrained",
        "jaxft.training.loop",
    ),
    *(
        "orbax.checkpoint",
        "pyarrow.parquet",
        "tokenizers",
        "datasets",
        "transformers.models.auto.tokenization_auto",
        "transformers.tokenization_utils_tokenizers",
    ),
)


class Ended(TypedDict):
    """How a case ended."""

    code: int | None
    """The exit code; None: it was ended, or died of a signal."""
    out: str
    err: str
    seconds: float
    cpu: float
    memory: int
    """Bytes at the most, beyond what the imports took."""
    written: list[str]


class Wrong(TypedDict):
    """A case that did not end as it should."""

    case: str
    problems: list[str]
    ended: Ended
    """With the last lines of what it said."""


class Found(TypedDict):
    """What a battery found."""

    cases: int
    by_kind: dict[str, int]
    """How many cases of each kind."""
    wrong: int
    wrong_ones: list[Wrong]


def run(
    count: int | None = None, seed: int = 0, *, kind: str | None = None, only: str = "", verbose: bool = False
) -> Found:
    """Runs the battery.

    Args:
      count: so many of its cases, drawn at random; None: all.
      seed: of the draw.
      kind: cases of this kind; None: of all.
      only: cases with this in their names.
      verbose: print each case as it ends.
    """
    chosen = [case for case in all_cases() if only in case.id and kind in (None, case.kind)]
    if count is not None and count < len(chosen):
        chosen = random.Random(seed).sample(chosen, count)
    for name in IMPORTS:
        importlib.import_module(name)
    wrong: list[Wrong] = []
    with tempfile.TemporaryDirectory() as scratch:
        sound = Path(scratch) / "sound"
        _in_child(lambda: make_sound(sound))
        for number, case in enumerate(chosen):
            folder = Path(scratch) / f"case{number}"
            shutil.copytree(sound, folder, symlinks=True)
            ended = tried(case, folder)
            shutil.rmtree(folder, ignore_errors=True)
            problems = wrong_with(case, ended)
            if problems:
                shown: Ended = {**ended, "out": ended["out"][-600:], "err": ended["err"][-1500:]}
                wrong.append({"case": case.id, "problems": problems, "ended": shown})
            if verbose:
                print(_line(case, ended, problems), flush=True)
    kinds = Counter(case.kind for case in chosen)
    return {"cases": len(chosen), "by_kind": dict(kinds), "wrong": len(wrong), "wrong_ones": wrong}


def _line(case: Case, ended: Ended, problems: list[str]) -> str:
    judged = f"WRONG {', '.join(problems)}" if problems else "right"
    said = (ended["err"] or ended["out"])[:LONGEST].rstrip("\n")
    return f"{judged}: {case.id} [{ended['cpu']:.1f} s, {ended['memory'] >> 20} MB]\n    {said}"


def _in_child(work: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - the child must not go on as its parent
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        raise RuntimeError("the sound files could not be made")


def tried(case: Case, folder: Path) -> Ended:
    """A case's damage, and how its command ended in a child."""
    case.damage(folder)
    before = snapshot(folder)
    out, err = folder.with_suffix(".out"), folder.with_suffix(".err")
    resting = _resident()
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _command(case, folder, out, err)
    status, usage = _awaited(child)
    seconds = time.perf_counter() - started
    code = os.waitstatus_to_exitcode(status)
    said = [path.read_text(errors="replace") for path in (out, err)]
    for path in (out, err):
        path.unlink()
    after = snapshot(folder)
    return {
        "code": code if code >= 0 else None,
        "out": said[0],
        "err": said[1],
        "seconds": seconds,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": max(0, usage.ru_maxrss * 1024 - resting),
        "written": sorted(str(path) for path in after.keys() | before.keys() if after.get(path) != before.get(path)),
    }


def _awaited(child: int) -> tuple[int, resource.struct_rusage]:
    until = time.perf_counter() + WAIT
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return status, usage
        if time.perf_counter() > until:
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return status, usage
        time.sleep(0.005)


def _command(case: Case, folder: Path, out: Path, err: Path) -> None:
    """In the child: runs the command as the program would, and ends."""
    code = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # ends with the runner, however that ends
        os.chdir(folder)
        vast = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (vast + ROOM, vast + ROOM))
        sys.argv = ["jaxft", *case.command]
        from jaxft.__main__ import program

        program()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 - the child must not go on as its parent
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def snapshot(folder: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of whatever lies in a folder, links not followed."""
    found = {}
    for path in folder.rglob("*"):
        seen = path.lstat()
        found[path.relative_to(folder)] = (
            (0, 0) if path.is_dir() and not path.is_symlink() else (seen.st_size, seen.st_mtime_ns)
        )
    return found


def wrong_with(case: Case, ended: Ended) -> list[str]:
    """What is not as it should be about how a case ended."""
    lines, problems = ended["err"].splitlines(), []
    if ended["code"] is None:
        problems.append("ended by a signal, or after so many seconds")
    elif ended["code"] not in case.codes:
        problems.append(f"exit code {ended['code']}")
    if "Traceback" in ended["err"] or "panicked" in ended["err"]:
        problems.append("traceback")
    elif ended["code"] != 0 and case.told is None and len(lines) != 1:
        problems.append(f"{len(lines)} lines on stderr")
    shown = [] if "inspect" in case.command else ended["out"].splitlines()  # it shows what there is
    if any(len(line) > LONGEST for line in (*lines, *shown)):
        problems.append("a long line")
    if any(not character.isprintable() for character in "".join(lines)):
        problems.append("unprintable characters")
    if case.told is not None and case.told not in ended["out"]:
        problems.append(f"{case.told!r} is not said")
    if ended["cpu"] > SECONDS or ended["seconds"] > WAIT / 2:
        problems.append(f"{ended['cpu']:.1f} s of work in {ended['seconds']:.1f} s")
    if ended["memory"] > MEMORY:
        problems.append(f"{ended['memory'] >> 20} MB")
    if ended["written"] and not case.writes:
        problems.append(f"wrote {', '.join(ended['written'][:3])}")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", help="cases of this kind: weights, config, tokenizer, data, run, checkpoint")
    parser.add_argument("--only", default="", help="cases with this in their names")
    parser.add_argument("--count", type=int, help="so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write what was found there")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args(arguments)
    found = run(options.count, options.seed, kind=options.kind, only=options.only, verbose=not options.quiet)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    for one in found["wrong_ones"]:
        print(f"WRONG {one['case']}: {'; '.join(one['problems'])}\n    {one['ended']['err'][-400:]}")
    print(f"{found['cases']} cases, {found['wrong']} wrong: {found['by_kind']}")
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
