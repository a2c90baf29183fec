"""Builds train.csv.gz and test.csv.gz of WordNet-8: which of 8 kinds of thing does a dictionary definition define?

    apt-get download wordnet-base && dpkg-deb -x wordnet-base_*.deb wn
    python build.py wn/usr/share/wordnet [OUTPUT_FOLDER]

Standard library only, and deterministic: the same data.noun gives the same bytes. README.md says what is built and why.
"""

from __future__ import annotations

import collections
import csv
import gzip
import io
import random
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

SEED = 20
PER_CLASS = 1000
TEST_SHARE = 0.2
MIN_WORDS = 3
# Numbers of lexicographer files: man 5 lexnames.
CLASSES = {
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "10": "communication",
    "13": "food",
    "15": "location",
    "18": "person",
    "20": "plant",
}
_STOP_WORDS = """
a an the of in on at to for from by with without and or as is are was were be been being that which who whom whose it
its this these those such some any usually especially often sometimes one etc into
"""
STOP_WORDS = frozenset(_STOP_WORDS.split())

Rows = list[tuple[str, str]]
"""Pairs (text, label)."""


def definition(gloss: str) -> str:
    """The gloss up to its first quoted example sentence."""
    # Examples follow `; "`; in some twenty glosses the separator is another one or is missing.
    return re.split(r'[;:,]?\s*"', gloss.strip(), maxsplit=1)[0].strip(" ;:,")


def normalised(text: str) -> str:
    """``text`` casefolded, with every run of punctuation and white space folded to one space."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def content(text: str) -> str:
    """The words of ``text`` that are no stop words: definitions that agree here are near-duplicates."""
    words = normalised(text).split()
    return " ".join(word for word in words if word not in STOP_WORDS) or " ".join(words)


def read(data_noun: Path) -> Rows:
    """All definitions of the eight classes, in the order of the file."""
    rows = []
    for line in data_noun.read_text(encoding="ascii").splitlines():
        if line.startswith("  "):  # the licence, ahead of the data
            continue
        head, _, gloss = line.partition("|")
        label, text = CLASSES.get(head.split()[1]), definition(gloss)
        if label and len(normalised(text).split()) >= MIN_WORDS:
            rows.append((text, label))
    return rows


def sampled(rows: Rows, rng: random.Random) -> Rows:
    """``PER_CLASS`` rows of each class."""
    groups = [[row for row in rows if row[1] == label] for label in CLASSES.values()]
    return [row for group in groups for row in rng.sample(group, PER_CLASS)]


def deduplicated(rows: Rows, key: Callable[[str], str]) -> Rows:
    """One row per key; none where two labels share a key."""
    labels = collections.defaultdict(set)
    first: dict[str, tuple[str, str]] = {}
    for text, label in rows:
        labels[key(text)].add(label)
        first.setdefault(key(text), (text, label))
    return [row for name, row in first.items() if len(labels[name]) == 1]


def split(rows: Rows, rng: random.Random) -> tuple[Rows, Rows]:
    """(train, test), each with the same share of every class, each shuffled."""
    train: Rows = []
    test: Rows = []
    for label in CLASSES.values():
        group = [row for row in rows if row[1] == label]
        rng.shuffle(group)
        held_out = round(TEST_SHARE * len(group))
        test += group[:held_out]
        train += group[held_out:]
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def write(path: Path, rows: Rows) -> None:
    """A gzipped CSV file whose bytes depend on the rows alone: no time stamp and no file name in the gzip header."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("text", "label"), *rows])
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(text.getvalue().encode("utf-8"))


def main(wordnet: Path, out: Path) -> None:
    """Builds both files and prints the counts that README.md reports."""
    rng = random.Random(SEED)
    rows = sampled(read(wordnet / "data.noun"), rng)
    exact = deduplicated(rows, normalised)
    kept = deduplicated(exact, content)
    print(f"sampled {len(rows)}; duplicates dropped {len(rows) - len(exact)}; near-duplicates {len(exact) - len(kept)}")
    train, test = split(kept, rng)
    counts = [collections.Counter(label for _, label in part) for part in (train, test)]
    for label in CLASSES.values():
        print(f"| {label} | {counts[0][label]} | {counts[1][label]} |")
    print(f"| all | {len(train)} | {len(test)} |")
    write(out / "train.csv.gz", train)
    write(out / "test.csv.gz", test)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).resolve().parent)
