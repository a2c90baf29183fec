"""Rows of .json files: lists of objects, read one at a time whatever they are written like; and files packed with Zstandard."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxft.data.sources import lines
from jaxft.data.sources.read import Form, column_names, iter_rows
from jaxft.errors import UserError

COLUMNS = ("text", "label")
_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | st.sampled_from(
    ['"', '\\"', "[{", "}]", "\\", "\n,"]
)
_inner = st.recursive(
    _text | st.integers() | st.none(),
    lambda more: st.lists(more, max_size=2) | st.dictionaries(_text, more, max_size=2),
)
_rows = st.lists(
    st.builds(lambda text, label, other: {"other": other, "text": text, "label": label}, _text, st.integers(), _inner),
    max_size=5,
)


def values(path: Path) -> list[tuple[Any, ...]]:
    return [row.values for row in iter_rows(str(path), COLUMNS)]


def refused(path: Path, columns: tuple[str, ...] = COLUMNS) -> str:
    with pytest.raises(UserError) as caught:
        list(iter_rows(str(path), columns))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


@given(
    rows=_rows,
    indent=st.none() | st.integers(0, 3),
    ascii_only=st.booleans(),
    around=st.sampled_from([None, "data", "rows"]),
    piece=st.integers(4, 40),
)
@settings(deadline=None, max_examples=150)
def test_lists_round_trip(
    rows: list[Any], indent: int | None, ascii_only: bool, around: str | None, piece: int, tmp_path_factory: Any
) -> None:
    """However they are spaced, and wherever the pieces end that are read."""
    whole: Any = rows if around is None else {"version": "1", "ids": [1, [2]], around: rows, "more": {"a": [{}]}}
    path = tmp_path_factory.getbasetemp() / "rows.json"
    path.write_text(json.dumps(whole, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_PIECE", piece)
        assert values(path) == [(row["text"], row["label"]) for row in rows]


@given(rows=_rows, packed=st.booleans(), data=st.data())
@settings(deadline=None, max_examples=60)
def test_a_file_that_was_cut_off_is_refused(
    rows: list[Any], packed: bool, data: st.DataObject, tmp_path_factory: Any
) -> None:
    whole = json.dumps(rows).encode()
    whole = zstd.compress(whole) if packed else whole
    path = tmp_path_factory.getbasetemp() / ("cut.json.zst" if packed else "cut.json")
    path.write_bytes(whole[: data.draw(st.integers(1, len(whole) - 1))])
    assert "broken zstd data" in (said := refused(path)) or "cut off" in said


@pytest.mark.parametrize("name", ["a.csv.zst", "a.csv", "a.csv.gz"])
def test_files_are_unpacked_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(zstd.compress(b"text,label\na,x\n") + zstd.compress(b"b,y\n"))  # as `zstd` writes of two files
    assert values(path) == [("a", "x"), ("b", "y")]
    assert column_names(str(path), "text", Form()) == COLUMNS
    path.write_bytes(gzip.compress(b"text,label\na,x\n"))
    assert values(path) == [("a", "x")]


def test_memory_is_that_of_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.json.zst"
    row = json.dumps({"text": "x" * 1000, "label": 1})
    path.write_bytes(zstd.compress(f"[{','.join([row] * 5_000)}]".encode()))
    rows = iter_rows(str(path), COLUMNS)
    tracemalloc.start()
    try:
        assert sum(1 for _ in rows) == 5_000
        assert tracemalloc.get_traced_memory()[1] < 2**20  # of 5 MB
    finally:
        tracemalloc.stop()


def test_json_lines_are_read_as_what_they_are(tmp_path: Path) -> None:
    path, notes = tmp_path / "a.json", list[str]()
    path.write_text('{"text": "a", "label": [1]}\n{"text": "b", "label": 2}\n')
    rows = list(iter_rows(str(path), ("text",), Form(note=notes.append)))
    assert [(row.values, row.where) for row in rows] == [(("a",), f"{path}:1"), (("b",), f"{path}:2")]
    assert notes == [f"{path}: is read as JSON Lines: each line is an object"]


_ROW = '{"text": "a", "label": 1}'


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "a.json:1: is no JSON list or object; a .json file must be a list of objects, [{"),
        ('"a"', "a.json:1: is no JSON list or object"),
        ("[1, 2]", 'a.json row 0: expected a JSON object such as {"text": ...}, found a int'),
        (f"[{_ROW}, [1]]", "a.json row 1: expected a JSON object"),
        ('[{"text": "a", "labels": 1}]', "a.json row 0: no column 'label': did you mean 'labels'?"),
        (f'[{_ROW},\n{{"text": "b",, "label": 1}}]', "a.json:2: not valid JSON: Expecting property name"),
        (f"[{_ROW}\n{_ROW}]", "a.json:2: not valid JSON: expected ',' or ']', found '{'"),
        (f"[{_ROW},]", "a.json:1: not valid JSON: Expecting value"),
        (f"[{_ROW}]]", "a.json:1: not valid JSON: more follows after its end"),
        (f"[{_ROW}] {_ROW}", "a.json:1: not valid JSON: more follows after its end"),
        ('[{"text": "a, "label": 1}, {"text": "b", "label": 1}]', "a quote or bracket is missing"),
        ('[{"text": NaN, "label": 1}]', "a.json:1: not valid JSON: NaN is not a JSON value"),
        ('[{"text": "\\ud800", "label": 1}]', "a.json row 0: column 'text' holds half of a \\u surrogate pair"),
        ('[{"text": {}, "label": 1}]', "a.json row 0: column 'text' holds a dict; expected a string"),
        ('{"text": {"0": "a"}, "label": {"0": 1}}', "an object without a list of objects (keys: text, label)"),
        ('{"columns": ["text"], "data": [["a"]]}', "without a list of objects (keys: columns, data)"),
        (f'{{"a": [{_ROW}], "b": [{_ROW}]}}', "a.json: keys 'a' and 'b' both hold lists of objects; keep the one"),
        (f'{{"data": [{_ROW}], text: 1}}', "a.json:1: not valid JSON: expected a key in double quotes, found 't'"),
        (f'{{"data" [{_ROW}]}}', "a.json:1: not valid JSON: expected ':', found '['"),
        (f'{{"data": [{_ROW}]', "a.json:1: not valid JSON: the file ends here (expected ',' or '}'): it was cut off"),
        ('{"data": [{"paragraphs": [{"qas": {}}]}]}', "a.json: no column 'text': did you mean 'context'?"),
        ("[" + '{"a":' * 100_000 + "1" + "}" * 100_000 + "]", "a.json:1: not valid JSON: nested too deeply"),
    ],
)  # fmt: skip
def test_message(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert expected in refused(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[{"text": "\xff"}]', "a.json: not valid UTF-8 (byte 12: invalid start byte); save the file as UTF-8"),
        (b'[{"text": "a", "x": "' + b"\xc3\xa9" * 70_000 + b'\xff"}]', "not valid UTF-8 (byte 140022: invalid start"),
        ("[{}]".encode("utf-16-le"), "a.json: looks like UTF-16 without a byte order mark"),
        (b"\xff\xfe[\x00\x00", "a.json: not valid UTF-16 (byte 5: truncated data)"),
        (b"PK\x03\x04....", "a.json: is a zip archive"),
    ],
)
def test_files_that_are_not_text(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert expected in refused(tmp_path / "a.json")


def test_wide_text_and_damaged_archives(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        path.write_text(f"[{_ROW}]", encoding=encoding)
        assert values(path) == [("a", 1)]
    (tmp_path / "b.json.zst").write_text(f"[{_ROW}]")
    assert "b.json.zst: broken zstd data (Unable to decompress" in refused(tmp_path / "b.json.zst")


def test_without_the_package_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    (tmp_path / "a.csv.zst").write_bytes(zstd.compress(b"text,label\n"))
    monkeypatch.setattr(lines.importlib, "import_module", missing)
    assert "a.csv.zst: is compressed with zstd, which needs a package" in (said := refused(tmp_path / "a.csv.zst"))
    assert said.endswith("pip install jaxft[zstd], or unpack it (zstd -d)")
    path = tmp_path / "folder"
    path.mkdir()
    (path / "rows.json").write_text(f"[{_ROW}]")
    assert "if they hold the rows, name them: folder/*.json" in refused(path)
