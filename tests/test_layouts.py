"""One course on every layout: each family and task, after 5 steps with dropout, is where one device would be."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from kinds import KINDS, reads, tiny_config

from jaxft import models, tasks
from jaxft.config import MeshConfig, OptimConfig, RunConfig
from jaxft.config.tasks import task_options
from jaxft.config.tasks.embedding import Config as EmbeddingConfig
from jaxft.data.packing import packed_fields
from jaxft.layers import Compute
from jaxft.models.contract import with_classes
from jaxft.models.families import whisper
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.parallel.sharding import DEFAULT_RULES, batch_sharding, jitted, make_mesh, replicated, shardings_of
from jaxft.training.gradients import of_batch
from jaxft.training.optim import make_optimizer, make_schedule
from jaxft.training.state import init_state, state_shardings
from jaxft.training.step import make_train_step
from jaxft.trees import map_paths, paths_of

ROWS, LENGTH = 16, 12
# Made as a run would, with what a tokenizer and labelled rows would say.
MADE = {
    "classification": lambda module: module.Task(("a", "b", "c")),
    "image_classification": lambda module: module.Task(("a", "b", "c"), 0.1, mixup=0.5, cutmix=0.5),
    "masked_lm": lambda module: module.Task(mask_id=4, special_ids=(0, 2, 3, 4), vocab_size=96),
    "causal_lm": lambda module: module.Task(),
    "chat": lambda module: module.Task(),
    "question_answering": lambda module: module.Task(no_answer=True, n_best=3, max_answer_length=4),
    "token_classification": lambda module: module.Task(("O", "B-a", "I-a")),
    "multi_label": lambda module: module.Task(("a", "b", "c"), (1.0, 2.0, 0.5)),
    "multiple_choice": lambda module: module.Task(),
    "preference": lambda module: module.Task(),
    "embedding": lambda module: module.Task(EmbeddingConfig(pooling="mean", normalize=True, at=2)),
    "regression": lambda module: module.Task(),
    "replaced_token_detection": lambda module: module.Task(module.Hidden(4, (0, 2, 3, 4), 96, 0.3)),
    "reranking": lambda module: module.Task(at=2),
    "sentence_pairs": lambda module: module.Task(mask_id=4, special_ids=(0, 2, 3, 4), vocab_size=96),
    "span_corruption": lambda module: module.Task(0.3, 2.0, (90, 91, 92, 93), (0, 1), 0, 1),
    "denoising": lambda module: module.Task(0.3, 2.0, 4, (0, 1), 2),
    "seq2seq": lambda module: module.Task(smoothing=0.1),
    "speech_to_text": lambda module: module.Task(start=1, smoothing=0.1),
}
CASES = [
    (family, name)
    for family in (*models.families(), *KINDS)
    for name in tasks.tasks()
    if reads(family) == tasks.modality_of(tasks.task(name))
    and tasks.task(name).Task.head in models.family(family).HEADS
]
# (mesh, micro-batches, how layers are computed). Two ways of tensor parallelism are the most that TINY's key heads allow;
# "tensor8" is of a variant with eight.
LAYOUTS: dict[str, tuple[MeshConfig, int, dict[str, Any]]] = {
    "context4": (MeshConfig(2, 1, 1, context=4), 1, {}),
    "fsdp2_context2_tensor2": (MeshConfig(1, 2, 2, context=2), 1, {"layers": "unrolled"}),
    "slices2": (MeshConfig(1, 2, 2, slices=2), 1, {}),
    "explicit": (MeshConfig(2, 2, 2, axes="explicit"), 1, {}),
    "data8": (MeshConfig(8, 1, 1), 1, {}),
    "fsdp8": (MeshConfig(1, 8, 1), 1, {}),
    "fsdp4_tensor2": (MeshConfig(1, 4, 2), 1, {}),
    "tensor8": (MeshConfig(1, 1, 8), 1, {}),
    "2x2x2": (MeshConfig(2, 2, 2), 1, {}),
    "xla_threefry": (MeshConfig(2, 2, 2), 1, {"attention": "xla", "dropout_bits": "threefry"}),
    "context2_all_to_all": (MeshConfig(2, 2, 1, context=2), 1, {"attention": "all_to_all"}),
    "blockwise_threefry": (MeshConfig(1, 4, 2), 1, {"attention": "blockwise", "dropout_bits": "threefry"}),
    "unrolled_remat": (MeshConfig(2, 2, 2), 1, {"layers": "unrolled", "remat": "full"}),
}


ONCE = {
    ("modernbert", "masked_lm"),
    ("mpnet", "classification"),
    ("bert", "multiple_choice"),
    ("bert", "sentence_pairs"),
}
"""What is tried on one layout in each run of the tests. On a mesh are, too: pairs of T5 and of embeddings in
tests/tasks/test_packed_texts.py, images in tests/models/test_vision_parity.py."""


TURNS = ("classification", "masked_lm", "causal_lm")


def _is_quick(family: str, task: str, layout: str) -> bool:
    """Whether a course is tried in each run of the tests. RoBERTa and DistilBERT are BERT's encoder; labels of words and answers differ in
    their loss alone, other families in a part: one layout of some shows that they are split as well. BERT and Llama, and
    their tasks, take turns on the layouts."""
    if task in ("seq2seq", "span_corruption", "denoising", "image_classification", "speech_to_text"):
        return (family, task) in ONCE and layout == "2x2x2"
    if family not in ("bert", "llama") or task not in TURNS:
        return layout == "fsdp2_context2_tensor2" and (family, task) in ONCE
    place = [*LAYOUTS].index(layout)
    tasks = TURNS[:2] if family == "bert" else (TURNS[0], TURNS[2])
    return family == ("bert", "llama")[place % 2] and task == tasks[place // 2 % 2]


ALONE = ("bert", "electra", "llama", "vit")
"""Families whose layers are all alike, and are tried two at a time with the tasks of ``TURNS``."""


BIASED = ("deberta_v2", "mpnet", "t5")
"""Families whose attention adds a bias, which most backends refuse: ``auto`` takes one that does not."""


def _marks(quick: bool) -> list[pytest.MarkDecorator]:
    return [] if quick else [pytest.mark.slow]


COURSES = [
    pytest.param(family, task, layout, marks=_marks(_is_quick(family, task, layout)))
    for family, task in CASES
    for layout in LAYOUTS
    # A generator has half of the discriminator's heads, of which there are eight there.
    if (task, layout) != ("replaced_token_detection", "tensor8")
    # The decoder's queries are of other tokens than the keys: no backend splits both over rows yet.
    if models.family(family).facts(tiny_config(family)).start is None or LAYOUTS[layout][0].context == 1
]
IN_PARTS = [
    pytest.param(family, task, marks=_marks((family, task) in (("bert", "masked_lm"), ("llama", "causal_lm"))))
    for family, task in CASES
    if family not in KINDS
]


def image_batches(family: str) -> list[dict[str, np.ndarray]]:
    """Pictures of noise; of the last batch three rows only fill it up."""
    rng, (_, *size) = np.random.default_rng(0), models.family(family).facts(tiny_config(family)).inputs["pixels"].axes
    weights = [np.ones(ROWS, np.float32) for _ in range(5)]
    weights[-1][-3:] = 0
    return [
        {
            "pixels": rng.integers(0, 256, (ROWS, *map(int, size)), np.uint8),
            "labels": rng.integers(0, 3, ROWS).astype(np.int32),
            "weights": one,
        }
        for one in weights
    ]


def batches(task: str) -> list[dict[str, np.ndarray]]:
    if task == "image_classification":
        return image_batches("vit")
    rng, made = np.random.default_rng(0), []
    for step in range(5):
        lengths = rng.integers(3, LENGTH + 1, ROWS)
        mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
        weights = np.ones(ROWS, np.float32)
        weights[ROWS - 3 * (step == 4) :] = 0
        batch: dict[str, np.ndarray] = {
            "tokens": rng.integers(5, 96, mask.shape).astype(np.int32) * mask,
            "mask": mask,
            "types": np.zeros_like(mask),
            "labels": rng.integers(0, 3, ROWS).astype(np.int32),
            "weights": weights,
        }
        if task == "multi_label":
            batch["labels"] = rng.integers(0, 2, (ROWS, 3)).astype(np.int32)
        if task == "reranking":
            batch |= {"labels": rng.random(ROWS).astype(np.float32), "query": rng.integers(0, 3, ROWS).astype(np.int32)}
        if task == "embedding":  # a text of one or more tokens, then its partner
            second = (np.arange(LENGTH) >= lengths[:, None] // 2).astype(np.int32)
            starts = np.stack([np.zeros_like(lengths), lengths // 2], 1).astype(np.int32)
            batch |= {"segments": (1 + second) * mask, "starts": starts, "texts": np.arange(2 * ROWS).reshape(ROWS, 2)}
            batch["positions"] = (np.arange(LENGTH) - second * (lengths[:, None] // 2)).astype(np.int32) * mask
            batch["texts"] = (batch["texts"] % 25).astype(np.int32)  # some are there twice
            del batch["labels"]
        if task == "multiple_choice":  # two answers each, one above the other half of the tokens
            second = (np.arange(LENGTH) >= lengths[:, None] // 2).astype(np.int32)
            starts = np.stack([np.zeros_like(lengths), lengths // 2, *[np.zeros_like(lengths)] * 2], 1).astype(np.int32)
            batch |= {"segments": (1 + second) * mask, "starts": starts, "counts": np.full(ROWS, 2, np.int32)}
            batch["positions"] = (np.arange(LENGTH) - second * (lengths[:, None] // 2)).astype(np.int32) * mask
            batch["labels"] = batch["labels"] % 2
        if task == "speech_to_text":
            frames, bins = (axis for axis in whisper.facts(whisper.TINY).inputs["frames"].axes if isinstance(axis, int))
            batch["frames"] = rng.normal(size=(ROWS, frames, bins)).astype(np.float32)
        if task in ("seq2seq", "speech_to_text"):
            there = (np.arange(LENGTH // 2) < np.maximum(lengths[:, None] // 2, 1)).astype(np.int32)
            batch |= {"target": rng.integers(5, 96, there.shape).astype(np.int32) * there, "target_mask": there}
            batch["row"] = np.arange(ROWS, dtype=np.int32)
        if task == "preference":  # the prompt is a token of each half
            half = lengths[:, None] // 2
            second = (np.arange(LENGTH) >= half).astype(np.int32)
            starts = np.stack([np.zeros_like(lengths), lengths // 2], 1).astype(np.int32)
            batch |= {"segments": (1 + second) * mask, "starts": starts}
            batch["positions"] = (np.arange(LENGTH) - second * half).astype(np.int32) * mask
            batch["replies"] = (batch["positions"] > 0).astype(np.int32) * mask
            batch["reference"] = rng.normal(-9, 1, (ROWS, 2)).astype(np.float32)
            del batch["labels"]
        if task == "chat":
            batch["replies"] = (rng.random(mask.shape) < 0.5).astype(np.int32) * mask
        if task == "regression":
            batch["labels"] = rng.normal(size=ROWS).astype(np.float32)
        if task == "token_classification":
            labels = np.where(mask, rng.integers(0, 3, mask.shape), -1).astype(np.int32)
            places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), mask.shape)
            batch |= {"labels": labels, "word": places, "counts": mask, "row": np.arange(ROWS, dtype=np.int32)}
        if task == "question_answering":  # the question is a token; every third row has no answer
            places = np.where((np.arange(LENGTH) > 0) & (mask > 0), np.arange(LENGTH), -1).astype(np.int32)
            ends = np.sort(rng.integers(1, lengths[:, None], (ROWS, 2)), axis=1) * (np.arange(ROWS) % 3 > 0)[:, None]
            ones, row = np.ones(ROWS, np.int32), np.arange(ROWS, dtype=np.int32)
            batch |= {"begin": places, "finish": np.where(places < 0, -1, places + 1).astype(np.int32)}
            batch |= {"span": ends.astype(np.int32), "learnt": ones, "answered": ones, "row": row}
        if task in ("causal_lm", "chat"):  # packed
            second = np.arange(LENGTH) >= lengths[:, None] // 2
            batch["segments"] = np.where(mask, 1 + second, 0).astype(np.int32)
            batch["positions"] = (np.arange(LENGTH) - second * (lengths[:, None] // 2)).astype(np.int32) * mask
        made.append(batch)
    return made


@functools.cache
def centres_of_scales(family: str, config: Any, head: str) -> dict[str, float]:
    """Scales of norms begin at 1, or at 0 where they are what is added to that: twice as much in each layer makes rounding grow."""
    fresh = paths_of(init_params(models.family(family).Model(config, head, Compute(layers="scanned")), 0))
    return {path: float(np.mean(leaf)) for path, leaf in fresh.items() if path.endswith("scale")}


def random_params(centres: dict[str, float], shapes: Any) -> Any:
    def make(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        centre = centres[path] if path.endswith("scale") else 0.0
        return np.asarray(np.random.default_rng(len(path)).normal(size=leaf.shape) * 0.1 + centre, np.float32)

    return map_paths(make, shapes)


def trained(
    family: str, task: str, layout: tuple[MeshConfig, int, dict[str, Any]], devices: int, heads: int | None = None
) -> tuple[Any, Any]:
    """Parameters after 5 steps, and what each step logged."""
    mesh_config, accumulation, how = layout
    module = tasks.task(task)
    # What is tried for the sake of its task needs no second layer.
    config = dataclasses.replace(
        tiny_config(family), num_hidden_layers=2 if task in TURNS or family not in ALONE else 1
    )
    if heads is not None:
        names = [
            name
            for name in ("num_attention_heads", "num_key_value_heads", "num_decoder_heads")
            if getattr(config, name, None)
        ]
        config = dataclasses.replace(config, **dict.fromkeys(names, heads))
    if models.family(family).HEADS[module.Task.head].classes:
        config = with_classes(config, 3)
    computed: dict[str, Any] = {"layers": "scanned", **how}
    if family in BIASED:
        computed.pop("attention", None)
    model = models.family(family).Model(config, module.Task.head, Compute(**computed))
    centres = centres_of_scales(family, config, module.Task.head)
    shapes, axes = shapes_and_axes(model)
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    # A large eps: Adam would scale the rounding errors of gradients near 0 up to whole steps.
    settings = OptimConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant", eps=1e-3)
    schedule = make_schedule(settings, 5)
    optimizer = make_optimizer(settings, schedule, shapes, axes)
    places = shardings_of(mesh, DEFAULT_RULES, shapes, axes)

    def start(params: Any) -> Any:
        return init_state(params, optimizer, False)

    with jax.set_mesh(mesh):
        of_state = state_shardings(jax.eval_shape(start, shapes), optimizer, places, mesh)
        state = jitted(start, mesh, of_state)(jax.device_put(random_params(centres, shapes), places))
        learnt = MADE[task](module)
        split = places if mesh.size > 1 else None
        gradient_of = of_batch(model, learnt, accumulation=accumulation, param_shardings=split)
        made = make_train_step(learnt, gradient_of, optimizer, schedule)
        step = jitted(made, mesh, (of_state, replicated(mesh)), donate_argnums=0)
        seed, log = jax.device_put(np.uint32(3), replicated(mesh)), []
        fields = module.fields(RunConfig(task=task_options(task)(name=task)), 0)
        fields = packed_fields(fields) if task in ("causal_lm", "chat") else fields
        places_of = {name: batch_sharding(mesh, DEFAULT_RULES, field.axes) for name, field in fields.items()}
        for batch in image_batches(family) if task == "image_classification" else batches(task):
            placed = {name: jax.device_put(batch[name], to) for name, to in places_of.items() if name in batch}
            state, metrics = step(state, placed, seed)
            log.append(jax.device_get(metrics))
    return jax.device_get(state.params), log


@functools.cache
def single(family: str, task: str, heads: int | None = None, bits: str = "hash") -> tuple[Any, Any]:
    return trained(family, task, (MeshConfig(1, 1, 1), 1, {"dropout_bits": bits}), 1, heads)


def compare(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    for a, b in zip(one[1], other[1], strict=True):
        for name in ("loss", "weight", "grad_norm", "learning_rate"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=name)
    found = paths_of(other[0])
    for path, leaf in paths_of(one[0]).items():
        np.testing.assert_allclose(leaf, found[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.parametrize(("family", "task", "layout"), COURSES)
def test_same_course_on_every_layout(family: str, task: str, layout: str) -> None:
    heads = 8 if layout == "tensor8" else None
    bits = LAYOUTS[layout][2].get("dropout_bits", "hash")
    compare(single(family, task, heads, bits), trained(family, task, LAYOUTS[layout], 8, heads))


@pytest.mark.parametrize(("family", "task"), IN_PARTS)
def test_micro_batches_on_a_mesh_are_one_batch(family: str, task: str) -> None:
    # Dropout draws anew in each micro-batch; without it, four are one.
    fields = dataclasses.fields(models.family(family).Config)
    off = {f.name: 0.0 for f in fields if "drop" in f.name and f.default is not None}
    tiny = models.family(family).TINY
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.family(family), "TINY", dataclasses.replace(tiny, **off))
        one = trained(family, task, (MeshConfig(1, 1, 1), 1, {}), 1)
        compare(one, trained(family, task, (MeshConfig(2, 2, 1), 4, {}), 4))
