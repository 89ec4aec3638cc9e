"""From a name or a directory to a policy: one file per on-disk format."""

from __future__ import annotations

from pathlib import Path

from sqap.checkpoints import hub, native, published
from sqap.checkpoints.prismatic import Choices
from sqap.errors import CheckpointError
from sqap.models import empty_model
from sqap.policy import Policy

_PACKAGE = Path(__file__).parent.parent
BUNDLED = {
    "reference": _PACKAGE / "assets" / "reference",
    # Too large for the package: it is found where sqap runs from a checkout of its repository.
    "reference-smollm": _PACKAGE.parent.parent / "policies" / "reference-smollm",
}


def locate(source: str | Path) -> Path:
    """The directory of a bundled policy's name or of a repository on the hub, or the directory itself.

    ``org/name`` and ``org/name@revision`` are downloaded from the Hugging Face hub, unless there is a
    directory of that name.

    Raises:
        CheckpointError: there is none of them.
    """
    directory = BUNDLED.get(str(source), Path(source))
    if directory.is_dir():
        return directory
    if str(source) in BUNDLED:
        raise CheckpointError(
            f"{source} is not part of the installed package; it is policies/{source} of sqap's repository, "
            "from a checkout of which sqap finds it"
        )
    if hub.parse(str(source)) is not None:
        return hub.download(str(source)).directory
    raise CheckpointError(
        f"no policy at {source}: give a directory, a repository of the hub as org/name, or the name of a "
        f"bundled policy ({', '.join(BUNDLED)})"
    )


def load(
    source: str | Path,
    *,
    unnorm_key: str | None = None,
    cameras: tuple[str, ...] | None = None,
    tokenizer: str | Path | None = None,
    crop: float | None = None,
) -> Policy:
    """Load a policy: sqap's own directories, and CogACT, OpenVLA and OpenVLA-OFT as they are published.

    Published weights are read from disk when they are needed: by acting all at once, by compressing part by
    part.

    Args:
        source: a directory, a repository of the Hugging Face hub (``org/name`` or ``org/name@revision``), or
            the name of a bundled policy.
        unnorm_key: the data set whose statistics turn actions into robot units, where there are several.
        cameras: names for the images the policy reads, in order; the family's own if None.
        tokenizer: ``tokenizer.json``, or the directory it is in, where it is not beside the weights.
        crop: share of an image's area to look at, from its centre; policies tuned on random crops of 90 % are
            shown that much (OpenVLA on LIBERO), which their files do not say. The family's own if None.

    Raises:
        CheckpointError: the directory is missing, foreign, incomplete or altered, or a choice does not fit.
    """
    directory = locate(source)
    choices = Choices(unnorm_key, cameras, None if tokenizer is None else Path(tokenizer), crop)
    if native.is_policy(directory):
        if choices != Choices():
            raise CheckpointError(
                f"{directory} is sqap's own: data set, cameras, tokenizer and crop are chosen when it is made"
            )
        return native.load_policy(directory)
    found = published.recognise(directory).open(directory, choices)
    return Policy(empty_model(found.config.model), found.config, found.tokenizer, weights=found.weights)


def fingerprint(directory: Path) -> str:
    """SHA-256 by which a policy is known: over all files that it is made of.

    Raises:
        CheckpointError: there is no policy.
    """
    if native.is_policy(directory):
        return native.fingerprint(directory)
    weights = load(directory).weights
    assert weights is not None
    return weights.fingerprint


__all__ = ["BUNDLED", "fingerprint", "load", "locate"]
