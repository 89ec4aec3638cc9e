"""`Policy.push_to_hub`: what the hub is asked, and what it gets, with a hub that is not there."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

import sqap
from sqap.checkpoints.card import add_measurement
from sqap.errors import CheckpointError


class Api:
    """Stands for `huggingface_hub.HfApi`: keeps what it is asked for, and a copy of what is uploaded."""

    problem: Exception | None = None
    asked: tuple[Any, ...]
    folder: Path

    def __init__(self, token: str | None = None) -> None:
        Api.asked = (token,)

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> str:
        Api.asked += (repo_id, private, exist_ok)
        if Api.problem is not None:
            raise Api.problem
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        Api.asked += (repo_id,)
        shutil.copytree(folder_path, Api.folder)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(Api, "folder", tmp_path / "uploaded", raising=False)
    monkeypatch.setattr(Api, "problem", None)
    return Api


def test_the_whole_policy_arrives_and_its_card_names_the_repository(api, saved, observe):
    add_measurement(saved, "Success", "All of it.")
    policy = sqap.load(saved)
    address = policy.push_to_hub("org/name", private=True, token="secret")
    assert address == "https://huggingface.co/org/name"
    assert api.asked == ("secret", "org/name", True, True, "org/name")
    uploaded = sqap.load(api.folder)
    assert uploaded.fingerprint == policy.fingerprint
    assert np.array_equal(uploaded.act(observe(), seed=0), policy.act(observe(), seed=0))
    card = (api.folder / "README.md").read_text()
    assert 'sqap.load("org/name")' in card
    assert "All of it." in card
    assert {path.name for path in api.folder.iterdir()} == {path.name for path in saved.iterdir()}


@pytest.mark.parametrize("name", ["name", "org/name@v1", "./here", "", "org/na me"])
def test_what_is_no_name_is_refused_before_anything_is_asked(api, policy, name):
    with pytest.raises(CheckpointError, match="is no repository's name on the hub: give org/name"):
        policy.push_to_hub(name)
    assert not api.folder.exists()


def refusal(status: int) -> Exception:
    problem = OSError("a long answer\nof several lines")
    problem.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return problem


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (refusal(403), "the hub does not let you write to org/name: log in with `hf auth login`, or give a"),
        (refusal(401), "the hub does not let you write to org/name"),
        (LocalTokenNotFoundError("none"), "the hub does not let you write to org/name"),
        (refusal(500), "cannot upload the policy to org/name: a long answer$"),
        (ConnectionError(""), "cannot upload the policy to org/name: ConnectionError$"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(api, policy, monkeypatch, problem, sentence):
    monkeypatch.setattr(api, "problem", problem)
    with pytest.raises(CheckpointError, match=sentence):
        policy.push_to_hub("org/name")
