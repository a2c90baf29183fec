"""What lies below an address of an object store, through fsspec: one library per scheme, each an extra of jaxft.

A put is atomic in these stores: an object is what it was before, or all that was put. There are no renames, and nothing is appended.
"""

from __future__ import annotations

import base64
import hashlib
import importlib
import re
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jaxft.errors import UserError
from jaxft.machine.buckets.patience import Patience

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

SCHEMES = {"s3": ("s3fs.core", "S3FileSystem", "s3"), "gs": ("gcsfs.core", "GCSFileSystem", "gcs")}
"""The module and class of each scheme, and the extra of jaxft that has it."""
_ADDRESS = re.compile(r"([a-z][a-z0-9]*)://")
_THREADS = 8
_CONNECT_SECONDS, _READ_SECONDS = 10, 60
_VERSION = ("ETag", "etag", "generation", "md5Hash", "LastModified", "updated", "created")


def is_address(reference: object) -> bool:
    """Whether a reference names something in an object store."""
    match = _ADDRESS.match(reference) if isinstance(reference, str) else None
    return match is not None and match[1] in SCHEMES


@dataclass(frozen=True)
class Entry:
    """An object."""

    size: int
    version: str
    """Another one once the object has been put again."""


class Store:
    """The objects below an address, by the rest of their names; ``""`` is an object of that very name.

    Args:
      address: ``s3://BUCKET/NAME``.
      patience: seconds for which a request is tried; None: as long as usual.

    Raises:
      UserError: the address is none, or the package for its scheme is missing.
    """

    def __init__(self, address: str, patience: float | None = None) -> None:
        scheme, _, rest = address.partition("://")
        if not is_address(address) or not rest.strip("/"):
            raise UserError(f"{address!r}: name a bucket and what lies in it, as in s3://bucket/folder")
        self.address = f"{scheme}://{rest.strip('/')}"
        self._scheme, self._root = scheme, rest.strip("/")
        self._files = _file_system(scheme)
        self._patience = Patience(scheme, patience)

    def entries(self) -> dict[str, Entry]:
        """Every object below the address.

        Raises:
          UserError: there is no such bucket, or no access to it.
        """

        def find() -> Mapping[str, Mapping[str, object]]:
            return cast("Mapping[str, Mapping[str, object]]", self._files.find(self._root, detail=True))

        try:
            found = self._patience(self.address, find)
        except FileNotFoundError as error:
            raise self._no_bucket() from error
        if not found:
            self._check_bucket()
        start = f"{self._root}/"
        named = ((name.lstrip("/"), said) for name, said in found.items() if said["type"] == "file")
        below = ((n.removeprefix(start), said) for n, said in named if n.startswith(start) and not n.endswith("/"))
        return {name: _entry(said) for name, said in below}

    def entry(self, name: str = "") -> Entry | None:
        """One object; None: there is none of this name."""
        try:
            said = self._patience(self._at(name), lambda: self._files.info(self._path(name)))
        except FileNotFoundError:
            return None
        return _entry(said) if said["type"] == "file" else None

    def read(self, name: str) -> bytes | None:
        """The content of an object; None: there is none of this name."""
        try:
            return cast(bytes, self._patience(self._at(name), lambda: self._files.cat_file(self._path(name))))
        except FileNotFoundError:
            return None

    def download(self, name: str, path: Path, size: int) -> None:
        """Fetches an object of ``size`` bytes into a file, whole or not at all.

        Raises:
          FileNotFoundError: there is no such object.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")

        def get() -> None:
            self._files.get_file(self._path(name), str(part))
            if not part.exists():
                part.touch()  # of nothing, some libraries make no file
            if (found := part.stat().st_size) != size:
                raise ConnectionError(f"{found} of {size} bytes came")

        try:
            self._patience(self._at(name), get)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def put(self, name: str, data: bytes) -> None:
        """Makes ``data`` the content of an object."""

        def pipe() -> None:
            self._files.pipe_file(self._path(name), data)
            self._compare(name, len(data), lambda: hashlib.md5(data, usedforsecurity=False).digest())

        self._putting(name, pipe)

    def put_new(self, name: str, data: bytes) -> bool:
        """The same, unless there is one of this name; whether it was put.

        An answer that got lost may have been a yes: whoever asks again reads what is there.
        """
        try:
            self._putting(name, lambda: self._files.pipe_file(self._path(name), data, mode="create"))
        except FileExistsError:
            return False
        return True

    def upload(self, name: str, path: Path) -> None:
        """Makes a file the content of an object; a large one in parts, which count once all are there.

        Raises:
          FileNotFoundError: the file has gone.
        """
        if path.stat().st_size == 0:  # put_file of some libraries takes an empty file for nothing to do
            self.put(name, b"")
        else:
            size = path.stat().st_size

            def put() -> None:
                self._files.put_file(str(path), self._path(name))
                with open(path, "rb") as file:
                    self._compare(name, size, lambda: hashlib.file_digest(file, "md5").digest())

            self._putting(name, put, path)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects, in any order; one that has gone is none."""

        def gone(name: str) -> None:
            with suppress(FileNotFoundError):
                self._patience(self._at(name), lambda: self._files.rm_file(self._path(name)))

        each(gone, names)

    def _putting(self, name: str, action: Callable[[], object], path: Path | None = None) -> None:
        try:
            self._patience(self._at(name), action)
        except FileNotFoundError as error:
            if path is not None and not path.exists():
                raise
            raise self._no_bucket() from error

    def _compare(self, name: str, size: int, md5: Callable[[], bytes]) -> None:
        """Raises ConnectionError if the store has something else than was put.

        Seen with a connection that was cut: an upload in parts that the library took up again came to an end, a byte short.
        """
        said = self._files.info(self._path(name))
        if said["size"] != size:
            raise ConnectionError(f"{said['size']} of {size} bytes arrived")
        found = said.get("md5Hash")  # of GCS; S3 compares a checksum of each request itself
        if found is not None and found != base64.b64encode(md5()).decode():
            raise ConnectionError("other bytes arrived")

    def _check_bucket(self) -> None:
        try:
            self._patience(self.address, lambda: self._files.info(self._root.partition("/")[0]))
        except FileNotFoundError as error:
            raise self._no_bucket() from error

    def _no_bucket(self) -> UserError:
        bucket = self._root.partition("/")[0]
        return UserError(
            f"{self._scheme}://{bucket}: there is no such bucket; check its name, its region and the endpoint, or make it"
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _at(self, name: str) -> str:
        return f"{self.address}/{name}" if name else self.address


def each(action: Callable[[str], object], names: Iterable[str]) -> None:
    """Calls ``action`` for all names, several at once; the first error is raised once all have ended."""
    with ThreadPoolExecutor(_THREADS) as pool:
        for made in [pool.submit(action, name) for name in names]:
            made.result()


def _entry(said: Mapping[str, object]) -> Entry:
    version = next((str(said[key]) for key in _VERSION if said.get(key) is not None), "")
    return Entry(cast(int, said["size"]), version)


def _file_system(scheme: str) -> AbstractFileSystem:
    module, kind, extra = SCHEMES[scheme]
    try:
        library = importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise UserError(f"{scheme}:// needs the package {package}; pip install 'jaxft[{extra}]'") from None
    options: dict[str, object] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "s3":
        # Tries are counted in one place, which is ours.
        timeouts = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
        options |= {"config_kwargs": {"retries": {"max_attempts": 0}, **timeouts}}
    files: AbstractFileSystem = getattr(library, kind)(**options)
    vars(files)["retries"] = 1
    return files
