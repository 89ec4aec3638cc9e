"""Policy steps as CUDA graphs: captured once for each shape of inputs, then replayed.

A step of a 7B policy is one to three thousand kernels, and PyTorch takes several microseconds of a CPU to
launch one: on fast GPUs longer than the kernel runs. A CUDA graph launches all of them at once. It replays
the same kernels on the same memory, so everything that differs between two steps is copied into static
buffers first, and nothing in between may ask the GPU for a value or have a shape that depends on one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

# Runs the kernels of a captured function again; its results are in the tensors it returned then.
Replay = Callable[[], None]
Capture = Callable[[Callable[[], Any]], tuple[Any, Replay]]

MOST = 4  # captured steps that are kept; each has the memory of its intermediate results
WARMUPS = 2  # Triton compiles and libraries set themselves up, which cannot be captured
running = threading.Lock()  # one step at a time: a graph has one set of buffers


class Feed:
    """Static buffers that a captured step reads. Called with a step's tensors in the same order each time.

    Args:
        device: of the buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._next = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The buffer, filled with what is in ``tensor``, without waiting for the device."""
        if self._next == len(self._pairs):
            self._pairs.append(self._made(tensor))
        staged, buffer = self._pairs[self._next]
        self._next += 1
        if not tensor.is_cuda:
            staged.copy_(tensor)
            tensor = staged
        buffer.copy_(tensor, non_blocking=True)
        return buffer

    def rewind(self) -> None:
        """Begin again at the first buffer."""
        self._next = 0

    def _made(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Page-locked memory, which is copied from while the CPU goes on, and the buffer."""
        pinned = self.device.type == "cuda"
        staged = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        return staged, torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)


class Graphs:
    """The captured steps of one policy; those used last are kept, at most `MOST`.

    A copy of it is empty.

    Args:
        device: that the policy is on.
        capture: makes a graph of a function.
    """

    def __init__(self, device: torch.device, capture: Capture | None = None) -> None:
        self.device, self._capture = device, capture or capture_cuda
        self._steps: OrderedDict[Hashable, tuple[Feed, Any, Replay | None]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.device,)

    def __len__(self) -> int:
        return len(self._steps)

    def run(self, key: Hashable, place: Callable[[Feed], Callable[[], Any]]) -> Any:
        """What a step returns; its tensors are overwritten by the next step with this ``key``.

        Args:
            key: names all shapes of the step's inputs.
            place: puts the inputs into a feed, and returns the function to be captured.
        """
        feed, found, replay = self._steps.pop(key, (Feed(self.device), None, None))
        feed.rewind()
        function = place(feed)
        if replay is None:
            found, replay = self._capture(function)
        replay()
        self._steps[key] = feed, found, replay
        if len(self._steps) > MOST:
            self._steps.popitem(last=False)
        return found


def capture_cuda(function: Callable[[], Any]) -> tuple[Any, Replay]:
    """A CUDA graph of ``function``, which is run a few times before."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    return found, graph.replay


def fetch(tensors: list[Tensor]) -> list[Tensor]:
    """Copies on the CPU; the device is waited for once."""
    copies = [
        torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda).copy_(
            tensor, non_blocking=tensor.is_cuda
        )
        for tensor in tensors
    ]
    if any(tensor.is_cuda for tensor in tensors):
        torch.cuda.current_stream().synchronize()
    return copies
