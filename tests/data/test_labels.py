"""One class, one name: the same table has the same classes in every format, type and spelling."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxft.config import DataConfig
from jaxft.data.encode import read_rows
from jaxft.data.labels import (
    class_ids,
    declared_labels,
    label_text,
    look_alikes,
    refuse_alike,
    refuse_scores,
    sorted_labels,
)
from jaxft.errors import UserError


@pytest.mark.parametrize(
    ("spellings", "name"),
    [
        ([1, 1.0, "1", "1.0", "+1", "1.00", " 1 ", "1.", np.int64(1), np.float32(1), np.float16(1), "1e+00"], "1"),
        ([0, -0.0, "0", "-0", "0.0"], "0"),
        (
            [0.1, np.float32(0.1), float(np.float32(0.1)), np.float16(0.1), "0.1", "0.10", ".1", "0.10000000149011612"],
            "0.1",
        ),
        ([1e16, "1e+16", "10000000000000000", 10**16, "10000000000000000.0"], "10000000000000000"),
        ([1e-5, "1e-05", "0.00001"], "1e-05"),
        ([2**53 + 1, "9007199254740993", np.int64(2**53 + 1)], "9007199254740993"),
        ([True, "True", "true", "TRUE", np.bool_(True), " true"], "true"),
        ([False, "False", "false", "FALSE"], "false"),
        (["café", "cafe\u0301", " café\n"], "café"),
        (["01"], "01"),
        (["1e5"], "1e5"),
        (["1_000"], "1_000"),
        (["tRUE"], "tRUE"),
        (["nan"], "nan"),
        (["NaN"], "NaN"),
        (["null"], "null"),
        (["None"], "None"),
        (["inf"], "inf"),
        (["1e+999"], "1e+999"),
        (["pos\u200b"], "pos\u200b"),
        ([None, math.nan, np.float32("nan"), "", "  ", "\t", "\u200b", "\ufeff"], ""),
    ],
)
def test_one_class_has_one_name(spellings: list[object], name: str) -> None:
    assert [label_text(spelling) for spelling in spellings] == [name] * len(spellings)


any_label = st.none() | st.booleans() | st.integers() | st.floats() | st.floats(width=32) | st.text(max_size=6)
words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=4).filter(label_text)
texts = words | st.sampled_from(["1.0", "01", "NaN", "null", "True", "TRUE", "false", "-0", "1e5", "é", "e\u0301"])
columns = st.one_of(
    *(st.tuples(st.just(kind), st.lists(values, min_size=1, max_size=5)) for kind, values in [
        ("int64", st.integers(-(2**63), 2**63 - 1)),
        ("int8", st.integers(-128, 127)),
        ("float64", st.floats(allow_nan=False, allow_infinity=False)),
        # Beyond 2^24 numpy and pandas write a whole float32 with other last digits than it has.
        ("float32", st.floats(-(2**24), 2**24, width=32)),
        ("float32", st.sampled_from([float(np.float32(x)) for x in (0.1, 0.7, 3.3, 1e-7, 2.0, 0.3)])),
        ("bool", st.booleans()),
        ("string", texts),
    ])
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(any_label)
def test_the_name_of_a_name_is_itself(label: object) -> None:
    name = label_text(label)
    assert label_text(name) == name
    assert name == unicodedata.normalize("NFC", name).strip()


def written(folder: Path, kind: str, labels: list[Any]) -> list[str]:
    """The same table in every format, numbers in the spellings of Python, numpy and pandas; the names of the files."""
    from datasets import Dataset, Features, Value, disable_progress_bars

    disable_progress_bars()
    short = [str(np.float32(label)) if kind == "float32" else str(label) for label in labels]
    upper = [str(label).upper() if kind == "bool" else str(label) for label in labels]
    for name, spelt in (("short", short), ("upper", upper)):
        table = io.StringIO()
        csv.writer(table).writerows([("text", "label"), *(("a", label) for label in spelt)])
        (folder / f"{name}.csv").write_text(table.getvalue(), encoding="utf-8", newline="")
        lines = "".join(f"a\t{label}\n" for label in spelt)
        (folder / f"{name}.tsv").write_text(f"text\tlabel\n{lines}", encoding="utf-8", newline="")
    for name, values in (("typed", labels), ("spelt", list(map(str, labels)))):
        lines = "".join(json.dumps({"text": "a", "label": value}) + "\n" for value in values)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    types = {"float32": pyarrow.float32(), "int8": pyarrow.int8(), "float64": pyarrow.float64()}
    array = pyarrow.array(labels, types.get(kind))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * len(labels), "label": array}), folder / "a.parquet")
    features = Features({"text": Value("string"), "label": Value(kind)})
    Dataset.from_dict({"text": ["a"] * len(labels), "label": labels}, features).save_to_disk(str(folder / "saved"))
    files = ("short.csv", "upper.csv", "short.tsv", "upper.tsv", "typed.jsonl", "spelt.jsonl", "a.parquet")
    return [*(str(folder / name) for name in files), f"hf:{folder / 'saved'}"]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(column=columns)
def test_the_same_table_has_the_same_classes_in_every_format(
    tmp_path_factory: pytest.TempPathFactory, column: tuple[str, list[Any]]
) -> None:
    kind, labels = column
    expected = [label_text(label) for label in labels]
    for source in written(tmp_path_factory.mktemp("table"), kind, labels):
        found = [label_text(row.values[-1]) for row in read_rows(source, DataConfig())]
        assert found == expected, source
        if kind == "float32":
            assert found == [label_text(np.float32(label)) for label in labels]


def test_missing_labels_say_where_in_every_format(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = {"text": ["a", "b"], "label": [1.0, math.nan]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({**rows, "label": [1.0, None]}), tmp_path / "b.parquet")
    Dataset.from_dict(rows).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "a.csv").write_text("text,label\na,1\nb, \n")
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": null}\n')
    for source in ("a.parquet", "b.parquet", "a.csv", "a.jsonl", "saved"):
        reference = f"hf:{tmp_path / source}" if source == "saved" else str(tmp_path / source)
        with pytest.raises(UserError, match=r"(row 1|:3|:2): column 'label' is empty; every row needs a label"):
            read_rows(reference, DataConfig())


@pytest.mark.parametrize(
    ("labels", "order"),
    [
        (["10", "9", "2", "-1"], ("-1", "2", "9", "10")),
        ([10, 9, 2.0, "2"], ("2", "9", "10")),
        (["b", "a", "10", "9"], ("10", "9", "a", "b")),
        ([True, False], ("false", "true")),
        (["0.5", "0.25"], ("0.25", "0.5")),
        (["B", "a", "ä"], ("B", "a", "ä")),
        ([" x", "x ", "y"], ("x", "y")),
        (["1", "01", "1.0", "0"], ("0", "01", "1")),
        (["nan", "2", "1"], ("1", "2", "nan")),
        (["9007199254740993", "9007199254740992"], ("9007199254740992", "9007199254740993")),
    ],
)
def test_found_labels_are_sorted(labels: list[object], order: tuple[str, ...]) -> None:
    assert sorted_labels(labels) == order
    assert sorted_labels(reversed(labels)) == order


def test_label_order_does_not_depend_on_the_hash_seed() -> None:
    # Ids are part of a model: a resumed process must find the same ones.
    code = (
        "from jaxft.data.labels import sorted_labels; "
        "print(sorted_labels(['1', '01', '1.0', '001', '1e0', '1e+0', '0', 'nan']))"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("declared", "names", "renamed"),
    [
        (None, (), {}),
        (("b", 1.0, True), ("b", "1", "true"), {}),
        ({"0": "negative", "1": "positive"}, ("negative", "positive"), {"0": "negative", "1": "positive"}),
        ({"1": "positive", "0": "negative"}, ("negative", "positive"), {"1": "positive", "0": "negative"}),
        ({"2": "good", "1": "bad"}, ("good", "bad"), {"2": "good", "1": "bad"}),
        ({"0.0": "n", "1.0": "y"}, ("n", "y"), {"0": "n", "1": "y"}),
    ],
)
def test_declared_labels(declared: Any, names: tuple[str, ...], renamed: dict[str, str]) -> None:
    assert declared_labels(declared) == (names, renamed)


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        (("a", "a"), "data.labels: 'a' is twice among its names"),
        (("1", 1.0), "data.labels: '1' is twice among its names"),
        ({"0": "a", "1": "a"}, "data.labels: 'a' is twice among its names"),
        ({"1": "a", "1.0": "b"}, "data.labels: '1' is twice among its labels"),
        (("a", " "), "data.labels: one of its names is empty"),
    ],
)
def test_declared_labels_that_are_not_one_to_one(declared: Any, message: str) -> None:
    with pytest.raises(UserError) as caught:
        declared_labels(declared)
    assert str(caught.value) == message


def ids(labels: list[object], names: tuple[str, ...], renamed: dict[str, str] | None = None) -> list[int]:
    return class_ids(labels, [f"f.csv:{i + 2}" for i in range(len(labels))], names, renamed).tolist()


def test_class_ids_by_name_by_spelling_and_by_data_label() -> None:
    assert ids(["x", "y", "z", " x"], ("z", "x", "y")) == [1, 2, 0, 1]
    # Names of a model of elsewhere keep their spelling; labels find them in any.
    assert ids([True, "true", "FALSE", False], ("True", "False")) == [0, 0, 1, 1]
    assert ids([1.0, "0", 1], ("0.0", "1.0")) == [1, 0, 1]
    assert ids([0, "1", 1.0, "positive"], ("negative", "positive"), {"0": "negative", "1": "positive"}) == [0, 1, 1, 1]
    # A label of the data goes before a name: here the names are other numbers.
    assert ids(["0", "1"], ("0", "1"), {"0": "1", "1": "0"}) == [1, 0]


def test_unknown_and_ambiguous_labels_say_where() -> None:
    with pytest.raises(UserError, match=r"^f\.csv:3: unknown label 'anmal': did you mean 'animal'\?$"):
        ids(["food", "anmal"], ("animal", "food"))
    with pytest.raises(
        UserError, match=r"'0': valid names: .*; if the labels are class ids: data\.labels=\{0: no, 1: yes\}"
    ):
        ids(["0"], ("no", "yes"))
    # Models of earlier versions may have both; spelt exactly, each is found.
    assert ids(["True", "true"], ("True", "true")) == [0, 1]
    with pytest.raises(
        UserError, match=r"^f\.csv:2: label 'true' may be of any of the model's classes True, TRUE; spell"
    ):
        ids(["true"], ("True", "TRUE"))


def test_names_of_classes_must_differ() -> None:
    refuse_alike(("a", "A", "a\u200b"), "config.json")
    for names in (("a", "b", "a"), ("é", "b", "e\u0301")):
        with pytest.raises(UserError, match=r"^config\.json: classes 0 and 2 have the same name"):
            refuse_alike(names, "config.json")


def test_scores_are_no_classes() -> None:
    scores = sorted_labels(f"{i / 37:.2f}" for i in range(185))
    with pytest.raises(
        UserError, match=r"^data\.label=score: 185 different numbers such as 0\.03, 0\.05, 0\.08 look like"
    ):
        refuse_scores(scores, "score")
    for fine in (
        sorted_labels(range(1000)),
        sorted_labels(i / 2 for i in range(11)),  # stars in halves
        sorted_labels(f"1.{i}a" for i in range(100)),
        sorted_labels(f"c{i}" for i in range(3000)),
    ):
        refuse_scores(fine, "score")


def test_look_alikes_are_warned_of() -> None:
    labels = ["pos\u200b", "pos", "Pos", "caf\u00e9", "cafe\u0301", "x", "y y", "yy"]
    assert look_alikes(labels, sorted_labels(labels)) == [
        r"labels 'cafe\u0301', 'caf\xe9' are the same letters, with accents composed or not: one class",
        r"labels 'Pos', 'pos', 'pos\u200b' differ only in case or invisible characters, and are 3 classes",
    ]
    assert look_alikes(["a", "b", "é"], ("a", "b", "é")) == []
