"""The architecture as a test: which file may import which, and what no file may be called."""

from __future__ import annotations

import ast
import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "app": {"app", "pipelines", "serve", "tune"},
    "tune": {"tune", "pipelines"},
    "serve": {"serve", "pipelines"},
    "pipelines": {"pipelines"},
}
# Inside pipelines a file imports only what stands in a row before its own; a folder's files import each other.
LAYERS = [
    *["errors", "progress", "registry", "spec", "explain", "notation"],  # words
    *["storage", "parsing", "schema", "expressions", "tasks", "metrics"],  # facts about data
    *["features", "models", "attribution", "contract", "artifact"],  # what predicts
    *["runs", "parent", "cache", "data", "profiles", "quality", "scoring"],  # what is read and kept
    *["training", "design"],
    *["prepare", "evaluate", "train", "follow", "predict", "plan"],  # the verbs
]
HEAVY = {"ray", "torch", "lightgbm", "polars", "pandas", "pyarrow", "optuna", "fastapi", "numpy"}
FILES = sorted(file for package in MAY_IMPORT for file in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_follow_the_arrows(file: Path) -> None:
    package = file.relative_to(ROOT).parts[0]

    wrong = [name for name in imported(file) if name.split(".")[0] in MAY_IMPORT.keys() - MAY_IMPORT[package]]

    assert not wrong, f"{package} may import {sorted(MAY_IMPORT[package])}"


@pytest.mark.parametrize("file", sorted((ROOT / "pipelines").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_pipelines_import_only_what_stands_lower(file: Path) -> None:
    own = layer(".".join(file.relative_to(ROOT).with_suffix("").parts))

    assert own is None or own in LAYERS, "give the new file its place in LAYERS"
    lower = set(LAYERS[: LAYERS.index(own) + 1]) if own else set()
    wrong = [name for name in imported(file) if name.startswith("pipelines.") and layer(name) not in lower]

    assert not wrong, f"{own} stands below what it imports"


@pytest.mark.parametrize("file", sorted((ROOT / "serve").rglob("*.py")), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_replica_imports_no_training_code(file: Path) -> None:
    allowed = LAYERS[: LAYERS.index("artifact") + 1]

    wrong = [name for name in imported(file) if name.startswith("pipelines.") and layer(name) not in allowed]

    assert not wrong, f"serve imports artifact and what stands below it: {allowed}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_import_rebinds_the_name_of_a_package_of_ours(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            bound = {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            bound = {alias.asname for alias in node.names if alias.asname}
        else:
            continue
        assert not bound & MAY_IMPORT.keys(), f"line {node.lineno}: write `import ray.tune`, never `from ray import tune`"


def test_no_module_is_called_like_a_library_or_a_package_of_ours() -> None:
    libraries = {name for name, owners in importlib.metadata.packages_distributions().items() if owners != ["heliostat"]}
    taken = set(sys.stdlib_module_names) | libraries | MAY_IMPORT.keys()

    wrong = [str(file.relative_to(ROOT)) for file in FILES if file.stem in taken and not file.stem.startswith("__")]

    assert not wrong


def test_every_folder_with_code_is_a_package() -> None:
    folders = {file.parent for package in [*MAY_IMPORT, "tests"] for file in (ROOT / package).rglob("*.py")}

    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_every_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())

    found = {".".join(file.parent.relative_to(ROOT).parts) for file in FILES if file.name == "__init__.py"}

    assert set(project["tool"]["setuptools"]["packages"]) == found


@pytest.mark.parametrize(
    "path", ["app/cli.py", "app/__main__.py", "app/spec.py", "serve/spec.py", "tune/spec.py", "pipelines/spec.py"]
)
def test_the_way_to_help_and_to_a_spec_error_is_light(path: str) -> None:
    wrong = {name.split(".")[0] for name in imported(ROOT / path, top_level=True)} & HEAVY

    assert not wrong


def layer(module: str) -> str | None:
    """The entry of LAYERS that a module of pipelines belongs to; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else None


def imported(file: Path, *, top_level: bool = False) -> Iterator[str]:
    """The modules that a file imports, except for types alone; `from package import module` counts as the module."""
    tree = ast.parse(file.read_text())
    types_only = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    skipped = {id(inner) for node in types_only for inner in ast.walk(node)}
    for node in tree.body if top_level else ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: imports name the whole path"
            assert node.module
            if node.module == "pipelines":
                yield from (f"pipelines.{alias.name}" for alias in node.names)
            else:
                yield node.module
