"""One word has one meaning: no two public classes of the package share a name."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import sqap

ROOT = Path(sqap.__file__).parent


def classes(root: Path) -> dict[str, list[str]]:
    """The files, from ``root`` on, in which each public class of a module is defined."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(root.rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path.relative_to(root)))
    return found


def test_no_two_public_classes_share_a_name() -> None:
    found = classes(ROOT)
    assert len(found) > 100
    assert {name: files for name, files in found.items() if len(files) > 1} == {}


def test_twins_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("class X: ...\nclass _Y: ...\n")
    (tmp_path / "b.py").write_text("class X: ...\nclass _Y: ...\nclass Z:\n    class X: ...\n")
    assert classes(tmp_path) == {"X": ["a.py", "b.py"], "Z": ["b.py"]}
