"""Files appear whole, or what was there stays."""

from __future__ import annotations

import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from sqap import files
from sqap.errors import InputError
from sqap.files import check_file, exchange, whole_file, write_json


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


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "new" / "target.json")
    write_json(tmp_path / "link", 1)
    assert (tmp_path / "new" / "target.json").read_text() == "1\n"
    assert (tmp_path / "link").is_symlink()


def test_a_file_is_on_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def sync(descriptor: int) -> None:
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))

    def replace(source: Path, target: Path) -> None:
        done.append(f"{source.name} -> {target.name}")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_json(tmp_path / "a.json", 1)
    temporary = f".a.{os.getpid()}.json"
    assert done == [temporary, f"{temporary} -> a.json", tmp_path.name]


@pytest.mark.parametrize("path", ["file/new/a.json", "/proc/a.json", "directory"])
def test_what_could_not_be_written_is_refused_before_there_is_anything_to_write(
    tmp_path: Path, path: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        check_file(tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


def test_what_could_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("numbers")
    check_file(tmp_path / "a.json")
    check_file(tmp_path / "new" / "newer" / "a.json")
    assert os.listdir(tmp_path) == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "numbers"


@pytest.fixture(params=["at once", "in two steps"])
def directories(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``old`` and ``new``, each with a file that says so, with and without a system that can swap names."""
    if request.param == "in two steps":
        monkeypatch.setattr(files, "_exchange_at_once", lambda *_: False)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    return tmp_path


def test_an_exchange_leaves_the_old_at_the_place_of_the_new(directories: Path) -> None:
    exchange(directories / "new", directories / "old")
    assert (directories / "old" / "file").read_text() == "new"
    assert (directories / "new" / "file").read_text() == "old"
    assert sorted(os.listdir(directories)) == ["new", "old"]


def test_an_exchange_that_fails_changes_nothing(directories: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        exchange(directories / "nothing", directories / "old")
    assert (directories / "old" / "file").read_text() == "old"
    assert sorted(os.listdir(directories)) == ["new", "old"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps two names at once")
def test_at_no_instant_there_is_nothing(directories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(os, "rename", None)
    exchange(directories / "new", directories / "old")
    assert (directories / "old" / "file").read_text() == "new"
