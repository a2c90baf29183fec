"""Several files as one source: lists, patterns, folders of files, folders of class folders; always in the same order."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from jaxft.config import DataConfig, load_config
from jaxft.data.encode import read_rows
from jaxft.data.sources.read import Form, Reference, iter_rows
from jaxft.errors import UserError


def _write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def _values(reference: Reference, *columns: str) -> list[tuple[object, ...]]:
    return [row.values for row in iter_rows(reference, columns or ("text", "label"))]


def _fails(reference: Reference, *columns: str) -> str:
    with pytest.raises(UserError) as caught:
        _values(reference, *columns)
    return str(caught.value)


def _shards(folder: Path) -> Path:
    for name, text in (("part-2.csv", "c"), ("part-0.csv", "a"), ("part-1.csv", "b")):
        _write(folder / name, f"text,label\n{text},x\n")
    return folder


def test_patterns_and_folders_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    folder = _shards(tmp_path / "shards")
    expected = [("a", "x"), ("b", "x"), ("c", "x")]
    (folder / ".hidden.csv").write_text("junk")
    (folder / "_SUCCESS").write_text("")
    for reference in (str(folder), f"{folder}/part-*.csv", f"{tmp_path}/**/*.csv", f"{folder}/part-[0-9].csv"):
        assert _values(reference) == expected
    assert [row.where for row in iter_rows(str(folder), ("text",))] == [f"{folder}/part-{i}.csv:2" for i in range(3)]


def test_lists_keep_their_order_and_mix_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "b.csv", "label,text\nx,one\n")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "two", "label": 3}).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three"], "label": ["y"]}), tmp_path / "c.parquet")
    config = load_config(None, ["data.train=[b.csv,a.jsonl.gz, c.parquet]"])
    assert config.data.train == ("b.csv", "a.jsonl.gz", "c.parquet")
    assert config.data.train is not None
    assert [row.values for row in read_rows(config.data.train, config.data)] == [
        ("one", "x"),
        ("two", 3),
        ("three", "y"),
    ]


def test_a_file_whose_name_looks_like_a_pattern(tmp_path: Path) -> None:
    path = _write(tmp_path / "a[1]*.csv", "text,label\na,x\n")
    assert _values(str(path)) == [("a", "x")]


def test_class_folders(tmp_path: Path) -> None:
    _write(tmp_path / "d/pos/2.txt", "good\nfilm\n")
    _write(tmp_path / "d/pos/10.txt", "\ufeffgreat")
    _write(tmp_path / "d/neg/1.txt", "")
    _write(tmp_path / "d/urls.txt", "not a row\n")  # as in the folders of the film reviews by Maas et al.
    (tmp_path / "d/neg/2.txt.gz").write_bytes(gzip.compress(b"bad\r\n"))
    notes: list[str] = []
    rows = list(iter_rows(str(tmp_path / "d"), ("label", "text"), Form(note=notes.append)))
    assert [row.values for row in rows] == [("neg", ""), ("neg", "bad"), ("pos", "great"), ("pos", "good\nfilm")]
    assert rows[-1].where == str(tmp_path / "d/pos/2.txt")
    assert notes == [f"{tmp_path}/d: not read: urls.txt"]
    assert _values(str(tmp_path / "d"), "text")[3] == ("good\nfilm",)
    assert "no column 'review': valid names: label, text" in _fails(str(tmp_path / "d"), "review")


def test_folders_that_are_none_of_the_forms(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty: holds no data file (accepted: .bio, .conll" in _fails(str(tmp_path / "empty"))
    _write(_shards(tmp_path / "two") / "a.tsv", "text\tlabel\n")
    assert "holds files of several formats; name one kind, or list them" in _fails(str(tmp_path / "two"))
    _write(tmp_path / "deep/train/pos/1.txt", "a")
    assert "train holds no .txt file" in _fails(str(tmp_path / "deep"))
    _write(tmp_path / "half/pos/1.txt", "a")
    (tmp_path / "half/neg").mkdir()
    assert "half: neg holds no .txt file" in _fails(str(tmp_path / "half"))
    _write(tmp_path / "saved/state.json", "{}")
    assert _fails(str(tmp_path / "saved")).endswith(f"is a folder of the datasets library; write hf:{tmp_path}/saved")
    _write(tmp_path / "prepared/dataset_info.json", "{}")
    assert f"write tfds:{tmp_path}/prepared:SPLIT" in _fails(str(tmp_path / "prepared"))


def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _shards(tmp_path)
    assert "'*.tsv': no file matches this pattern" in _fails("*.tsv")
    assert "for several files write [part-0.csv,part-1.csv]" in _fails("part-0.csv,part-1.csv")
    assert "download it first" in _fails("https://example.com/a.csv")
    _write(tmp_path / "part-1.csv", "text,label\nb\n")
    assert "part-1.csv:2: expected 2 cells" in _fails("part-*.csv")
    _write(tmp_path / "part-1.csv", "text,lab\n")
    assert "part-1.csv:1: no column 'label'" in _fails("part-*.csv")
    for name in ("a.csv", "b.csv"):
        _write(tmp_path / name, "text,label\n")
    with pytest.raises(UserError, match=r"^a\.csv, b\.csv: the data set is empty$"):
        read_rows(("a.csv", "b.csv"), DataConfig())


def test_lines_of_text_files_in_a_folder(tmp_path: Path) -> None:
    _write(tmp_path / "b.txt", "three\n")
    _write(tmp_path / "a.txt", "one\ntwo\n")
    assert _values(str(tmp_path), "text") == [("one",), ("two",), ("three",)]
