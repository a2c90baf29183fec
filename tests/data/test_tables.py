"""Tables as programs write them: separators, marks before the header, no header, quotes between tabs, other encodings and formats."""

from __future__ import annotations

import csv
import gzip
import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.config import DataConfig
from jaxft.data.encode import read_rows
from jaxft.data.sources.read import Form, iter_rows
from jaxft.errors import UserError

ROWS = [('he said "great"', "x"), ("a, b; c|d", "y"), ("plain", "x")]


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


def _table(separator: str, rows: list[tuple[str, str]] = ROWS, header: bool = True, **how: object) -> str:
    made = io.StringIO()
    writer = csv.writer(made, delimiter=separator, lineterminator="\n", **how)  # type: ignore[arg-type]
    writer.writerows([("text", "label")] * header + rows)
    return made.getvalue()


def _read(path: Path, *columns: str, **form: object) -> tuple[list[Any], list[str]]:
    notes: list[str] = []
    made = Form(note=notes.append, **form)  # type: ignore[arg-type]
    rows = [row.values for row in iter_rows(str(path), columns or ("text", "label"), made)]
    return rows, [note.removeprefix(f"{path}: ") for note in notes]


def _fails(path: Path, *columns: str, **form: object) -> str:
    with pytest.raises(UserError) as caught:
        _read(path, *columns, **form)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "separator", "notes"),
    [
        ("a.csv", ",", []),
        ("a.csv", ";", ["cells are separated by semicolons"]),
        ("a.csv", "|", ["cells are separated by bars"]),
        ("a.csv.gz", "|", ["cells are separated by bars"]),
        ("a.tsv", ",", ["cells are separated by commas"]),
        (
            "a.csv",
            "\t",
            ["cells are separated by tabs", "cells in double quotes are read without them (data.quotes=none keeps them)"],
        ),
    ],
)  # fmt: skip
def test_separators_are_found_by_the_header(tmp_path: Path, name: str, separator: str, notes: list[str]) -> None:
    content = _table(separator).encode()
    path = _file(tmp_path, name, gzip.compress(content) if name.endswith(".gz") else content)
    assert _read(path) == (ROWS, notes)
    assert _read(path, "label") == ([(label,) for _, label in ROWS], notes)


def test_a_wrong_column_is_told_in_the_likeliest_reading(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.csv", _table(";"))
    assert "no column 'review': valid names: label, text; set data.text" in _fails(path, "review", "label")


def test_marks_before_the_header(tmp_path: Path) -> None:
    assert _read(_file(tmp_path, "a.csv", "sep=;\n" + _table(";")))[0] == ROWS
    assert _read(_file(tmp_path, "b.csv", '"sep=,"\r\n' + _table(",")))[0] == ROWS
    path = _file(tmp_path, "c.csv", "# made today\n# by me, too\n" + _table(","))
    assert _read(path) == (ROWS, ["2 lines that begin with # before the header are left out"])
    assert [row.where for row in iter_rows(str(path), ("text",))] == [f"{path}:{line}" for line in (4, 5, 6)]
    assert _read(_file(tmp_path, "d.tsv", "#text\tlabel\n#1\tx\n"), "#text")[0] == [("#1",)]  # a header, and a row


def test_no_header(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.csv", _table(",", header=False))
    assert "there is no header: data.header=false data.text=0 data.label=1" in _fails(path)
    assert _read(path, "0", "1", header=False) == (ROWS, [])
    assert _read(path, "1", header=False)[0] == [(label,) for _, label in ROWS]
    assert "a.csv:1: no column 'text': valid names: 0, 1" in _fails(path, header=False)
    assert "no column '2'" in _fails(path, "2", header=False)
    _file(tmp_path, "a.csv", "a,b\nc\n")
    assert "a.csv:2: expected 2 cells as in the first row, found 1" in _fails(path, "0", header=False)
    config = DataConfig(header=False, text="0", label="1")
    _file(tmp_path, "a.csv", "")
    with pytest.raises(UserError, match=r"a\.csv: the data set is empty"):
        read_rows(str(path), config)
    semicolons = _file(tmp_path, "b.csv", "a;x\nb;y\n")
    assert _read(semicolons, "0", "1", header=False)[0] == [("a", "x"), ("b", "y")]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        # Written with quotes where needed, as pandas does.
        ('text\tlabel\n"he said ""great"""\tx\nplain\ty\n', [('he said "great"', "x"), ("plain", "y")]),
        ('text\tlabel\n"two\tcells"\tx\n"two\nlines"\ty\n', [("two\tcells", "x"), ("two\nlines", "y")]),
        ('"text"\t"label"\n"Yes"\t"x"\n', [("Yes", "x")]),  # everything in quotes
        # Ordinary characters, as in GLUE.
        ('text\tlabel\n"Yes"\tx\n', [('"Yes"', "x")]),
        ('text\tlabel\n"half a quote\tx\nthe other half"\ty\n', [('"half a quote', "x"), ('the other half"', "y")]),
        ('text\tlabel\n"he said ""great"""\tx\na 5" film\ty\n', [('"he said ""great"""', "x"), ('a 5" film', "y")]),
        ('text\tlabel\n"" he said\tx\n', [('"" he said', "x")]),
    ],
)
def test_quotes_between_tabs(tmp_path: Path, content: str, rows: list[tuple[str, str]]) -> None:
    path = _file(tmp_path, "a.tsv", content)
    found, notes = _read(path)
    assert found == rows
    read_without = "cells in double quotes are read without them (data.quotes=none keeps them)"
    assert notes == ([] if rows[0][0].startswith('"') else [read_without])


def test_quotes_as_told(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.tsv", 'text\tlabel\n"Yes"\tx\n')
    assert _read(path, quotes="double") == ([("Yes", "x")], [])
    assert _read(_file(tmp_path, "a.csv", 'text,label\n"Yes",x\n'), quotes="none")[0] == [('"Yes"', "x")]
    path = _file(tmp_path, "b.csv", 'text,label\n"Yes, x\n')
    assert "data.quotes=none takes quotes for ordinary characters" in _fails(path)
    assert _read(path, quotes="none")[0] == [('"Yes', " x")]


_cells = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ['"', '""', "a\tb", "a\nb", "x"]
)
# A tab and a line break in one cell may look like two rows of ordinary characters, and are then taken for that.
_told_apart = _cells.filter(lambda cell: not ("\t" in cell and "\n" in cell))


@settings(deadline=None, database=None)
@given(
    rows=st.lists(st.tuples(_told_apart, st.sampled_from(["x", "y"])), min_size=1, max_size=5),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_csv_writers_write_between_tabs_is_read_back(rows: list[tuple[str, str]], quoting: int) -> None:
    content = _table("\t", rows, quoting=quoting)
    with tempfile.TemporaryDirectory() as folder:
        path = _file(Path(folder), "a.tsv", content)
        assert _read(path, quotes="double")[0] == rows
        assert _read(path)[0] == rows


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt", "a.csv.gz"])
def test_marked_encodings(tmp_path: Path, encoding: str, name: str) -> None:
    # U+0A0A and U+2A0A hold the byte of a line end.
    texts = ["\u0a0a\u2a0a", "é\U0001f600", "last"]
    lines = {"csv": "text\n" + "\n".join(texts), "jsonl": "\n".join(f'{{"text": "{text}"}}' for text in texts)}
    content = lines.get(name.split(".")[1], "\n".join(texts)).encode(encoding)
    path = _file(tmp_path, name, gzip.compress(content) if name.endswith(".gz") else content)
    assert _read(path, "text")[0] == [(text,) for text in texts]


def test_broken_utf_16(tmp_path: Path) -> None:
    content = "text\na\n".encode("utf-16") + b"\x00"
    assert "a.csv:3: begins as UTF-16, but is not valid (truncated data)" in _fails(
        _file(tmp_path, "a.csv", content), "text"
    )


def test_gzip_by_its_content(tmp_path: Path) -> None:
    assert _read(_file(tmp_path, "a.csv", gzip.compress(_table(",").encode())))[0] == ROWS


def test_files_of_other_formats_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.csv", "w") as archive:
        archive.writestr("[Content_Types].xml", "x")
    assert "is a zip archive or an Excel workbook (.xlsx), not text; save the sheet as CSV" in _fails(
        tmp_path / "a.csv"
    )
    for content, what in (
        (b"PAR1....", "is a Parquet file; give it the suffix .parquet"),
        (b"<!DOCTYPE html>\n<html>", "is a web page and not the data"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"BZh91AY&SY", "compressed with bzip2"),
        ("text,label".encode("utf-16-be"), "looks like UTF-16 without a byte order mark"),
    ):
        assert what in _fails(_file(tmp_path, "b.csv", content))
    assert "git lfs pull" in _fails(_file(tmp_path, "c.parquet", b"version https://git-lfs.github.com/spec/v1\n"))
    _file(tmp_path, "a.xlsx", b"PK")
    assert "the suffix does not tell the format of the rows; save the sheet as CSV" in _fails(tmp_path / "a.xlsx")


def test_html_is_text_where_lines_are_texts(tmp_path: Path) -> None:
    assert _read(_file(tmp_path, "a.txt", "<html>\n"), "text")[0] == [("<html>",)]
