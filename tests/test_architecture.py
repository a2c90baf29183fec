"""The house keeps its plan: imports go one way, names are found by themselves, files stay small."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jaxft
from jaxft import models, tasks

ROOT = Path(jaxft.__file__).parent

_DOC = (ROOT.parent / "docs/architecture.md").read_text()
# One line per level, from the ground up, names before two blanks or more. A folder imports only from lines above its own.
LEVELS = [re.split("  +", line)[0].split() for line in _DOC.split("```levels\n")[1].split("```")[0].splitlines()]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))


def package_of(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """First-level jaxft modules that a file imports, anywhere in it, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "jaxft":
            found |= {alias.name for alias in node.names if alias.name in LEVEL_OF}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxft."):
            found.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("jaxft.")}
    return found


def test_imports_go_one_way() -> None:
    for path in FILES:
        mine = package_of(path)
        if mine == "__init__":
            continue  # the lazy front door names everything
        assert mine in LEVEL_OF, f"{mine} has no place in the plan: add it to the levels in docs/architecture.md"
        for other in imports_of(path) - {mine}:
            if mine == "cli" and other == "__main__":
                continue
            assert LEVEL_OF[other] < LEVEL_OF[mine], f"{path.relative_to(ROOT)} imports {other}"


def test_files_are_small() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: size for name, size in sizes.items() if size > 420} == {}


def test_the_top_of_the_package_is_few_names() -> None:
    found = [path for path in ROOT.iterdir() if path.name not in ("__pycache__", "py.typed", "configs", "launch")]
    assert len([path for path in found if path.is_dir()]) <= 16
    assert len([path for path in found if path.is_file()]) <= 5


def test_no_file_but_its_own_names_a_family_or_task() -> None:
    names = {*models.families(), *tasks.tasks()}
    for path in FILES:
        if path.parent.name in ("families", "tasks"):
            continue
        strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
        for name in names & strings:
            assert path.name in KNOWN.get(name, ()), f"{path} names {name!r}"


# The task of a run that names none; a head of several families, whose decoder may be tied; one that a family may lack; a word of
# config.json; what Flax calls a table.
KNOWN = {
    "classification": ("schema.py",),
    "embedding": ("flax_names.py", "modules.py", "disentangled.py"),
    "masked_lm": ("encoder_files.py",),
    "question_answering": ("contract.py",),
    "regression": ("source.py",),
}


def test_a_family_imports_what_models_are_made_of_and_nothing_else() -> None:
    able = {"attention", "errors", "layers", "models"}
    for path in (ROOT / "models" / "families").glob("*.py"):
        assert imports_of(path) <= able | {"data"}, path
        # Of data, the declaration of its inputs.
        named = {n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)}
        assert {name for name in named if name and name.startswith("jaxft.data")} <= {"jaxft.data.batch"}, path


@pytest.mark.parametrize("module", ["torch", "tensorflow"])
def test_the_package_never_needs(module: str) -> None:
    script = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "import pkgutil, importlib, jaxft\n"
        "for m in pkgutil.walk_packages(jaxft.__path__, 'jaxft.'):\n"
        "    m.name.endswith('__main__') or importlib.import_module(m.name)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={"JAX_PLATFORMS": "cpu", "PATH": ""})


def test_importing_jaxft_imports_neither_jax_nor_transformers() -> None:
    script = "import sys, jaxft; sys.exit(bool({'jax', 'flax', 'jaxtyping', 'numpy', 'transformers', 'pydantic'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", script], check=True)
