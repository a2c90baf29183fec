"""One table of exit codes: what commands return is in it, and `jaxft --help` and the docs show it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from jaxft import errors
from jaxft.__main__ import main
from jaxft.cli.plan import DOES_NOT_FIT


def test_every_kind_of_error_has_a_code_of_the_table() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.UserError)]
    codes = {kind.exit_code for kind in kinds}
    assert codes == {2, 3, 4, 5}
    assert codes | {0, 1, DOES_NOT_FIT} <= set(errors.EXIT_CODES)


def test_the_table_is_in_the_help_and_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
    for code, meaning in errors.EXIT_CODES.items():
        assert f"  {code:<4} {meaning}" in shown
        assert f"| {code} | {meaning} |" in page


@pytest.mark.parametrize("kind", [errors.UserError, errors.NothingUsable, errors.StorageError, errors.Diverged])
def test_a_command_ends_with_the_code_of_what_ended_it(
    kind: type[errors.UserError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(options: object) -> int:
        raise kind("said\nin one line")

    monkeypatch.setattr("jaxft.cli.show_config.run", fails)
    assert main(["show-config"]) == kind.exit_code
    assert capsys.readouterr().err == "jaxft show-config: error: said in one line\n"


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 4), (errno.EIO, 4), (errno.EDQUOT, 4), (errno.EACCES, 2)])
def test_failing_storage_has_its_code_wherever_it_shows(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(options: object) -> int:
        raise OSError(number, os.strerror(number), "there")

    monkeypatch.setattr("jaxft.cli.show_config.run", fails)
    assert main(["show-config"]) == code
    assert capsys.readouterr().err == f"jaxft show-config: error: there: {os.strerror(number)}\n"
    assert errors.not_written("there", OSError(number, os.strerror(number))).exit_code == code
