"""Real rows from the package lists of a Debian or Ubuntu machine: what a package is, its tags, and its long description.

    (apt-cache dumpavail; /usr/lib/apt/apt-helper cat-file /var/lib/apt/lists/*_Translation-en*) > packages.txt
    python configs/data/debian_packages/build.py FOLDER < packages.txt

FOLDER gets tags_train.jsonl and tags_test.jsonl: ``text``, name and short description, and ``tags``, the debtags that at least 300
packages have; and descriptions_train.jsonl and descriptions_test.jsonl: the ``short`` and the ``long`` description, from the lists of
translations (where apt has none: ``sudo apt-get -o Acquire::Languages=en update``). One source package in ten is held out: packages of
one source (libfoo1, libfoo-dev) are alike, and all on one side. Equal texts are there once. Nothing is downloaded; the lists' licence is
that of the distribution, so no rows are kept here.
"""

from __future__ import annotations

import collections
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

LEAST = 300
"""Packages that a tag must be of."""


def packages(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The stanzas of a Packages file; lines that begin with a blank go on with the field before."""
    fields: dict[str, str] = {}
    last = ""
    for line in lines:
        line = line.rstrip("\n")
        if not line:
            if fields:
                yield fields
            fields = {}
        elif line.startswith(" "):
            fields[last] += "\n" + line[1:]
        else:
            last, _, value = line.partition(":")
            fields[last] = value.strip()
    if fields:
        yield fields


def is_test(package: dict[str, str]) -> bool:
    """Whether a package is held out: by the name of its source."""
    source = package.get("Source", package["Package"]).split(" ")[0]
    return hashlib.sha256(source.encode()).digest()[0] < 26


def write(folder: Path, name: str, rows: list[tuple[bool, dict[str, object]]]) -> None:
    """Both parts, each text once."""
    seen = set()
    for part, held in (("train", False), ("test", True)):
        kept = []
        for test, row in rows:
            text = next(iter(row.values()))
            if test == held and text not in seen:
                seen.add(text)
                kept.append(json.dumps(row, ensure_ascii=False) + "\n")
        (folder / f"{name}_{part}.jsonl").write_text("".join(kept), encoding="utf-8")
        print(f"{name}_{part}.jsonl: {len(kept)} rows")


def descriptions(
    stanzas: list[dict[str, str]], sources: dict[str, dict[str, str]]
) -> list[tuple[bool, dict[str, object]]]:
    """Short and long descriptions, each long one once; of packages that are there.

    Args:
      sources: the packages by the hash of their description.
    """
    rows: dict[str, tuple[bool, dict[str, object]]] = {}
    for one in stanzas:
        package = sources.get(one.get("Description-md5", ""))
        short, _, rest = one.get("Description-en", "").partition("\n")
        long = " ".join(line.strip() for line in rest.split("\n") if line.strip() != ".")
        if package is not None and long:
            row: dict[str, object] = {"short": short, "long": long}
            rows.setdefault(long, (is_test(package), row))
    return list(rows.values())


def main() -> None:
    """Reads package lists from standard input."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    stanzas = sorted(packages(sys.stdin), key=lambda package: package.get("Package", ""))
    found = [package for package in stanzas if package.get("Package") and package.get("Description")]
    tags = {
        package["Package"]: package.get("Tag", "").replace("\n", " ").replace(",", " ").split() for package in found
    }
    often = collections.Counter(tag for each in tags.values() for tag in each)
    # debtags marks what nobody has tagged yet with FACET::TODO: no tag of its own.
    known = {tag for tag, count in often.items() if count >= LEAST and not tag.endswith("::TODO")}
    rows: list[tuple[bool, dict[str, object]]] = []
    for package in found:
        mine = sorted(known & set(tags[package["Package"]]))
        if mine:
            short = package["Description"].split("\n")[0]
            rows.append((is_test(package), {"text": f"{package['Package']}: {short}", "tags": mine}))
    write(folder, "tags", rows)
    sources = {package["Description-md5"]: package for package in found if "Description-md5" in package}
    write(folder, "descriptions", descriptions(stanzas, sources))


if __name__ == "__main__":
    main()
