"""Columns that hold lists: words, labels and spans, from every format alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from jaxft.config import DataConfig
from jaxft.data.sources.read import column_names, form_of, iter_rows
from jaxft.data.sources.rows import Carried, Listed, list_in_cell
from jaxft.errors import UserError

WORDS = [["EU", "rejects", "German"], ["é"], []]
LABELS = [["B-ORG", "O", "B-MISC"], ["O"], []]
SPANS = [[{"start": 0, "end": 2, "label": "ORG"}, {"start": 11, "end": 17, "label": "MISC"}], [], []]
TEXTS = ["EU rejects German", "é", ""]


def values(reference: object, *columns: str) -> list[tuple[Any, ...]]:
    return [row.values for row in iter_rows(str(reference), tuple(map(Listed, columns)))]


def fails(reference: object, *columns: str) -> str:
    with pytest.raises(UserError) as caught:
        values(reference, *columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def by_column(spans: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {key: [span[key] for span in spans] for key in ("start", "end", "label")}


def test_json_lines(tmp_path: Path) -> None:
    rows = zip(TEXTS, WORDS, LABELS, SPANS, strict=True)
    path = jsonl(
        tmp_path / "a.jsonl",
        *({"text": t, "words": w, "labels": y, "spans": s, "columns": by_column(s)} for t, w, y, s in rows),
    )
    found = values(path, "text", "words", "labels", "spans", "columns")
    assert found == list(zip(TEXTS, WORDS, LABELS, SPANS, SPANS, strict=True))
    # The same, as triples; other entries of mappings come along if they are plain.
    triples = {
        "a": [[0, 2, "ORG"], [11, 17, "MISC"]],
        "b": [{"start": 0, "id": 7, "x": [1], "y": None}],
        "c": [1, 2.5, True],
    }
    assert values(jsonl(tmp_path / "b.jsonl", triples), "a", "b", "c") == [
        (SPANS[0], [{"start": 0, "id": 7}], [1, 2.5, True])
    ]
    # Columns that are not marked are as before.
    (row,) = iter_rows(str(tmp_path / "b.jsonl"), (Listed("a"), Carried("c")))
    assert row.values == (SPANS[0], "[1, 2.5, true]")
    with pytest.raises(UserError, match="column 'a' holds a list; expected a string"):
        list(iter_rows(str(tmp_path / "b.jsonl"), ("a",)))
    assert column_names(str(tmp_path / "b.jsonl"), Listed("a"), form_of(DataConfig())) == ("a", "b", "c")


def test_problems_of_json_lines(tmp_path: Path) -> None:
    def problem(value: Any) -> str:
        path = jsonl(tmp_path / "a.jsonl", {"x": ["fine"]}, {"x": value})
        message = fails(path, "x")
        assert message.startswith(f"{path}:2: ")
        return message.removeprefix(f"{path}:2: ")

    assert problem(["a", None]).startswith("item 1 of column 'x' is null")
    assert problem(["a", ["b"]]).startswith("item 0 of column 'x' is 'a'; expected a span")
    assert problem([["a", "b"]]).startswith("item 0 of column 'x' is ['a', 'b']; expected a span")
    assert problem([{"start": 1}, 5]).startswith("item 1 of column 'x' is 5; expected a span")
    assert problem({"start": 1}).startswith("column 'x' holds a mapping; expected a text, or a list")
    assert problem({}).startswith("column 'x' holds a mapping")
    assert problem({"a": [1], "b": []}).startswith("column 'x' holds lists of different lengths (a 1, b 0)")
    (tmp_path / "b.jsonl").write_text('{"x": ["a", "\\ud83d"]}\n')
    assert "b.jsonl:1: column 'x' holds half of a \\u surrogate pair" in fails(tmp_path / "b.jsonl", "x")
    assert "no column 'y'" in fails(tmp_path / "b.jsonl", "y")


def test_cells_of_tables(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('words,labels,text\n"[""EU"", ""x""]","[""B-ORG"", ""O""]",a [b]\nred cat,O O,c\n')
    expected = [(["EU", "x"], ["B-ORG", "O"], "a [b]"), ("red cat", "O O", "c")]
    assert values(tmp_path / "a.csv", "words", "labels", "text") == expected
    (tmp_path / "a.tsv").write_text('text\tspans\nEU is\t[{"start": 0, "end": 2, "label": "ORG"}]\nx\t[]\n')
    assert values(tmp_path / "a.tsv", "text", "spans") == [("EU is", SPANS[0][:1]), ("x", [])]
    # Python's way of writing lists is not JSON: ['a' 'b'] would be one word.
    (tmp_path / "b.tsv").write_text("text\tn\nfine\t1\n['EU', 'x']\t2\n")
    message = fails(tmp_path / "b.tsv", "text")
    assert message.startswith(
        f"{tmp_path}/b.tsv:3: column 'text': a cell that begins with [ must be a JSON list such as"
    )
    assert [row.values for row in iter_rows(str(tmp_path / "b.tsv"), ("text",))][1] == ("['EU', 'x']",)
    with pytest.raises(UserError, match="item 0 of column 'x' is null"):
        list_in_cell("[null]", Listed("x"), "a.csv:1")
    for cell in ("[", "[NaN]", "[" * 100_000, '["a"] b', "[" + "1" * 5000 + "]"):
        with pytest.raises(UserError, match="must be a JSON list"):
            list_in_cell(cell, Listed("x"), "a.csv:1")


def test_parquet(tmp_path: Path) -> None:
    table = {"words": WORDS, "labels": LABELS, "spans": SPANS, "columns": [by_column(spans) for spans in SPANS]}
    raw = {"raw": [[word.encode() for word in words] for words in WORDS], "text": TEXTS}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(table | raw), path)
    expected = list(zip(WORDS, LABELS, SPANS, SPANS, WORDS, TEXTS, strict=True))
    assert values(path, "words", "labels", "spans", "columns", "raw", "text") == expected
    broken = {"x": [["a"], ["a", None], None], "y": [[b"a"], [b"\xff"], []]}
    pyarrow.parquet.write_table(pyarrow.table(broken), tmp_path / "b.parquet")
    assert "b.parquet row 1: item 1 of column 'x' is null" in fails(tmp_path / "b.parquet", "x")
    assert "b.parquet row 1: item 0 of column 'y' is not valid UTF-8" in fails(tmp_path / "b.parquet", "y")
    pyarrow.parquet.write_table(pyarrow.table({"x": pyarrow.array([None], pyarrow.list_(pyarrow.string()))}), path)
    assert values(path, "x") == [(None,)]


def test_parquet_of_the_hub_has_names_of_classes(tmp_path: Path) -> None:
    names = {"names": ["O", "B-ORG"], "_type": "ClassLabel"}
    place = {"dtype": "int32", "_type": "Value"}
    features = {
        "a": {"feature": names, "_type": "List"},
        "b": {"feature": names, "length": -1, "_type": "Sequence"},
        "c": [{"start": place, "label": names}],
        "d": {"start": {"feature": place, "_type": "List"}, "label": {"feature": names, "_type": "List"}},
        "e": names,
    }
    columns = {
        "a": [[0, 1]],
        "b": [[1]],
        "c": [[{"start": 1, "label": 1}]],
        "d": [{"start": [1], "label": [1]}],
        "e": [1],
        "f": [[1]],
    }
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    spans = [{"start": 1, "label": "B-ORG"}]
    assert values(tmp_path / "a.parquet", *"abcdef") == [(["O", "B-ORG"], ["B-ORG"], spans, spans, "B-ORG", [1])]
    assert [row.values for row in iter_rows(str(tmp_path / "a.parquet"), ("e",))] == [(1,)]
    beyond = pyarrow.table({"a": [[0, 2]]}).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(beyond, tmp_path / "b.parquet")
    assert "row 0: column 'a' holds class 2, and the data set has no name for it" in fails(tmp_path / "b.parquet", "a")
    hidden = pyarrow.table({"a": [[-1, -1]], "e": [-1]}).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(hidden, tmp_path / "c.parquet")
    assert values(tmp_path / "c.parquet", "e") == [(None,)]
    assert "row 0: item 0 of column 'a' is null, or a hidden label" in fails(tmp_path / "c.parquet", "a")
    for odd in ("[1]", "{", '{"info": 3}', '{"info": {"features": {"a": [], "e": 4}}}'):
        pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": odd}), tmp_path / "d.parquet")
        assert values(tmp_path / "d.parquet", "a", "e") == [([0, 1], 1)]


_PREPARE = """
import sys
import numpy as np
import tensorflow_datasets as tfds

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        label = tfds.features.ClassLabel(names=["O", "B-ORG", "B-MISC"])
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "words": tfds.features.Sequence(tfds.features.Text()), "labels": tfds.features.Sequence(label),
            "spans": tfds.features.Sequence({"start": np.int32, "end": np.int32, "label": label}),
            "weights": tfds.features.Sequence(np.float32)}))

    def _split_generators(self, downloads):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"words": ["EU", "rejects", "German"], "labels": ["B-ORG", "O", "B-MISC"], "weights": [0.1, 1],
            "spans": [{"start": 0, "end": 2, "label": "B-ORG"}, {"start": 11, "end": 17, "label": "B-MISC"}]}
        yield 1, {"words": ["\u00e9"], "labels": ["O"], "spans": [], "weights": []}
        yield 2, {"words": [], "labels": [], "spans": [], "weights": []}

Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


def test_tfds(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _PREPARE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    reference = f"tfds:{tmp_path}/tiny/1.0.0:train"
    spans = [[{**span, "label": f"B-{span['label']}"} for span in spans] for spans in SPANS]
    found = values(reference, "words", "labels", "spans", "weights")
    assert sorted(found, key=lambda row: -len(row[0])) == list(
        zip(WORDS, LABELS, spans, [[0.1, 1.0], [], []], strict=True)
    )
    assert [type(item) for row in found for item in row[0] + row[1]] == [str] * 8
    (carried, *_) = sorted(iter_rows(reference, (Carried("words"),)), key=lambda row: -len(str(row.values)))
    assert carried.values == ('["EU", "rejects", "German"]',)
    with pytest.raises(UserError, match="row 0: column 'labels' holds a list; expected a string, number or boolean"):
        list(iter_rows(reference, ("labels",)))


def test_folders_of_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "datasets" not in sys.modules:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    library = pytest.importorskip("datasets")
    label = library.ClassLabel(names=["O", "B-ORG", "B-MISC", "ORG", "MISC"])
    places = {"start": library.Value("int32"), "end": library.Value("int32"), "label": label}
    features = library.Features(
        {
            "words": library.Sequence(library.Value("string")),
            "labels": library.Sequence(label),
            "spans": [places],
            "columns": library.Sequence(places),
            "label": label,
        }
    )
    columns = [by_column(spans) for spans in SPANS]  # what the library itself makes of lists of mappings
    table = {"words": WORDS, "labels": LABELS, "spans": SPANS, "columns": columns, "label": ["O", "O", -1]}
    made = library.Dataset.from_dict(table, features=features)
    made.save_to_disk(tmp_path / "table")
    expected = list(zip(WORDS, LABELS, SPANS, SPANS, ["O", "O", None], strict=True))
    assert values(f"hf:{tmp_path}/table", "words", "labels", "spans", "columns", "label") == expected
    # The same as Parquet, as the hub keeps it.
    made.to_parquet(tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet", "words", "labels", "spans", "columns", "label") == expected
