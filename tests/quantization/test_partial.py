"""Finished stages: one process at a time, never another compression's, and nobody else's files."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from sqap.errors import InputError
from sqap.quantization import Partial, partial

HOLD = """
import sys, time
from sqap.quantization import Partial
held = Partial(sys.argv[1])
print("held", flush=True)
time.sleep(600)
"""


def stage(seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(4, 4)


@contextmanager
def other_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the directory until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, directory], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def left_behind(directory: Path, key: str = "key", *names: str) -> None:
    """What an interrupted compression leaves."""
    with Partial(directory) as kept:
        kept.begin(key)
        for name in names:
            kept.save(name, stage())


def test_a_stage_comes_back_under_its_key_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    left_behind(tmp_path / "p", "key", "head")
    with Partial(tmp_path / "p") as kept:
        kept.begin("key")
        found = kept.load("head")
        assert found is not None
        assert torch.equal(found["weight"], stage().weight)
        assert kept.load("projector") is None
        assert not caplog.records
        kept.begin("another key")
        assert kept.load("head") is None
    assert "stages of another compression" in caplog.text
    assert not (tmp_path / "p").exists()


def test_a_directory_of_somebody_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "key").write_text("of the front door")
    with pytest.raises(InputError, match="is not empty, and no compression has left it"):
        Partial(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["key", "thesis.tex"]


def test_a_file_that_is_called_as_the_lock_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / partial.MARK).write_text("of the front door")
    with pytest.raises(InputError, match="is not sqap's"):
        Partial(tmp_path)
    assert (tmp_path / partial.MARK).read_text() == "of the front door"


@pytest.mark.parametrize("key", ["key", "another key"])
def test_what_others_put_into_the_directory_is_left_there(tmp_path: Path, key: str) -> None:
    left_behind(tmp_path, "key", "head")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model.safetensors").write_text("mine")
    with Partial(tmp_path) as kept:
        kept.begin(key)
        kept.remove()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "mine",
        "mine/model.safetensors",
        "notes.txt",
    ]


def test_two_processes_cannot_have_one_directory(tmp_path: Path) -> None:
    with other_process(tmp_path / "p") as process:
        with pytest.raises(InputError, match=rf"process {process.pid} is compressing to the same place"):
            Partial(tmp_path / "p")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with Partial(tmp_path / "p") as kept:
            kept.begin("key")
    assert not (tmp_path / "p").exists()


def test_nor_can_one_process_twice_nor_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "p")
    with Partial(tmp_path / "p"):
        for name in ("p", "link"):
            with pytest.raises(InputError, match=rf"process {os.getpid()} is compressing to the same place"):
                Partial(tmp_path / name)


def test_a_stage_that_was_put_there_under_another_key_is_not_used(tmp_path: Path) -> None:
    left_behind(tmp_path / "other", "another key", "head")
    with Partial(tmp_path / "p") as kept:
        kept.begin("key")
        os.replace(tmp_path / "other" / "head.stage.safetensors", tmp_path / "p" / "head.stage.safetensors")
        assert kept.load("head") is None


@pytest.mark.parametrize("damage", ["empty", "cut", "cut in the header", "zeros", "one bit"])
def test_a_damaged_stage_is_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    left_behind(tmp_path, "key", "head")
    path = tmp_path / "head.stage.safetensors"
    content = path.read_bytes()
    damaged = {
        "empty": b"",
        "cut": content[:-5],
        "cut in the header": content[:30],
        "zeros": bytes(len(content)),
        "one bit": content[:-1] + bytes([content[-1] ^ 1]),
    }
    path.write_bytes(damaged[damage])
    with Partial(tmp_path) as kept:
        kept.begin("key")
        assert kept.load("head") is None
        assert "head.stage.safetensors is damaged; the stage is made anew" in caplog.text
        kept.save("head", stage())
        assert kept.load("head") is not None


def test_what_a_killed_process_was_writing_is_deleted(tmp_path: Path) -> None:
    left_behind(tmp_path, "key", "head")
    (tmp_path / ".projector.stage.123.safetensors").write_bytes(b"half of it")
    with Partial(tmp_path) as kept:
        kept.begin("key")
        assert sorted(os.listdir(tmp_path)) == ["head.stage.safetensors", partial.MARK]


@pytest.mark.parametrize(
    "problem",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_a_sentence_and_keeps_the_stages_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: Exception
) -> None:
    def write_half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half of it")
        raise problem

    left_behind(tmp_path, "key", "projector")
    with Partial(tmp_path) as kept:
        kept.begin("key")
        with monkeypatch.context() as patch:
            patch.setattr(partial, "save_file", write_half)
            with pytest.raises(InputError, match=r"head.*: the disk is full.*finished stages are kept"):
                kept.save("head", stage())
    assert sorted(os.listdir(tmp_path)) == ["projector.stage.safetensors", partial.MARK]


@pytest.mark.parametrize("place", ["file/p", "file", "/proc/sqap/p"])
def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot keep stages in"):
        Partial(tmp_path / place)


def test_a_directory_that_was_taken_away_is_neither_filled_nor_emptied(tmp_path: Path) -> None:
    with Partial(tmp_path / "p") as kept:
        kept.begin("key")
        (tmp_path / "p" / partial.MARK).unlink()
        left_behind(tmp_path / "p", "key", "head")
        for act in (kept.remove, lambda: kept.save("head", stage())):
            with pytest.raises(InputError, match="was removed while stages were kept in it"):
                act()
    assert sorted(os.listdir(tmp_path / "p")) == ["head.stage.safetensors", partial.MARK]
