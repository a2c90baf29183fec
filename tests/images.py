"""Small pictures, and folders of models that read them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

ARCH = (
    "model.arch={image_size: 12, patch_size: 4, num_channels: 3, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, "
    "intermediate_size: 32}"
)
COLOURS = {"blue": (20, 30, 220), "green": (30, 210, 40), "red": (220, 30, 20)}


def picture(rng: np.random.Generator, colour: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    """Noise around a colour."""
    noise = rng.integers(-20, 21, (height, width, 3))
    return np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)


def file_of(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    """A picture as a file's bytes."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_folders(folder: Path, each: int = 8, seed: int = 0) -> Path:
    """Class folders of pictures of several sizes."""
    rng = np.random.default_rng(seed)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(each):
            height, width = rng.integers(9, 20, 2)
            (folder / name / f"{number:02}.png").write_bytes(file_of(picture(rng, colour, height, width)))
    return folder


def overrides(folder: Path, out: Path, *more: str) -> list[str]:
    """What ``jaxft train`` needs besides."""
    usual: list[Any] = [
        *("task.name=image_classification", "model.family=vit", ARCH, f"data.train={folder}", f"train.out={out}"),
        *("train.batch_size=8", "train.steps=6", "eval.batch_size=8", "eval.every=3", "optim.learning_rate=1e-2"),
        "data.eval_fraction=0.25",
    ]
    return [*usual, *more]
