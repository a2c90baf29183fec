"""Eight virtual CPU devices for the whole suite, whatever the machine has; and an end to what compiled programs pile up."""

import os
from pathlib import Path

from quick_xla import quick_flags

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] += f" {quick_flags()}"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
# Lines are folded to the terminal's width, which differs from machine to machine.
os.environ["COLUMNS"] = "100"

import gc
import signal
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import settings

from jaxft.files import write_atomic
from jaxft.machine.memory import release_freed
from jaxft.reporting import plots

settings.register_profile("jaxft", database=None, deadline=None, derandomize=True)
settings.load_profile("jaxft")

_STATM = Path("/proc/self/statm")
_GROWTH = 450 * 2**20
_MEMORY = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
_most = min(max(1100 * 2**20, _MEMORY // 8), 1400 * 2**20)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test that is ``sampled(n)``, all but every n-th are slow."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is None:
            continue
        name = item.nodeid.split("[")[0]
        if seen[name] % mark.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[name] += 1


def pytest_collection_finish() -> None:
    """What is imported stays: the collector need not walk it, a tenth of the suite's time, each time that jax has traced a program."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def _resident() -> int:
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if _STATM.exists() else 0


def pytest_runtest_logfinish() -> None:
    """Programs are kept as long as the process lives: let go of them between two tests once they take much memory."""
    global _most
    if "jax" in sys.modules and _resident() > _most:
        sys.modules["jax"].clear_caches()
        gc.collect()
        release_freed()  # to the system: the C library would keep it
        _most = max(_most, _resident() + _GROWTH)


_paint = plots.save
_BLANK = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010100000000376ef9240"
    "000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)


def _blank(figure: object, path: Path) -> Path:
    write_atomic(path, _BLANK)
    return path


plots.save = _blank  # most runs are not begun for their pictures, whose painting costs more than many a training


@pytest.fixture(scope="module")
def painted() -> Iterator[None]:
    """Pictures are painted, not left blank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", _paint)
        yield


@pytest.fixture
def usual_signals() -> Iterator[None]:
    """Programs that are started get signals that whoever started the tests ignores (``nohup``, ``&``)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
