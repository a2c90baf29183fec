"""Vectors learnt from a teacher's: the loss of sentence-transformers, rows that are refused, and a run on what ``jaxft predict`` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_folder, refusal, run

from jaxft.config import load_config
from jaxft.config.tasks.embedding import Config
from jaxft.data.encode import read_rows
from jaxft.data.processors.tokenizer import Tokenizer
from jaxft.errors import UserError
from jaxft.models.contract import Output
from jaxft.tasks import Targets, embedding
from jaxft.tasks.embedding import Task

Capture = pytest.CaptureFixture[str]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("texts", [1, 2])
def test_a_teachers_vectors_are_learnt_as_by_sentence_transformers(texts: int, normalize: bool) -> None:
    torch = pytest.importorskip("torch")
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    options = Config(loss="distillation", teacher_width=8, pooling="mean", normalize=normalize)
    rng = np.random.default_rng(4)
    teacher, hidden = (rng.normal(size=shape).astype(np.float32) for shape in ((9, 8), (9, 2, 8)))
    there = np.broadcast_to(
        np.arange(2) < texts, (9, 2)
    )  # texts of one token each; the last two examples only fill up the batch
    whole: dict[str, Any] = {
        "tokens": np.zeros((9, 2), int), "mask": there * 1, "segments": there * [1, 2], "positions": np.zeros((9, 2), int),
        "starts": there * [0, 1], "texts": np.where(there, np.arange(18).reshape(9, 2), -1), "teacher": teacher,
        "weights": (np.arange(9) < 7).astype(np.float32),
    }  # fmt: skip
    batch = {name: jnp.asarray(value) for name, value in whole.items()}

    def mean(hidden: jax.Array) -> jax.Array:
        sums = Task(options).sums(lambda *_: Output(hidden), batch, None)
        return sums["loss"] / sums["weight"]

    loss, gradient = jax.jit(jax.value_and_grad(mean))(jnp.asarray(hidden))

    class Student(torch.nn.Module):
        """Gives the vectors that it is called with."""

        def forward(self, features: dict[str, Any]) -> dict[str, Any]:
            vectors = features["vectors"]
            return {"sentence_embedding": torch.nn.functional.normalize(vectors, dim=-1) if normalize else vectors}

    theirs = torch.tensor(hidden[:-2], requires_grad=True)
    expected = losses.MSELoss(Student())([{"vectors": theirs[:, i]} for i in range(texts)], torch.tensor(teacher[:-2]))
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=2e-6)
    np.testing.assert_allclose(gradient[:-2], theirs.grad.numpy(), rtol=0, atol=2e-6)
    assert not np.asarray(gradient[-2:]).any()
    made = Task(options).outputs(lambda *_: Output(jnp.asarray(hidden)), batch)
    outputs = {name: np.asarray(value)[:-2] for name, value in made.items()}
    found = Task(options).score({"loss": np.asarray(loss), "weight": np.ones(())}, outputs)
    near = torch.nn.functional.cosine_similarity(theirs[:, :texts], torch.tensor(teacher[:-2, None]), dim=-1)
    assert found["cosine"] == pytest.approx(near.mean().item(), abs=1e-6)


TEACH = ["task.loss=distillation", "task.teacher_width=16", "data.label=vector"]


@pytest.mark.parametrize(
    ("vector", "settings", "said"),
    [
        ([0.5] * 15, [], ":3: column 'vector' holds a vector of 15 numbers; task.teacher_width=16 says another width"),
        ([0.5] * 15 + ["x"], [], ":3: column 'vector' holds [0.5, 0.5,"),
        ([0.5] * 15 + [True], [], "expected a list of numbers, a teacher's vector (data.label)"),
        ([0.5] * 15 + [1e39], [], ":3: column 'vector' holds a vector with a number that is not finite in float32"),
        ([0.5] * 15 + [None], [], ":3: item 15 of column 'vector' is null"),
        ("0.5", [], ":3: column 'vector' holds '0.5'; expected a list of numbers"),
        (None, [], ":3: column 'vector' is empty; every row needs a list of numbers"),
        ([0.5] * 16, ["task.teacher_width=null"], "task.teacher_width=None: task.loss=distillation needs to know how many"),
        ([0.5] * 16, ["task.matryoshka=[8]"], "task.matryoshka=[8]: task.loss=distillation learns a teacher's whole vector"),
        ([0.5] * 16, ["task.negatives=[a]"], "task.loss=distillation is of texts and a teacher's vector: leave task.negatives out"),
        ([0.5] * 16, ["task.loss=ranking"], "task.teacher_width=16 is of task.loss=distillation, not of ranking; leave it out"),
    ],
)  # fmt: skip
def test_vectors_that_cannot_be_learnt_are_one_line(
    vector: Any, settings: list[str], said: str, tmp_path: Path
) -> None:
    vectors = [[0.5] * 16, [1] * 16, vector, [0.5] * 16]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": "red cat", "vector": one}) + "\n" for one in vectors))
    tokenizer = Tokenizer(make_folder(tmp_path / "model", None), 12)

    def encode() -> None:
        config = load_config(None, ["task.name=embedding", *TEACH, f"data.train={data}", *settings])
        rows = read_rows(str(data), config.data, embedding.columns(config))
        list(embedding.encode(rows, tokenizer, Targets(), config))

    with pytest.raises(UserError) as error:
        encode()
    assert said in str(error.value)


WORDS = ["red", "blue", "a cat", "the old dog", "tree house", "fish sings", "slow bird", "road"]


def test_a_student_learns_its_teachers_vectors(tmp_path: Path, capsys: Capture) -> None:
    teacher, student = (
        make_folder(tmp_path / name, None, seed=seed) for seed, name in enumerate(("teacher", "student"))
    )
    texts, data = tmp_path / "texts.csv", tmp_path / "taught.jsonl"
    texts.write_text("text,other\n" + "".join(f"{text},{text} and\n" for text in WORDS))
    code, _, err = run(capsys, "predict", teacher, texts, "--out", data)
    assert code == 0, err
    settings = [
        f"model.init={student}", "task.name=embedding", "data.text_pair=other", "data.label=embedding", *TEACH[:2], "data.max_length=12",
        f"data.train={data}", f"data.eval={data}", "train.batch_size=16", "eval.batch_size=16", "data.packing=best_fit",
        "train.steps=16", "eval.every=8", "optim.learning_rate=5e-2", "optim.warmup_steps=0", "train.compilation_cache=null",
        "log.progress=off", f"train.out={tmp_path / 'run'}",
    ]  # fmt: skip
    line = refusal(capsys, "train", *settings, "task.teacher_width=8")
    assert ":1: column 'embedding' holds a vector of 16 numbers; task.teacher_width=8 says another width" in line
    code, _, err = run(capsys, "train", *settings)
    assert code == 0, err
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    first, last = (line for line in log if line["kind"] == "eval")
    assert last["loss"] < 0.7 * first["loss"], (first, last)
    assert last["cosine"] > first["cosine"]
