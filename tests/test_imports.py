"""Imports point one way: no module of the package needs, over others, itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sqap

ROOT = Path(sqap.__file__).parent
# In a function, since it needs what is defined there: the check of a path multiplies by it.
LAZY = {"sqap.kernels.cpu": "sqap.kernels.cpu.check"}


def module_name(path: Path, root: Path) -> str:
    parts = [root.name, *path.relative_to(root).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """All imports inside a node, in functions too, but not those for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from statements(ast.Module([other], []))
        else:
            yield from statements(child)


def imported(path: Path, modules: set[str], package: str) -> set[str]:
    """Which of the ``modules`` a file names: ``from a import b`` is of module ``a.b`` if there is one."""
    found: set[str] = set()
    for statement in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        base = statement.module or ""
        if statement.level:
            above = package.split(".")
            base = ".".join([*above[: len(above) - statement.level + 1], *filter(None, [base])])
        for alias in statement.names:
            inner = f"{base}.{alias.name}"
            found.add(inner if inner in modules else base)
    return found & modules


def graph(root: Path) -> dict[str, set[str]]:
    """What each module of a package imports of the package."""
    paths = {module_name(path, root): path for path in root.rglob("*.py")}
    return {
        name: imported(path, set(paths), name if path.stem == "__init__" else name.rpartition(".")[0])
        for name, path in paths.items()
    }


def test_no_module_imports_itself_over_others() -> None:
    found = graph(ROOT)
    assert len(found) > 100
    for module, lazy in LAZY.items():
        found[module].remove(lazy)
    TopologicalSorter(found).prepare()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("import pack.b", "from pack import a"),
        ("from pack.b import x", "def f():\n    from .a import y"),
        ("from . import b", "if True:\n    import pack.a"),
    ],
)
def test_a_circle_is_found(tmp_path: Path, a: str, b: str) -> None:
    root = tmp_path / "pack"
    root.mkdir()
    (root / "__init__.py").write_text("from pack.a import x\n")
    (root / "a.py").write_text(a)
    (root / "b.py").write_text(b)
    with pytest.raises(CycleError) as problem:
        TopologicalSorter(graph(root)).prepare()
    assert set(problem.value.args[1]) == {"pack.a", "pack.b"}


def test_imports_for_type_checkers_alone_make_no_circle(tmp_path: Path) -> None:
    root = tmp_path / "pack"
    root.mkdir()
    (root / "a.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pack.b\n")
    (root / "b.py").write_text("import pack.a\n")
    assert graph(root) == {"pack.a": set(), "pack.b": {"pack.a"}}
