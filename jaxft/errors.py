"""The exception class that means "the user can fix this", its kinds, and the exit codes of all commands.

Everything raised as :class:`UserError` is printed by the command line as one line and ends the process with the exit code of its kind,
without a traceback. Anything else that escapes is a bug in jaxft and keeps its traceback.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Mapping
from typing import ClassVar

EXIT_CODES: Mapping[int, str] = {
    0: "done",
    1: "a check found a difference or damage (convert --check, cache verify, doctor); or a fault of jaxft, with its traceback",
    2: "something to correct: one line says what, where and what to do",
    3: "checkpoints are there, and none of them can be used; nothing was removed, nothing was trained anew",
    4: "storage failed: a full or failing disk; what was stored before is whole",
    5: "training diverged: losses or gradients were not finite again and again",
    6: "plan: the run does not fit the hardware",
    70: "training hung: no step for longer than train.watchdog allows; OUT/hang.txt says where, the same command goes on",
    71: "another process of the run died, was stopped or hung; the line names it, the same command goes on",
    130: "told to stop (Ctrl-C, SIGTERM, SIGHUP): the state is saved where there was one, the same command goes on",
}
"""What the exit code of any command means."""


HUNG = 70
"""Exit code of a run that took no step any more."""
PEER_LOST = 71
"""Exit code of a process whose run has lost another one."""


class UserError(Exception):
    """A problem in the user's input: says what is wrong, where, and what to do about it."""

    exit_code: ClassVar[int] = 2


class NothingUsable(UserError):
    """A run has stored steps, and none of them can be gone on from."""

    exit_code = 3


class StorageError(UserError):
    """Something could not be stored or read: a full or failing disk, a file system that may not be written."""

    exit_code = 4


_OF_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG, errno.ESTALE}


def storage_problem(error: BaseException) -> str | None:
    """What is wrong with the storage, in the system's words, if an error (or what it came from) is about that.

    Libraries that write files in C++ name the system's error in their message only.
    """
    seen: BaseException | None = error
    while seen is not None:
        said = re.search(r"(?:os_error_code='|OS error |Errno )(\d+)", str(seen))
        number = seen.errno if isinstance(seen, OSError) and seen.errno is not None else int(said[1]) if said else None
        if number in _OF_STORAGE:
            return os.strerror(number)
        seen = seen.__cause__ or seen.__context__
    return None


def not_written(where: object, error: OSError) -> UserError:
    """The error that says that a file could not be written; its kind is that of the cause."""
    kind = UserError if storage_problem(error) is None else StorageError
    return kind(f"{where}: cannot be written: {error.strerror}")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of the machine or of a device."""
    seen: BaseException | None = error
    while seen is not None:
        # jax's class, which is not imported for it.
        of_device = type(seen).__name__ in ("JaxRuntimeError", "XlaRuntimeError")
        if isinstance(seen, MemoryError) or (of_device and re.search("RESOURCE_EXHAUSTED|[Oo]ut of memory", str(seen))):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


class Diverged(UserError):
    """Losses or gradients of a run were not finite for too long."""

    exit_code = 5


def printable(text: str) -> str:
    """A text as it can be shown on one line: control and invisible characters escaped, but those that join letters."""
    return "".join(c if c.isprintable() or c in "\u200c\u200d" else c.encode("unicode_escape").decode() for c in text)


_SECRETS = re.compile(
    r"(?P<kept>://)[^/@\s:]+:[^/@\s]+(?=@)"  # of a user in an address
    r"|(?P<named>(?i:(?:secret|password|passwd|api[_-]?key|access[_-]?key|token|signature))['\"]?\s?[=:]\s?['\"]?)"
    r"(?!(?:null|None)\b)[A-Za-z0-9+/_.~%-]{16,}=*"
    r"|(?P<bearer>\b(?i:bearer)\s)[A-Za-z0-9+/_.~-]{16,}=*"
    r"|\b(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|ya29\.[\w-]{16,})"
)
"""What tokens and passwords look like: in addresses, beside their names, and those that providers give a form of their own. Texts may
be long: nothing here is looked at twice."""


def redacted(text: str) -> str:
    """A text with ``***`` in the place of what looks like a secret."""
    return _SECRETS.sub(lambda found: f"{found['kept'] or found['named'] or found['bearer'] or ''}***", text)


LONGEST_LINE = 300
"""Characters of an error's line, at most: what was found in a file may be a million."""
_LONGEST_WORD = 80


def one_line(message: str, most: int = LONGEST_LINE) -> str:
    """A message on one line of at most ``most`` characters, without secrets: long words lose their middle, then the whole line does."""
    line = printable(" ".join(message.split()))
    if len(line) > most:
        line = " ".join(_without_middle(word, _LONGEST_WORD, _LONGEST_WORD // 2) for word in line.split(" "))
    # Which file and key stand first, what to do about it last.
    return redacted(_without_middle(line, most, most // 4))


def _without_middle(text: str, most: int, end: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def listed(names: Iterable[str], most: int = 20) -> str:
    """Names on one line, the first ``most`` of them, and how many more there are."""
    all_names = list(names)
    more = f", ... ({len(all_names) - most:,} more)" if len(all_names) > most else ""
    shown = (printable(name) for name in all_names[:most])
    return ", ".join(name if len(name) <= 60 else f"{name[:59]}…" for name in shown) + more


_COMPARED = 200
"""Characters of a name that are compared with others."""
_CANDIDATES = 2000
"""Names that one is compared with."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest valid name, or all of them if none is near."""
    names = sorted(valid)
    # Of names of hundreds of letters, or among a hundred thousand of them, looking takes minutes, and finds no slip of a finger.
    close = difflib.get_close_matches(name[:_COMPARED], names[:_CANDIDATES], n=1, cutoff=0.6)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"valid names: {listed(names)}" if names else "no names are valid here"
