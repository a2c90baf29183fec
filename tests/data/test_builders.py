"""What makes rows of packages' catalogues and manual pages."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2] / "configs/data"


def builder(name: str) -> ModuleType:
    found = importlib.util.spec_from_file_location(f"{name}_build", ROOT / name / "build.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def write_catalogue(path: Path, pairs: dict[str, str]) -> None:
    """A compiled catalogue (gettext's manual, "The Format of GNU MO Files")."""
    path.parent.mkdir(parents=True)
    rows = sorted({"": "Content-Type: text/plain; charset=UTF-8\n", **pairs}.items())
    texts, tables, at = b"", list[bytes](), 28 + 16 * len(rows)
    for column in (0, 1):
        for row in rows:
            data = row[column].encode()
            tables.append(struct.pack("<II", len(data), at + len(texts)))
            texts += data + b"\0"
    head = struct.pack("<7I", 0x950412DE, 0, len(rows), 28, 28 + 8 * len(rows), 0, 0)
    path.write_bytes(head + b"".join(tables) + texts)


def test_catalogues_become_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = builder("message_catalogues")
    said = {
        "&Open the file": "Die Datei ö&ffnen", "menu\x04Close it": "Schließen Sie es", "Cancel": "Abbrechen",
        "See <b>this</b> now": "Jetzt",
        "not  translated": "not translated", "in  both": "in beiden",
    }  # fmt: skip
    write_catalogue(tmp_path / "packages/krita-l10n/usr/share/locale/de/LC_MESSAGES/a.mo", said)
    held = {"in both": "beides", "held out alone": "nur hier"}
    write_catalogue(tmp_path / f"packages/{build.HELD_OUT[0]}/usr/share/locale/de/LC_MESSAGES/b.mo", held)
    monkeypatch.setattr("sys.argv", ["build.py", str(tmp_path / "packages"), str(tmp_path / "rows")])
    build.main()
    rows = {
        name: {
            row["text"]: row["target"]
            for row in map(json.loads, (tmp_path / f"rows/{name}.jsonl").read_text().splitlines())
        }
        for name in ("train", "test")
    }
    assert rows["train"] == {
        "Open the file": "Die Datei öffnen",
        "Close it": "Schließen Sie es",
        "in both": "in beiden",
    }
    assert rows["test"] == {"held out alone": "nur hier"}


def test_manual_pages_become_summaries() -> None:
    build = builder("man_pages")
    page = r"""
.TH CAT 1
.SH NAME
cat \- concatenate files and print them
.SH SYNOPSIS
.B cat
.SH DESCRIPTION
.\" a comment
Concatenate \fIFILE\fR(s) to standard output, as
.BR many " of them"
as there are. With no FILE, read standard input.
.TP
\fB\-n\fR
number all output lines
"""
    assert build.row_of(page) == {
        "text": "Concatenate FILE(s) to standard output, as many of them as there are. With no FILE, read standard input.",
        "target": "concatenate files and print them",
        "lead": "Concatenate FILE(s) to standard output, as many of them as there are.",
    }
    assert build.row_of(".SH NAME\ncat\n.SH DESCRIPTION\nshort") is None
