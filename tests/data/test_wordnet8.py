"""The data set that ships with the project keeps what its README promises."""

from __future__ import annotations

import collections
import re
import unicodedata
from pathlib import Path

from jaxft.data.sources.read import iter_rows

FOLDER = Path(__file__).resolve().parents[2] / "configs/data/wordnet8"


def _rows(split: str) -> list[tuple[str, str]]:
    rows = iter_rows(str(FOLDER / f"{split}.csv.gz"), ("text", "label"))
    return [(str(text), str(label)) for text, label in (row.values for row in rows)]


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def test_no_text_stands_in_both_splits_or_twice() -> None:
    texts = [_normalised(text) for split in ("train", "test") for text, _ in _rows(split)]
    assert len(set(texts)) == len(texts)


def test_counts_are_those_of_the_readme() -> None:
    table = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \|$", (FOLDER / "README.md").read_text("utf-8"), re.MULTILINE)
    stated = {label: (int(train), int(test)) for label, train, test in table}
    train, test = (collections.Counter(label for _, label in _rows(split)) for split in ("train", "test"))
    found = {label: (train[label], test[label]) for label in train | test}
    assert len(found) == 8
    assert stated == {**found, "all": (train.total(), test.total())}


def test_texts_are_definitions_without_quoted_examples() -> None:
    for split in ("train", "test"):
        for text, _ in _rows(split):
            assert '"' not in text
            assert len(_normalised(text).split()) >= 3


def test_files_are_small_and_carry_no_build_time() -> None:
    packed = [(FOLDER / f"{split}.csv.gz").read_bytes() for split in ("train", "test")]
    assert sum(map(len, packed)) < 400_000
    for raw in packed:
        assert raw[3] == 0, "no file name in the gzip header"
        assert raw[4:8] == bytes(4), "no time in the gzip header"
