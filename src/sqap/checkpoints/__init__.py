"""From a name or a directory to a policy: one file per on-disk format."""

from __future__ import annotations

from pathlib import Path

from sqap.checkpoints.native import fingerprint, load_policy
from sqap.errors import CheckpointError
from sqap.policy import Policy

BUNDLED = {"reference": Path(__file__).parent.parent / "assets" / "reference"}


def locate(source: str | Path) -> Path:
    """The directory of a bundled policy's name, or the directory itself.

    Raises:
        CheckpointError: there is neither.
    """
    directory = BUNDLED.get(str(source), Path(source))
    if not directory.is_dir():
        raise CheckpointError(
            f"no policy at {source}: give a directory, or the name of a bundled policy ({', '.join(BUNDLED)})"
        )
    return directory


def load(source: str | Path) -> Policy:
    """Load a policy from a directory, or a bundled one by name.

    Raises:
        CheckpointError: the directory is missing, foreign, incomplete or altered.
    """
    return load_policy(locate(source))


__all__ = ["BUNDLED", "fingerprint", "load", "locate"]
