"""Files with a word and its label per line."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from tiny import LABELS, make_folder, refusal

from jaxft.config import DataConfig
from jaxft.data.encode import read_rows
from jaxft.data.sources.read import Form, column_names, iter_rows
from jaxft.data.sources.rows import Carried, Listed
from jaxft.errors import UserError

CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
. . O O

-DOCSTART- -X- -X- O

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""
SENTENCES = [
    (["EU", "rejects", "."], ["B-ORG", "O", "O"]),
    (["Peter", "Blackburn"], ["B-PER", "I-PER"]),
]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def values(reference: object, *columns: str, note: Any = None) -> list[tuple[Any, ...]]:
    form = Form(note=note) if note else None
    return [row.values for row in iter_rows(str(reference), tuple(map(Listed, columns or ("words", "labels"))), form)]


def fails(path: Path, text: str, *columns: str) -> str:
    with pytest.raises(UserError) as caught:
        values(write(path, text), *columns)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


def test_conll_2003(tmp_path: Path) -> None:
    path = write(tmp_path / "a.conll", CONLL_2003)
    assert values(path) == SENTENCES
    for columns in (("text", "label"), ("0", "3"), ("text", "labels"), ("words", "3")):
        assert values(path, *columns) == SENTENCES
    assert values(path, "1", "2")[1] == (["NNP", "NNP"], ["B-NP", "I-NP"])
    assert [row.where for row in iter_rows(str(path), (Listed("words"),))] == [f"{path}:3", f"{path}:9"]
    for suffix in ("bio", "iob", "iob2", "IOB"):
        assert values(write(tmp_path / f"a.{suffix}", CONLL_2003.replace("\n", "\r\n"))) == SENTENCES
    for name in ("b.conll.gz", "c.conll"):
        (tmp_path / name).write_bytes(gzip.compress(CONLL_2003.encode()))
        assert values(tmp_path / name) == SENTENCES


def test_names_of_columns_are_told_as_they_are_asked_for(tmp_path: Path) -> None:
    path = str(write(tmp_path / "a.conll", CONLL_2003))
    assert column_names(path, "words", Form()) == ("words", "1", "2", "labels")
    assert column_names(path, "text", Form()) == ("text", "1", "2", "label")
    assert column_names(path, "0", Form()) == ("0", "1", "2", "3")
    assert column_names(str(write(tmp_path / "b.conll", "red\ncat\n")), "text", Form()) == ("text",)
    assert column_names(str(write(tmp_path / "c.conll", "")), "text", Form()) == ()
    message = "a.conll:1: no column 'ner': valid names: 1, 2, labels, words; set data.text / data.label to one of these"
    with pytest.raises(UserError, match="no column 'ner'") as caught:
        values(write(tmp_path / "a.conll", "EU NNP B-NP B-ORG\n"), "words", "ner")
    assert message in str(caught.value)


def test_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    notes: list[str] = []
    text = "New York\tB-LOC\nis\tO\n\t\n \n\nbig\tO"
    assert values(write(path, text), note=notes.append) == [(["New York", "is"], ["B-LOC", "O"]), (["big"], ["O"])]
    assert notes == [f"{path}: tabs separate its 2 columns (words, labels), blanks do not"]
    assert values(write(path, "  EU   B-ORG  \n \t \nis \t O")) == [(["EU"], ["B-ORG"]), (["is"], ["O"])]
    # Other spaces are not separators, and no line ends.
    assert values(write(path, "a\u00a0b O\n\u00a0 O\nc\u2028d O\n")) == [
        (["a\u00a0b", "\u00a0", "c\u2028d"], ["O"] * 3)
    ]
    assert values(write(path, "EU\n\nis\nbig\n"), "words") == [(["EU"],), (["is", "big"],)]
    assert values(write(path, "\ufeffEU O\n")) == [(["EU"], ["O"])]
    for nothing in ("", "\n\n", "-DOCSTART- O\n\n", "# a comment\n"):
        assert values(write(path, nothing)) == []


def test_comments(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    # MultiCoNER's: as many blanks in comments as in lines of words.
    text = "# id 1cf4\tdomain=en\n# _ _ O\nlove _ _ B-X\n\n\n# id 2 3\n#fun _ _ O\nlove _ _ O\n# _ _ O\n"
    assert values(write(path, text)) == [(["#", "love"], ["O", "B-X"]), (["#fun", "love", "#"], ["O"] * 3)]
    # WNUT's: words that begin so, and no comments.
    assert values(write(path, "#happy\tO\nEU\tB-X\n\n#\tB-Y\n")) == [(["#happy", "EU"], ["O", "B-X"]), (["#"], ["B-Y"])]
    assert ":3: expected 2 columns separated by blanks, as in line 1, found 4" in fails(
        path, "EU O\nis O\n# a comment x\n"
    )


def test_conll_u(tmp_path: Path) -> None:
    def line(*cells: str) -> str:
        return "\t".join((*cells, *"_" * (10 - len(cells)))) + "\n"

    text = "# sent_id = 1\n# text = Zum Haus\n" + line("1-2", "Zum") + line("1", "Zu", "zu", "ADP")
    text += line("2", "dem", "der", "DET") + line("2.1", "x", "x", "X") + line("3", "Haus", "Haus", "NOUN") + "\n"
    for name in ("a.conllu", "a.conll"):
        path = write(tmp_path / name, text)
        expected = [(["Zu", "dem", "Haus"], ["ADP", "DET", "NOUN"])]
        for column in ("1", "text", "words"):
            assert values(path, column, "3") == expected
        with pytest.raises(UserError, match="no column 'labels': valid names: 0, 2, 3, 4, 5, 6, 7, 8, 9, words"):
            values(path)


def test_problems(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    ragged = (
        "expected 2 columns separated by tabs, as in line 1, found 1; each line holds one word, and a blank line ends"
    )
    assert fails(path, "EU\tO\n\nis\tO\nbig O\n").startswith(f":4: {ragged}")
    assert ":2: expected 2 columns separated by blanks, as in line 1, found 3" in fails(path, "EU O\nis O x\n")
    assert ":2: expected 4 columns" in fails(path, "a b c d\n# comment at the wrong place\n")
    assert fails(path, "EU\tO\nis\t\n") == ":2: column 'labels' is empty"
    assert fails(path, "EU\tO\n\tO\n") == ":2: column 'words' is empty"
    assert values(write(path, "EU\tO\nis\t\n"), "words") == [(["EU", "is"],)]
    assert ":1: no column 'labels'" in fails(path, "EU\n\nis\n")
    assert "a web page" in fails(path, "<html> O\n")
    write(path, "EU O\n")
    with pytest.raises(UserError, match=r"a\.conll:1: column 'words' holds a list; expected a string"):
        list(iter_rows(str(path), ("words",)))
    assert next(iter_rows(str(path), (Carried("words"),))).values == ('["EU"]',)
    with pytest.raises(UserError, match=r"a\.conll:1: column 'text' holds a list"):
        read_rows(str(path), DataConfig())


def test_folders_and_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "1.conll", CONLL_2003)
    write(folder / "2.conll", "is O\n")
    write(folder / "README.md", "no data")
    notes: list[str] = []
    for reference in (folder, f"{folder}/*.conll"):
        assert values(reference, note=notes.append) == [*SENTENCES, (["is"], ["O"])]
    assert f"{folder}: not read: README.md" in notes
    write(folder / "3.csv", "text,label\n")
    with pytest.raises(UserError, match="holds files of several formats"):
        values(folder)


def test_predict_says_what_a_model_of_texts_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_folder(tmp_path / "model", "classification", LABELS)
    path = write(tmp_path / "a.conll", CONLL_2003)
    assert "a.conll:3: column 'text' holds a list; expected a string" in refusal(capsys, "predict", model, path)
