"""Nothing that a model or data folder names or holds is ever run, and nothing asks on standard input."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import LABELS, make_folder, refusal, rows, run, write_csv

import jaxft
from jaxft.config.scalars import Loader
from jaxft.data.sources.read import iter_rows
from jaxft.errors import UserError

Capture = pytest.CaptureFixture[str]


class Canary:
    """Code that leaves a file when it is run."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "canary"
        self.code = f"open({str(self.path)!r}, 'w').close()\nclass Tok: pass\nclass Model: pass\nclass Config: pass\n"

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))

    def check(self) -> None:
        assert not self.path.exists(), "code of the folder was run"


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Canary:
    """A canary whose modules can be imported, as if the command ran in the folder."""
    made = Canary(tmp_path)
    code = tmp_path / "code"
    code.mkdir()
    for name in ("evil_module", "evil_features"):
        (code / f"{name}.py").write_text(made.code)
    monkeypatch.syspath_prepend(str(code))
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("untrusted") / "model", "classification", LABELS)


def change(path: Path, **keys: Any) -> None:
    tree = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(tree | keys))


def plant(folder: Path, canary: Canary) -> None:
    """Code, and every setting that could lead to it."""
    for name in ("tok", "modeling", "configuration", "tokenizer", "__init__"):
        (folder / f"{name}.py").write_text(canary.code)
    classes = {"AutoConfig": "configuration.Config", "AutoModel": "modeling.Model"}
    classes["AutoModelForSequenceClassification"] = "modeling.Model"
    change(folder / "config.json", auto_map=classes, custom_pipelines={"x": {"impl": "modeling.Model"}})
    change(folder / "generation_config.json", auto_map=classes)
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    (folder / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "modeling.Model"}]')
    (folder / "training_args.bin").write_bytes(pickle.dumps(canary))


def _code_as_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.Tok", "tok.Tok"]})


def _code_as_class(folder: Path) -> None:
    change(folder / "tokenizer_config.json", tokenizer_class="evil_module.Tok")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink()


def _code_for_a_type(folder: Path) -> None:
    _code_as_tokenizer(folder)
    change(folder / "config.json", model_type="evil", architectures=["BertForSequenceClassification"])


COMMANDS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "predict": lambda model, data: ["predict", model, "--text", "the cat"],
    "eval": lambda model, data: ["eval", model, f"data.eval={data}", "data.text=text", "data.label=label"],
    "train": lambda model, data: [
        *("train", f"model.init={model}", f"data.train={data}", "data.max_length=8", "data.buckets=[8]"),
        *("train.steps=1", f"train.out={data.parent / 'run'}", "log.progress=off"),
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("damage", [_code_as_tokenizer, _code_as_class, _code_for_a_type])
def test_tokenizers_made_by_code_are_refused(
    model: Path,
    tmp_path: Path,
    capsys: Capture,
    canary: Canary,
    command: str,
    damage: Callable[[Path], None],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    plant(folder, canary)
    damage(folder)
    data = write_csv(tmp_path / "rows.csv", rows(12))
    refusal(capsys, *COMMANDS[command](folder, data))
    if damage is _code_as_class:  # no vocabulary is left: the weights load, without a tokenizer
        assert jaxft.load(str(folder), note=lambda text: None).tokenizer is None
    else:
        with pytest.raises(UserError):
            jaxft.load(str(folder), note=lambda text: None)
    canary.check()


def test_nothing_is_asked_on_standard_input(model: Path, tmp_path: Path, canary: Canary) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    plant(folder, canary)
    _code_as_tokenizer(folder)
    done = subprocess.run(
        [sys.executable, "-m", "jaxft", "predict", str(folder), "-"],
        input=b"y\n" * 100,
        capture_output=True,
        check=False,
        cwd=folder,  # Python puts it in front of the places where modules are looked up
        env={
            "PYTHONPATH": str(Path(jaxft.__file__).parents[1]),
            "PATH": "",
            "HOME": str(tmp_path),
            "JAX_PLATFORMS": "cpu",
        }
        | {"PYTHONSAFEPATH": "1"},
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == b""
    assert done.stderr.count(b"\n") == 1
    assert b"code, which is never run" in done.stderr
    canary.check()


def test_code_beside_a_sound_model_changes_nothing(
    model: Path, tmp_path: Path, capsys: Capture, canary: Canary
) -> None:
    pytest.importorskip("torch")
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    plant(folder, canary)
    texts = ["--text", "the cat sleeps", "--text", "a red house"]
    code, out, _ = run(capsys, "predict", folder, *texts)
    assert (code, out) == (0, run(capsys, "predict", model, *texts)[1])
    code, out, err = run(capsys, "convert", folder, tmp_path / "target", "--check")
    assert code == 0, err
    canary.check()
    assert "config.json: auto_map, custom_pipelines names code" in out
    assert "modeling.py (code)" in out
    assert "training_args.bin (weights or binary data)" in out
    assert "auto_map of generation_config.json" in out
    files = sorted(path.name for path in (tmp_path / "target").iterdir())
    assert not [name for name in files if name.endswith((".py", ".bin"))]
    assert "generation_config.json" in files
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "target" / name).read_text())


def test_pickles_are_not_run(model: Path, tmp_path: Path, capsys: Capture, canary: Canary) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(canary))
    refusal(capsys, "predict", folder, "--text", "a")
    refusal(capsys, "convert", folder, tmp_path / "target")
    canary.check()


# ------------------------------------------------------------------------------------------------------------ data


_TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
_EVIL = {"pythonClassName": "evil_features.Evil", "jsonFeature": {"json": "{}"}}
_DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"


def _features(inner: Any) -> dict[str, Any]:
    return {"pythonClassName": _DICT, "featuresDict": {"features": {"text": _TEXT, "label": inner}}}


@pytest.mark.parametrize(
    "features",
    [
        _EVIL,
        _features(_EVIL),
        _features({"python_class_name": "evil_features.Evil", "jsonFeature": {"json": "{}"}}),
        _features({"pythonClassName": _DICT, "featuresDict": {"features": {"deep": _EVIL}}}),
        {"type": "evil_features.Evil", "content": {}},
        {"type": _DICT, "content": {"text": {"type": "evil_features.Evil", "content": {}}}},
        {
            "type": _DICT,
            "content": json.dumps({"features": {"text": _EVIL}}),
            "proto_cls": "tensorflow_datasets.FeaturesDict",
        },
        _features(
            {
                "pythonClassName": _DICT,
                "jsonFeature": {"json": json.dumps({"x": {"type": "evil_features.E", "content": {}}})},
            }
        ),
    ],
)
def test_feature_classes_of_tfds_folders_are_its_own(
    model: Path, tmp_path: Path, capsys: Capture, canary: Canary, monkeypatch: pytest.MonkeyPatch, features: Any
) -> None:
    folder = tmp_path / "home" / "evil" / "1.0.0"
    folder.mkdir(parents=True)
    info = {"name": "evil", "version": "1.0.0", "fileFormat": "array_record", "splits": [{"name": "train"}]}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    (folder / "features.json").write_text(json.dumps(features))
    command = ("train", f"model.init={model}", f"train.out={tmp_path / 'run'}", f"data.train=tfds:{folder}:train")
    message = refusal(capsys, *command)
    assert "features.json names the feature class 'evil_features." in message
    # By name, the folder is found where tfds keeps what it has prepared.
    import tensorflow_datasets as tfds

    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "home"))
    with pytest.raises(UserError, match="code that data name is never run"):
        list(iter_rows("tfds:evil:train", ("text",)))
    canary.check()


def test_features_of_datasets_folders_are_its_own(tmp_path: Path, canary: Canary) -> None:
    import datasets

    folder = tmp_path / "data"
    datasets.Dataset.from_dict({"text": ["a"], "label": ["b"]}).save_to_disk(str(folder))
    change(
        folder / "dataset_info.json",
        features={"text": {"_type": "evil_module.Evil"}, "label": {"dtype": "string", "_type": "Value"}},
    )
    with pytest.raises(UserError):
        list(iter_rows(f"hf:{folder}", ("text", "label")))
    canary.check()


UNPICKLERS = {"pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
ON = {"allow_pickle", "trust_remote_code", "weights_only", "shell"}
SOURCES = sorted((Path(jaxft.__file__).parent).rglob("*.py"))


def test_no_file_of_the_package_can_unpickle_or_trust() -> None:
    """What ruff's rules do not see; ``pickletools``, which only reads, is the restricted reader's alone."""
    for path in SOURCES:
        found = [
            ast.unparse(node)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if not _may_be(node, path)
        ]
        assert found == [], path


def _may_be(node: ast.AST, path: Path) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom):
        names = (
            {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.Import)
            else {str(node.module).split(".")[0]}
        )
        return not names & UNPICKLERS and ("pickletools" not in names or path.name == "torch_pickle.py")
    if isinstance(node, ast.keyword) and node.arg in ON:
        return isinstance(node.value, ast.Constant) and node.value.value is (node.arg == "weights_only")
    if isinstance(node, ast.Attribute):
        of_torch = node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "torch"
        return not of_torch and node.attr not in ("extractall", "unsafe_load", "full_load", "full_load_all")
    return True


def test_the_rules_of_that_see_what_they_must() -> None:
    for text in ("import pickle", "from dill import x", "import pickletools", "f(allow_pickle=True)", "f(weights_only=False)",
                 "z.extractall()", "torch.load(x)", "yaml.unsafe_load(x)"):  # fmt: skip
        assert not all(_may_be(node, Path("x.py")) for node in ast.walk(ast.parse(text))), text
    for text in ("import json", "f(allow_pickle=False)", "f(weights_only=True)", "json.load(x)"):
        assert all(_may_be(node, Path("x.py")) for node in ast.walk(ast.parse(text))), text


def test_the_loader_of_run_files_makes_nothing_but_plain_values() -> None:
    assert issubclass(Loader, yaml.SafeLoader)
    names = "null bool int float str seq map binary omap pairs set timestamp merge"
    assert set(Loader.yaml_constructors) <= {*(f"tag:yaml.org,2002:{name}" for name in names.split()), None}
