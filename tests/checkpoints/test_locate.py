"""What a path is and what a name on the hub; one sentence if a path cannot be read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import sqap
from sqap.checkpoints import BUNDLED, hub, locate
from sqap.cli import app
from sqap.errors import CheckpointError

from .conftest import Publish
from .test_compress_published import observation


@pytest.fixture(autouse=True)
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the hub; tests run where nothing is."""
    asked: list[str] = []

    def download(name: str) -> hub.Snapshot:
        asked.append(name)
        return hub.Snapshot(tmp_path, "0" * 40)

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.chdir(tmp_path)
    return asked


def test_a_bundled_policys_name_is_a_string_and_a_path_of_that_name_a_path(tmp_path: Path) -> None:
    assert locate("reference") == BUNDLED["reference"]
    for path in (Path("reference"), Path("./reference"), "./reference", tmp_path / "reference"):
        with pytest.raises(CheckpointError, match="no policy at"):
            locate(path)
    (tmp_path / "reference").mkdir()
    assert locate("reference") == BUNDLED["reference"]
    assert locate("./reference") == Path("reference")
    assert locate(Path("reference")) == Path("reference")


@pytest.mark.parametrize(
    "source", ["runs/smal", "runs/small/", "./org/name", "/org/name", "~/name", "a/b/c", Path("org/name")]
)
def test_a_path_is_never_downloaded(tmp_path: Path, downloads: list[str], source: str | Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match=f"^no policy at {source}: "):
        locate(source)
    assert downloads == []


def test_a_name_on_the_hub_is_downloaded_unless_there_is_a_directory(
    tmp_path: Path, downloads: list[str]
) -> None:
    locate("org/name")
    (tmp_path / "org").mkdir()
    with pytest.raises(CheckpointError, match=r"a directory org here; .* is meant, give org/name@main"):
        locate("org/name")
    locate("org/name@main")
    assert downloads == ["org/name", "org/name@main"]
    (tmp_path / "org" / "name").mkdir()
    assert locate("org/name") == Path("org/name")


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "policy").mkdir()
    assert locate("~/policy") == tmp_path / "policy"


def test_a_file_is_not_a_directory(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is a file: give the directory of a policy"):
        locate("model.safetensors")


def test_a_path_that_the_system_refuses_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match=r"^cannot read a{300}: File name too long$"):
        locate("a" * 300)


@contextmanager
def not_root() -> Iterator[None]:
    """Without the right to read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("command", ["inspect", "compress", "sensitivity", "eval"])
def test_a_directory_without_permission_is_one_sentence(tmp_path: Path, command: str) -> None:
    directory = tmp_path / "forbidden"
    directory.mkdir(mode=0)
    arguments = [command, str(directory)] + (["--out", "small"] if command == "compress" else [])
    CliRunner().invoke(app, arguments)  # imports what it needs, while that can be read
    with not_root():
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "error: cannot read" in result.output
    assert "Permission denied" in result.output


def test_configurations_may_begin_with_a_byte_order_mark(publish: Publish) -> None:
    directory = publish("openvla")
    for path in directory.glob("*.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert sqap.load(directory, unnorm_key="bridge_orig").config.family == "openvla"


@pytest.mark.parametrize("family", ["openvla", "cogact"])
def test_a_loaded_policy_can_be_sent_to_another_process(written: Publish, family: str) -> None:
    policy = sqap.load(written(family), unnorm_key="bridge_orig")
    sent = pickle.loads(pickle.dumps(policy))
    seen = observation(policy)
    assert np.array_equal(sent.act(seen, seed=0), policy.act(seen, seed=0))
