"""Choices of a user, where a published checkpoint leaves something open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sqap.errors import CheckpointError

Bounds = Literal["q99", "minmax"]


@dataclass(frozen=True)
class Choices:
    """Settings that a checkpoint leaves open, or says in a way that does not suit.

    Args:
        unnorm_key: the dataset whose statistics turn actions into robot units; may be left out if there is
            but one.
        cameras: names of the images the policy reads, as many as it was trained with; the
            family's own if None.
        tokenizer: ``tokenizer.json``, or the directory it is in, if it is not beside the weights.
        crop: share of an image's area that is looked at, from its centre; the family's own if None.
        chunk: actions of one step; the family's or the robot's own if None.
        bounds: what -1 and 1 stand for, the 1st and 99th percentiles or the extremes; the family's or the
            robot's own if None.
        ema: whether averaged weights are taken in place of the raw ones, where the files have both.
        film: whether the instruction modulates vision, as in OpenVLA-OFT+; what the files tell if None.

    Raises:
        CheckpointError: the crop is no share, the chunk no number of actions, or the bounds are unknown.
    """

    unnorm_key: str | None = None
    cameras: tuple[str, ...] | None = None
    tokenizer: Path | None = None
    crop: float | None = None
    chunk: int | None = None
    bounds: Bounds | None = None
    ema: bool = False
    film: bool | None = None

    def __post_init__(self) -> None:
        if self.crop is not None and not 0 < self.crop <= 1:
            raise CheckpointError(
                f"the crop is a share of the image's area, above 0 and up to 1, got {self.crop}"
            )
        if self.chunk is not None and self.chunk < 1:
            raise CheckpointError(f"a chunk is of one action or more, got {self.chunk}")
        if self.bounds is not None and self.bounds not in get_args(Bounds):
            raise CheckpointError(f"bounds must be {' or '.join(get_args(Bounds))}, got {self.bounds!r}")

    def refuse(self, family: str, *names: str) -> None:
        """Refuse choices that a family leaves no room for.

        Raises:
            CheckpointError: one of ``names`` was chosen.
        """
        for name in names:
            if getattr(self, name) != getattr(Choices, name):
                raise CheckpointError(f"{family} leaves no choice of {name}; leave it out")


def choose_cameras(
    given: tuple[str, ...] | None, default: tuple[str, ...], counts: Sequence[int], family: str
) -> tuple[str, ...]:
    """The images the policy reads, by name.

    Raises:
        CheckpointError: the family cannot have that many.
    """
    cameras = default if given is None else tuple(given)
    if len(cameras) not in counts or len(set(cameras)) != len(cameras):
        many = " or ".join(map(str, counts))
        raise CheckpointError(
            f"{family} reads {many} different camera{'s' if counts[-1] > 1 else ''}, "
            f"got {len(cameras)}: {', '.join(cameras)}"
        )
    return cameras
