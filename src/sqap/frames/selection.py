"""Which frames to take when there are more than are wanted: evenly spread, and always the same ones."""

from __future__ import annotations

from collections.abc import Sequence

# 2^32 times the golden ratio: the multiples of it, modulo 2^32, are spread evenly however many there are.
_GOLDEN, _ONE = 0x9E3779B9, 2**32


def spread(total: int, count: int) -> list[int]:
    """At most ``count`` indices below ``total``, ascending: the middles of equal stretches."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def deal(capacities: Sequence[int], count: int) -> list[int]:
    """How many each gets when ``count`` are dealt out one at a time, none more than its capacity.

    The last round, if it does not go round, goes to evenly spread ones.
    """
    shares = [0] * len(capacities)
    while count > 0:
        open_ones = [i for i, capacity in enumerate(capacities) if shares[i] < capacity]
        if not open_ones:
            break
        for i in spread(len(open_ones), count):
            shares[open_ones[i]] += 1
        count -= len(open_ones)
    return shares


def looks(length: int, count: int, episode: int) -> list[int]:
    """``count`` evenly spaced frames, ascending, of an episode of ``length >= count`` frames.

    Each episode starts at another phase, so that one look at each of many still shows every stage of
    the work.
    """
    phase = (episode * _GOLDEN + _ONE // 2) % _ONE
    return [(i * _ONE + phase) * length // (count * _ONE) for i in range(count)]
