"""The order of a policy's tokens, and which of them attend to which. Nothing else knows it.

    CogACT, OpenVLA    bos visual [state] text                         one causal block
    OpenVLA-OFT        bos visual [state] text actions end             one block, everyone sees everyone
    SmolVLA            visual text | state || actions                  || actions see those before them
    pi0                visual text || state | actions
    pi0.5              visual text || actions                          the state is in the text

A bar begins a new block: a token sees the tokens of its own block and of all blocks before it. Behind the
double bar an action expert runs, which reads the keys and values of the decoder's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

SegmentName = Literal["bos", "visual", "state", "text", "actions", "end"]


@dataclass(frozen=True)
class Segment:
    """Adjacent tokens of one kind.

    Args:
        name: their kind.
        length: how many.
        block: they see the tokens of blocks up to this one.
        causal: inside their block they see those before them alone.
        expert: the action expert runs them, not the decoder.
    """

    name: SegmentName
    length: int
    block: int = 0
    causal: bool = False
    expert: bool = False


@dataclass(frozen=True)
class Layout:
    """Segments in the order of their tokens; blocks ascend."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        for before, after in pairwise(self.segments):
            if after.block < before.block or after.expert < before.expert:
                raise ValueError(f"segment {after.name!r} cannot come behind {before.name!r}")

    @property
    def length(self) -> int:
        """Tokens in all."""
        return sum(segment.length for segment in self.segments)

    @property
    def decoder(self) -> Layout:
        """The part that the decoder runs."""
        return Layout(tuple(segment for segment in self.segments if not segment.expert))

    @property
    def expert(self) -> Layout:
        """The part that the action expert runs."""
        return Layout(tuple(segment for segment in self.segments if segment.expert))

    def span(self, name: SegmentName) -> slice:
        """Where a segment's tokens are.

        Raises:
            KeyError: there is no such segment.
        """
        start = 0
        for segment in self.segments:
            if segment.name == name:
                return slice(start, start + segment.length)
            start += segment.length
        raise KeyError(name)

    def from_end(self, name: SegmentName) -> slice:
        """`span`, counted from the end of the decoder's tokens: it holds when earlier ones are dropped."""
        span, length = self.span(name), self.decoder.length
        return slice(span.start - length, span.stop - length)

    @property
    def blocks(self) -> tuple[slice, ...]:
        """Where each block's tokens are."""
        found: dict[int, slice] = {}
        start = 0
        for segment in self.segments:
            first = found.get(segment.block, slice(start, start)).start
            start += segment.length
            found[segment.block] = slice(first, start)
        return tuple(found.values())

    def mask(self) -> Tensor:
        """``(tokens, tokens)``: true where a token (row) sees another (column)."""
        lengths = torch.tensor([segment.length for segment in self.segments], device="cpu")
        block = torch.tensor([s.block for s in self.segments], device="cpu").repeat_interleave(lengths)
        causal = torch.tensor([s.causal for s in self.segments], device="cpu").repeat_interleave(lengths)
        place = torch.arange(self.length, dtype=torch.int64, device="cpu")
        own = (block[:, None] == block) & (~causal[:, None] | (place[:, None] >= place))
        return own | (block[:, None] > block)
