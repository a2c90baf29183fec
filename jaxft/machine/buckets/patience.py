"""Requests to an object store, made again while that may help: throttling, errors of the server, connections that are cut."""

from __future__ import annotations

import errno
import importlib
import logging
import os
import random
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from jaxft.errors import StorageError, UserError

T = TypeVar("T")
PATIENCE_SECONDS = 120.0
"""How long a request is tried; the variable ``JAXFT_STORAGE_SECONDS`` says otherwise."""
FIRST_WAIT, LONGEST_WAIT = 0.25, 20.0
"""Seconds before the second try, and at most before a later one; each wait is twice the one before."""
JITTER = 0.5
"""By up to this share of itself a wait is shorter, so that many processes do not come back at once."""
_SAY_AFTER = 4
_PASSING_STATUS = {408, 409, 425, 429}
"""What a server answers with a number below 500, and another try may mend."""
_PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown"}
_LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_ERRORS: Mapping[str, tuple[str, ...]] = {
    "s3": (
        "botocore.exceptions:BotoCoreError", "botocore.exceptions:ClientError",
        "botocore.parsers:ResponseParserError", "aiohttp:ClientError",
    ),
    "gs": (
        "gcsfs.retry:HttpError", "gcsfs.retry:ChecksumError",
        "google.auth.exceptions:GoogleAuthError", "aiohttp:ClientError",
    ),
}  # fmt: skip
"""What a library raises besides OSError."""
_OF_CREDENTIALS = (
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"),
    *("TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "NoAuthTokenError"),
    *("DefaultCredentialsError", "RefreshError", "MalformedError"),
)
_WITH_STATUS = ("HttpError", "ClientResponseError")
_CREDENTIALS: Mapping[str, str] = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud auth application-default login",
}
logger = logging.getLogger("jaxft.storage")


def errors_of(scheme: str) -> tuple[type[Exception], ...]:
    """What requests to a store of this kind may raise."""
    found: list[type[Exception]] = [OSError]
    for place in _ERRORS.get(scheme, ()):
        module, _, name = place.partition(":")
        found.append(getattr(importlib.import_module(module), name))
    return tuple(found)


class Patience:
    """How often a store is asked, and what is said when it is given up."""

    def __init__(self, scheme: str, seconds: float | None = None) -> None:
        self._scheme, self._errors, self._seconds = scheme, errors_of(scheme), seconds

    def __call__(self, where: str, action: Callable[[], T]) -> T:
        """What ``action`` gives; it is called again, ever later, while its errors may pass.

        Args:
          where: the address, for messages.

        Raises:
          FileNotFoundError: there is no such object.
          FileExistsError: there is one already, and it was to be a new one.
          UserError: it cannot work: no credentials, no access, no such bucket.
          StorageError: the store did not answer as it should for too long, or this machine's disk is full.
        """
        began, wait, tries = time.monotonic(), FIRST_WAIT, 0
        patience = _seconds() if self._seconds is None else self._seconds
        while True:
            tries += 1
            try:
                return action()
            except (FileNotFoundError, FileExistsError):
                raise
            except self._errors as error:
                self._refuse_lasting(where, error)
                spent = time.monotonic() - began
                if spent + wait > patience:
                    raise StorageError(
                        f"{where}: given up after {tries} tries in {spent:.0f} s: {_told(error)}; what was stored before is "
                        "whole; when the store answers again, the same command goes on"
                    ) from error
                if tries == _SAY_AFTER:
                    logger.warning("%s: %s; trying again for %.0f s at most", where, _told(error), patience - spent)
                time.sleep(wait * random.uniform(1 - JITTER, 1))
                wait = min(LONGEST_WAIT, 2 * wait)

    def _refuse_lasting(self, where: str, error: Exception) -> None:
        """Raises what no other try would mend."""
        if isinstance(error, OSError) and error.errno in _LOCAL and _status(error) is None:
            raise StorageError(f"{error.filename or where}: cannot be written: {os.strerror(error.errno)}") from error
        if any(type(one).__name__ in _OF_CREDENTIALS for one in _chain(error)):
            cure = _CREDENTIALS.get(self._scheme, "check them")
            raise UserError(f"{where}: no usable credentials ({type(error).__name__}); {cure}") from error
        status, code = _status(error), _code(error)
        if isinstance(error, PermissionError) or status in (401, 403):
            said = code or (f"HTTP {status}" if status else type(error).__name__)
            cure = _CREDENTIALS.get(self._scheme, "check them")
            raise UserError(
                f"{where}: access refused ({said}); check what the credentials may do, or {cure}"
            ) from error
        lasting = status is not None and 400 <= status < 500 and status not in _PASSING_STATUS
        if lasting and code not in _PASSING_CODES:
            raise UserError(f"{where}: refused by the store: {_told(error)}; check the address") from error
        if type(error).__name__ in ("ParamValidationError", "InvalidEndpoint", "NoRegionError", "InvalidRegionError"):
            raise UserError(f"{where}: no valid address, region or endpoint ({type(error).__name__})") from error


def _seconds() -> float:
    said = os.environ.get("JAXFT_STORAGE_SECONDS", "")
    try:
        return max(0.0, float(said)) if said else PATIENCE_SECONDS
    except ValueError:
        raise UserError(f"JAXFT_STORAGE_SECONDS={said!r}: expected a number of seconds") from None


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in found:
        found.append(seen)
        seen = seen.__cause__ or seen.__context__
    return found


def _status(error: BaseException) -> int | None:
    """The number that the server answered with; None: it did not come to an answer."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        if type(one).__name__ in _WITH_STATUS:  # others have such attributes too, of what the client found wrong
            found = getattr(one, "code", None) or getattr(one, "status", None)
        if isinstance(found, int):
            return found
    return None


def _code(error: BaseException) -> str | None:
    """S3's word for the error."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict) and isinstance(code := response.get("Error", {}).get("Code"), str):
            return code
    return None


def _told(error: Exception) -> str:
    """What went wrong, without the library's message, which may say more than belongs on a console."""
    status, code = _status(error), _code(error)
    parts = [f"HTTP {status}"] * (status is not None) + [code] * (code is not None and code != str(status))
    return " ".join(str(part) for part in parts) or type(error).__name__
