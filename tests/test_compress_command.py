"""``sqap compress`` and its directory: checked first, held by one process, stages kept until all is saved."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import sqap
from sqap.checkpoints import native
from sqap.cli import app
from sqap.quantization import Partial, partial

Command = Callable[..., "tuple[int, str]"]


@pytest.fixture
def command(saved, observe, tmp_path, monkeypatch) -> Command:
    """``command(*options)``: exit code and output of compressing the saved policy on two pictures."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = []
    for i in range(2):
        Image.fromarray(observe(i).images["corner2"]).save(pictures / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "instruction": "open the drawer"}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)

    def run(*options: object) -> tuple[int, str]:
        arguments = ["compress", saved, "--frames-from", pictures, *options]
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.output
        return result.exit_code, " ".join(result.output.split())

    return run


@pytest.fixture
def no_work(monkeypatch):
    """Any calibration frame is a failure."""

    def work(*_: object, **__: object) -> None:
        raise AssertionError("work was done for a place that cannot be taken")

    monkeypatch.setattr("sqap.frames.read_frames", work)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def foreign(root: Path) -> None:
    (root / "thesis").mkdir()
    (root / "thesis" / "thesis.tex").write_text("years of work")
    (root / "thesis.tex").write_text("years of work")
    (root / "settings").mkdir()
    (root / "settings" / "policy.json").write_text('{"format": "of somebody else"}')


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("out", "sentence"),
    [
        ("thesis", "thesis exists and is not an sqap policy"),
        ("settings", "settings exists and is not an sqap policy"),
        ("thesis.tex", "thesis.tex is a file, and a policy is a directory"),
        ("thesis.tex/small", "thesis.tex is not a directory"),
        (".", ". cannot be replaced"),
        ("..", ".. exists and is not an sqap policy"),
        ("", " cannot be replaced"),
        ("/", "/ cannot be replaced"),
        ("/proc", "/proc cannot be replaced"),
        ("policy", "policy and the policy at"),
        ("policy/small", "one is in the other"),
        ("link", "link and the policy at"),
    ],
)
def test_a_place_that_cannot_be_taken_is_refused_before_the_work(command, tmp_path, out, sentence):
    foreign(tmp_path)
    (tmp_path / "link").symlink_to("policy")
    before = tree(tmp_path)
    code, output = command("--out", out)
    assert code == 1
    assert sentence in output
    assert tree(tmp_path) == before


# As a user who may not write: root may write everywhere.
CHECK = """
import os, sys
from pathlib import Path
from sqap.checkpoints.place import check_place
from sqap.errors import CheckpointError
if os.getuid() == 0:
    os.setuid(65534)
try:
    check_place(Path(sys.argv[1]))
except CheckpointError as error:
    print(error)
"""


def test_a_place_where_nothing_may_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "kept").mkdir(mode=0o555)
    place = tmp_path / "kept" / "small"
    done = subprocess.run([sys.executable, "-c", CHECK, str(place)], capture_output=True, text=True)
    assert f"cannot write {place}: nothing can be made in /" in done.stdout, done.stderr


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("thesis", "directory"),
        ("thesis.tex/numbers.json", "thesis.tex is not a directory"),
        ("/dev/null", "it is not a file"),
        ("/proc/numbers.json", "cannot write /proc/numbers.json"),
        ("small/numbers.json", "is in small, which is replaced as a whole"),
    ],
)
def test_numbers_that_cannot_be_written_are_refused_before_the_work(command, tmp_path, path, sentence):
    foreign(tmp_path)
    before = tree(tmp_path)
    code, output = command("--out", "small", "--json", path)
    assert code != 0
    assert sentence in output
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("no_work")
def test_a_policy_with_more_in_its_directory_is_not_replaced(command, policy, tmp_path):
    policy.save(tmp_path / "small")
    (tmp_path / "small" / "README.md").write_text("what we learned")
    code, output = command("--out", "small")
    assert code == 1
    assert "small holds README.md beside an sqap policy" in output
    assert (tmp_path / "small" / "README.md").read_text() == "what we learned"


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("recipe", ["w4a8", "w4a4"])
def test_a_second_process_is_refused_whatever_its_recipe(command, tmp_path, recipe):
    with Partial(tmp_path / ".small.partial"):
        code, output = command("--out", "small", "--recipe", recipe)
    assert code == 1
    assert f"process {os.getpid()} is compressing to the same place" in output
    assert not (tmp_path / "small").exists()


def test_the_place_is_held_while_the_policy_is_saved(command, monkeypatch, tmp_path):
    def save(policy, directory):
        with pytest.raises(sqap.errors.InputError, match="is compressing to the same place"):
            Partial(tmp_path / ".small.partial")

    monkeypatch.setattr(native, "save", save)
    assert command("--out", "small")[0] == 0


def test_stages_are_kept_until_the_policy_is_saved(command, monkeypatch, tmp_path):
    """And the same command then makes the policy that it would have made undisturbed."""

    def full(tensors, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = []
    save = Partial.save
    monkeypatch.setattr(
        Partial, "save", lambda self, name, stage: (made.append(name), save(self, name, stage))
    )
    with monkeypatch.context() as patch:
        patch.setattr(native, "save_file", full)
        code, output = command("--out", "small")
    assert code == 1
    assert "cannot write small: the disk is full" in output
    assert not (tmp_path / "small").exists()
    kept = {path.name.removesuffix(partial.SUFFIX) for path in (tmp_path / ".small.partial").iterdir()}
    assert kept == {*made, partial.MARK}
    made.clear()
    assert command("--out", "small")[0] == 0
    assert made == []
    assert command("--out", "undisturbed")[0] == 0
    assert tree(tmp_path / "small") == tree(tmp_path / "undisturbed")
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


def test_a_disk_that_is_full_halfway_is_a_sentence_and_the_same_command_goes_on(
    command, monkeypatch, tmp_path
):
    saved = []
    save_file = partial.save_file

    def full(tensors, path, metadata):
        if len(saved) == 2:
            path.write_bytes(b"half of it")
            raise partial.SafetensorError("I/O error: No space left on device (os error 28)")
        saved.append(path)
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(partial, "save_file", full)
        code, output = command("--out", "small")
    assert code == 1
    assert "the disk is full" in output
    assert "finished stages are kept" in output
    assert len(list((tmp_path / ".small.partial").glob("*.safetensors"))) == 2
    assert command("--out", "small")[0] == 0
    assert command("--out", "undisturbed")[0] == 0
    assert tree(tmp_path / "small") == tree(tmp_path / "undisturbed")


def test_a_link_keeps_pointing_at_what_is_replaced(command, policy, tmp_path):
    policy.save(tmp_path / "run-1")
    (tmp_path / "latest").symlink_to("run-1")
    (tmp_path / "numbers.json").symlink_to("numbers-1.json")
    assert command("--out", "latest", "--json", "numbers.json")[0] == 0
    assert os.readlink(tmp_path / "latest") == "run-1"
    assert sqap.load(tmp_path / "run-1").recipe == sqap.Recipe.w4a8()
    assert os.readlink(tmp_path / "numbers.json") == "numbers-1.json"
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []
