"""Models as EleutherAI's lm-evaluation-harness asks them (Gao et al. 2024), which must be installed: ``pip install lm-eval``.

``python -m jaxft.inference.harness --model jaxft --model_args folder=FOLDER --tasks TASKS`` is its command ``lm_eval`` with one more kind
of model; from Python, ``lm_eval.simple_evaluate(model=language_model("FOLDER"), tasks=[...])``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np

from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.files import JsonObject
from jaxft.inference.corpus_scores import Row, check_task, scores_of
from jaxft.inference.generation import GenerationConfig, Writer, stored_generation
from jaxft.inference.predict import open_model
from jaxft.models.decoding import writes
from jaxft.tasks.contract import Exhaustive, Passage

if TYPE_CHECKING:
    from types import ModuleType

NAME = "jaxft"
"""What ``--model`` calls it."""
_NEW = 256  # tokens that are made where a request does not say how many, as the harness has it
_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "do_sample", "repetition_penalty", "num_beams")
_LIBRARY = {"until", "max_gen_toks", "max_new_tokens", *_SETTINGS}


class Request(Protocol):
    """What the harness asks: its ``Instance``."""

    @property
    def args(self) -> tuple[object, ...]:
        """Texts, and settings of generation."""
        ...


class Harness:
    """The three questions of the harness, answered with a model of a folder. :func:`language_model` makes one that is its ``LM`` too.

    Args:
      folder: as ``jaxft eval`` takes it: an exported folder, a run, a checkpoint, a hub id.
      batch_size: rows that are computed together.
      max_length: tokens that the model sees; None: what its position limit or its run says.
      max_gen_toks: tokens that are made where a request does not say how many.
      overrides: more settings, ``key=value``, parted by semicolons: ``mesh.tensor=2;model.matmul_dtype=float32``.
      device: not looked at, for the harness names one unasked: jax chooses (``JAX_PLATFORMS``).
      max_batch_size: likewise.

    Raises:
      UserError: there is no such model, or it does not predict next tokens.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int | str = 8,
        max_length: int | None = None,
        max_gen_toks: int = _NEW,
        overrides: str = "",
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        del max_batch_size, device
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size}: must be a number of rows, at least 1")
        given = [one.strip() for one in overrides.split(";") if one.strip()]
        served = open_model(str(folder), [*given, f"eval.batch_size={batch_size}"], _say)
        if not writes(served.model):
            raise UserError(
                f"{folder}: the model has the head {served.model.head}; the harness asks decoders, with a head for the next token"
            )
        self._served, self._new = served, max_gen_toks
        self._task: Exhaustive = check_task(served.task()[1], served.model.head, str(folder))
        limit = served.model.facts.limit
        self.max_length = max_length or limit or served.config.data.max_length
        if limit is not None and self.max_length > limit:
            raise UserError(f"max_length={max_length}: the model's limit is {limit} tokens")
        self._tokenizer = Tokenizer(served.tokenizer.folder, None, model_type=served.family_name)
        before = self._tokenizer.special.before
        if not before:
            raise UserError(
                f"{folder}: its tokenizer names no token that begins or ends texts, after which a text could be scored"
            )
        self.prefix_token_id = before[0]
        """What texts are scored after that have no context."""

    @property
    def batch_size(self) -> int:
        """Rows that are computed together."""
        return self._served.config.eval.batch_size

    @property
    def tokenizer_name(self) -> str:
        """What tells caches of requests apart."""
        return f"jaxft-{self._tokenizer.digest()}"

    def loglikelihood(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation), the continuation's log-probability, and whether each of its tokens is the most probable one.
        A context that is too long loses its beginning."""
        del disable_tqdm
        pairs = [self._pair(*map(str, request.args)) for request in requests]

        def rows() -> Iterator[Row]:
            for number, (context, continuation) in enumerate(pairs):
                seen = np.array([*context, *continuation][-self.max_length - 1 :], np.int32)
                if len(continuation) > self.max_length:
                    raise UserError(
                        f"request {number}: its continuation has {len(continuation)} tokens, and the model sees {self.max_length}"
                    )
                if continuation:
                    places = np.arange(len(seen) - 1)
                    yield Row(number, Passage(seen[:-1], seen[1:], places >= len(seen) - 1 - len(continuation)))

        found = [(0.0, True)] * len(pairs)
        for one in scores_of(self._served, self._task, rows(), self.max_length):
            found[int(one.of)] = (-one.loss, one.correct == one.tokens)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text: each token once, in windows of ``max_length`` tokens, the last one full."""
        del disable_tqdm

        def rows() -> Iterator[Row]:
            for number, request in enumerate(requests):
                tokens = np.array([self.prefix_token_id, *self._plain(str(request.args[0]))], np.int32)
                for passage in self._task.passages(tokens, self.max_length, 0):
                    yield Row(number, passage)

        found = [0.0] * len(requests)
        for one in scores_of(self._served, self._task, rows(), self.max_length):
            found[int(one.of)] -= one.loss
        return found

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to one of the strings that its settings name, which is left out."""
        del disable_tqdm
        found = [""] * len(requests)
        for settings, numbers in _alike(requests):
            stop, config = self._generation(settings)
            writer = Writer(self._served, config, stop=stop)
            prompts = [self._fitted(str(requests[number].args[0]), config.max_new_tokens) for number in numbers]
            for number, made in zip(numbers, writer.write(prompts, self.batch_size), strict=True):
                found[number] = made.text
        return found

    def _generation(self, settings: Mapping[str, object]) -> tuple[tuple[str, ...], GenerationConfig]:
        """The strings that end texts, and how tokens are chosen."""
        if unknown := sorted(set(settings) - _LIBRARY):
            raise UserError(
                f"generation: {', '.join(unknown)} cannot be followed here; leave it out of the task's generation_kwargs"
            )
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(cast(Iterable[str], until))
        wanted = int(str(settings.get("max_gen_toks", settings.get("max_new_tokens", self._new))))
        new = min(wanted, max(1, self.max_length // 2)) if wanted >= self.max_length else wanted
        ends: JsonObject = {"eos_token_id": stored_generation(self._served.folder, _say).get("eos_token_id", ())}
        chosen: JsonObject = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
        temperature = chosen.get("temperature")
        if not chosen.get("do_sample") or temperature == 0:  # the harness asks for greedy tokens in any of these ways
            chosen = {name: value for name, value in chosen.items() if name in ("repetition_penalty", "num_beams")}
        said: JsonObject = {**ends, **chosen, "max_new_tokens": new}
        return tuple(one for one in stop if one), GenerationConfig(**said)

    def _fitted(self, context: str, new: int) -> str:
        """A context without as much of its beginning as there is no room for."""
        room, text = self.max_length - new, context
        while len(tokens := self._encoded(text)) > room:
            plain = self._plain(text)
            text = str(self._tokenizer.decode(np.array(plain[len(tokens) - room :], np.int64), special=True))
        return text

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of what follows it: blanks between them are of what follows, as most vocabularies have them."""
        if not context:
            tokens = self._plain(continuation)
            return (
                (tokens[:1], tokens[1:]) if tokens[:1] == [self.prefix_token_id] else ([self.prefix_token_id], tokens)
            )
        kept = context.rstrip()
        whole = self._encoded(context + continuation)
        begun = self._encoded(kept) or [self.prefix_token_id]
        if not kept:
            return [self.prefix_token_id], whole
        return begun, whole[len(begun) :]

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer.plain([text])[0][0]

    def _encoded(self, text: str) -> list[int]:
        """Tokens of a text with what its tokenizer puts before it, and nothing after it."""
        plain = self._plain(text)
        whole = self._tokenizer.ids([text])[0]
        special = set(self._tokenizer.special_ids)
        first = next((i for i, token in enumerate(whole) if token not in special), len(whole))
        begin = whole[: max(0, first)] if plain and plain[:1] != whole[:1] else []
        return [*begin, *plain]


def _alike(requests: Sequence[Request]) -> Iterator[tuple[Mapping[str, object], list[int]]]:
    """The requests of each kind of settings."""
    groups: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(repr(request.args[1]), []).append(number)
    for numbers in groups.values():
        yield cast("Mapping[str, object]", requests[numbers[0]].args[1]), numbers


def _library(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise UserError("lm-evaluation-harness is not installed: pip install lm-eval") from error


def register() -> type[Harness]:
    """Makes ``jaxft`` a kind of model of the harness: ``--model jaxft``.

    Raises:
      UserError: the harness is not installed.
    """
    base = _library("lm_eval.api.model").LM
    made = type("JaxftLM", (Harness, base), {"__doc__": Harness.__doc__})
    registry = _library("lm_eval.api.registry")
    _library("lm_eval.models")
    registry.register_model(NAME)(made)
    return made


def language_model(folder: str, **settings: int | str | None) -> Harness:
    """A model as the harness's ``simple_evaluate(model=...)`` takes it.

    Args:
      folder: an exported folder, a run, a checkpoint, a hub id.
      settings: of :class:`Harness`.

    Raises:
      UserError: the harness is not installed, or there is no such model.
    """
    base = _library("lm_eval.api.model").LM
    return type("JaxftLM", (Harness, base), {})(folder, **settings)


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def main() -> int:
    """The harness's command with one more kind of model."""
    from jaxft.machine import compile_cache
    from jaxft.machine.platform import set_up_jax

    set_up_jax(compile_cache.FOLDER)
    try:
        register()
        _library("lm_eval.__main__").cli_evaluate()
    except UserError as error:
        print(f"jaxft harness: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
