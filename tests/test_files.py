"""Files appear whole, or what was there stays."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

import pytest

from sqap.errors import InputError
from sqap.files import whole_file, write_json


def test_a_file_takes_its_place_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "numbers.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    with suppress(KeyError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert os.listdir(path.parent) == ["numbers.json"]


def test_no_file_takes_the_place_of_a_device() -> None:
    with pytest.raises(InputError, match="cannot write /dev/null: it is not a file"):
        write_json(Path("/dev/null"), {})
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_no_file_takes_the_place_of_a_directory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it is not a file"):
        write_json(tmp_path, {})
    assert tmp_path.is_dir()
