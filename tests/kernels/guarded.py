"""Arrays before pages that cannot be touched, for tests that run in a process of their own."""

from __future__ import annotations

import ctypes
import mmap

from torch import Tensor, frombuffer

_LIBC, _PAGE = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
_KEPT: list[mmap.mmap] = []


def guarded(tensor: Tensor) -> Tensor:
    """A copy whose bytes end where a page begins that can be neither read nor written."""
    size = tensor.numel() * tensor.element_size()
    whole = (size + _PAGE - 1) // _PAGE * _PAGE
    area = mmap.mmap(-1, whole + _PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert _LIBC.mprotect(ctypes.c_void_p(start + whole), _PAGE, 0) == 0
    _KEPT.append(area)
    copy = frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=whole - size)
    return copy.view(tensor.shape).copy_(tensor)
