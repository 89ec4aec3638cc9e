"""From a name or a directory to a policy: one file per on-disk format."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqap.checkpoints import hub, native, published
from sqap.checkpoints.card import read_license
from sqap.checkpoints.choices import Bounds, Choices
from sqap.config import Origin
from sqap.errors import CheckpointError
from sqap.kernels.cpu import release_threads
from sqap.models.storage import Progress
from sqap.policy import Policy

_PACKAGE = Path(__file__).parent.parent
BUNDLED = {
    "reference": _PACKAGE / "assets" / "reference",
    # Too large for the package: these are found where sqap runs from a checkout of its repository.
    "reference-smollm": _PACKAGE.parent.parent / "policies" / "reference-smollm",
    "reference-smolvla": _PACKAGE.parent.parent / "policies" / "reference-smolvla",
}
LICENSE = "apache-2.0"  # of the bundled policies, as of sqap


def locate(source: str | Path) -> Path:
    """The directory of a policy: a path, a bundled policy's name, or a repository of the hub, downloaded.

    A `Path` is never anything else, nor is a string whose first part is a directory here. Otherwise
    ``org/name`` is downloaded from the Hugging Face hub, which is said; ``org/name@revision`` is whatever
    directories there are.

    Raises:
        CheckpointError: there is none of them, or the directory cannot be read.
    """
    name = source if isinstance(source, str) else None
    with readable():
        if name in BUNDLED:
            return _bundled(name)
        directory = Path(source).expanduser()
        if directory.is_dir():
            return directory
        if directory.exists():
            raise CheckpointError(f"{source} is a file: give the directory of a policy")
        if name is not None and hub.parse(name) is not None:
            first = Path(name).parts[0]
            if "@" in name or not Path(first).is_dir():
                return hub.download(name).directory
            raise CheckpointError(
                f"no policy at {name}: it is taken for a path, since there is a directory {first} here; "
                f"if the hub's repository of that name is meant, give {name}@main"
            )
    raise CheckpointError(
        f"no policy at {source}: give a directory, a repository of the hub as org/name, or the name of a "
        f"bundled policy ({', '.join(BUNDLED)})"
    )


def _bundled(name: str) -> Path:
    if BUNDLED[name].is_dir():
        return BUNDLED[name]
    raise CheckpointError(
        f"{name} is not part of the installed package; it is policies/{name} of sqap's repository, "
        "from a checkout of which sqap finds it"
    )


@contextmanager
def readable() -> Iterator[None]:
    """What the system says to a path becomes one sentence."""
    try:
        yield
    except OSError as problem:
        raise CheckpointError(f"cannot read {problem.filename}: {problem.strerror}") from problem


def load(
    source: str | Path,
    *,
    unnorm_key: str | None = None,
    cameras: tuple[str, ...] | None = None,
    tokenizer: str | Path | None = None,
    crop: float | None = None,
    chunk: int | None = None,
    bounds: Bounds | None = None,
    ema: bool = False,
    film: bool | None = None,
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
        chunk: actions of one step, for an OpenVLA-OFT of another robot than its authors'; 1 for what may be
            one with the discrete head, and is OpenVLA.
        bounds: what normalised actions and states were scaled by, for the same: ``"q99"``, the 1st and 99th
            percentiles, or ``"minmax"``.
        ema: take a CogACT's averaged action model (``ema_diffusion``) in place of the raw one.
        film: whether an OpenVLA-OFT was tuned with FiLM; by its files if None.

    Raises:
        CheckpointError: the directory is missing, foreign, incomplete or altered, or a choice does not fit.
    """
    directory = locate(source)
    path = None if tokenizer is None else Path(tokenizer)
    choices = Choices(unnorm_key, cameras, path, crop, chunk, bounds, ema, film)
    with readable():
        if native.is_policy(directory):
            if choices != Choices():
                raise CheckpointError(
                    f"{directory} is sqap's own: {', '.join(vars(choices))} are chosen when it is made"
                )
            opened = native.open(directory)
        else:
            opened = published.recognise(directory).open(directory, choices)
    policy = Policy(**vars(dataclasses.replace(opened, origin=_origin(source, directory))))
    release_threads()  # another thread may be the one that acts
    return policy


def _origin(source: str | Path, directory: Path) -> Origin:
    """What can be told of where a policy is from: `locate` has found ``directory`` for ``source``."""
    stated = read_license(directory)
    if isinstance(source, Path) or Path(source).expanduser() == directory:
        return Origin(license=stated)
    if source in BUNDLED:
        return Origin(source, license=LICENSE)
    name = hub.parse(source)
    assert name is not None, "it was downloaded"
    return Origin(name[0], directory.name, stated)


def is_own(directory: Path) -> bool:
    """Whether ``directory`` is in sqap's own format, in which nothing is left to choose."""
    with readable():
        return native.is_policy(directory)


def fingerprint(
    directory: Path,
    choices: Choices = Choices(),  # noqa: B008 - it is frozen
    progress: Progress | None = None,
) -> str:
    """SHA-256 by which a policy is known: over its files, and over what was chosen where they leave a choice.

    Args:
        directory: of the policy.
        choices: as for `load`; not looked at for sqap's own directories.
        progress: gets (bytes hashed, bytes in all) of published weights.

    Raises:
        CheckpointError: there is no policy, or a choice does not fit.
    """
    if is_own(directory):
        return native.fingerprint(directory)
    return identify(load(directory, **vars(choices)), progress)


def identify(policy: Policy, progress: Progress | None = None) -> str:
    """The `fingerprint` of a policy that was loaded.

    Raises:
        CheckpointError: its files cannot be read any more.
    """
    if policy.weights is None:
        assert policy.fingerprint is not None, "it was not loaded"
        return policy.fingerprint
    with readable():
        weights = policy.weights.hash_files(progress)
    made_of = [weights, dataclasses.asdict(policy.config), policy.tokenizer.to_str()]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


__all__ = ["BUNDLED", "fingerprint", "identify", "is_own", "load", "locate"]
