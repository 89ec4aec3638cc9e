"""From a name or a directory to a policy: one file per on-disk format."""

from __future__ import annotations

from pathlib import Path

from sqap.checkpoints.native import fingerprint, load_policy
from sqap.errors import CheckpointError
from sqap.policy import Policy

_PACKAGE = Path(__file__).parent.parent
BUNDLED = {
    "reference": _PACKAGE / "assets" / "reference",
    # Too large for the package: it is found where sqap runs from a checkout of its repository.
    "reference-smollm": _PACKAGE.parent.parent / "policies" / "reference-smollm",
}


def locate(source: str | Path) -> Path:
    """The directory of a bundled policy's name, or the directory itself.

    Raises:
        CheckpointError: there is neither.
    """
    directory = BUNDLED.get(str(source), Path(source))
    if not directory.is_dir() and str(source) in BUNDLED:
        raise CheckpointError(
            f"{source} is not part of the installed package; it is policies/{source} of sqap's repository, "
            "from a checkout of which sqap finds it"
        )
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
