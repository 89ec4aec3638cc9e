"""What a caller may have set in PyTorch for code of his own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


SETTINGS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "bfloat16": partial(default_dtype, torch.bfloat16),
    "float16": partial(default_dtype, torch.float16),
    "float64": partial(default_dtype, torch.float64),
    "device": default_device,
    "autocast": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
}
