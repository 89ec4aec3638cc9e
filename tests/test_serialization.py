"""Reading dataclasses from JSON: what is accepted, and the sentence that says what was not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from sqap.errors import CheckpointError, InputError
from sqap.serialization import from_json, read_json


@dataclass(frozen=True)
class Inner:
    size: int
    share: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    flag: bool = False
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[Inner, ...] = ()
    inner: Inner | None = None


def parse(data: Any) -> Outer:
    outer: Outer = from_json(Outer, data, "outer", InputError)
    return outer


def test_everything_given() -> None:
    data = {
        "name": "x",
        "kind": "b",
        "flag": True,
        "pair": [0.25, 0.75],
        "many": [{"size": 1}, {"size": 2, "share": 0.1}],
        "inner": {"size": 3},
    }
    assert parse(data) == Outer("x", "b", True, (0.25, 0.75), (Inner(1), Inner(2, 0.1)), Inner(3))


def test_defaults_fill_in() -> None:
    assert parse({"name": "x"}) == Outer("x")


def test_null_is_none_only_where_allowed() -> None:
    assert parse({"name": "x", "inner": None}).inner is None
    with pytest.raises(InputError, match=r"outer\.name must be str, got None"):
        parse({"name": None})


def test_whole_numbers_are_floats_too() -> None:
    outer = parse({"name": "x", "pair": [0, 1], "inner": {"size": 1, "share": 1}})
    assert outer.pair == (0.0, 1.0)
    assert all(type(value) is float for value in outer.pair)
    assert outer.inner is not None
    assert type(outer.inner.share) is float


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "outer must be an object, got list"),
        ("x", "outer must be an object, got str"),
        ({}, "outer lacks 'name'"),
        (
            {"name": "x", "knid": "a"},
            "outer has no setting 'knid'; it has name, kind, flag, pair, many, inner",
        ),
        ({"name": 3}, "outer.name must be str, got 3"),
        ({"name": "x", "kind": "c"}, "outer.kind must be one of 'a', 'b', got 'c'"),
        ({"name": "x", "kind": ["a"]}, "outer.kind must be one of 'a', 'b', got ['a']"),
        ({"name": "x", "flag": 1}, "outer.flag must be bool, got 1"),
        ({"name": "x", "pair": 1}, "outer.pair must be a list, got 1"),
        ({"name": "x", "pair": "ab"}, "outer.pair must be a list, got 'ab'"),
        ({"name": "x", "pair": [1, 2, 3]}, "outer.pair must have 2 entries, got 3"),
        ({"name": "x", "pair": [1, "2"]}, "outer.pair[1] must be float, got '2'"),
        ({"name": "x", "many": [{"size": 1}, {}]}, "outer.many[1] lacks 'size'"),
        ({"name": "x", "many": [7]}, "outer.many[0] must be an object, got int"),
        ({"name": "x", "inner": {"size": 1.0}}, "outer.inner.size must be int, got 1.0"),
        ({"name": "x", "inner": {"size": True}}, "outer.inner.size must be int, got True"),
        ({"name": "x", "inner": {"size": 1, "z": 0}}, "outer.inner has no setting 'z'; it has size, share"),
    ],
)
def test_refusals_say_where_and_what(data: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(data)
    assert str(caught.value) == message


def test_the_caller_chooses_the_error() -> None:
    with pytest.raises(CheckpointError):
        from_json(Outer, {}, "config.json", CheckpointError)


def test_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": [1, 2.5, None]}))
    assert read_json(path, InputError) == {"a": [1, 2.5, None]}


READ = """
import sys
from pathlib import Path
from sqap.errors import InputError
from sqap.serialization import read_json
print(ascii(read_json(Path(sys.argv[1]), InputError)))
"""


def test_a_file_is_utf_8_whatever_the_locale_says(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"x": "größe"}', encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == ascii({"x": "größe"}) + "\n", done.stderr


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot read .*gone\.json: No such file"):
        read_json(tmp_path / "gone.json", CheckpointError)


def test_directory_instead_of_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        read_json(tmp_path, InputError)


@pytest.mark.parametrize("content", [b"", b"{", b"{'a': 1}", b"\xff\xfe{}"])
def test_not_json(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.json is not valid JSON"):
        read_json(path, InputError)


def test_nested_without_an_end(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("[" * 200_000 + "]" * 200_000)
    with pytest.raises(InputError, match=r"x\.json is nested too deeply to be read"):
        read_json(path, InputError)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(InputError, match=r"cannot read .*x\.json: it is not a file"):
        read_json(tmp_path / "x.json", InputError)
