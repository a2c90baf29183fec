"""Malformed data files: tables, JSON, Parquet, packed files, CoNLL, class folders, folders of the libraries, token caches."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.malformed.case import MILLION, TRAIN, Case, Damage, bad_json, both, no_files, put, sparse, words

HEAD = "text,label\n"
ROWS = "".join(f"the cat {i},animal\na house {i},thing\n" for i in range(8))
RECORDS = "".join(
    f'{{"text": "the cat {i}", "label": "animal"}}\n{{"text": "a house", "label": "thing"}}\n' for i in range(8)
)
CONLL = "the O\ncat B-x\n\na O\nhouse O\n\n" * 4
TOKENS = ("task.name=token_classification", "data.text=words", "data.label=labels")

TABLES: dict[str, str | bytes] = {
    "empty": "",
    "blank lines": "\n\n\n",
    "a header alone": HEAD,
    "no such column": "a,b\n1,2\n",
    "a column twice": "text,text,label\na,b,c\n",
    "too many cells": HEAD + "a,b,c\n",
    "too few cells": HEAD + "a\n",
    "an open quote": HEAD + '"a,b\n',
    "an open quote before a million characters": HEAD + f'"{MILLION}',
    "text behind a quote": HEAD + '"a"x,b\n',
    "NUL": HEAD + "a\0b,c\n",
    "not UTF-8": HEAD.encode() + b"a\xff,b\n",
    "UTF-16 without a mark": (HEAD + "a,b\n").encode("utf-16-le"),
    "UTF-16, cut": (HEAD + ROWS).encode("utf-16")[:-1],
    "a web page": "<!DOCTYPE html><html><body>404</body></html>",
    "a zip archive": b"PK\x03\x04" + b"\0" * 100,
    "binary": bytes(range(256)) * 50,
    "a pickle": b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93\x8c\x0ctouch canary\x85R.",
    "a header of 200,000 columns": ",".join(f"c{i}" for i in range(200_000)) + "\n" + ",".join(["x"] * 200_000) + "\n",
    "a header of one column of a million letters": MILLION + "\nx\n",
    "a column name of a million letters": f"{MILLION},label\nx,y\n",
    "a label of a million letters": HEAD + ROWS + f"a,{MILLION}\n",
    "a row of a million cells": HEAD + "a," * 1_000_000 + "\n",
    "one label": HEAD + "a,x\nb,x\n" * 8,
    "as many labels as rows": HEAD + "".join(f"a,l{i}\n" for i in range(2000)),
    "labels that are alike": HEAD + "a,\x1b[31mx\nb,y\n" * 3 + "c,\n",
    "an empty label": HEAD + ROWS + "a,\n",
    "a blank line within": HEAD + ROWS + "\n,\n",
    "git-lfs": "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
}
JSON_LINES: dict[str, str | bytes] = {
    "empty": "",
    "rubbish": "{oops\n",
    "a list": "[1]\n",
    "a number": "5\n",
    "null": "null\n",
    "deep lists": "[" * 100_000,
    "deep objects": '{"text":' * 100_000,
    "deep cell": '{"text": ' + "[" * 50_000 + "]" * 50_000 + ', "label": "x"}\n',
    "no such column": '{"a": 1}\n',
    "a number as text": '{"text": 5, "label": "x"}\n',
    "an object as text": '{"text": {"a": 1}, "label": "x"}\n',
    "null as text": '{"text": null, "label": "x"}\n',
    "NaN": '{"text": "a", "label": NaN}\n',
    "a list as label": '{"text": "a", "label": [1]}\n',
    "an object as label": '{"text": "a", "label": {"a": 1}}\n',
    "a number of 5000 digits": '{"text": "a", "label": ' + "9" * 5000 + "}\n",
    "1e400": RECORDS + '{"text": "a", "label": 1e400}\n',
    "a lone surrogate": '{"text": "\\ud800", "label": "x"}\n' * 2 + RECORDS,
    "not UTF-8": b'{"text": "\xff", "label": "x"}\n',
    "a million letters of rubbish": MILLION,
    "a column name of a million letters": f'{{"{MILLION}": 1}}\n',
    "200,000 columns": json.dumps({f"c{i}": 1 for i in range(200_000)}) + "\n",
    "a key twice": '{"text": "a", "text": 5, "label": "x"}\n',
    "more behind": '{"text": "a", "label": "x"} x\n',
    "NUL": b"\0" * 100,
    "other columns later": RECORDS + '{"txt": "a", "label": "x"}\n',
}
JSON: dict[str, str | bytes] = {
    "empty": "",
    "a number": "5",
    "null": "null",
    "an empty list": "[]",
    "cut off": '[{"text": "a", "label": "x"}, {"text"',
    "no comma": '[{"text": "a", "label": "x"} {"text": "a", "label": "x"}]',
    "lists": "[[1], [2]]",
    "deep lists": "[" * 100_000,
    "deep objects": '[{"text": ' + '{"a":' * 100_000,
    "an object of no list": '{"a": 1}',
    "an object of several lists": '{"a": [{"text": "x"}], "b": [{"text": "x"}]}',
    "not UTF-8": b'[{"text": "\xff"}]',
    "a million blanks": " " * 1_000_000,
    "a million brackets": "[" * 1_000_000 + "]" * 1_000_000,
    "a column name of a million letters": f'[{{"{MILLION}": 1}}]',
    "no such column": '[{"a": 1}]',
}
WORDS: dict[str, str | bytes] = {
    "empty": "",
    "one column": "a\nb\n\n",
    "a line of other width": CONLL + "a b c\n",
    "an empty cell": CONLL.replace(" ", "\t") + "\tO\n",
    "not UTF-8": b"a \xff\n",
    "a million columns": "a " * 1_000_000 + "\n",
    "a million letters": MILLION + " O\n" + "x\n",
    "comments alone": "# a\n# b\n",
}


def cases() -> Iterator[Case]:
    """The cases of this kind."""
    for title, content in TABLES.items():
        yield _case(f"csv: {title}", "bad.csv", put("bad.csv", content))
    for title in ("empty", "an open quote", "a header of 200,000 columns", "NUL", "too many cells", "not UTF-8"):
        content = TABLES[title]
        tabs = content.replace(",", "\t") if isinstance(content, str) else content.replace(b",", b"\t")
        yield _case(f"tsv: {title}", "bad.tsv", put("bad.tsv", tabs))
    for title, content in JSON_LINES.items():
        yield _case(f"jsonl: {title}", "bad.jsonl", put("bad.jsonl", content))
    for title, content in JSON.items():
        yield _case(f"json: {title}", "bad.json", put("bad.json", content))
    for title, content in WORDS.items():
        yield Case(
            "data",
            f"conll: {title}",
            put("bad.conll", content),
            (*words(TRAIN), *TOKENS, "data.train=bad.conll", "data.eval=bad.conll"),
        )
    for name in ("bad.csv", "bad.jsonl", "bad.json", "bad.parquet", "bad.conll", "bad.txt", "bad.csv.gz"):
        for title, damage in no_files(name):
            yield Case("data", f"{name}: {title}", damage, (*words(TRAIN), f"data.train={name}"))
            if name != "bad.conll":
                yield Case("data", f"{name}, predicted: {title}", damage, words(f"predict model {name}"))
    for name in ("bad.csv", "bad.jsonl", "bad.json", "bad.txt"):
        yield Case("data", f"{name}: 1 GB of NUL", sparse(name, 1 << 30), (*words(TRAIN), f"data.train={name}"))
    for title, damage in _packed():
        yield _case(f"gzip: {title}", "bad.csv.gz", damage)
    for title, damage in _zstd():
        yield _case(f"zstd: {title}", "bad.csv.zst", damage)
    for title, damage in _bombs():
        for suffix in ("csv", "jsonl", "json", "txt"):
            if suffix == "txt" and title in ("line ends", "rows"):
                continue  # each line is a text there, which is answered before the next one is read
            name = f"bad.{suffix}.gz"
            yield Case(
                "data",
                f"bomb of {title}: {suffix}",
                lambda folder, name=name, damage=damage: damage(folder / name),
                words(f"predict model {name}"),
            )
            if suffix != "txt":
                yield Case(
                    "data",
                    f"bomb of {title}, training: {suffix}",
                    lambda folder, name=name, damage=damage: damage(folder / name),
                    (*words(TRAIN), f"data.train={name}"),
                )
    for title, damage in (*_parquet(), *_found()):
        yield _case(f"parquet: {title}", "bad.parquet", damage)
    yield from _folders()


def _case(name: str, file: str, damage: Damage) -> Case:
    return Case("data", name, damage, (*words(TRAIN), f"data.train={file}"))


def _packed() -> Iterator[tuple[str, Damage]]:
    good = gzip.compress((HEAD + ROWS).encode())
    for title, raw in {
        "empty": b"",
        "rubbish": b"junk" * 100,
        "cut": good[:-20],
        "a wrong checksum": good[:-8] + b"\0" * 8,
        "a flipped bit": good[:30] + bytes([good[30] ^ 4]) + good[31:],
        "rubbish behind": good + b"junk" * 10,
        "a header alone": good[:10],
        "packed twice": gzip.compress(good),
    }.items():
        yield title, put("bad.csv.gz", raw)


def _zstd() -> Iterator[tuple[str, Damage]]:
    yield "rubbish", put("bad.csv.zst", b"junk" * 100)
    yield "a frame of rubbish", put("bad.csv.zst", b"(\xb5/\xfd" + b"\xff" * 100)
    yield "a window of terabytes", put("bad.csv.zst", b"(\xb5/\xfd\x00\xf8" + b"\0" * 100)


def _bombs() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Files of a few megabytes that are gigabytes when unpacked."""

    def bomb(piece: bytes) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            # Members of a gzip file follow each other; one that is packed once is enough.
            block = gzip.compress(piece * ((1 << 26) // len(piece)), 9)
            path.write_bytes(block * 40)

        return write

    yield "letters", bomb(b"x")
    yield "line ends", bomb(b"\n")
    yield "brackets", bomb(b"[")
    yield "quotes", bomb(b'"')
    yield "rows", bomb(b"a,b\n")


def _parquet() -> Iterator[tuple[str, Damage]]:
    def written(columns: dict[str, object], **options: object) -> Damage:
        def damage(folder: Path) -> None:
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.table(columns), folder / "bad.parquet", **options)

        return damage

    yield "empty", put("bad.parquet", b"")
    yield "rubbish", put("bad.parquet", b"junk" * 100)
    yield "marks alone", put("bad.parquet", b"PAR1PAR1")
    yield "a footer of 4 GB", put("bad.parquet", b"PAR1" + b"\0" * 100 + b"\xff\xff\xff\x7fPAR1")
    yield "rubbish between marks", put("bad.parquet", b"PAR1" + b"\x15" * 1000 + (900).to_bytes(4, "little") + b"PAR1")
    yield "no such column", written({"a": ["x"]})
    yield "numbers as text", written({"text": [1, 2], "label": ["a", "b"]})
    yield "no rows", written({"text": [], "label": []})
    yield "null", written({"text": ["a", None], "label": ["x", "y"]})
    yield "bytes", written({"text": [b"\xff\xfe", b"a"], "label": ["x", "y"]})
    yield "200,000 columns", written({f"c{i}": ["x"] for i in range(20_000)})
    yield (
        "cut",
        both(
            written({"text": ["a"] * 1000, "label": ["x"] * 1000}),
            lambda folder: (folder / "bad.parquet").write_bytes((folder / "bad.parquet").read_bytes()[:-30]),
        ),
    )
    yield "flipped", both(written({"text": [f"a{i}" for i in range(1000)], "label": ["x"] * 1000}), _flip)

    def bomb(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        value = pa.array(["x" * (5 << 20)])
        texts = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), value)
        labels = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["y"]))
        pq.write_table(pa.table({"text": texts, "label": labels}), folder / "bad.parquet")

    yield "a bomb of one value of 5 MB", bomb

    def lists(folder: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        many = pa.ListArray.from_arrays(pa.array([0, 1 << 26], pa.int32()), pa.nulls(1 << 26, pa.int32()))
        pq.write_table(pa.table({"text": many, "label": ["x"]}), folder / "bad.parquet")

    yield "a bomb of one list of nothing", lists


def _found() -> Iterator[tuple[str, Damage]]:
    """What fuzzing has found (fuzz.py)."""
    for path in sorted((Path(__file__).parent / "found").iterdir()):
        yield f"found by fuzzing: {path.name}", put("bad.parquet", path.read_bytes())


def _flip(folder: Path) -> None:
    path = folder / "bad.parquet"
    raw = bytearray(path.read_bytes())
    for place in range(40, len(raw) // 2, 7):
        raw[place] ^= 0xFF
    path.write_bytes(raw)


def _folders() -> Iterator[Case]:
    train = (*words(TRAIN), "data.train=folder")

    def classes(folder: Path, raw: bytes = b"a", names: tuple[str, ...] = ("x", "y")) -> None:
        for name in names:
            (folder / "folder" / name).mkdir(parents=True)
            (folder / "folder" / name / "1.txt").write_bytes(raw)

    def made(damage: Damage) -> Damage:
        return both(lambda folder: (folder / "folder").mkdir(), damage)

    yield Case("data", "folder: empty", made(lambda folder: None), train)
    yield Case("data", "folder: of other files", made(put("folder/a.docx", "x")), train)
    yield Case(
        "data", "folder: of several formats", made(both(put("folder/a.csv", HEAD), put("folder/b.tsv", HEAD))), train
    )
    yield Case("data", "folder: not UTF-8", lambda folder: classes(folder, b"\xff\xfe\x00"), train)
    yield Case("data", "folder: one class", lambda folder: classes(folder, names=("x",)), train)
    yield Case(
        "data", "folder: a class without texts", both(classes, lambda folder: (folder / "folder/z").mkdir()), train
    )
    yield Case(
        "data",
        "folder: text of a device",
        both(classes, lambda folder: (folder / "folder/x/2.txt").symlink_to("/dev/zero")),
        train,
        (0, 2),
    )
    yield Case(
        "data",
        "folder: a file of a device",
        made(lambda folder: (folder / "folder/a.csv").symlink_to("/dev/zero")),
        train,
    )
    for title, damage in bad_json("folder/dataset_info.json"):
        made_up = made(both(put("folder/dataset_info.json", ""), damage))
        yield Case("data", f"tfds: {title}", made_up, (*words(TRAIN), "data.train=tfds:folder:train"))
    for title, damage in bad_json("folder/features.json"):
        info = put(
            "folder/dataset_info.json",
            json.dumps(
                {"name": "folder", "version": "1.0.0", "fileFormat": "array_record", "splits": [{"name": "train"}]}
            ),
        )
        yield Case(
            "data",
            f"tfds features: {title}",
            made(both(info, put("folder/features.json", ""), damage)),
            (*words(TRAIN), "data.train=tfds:folder:train"),
        )
    for title, damage in bad_json("folder/state.json"):
        yield Case(
            "data",
            f"datasets: {title}",
            made(both(put("folder/state.json", ""), damage)),
            (*words(TRAIN), "data.train=hf:folder"),
        )
    for title, damage in bad_json("folder/cache.json"):
        yield Case("data", f"cache: {title}", made(both(put("folder/cache.json", ""), damage)), train)
    for title, body in _caches().items():
        yield Case(
            "data",
            f"cache: {title}",
            made(lambda folder, body=body: _sealed(folder / "folder/cache.json", body)),
            train,
        )


def _caches() -> dict[str, dict[str, object]]:
    array = {"file": "column-tokens.bin", "dtype": "<u2", "shape": [4]}
    good: dict[str, object] = {
        "format": 1,
        "examples": 1,
        "columns": {},
        "offsets": {},
        "dropped": {"file": "dropped.bin", "dtype": "<u2", "shape": [0]},
        "made": {},
        "about": {},
        "digest": "x",
        "files": {},
    }
    changed: dict[str, dict[str, object]] = {f"no {key}": {k: v for k, v in good.items() if k != key} for key in good}
    changed |= {f"{key}: a number": {**good, key: 5} for key in good}
    changed |= {f"{key}: a list": {**good, key: [5]} for key in good}
    changed["a file above"] = {**good, "files": {"../train.csv": {"size": 1, "sha256": []}}}
    changed["a file without a size"] = {**good, "files": {"x": {}}}
    changed["a column of objects"] = {**good, "columns": {"tokens": {**array, "dtype": "O"}}}
    changed["a column of 2**60 elements"] = {**good, "columns": {"tokens": {**array, "shape": [2**60]}}}
    changed["format 99"] = {**good, "format": 99}
    changed["format 0"] = {**good, "format": 0}
    return changed


def _sealed(path: Path, body: dict[str, object]) -> None:
    from jaxft.data.cache_files import _checksum, _render

    path.write_text(_render({**body, "sha256": _checksum(body)}))
