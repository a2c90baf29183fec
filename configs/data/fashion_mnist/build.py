"""Fashion-MNIST (Xiao et al. 2017, MIT licence) as rows: 60,000 training and 10,000 test images of clothes, 28x28 grey pixels, ten classes.

    apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb package
    python configs/data/fashion_mnist/build.py package/usr/share/datasets/fashion-mnist FOLDER

FOLDER gets train.parquet and test.parquet, with columns ``image`` (a PNG file's bytes) and ``label`` (its name). Needs pillow and pyarrow.
"""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path

import numpy as np

NAMES = (
    *("t-shirt/top", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format (LeCun's MNIST page)."""
    data = gzip.decompress(path.read_bytes())
    zero, kind, rank = data[:2], data[2], data[3]
    if zero != b"\0\0" or kind != 8:
        raise ValueError(f"{path} holds no bytes in the IDX format")
    shape = np.frombuffer(data, ">i4", rank, 4)
    return np.frombuffer(data, np.uint8, -1, 4 + 4 * rank).reshape(shape)


def png(image: np.ndarray) -> bytes:
    """A picture as a file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def main(source: Path, target: Path) -> None:
    """Writes both splits."""
    import pyarrow
    from pyarrow import parquet

    target.mkdir(parents=True, exist_ok=True)
    for prefix, name in (("train", "train"), ("t10k", "test")):
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        rows = {"image": [png(image) for image in images], "label": [NAMES[label] for label in labels]}
        parquet.write_table(pyarrow.table(rows), target / f"{name}.parquet")
        print(f"{target / name}.parquet: {len(labels)} images")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
