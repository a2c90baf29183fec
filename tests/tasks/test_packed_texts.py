"""Labelled texts that share rows: the loss, gradients, scores and answers of texts in rows of their own."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from kinds import KINDS, tiny_config
from tiny import refusal, run
from tiny_run import overrides

from jaxft import models, tasks
from jaxft.config import MeshConfig, RunConfig
from jaxft.config.tasks import task_options
from jaxft.config.tasks.embedding import Config as EmbeddingConfig
from jaxft.data.batch import HostBatch, Shape, collate
from jaxft.data.examples import Encoded, Examples, Split, make_split
from jaxft.data.packing import CLASSES, pack
from jaxft.layers import Compute
from jaxft.models.contract import Facts, with_classes
from jaxft.models.initial import init_params, shapes_and_axes
from jaxft.parallel.sharding import DEFAULT_RULES, batch_sharding, make_mesh, shardings_of
from jaxft.tasks import (
    classification,
    collected,
    embedding,
    multiple_choice,
    preference,
    regression,
    reranking,
    seq2seq,
)
from jaxft.training.gradients import of_batch
from jaxft.training.packing import examples_in, rows_of_batch
from jaxft.training.step import make_eval_step

TEXTS, ROOM = 40, 24
LABELS = {
    "classification": ("a", "b", "c"),
    "token_classification": ("O", "B-a", "I-a"),
    "multi_label": ("a", "b", "c"),
    "regression": ("score",),
    "reranking": ("score",),
    "embedding": (),
    "multiple_choice": (),
    "preference": (),
    "seq2seq": (),
}
LEARNT: dict[str, Any] = {
    "regression": regression.Task,
    "reranking": reranking.Task,
    "multiple_choice": multiple_choice.Task,
    "preference": preference.Task,
    "seq2seq": lambda: seq2seq.Task(start=3, smoothing=0.1),
    "embedding": lambda: embedding.Task(EmbeddingConfig(pooling="mean", directions="both")),
}
HOW: dict[str, dict[str, Any]] = {
    "one device": {},
    "2x2x2": {"mesh": MeshConfig(2, 2, 2)},
    "2x2x2 in two parts": {"mesh": MeshConfig(2, 2, 2), "parts": 2},
    "context2": {"mesh": MeshConfig(2, 2, 1, context=2)},
}
QUICK = {
    ("bert", "classification", "one device"),
    ("bert", "token_classification", "2x2x2 in two parts"),
    ("bert", "embedding", "2x2x2 in two parts"),
    ("bert", "multiple_choice", "one device"),
    ("t5", "seq2seq", "2x2x2 in two parts"),
}


def facts_of(family: str, head: str | None) -> Facts:
    """What is known of a family's tiny model with a head."""
    module = models.family(family)
    return module.Model(module.TINY, head).facts


CASES = [
    pytest.param(family, task, how, marks=[] if (family, task, how) in QUICK else [pytest.mark.slow])
    for family in (*models.families(), *KINDS)
    for task in LABELS
    if tasks.task(task).Task.head in models.family(family).HEADS
    and (task == "seq2seq" or "starts" in facts_of(family, tasks.task(task).Task.head).inputs)
    for how in HOW
    # No backend splits queries of other tokens than the keys over rows yet.
    if models.family(family).facts(models.family(family).TINY).start is None or how != "context2"
]


def texts_of(task: str) -> Split:
    """Texts of 1 to 12 tokens with random labels."""
    rng = np.random.default_rng(0)

    def example(number: int) -> dict[str, np.ndarray]:
        length = int(rng.integers(1, 13))
        found = {"tokens": rng.integers(5, 96, length).astype(np.int32), "types": np.zeros(length, np.int32)}
        if task == "seq2seq":  # some targets are longer than their sources
            target = rng.integers(5, 96, int(rng.integers(1, 9))).astype(np.int32)
            return found | {"target": target, "row": np.array(number, np.int32)}
        if task == "classification":
            return found | {"labels": np.array(rng.integers(3), np.int32)}
        if task == "multi_label":
            return found | {"labels": rng.integers(0, 2, 3).astype(np.int32)}
        if task == "reranking":
            return found | {"labels": np.array(rng.random(), np.float32), "query": np.array(number % 7, np.int32)}
        if task in ("embedding", "multiple_choice", "preference"):
            length, found = max(length, 2), {name: np.resize(value, max(length, 2)) for name, value in found.items()}
            first = (length + 1) // 2  # of the text; the partner may be of no token
            second = np.arange(length) >= first
            made = {
                "segments": (1 + second).astype(np.int32),
                "positions": (np.arange(length) - first * second).astype(np.int32),
                "starts": np.array([0, min(first, length - 1)], np.int32),
            }
            if task == "multiple_choice":
                return found | made | {"counts": np.array(2, np.int32), "labels": np.array(rng.integers(2), np.int32)}
            if task == "preference":
                own = {"replies": (made["positions"] > 0).astype(np.int32)}  # some have none
                return found | made | own | {"reference": rng.normal(-9, 1, 2).astype(np.float32)}
            return found | made | {"texts": np.array([2 * number, 2 * number + 1], np.int32)}
        if task == "regression":
            return found | {"labels": np.array(rng.normal(), np.float32)}
        words = {"word": np.arange(length, dtype=np.int32), "counts": np.ones(length, np.int32)}
        return (
            found | words | {"labels": rng.integers(-1, 3, length).astype(np.int32), "row": np.array(number, np.int32)}
        )

    fields = tasks.task(task).fields(RunConfig(task=task_options(task)(name=task)), 0)
    return make_split("train", (Encoded(example(i), i) for i in range(TEXTS)), fields)


def batch_of(split: Examples, rows: int) -> HostBatch:
    sizes = {axis for field in split.fields.values() for axis in field.axes[1:] if isinstance(axis, str)}
    long = {axis: int(split.sizes(axis).max()) for axis in sorted(sizes)}
    shape = Shape(rows, tuple((axis, size if axis == CLASSES else max(size, ROOM)) for axis, size in long.items()))
    return collate([split[i] for i in range(len(split))], split.fields, shape)


@pytest.mark.parametrize(("family", "task", "how"), CASES)
def test_texts_that_share_a_row_are_learnt_and_scored_as_apart(family: str, task: str, how: str) -> None:
    module = models.family(family)
    fields = dataclasses.fields(module.Config)
    off = {field.name: 0.0 for field in fields if "dropout" in field.name and field.default is not None}
    config, head = dataclasses.replace(tiny_config(family), num_hidden_layers=2, **off), tasks.task(task).Task.head
    config = with_classes(config, 3) if module.HEADS[head].classes else config
    model: Any = module.Model(config, head, Compute(layers="scanned"))
    rng = np.random.default_rng(1)  # away from fresh parameters, whose answers are all alike
    params = jax.tree.map(lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), init_params(model, 0))
    learnt = LEARNT[task]() if task in LEARNT else tasks.task(task).Task(LABELS[task])
    if task == "classification":
        learnt = dataclasses.replace(learnt, class_weights=(0.5, 2.0, 1.0), label_smoothing=0.1)
    if hasattr(learnt, "focal_gamma"):
        learnt = dataclasses.replace(learnt, focal_gamma=1.5)
    apart = texts_of(task)
    packed = pack(apart, ROOM, 16 if task == "seq2seq" else None)
    assert len(packed) <= 16 < len(apart)
    alone = batch_of(apart, TEXTS)
    expected = answered(model, learnt, params, alone, jax.jit(of_batch(model, learnt)))

    mesh = make_mesh(HOW[how].get("mesh", MeshConfig(1, 1, 1)), jax.devices()[: 8 if "mesh" in HOW[how] else 1])
    places = shardings_of(mesh, DEFAULT_RULES, *shapes_and_axes(model))
    with jax.set_mesh(mesh):
        together = {
            name: jax.device_put(value, batch_sharding(mesh, DEFAULT_RULES, packed.fields[name].axes))
            for name, value in batch_of(packed, 16).items()
        }
        gradient = of_batch(model, learnt, accumulation=HOW[how].get("parts", 1), param_shardings=places)
        found = answered(model, learnt, jax.device_put(params, places), together, jax.jit(gradient))
    for a, b in zip(expected[0], found[0], strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * max(1.0, float(np.abs(a).max())))
    assert found[1].keys() == expected[1].keys()
    for name, value in expected[1].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-5, atol=1e-5, err_msg=name)
    assert found[2] == nearly(expected[2])


def answered(model: Any, task: Any, params: Any, batch: Any, gradient: Any) -> tuple[list[Any], Any, Any]:
    """Gradients; sums; scores of a batch."""
    ready = jax.jit(task.prepare)(batch, jax.random.key(0))
    grads, _ = gradient(params, ready, jax.random.key(0), task.weight(ready))
    sums, outputs = collected([jax.jit(make_eval_step(model, task))(params, batch)])
    assert not outputs or len(outputs["weights"]) == (outputs["weights"] > 0).sum()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(grads)], sums, task.score(sums, outputs)


def nearly(score: Any) -> Any:
    """Counts, and numbers as near as float32 sums in another order come."""
    return jax.tree.map(
        lambda x: pytest.approx(x, rel=1e-5, abs=1e-4, nan_ok=True) if isinstance(x, float) else x, score
    )


def test_a_row_that_is_not_full_has_texts_of_weight_zero() -> None:
    packed = pack(texts_of("classification"), ROOM)
    batch = batch_of(packed, len(packed) + 1)
    assert batch["labels"].shape == batch["starts"].shape == batch["weights"].shape
    assert batch["weights"].sum() == TEXTS
    assert not batch["weights"][-1].any()
    for row, count in enumerate(packed.sizes("texts")):
        starts = batch["starts"][row, :count]
        assert (batch["positions"][row, starts] == 0).all()
        assert batch["segments"][row, starts].tolist() == [*range(1, count + 1)]
    labels: dict[tuple[int, ...], set[int]] = {}
    for row in map(packed.source.__getitem__, range(TEXTS)):
        labels.setdefault(tuple(row["tokens"].tolist()), set()).add(int(row["labels"]))
    for row, segments in enumerate(batch["segments"]):
        for text in range(1, segments.max() + 1):
            tokens = tuple(batch["tokens"][row][segments == text].tolist())
            assert int(batch["labels"][row, text - 1]) in labels[tokens]


def test_batches_are_counted_in_texts() -> None:
    apart = texts_of("classification")
    packed = pack(apart, ROOM)
    each = TEXTS / len(packed)
    assert rows_of_batch(apart, 8) == 8
    assert rows_of_batch(packed, 8) == round(8 / each)
    assert rows_of_batch(packed, 1) == 1
    assert examples_in(packed, np.arange(len(packed))) == TEXTS
    assert examples_in(apart, np.array([3, 5])) == 2
    only_tokens = {name: field for name, field in apart.fields.items() if name != "labels"}
    of_language = pack(Split("train", only_tokens, {"tokens": apart.columns["tokens"]}, apart.offsets), ROOM)
    assert rows_of_batch(of_language, 8) == 8


def test_a_run_packs_its_rows_if_that_costs_less_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = (
        "data.packing=auto",
        "data.max_length=32",
        "train.batch_size=32",
        "eval.batch_size=32",
        "checkpoint.every=4",
    )
    other = ("data.max_length", "data.buckets", "train.batch_size", "eval.batch_size")
    given = [one for one in overrides(tmp_path) if not one.startswith(other)]
    given = [*given, *sizes, "train.export=false", "optim.schedule=constant", f"train.out={tmp_path / 'out'}"]
    code, out, err = run(capsys, "train", *given, "train.steps=4", "eval.every=4")
    assert code == 0, err
    assert "data.packing=auto: best_fit; " in out
    assert "train: packed 98 texts into " in out
    assert "batches: train 32 texts in 8 rows, eval 32 texts in 8 rows, on average" in out
    assert "(rows x tokens x texts): train 8x32x" in out
    assert run(capsys, "train", *given, "train.steps=8", "eval.every=4", "data.packing=best_fit")[0] == 0
    log = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "accuracy" in line] == [4, 8]


def test_rows_of_a_batch_that_cannot_be_split_are_refused_with_numbers_that_can(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = overrides(tmp_path, "data.packing=best_fit", "train.accumulation=4", "eval.batch_size=40")
    given = [one for one in given if not one.startswith("data.buckets")]
    said = refusal(capsys, "train", *given, f"train.out={tmp_path / 'out'}")
    assert re.search(
        r"train\.batch_size=8 is \d packed rows, which cannot be split 32 ways .*; choose \d+ \(32 rows\)$", said
    )
    assert "which are not read here" in refusal(capsys, "plan", "--topology", "cpu:8", *given)


def test_rows_that_auto_does_not_pack_must_divide_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [one for one in overrides(tmp_path) if not one.startswith("train.batch_size")]
    given += ["data.packing=auto", "train.batch_size=12", f"train.out={tmp_path / 'out'}"]
    # Rows of 12 tokens in one bucket of 12: packing is worth it, so the number of rows is what is refused.
    assert "packed rows, which cannot be split 8 ways" in refusal(capsys, "train", *given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classification, "PACKING", False)
        assert "train.batch_size / train.accumulation = 12 cannot be split 8 ways" in refusal(capsys, "train", *given)
