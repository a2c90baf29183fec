"""Translations from the message catalogues of Debian packages: English messages and what translators made of them.

    apt-get download cinnamon-l10n gcc-12-locales gnupg-l10n kdevelop-l10n krita-l10n libc-l10n util-linux-locales
    for file in *.deb; do dpkg-deb -x $file packages/${file%%_*}; done
    python configs/data/message_catalogues/build.py packages FOLDER [LANGUAGE]

FOLDER gets train.jsonl and test.jsonl, rows of ``text`` and ``target``. LANGUAGE is that of the targets, as catalogues are named (de).
The packages of HELD_OUT are the test alone, without messages that the training has too: rows of one package are alike. Left out: messages
of one word, those that are not translated, and those with markup. Nothing is kept here: the catalogues' licences are
those of the packages (share/doc/*/copyright).
"""

from __future__ import annotations

import json
import random
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

_MAGIC = struct.pack("<I", 0x950412DE)
HELD_OUT = ("gnupg-l10n", "util-linux-locales")
_MARKUP = re.compile(r"[<>{}\\]|\n.")


def messages(catalogue: Path) -> Iterator[tuple[str, str]]:
    """Messages of a compiled catalogue and their translations (gettext's manual, "The Format of GNU MO Files"); no plurals."""
    data = catalogue.read_bytes()
    order = "<" if data[:4] == _MAGIC else ">"
    count, originals, translations = struct.unpack_from(f"{order}3I", data, 8)

    def texts(table: int) -> Iterator[bytes]:
        for number in range(count):
            length, at = struct.unpack_from(f"{order}2I", data, table + 8 * number)
            yield data[at : at + length]

    charset = "utf-8"
    for message, translated in zip(texts(originals), texts(translations), strict=True):
        if not message:
            stated = re.search(rb"charset=([\w-]+)", translated)
            charset = charset if stated is None else stated[1].decode()
        elif b"\0" not in message:
            yield message.rpartition(b"\x04")[2].decode(charset), translated.decode(charset)  # behind its context


def plain(text: str) -> str:
    """A message without the marks of keys, blanks put in order."""
    return " ".join(re.sub(r"[&_](?=\w)", "", text).split())


def pairs(package: Path, language: str) -> dict[str, str]:
    """The pairs of a package, each message once."""
    found: dict[str, str] = {}
    for catalogue in sorted(package.rglob(f"{language}/LC_MESSAGES/*.mo")):
        for message, translated in messages(catalogue):
            source, target = plain(message), plain(translated)
            whole = not _MARKUP.search(message) and len(source.split()) > 1 and len(source) < 400
            if whole and target and target != source:
                found.setdefault(source, target)
    return found


def write(path: Path, found: dict[str, str]) -> None:
    """Rows in an order that says nothing."""
    rows = sorted(found.items())
    random.Random(0).shuffle(rows)
    lines = [json.dumps({"text": source, "target": target}, ensure_ascii=False) + "\n" for source, target in rows]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    """Reads unpacked packages."""
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    packages, folder, language = Path(sys.argv[1]), Path(sys.argv[2]), (sys.argv[3:] or ["de"])[0]
    train: dict[str, str] = {}
    test: dict[str, str] = {}
    for package in sorted(path for path in packages.iterdir() if path.is_dir()):
        found = pairs(package, language)
        print(f"{package.name}: {len(found)} pairs")
        for source, target in found.items():
            (test if package.name in HELD_OUT else train).setdefault(source, target)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.jsonl", train)
    write(folder / "test.jsonl", {source: target for source, target in test.items() if source not in train})


if __name__ == "__main__":
    main()
