"""The files that a reference names: one file, a pattern, a folder of files of one format, or a folder of class folders."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from jaxft.data.sources.lines import MOST_RECORD, PACKED, Lines, read_lines, too_long
from jaxft.data.sources.media import media_in
from jaxft.data.sources.rows import Binary, Row, column_positions
from jaxft.errors import UserError
from jaxft.files import find_file
from jaxft.machine import buckets

CLASS_COLUMNS = ("text", "label")


@dataclass(frozen=True)
class Listing:
    """Files to read one after the other, or class folders."""

    files: tuple[Path, ...] = ()
    classes: tuple[Path, ...] = ()
    """Folders with a text per .txt file, or with images or sounds where these are wanted; their names are the labels."""
    media: tuple[Path, ...] = ()
    """Images or sounds, each a row of its own, those of ``classes`` among them."""


def suffix_of(name: str | Path) -> str:
    """The suffix that tells the format, lower-case and without ``.gz`` or ``.zst``."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return "".join(suffixes[:-1][-1:] if suffixes and suffixes[-1] in PACKED else suffixes[-1:])


_CURES = {
    ".xlsx": "; save the sheet as CSV (UTF-8)",
    ".xls": "; save the sheet as CSV (UTF-8)",
}


def unknown_format(name: str, accepted: str) -> UserError:
    """The error for a file whose suffix says nothing."""
    cure = _CURES.get(suffix_of(name), "")
    return UserError(f"{name!r}: the suffix does not tell the format of the rows{cure}; accepted: {accepted}")


def listed(
    reference: str,
    formats: set[str],
    accepted: str,
    note: Callable[[str], None],
    media: frozenset[str] = frozenset(),
) -> list[Listing]:
    """What a path or pattern names, in sorted order.

    Args:
      formats: suffixes that can be read; ``accepted``: what messages say of them.
      media: suffixes of images or sounds, where these are wanted.

    Raises:
      UserError: nothing is there, or a folder that is none of the forms.
    """
    if buckets.is_address(reference):
        reference = buckets.fetched_rows(reference)
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", reference):
        raise UserError(f"{reference}: files are read from this machine, s3:// and gs:// only; download it first")
    path = Path(reference).expanduser()
    if path.exists() or not glob.has_magic(reference):
        if "," in reference and not path.exists():
            raise UserError(f"data file {reference!r} does not exist; for several files write [{reference}]")
        if not path.exists() and suffix_of(path) not in formats | media and path.parts[:1] != ("configs",):
            raise unknown_format(reference, accepted)
        return [_listing(find_file(reference, "data file"), formats, note, media)]
    found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise UserError(f"{reference!r}: no file matches this pattern (looked in {Path.cwd()})")
    return [_listing(Path(one), formats, note, media) for one in found]


def _listing(path: Path, formats: set[str], note: Callable[[str], None], media: frozenset[str]) -> Listing:
    if not path.is_dir():
        return Listing(media=(path,)) if suffix_of(path) in media else Listing(files=(path,))
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        raise UserError(f"{path}: is a folder of the datasets library; write hf:{path}")
    if (path / "dataset_info.json").is_file():
        raise UserError(f"{path}: is a folder of TensorFlow Datasets; write tfds:{path}:SPLIT")
    if (path / "cache.json").is_file():
        raise UserError(
            f"{path}: is a token cache, which holds no texts; only data.train and data.eval take one, alone"
        )
    if (path / "corpus.json").is_file():
        raise UserError(
            f"{path}: is a corpus, which holds tokens and no texts; data.train and data.eval of a run take it (jaxft train)"
        )
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file() and not entry.name.startswith("_")]
    tables = [file for file in files if suffix_of(file) in formats - {".txt", ".json"}]  # .json may be about the others
    texts = [file for file in files if suffix_of(file) == ".txt"]
    folders = [entry for entry in entries if entry.is_dir()]
    if media and not tables:
        return _media_listing(path, entries, media, note)
    kinds = sorted({suffix_of(file) for file in tables})
    if len(kinds) > 1:
        patterns = ", ".join(f"{path}/*{kind}" for kind in kinds)
        raise UserError(f"{path}: holds files of several formats; name one kind, or list them: {patterns}")
    classes = [] if tables else [folder for folder in folders if _texts_in(folder)]
    if not tables and folders and (classes or not texts):
        without = [folder.name for folder in folders if folder not in classes and not folder.name.startswith("_")]
        if without:
            raise UserError(
                f"{path}: {without[0]} holds no .txt file; a folder of class folders has texts in each "
                "(name the folder that holds the classes)"
            )
        texts = []
    read = {*tables, *classes} or set(texts)
    if not read and any(suffix_of(file) == ".json" for file in files):
        raise UserError(
            f"{path}: its .json files may be about other files; if they hold the rows, name them: {path}/*.json"
        )
    if not read:
        raise UserError(f"{path}: holds no data file (accepted: {', '.join(sorted(formats))}) and no class folders")
    if others := [entry.name for entry in entries if entry not in read and entry.name != "_SUCCESS"]:
        note(f"{path}: not read: {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}")
    return Listing(classes=tuple(classes)) if classes else Listing(files=tuple(tables or texts))


def _media_listing(path: Path, entries: list[Path], media: frozenset[str], note: Callable[[str], None]) -> Listing:
    """What a folder without tables holds of images or sounds: files, and class folders."""
    files = [entry for entry in entries if entry.is_file() and suffix_of(entry) in media]
    inside = {entry: media_in(entry) for entry in entries if entry.is_dir()}
    classes = tuple(folder for folder, found in inside.items() if found)
    if not files and not classes:
        deeper = next(
            (folder for folder in inside if any(media_in(one) for one in folder.iterdir() if one.is_dir())), None
        )
        hint = f"; did you mean {deeper}?" if deeper else ""
        raise UserError(f"{path}: holds no image or sound ({', '.join(sorted(media))}), and no folders of these{hint}")
    read = {*files, *classes}
    if others := [entry.name for entry in entries if entry not in read]:
        note(f"{path}: not read: {', '.join(others[:5])}{', ...' if len(others) > 5 else ''}")
    return Listing(media=(*files, *(file for folder in classes for file in inside[folder])), classes=classes)


def iter_media(listing: Listing, columns: tuple[str, ...]) -> Iterator[Row]:
    """A row per image or sound: its path, and the name of its class folder as column ``label``."""
    folders = set(listing.classes)
    labelled = bool(folders) and all(file.parent in folders for file in listing.media)
    present = (*(str(column) for column in columns if isinstance(column, Binary)), *(("label",) if labelled else ()))
    positions = column_positions(present, columns, str(listing.media[0].parent))
    for file in listing.media:
        values = (str(file), file.parent.name)
        yield Row(tuple(values[position] for position in positions), str(file))


def _texts_in(folder: Path) -> list[Path]:
    inside = (file for file in folder.iterdir() if not file.name.startswith("."))
    return sorted(file for file in inside if suffix_of(file) == ".txt" and file.is_file())


def iter_classes(folders: tuple[Path, ...], columns: tuple[str, ...]) -> Iterator[Row]:
    """A row per .txt file: column ``text`` is all that it holds but its last line end, ``label`` the name of its folder."""
    positions = column_positions(CLASS_COLUMNS, columns, str(folders[0].parent))
    for folder in folders:
        for file in _texts_in(folder):
            with closing(read_lines(file, table=False)) as lines:
                text = _whole(lines, str(file)).removesuffix("\n").removesuffix("\r")
            values = (text, folder.name)
            yield Row(tuple(values[position] for position in positions), str(file))


def _whole(lines: Lines, where: str) -> str:
    parts, size = list[str](), 0
    for line in lines:
        parts.append(line)
        size += len(line)
        if size > MOST_RECORD:
            raise too_long(where)
    return "".join(parts)
