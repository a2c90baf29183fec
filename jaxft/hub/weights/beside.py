"""Files that lie beside the weights of a model folder: which of them a folder made of it takes over, and which it must not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from jaxft.data.thresholds import FILE as THRESHOLDS
from jaxft.errors import UserError
from jaxft.files import present, read_json, write_atomic

LARGEST = 50 * 10**6
"""Bytes of the largest file that is taken over."""

# Settings that name code, which a folder without that code must not promise.
CODE_SETTINGS = ("auto_map", "custom_pipelines")

_CODE = (".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".sh", ".ipynb", ".cu", ".cpp", ".exe")
_WEIGHTS = (
    *(".safetensors", ".bin", ".msgpack", ".h5", ".hdf5", ".onnx", ".onnx_data", ".ot", ".pt", ".pth", ".ckpt", ".npz"),
    *(".npy", ".pkl", ".pickle", ".joblib", ".gguf", ".ggml", ".tflite", ".pb", ".mlmodel", ".params", ".npz", ".xml"),
)
_TEXTS = (
    ".json",
    ".jsonl",
    ".md",
    ".txt",
    ".jinja",
    ".model",
    ".spm",
    ".vocab",
    ".bpe",
    ".codes",
    ".tiktoken",
    ".yaml",
    ".yml",
)
_NAMES = ("LICENSE", "NOTICE", "README", "COPYING", "USE_POLICY", "ATTRIBUTION")
# Written anew with the weights, or read with them.
_KNOWN_STEMS = ("model", "pytorch_model", "flax_model")
_ADAPTERS = ("adapter_config.json", "adapter_model.json")


def take_over(source: Path, target: Path, known: Collection[str], note: Callable[[str], None]) -> None:
    """Copies what lies beside the weights in ``source`` to ``target``: texts and settings, no code, no weights.

    Hidden files, files of which ``target`` has its own, and weights that were read are passed over in silence.

    Args:
      known: names that the caller has dealt with.
      note: called with one line that names what was taken over, and one that names what was left behind.
    """
    carried: list[str] = []
    left: list[str] = []
    for name, path in _inside(source):
        if name in known or (target / name).exists() or _is_read(name):
            continue
        why = _unfit(path, source)
        if why is None:
            why = _copy(path, target / name)
            carried.append(name)
        if why is not None:
            left.append(f"{name} ({why})" if name not in carried else f"{why} of {name}")
    if carried:
        note(f"carried over from {source}: {_listed(carried)}")
    if left:
        note(f"left behind in {source}: {_listed(left)}")


def _inside(source: Path) -> Iterator[tuple[str, Path]]:
    """Files of a folder by name, those in the folders of sentence-transformers' modules too; other folders as themselves."""
    modules = _module_folders(source)
    for path in sorted(source.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and path.name in modules:
            for inner in sorted(path.iterdir()):
                if not inner.name.startswith("."):
                    yield f"{path.name}/{inner.name}", inner
        else:
            yield path.name, path


def _module_folders(source: Path) -> set[str]:
    """Folders that modules.json of sentence-transformers names."""
    path = source / "modules.json"
    listed = read_json(path) if present(path) else []
    entries = [entry.get("path") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return {entry for entry in entries if isinstance(entry, str) and entry and "/" not in entry and entry != ".."}


def _is_read(name: str) -> bool:
    """Whether a file is weights that we read (or an index of them): the new folder has its own."""
    stem = name.removesuffix(".index.json").split("-00")[0]
    plain = stem.rsplit(".", 1)[0]
    return (
        "/" not in name and plain in _KNOWN_STEMS and name.endswith((".safetensors", ".bin", ".msgpack", ".index.json"))
    )


def _unfit(path: Path, source: Path) -> str | None:
    """Why a file is not taken over; None: it is."""
    suffix = path.suffix.lower()
    inner = path.parent != source
    if path.is_dir():
        return "folder"
    if not path.is_file():
        return "no plain file"
    if path.name == THRESHOLDS:
        return "tuned for other weights"
    if path.name in _ADAPTERS or path.name.startswith("adapter_model."):
        return "adapters, which transformers would load on top"
    if suffix in _CODE:
        return "code"
    if suffix in _WEIGHTS and not (inner and suffix == ".safetensors"):
        return "weights or binary data"
    if suffix not in _TEXTS and suffix not in _WEIGHTS and not path.name.upper().startswith(_NAMES):
        return "of unknown kind"
    if path.stat().st_size > LARGEST:
        return f"{path.stat().st_size / 1e6:.0f} MB"
    if _leads_out(path, source):
        return "a link to elsewhere"
    return None


def _leads_out(path: Path, source: Path) -> bool:
    """Whether a link leaves the model's folder; the hub's cache keeps the files that its folders show in ``blobs``."""
    real = path.resolve()
    return not any(real.is_relative_to(home.resolve()) for home in (source, source.parent.parent / "blobs"))


def _copy(path: Path, target: Path) -> str | None:
    """Copies a file; says what was taken out of it: settings that name code."""
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, target)
    if path.suffix.lower() != ".json":
        return None
    try:
        tree = read_json(path)
    except UserError:
        return None  # not ours to judge
    named = [name for name in CODE_SETTINGS if isinstance(tree, dict) and name in tree]
    if named and isinstance(tree, dict):
        kept = {name: value for name, value in tree.items() if name not in named}
        write_atomic(target, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")
    return ", ".join(named) or None


def _listed(names: list[str], most: int = 16) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
