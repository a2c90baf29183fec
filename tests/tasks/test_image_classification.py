"""Images with one label each: what is learnt of mixed ones, how labels are scored, and a model that is trained, exported and asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import images
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import refusal, run

from jaxft.config import RunConfig
from jaxft.config.tasks.image_classification import Config
from jaxft.data.sources.rows import Row
from jaxft.models.contract import Output
from jaxft.tasks._mixing import mixed_images
from jaxft.tasks.image_classification import Task, study

NAMES = tuple("abcdefgh")


def batch_of(rows: int, seed: int = 0, empty: int = 0) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    weights = np.arange(rows) < rows - empty
    return {
        "pixels": jnp.asarray(rng.integers(0, 256, (rows, 9, 8, 3), np.uint8)),
        "labels": jnp.asarray(rng.integers(0, len(NAMES), rows), jnp.int32),
        "weights": jnp.asarray(weights, jnp.float32),
    }


def test_pixels_are_normalised_once() -> None:
    task = Task(NAMES, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2.0))
    batch = batch_of(3)
    wanted = (np.asarray(batch["pixels"]) / 255 - np.array([0.1, 0.2, 0.3])) / np.array([0.5, 0.25, 2.0])
    np.testing.assert_allclose(task.prepare(batch, jax.random.key(0))["pixels"], wanted, rtol=0, atol=2e-6)
    seen = []

    def forward(batch: Any, key: Any) -> Output:
        seen.append(batch["pixels"])
        return Output(jnp.zeros((3, 1, 1)), logits=jnp.zeros((3, len(NAMES))))

    task.predictions(forward, batch)
    np.testing.assert_allclose(seen[0], wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.2, 0.4)])
def test_images_are_mixed_in_the_share_that_the_loss_counts(mixup: float, cutmix: float) -> None:
    task, rows = Task(NAMES, mixup=mixup, cutmix=cutmix), 8
    ways = set()
    batch, mix = task.prepare(batch_of(rows), jax.random.key(0)), jax.jit(task.mixed)
    losses = jax.jit(task.losses)
    for number in range(20):
        mixed = mix(batch, jax.random.key(number))
        pixels, labels = np.asarray(batch["pixels"]), np.asarray(batch["labels"])
        own, other, share = pixels, pixels[::-1], np.asarray(mixed["share"])
        assert (share == share[0]).all()
        blended = share[0] * own + (1 - share[0]) * other
        if np.allclose(mixed["pixels"], blended, atol=1e-5):
            ways |= {"mixup"} if 0 < share[0] < 1 else set()  # of nothing, a rectangle is the same
        else:
            ways.add("cutmix")
            taken = (np.asarray(mixed["pixels"]) == other).all(-1) & (own != other).any(-1)
            assert (taken == taken[0]).mean() > 0.99
            np.testing.assert_allclose(1 - taken[0].mean(), share[0], atol=1e-6)
            rows_of, columns = np.flatnonzero(taken[0].any(1)), np.flatnonzero(taken[0].any(0))
            if taken[0].any():
                assert taken[0][rows_of[0] : rows_of[-1] + 1, columns[0] : columns[-1] + 1].all()
        logits = np.random.default_rng(number).normal(size=(rows, len(NAMES))).astype(np.float32)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        one_hot = np.eye(len(NAMES))
        soft = share[:, None] * one_hot[labels] + (1 - share[:, None]) * one_hot[labels[::-1]]
        np.testing.assert_allclose(losses(logits, mixed), -(soft * logp).sum(-1), rtol=1e-5)
    assert ways == {name for name, alpha in (("mixup", mixup), ("cutmix", cutmix)) if alpha}


def test_rows_that_only_fill_a_batch_are_mixed_with_nothing() -> None:
    batch = batch_of(8, empty=3)
    found = mixed_images(batch["pixels"].astype(jnp.float32), batch["weights"], 0.5, 0.5, jax.random.key(1))
    alone = [0, 1, 2, 5, 6, 7]  # the mirror images of the last three, and these
    np.testing.assert_array_equal(found.pixels[np.array(alone)], batch["pixels"][np.array(alone)])
    assert (np.asarray(found.share)[alone] == 1).all()
    assert (np.asarray(found.share)[[3, 4]] < 1).all()


def test_five_guesses_are_counted() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    task, batch = Task(NAMES), batch_of(40, empty=7)
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(40, len(NAMES))), jnp.float32)
    sums = task.sums(lambda batch, key: Output(jnp.zeros((40, 1, 1)), logits=logits), batch, None)
    scores = task.score({name: np.asarray(value) for name, value in sums.items()})
    wanted = sklearn.top_k_accuracy_score(batch["labels"][:33], logits[:33], k=5, labels=range(len(NAMES)))
    assert scores["top5_accuracy"] == pytest.approx(wanted)
    assert list(scores)[:3] == ["loss", "accuracy", "top5_accuracy"]
    assert "top5_accuracy" not in Task(NAMES[:5]).metrics


# ------------------------------------------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on class folders, with random changes."""
    from jaxft import __main__

    made = tmp_path_factory.mktemp("images")
    images.write_folders(made / "rows")
    how = ("task.crop=resized", "task.crop_scale=[0.5,1]", "task.flip=0.5", "task.mixup=0.2", "optim.ema=0.9")
    assert (
        __main__.main(
            ["train", *images.overrides(made / "rows", made / "run", *how, "train.steps=40", "eval.every=20")]
        )
        == 0
    )
    return made


def test_a_model_learns_colours_and_answers_as_the_reference_does(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = json.loads((trained / "run/metrics.json").read_text())
    assert scores["accuracy"] > 0.9
    export = trained / "run/export"
    code, out, _ = run(capsys, "predict", export, trained / "rows")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert len(answers) == 24
    assert sum(one["label"] == Path(one["image"]).parent.name for one in answers) > 20
    transformers, torch = (pytest.importorskip(name) for name in ("transformers", "torch"))
    from PIL import Image

    model = transformers.ViTForImageClassification.from_pretrained(export)
    processor = transformers.AutoImageProcessor.from_pretrained(export, backend="pil")
    for one in answers[::5]:
        with torch.no_grad():
            logits = model(**processor(Image.open(one["image"]), return_tensors="pt")).logits[0]
        said = [one["probabilities"][model.config.id2label[i]] for i in range(3)]
        np.testing.assert_allclose(said, logits.softmax(-1), rtol=0, atol=3e-6)


def test_images_are_shown_in_the_size_that_the_folder_makes(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    transformers, torch = (pytest.importorskip(name) for name in ("transformers", "torch"))
    from PIL import Image

    folder = shutil.copytree(trained / "run/export", tmp_path / "smaller")
    (folder / "SHA256SUMS").unlink()
    said = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(said | {"size": {"height": 8, "width": 8}}))
    file = trained / "rows/green/00.png"
    _, out, err = run(capsys, "predict", folder, file)
    assert "images are shown in 8x8 pixels" in err
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    with torch.no_grad():
        pixels = processor(Image.open(file), return_tensors="pt")
        logits = model(**pixels, interpolate_pos_encoding=True).logits[0]
    ours = json.loads(out)["probabilities"]
    np.testing.assert_allclose(
        [ours[model.config.id2label[i]] for i in range(3)], logits.softmax(-1), rtol=0, atol=3e-6
    )
    assert run(capsys, "convert", folder, tmp_path / "kept", "--to", "jaxft")[0] == 0
    assert (tmp_path / "kept/tokenizer/preprocessor_config.json").is_file()
    _, again, _ = run(capsys, "predict", trained / "run/export", file)
    assert run(capsys, "convert", trained / "run/export", tmp_path / "same", "--to", "jaxft")[0] == 0
    _, same, _ = run(capsys, "predict", tmp_path / "same", file)
    assert same == again


def test_files_folders_and_tables_are_answered(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    export, red = trained / "run/export", trained / "rows/red"
    files = sorted(red.iterdir())[:2]
    _, out, _ = run(capsys, "predict", trained / "run", *files)
    first = [json.loads(line) for line in out.splitlines()]
    assert [one["image"] for one in first] == [str(file) for file in files]
    (tmp_path / "rows.csv").write_text("".join(["image,label\n", *(f"red/{file.name},red\n" for file in files)]))
    shutil.copytree(red, tmp_path / "red")
    _, out, _ = run(capsys, "predict", export, tmp_path / "rows.csv")
    table = [json.loads(line) for line in out.splitlines()]
    assert [one["probabilities"] for one in table] == [one["probabilities"] for one in first]
    assert {one["true"] for one in table} == {"red"}
    code, _, _ = run(capsys, "predict", export, tmp_path / "red", "--out", tmp_path / "said.csv")
    assert code == 0
    assert (tmp_path / "said.csv").read_text().startswith("image,predicted,probability,probability_blue,")
    (tmp_path / "red/00.png").write_bytes(files[0].read_bytes()[:60])
    assert "00.png: " in refusal(capsys, "predict", export, tmp_path / "red")
    _, out, err = run(capsys, "predict", export, tmp_path / "red", "data.broken_files=skip")
    assert len(out.splitlines()) == 7
    assert err == "1 files cannot be read and are left out\n"
    assert "reads no texts" in refusal(capsys, "predict", export, "--text", "hello")
    assert "several images" in refusal(capsys, "predict", export, tmp_path / "rows.csv", files[0])


def test_a_run_can_be_scored_again_and_from_a_cache(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = trained / "rows"
    code, out, _ = run(capsys, "eval", trained / "run/export", f"data.eval={rows}", "--rows", tmp_path / "said.jsonl")
    assert code == 0
    assert out.startswith("eval: 24 rows\naccuracy ")
    said = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert [Path(one["image"]).parent.name for one in said] == [one["true"] for one in said]
    more = images.overrides(rows, tmp_path / "run", "task.flip=0.5")
    assert run(capsys, "cache", "build", *more, "--out", tmp_path / "kept")[0] == 0
    for name, data in (("files", ()), ("cache", ("data.train", "data.eval"))):
        where = [f"{key}={tmp_path / 'kept' / key.removeprefix('data.')}" for key in data]
        assert run(capsys, "train", *more, *where, f"train.out={tmp_path / name}")[0] == 0
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("files", "cache")]
    assert logs[0] == logs[1]


def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    how = ("task.augment=rand", "task.erase=0.5", "task.cutmix=1", "model.arch.drop_path_rate=0.2")
    parts = images.overrides(trained / "rows", tmp_path / "run", *how, "checkpoint.every=1", "checkpoint.keep=9")
    assert run(capsys, "train", *parts)[0] == 0
    log = tmp_path / "run/log.jsonl"
    whole = log.read_bytes()
    for step in (tmp_path / "run/checkpoints").iterdir():
        if step.name.isdigit() and int(step.name) > 4:
            shutil.rmtree(step)
    _, out, _ = run(capsys, "train", *parts)
    assert "resuming from step 4" in out
    assert log.read_bytes() == whole


def test_a_checkpoint_of_a_run_at_another_size_answers(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = (
        f"model.init={trained / 'run/export'}",
        "model.family=null",
        "model.arch={image_size: 16}",
        "train.export=false",
    )
    assert run(capsys, "train", *images.overrides(trained / "rows", tmp_path / "run", *more, "train.steps=2"))[0] == 0
    code, out, err = run(capsys, "predict", tmp_path / "run", trained / "rows/red")
    assert (code, len(out.splitlines())) == (0, 8)
    assert "warning" not in err


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (("task.flip=2",), "task.flip=2.0: a probability must lie in 0..1"),
        (("task.crop_scale=[0.5,0.1]",), r"task.crop_scale=\[0.5, 0.1\]: two shares"),
        (("data.packing=best_fit",), "data.packing=best_fit: rows of the task image_classification cannot share a row"),
        (("task.name=classification",), "reads texts, and vit is a model of images"),
        (("model.arch.num_channels=2",), "images of 2 channels are not supported"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(
    more: tuple[str, ...], problem: str, trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import re

    said = refusal(capsys, "train", *images.overrides(trained / "rows", tmp_path / "run", *more))
    assert re.search(problem, said), said


def test_broken_files_are_named_or_counted(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(trained / "rows", tmp_path / "rows")
    (tmp_path / "rows/green/03.png").write_bytes(b"no picture")
    how = images.overrides(tmp_path / "rows", tmp_path / "run")
    assert "green/03.png: is no image that can be read" in refusal(capsys, "train", *how)
    code, out, _ = run(capsys, "train", *how, "data.broken_files=skip")
    assert code == 0
    assert "1 of 24 rows have a file that cannot be read and are left out" in out
    (tmp_path / "rows.jsonl").write_text('{"image": "no.png", "label": "red"}\n')
    where = (f"data.train={tmp_path / 'rows.jsonl'}", f"data.eval={tmp_path / 'rows.jsonl'}")
    named = refusal(capsys, "train", *how, *where, f"train.out={tmp_path / 'b'}")
    assert "rows.jsonl:1: the file" in named
    assert "no.png does not exist" in named


def test_sizes_of_images_are_said(tmp_path: Path) -> None:
    config = RunConfig(task=Config(name="image_classification"))
    rng = np.random.default_rng(0)
    pictures = [images.picture(rng, (9, 9, 9), height, width) for height, width in ((9, 12), (20, 30), (16, 10))]
    values = [images.file_of(one) for one in pictures]

    def said(values: list[bytes]) -> str:
        notes: list[str] = []
        rows = [Row((value, "ab"[i % 2]), f"row {i}") for i, value in enumerate(values)]
        assert study(rows, config, None, notes.append).labels == ("a", "b")
        return notes[-1]

    assert said([*values, b"no image"]) == "images: 12x9 to 30x20 pixels, 10x16 in the middle (width x height)"
    assert said([values[1]] * 2) == "images: all of 30x20 pixels (width x height)"
