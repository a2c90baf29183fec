"""Single-label classification of images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxft.config import RunConfig
from jaxft.config.tasks.image_classification import Config
from jaxft.data.batch import WEIGHTS, Example, Field, Fields
from jaxft.data.encode import Column, chunks_of, label_column
from jaxft.data.examples import Encoded
from jaxft.data.labels import class_ids, renamed_labels
from jaxft.data.processors.augment import Augmentation
from jaxft.data.processors.image import ImageProcessor, size_of
from jaxft.data.sources.media import file_of
from jaxft.data.sources.rows import Row
from jaxft.errors import UserError
from jaxft.models.contract import Facts
from jaxft.tasks import classification
from jaxft.tasks._classes import class_weights
from jaxft.tasks._mixing import Mixed, mixed_images
from jaxft.tasks.contract import Array, Arrays, Batch, Direction, Forward, LongTexts, Note, Sums, Targets

LONG_TEXTS: tuple[LongTexts, ...] = ("truncate",)
PACKING = False
ROW_OPTIONS: tuple[str, ...] = ()
PROBLEM: str | None = classification.PROBLEM
PROCESSOR = "image"

_TOP = 5
_IMAGE = ("batch", "height", "width", "channels")


@dataclass(frozen=True)
class Task(classification.Task):
    """What is learnt and how it is scored. Static and hashable: part of jit cache keys."""

    scale: float = 1 / 255
    """What pixels 0..255 are multiplied by."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from that, by channel."""
    std: tuple[float, ...] = (0.5,)
    """What that is divided by."""
    mixup: float = 0.0
    """Alpha of mixup; 0: off."""
    cutmix: float = 0.0
    """Alpha of CutMix; 0: off."""

    head = "image_classification"

    @property
    def metrics(self) -> dict[str, Direction]:
        """The metrics of labels, and ``top5_accuracy`` where there are more than five."""
        more: dict[str, Direction] = {"top5_accuracy": "max"} if len(self.labels) > _TOP else {}
        return {**super().metrics, **more}

    def prepare(self, batch: Batch, key: Array) -> Batch:
        """The batch with ``pixels`` normalised, [B, H, W, C] float32."""
        del key
        return self._normalised(batch)

    def _normalised(self, batch: Batch) -> Batch:
        mean, std = (jnp.asarray(one, jnp.float32) for one in (self.mean, self.std))
        return batch | {"pixels": (batch["pixels"].astype(jnp.float32) * jnp.float32(self.scale) - mean) / std}

    def mixed(self, batch: Batch, key: Array) -> Batch:
        """The batch with each image mixed with another: see :class:`~jaxft.tasks.contract.Mixing`."""
        if not self.mixup and not self.cutmix:
            return batch
        found: Mixed = mixed_images(batch["pixels"], batch["weights"], self.mixup, self.cutmix, key)
        return batch | {"pixels": found.pixels, "share": found.share, "other_labels": batch["labels"][::-1]}

    def losses(self, logits: Array, batch: Batch) -> Array:
        """[B] the loss of each image, of one that is mixed in the shares of both its labels."""
        own = super().losses(logits, batch)
        if "share" not in batch:
            return own
        other = super().losses(logits, {"labels": batch["other_labels"]})
        return batch["share"] * own + (1 - batch["share"]) * other

    def row_weights(self, batch: Batch) -> Array:
        """[B] what each image counts."""
        own = super().row_weights(batch)
        if "share" not in batch or self.class_weights is None:
            return own
        other = classification.of_labels(batch["weights"], batch["other_labels"], self.class_weights)
        return batch["share"] * own + (1 - batch["share"]) * other

    def sums(self, forward: Forward, batch: Batch, key: Array | None) -> Sums:
        """The sums of labels, and ``top5``: rows whose label is among the five most probable ones."""
        found = super().sums(forward, batch, key)
        if len(self.labels) > _TOP:
            logits = forward(batch, key).logits
            assert logits is not None
            of_label = jnp.take_along_axis(logits, batch["labels"][:, None], axis=-1)
            among = (logits > of_label).sum(-1) < _TOP
            found["top5"] = (among * batch["weights"]).sum()
        return found

    def score(self, sums: Arrays, outputs: Arrays | None = None) -> dict[str, Any]:
        """The scores of labels, and ``top5_accuracy``."""
        found = super().score(sums, outputs)
        if "top5" not in sums:
            return found
        top5 = float(sums["top5"]) / found["rows"] if found["rows"] else float("nan")
        return {name: value for key, kept in found.items() for name, value in _with_top5(key, kept, top5)}

    def predictions(self, forward: Forward, batch: Batch) -> Batch:
        """``probabilities`` [B, C] float32 of each image."""
        return super().predictions(forward, self._normalised(batch))

    def judged(
        self, outputs: Arrays, rows: Sequence[Sequence[object]], order: np.ndarray
    ) -> Iterator[dict[str, object]]:
        """For each image, the name of its file if it has one, and its true label beside what the model says."""
        names = [(value if isinstance(value, str) else f"row {i}", label) for i, (value, label) in enumerate(rows)]
        for said in super().judged(outputs, names, order):
            yield {"image" if name == "text" else name: value for name, value in said.items()}


def _with_top5(name: str, value: object, top5: float) -> Iterator[tuple[str, object]]:
    yield name, value
    if name == "accuracy":
        yield "top5_accuracy", top5


@dataclass(frozen=True)
class Rendering:
    """Files to pixels: see :class:`~jaxft.data.rendering.Rendering`."""

    processor: ImageProcessor
    augmentation: Augmentation

    @property
    def stored(self) -> Fields:
        """The bytes of a file and a label."""
        return stored_fields()

    @property
    def fields(self) -> Fields:
        """Pixels and a label."""
        return {"pixels": Field(_IMAGE, "uint8"), "labels": Field(("batch",)), "weights": WEIGHTS}

    @property
    def sizes(self) -> Mapping[str, int]:
        """Height, width and channels that the model reads."""
        how = self.processor
        return {"height": how.height, "width": how.width, "channels": how.channels}

    def rendered(self, example: Example, rng: np.random.Generator | None) -> Example:
        """The pixels of an image, in training changed at random."""
        image = self.processor.decoded(example["image"].tobytes(), "an image of the rows")
        how = self.processor
        pixels = how.pixels(image) if rng is None else self.augmentation.changed(image, how, rng)
        return {**{name: value for name, value in example.items() if name != "image"}, "pixels": pixels}


def stored_fields() -> Fields:
    """What rows of images store."""
    return {"image": Field(("batch", "bytes"), "uint8"), "labels": Field(("batch",)), "weights": WEIGHTS}


def rendering(config: RunConfig, processor: ImageProcessor) -> Rendering:
    """How a run's images become batches."""
    options = config.task
    assert isinstance(options, Config)
    names = {field.name for field in fields_of(Augmentation)} - {"operations", "magnitude"}
    settings: Any = {name: getattr(options, name) for name in names}
    made = Augmentation(**settings, operations=options.rand_operations, magnitude=options.rand_magnitude)
    return Rendering(processor, made)


def columns(config: RunConfig) -> tuple[Column, ...]:
    """An image and a label."""
    return Column(config.data.image, "image"), label_column(config.data)


def study(rows: Iterable[Row], config: RunConfig, stored: Targets | None, note: Note) -> Targets:
    """The labels of the training rows, and how often each occurs among them; says how large images are."""
    sizes: list[tuple[int, int]] = []

    def seen() -> Iterator[Row]:
        for row in rows:
            value = row.values[0]
            assert isinstance(value, bytes | str)
            size = size_of(file_of(value, row.where))
            if size is not None:  # what cannot be read is refused, or left out, when it is decoded
                sizes.append(size)
            yield row

    targets = classification.study(seen(), config, stored, note)
    if sizes:
        note(f"images: {_sizes_text(sizes)} (width x height)")
    return targets


def _sizes_text(sizes: Sequence[tuple[int, int]]) -> str:
    """The smallest, the middle one and the largest, by pixels, as text."""
    ordered = [f"{width}x{height}" for height, width in sorted(sizes, key=lambda size: (size[0] * size[1], size))]
    if ordered[0] == ordered[-1]:
        return f"all of {ordered[0]} pixels"
    return f"{ordered[0]} to {ordered[-1]} pixels, {ordered[len(ordered) // 2]} in the middle"


def encode(
    rows: Iterable[Row], processor: ImageProcessor, targets: Targets | None, config: RunConfig
) -> Iterator[Encoded]:
    """An example per row: ``image``, the bytes of its file, and, with targets, ``labels``: the id of its class.

    Raises:
      UserError: a label that is none of the classes, a file that is not there, or one that is no image.
    """
    renamed = {} if targets is None else renamed_labels(config.data.labels, targets.labels)

    def read(row: Row) -> np.ndarray:
        value = row.values[0]
        assert isinstance(value, bytes | str)
        data = file_of(value, row.where)
        processor.decoded(data, value if isinstance(value, str) else row.where)
        return np.frombuffer(data, np.uint8)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for first, chunk in chunks_of(rows):
            images = threads.map(read, chunk)
            ids: Sequence[np.ndarray] = ()
            if targets is not None:
                values, where = (row.values[-1] for row in chunk), (row.where for row in chunk)
                ids = list(class_ids(values, where, targets.labels, renamed))
            for i, image in enumerate(images):
                example = {"image": image} if targets is None else {"image": image, "labels": ids[i]}
                yield Encoded(example, first + i)


def fields(config: RunConfig, pad_id: int) -> Fields:
    """Fields of batches of images, and ``labels`` [B] int32."""
    del config, pad_id
    return {"pixels": Field(_IMAGE, "uint8"), "labels": Field(("batch",)), "weights": WEIGHTS}


def make_task(options: Config, targets: Targets, facts: Facts, processor: ImageProcessor) -> Task:
    """The task of a run.

    Raises:
      UserError: fewer than two labels, or class weights that do not name exactly the labels.
    """
    del facts
    labels = targets.labels
    if len(labels) < 2:
        raise UserError(f"image_classification needs at least two labels, the training rows have {list(labels)}")
    weights = class_weights(options.class_weights, targets)
    how = {"scale": processor.scale, "mean": processor.mean, "std": processor.std}
    return Task(
        labels,
        options.label_smoothing,
        weights,
        focal_gamma=options.focal_gamma,
        mixup=options.mixup,
        cutmix=options.cutmix,
        **how,
    )
