"""The table of ARCHITECTURE.md: which room may import which."""

import ast
from pathlib import Path

import pytest

import nd_jax

ROOT = Path(nd_jax.__file__).parent
ALLOWED = {
    "models": {"models"},
    "pyramid": {"pyramid"},
    "data": {"data"},
    "training": {"training", "models"},
    "recipes": {"recipes", "models", "pyramid", "data", "training"},
}
EVERYWHERE = {"checked_files", "errors", "outputs", "pixels"}


def imported(path: Path) -> set[str]:
    """First part after ``nd_jax.`` of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    assert not {name for name in names if name.split(".")[0] == "torch"}, f"{path} imports torch"
    return {name.split(".")[1] for name in names if name.startswith("nd_jax.")}


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        extra = imported(path) - ALLOWED[room] - EVERYWHERE
        assert not extra, f"{path.relative_to(ROOT)} imports {sorted(extra)}"


def test_converters_import_only_networks_and_pyramid():
    import nd_jax.converters

    files = list(Path(nd_jax.converters.__file__).parent.rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) <= {"models", "pyramid", "converters"} | EVERYWHERE, path


def test_runtime_imports_nothing_of_ours():
    import nd_jax.converters

    for path in (Path(nd_jax.converters.__file__).parent / "runtime").rglob("*.py"):
        assert not imported(path), path
        assert "jax" not in {name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for
                             name in [alias.name.split(".")[0] for alias in node.names]}, path  # fmt: skip
