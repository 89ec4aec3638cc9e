"""Keys and values: how they are held, and the cache of earlier tokens'."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class KVFormat(Protocol):
    """How keys and values are held for the queries that look at them, with a cache or without one."""

    def store(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The queries for the keys that `load` gives back, and what is held of keys and values.

        All are ``(batch, heads, tokens, ...)``, so that what is held of later tokens can be appended.
        """

    def load(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values ``(batch, kv_heads, tokens, head_dim)`` from what is held of them."""


class FloatKV:
    """Keys and values as they are."""

    def store(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return q, (k, v)

    def load(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v = stored
        return k, v


class KVCache:
    """Keys and values per layer as a `KVFormat` holds them; behind a pruned layer, of kept positions only.

    Args:
        layers: of the decoder.
        room: tokens that can come after a layer's first ones without a copy of these.
    """

    def __init__(self, layers: int, room: int = 0) -> None:
        self._room, self._lengths = room, [0] * layers
        self._buffers: list[tuple[Tensor, ...]] = [()] * layers
        self.next_position = 0

    @property
    def nbytes(self) -> int:
        """Memory taken by all that is stored."""
        return sum(tensor.nbytes for i in range(len(self._buffers)) for tensor in self.stored(i))

    def stored(self, layer: int) -> tuple[Tensor, ...]:
        """What a layer's format holds of all tokens so far."""
        return tuple(buffer[:, :, : self._lengths[layer]] for buffer in self._buffers[layer])

    def extend(self, layer: int, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Append tensors ``(batch, kv_heads, tokens, ...)`` and return all that is stored."""
        room, length = self.reserve(layer, new), self._lengths[layer]
        for place, x in zip(room, new, strict=True):
            if place is not x:
                place[:, :, length:] = x
        self.commit(layer, new[0].shape[2])
        return room

    def reserve(self, layer: int, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """All that is stored, with room behind it for tokens of the shapes and types of ``like``.

        It is ``like`` itself where nothing is stored and nothing can come later. `commit` says that the room
        has been written to; until then nothing new is stored.
        """
        length = self._lengths[layer]
        total = length + like[0].shape[2]
        if not length and not self._room:
            self._buffers[layer] = like
            return like
        if not length or total > self._buffers[layer][0].shape[2]:
            room = total + self._room
            grown = tuple(x.new_empty(*x.shape[:2], room, *x.shape[3:]) for x in like)
            for buffer, old in zip(grown, self.stored(layer), strict=False):
                buffer[:, :, :length] = old
            self._buffers[layer] = grown
        return tuple(buffer[:, :, :total] for buffer in self._buffers[layer])

    def commit(self, layer: int, tokens: int) -> None:
        """Count so many ``tokens`` as stored: those that `reserve` made room for."""
        self._lengths[layer] += tokens
