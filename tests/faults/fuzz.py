"""Coverage-guided fuzzing of every parser of files from elsewhere: make fuzz (needs pip install '.[fuzz]', Linux, Python 3.11 or 3.12).

python tests/faults/fuzz.py [--only NAME ...] [--seconds 600] [--json FILE]

libFuzzer (atheris) changes what begins as the sound and the malformed files of `malformed/`, as coverage of jaxft's own code tells
it. Whatever comes must be read, or refused by a UserError of one line; any other exception, 10 s or 2 GiB are a find, kept under
`--keep`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

if __package__ in (None, ""):  # started as a script
    sys.path[:1] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
    __package__ = "faults"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

_SEED_BYTES = 16 << 10
_LINE = 300
_STATS = re.compile(r"stat::number_of_executed_units:\s+(\d+)")
_COVERED = re.compile(r"\bcov: (\d+)")


class Parser(NamedTuple):
    """A reader of one kind of file."""

    kind: str
    """Of the malformed files that it begins with."""
    file: str
    """Where such a file lies in the folder of sound ones."""
    read: Callable[[Path], object]
    sound: str | None = None
    """The file that a sound one is, where no sound one has that name."""


def _all_of(path: Path) -> None:
    from jaxft.hub.weights import open_weights

    with open_weights(path) as weights:
        for name in weights.names():
            weights.read(name)


def _rows(*columns: str) -> Callable[[Path], object]:
    def read(path: Path) -> None:
        from jaxft.data.sources.read import iter_rows

        for _ in iter_rows(str(path), columns):
            pass

    return read


def _manifest(path: Path) -> object:
    from jaxft.checkpoint import read_manifest

    return read_manifest(path.parent)


def _run_file(path: Path) -> object:
    from jaxft.config import load_config

    return load_config(path)


def _override(path: Path) -> object:
    from jaxft.config import load_config

    return load_config(None, [path.read_bytes().decode("utf-8", "replace")])


def _model_config(path: Path) -> object:
    from jaxft.files import read_json_object
    from jaxft.hub.source import make_config
    from jaxft.models.families import bert

    return make_config(bert, bert.config_from_hf(read_json_object(path)))


def _tokenizer(path: Path) -> object:
    from jaxft.data.processors.tokenizer import Tokenizer

    return list(Tokenizer(path.parent).encode(["the cat sat", "on a mat"]))


def _sums(path: Path) -> object:
    from jaxft.hub.sums import check_sums

    return check_sums(path.parent)


PARSERS: dict[str, Parser] = {
    "safetensors": Parser("weights", "model/model.safetensors", _all_of),
    "torch": Parser("weights", "model/pytorch_model.bin", _all_of),
    "msgpack": Parser("weights", "model/flax_model.msgpack", _all_of),
    "index": Parser("weights", "model/model.safetensors.index.json", _all_of),
    "config": Parser("config", "model/config.json", _model_config),
    "tokenizer": Parser("tokenizer", "model/tokenizer.json", _tokenizer),
    "tokenizer_config": Parser("tokenizer", "model/tokenizer_config.json", _tokenizer),
    "manifest": Parser("checkpoint", "checkpoint/jaxft.json", _manifest),
    "run_file": Parser("run", "run.yaml", _run_file),
    "override": Parser("run", "override.txt", _override),
    "sums": Parser("weights", "model/SHA256SUMS", _sums),
    "csv": Parser("data", "bad.csv", _rows("text", "label"), "train.csv"),
    "tsv": Parser("data", "bad.tsv", _rows("text", "label")),
    "jsonl": Parser("data", "bad.jsonl", _rows("text", "label")),
    "json": Parser("data", "bad.json", _rows("text", "label")),
    "conll": Parser("data", "bad.conll", _rows("words", "labels")),
    "gzip": Parser("data", "bad.csv.gz", _rows("text", "label")),
    "parquet": Parser("data", "bad.parquet", _rows("text", "label")),
}


def main(arguments: list[str] | None = None) -> int:
    """0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARSERS), default=list(PARSERS))
    parser.add_argument("--seconds", type=int, default=600, help="for each parser")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="where inputs that were found are kept")
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(arguments)
    if options.child:
        return _child(options.child, rest)
    found = {}
    with tempfile.TemporaryDirectory(prefix="jaxft-fuzz-") as place:
        _write_seeds(Path(place))
        for name in options.only:
            found[name] = _fuzzed(name, Path(place), options.seconds, options.keep)
            print(f"{name}: {found[name]}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if any(one["found"] for one in found.values()) else 0


def _fuzzed(name: str, place: Path, seconds: int, keep: Path) -> dict[str, object]:
    keep = (keep / name).absolute()
    keep.mkdir(parents=True, exist_ok=True)
    before = set(keep.iterdir())
    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048", f"-max_len={4 * _SEED_BYTES}"]
    done = subprocess.run(
        [sys.executable, __file__, "--child", name, *limits, "-print_final_stats=1", f"-artifact_prefix={keep}/"]
        + [str(place / "corpus" / name)],
        env=os.environ | {"JAXFT_FUZZ": str(place)},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    said = done.stdout + done.stderr
    runs = _STATS.search(said)
    new = sorted(path.name for path in keep.iterdir() if path not in before)
    last = "" if done.returncode == 0 else next((one for one in _complaints(said)), said.strip()[-_LINE:])
    if done.returncode and not new:
        new = [f"exit code {done.returncode}"]
    covered = max((int(number) for number in _COVERED.findall(said)), default=0)
    return {"runs": int(runs[1]) if runs else 0, "edges": covered, "found": new, "said": last}


def _complaints(said: str) -> Iterator[str]:
    """What an exception that nobody expected said, the innermost frame first."""
    lines = [line for line in said.splitlines() if not line.startswith("INFO: ")]
    for number, line in enumerate(lines):
        if "Uncaught Python exception" in line or (line.startswith("==") and "ERROR" in line):
            yield " | ".join(part.strip() for part in lines[number : number + 40] if part.strip())[:2000]


def _write_seeds(place: Path) -> None:
    """The sound file of each parser, and the malformed ones of its kind, as far as they are small."""
    from faults.malformed import all_cases
    from faults.malformed.case import make_sound

    sound = place / "sound"
    make_sound(sound)
    for name in PARSERS:
        (place / "corpus" / name).mkdir(parents=True)
    (place / "corpus" / "override" / "sound").write_text("train.batch_size=8")
    for name, parser in PARSERS.items():
        first = sound / (parser.sound or parser.file)
        if first.is_file():
            shutil.copyfile(first, place / "corpus" / name / "sound")
    for number, case in enumerate(all_cases()):
        wanted = {name: parser.file for name, parser in PARSERS.items() if parser.kind == case.kind}
        folder = place / "damaged"
        shutil.copytree(sound, folder, symlinks=True)
        try:
            case.damage(folder)
            for name, file in wanted.items():
                path = folder / file
                if path.is_file() and not path.is_symlink() and path.stat().st_size <= _SEED_BYTES:
                    shutil.copyfile(path, place / "corpus" / name / f"case-{number}")
        except Exception as error:  # noqa: BLE001 - what needs more than these files is no seed
            print(f"{case.id}: no seed ({type(error).__name__})", file=sys.stderr)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _child(name: str, arguments: list[str]) -> int:
    """Fuzzes one parser in this process, which libFuzzer ends."""
    atheris = importlib.import_module("atheris")  # of another extra than the tests'
    with atheris.instrument_imports(include=["jaxft"]):
        import jaxft.checkpoint.manifest
        import jaxft.config
        import jaxft.data.processors.tokenizer
        import jaxft.data.sources.read
        import jaxft.hub.sums
        import jaxft.hub.weights  # noqa: F401
    from jaxft.errors import UserError, one_line

    parser = PARSERS[name]
    shared = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="jaxft-fuzz-", dir=shared))
    sound = Path(os.environ["JAXFT_FUZZ"]) / "sound"
    shutil.copytree(sound / "model", folder / "model")
    path = folder / parser.file
    path.parent.mkdir(parents=True, exist_ok=True)

    def once(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            parser.read(path)
        except UserError as error:
            if len(one_line(str(error))) > _LINE:
                raise AssertionError(f"a line of {len(one_line(str(error)))} characters") from error

    atheris.Setup([sys.argv[0], *arguments], once)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
