"""Rows of text files: exact values, exact places, and one clear line for everything that can be wrong."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.sources.parquet_footer import group_sizes
from jaxft.data.sources.read import Form, Row, iter_rows
from jaxft.errors import UserError

TEXT_LABEL = ("text", "label")


def _values(reference: object, *columns: str) -> list[tuple[Any, ...]]:
    return [row.values for row in iter_rows(str(reference), columns or TEXT_LABEL)]


def _fails(reference: object, columns: tuple[str, ...] = TEXT_LABEL) -> str:
    with pytest.raises(UserError) as caught:
        list(iter_rows(str(reference), columns))
    message = str(caught.value)
    assert "\n" not in message
    return message


def _file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


# --- round trips -----------------------------------------------------------------------------------------------------

# Everything UTF-8 can hold; it cannot hold lone surrogates.
_anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    ['"', '""', "a\nb", "a\r\nb", "\r", "\x00", ",", "\t", "", "\ufeff", "\u2028", "\x85", " é ", "'"]
)
_cell_of_tsv = _anything.map(lambda text: "".join(c for c in text if c not in "\t\n\r"))


def _tables(cells: st.SearchStrategy[str]) -> st.SearchStrategy[list[list[str]]]:
    def of_width(width: int) -> st.SearchStrategy[list[list[str]]]:
        return st.lists(st.lists(cells, min_size=width, max_size=width), max_size=6)

    return st.integers(2, 4).flatmap(of_width)


def _check_round_trip(name: str, content: bytes, table: list[list[str]], starts: list[int], *, packed: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
        columns = tuple(f"c{i}" for i in reversed(range(len(table[0])))) if table else ("c0",)
        expected = [Row(tuple(reversed(row)), f"{path}:{line}") for row, line in zip(table, starts, strict=True)]
        form = Form(quotes="none") if name.endswith(".tsv") else None  # random cells may look as if all were in quotes
        assert list(iter_rows(str(path), columns, form)) == expected


@settings(deadline=None, database=None)
@given(table=_tables(_anything), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(), packed=st.booleans())
def test_csv_round_trip(table: list[list[str]], end: str, bom: bool, packed: bool) -> None:
    width = len(table[0]) if table else 2
    lines = []
    for row in [[f"c{i}" for i in range(width)], *table]:
        line = io.StringIO()
        csv.writer(line, lineterminator=end, quoting=csv.QUOTE_ALL).writerow(row)
        lines.append(line.getvalue())
    # A row starts one line below all the newlines before it, those inside quotes included.
    starts = [1 + total for total in itertools.accumulate(line.count("\n") for line in lines)][:-1]
    content = "".join(lines).encode("utf-8-sig" if bom else "utf-8")
    _check_round_trip("table.csv", content, table, starts, packed=packed)


@settings(deadline=None, database=None)
@given(table=_tables(_cell_of_tsv), end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(), packed=st.booleans())
def test_tsv_round_trip(table: list[list[str]], end: str, bom: bool, packed: bool) -> None:
    width = len(table[0]) if table else 2
    content = "".join("\t".join(row) + end for row in [[f"c{i}" for i in range(width)], *table])
    starts = list(range(2, len(table) + 2))
    _check_round_trip("table.tsv", content.encode("utf-8-sig" if bom else "utf-8"), table, starts, packed=packed)


@settings(deadline=None, database=None)
@given(table=_tables(_anything), ascii_only=st.booleans(), packed=st.booleans())
def test_jsonl_round_trip(table: list[list[str]], ascii_only: bool, packed: bool) -> None:
    rows = [{f"c{i}": cell for i, cell in enumerate(row)} for row in table]
    content = "".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows)
    _check_round_trip("table.jsonl", content.encode(), table, list(range(1, len(table) + 1)), packed=packed)


def test_quoted_newlines_move_the_line_of_later_rows(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.csv", 'text,label\n"two\nlines",x\nlast,y\n')
    assert [row.where for row in iter_rows(str(path), TEXT_LABEL)] == [f"{path}:2", f"{path}:4"]


def test_csv_fields_longer_than_the_standard_limit(tmp_path: Path) -> None:
    assert _values(_file(tmp_path, "a.csv", f"text,label\n{'x' * 200_000},y\n"))[0][0] == "x" * 200_000


def test_tsv_quotes_are_ordinary(tmp_path: Path) -> None:
    assert _values(_file(tmp_path, "a.tsv", 'text\tlabel\n"half a quote\tx\n')) == [('"half a quote', "x")]


def test_jsonl_values_keep_their_types(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.ndjson", '{"text": null, "label": 1}\n{"label": true, "text": 2.5, "more": [1]}\n')
    assert _values(path) == [(None, 1), (2.5, True)]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_blank_lines_at_the_end_are_skipped(tmp_path: Path, name: str) -> None:
    header, row = {"a.csv": ("a,b\n", "1,2\n"), "a.tsv": ("a\tb\n", "1\t2\n"), "a.jsonl": ("", '{"a": "1"}\n')}[name]
    assert _values(_file(tmp_path, name, f"{header}{row}\n\r\n\n"), "a") == [("1",)]


@pytest.mark.parametrize(("name", "content"), [("a.csv", "text,label\n"), ("a.tsv", "text\tlabel"), ("a.jsonl", "")])
def test_no_rows(tmp_path: Path, name: str, content: str) -> None:
    assert _values(_file(tmp_path, name, content)) == []


def test_rows_are_read_lazily(tmp_path: Path) -> None:
    rows = iter_rows(str(_file(tmp_path, "a.csv", "text,label\na,b\nonly one cell\n")), TEXT_LABEL)
    assert next(rows).values == ("a", "b")
    with pytest.raises(UserError, match="expected 2 cells"):
        next(rows)


def test_csv_column_without_a_name_is_no_obstacle(tmp_path: Path) -> None:
    assert _values(_file(tmp_path, "a.csv", ",text,,label\n0,a,,b\n")) == [("a", "b")]


# --- plain lines and standard input ----------------------------------------------------------------------------------


def test_txt_yields_every_line(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.txt", '\ufeffone, "two"\r\n\nthree')
    assert list(iter_rows(str(path), ("text",))) == [
        Row(('one, "two"',), f"{path}:1"),
        Row(("",), f"{path}:2"),
        Row(("three",), f"{path}:3"),
    ]


def test_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("é\nb\n".encode())))
    assert list(iter_rows("-", ("text",))) == [Row(("é",), "stdin:1"), Row(("b",), "stdin:2")]


def test_plain_lines_hold_one_column(tmp_path: Path) -> None:
    assert _fails(_file(tmp_path, "a.txt", "a\n")).endswith(
        "a.txt: plain lines hold one text each, but columns 'text', 'label' are wanted; use .csv or .jsonl"
    )
    assert _fails("-").startswith("stdin: plain lines")


# --- what can be wrong in text files ---------------------------------------------------------------------------------

_NEAREST = (
    "no column 'label': did you mean 'labels'? (columns: text, labels); set data.text / data.label to one of these"
)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "", "a.csv:1: there is no header; the first line must name the columns"),
        ("a.csv", "\ntext,label\n", "a.csv:1: there is no header"),
        ("a.tsv", "\t\n", "a.tsv:1: there is no header"),
        ("a.csv", "text,text,label\n", "a.csv:1: the header names column 'text' 2 times; rename all but one"),
        ("a.csv", "text,labels\n", f"a.csv:1: {_NEAREST}"),
        ("a.tsv", "x\ty\n", "a.tsv:1: no column 'text': valid names: x, y; set data.text / data.label"),
        ("a.jsonl", '{"text": "", "labels": 1}\n', f"a.jsonl:1: {_NEAREST}"),
        ("a.csv", "text,label\na,b\nc\n", "a.csv:3: expected 2 cells as in the header, found 1; correct the row"),
        ("a.tsv", "text\tlabel\na\tb\tc\n", "a.tsv:2: expected 2 cells as in the header, found 3"),
        ("a.csv", "text,label\n\na,b\n", "a.csv:2: a blank line before the end of the file"),
        ("a.tsv", "text\tlabel\n\na\tb\n", "a.tsv:2: a blank line before the end of the file"),
        ("a.jsonl", '\n{"text": "", "label": 1}\n', "a.jsonl:1: a blank line before the end of the file"),
        ("a.csv", 'text,label\na,b\n"c\nd,e\n', "a.csv:3: not valid CSV: a quote opened in this row is never closed"),
        ("a.csv", 'text,label\n"a"b,c\n', "a.csv:2: not valid CSV: ',' expected after '\"'; a quote inside"),
        ("a.csv", "text,label\ra,b\r", "a.csv:1: not valid CSV: a carriage return outside quotes"),
        ("a.csv", b"text,label\na,b\n\xff,c\n", "a.csv:3: not valid UTF-8 (byte 1 of the line: invalid start byte)"),
        ("a.txt.csv", "text,label\n".encode("utf-16-le"), "a.txt.csv: looks like UTF-16 without a byte order mark"),
        ("a.jsonl", b'{"text": "\xe9"}\n', "a.jsonl:1: not valid UTF-8 (byte 11 of the line"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": }\n', "a.jsonl:2:10: not valid JSON: Expecting value; each"),
        ("a.jsonl", '{"text": NaN}\n', "a.jsonl:1:1: not valid JSON: NaN is not a JSON value"),
        ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: not valid JSON: nested too deeply"),
        ("a.jsonl", "[1]\n", 'a.jsonl:1: expected a JSON object such as {"text": ...}, found a list'),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}\n', "a.jsonl:1: column 'text' holds half of a \\u surrogate"),
        ("a.jsonl", '{"text": {}, "label": 1}\n', "a.jsonl:1: column 'text' holds a dict; expected a string, number"),
        ("a.csv.gz", "text,label\n", "a.csv.gz: broken gzip data (Not a gzipped file"),
        ("a.csv.gz", gzip.compress(b"text,label\na,b\n" * 99, mtime=0)[:-12], "a.csv.gz: broken gzip data"),
        ("a.gz", "", "a.gz': the suffix does not tell"),
        ("a", "", "a': the suffix does not tell"),
    ],
)
def test_message(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    assert f"{tmp_path}/{expected}" in _fails(_file(tmp_path, name, content))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are listed by Linux only")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'text,label\n"x"y,z\nmore,\n'),
        ("a.csv", "text,label\na\nmore,\n"),
        ("a.tsv", "text\tlabel\na\nb\tc\n"),
        ("a.jsonl", "{\n{}\n"),
    ],
)
def test_an_error_closes_the_file(tmp_path: Path, name: str, content: str) -> None:
    path = _file(tmp_path, name, content)
    with pytest.raises(UserError) as caught:
        list(iter_rows(str(path), TEXT_LABEL))
    opened = [
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
    ]
    assert str(path) not in opened  # while the traceback is still alive
    assert caught.value


def test_a_forgotten_quote_does_not_pull_a_large_file_into_memory(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.csv", 'text,label\n"' + ("x" * 999 + "\n") * 20_000)
    assert "a.csv:2: not valid CSV: a quote opened in this row is never closed (field larger" in _fails(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "data file" in _fails(tmp_path / "no.csv")
    (tmp_path / "folder.csv").mkdir()
    assert "folder.csv: holds no data file (accepted: .bio, .conll" in _fails(tmp_path / "folder.csv")


def test_the_sizes_of_a_parquet_file_are_those_that_pyarrow_tells(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    table = pyarrow.table(
        {"text": [f"row {i}" for i in range(1000)], "list": [rng.integers(0, 9, n).tolist() for n in rng.integers(0, 7, 1000)],
         "deep": [{"a": {"b": [i]}} for i in range(1000)], "flag": [i % 2 == 0 for i in range(1000)]}
    )  # fmt: skip
    for number, options in enumerate(
        ({}, {"row_group_size": 300}, {"compression": "zstd", "write_page_index": True, "data_page_version": "2.0"})
    ):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(table, path, **options)
        found, metadata = group_sizes(path), parquet.read_metadata(path)
        assert len(found) == metadata.num_row_groups
        for size, group in zip(found, map(metadata.row_group, range(metadata.num_row_groups)), strict=True):
            columns = [group.column(i) for i in range(group.num_columns)]
            assert size.rows == group.num_rows
            assert size.values == max(column.num_values for column in columns)
            assert size.size == max(group.total_byte_size, sum(one.total_uncompressed_size for one in columns))
        raw = path.read_bytes()
        for cut in (raw[:-1], raw[:-9] + b"\xff" + raw[-8:], raw[:4] + raw[-8:], b"PAR1"):
            path.write_bytes(cut)
            with pytest.raises(UserError, match="cannot be read as Parquet: its footer is damaged"):
                group_sizes(path)
