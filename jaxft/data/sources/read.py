"""Where rows come from: one function, :func:`iter_rows`, for every form of ``data.train`` and ``data.eval``.

Nothing heavy is imported until a reference needs it, and TensorFlow never is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain, repeat
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxft.config import DataConfig
from jaxft.data.sources.conll import SUFFIXES, iter_conll
from jaxft.data.sources.json_lists import iter_json
from jaxft.data.sources.lines import check_ratio, refuse_foreign
from jaxft.data.sources.listing import Listing, iter_classes, iter_media, listed, suffix_of, unknown_format
from jaxft.data.sources.lists import Names, library_value, names_in, names_in_parquet, shortest
from jaxft.data.sources.media import MEDIA, beside
from jaxft.data.sources.parquet_footer import group_sizes
from jaxft.data.sources.rows import (
    ALL,
    Binary,
    Listed,
    MissingColumn,
    Row,
    Value,
    column_positions,
    iter_jsonl,
    iter_txt,
)
from jaxft.data.sources.table import Form, iter_table
from jaxft.data.sources.tfds_features import refuse_foreign_features
from jaxft.errors import UserError, nearest
from jaxft.files import find_file, open_file, read_json_object

if TYPE_CHECKING:  # extras, and slow to import
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset
    from tensorflow_datasets.core import DatasetBuilder

__all__ = ["Form", "Reference", "Row", "Value", "column_names", "form_of", "iter_rows", "shown"]

Reference = str | tuple[str, ...]
"""What ``data.train`` and ``data.eval`` name: one source, or several that are read one after the other."""

_ACCEPTED = (
    ".csv, .tsv, .jsonl (.ndjson, .jsonlines), .json, .conll (.conllu, .bio, .iob, .iob2) and .txt, each also .gz or .zst; "
    ".parquet; "
    "a folder or pattern of such files; tfds:NAME:SPLIT; hf:FOLDER[:SPLIT]; - (standard input)"
)
_READERS: dict[str, Callable[[Path, tuple[str, ...], Form], Iterator[Row]]] = {
    ".csv": lambda path, columns, form: iter_table(path, columns, form, ","),
    ".tsv": lambda path, columns, form: iter_table(path, columns, form, "\t"),
    ".jsonl": lambda path, columns, _: iter_jsonl(path, columns),
    ".jsonlines": lambda path, columns, _: iter_jsonl(path, columns),
    ".ndjson": lambda path, columns, _: iter_jsonl(path, columns),
    ".json": lambda path, columns, form: iter_json(path, columns, form.note),
    ".txt": lambda path, columns, _: iter_txt(path, columns),
    ".parquet": lambda path, columns, _: _iter_parquet(path, columns),
    **dict.fromkeys(SUFFIXES, lambda path, columns, form: iter_conll(path, columns, form.note)),
}
# NAME may hold colons (a version), and so may the slices of SPLIT: imdb_reviews:1.0.0:train[:80%]+test[:10%]
_TFDS = re.compile(r"tfds:(?P<name>.+):(?P<split>(?:[^:\[\]]|\[[^\]]*\])+)")
_PARQUET_BATCH = 1024


def shown(reference: Reference) -> str:
    """A reference as messages name it."""
    return reference if isinstance(reference, str) else ", ".join(reference)


def form_of(config: DataConfig, note: Callable[[str], None] | None = None) -> Form:
    """How the tables of a run are to be read; ``note`` is told what was found out about each."""
    return Form(config.header, config.quotes, *((note,) if note else ()))


def iter_rows(reference: Reference, columns: tuple[str, ...], form: Form | None = None) -> Iterator[Row]:
    """The values of ``columns``, in that order, of every row that ``reference`` names, lazily: files in the order given, those of a
    folder or pattern in the order of their names, rows in file order.

    A ``ClassLabel`` of tfds or of the ``datasets`` library comes as its name, and as None where it is -1 ("hidden").

    Raises:
      UserError: at the call, or when the row that shows it is reached: nothing to read there, a missing column, a
        malformed row.
    """
    form = form or Form()
    if not isinstance(reference, str):
        return chain.from_iterable(iter_rows(one, columns, form) for one in reference)
    if reference == "-":
        return iter_txt(None, columns)
    if reference.startswith("tfds:"):
        return _iter_tfds(reference, columns)
    if reference.startswith("hf:"):
        return _iter_hf(reference, columns)
    listings = _listings(reference, columns, form.note)
    parts = [part for listing in listings for part in _parts(listing, columns, form)]
    return parts[0] if len(parts) == 1 else chain.from_iterable(parts)


def _listings(reference: str, columns: tuple[str, ...], note: Callable[[str], None]) -> list[Listing]:
    media = MEDIA if any(isinstance(column, Binary) for column in columns) else frozenset[str]()
    accepted = f"{_ACCEPTED}; images and sounds, and folders of these" if media else _ACCEPTED
    listings = listed(reference, set(_READERS), accepted, note, media)
    for path in (path for listing in listings for path in listing.files):
        if suffix_of(path) not in _READERS:
            raise unknown_format(str(path), accepted)
    return listings


def _parts(listing: Listing, columns: tuple[str, ...], form: Form) -> Iterator[Iterator[Row]]:
    """The rows of each file, and those of class folders."""
    for path in listing.files:
        yield _named_files(_READERS[suffix_of(path)](path, columns, form), columns, path.parent)
    if listing.media:
        yield iter_media(listing, columns)
    elif listing.classes:
        yield iter_classes(listing.classes, columns)


def _named_files(rows: Iterator[Row], columns: tuple[str, ...], folder: Path) -> Iterator[Row]:
    """The same rows; paths of images and sounds are those beside the file that names them."""
    places = [i for i, column in enumerate(columns) if isinstance(column, Binary)]
    if not places:
        return rows
    return (
        dataclasses.replace(
            row, values=tuple(beside(v, folder) if i in places else v for i, v in enumerate(row.values))
        )
        for row in rows
    )


def files_of(reference: Reference, *, media: bool = False) -> list[Path]:
    """The files that rows are read from, in order; of ``hf:`` and ``tfds:`` all that lie in the folder.

    Args:
      media: whether images or sounds are wanted, which folders may hold.

    Raises:
      UserError: there is nothing to read there.
    """
    if not isinstance(reference, str):
        return [path for one in reference for path in files_of(one, media=media)]
    if reference.startswith("hf:"):
        folder = Path(reference.removeprefix("hf:")).expanduser()
        return _inside(folder if folder.is_dir() else Path(str(folder).rpartition(":")[0]))
    if match := _TFDS.fullmatch(reference):
        tfds = _imported("tensorflow_datasets", "tensorflow-datasets", reference)
        return _inside(Path(_tfds_builder(tfds, match["name"], reference).data_path))
    listings = listed(reference, set(_READERS), _ACCEPTED, lambda text: None, MEDIA if media else frozenset())
    return [
        path
        for one in listings
        for path in (*one.files, *one.media, *(text for kind in one.classes for text in _inside(kind)))
    ]


def _inside(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def column_names(reference: str, column: str, form: Form) -> tuple[str, ...]:
    """The columns of a source, in its order; JSON Lines: the keys of the first object. Plain lines have none.

    Args:
      column: one that should be among them; it tells what separates the cells of a table.

    Raises:
      UserError: there is nothing to read there.
    """
    if reference == "-" or suffix_of(reference) in {".txt", *MEDIA}:
        return ()
    try:
        next(iter(iter_rows(reference, (column, ALL), dataclasses.replace(form, note=lambda _: None))), None)
    except MissingColumn as error:
        return tuple(name for name in error.present if name)
    return ()


def _imported(module: str, package: str, reference: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        hint = f"try: pip install {package}"
        raise UserError(f"{reference}: needs the Python package {package!r} ({error}); {hint}") from error


def _iter_parquet(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    parquet = _imported("pyarrow.parquet", "pyarrow", str(path))
    try:
        with open_file(path) as raw:
            if (first := raw.read(256))[:4] != b"PAR1":
                refuse_foreign(first, str(path))
            size = raw.seek(0, os.SEEK_END)
        check_unpacked(path)
        with parquet.ParquetFile(path) as file:
            column_positions(file.schema_arrow.names, columns, str(path))
            stored = names_in_parquet(file.schema_arrow.metadata)
            texts = [field.name for field in file.schema_arrow if str(field.type) == "string"]
        names = [stored.get(name) if isinstance(name, Listed) else None for name in columns]
        number = characters = 0
        # A text that a column repeats is held once.
        with parquet.ParquetFile(path, read_dictionary=[name for name in texts if name in columns]) as file:
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH, columns=list(columns)):
                for values in zip(*(_values(batch.column(name)) for name in columns), strict=True):
                    where = f"{path} row {number}"
                    characters += sum(len(value) for value in values if isinstance(value, str))
                    check_ratio(characters, size, str(path))
                    yield Row(tuple(map(library_value, values, columns, names, repeat(where))), where)
                    number += 1
    except parquet_errors() as error:
        raise UserError(f"{path}: cannot be read as Parquet: {_first_line(error)}") from error


def parquet_errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises of a damaged file."""
    from pyarrow import ArrowException

    return (
        ArrowException,
        OSError,
        RuntimeError,
        UnicodeDecodeError,
    )  # the third of its C++ parts that have no error of their own


def check_unpacked(path: Path) -> None:
    """Raises UserError if the parts of a Parquet file are out of all proportion to it, as its own footer says."""
    size = path.stat().st_size
    for group in group_sizes(path):
        check_ratio(max(group), size, str(path))


def _values(column: pyarrow.Array) -> list[object]:
    """A column of an Arrow table as Python values."""
    if hasattr(column, "dictionary"):
        there, places = column.dictionary.to_pylist(), column.indices.to_pylist()
        if not all(place is None or 0 <= place < len(there) for place in places):
            raise OSError("a column names values that its dictionary does not have")
        return [None if place is None else there[place] for place in places]
    values = column.to_pylist()
    if str(column.type) in ("float", "halffloat"):
        return [None if value is None else shortest(np.float32(value)) for value in values]
    return values


def _iter_tfds(reference: str, columns: tuple[str, ...]) -> Iterator[Row]:
    match = _TFDS.fullmatch(reference)
    if match is None:
        raise UserError(f"{reference!r}: expected tfds:NAME:SPLIT, for instance tfds:imdb_reviews:train[:80%]")
    tfds = _imported("tensorflow_datasets", "tensorflow-datasets", reference)
    builder = _tfds_builder(tfds, match["name"], reference)
    # Images stay files, which are decoded where they are wanted.
    pictures = [name for name, feature in builder.info.features.items() if isinstance(feature, tfds.features.Image)]
    decoders = dict.fromkeys(pictures, tfds.decode.SkipDecoding()) or None
    try:
        source: Any = builder.as_data_source(split=match["split"], decoders=decoders)
    except (ValueError, NotImplementedError) as error:
        # An unknown split or slice, or data prepared in TFDS's default format, which only TensorFlow can read.
        hint = "prepared data must be in the array_record format"
        if str(getattr(builder.info.file_format, "value", "")) == "array_record":
            hint = "splits: " + ", ".join(
                f"{name} ({split.num_examples} rows)" for name, split in builder.info.splits.items()
            )
        raise UserError(f"{reference}: cannot be read: {_first_line(error)} ({hint})") from error
    features: Any = builder.info.features
    column_positions(list(features), columns, reference)
    names = [names_in(features[column], tfds.features.ClassLabel) for column in columns]
    for number in range(len(source)):
        yield _library_row(source[number], columns, names, f"{reference} row {number}")


def _tfds_builder(tfds: ModuleType, name: str, reference: str) -> DatasetBuilder:
    """A builder whose data lie on disk in random-access format."""
    folder = Path(name).expanduser()
    if (folder / "dataset_info.json").is_file():
        refuse_foreign_features(folder / "features.json", reference)
        read_json_object(folder / "dataset_info.json")
        try:
            return tfds.builder_from_directory(folder)
        except Exception as error:  # as many kinds as there are things that its two files may say
            raise UserError(f"{reference}: not a prepared TFDS data set: {_first_line(error)}") from error
    if folder.is_absolute() or name.startswith((".", "~")):
        raise UserError(
            f"{reference}: {folder} is no folder of a prepared TFDS data set (it has no dataset_info.json){_inner(folder)}"
        )
    for path in Path(tfds.core.constants.DATA_DIR, re.split("[/:]", name)[0]).expanduser().rglob("features.json"):
        refuse_foreign_features(path, reference)
    builder = _registered_builder(tfds, name, reference)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS talks while it prepares; our stdout may be predictions
            builder.download_and_prepare()
    except ImportError as error:
        raise UserError(f"{reference}: TFDS cannot prepare it here: {error}; install that package") from error
    except (OSError, tfds.download.DownloadError) as error:  # requests' errors are OSErrors
        host = re.search(r"host='([^']+)'|https?://([^/\s]+)", str(error))
        problem = f"cannot download from {host[1] or host[2]}" if host else f"cannot be prepared: {_first_line(error)}"
        raise UserError(
            f"{reference}: {problem}; go online, or prepare it elsewhere with file_format='array_record', copy the "
            "folder that holds its dataset_info.json, and use tfds:FOLDER:SPLIT"
        ) from error
    return builder


def _inner(folder: Path) -> str:
    """A hint at the folders of prepared data sets below ``folder``, if there are any."""
    found = sorted(path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/dataset_info.json"))
    return f"; did you mean tfds:{found[-1]}:SPLIT?" if found else ""


def _registered_builder(tfds: ModuleType, name: str, reference: str) -> DatasetBuilder:
    def build() -> DatasetBuilder:
        return tfds.builder(name, file_format="array_record")

    not_found = tfds.core.registered.DatasetNotFoundError
    try:
        try:
            return build()
        except not_found:
            # Most text data sets (glue, c4, wikipedia) register themselves only on this import.
            importlib.import_module("tensorflow_datasets.text")
            return build()
    except not_found as error:
        # Community data sets would be looked up on the network, with TensorFlow.
        known = tfds.list_builders(with_community_datasets=False)
        hint = nearest(re.split("[/:]", name)[0], known)
        hint = hint if hint.startswith("did you mean") else "tfds.list_builders() lists the names"
        raise UserError(f"{reference}: TFDS has no data set {name!r}: {hint}{_inner(Path(name))}") from error
    except (ValueError, AssertionError, ImportError) as error:  # unknown config, unknown version, missing package
        raise UserError(f"{reference}: {_first_line(error)}{_inner(Path(name))}") from error


def _iter_hf(reference: str, columns: tuple[str, ...]) -> Iterator[Row]:
    path, split = Path(reference.removeprefix("hf:")).expanduser(), ""
    if not path.exists():
        head, _, split = reference.removeprefix("hf:").rpartition(":")
        path = find_file(head or split, "data folder")
    if split and "/" not in split and (path / split / "state.json").is_file():
        path, split = path / split, ""  # the other splits need not be opened
    library = _imported("datasets", "datasets", reference)
    try:
        dataset = library.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{reference}: not a folder saved by datasets.save_to_disk: {_first_line(error)}") from error
    except IndexError as error:  # the library's answer to a table without data files
        empty = ", ".join(_tables_without_files(path)) or path
        raise UserError(f"{reference}: the data set is empty: no rows in {empty}") from error
    dataset = _hf_split(dataset, split, reference)
    column_positions(dataset.column_names, columns, reference)
    for column in columns:
        if isinstance(column, Binary) and getattr(dataset.features[column], "decode", False):
            dataset = dataset.cast_column(column, type(dataset.features[column])(decode=False))
    names = [names_in(dataset.features[column], library.ClassLabel) for column in columns]
    for number, record in enumerate(dataset.select_columns(list(columns)).with_format(None)):
        yield _library_row(record, columns, names, f"{reference} row {number}")


def _tables_without_files(folder: Path) -> list[str]:
    states = (read_json_object(state) | {"at": str(state.parent)} for state in sorted(folder.rglob("state.json")))
    return [state["at"] for state in states if not state.get("_data_files")]


def _hf_split(loaded: Dataset | dict[str, Dataset], split: str, reference: str) -> Dataset:
    """The table of ``split`` in what load_from_disk gave: one table, or a dict of them."""
    if not isinstance(loaded, dict):
        if split:
            raise UserError(f"{reference}: the folder holds a single table without splits; leave out ':{split}'")
        return loaded
    if split not in loaded:
        problem = f"no split {split!r}: {nearest(split, loaded)}" if split else f"name a split: {', '.join(loaded)}"
        raise UserError(f"{reference}: {problem}; use hf:FOLDER:SPLIT")
    return loaded[split]


def _library_row(record: Any, columns: tuple[str, ...], names: list[Names], where: str) -> Row:
    values = (record[column] for column in columns)
    return Row(tuple(map(library_value, values, columns, names, repeat(where))), where)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
