"""PyTorch's settings as they are by default, whatever a caller has set for code of his own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def defaults() -> Iterator[None]:
    """Neither autocast nor gradients nor inference mode: the same numbers in tensors that may be changed.

    A default type or device cannot be undone for one thread alone; every tensor that is made says its own.
    """
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        yield
