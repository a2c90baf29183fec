"""Short texts between the processes of a run, from any thread: no program runs on a device for them."""

from __future__ import annotations

from typing import Protocol

_DAY_MS = 24 * 60 * 60 * 1000
"""A process that has died ends the others (:mod:`jaxft.machine.processes.peers`); no time is too long for one that lives."""


class _Service(Protocol):
    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...
    def key_value_try_get(self, key: str) -> str: ...
    def key_value_delete(self, key: str) -> None: ...


def _service() -> _Service:
    from jax._src import distributed  # the service that the processes met by; jax has no public name for it

    if distributed.global_state.client is None:
        raise RuntimeError("several processes, and no service that they have met by")
    return distributed.global_state.client


def say(name: str, text: str) -> None:
    """Says something to all processes; whoever said it before is not heard any more."""
    _service().key_value_set(f"jaxft/{name}", f"+{text}", allow_overwrite=True)  # an empty value would be none


def heard(name: str) -> str | None:
    """What a process has said (:func:`say`); None: nothing yet."""
    import jax

    try:
        return str(_service().key_value_try_get(f"jaxft/{name}"))[1:]
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def exchange(name: str, text: str) -> list[str]:
    """What each process says, in the order of their numbers; returns once all have said it.

    Args:
      name: of the occasion: the same in all processes, and never used again.
    """
    import jax

    if jax.process_count() == 1:
        return [text]
    say(f"{name}/{jax.process_index()}", text)
    client = _service()
    keys = [f"jaxft/{name}/{number}" for number in range(jax.process_count())]
    return [str(client.blocking_key_value_get(key, _DAY_MS))[1:] for key in keys]


def forget(name: str) -> None:
    """Lets process 0, which keeps what has been said, forget all occasions whose names begin so; once all processes have read it."""
    import jax

    if jax.process_count() > 1 and jax.process_index() == 0:
        _service().key_value_delete(f"jaxft/{name}/")
