"""Checkpoints from the Hugging Face hub, pinned to a commit, and policies to it."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sqap.build import __version__
from sqap.checkpoints.card import name_place
from sqap.errors import CheckpointError

_NAME = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
# Configuration, statistics, tokenizer, weights and the model card, which has the license; not the code beside
# them, nor what training went on from. One file of code is searched for a word that tells OpenVLA-OFT from
# OpenVLA, and never run.
NEEDED = ["*.json", "*.safetensors", "*.pt", "modeling_prismatic.py", "README.md"]
UNNEEDED = ["lora_adapter/*", "runs/*", "*optimizer*"]
logger = logging.getLogger("sqap")


@dataclass(frozen=True)
class Snapshot:
    """A repository's files on this machine, as they were at ``commit``."""

    directory: Path
    commit: str


def parse(name: str) -> tuple[str, str | None] | None:
    """``org/name`` or ``org/name@revision`` to both parts; None if it is neither."""
    match = _NAME.fullmatch(name)
    return (match["repository"], match["revision"]) if match else None


def download(name: str, revision: str | None = None, needed: Sequence[str] = NEEDED) -> Snapshot:
    """The files that sqap reads of a repository; those that were downloaded before are not fetched again.

    It is logged before, since what is named may have been meant as a directory.

    Args:
        name: ``org/name`` or ``org/name@revision``.
        revision: a branch, a tag or a commit; ``main`` if neither this nor the name says.
        needed: patterns of the files' names.

    Raises:
        CheckpointError: there is no such repository or revision, its terms have to be accepted first, or the
            hub cannot be reached and the files are not on this machine.
    """
    parsed = parse(name)
    if parsed is None:
        raise CheckpointError(f"{name!r} is no name on the hub: give org/name or org/name@revision")
    repository, wanted = parsed[0], revision or parsed[1] or "main"
    logger.warning(
        "%s is no directory here: it is read from the Hugging Face hub, at %s, and downloaded unless it is "
        "on this machine",
        name,
        wanted,
    )
    # Not at the top: it takes a second, and only downloads need it.
    from huggingface_hub import snapshot_download

    try:
        directory = Path(
            snapshot_download(repository, revision=wanted, allow_patterns=[*needed], ignore_patterns=UNNEEDED)
        )
    except Exception as problem:  # each of the hub's releases brings another network library's exceptions
        raise CheckpointError(_explain(problem, repository, wanted)) from problem
    return Snapshot(directory, commit=directory.name)


def upload(
    save: Callable[[Path], None], repository: str, *, private: bool | None = None, token: str | None = None
) -> str:
    """Save a policy to a temporary directory and upload that.

    Args:
        save: writes the policy's directory.
        repository: ``org/name``, made if it is not there.
        private: whether it is private if it is made; None leaves that to the hub.
        token: None takes the one that is stored on this machine.

    Returns:
        The repository's address.

    Raises:
        CheckpointError: the name is none, the policy cannot be saved, or the hub refuses it or cannot be
            reached.
    """
    name = parse(repository)
    if name is None or name[1] is not None:
        raise CheckpointError(f"{repository!r} is no repository's name on the hub: give org/name")
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory(prefix="sqap-") as temporary:
        directory = Path(temporary) / "policy"
        save(directory)
        name_place(directory, repository)
        api = HfApi(token=token)
        try:
            address = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repository,
                folder_path=directory,
                commit_message=f"Policy, saved by sqap {__version__}",
            )
        except Exception as problem:  # as in `download`
            raise CheckpointError(_explain_upload(problem, repository)) from problem
    return str(address)


def _explain_upload(problem: Exception, repository: str) -> str:
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, LocalTokenNotFoundError) or status in (401, 403):
        return (
            f"the hub does not let you write to {repository}: log in with `hf auth login`, or give a token "
            "that may write there"
        )
    reason = str(problem).strip().partition("\n")[0]
    return f"cannot upload the policy to {repository}: {reason or type(problem).__name__}"


def _explain(problem: Exception, repository: str, revision: str) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(problem, GatedRepoError):
        return (
            f"{repository} is gated: accept its terms on https://huggingface.co/{repository}, then log in "
            "with `hf auth login`"
        )
    if isinstance(problem, RepositoryNotFoundError):
        return (
            f"there is no repository {repository} on the hub, or it is private and `hf auth login` is needed"
        )
    if isinstance(problem, RevisionNotFoundError):
        return f"{repository} has no revision {revision}; give a branch, a tag or a commit of it"
    if isinstance(problem, LocalEntryNotFoundError | ConnectionError):
        return (
            f"cannot reach the hub, and {repository} at {revision} is not on this machine: download it where "
            "there is a network, and give its directory"
        )
    reason = str(problem).strip().partition("\n")[0]
    return f"cannot download {repository} at {revision}: {reason or type(problem).__name__}"
