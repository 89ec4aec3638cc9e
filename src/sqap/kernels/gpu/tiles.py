"""How a product is cut into tiles, by its size and the card.

The entries are estimated, none is measured: no GPU has run them. They are tiles that compile without spills,
load four steps ahead and fit the shared memory of the smallest card (99 KB). Nothing is tuned when a policy
is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What one program of `programs.product` computes, and with how much.

    Args:
        tokens, outputs: the tile of the result.
        channels: read in one step of the loop over input channels.
        warps: of 32 threads.
        stages: steps whose loads are in flight.
    """

    tokens: int
    outputs: int
    channels: int
    warps: int = 4
    stages: int = 4


ESTIMATED = Tile(16, 64, 256), Tile(32, 64, 256), Tile(64, 128, 128)
# By the card's major compute capability: for a few tokens, for small results, and for others.
TABLE: dict[int, tuple[Tile, Tile, Tile]] = {8: ESTIMATED, 9: ESTIMATED, 12: ESTIMATED}
FEW, SMALL = 16, 1 << 20  # tokens; values in a result, of which fewer do not occupy a card with large tiles


def choose(tokens: int, outputs: int, major: int) -> Tile:
    """The tile of a product of so many tokens and output channels on a card of this ``major`` capability."""
    few, small, large = TABLE.get(major, ESTIMATED)
    if tokens <= FEW:
        return few
    return small if tokens * outputs < SMALL else large
