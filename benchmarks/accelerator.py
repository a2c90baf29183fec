"""All that is to be known of a machine with one accelerator, in one command of a few minutes (benchmarks/README.md says how).

    python benchmarks/accelerator.py --out FOLDER [--wheels FOLDER] [--minutes 8] [--only STAGE ...]
    python benchmarks/accelerator.py --out FOLDER --rehearse        # the same on a CPU, at sizes that need a minute

Each stage is a process of its own with its own time limit: what fails, hangs or needs too much memory costs itself alone.
`results.json` is written after every stage, `log.txt` has what the stages say, and `table.txt` is the table printed at the end.
Nothing is written into the repository; without --wheels nothing is installed anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from accelerator_table import text_of  # noqa: E402 - found by the line above
from step import overrides_of  # noqa: E402

NEEDED = (
    "jax",
    "flax",
    "optax",
    "orbax.checkpoint",
    "grain",
    "pydantic",
    "tokenizers",
    "einops",
    "msgpack",
    "yaml",
    "tqdm",
)
LEAST_SECONDS = 20
"""A stage is not started with less."""
QUICKLY_COMPILED = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""A rehearsal measures nothing: half of its CPU time would go to making its programs fast."""
READY = "{ready}"
"""In a stage's command: three quarters of the seconds that it has, in which its contenders must have compiled."""


@dataclass(frozen=True)
class Stage:
    """A process that measures something and writes it to a file of JSON."""

    name: str
    command: tuple[str, ...]
    limit: float
    """Seconds that it may take."""
    timed: bool = True
    """Whether nothing may run beside it."""


@dataclass(frozen=True)
class StepCase:
    """A train step to be compared."""

    size: str
    rows: int
    length: int
    dropout: float = 0.0
    planned: bool = False
    """Whether `jaxft plan` is asked about it too."""

    @property
    def name(self) -> str:
        """Of its stage."""
        return f"step-{self.size}-{self.length}" + ("-dropout" if self.dropout else "")


STEPS = (
    StepCase("large", 32, 512, planned=True),
    StepCase("base", 128, 128, planned=True),
    StepCase("smollm", 8, 2048),
    StepCase("modernbert", 32, 512),
    StepCase("deberta", 32, 512),
    StepCase("large", 128, 128),
    StepCase("base", 32, 512),
    StepCase("large", 32, 512, dropout=0.1),
)
REHEARSED = (StepCase("tiny-bert", 4, 16, planned=True), StepCase("tiny-llama", 2, 16))


def stages(options: argparse.Namespace, topology: str, scratch: Path) -> list[Stage]:
    """All stages in the order of their worth; those that time nothing come first, side by side."""
    here = str(ROOT / "benchmarks")
    small = ("--rehearse",) if options.rehearse else ()
    found = [
        Stage("values", (sys.executable, f"{here}/accelerator_values.py", *small), 150, timed=False),
        Stage("families", (sys.executable, f"{here}/accelerator_families.py", *small), 150, timed=False),
        Stage(
            "resume",
            (sys.executable, f"{here}/accelerator_resume.py", "--out", str(scratch / "resume"), *small),
            150,
            timed=False,
        ),
    ]
    cases = REHEARSED if options.rehearse else STEPS
    for case in cases:
        if case.planned:
            asked = overrides_of(case.size, case.rows, case.length, case.dropout)
            plan = (sys.executable, "-m", "jaxft", "plan", *asked, "--topology", topology)
            found.append(Stage(case.name.replace("step", "plan", 1), plan, 180, timed=False))
    first, *rest = (Stage(case.name, _step_command(options, case), 190) for case in cases)
    attention = Stage("attention", (sys.executable, f"{here}/accelerator_attention.py", *small), 110)
    found += [first, attention, *rest]
    if options.rehearse:  # of machines that do other things besides
        found = [replace(stage, limit=10 * stage.limit) for stage in found]
    if options.only:
        unknown = sorted(set(options.only) - {stage.name for stage in found})
        if unknown:
            raise SystemExit(f"--only {unknown[0]}: the stages are {', '.join(stage.name for stage in found)}")
        found = [stage for stage in found if stage.name in options.only]
    return found


def _step_command(options: argparse.Namespace, case: StepCase) -> tuple[str, ...]:
    torch = importlib.util.find_spec("torch") is not None and importlib.util.find_spec("transformers") is not None
    theirs = ("torch-bf16-compile", "torch-bf16-autocast")
    if options.rehearse:  # torch's start costs as much as all that it is asked
        theirs = theirs[:1] if case is REHEARSED[0] else ()
    contenders = [*(theirs if torch else ()), "jaxft-auto"]
    command = [
        *(sys.executable, str(ROOT / "benchmarks/step.py"), "--sizes", case.size, "--rows", str(case.rows)),
        *("--length", str(case.length), "--dropouts", str(case.dropout), "--contenders", *contenders),
    ]
    if options.rehearse:
        return (*command, "--turns", "2", "--turn", "2", "--together", "2", "--compiler", "eager")
    return (*command, "--accelerator", "--turns", "4", "--turn", "8", "--together", "8", "--ready-seconds", READY)


def run_stage(
    stage: Stage, results: Path, log: Path, environment: dict[str, str], limit: float | None = None
) -> dict[str, Any]:
    """Runs a stage; what it has written counts however it ends.

    Args:
      results: the file that it writes, ``--json``.
      log: what it says is added here.
      limit: seconds, if fewer than its own.
    """
    begin, state = time.monotonic(), "ok"
    seconds = stage.limit if limit is None else min(stage.limit, limit)
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        # A group of its own, so that a stage ends with all its workers; not a session, which would outlive us.
        process = subprocess.Popen(
            [*(f"{0.75 * seconds:.0f}" if part == READY else part for part in stage.command), "--json", str(results)],
            stdout=said, stderr=subprocess.STDOUT, env=environment, process_group=0, cwd=results.parent,
        )  # fmt: skip
        try:
            code = process.wait(seconds)
            state = "ok" if code == 0 else f"failed (exit {code})"
        except subprocess.TimeoutExpired:
            state = f"out of time ({seconds:.0f} s)"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        text = said.read()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"==== {stage.name}: {state}\n{text}\n")
    made: dict[str, Any] = {"state": state, "seconds": time.monotonic() - begin}
    if state != "ok":
        made["last"] = [line for line in text.splitlines() if line.strip()][-3:]
    with contextlib.suppress(OSError, ValueError):
        made["found"] = json.loads(results.read_text(encoding="utf-8"))
    return made


class Run:
    """Runs stages until the time is up, and keeps what they found on disk."""

    def __init__(self, out: Path, scratch: Path, environment: dict[str, str], until: float, rehearsal: bool) -> None:
        self.out, self.scratch, self.environment, self.until = out, scratch, environment, until
        self.results: dict[str, Any] = {"rehearsal": rehearsal, "machine": {}, "stages": {}}
        self._lock = threading.Lock()

    def stage(self, stage: Stage) -> None:
        """Runs one, if there is time."""
        left = self.until - time.monotonic()
        if left < LEAST_SECONDS:
            made: dict[str, Any] = {"state": "not started: the time was up"}
        else:
            made = run_stage(stage, self.scratch / f"{stage.name}.json", self.out / "log.txt", self.environment, left)
        with self._lock:
            self.results["stages"][stage.name] = made
            self.write()
        print(f"{stage.name}: {made['state']}, {made.get('seconds', 0.0):.0f} s", flush=True)

    def write(self) -> None:
        """Writes everything that is known so far."""
        fresh = self.out / "results.json.tmp"
        fresh.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, self.out / "results.json")

    def all(self, todo: Sequence[Stage]) -> None:
        """Those that time nothing side by side, then the others one by one."""
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
            list(pool.map(self.stage, [stage for stage in todo if not stage.timed]))
        for stage in todo:
            if stage.timed:
                self.stage(stage)


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="jaxft-accelerator-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def install(wheels: Path, target: Path) -> None:
    """Unpacks wheels into a folder of their own, which goes before what the machine has; nothing is fetched."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(f"--wheels {wheels}: no wheels there; benchmarks/README.md says how to make the folder")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    pip += ["--find-links", str(wheels), "--no-compile", "--no-cache-dir", "--target", str(target), *files]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"--wheels {wheels}: {done.stderr.strip() or done.stdout.strip()}")


def environment_of(target: Path | None, rehearse: bool, scratch: Path) -> dict[str, str]:
    """Of all stages."""
    paths = [*([str(target)] if target else []), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    made = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        # What is installed has its bytecode; what was unpacked has none, and gets it in a folder that goes again.
        **({"PYTHONPYCACHEPREFIX": str(scratch / "pycache")} if target else {"PYTHONDONTWRITEBYTECODE": "1"}),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        # Stages and their workers share the device's memory.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    if rehearse:
        flags = f"{os.environ.get('XLA_FLAGS', '')} {QUICKLY_COMPILED}".strip()
        made |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "XLA_FLAGS": flags}
    return made


_ABOUT = """
import importlib.util, json, jax
from jaxft.bench.machine import machine
about = machine(("jax", "jaxlib", "jax-cuda13-plugin", "flax", "optax", "torch", "transformers"))
device = jax.devices()[0]
print(json.dumps(about | {"device": device.device_kind, "platform": device.platform}))
"""


def look_at(environment: dict[str, str]) -> dict[str, Any]:
    """What the machine has; ends with one line if something that the stages need is not there."""
    tried = f"import importlib\nfor name in {NEEDED!r}:\n importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", tried + _ABOUT], env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"this Python cannot run the stages: {last}; --wheels FOLDER brings what is missing")
    return json.loads(done.stdout.strip().splitlines()[-1])


def topology_of(device: str) -> str:
    """The name that `jaxft plan` has for one of these devices."""
    kinds = {"NVIDIA H100": "h100-1", "NVIDIA H200": "h200-1", "NVIDIA A100": "a100-1"}
    return next((name for kind, name in kinds.items() if device.startswith(kind)), "cpu:1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT"), metavar="FOLDER", help="of the results (default: $OUT)")
    parser.add_argument("--wheels", metavar="FOLDER", help="what the machine lacks")
    parser.add_argument("--minutes", type=float, help="after which nothing runs (default: 8; a rehearsal has an hour)")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these alone, for instance values attention")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, small")
    options = parser.parse_args()
    if options.out is None:
        parser.error("name a folder for the results: --out FOLDER (there is no $OUT)")
    if options.minutes is None:
        options.minutes = 60.0 if options.rehearse else 8.0
    until = time.monotonic() + 60 * options.minutes  # what is installed counts
    out = Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stages end with us
    with _scratch() as scratch:
        target = None
        if options.wheels:
            target = scratch / "site"
            install(Path(options.wheels), target)
        environment = environment_of(target, options.rehearse, scratch)
        run = Run(out, scratch, environment, until, options.rehearse)
        run.results["machine"] = look_at(environment)
        if not options.rehearse and run.results["machine"]["platform"] == "cpu":
            raise SystemExit("jax finds no accelerator here; --rehearse tries the stages on the CPU")
        print(", ".join(f"{key} {value}" for key, value in run.results["machine"].items()), flush=True)
        run.all(stages(options, topology_of(run.results["machine"]["device"]), scratch))
    text = text_of(run.results)
    (out / "table.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nwrote {', '.join(str(out / name) for name in ('results.json', 'table.txt', 'log.txt'))}")
    states = [stage["state"] for stage in run.results["stages"].values()]
    raise SystemExit(0 if all(state == "ok" for state in states) else 1)


if __name__ == "__main__":
    main()
