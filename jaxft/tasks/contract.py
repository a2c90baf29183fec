"""What a task is to the rest of jaxft (docs/add_a_task.md): which columns it reads, how rows become examples, what is learnt of
them, and how the model's answers are scored and told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from jaxft.config import DataConfig, LogConfig, RunConfig, TaskConfig
from jaxft.data.batch import Field, Fields, text_fields
from jaxft.data.encode import Column, encode_texts, label_column, text_columns
from jaxft.data.examples import Encoded, Split
from jaxft.data.processors.contract import Processor, TextProcessor
from jaxft.data.sources.rows import Row
from jaxft.models.contract import Facts, Model, Output
from jaxft.trees import Params

Array = jax.Array
P = TypeVar("P", bound=Processor, contravariant=True)
"""What makes arrays of a task's rows: a tokenizer, or what makes images."""

__all__ = ["Accompanied", "Answer", "Answering", "Arrays", "Batch", "Biased", "Column", "Comparing"]
__all__ += ["DataConfig", "Deciding", "Encoded", "Exhaustive", "Facts", "Field", "Fields", "Forward", "Grading"]
__all__ += ["Judging", "Labelled", "Mixing", "Note", "Output", "Partial", "Passage", "Remarking", "Reporting", "Row"]
__all__ += ["RunConfig", "Sample", "Sampler", "Sampling", "Scheduled", "ScoringRows", "Split", "Sums", "Targets"]
__all__ += ["Task", "TaskConfig", "TaskModule", "TextProcessor", "Writing", "encode_texts", "label_column"]
__all__ += ["text_columns", "text_fields"]
"""What a task from outside of jaxft is made of (docs/api.md)."""
Batch = dict[str, Array]
Sums = dict[str, Array]
Arrays = Mapping[str, np.ndarray]
LongTexts = Literal["truncate", "split", "windows"]
Direction = Literal["max", "min"]
Note = Callable[[str], None]
Forward = Callable[[Batch, Array | None], Output]
"""The model's forward pass on a prepared batch, with a dropout key or without."""


@dataclass(frozen=True)
class Targets:
    """What a task takes from the labels of its training rows; kept with the model, and read back to go on or to answer."""

    labels: tuple[str, ...] = ()
    """Names of the classes in the order of their ids; empty for tasks without classes."""
    counts: tuple[int, ...] = ()
    """How often each occurs in training; empty where that is not known."""
    problem: str | None = None
    """``problem_type`` of config.json, if the head's class has one."""
    rows: int = 0
    """Training examples that ``counts`` are of."""


class Answer(NamedTuple):
    """What is said of one row."""

    record: Mapping[str, object]
    """For JSON Lines."""
    cells: Mapping[str, object]
    """For a table: plain values by column."""
    unsaid: bool = False
    """The model's numbers are NaN."""


class Task(Protocol):
    """What is learnt and how it is scored: a frozen, hashable value, part of jit's cache key."""

    @property
    def head(self) -> str | None:
        """The model head that it trains; None: the bare model, whose vectors it reads."""
        ...

    @property
    def metrics(self) -> Mapping[str, Direction]:
        """The scalars that ``eval.metric`` may name, and which way is better; the first is the default."""
        ...

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch that model and loss see, made on the device. Random choices follow from ``key`` and each row's content alone."""
        ...

    def weight(self, batch: Batch) -> Array:
        """Scalar: what the summed loss of a prepared batch is divided by."""
        ...

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """Sums over a prepared batch, ``loss`` and ``weight`` among them; never a mean. Rows of weight 0 add nothing."""
        ...

    def outputs(self, forward: Forward, batch: Batch) -> Batch:
        """What scores need beyond sums: arrays [N, ...] with ``weights`` [N], 0 for entries that count nothing; often N is the
        number of rows. ``{}`` where sums suffice."""
        ...

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> Mapping[str, object]:
        """The final numbers, on the host, from the sums and outputs of all batches. A score of nothing is NaN."""
        ...

    def learnable(self, split: Split) -> int:
        """How many rows or tokens of a split the loss can be of; a run without any is refused."""
        ...


_Task = Task


class Answering(Protocol):
    """What a task has besides if ``jaxft predict`` answers with it."""

    def predictions(self, forward: Forward, batch: Batch) -> Batch:
        """What answers need, an array [B, ...] per name."""
        ...

    def answer(self, texts: Sequence[object], parts: Sequence[tuple[Encoded, Arrays]]) -> Answer:
        """What is said of a row.

        Args:
          texts: as the row has them.
          parts: its examples in order, and of each what :meth:`predictions` gave, unpadded along no axis.
        """
        ...


class Judging(Protocol):
    """What a task has besides if ``jaxft eval --rows`` can tell each row's answer beside what is right."""

    def judged(
        self, outputs: Arrays, rows: Sequence[Sequence[object]], order: np.ndarray
    ) -> Iterator[dict[str, object]]:
        """A flat mapping for each row, in their order.

        Args:
          outputs: what :meth:`Task.outputs` gave of all batches.
          rows: the values of the rows, as the task's columns say.
          order: [examples] the example that each batch's rows were, one after the other.
        """
        ...


class Grading(Protocol):
    """What a task has besides if the worst mistakes among judged rows can be told: those of ``errors.csv``. One whose options may leave
    nothing to judge has ``judging``, False if they do."""

    def wrongness(self, judged: Mapping[str, object]) -> float | None:
        """How bad an answer is, more is worse; None: it is right.

        Args:
          judged: what :meth:`Judging.judged` says of the row.
        """
        ...


class Reporting(Protocol):
    """What a task has besides if a report tells more than scores, or what takes too long for every evaluation of a run."""

    def reported(self, outputs: Arrays) -> Mapping[str, object]:
        """What ``metrics.json`` has besides :meth:`Task.score`, from what :meth:`Task.outputs` gave of all batches. ``calibration``, with
        ``bins``, is drawn; ``thresholds``, where a label is given from a probability on, has the best one of each (``labels``), which an
        export keeps."""
        ...


class Deciding(Protocol):
    """What a task has besides if ``jaxft train`` tunes the thresholds that it decides by, and ``--threshold best`` takes these."""

    def decided(self, folder: Path, note: Note) -> _Task:
        """The same task with the thresholds that a model's folder has (``thresholds.json``).

        Raises:
          UserError: it has none, or those of another model.
        """
        ...


class ScoringRows(Protocol):
    """What a task has besides if its scores compare what rows say, texts for instance. Such rows are held in memory: a token cache,
    which has none, is refused as ``data.eval``."""

    def score_rows(self, sums: Arrays, outputs: Arrays, rows: Sequence[Sequence[object]]) -> Mapping[str, object]:
        """The final numbers instead of those of :meth:`Task.score`, which knows the loss alone.

        Args:
          rows: the values of the rows, as the task's columns say.
        """
        ...


class Writing(Protocol):
    """What a task has besides if its scores are of texts that the model writes."""

    def written(self, model: Model, params: Params, batch: Batch) -> Batch:
        """What is written of each row of a prepared batch, in a program: arrays [B, ...] with ``weights`` [B], beside those of
        :meth:`Task.outputs`."""
        ...


class Sample(NamedTuple):
    """A text that shows what a model writes."""

    prompt: str
    """What it was written after, or of."""
    text: str
    wanted: str | None = None
    """What a row says that it should be."""


Sampler = Callable[[Params, Arrays], Sequence[Sample]]
"""From parameters, and what :meth:`Task.outputs` and :meth:`Writing.written` gave of all held-out batches, to samples; called on every
process at once."""


class Sampling(Protocol):
    """What a task has besides if a run can show what its model writes (``log.samples``, ``log.prompts``)."""

    def sampler(
        self,
        config: LogConfig,
        model: Model,
        mesh: Mesh,
        tokenizer: TextProcessor,
        rows: Sequence[Sequence[object]],
    ) -> Sampler:
        """What writes a run's samples.

        Args:
          rows: the values of held-out rows that samples are wanted of, the first ``log.samples``.

        Raises:
          UserError: there can be no such samples.
        """
        ...


class Biased(Protocol):
    """What a task has besides if a fresh head's bias should begin somewhere else than at 0."""

    @property
    def head_bias(self) -> tuple[float, ...] | None:
        """A number for each class; None: 0."""
        ...


class Comparing(Protocol):
    """What a task has besides if its loss compares the examples of a batch with each other, so that no sum over parts of the batch is
    the sum over all of it. Its ``sums`` are ``compare(represent(...))``; micro-batches of a step are represented one after the other,
    compared together, and their gradients taken one after the other again (Gao et al. 2021)."""

    def represent(self, forward: Forward, batch: Batch, key: Array | None) -> Batch:
        """Float arrays [B, ...] of a prepared batch, small beside what the model computes of it: all that rows are compared by."""
        ...

    def compare(self, found: Batch, batch: Batch) -> Sums:
        """``loss`` and ``weight`` summed over a batch, from what :meth:`represent` gave of its rows."""
        ...


class Mixing(Protocol):
    """What a task has besides if rows of a training batch are mixed with each other, after :meth:`Task.prepare`."""

    def mixed(self, batch: Batch, key: Array) -> Batch:
        """A prepared training batch, whole, with its rows mixed."""
        ...


class Scheduled(Protocol):
    """What a task has besides if what it makes of training batches may change from step to step. Evaluations call
    :meth:`Task.prepare`, so that they are alike."""

    @property
    def schedule(self) -> str:
        """What changes when, on one line; empty: nothing does."""
        ...

    def prepare_at(self, batch: Batch, key: Array, step: ArrayLike) -> Batch:
        """:meth:`Task.prepare` of a training batch, of one shape whatever the number of steps before it."""
        ...


class Partial(Protocol):
    """What a task has besides if there are parameters of its head's model that its loss never reads."""

    @property
    def unread(self) -> tuple[str, ...]:
        """The paths, or the folders of paths, of parameters that stay as they are, if the model has them."""
        ...


class Accompanied(Protocol):
    """What a task has besides if a model folder needs more files to mean what was trained."""

    def files(self, width: int, max_length: int | None) -> Mapping[str, str]:
        """Texts of files, by path in the folder.

        Args:
          width: of the vectors that the model gives.
          max_length: tokens kept per text; None: it is not known.
        """
        ...


class Passage(NamedTuple):
    """A stretch of a document as a model sees it, some of whose places are scored."""

    tokens: np.ndarray
    """[S] int32, what the model sees."""
    targets: np.ndarray
    """[S] int32, what is to be predicted at each place."""
    scored: np.ndarray
    """[S] bool, which places are scored."""


class Exhaustive(Protocol):
    """What a task has besides if it can score every token of whole documents once (``jaxft eval`` on corpora)."""

    def passages(self, tokens: np.ndarray, length: int, stride: int) -> Iterator[Passage]:
        """A document as stretches, each of its tokens scored in one of them.

        Args:
          tokens: [N] of the document.
          length: tokens of a stretch, at most.
          stride: tokens that a stretch has in common with the one before.
        """
        ...

    def passage_scores(self, forward: Forward, batch: Batch) -> Batch:
        """Sums of each row, [B] float32: ``loss`` in nats, ``correct`` guesses. The batch has ``targets`` and ``scored`` [B, S] beside
        what rows of texts have."""
        ...


class Remarking(Protocol):
    """What a task has besides if there is something to be said of encoded rows before anything is learnt of them."""

    def remarks(self, split: Split) -> Iterator[str]:
        """A line for everything that is worth a word."""
        ...


class Labelled(Protocol):
    """What the module of a task has besides if rows are to be held out in equal shares of several labels each."""

    def row_labels(self, config: RunConfig) -> Callable[[Row], Iterable[object]]:
        """What tells the labels of a row; the rows need not be in memory."""
        ...


class TaskModule(Protocol[P]):
    """A module of ``jaxft.tasks``, or of another package. Its options are a class of ``jaxft/config/tasks``, or its ``Config``. One whose
    rows are no texts says ``PROCESSOR`` (``"image"``), and is given what makes their arrays as its tokenizer."""

    @property
    def Task(self) -> Any:
        """The class of its tasks; ``head`` is an attribute of the class."""
        ...

    @property
    def LONG_TEXTS(self) -> tuple[LongTexts, ...]:
        """The values of ``data.long_texts`` that it can do; the first is what ``auto`` means."""
        ...

    @property
    def PACKING(self) -> bool:
        """Whether several of its texts may share a row."""
        ...

    @property
    def ROW_OPTIONS(self) -> tuple[str, ...]:
        """Its own options that change how rows are encoded, which a token cache must have been made with. A module that does not say
        counts with all of them."""
        ...

    @property
    def PROBLEM(self) -> str | None:
        """The ``problem_type`` that config.json has for its heads, where several tasks train one kind of head. A module that does not say
        has none."""
        ...

    def columns(self, config: RunConfig) -> tuple[Column, ...]:
        """The columns of labelled rows, texts first."""
        ...

    def study(self, rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
        """What there is to learn of the training rows.

        Args:
          rows: to be read once, or not at all; they need not be in memory.
          stored: what the head that is to be trained further was made for.
          note: called with a line for everything worth a word.
        """
        ...

    def encode(
        self, rows: Iterable[Row], tokenizer: P, targets: Targets | None, config: RunConfig, /
    ) -> Iterator[Encoded]:
        """The examples of rows, in their order; of rows without labels where ``targets`` is None. Rows are read as examples are
        asked for: they need not be in memory."""
        ...

    def fields(self, config: RunConfig, pad_id: int) -> Fields:
        """The fields of its batches, of one text a row."""
        ...

    def make_task(self, options: Any, targets: Targets, facts: Facts, tokenizer: P, /) -> _Task:
        """The task of a run; ``options`` are of its own type."""
        ...
