"""Rows of formats that need a library: Parquet, TensorFlow Datasets without TensorFlow, the `datasets` library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from jaxft.config import DataConfig
from jaxft.data.encode import read_rows
from jaxft.data.processors.image import decoded
from jaxft.data.sources.media import BrokenFile
from jaxft.data.sources.read import Row, iter_rows
from jaxft.data.sources.rows import Binary
from jaxft.errors import UserError


def _values(reference: object, *columns: str) -> list[tuple[Any, ...]]:
    return [row.values for row in iter_rows(str(reference), columns or ("text", "label"))]


def _fails(reference: object, columns: tuple[str, ...] = ("text", "label")) -> str:
    with pytest.raises(UserError) as caught:
        list(iter_rows(str(reference), columns))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _parquet(folder: Path, columns: dict[str, list[Any]]) -> Path:
    path = folder / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=700)
    return path


def test_parquet(tmp_path: Path) -> None:
    count = 2500  # several batches and several row groups
    columns = {"text": [f"é {i}" for i in range(count)], "n": [None, *range(1, count)], "raw": [b"b"] * count}
    path = _parquet(tmp_path, columns)
    rows = list(iter_rows(str(path), ("n", "text", "raw")))
    assert [row.values for row in rows] == list(zip(columns["n"], columns["text"], ["b"] * count, strict=True))
    assert [rows[0].where, rows[-1].where] == [f"{path} row 0", f"{path} row 2499"]


def test_narrow_floats_are_the_numbers_that_were_written(tmp_path: Path) -> None:
    columns = {"text": ["a", "b", "c"], "label": pyarrow.array([0.1, None, 1e-7], pyarrow.float32())}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    assert _values(tmp_path / "a.parquet", "label") == [(0.1,), (None,), (1e-7,)]


def test_parquet_messages(tmp_path: Path) -> None:
    path = _parquet(tmp_path, {"text": [["a"]], "labels": [b"\xff"]})
    assert "a.parquet: no column 'label': did you mean 'labels'? (columns: text, labels); set data.text" in _fails(path)
    assert "a.parquet row 0: column 'text' holds a list" in _fails(path, ("text",))
    assert "a.parquet row 0: column 'labels' is not valid UTF-8" in _fails(path, ("labels",))
    (tmp_path / "b.parquet").write_text("text,label\n")
    assert "b.parquet: cannot be read as Parquet: " in _fails(tmp_path / "b.parquet")


# --- TensorFlow Datasets ---------------------------------------------------------------------------------------------

_PREPARE = """
import io
import sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

def picture(i):  # as a file: of arrays, TFDS makes files with TensorFlow alone
    file = io.BytesIO()
    Image.fromarray(np.full((3, 2, 3), 20 * i, np.uint8)).save(file, "PNG")
    return io.BytesIO(file.getvalue()[:-30] if i == 9 else file.getvalue())  # the last one is cut off

class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
            "text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["no", "yes"]), "n": np.int64,
            "image": tfds.features.Image(shape=(None, None, 3))}))

    def _split_generators(self, downloads):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(10):
            yield i, {"text": f"é {i}", "label": i % 3 - 1, "n": i, "image": picture(i)}

builder = Tiny(data_dir=sys.argv[1], file_format="array_record")
builder.download_and_prepare()
"""


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set. Prepared by another process: preparing is TFDS's business, reading it is ours."""
    folder = tmp_path_factory.mktemp("tfds")
    done = subprocess.run([sys.executable, "-c", _PREPARE, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "tiny/1.0.0"


def test_tfds_folder(tiny_tfds: Path) -> None:
    reference = f"tfds:{tiny_tfds}:train"
    rows = list(iter_rows(reference, ("text", "label", "n")))
    expected = [(f"é {i}", [None, "no", "yes"][i % 3], i) for i in range(10)]
    assert sorted(row.values for row in rows) == expected
    assert [type(value) for value in rows[0].values][::2] == [str, int]
    assert [row.where for row in rows] == [f"{reference} row {i}" for i in range(10)]


def shade(value: Any) -> int:
    """The value that all pixels of an image have."""
    pixels = np.asarray(decoded(value, "RGB", "a row"))
    assert pixels.shape == (3, 2, 3)
    assert pixels.min() == pixels.max()
    return int(pixels.max())


def test_images_of_tfds(tiny_tfds: Path) -> None:
    values = [row.values for row in iter_rows(f"tfds:{tiny_tfds}:train", ("n", Binary("image")))]
    found = {number: value for number, value in values if number != 9}
    assert [shade(found[i]) for i in range(9)] == [20 * i for i in range(9)]
    with pytest.raises(BrokenFile):  # when it is looked at, so that data.broken_files decides
        shade(next(value for number, value in values if number == 9))


def test_tfds_slices_of_a_split(tiny_tfds: Path) -> None:
    everything = _values(f"tfds:{tiny_tfds}:train")
    assert _values(f"tfds:{tiny_tfds}:train[:3]+train[80%:]") == everything[:3] + everything[8:]


def test_tfds_never_imports_tensorflow(tiny_tfds: Path) -> None:
    program = (
        "import sys; from jaxft.data.sources.read import iter_rows; "
        "assert 'pyarrow' not in sys.modules and 'tensorflow_datasets' not in sys.modules; "
        f"print(len(list(iter_rows('tfds:{tiny_tfds}:train', ('text',)))), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "10 False", done.stderr


def test_tfds_messages(tiny_tfds: Path) -> None:
    assert "expected tfds:NAME:SPLIT" in _fails("tfds:imdb_reviews")
    assert "did you mean 'label'?" in _fails(f"tfds:{tiny_tfds}:train", ("labels",))
    assert _fails(f"tfds:{tiny_tfds}:test").endswith("(splits: train (10 rows))")
    assert _fails(f"tfds:{tiny_tfds}:train[50:]").endswith("(splits: train (10 rows))")
    message = _fails(f"tfds:{tiny_tfds.parent}:train")
    assert "has no dataset_info.json" in message
    assert f"did you mean tfds:{tiny_tfds}:SPLIT?" in message
    assert "TFDS has no data set 'imdb_review': did you mean 'imdb_reviews'?" in _fails("tfds:imdb_review:train")
    assert "TFDS has no data set 'qqqqqq': tfds.list_builders() lists the names" in _fails("tfds:qqqqqq:train")
    assert "'zzz'" in _fails("tfds:glue/zzz:train")
    assert "cannot be loaded at version 9.0.0" in _fails("tfds:imdb_reviews:9.0.0:train")


def test_tfds_folder_without_its_version(tiny_tfds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_tfds.parent.parent)
    for name in ("tiny", "./tiny"):
        assert "did you mean tfds:tiny/1.0.0:SPLIT?" in _fails(f"tfds:{name}:train")


def test_tfds_prepared_for_tensorflow(tiny_tfds: Path, tmp_path: Path) -> None:
    for file in tiny_tfds.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes().replace(b"array_record", b"tfrecord"))
    assert "prepared data must be in the array_record format" in _fails(f"tfds:{tmp_path}:train")


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (
            "HTTPSConnectionPool(host='example.org', port=443): Max retries",
            "cannot download from example.org; go online",
        ),
        ("Failed to get url https://example.org/a.zip. HTTP code: 404.", "cannot download from example.org; go online"),
        ("disk full", "cannot be prepared: disk full; go online, or prepare it elsewhere with file_format="),
    ],
)
def test_tfds_offline(monkeypatch: pytest.MonkeyPatch, problem: str, expected: str) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")

    def refuse() -> None:
        raise ConnectionError(problem)

    # glue is only known to TFDS after the import of tensorflow_datasets.text.
    real = tfds.builder

    def builder(name: str, **options: Any) -> Any:
        real(name, **options)
        return SimpleNamespace(download_and_prepare=refuse)

    monkeypatch.setattr(tfds, "builder", builder)
    assert expected in _fails("tfds:glue/sst2:train")


# --- folders of the datasets library ---------------------------------------------------------------------------------


def _saved(library: Any, folder: Path) -> Any:
    features = library.Features(
        {"text": library.Value("string"), "label": library.ClassLabel(names=["no", "yes"]), "n": library.Value("int32")}
    )
    columns = {"text": ["a", "é", "c"], "label": [1, 0, -1], "n": [5, None, 7]}
    table = library.Dataset.from_dict(columns, features=features)
    table.save_to_disk(folder / "table")
    library.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(folder / "splits")
    return table


@pytest.fixture
def datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    if "datasets" not in sys.modules:
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    return pytest.importorskip("datasets")


def test_hf(tmp_path: Path, datasets_library: Any) -> None:
    _saved(datasets_library, tmp_path)
    everything = [("yes", "a", 5), ("no", "é", None), (None, "c", 7)]
    assert _values(f"hf:{tmp_path}/table", "label", "text", "n") == everything
    assert _values(f"hf:{tmp_path}/splits:train", "label", "text", "n") == everything
    assert list(iter_rows(f"hf:{tmp_path}/splits:test", ("text",))) == [Row(("a",), f"hf:{tmp_path}/splits:test row 0")]


def test_images_of_the_datasets_library(tmp_path: Path, datasets_library: Any) -> None:
    features = datasets_library.Features({"image": datasets_library.Image()})
    pictures = [Image.fromarray(np.full((3, 2, 3), 20 * i, np.uint8)) for i in range(4)]
    datasets_library.Dataset.from_dict({"image": pictures}, features=features).save_to_disk(tmp_path / "table")
    rows = iter_rows(f"hf:{tmp_path}/table", (Binary("image"),))
    assert [shade(row.values[0]) for row in rows] == [0, 20, 40, 60]


def test_hf_without_rows(tmp_path: Path, datasets_library: Any) -> None:
    none = _saved(datasets_library, tmp_path).select([])
    datasets_library.DatasetDict({"train": _saved(datasets_library, tmp_path / "x"), "test": none}).save_to_disk(
        tmp_path / "d"
    )
    none.save_to_disk(tmp_path / "none")
    features = none.features
    nothing = datasets_library.Dataset.from_dict({"text": [], "label": [], "n": []}, features=features)
    nothing.save_to_disk(tmp_path / "nothing")
    datasets_library.DatasetDict({"train": none, "test": nothing}).save_to_disk(tmp_path / "both")
    for reference in (
        f"hf:{tmp_path}/none",
        f"hf:{tmp_path}/nothing",
        f"hf:{tmp_path}/d:test",
        f"hf:{tmp_path}/both:test",
    ):
        with pytest.raises(UserError, match="the data set is empty") as caught:
            read_rows(reference, DataConfig())
        assert "\n" not in str(caught.value)
    assert len(_values(f"hf:{tmp_path}/d:train")) == 3


def test_hf_messages(tmp_path: Path, datasets_library: Any) -> None:
    _saved(datasets_library, tmp_path)
    assert "name a split: train, test; use hf:FOLDER:SPLIT" in _fails(f"hf:{tmp_path}/splits")
    assert "no split 'tes': did you mean 'test'?" in _fails(f"hf:{tmp_path}/splits:tes")
    assert "single table without splits; leave out ':train'" in _fails(f"hf:{tmp_path}/table:train")
    assert "no column 'labels': did you mean 'label'?" in _fails(f"hf:{tmp_path}/table", ("labels",))
    assert "data folder" in _fails(f"hf:{tmp_path}/nothing")
    assert "not a folder saved by datasets.save_to_disk" in _fails(f"hf:{tmp_path}")


def test_hf_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "needs the Python package 'datasets'" in (message := _fails(f"hf:{tmp_path}"))
    assert message.endswith("try: pip install datasets")
