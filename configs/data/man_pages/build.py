"""One-line summaries from manual pages: what DESCRIPTION says, and how NAME puts it.

    apt-get download manpages manpages-dev coreutils util-linux git-man perl-doc
    for file in *.deb; do dpkg-deb -x $file packages/${file%%_*}; done
    python configs/data/man_pages/build.py packages FOLDER

FOLDER gets train.jsonl and test.jsonl, rows of ``text``, the first paragraphs of a page's description, ``target``, what its NAME line says
behind the dash, and ``lead``, the first sentence of the text: what a summary is measured against. One page in ten is held out, by the hash
of its summary: pages that several names share are there once. Nothing is kept here: pages have the licences of their packages.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sys
from pathlib import Path

_LONGEST = 2000
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z(])")
_ESCAPES = {
    r"\-": "-",
    r"\(em": "-",
    r"\(en": "-",
    r"\e": "\\",
    r"\&": "",
    r"\|": "",
    r"\^": "",
    r"\ ": " ",
    r"\(aq": "'",
    r"\(dq": '"',
}


def sections(page: str) -> dict[str, list[str]]:
    """The lines of each section of a page in troff, by its heading."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in page.splitlines():
        heading = re.match(r"\.S[Hh]\s+\"?([^\"]+)\"?", line)
        if heading:
            lines = found.setdefault(heading[1].strip().upper(), [])
        else:
            lines.append(line)
    return found


def plain(lines: list[str]) -> str:
    """The text of troff lines: requests for fonts keep their words, others end or are left out."""
    words: list[str] = []
    for line in lines:
        if line.startswith((".TS", ".nf", ".EX", ".PP\n", ".SS", ".TP", ".IP", ".RS")) and words:
            break
        request = re.match(r"[.'](B|I|BR|RB|IR|RI|BI|IB|Nm|Nd|Xr|Fl|Ar|Pa)\b\s*(.*)", line)
        if request:
            line = request[2].replace('"', "").replace(" ,", ",").replace(" .", ".")
        elif line.startswith((".", "'")):
            continue
        words.append(line)
    text = re.sub(r"\\f(\(..|\[[^\]]*\]|.)", "", " ".join(words))
    for escape, meant in _ESCAPES.items():
        text = text.replace(escape, meant)
    text = re.sub(r"\\(\[[^\]]*\]|\(..|\*\(..|s[+-]?\d|.)", "", text)
    return " ".join(text.split())


def row_of(page: str) -> dict[str, str] | None:
    """The row of a page; None: it has no summary, or no description that is longer."""
    found = sections(page)
    name, text = plain(found.get("NAME", [])), plain(found.get("DESCRIPTION", []))[:_LONGEST]
    summary = re.split(r"\s+-+\s+", name, maxsplit=1)[-1] if re.search(r"\s-+\s", name) else ""
    if len(summary.split()) < 3 or len(text.split()) < 12:
        return None
    return {"text": text, "target": summary, "lead": _SENTENCE.split(text, maxsplit=1)[0]}


def main() -> None:
    """Reads unpacked packages."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    packages, folder = Path(sys.argv[1]), Path(sys.argv[2])
    rows: dict[str, dict[str, str]] = {}
    for path in sorted(packages.rglob("usr/share/man/man?/*.gz")):
        row = row_of(gzip.decompress(path.read_bytes()).decode("utf-8", "replace"))
        if row is not None:
            rows.setdefault(row["target"], row)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[bool, list[str]] = {True: [], False: []}
    for target, row in rows.items():
        held = hashlib.sha256(target.encode()).digest()[0] < 26
        parts[held].append(json.dumps(row, ensure_ascii=False) + "\n")
    for name, held in (("train", False), ("test", True)):
        (folder / f"{name}.jsonl").write_text("".join(parts[held]), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(parts[held])} rows")


if __name__ == "__main__":
    main()
