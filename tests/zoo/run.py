"""Judges every folder of the zoo and prints a table: `make zoo`, or python tests/zoo/run.py [--quick] [--only TEXT].

The zoo is a few hundred folders as people have them: families, formats, types and damages of weights, tokenizers as each
library saved them. Each must come out equal to the reference, or be refused in one clear line. Anything else is a failure:
numbers that silently differ, a traceback, a sound folder refused, a broken one accepted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

if __name__ == "__main__":
    # In place of this folder, whose tokenizers.py would hide the library of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

from zoo.case import Case

OUTCOMES = ("equal", "refused", "WRONG", "TRACEBACK", "REFUSED")
"""Equal to the reference; refused in one line; silently wrong; an error that is not a refusal; refused though it is sound."""


def all_cases() -> list[Case]:
    """The cases of every module of this package, in order."""
    import zoo

    found: list[Case] = []
    for info in sorted(pkgutil.iter_modules(zoo.__path__), key=lambda info: info.name):
        if info.name.startswith("test_"):
            continue
        module = importlib.import_module(f"zoo.{info.name}")
        made: Iterable[Case] = getattr(module, "CASES", None) or getattr(module, "cases", list)()
        found.extend(made)
    names = Counter(case.name for case in found)
    twice = [name for name, count in names.items() if count > 1]
    if twice:
        raise ValueError(f"two cases are called {twice[0]}")
    return found


def outcome_of(case: Case, folder: Path) -> tuple[str, str]:
    """(one of OUTCOMES, what there is to say) for a case, made in ``folder``."""
    from jaxft.errors import UserError

    folder.mkdir(parents=True)
    try:
        case.make(folder)
        difference = case.judge(folder)
    except UserError as error:
        text = str(error)
        if "\n" in text or not text:
            return "TRACEBACK", f"the refusal is not one line: {text!r}"
        if case.expect == "equal":
            return "REFUSED", text
        return ("refused", text) if case.says in text else ("WRONG", f"the refusal does not say {case.says!r}: {text}")
    except Exception as error:  # noqa: BLE001 - any other error is what is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).splitlines() or [""])[0]
        return "TRACEBACK", f"{type(error).__name__}: {first} ({Path(last.filename).name}:{last.lineno})"
    if difference is not None:
        return "WRONG", difference
    return ("WRONG", "accepted, though it should be refused") if case.expect == "refused" else ("equal", "")


def main() -> int:
    """Runs the cases asked for; 1 if there is a failure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the cross-section of the test suite")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name or kind holds this")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the folders here")
    parser.add_argument("--list", action="store_true", help="also list what was refused, with the words")
    options = parser.parse_args()
    start = time.perf_counter()
    chosen = [c for c in all_cases() if (c.quick or not options.quick) and options.only in f"{c.name} {c.kind}"]
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for number, case in enumerate(chosen):
            outcome, text = outcome_of(case, (options.keep or Path(scratch)) / f"{number:04d}" / "folder")
            counts.setdefault(case.kind, Counter())[outcome] += 1
            if outcome in OUTCOMES[2:] or (options.list and outcome == "refused"):
                print(f"{outcome:10}{case.name}: {text}", flush=True)
    print_table(counts)
    seconds = time.perf_counter() - start
    failures = sum(count for row in counts.values() for outcome, count in row.items() if outcome in OUTCOMES[2:])
    print(f"{len(chosen)} folders in {seconds:.0f} s, {failures} failures")
    return int(failures > 0)


def print_table(counts: dict[str, Counter[str]]) -> None:
    """Counts by kind and outcome."""
    width = max(len(kind) for kind in [*counts, "all"]) + 2
    print(f"{'':{width}}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES))
    total: Counter[str] = Counter()
    for kind, row in counts.items():
        total.update(row)
        print(f"{kind:{width}}" + "".join(f"{row[outcome] or '':>11}" for outcome in OUTCOMES))
    print(f"{'all':{width}}" + "".join(f"{total[outcome] or '':>11}" for outcome in OUTCOMES))


if __name__ == "__main__":
    raise SystemExit(main())
