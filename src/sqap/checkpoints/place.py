"""Where a policy is put: checked before long work is done for it, and taken whole or not at all."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from sqap.checkpoints.card import BEGIN, CARD
from sqap.checkpoints.lerobot.export import EXPORTED
from sqap.checkpoints.manifest import MANIFEST, TOKENIZER, WEIGHTS
from sqap.errors import CheckpointError
from sqap.files import exchange, reason, resolve, sync
from sqap.serialization import read_json

FILES = (MANIFEST, WEIGHTS, TOKENIZER, *EXPORTED, CARD)  # all that a policy's directory may hold
SAVING = ".saving"  # ends the name of a directory that is being written


def check_place(directory: Path) -> Path:
    """Refuse a place that `native.save` could not take, before long work is done for it.

    Returns:
        The directory itself, where ``directory`` is a link to it.

    Raises:
        CheckpointError: it holds something that is not an sqap policy, or nothing can be put there.
    """
    try:
        place = resolve(directory)
        if place == Path(os.path.realpath(os.getcwd())) or os.path.ismount(place):
            raise CheckpointError(
                f"{directory} cannot be replaced, since it is where this process works or a mount point; "
                "name a directory inside it"
            )
        if os.path.lexists(place):
            _check_replaceable(place, directory)
        above = next(parent for parent in place.parents if os.path.lexists(parent))
        if not above.is_dir():
            raise CheckpointError(f"cannot write {directory}: {above} is not a directory")
        if not os.access(above, os.W_OK | os.X_OK):
            raise CheckpointError(f"cannot write {directory}: nothing can be made in {above}")
    except OSError as problem:
        raise CheckpointError(f"cannot write {directory}: {reason(problem)}") from problem
    return place


def _check_replaceable(place: Path, directory: Path) -> None:
    if not place.is_dir():
        raise CheckpointError(f"{directory} is a file, and a policy is a directory; choose another place")
    names = set(os.listdir(place))
    others = sorted(name for name in names if name not in FILES or _is_note(place / name))
    if names and (others == sorted(names) or MANIFEST not in names or not _is_manifest(place / MANIFEST)):
        raise CheckpointError(f"{directory} exists and is not an sqap policy; choose another place")
    if others:
        raise CheckpointError(
            f"{directory} holds {others[0]} beside an sqap policy, and would be replaced as a whole; move it "
            "away, or choose another place"
        )


def _is_note(path: Path) -> bool:
    """Whether this is a README that is no model card of ours: somebody's own."""
    return path.name == CARD and BEGIN.encode() not in path.read_bytes()


def _is_manifest(path: Path) -> bool:
    try:
        data = read_json(path, CheckpointError)
    except CheckpointError:
        return False
    return isinstance(data, dict) and data.get("format") == "sqap"


@contextmanager
def replacing(place: Path, directory: Path) -> Iterator[Path]:
    """A temporary directory that takes ``place`` if the block succeeds and vanishes if not.

    ``directory`` is what the user calls it.
    """
    temporary = None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _discard_leftovers(place)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=SAVING, dir=place.parent))
        with _locked(temporary):
            yield temporary
            # Private by default, directory and weights; a policy is for whoever runs the robot.
            temporary.chmod(0o755)
            for file in temporary.iterdir():
                file.chmod(0o644)
                sync(file)
            sync(temporary)
            exchange(temporary, place)
            sync(place.parent)
    except (OSError, SafetensorError) as problem:
        raise CheckpointError(
            f"cannot write {directory}: {reason(problem)}; nothing there was changed"
        ) from problem
    finally:
        if temporary is not None:
            _discard(temporary)


@contextmanager
def _locked(directory: Path) -> Iterator[bool]:
    """Hold a directory as long as the process lives; False if another process does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        ours = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            ours = False
        yield ours
    finally:
        os.close(descriptor)


def _discard_leftovers(place: Path) -> None:
    """Delete what processes that were killed while saving to ``place`` have left beside it."""
    for name in os.listdir(place.parent):
        old = (
            name.endswith(f"{SAVING}.old") and place.is_dir()
        )  # has the policy where `exchange` was cut in two
        if name.startswith(f".{place.name}.") and (name.endswith(SAVING) or old):
            with suppress(OSError), _locked(place.with_name(name)) as ours:
                if ours:
                    _discard(place.with_name(name))


def _discard(directory: Path) -> None:
    """Delete a policy's directory, and nothing that is not a policy's."""
    with suppress(OSError):
        for name in FILES:
            (directory / name).unlink(missing_ok=True)
        directory.rmdir()
