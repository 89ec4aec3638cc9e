"""Orthonormal Hadamard matrices of the widths that decoders have, and fast products with them.

Sylvester's construction gives the powers of two. Paley's two constructions (1933) give matrices around a
prime, of order 12, 20, 28, 36, 44 and so on. The Kronecker product of such a *core* with one of Sylvester's
is orthonormal again: 8960 = 140 * 64 has one, although no power of two above 256 divides it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sqap.errors import InputError

# Radix-16 butterflies are small matrix products: on CPUs four times as fast as radix 2, and as one big one.
RADIX = 16
# Up to here one matrix is faster than its factors: 64 taken as 16 * 4 takes four times as long.
WHOLE = 64
# A core costs its order in multiplications per value; the largest that a known decoder has is 148 (18944).
LARGEST_CORE = 150
# Where matrices are made before they are rounded to the type they are used in.
EXACT: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def largest_block(width: int) -> int:
    """The largest power of two that divides ``width``: 11008 = 43 * 256 gives 256."""
    return width & -width


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """Multiply each ``block`` of ``x`` ``(..., width)`` by the orthonormal Sylvester-Hadamard matrix.

    Symmetric, hence its own inverse. O(width log block), in the type of ``x``.

    Raises:
        InputError: ``block`` is not a power of two, or does not divide ``width``.
    """
    if block < 1 or largest_block(block) != block or x.shape[-1] % block:
        raise InputError(f"a Hadamard block must be a power of two that divides {x.shape[-1]}, got {block}")
    if block == 1:
        return x
    done = block if block <= WHOLE else RADIX
    y = x.reshape(-1, done) @ _sylvester(done, x.dtype, x.device)
    while done < block:  # H of size a * b is the Kronecker product of those of size a and b
        radix = min(RADIX, block // done)
        y = _sylvester(radix, x.dtype, x.device) @ y.view(-1, radix, done)
        done *= radix
    return y.view(x.shape)


@dataclass(frozen=True)
class Hadamard:
    """Multiplies each ``block`` values of a row by one orthonormal matrix H; `of` finds the largest there is.

    H is the Kronecker product of a core and Sylvester's matrix; with a core it need not be symmetric.

    Args:
        block: size of H.
        core: order of the core, or 1; what is left of the block is a power of two.
    """

    block: int
    core: int = 1

    @classmethod
    def of(cls, width: int) -> Hadamard:
        """One matrix for all of ``width``; where none has a core that is small enough, `largest_block`."""
        rest = largest_block(width)
        if rest == width:
            return cls(width)
        while rest and not _has_core(width // rest):
            rest //= 2
        return cls(width, width // rest) if rest else cls(largest_block(width))

    def apply(self, x: Tensor) -> Tensor:
        """Rows ``(..., width)`` times H, in the type of ``x``; O(width (core + log block)).

        Raises:
            InputError: ``width`` is no multiple of the block.
        """
        return self._multiply(x, transposed=False)

    def inverse(self, x: Tensor) -> Tensor:
        """Rows ``(..., width)`` times the transpose of H, which undoes `apply`.

        Raises:
            InputError: ``width`` is no multiple of the block.
        """
        return self._multiply(x, transposed=True)

    def _multiply(self, x: Tensor, *, transposed: bool) -> Tensor:
        if x.shape[-1] % self.block:
            raise InputError(f"a Hadamard matrix of size {self.block} does not divide rows of {x.shape[-1]}")
        y = block_hadamard(x, self.block // self.core)
        if self.core == 1:
            return y
        core = _core(self.core, x.dtype, x.device)
        y = y.reshape(-1, self.core, self.block // self.core)
        return ((core if transposed else core.T) @ y).view(x.shape)


def random_signs(width: int, seed: int) -> Tensor:
    """Fair signs, +1 or -1, ``(width,)`` int8: the same for a seed on every machine, in every release.

    Not PyTorch's generator, which promises neither; of NumPy's, the raw bits, which promise both.
    """
    bits = np.random.Philox(key=seed).random_raw(width) >> np.uint64(63)
    return torch.from_numpy(1 - 2 * bits.astype(np.int8))


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # a matrix made inside inference mode could never be used outside it
def _sylvester(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = torch.ones(1, 1, **EXACT)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(size)).to(device, dtype)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _core(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    matrix = _paley_first(order - 1) if _is_prime(order - 1) else _paley_second(order // 2 - 1)
    return (matrix / math.sqrt(order)).to(device, dtype)


def _has_core(order: int) -> bool:
    """Whether one of Paley's constructions, with integers modulo a prime, gives a matrix of this order."""
    if order > LARGEST_CORE or order % 4:
        return False
    return _is_prime(order - 1) or (order % 8 == 4 and _is_prime(order // 2 - 1))


def _paley_first(q: int) -> Tensor:
    """Order q + 1, for a prime q with remainder 3 modulo 4."""
    matrix = _residues(q)
    matrix[1:, 0] = -1
    return matrix + torch.eye(q + 1, **EXACT)


def _paley_second(q: int) -> Tensor:
    """Order 2 (q + 1), for a prime q with remainder 1 modulo 4."""
    off = torch.tensor([[1, 1], [1, -1]], **EXACT)
    diagonal = torch.tensor([[1, -1], [-1, -1]], **EXACT)
    return torch.kron(_residues(q), off) + torch.kron(torch.eye(q + 1, **EXACT), diagonal)


def _residues(q: int) -> Tensor:
    """+1 where i - j is a square modulo q, -1 where not, 0 where zero; bordered with ones and a 0."""
    index = torch.arange(q, dtype=torch.int64, device="cpu")
    character = torch.full((q,), -1, **EXACT)
    character[index.square() % q] = 1
    character[0] = 0
    matrix = torch.ones(q + 1, q + 1, **EXACT)
    matrix[0, 0] = 0
    matrix[1:, 1:] = character[(index[:, None] - index) % q]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
