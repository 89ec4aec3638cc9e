"""The memory a policy needs on a GPU, counted without one: python benchmarks/gpu_memory.py --json PATH

Tensors are on PyTorch's "meta" device: they have sizes, but no memory, and nothing is computed. Counted are
the bytes of all tensors that live there at the same time: while a policy of a published size is moved there,
as it is stored, and in a step by the GPU's layers, whose Triton programs are left out. Attention counts as
PyTorch's fused kernels do, without a matrix of scores. bfloat16 is the same policy in PyTorch, unpruned.

Not counted: CUDA's context, what an allocator loses between blocks, and the libraries' workspaces.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sqap import kernels
from sqap.benchmark.candidates import example, unpruned, weight_bytes
from sqap.benchmark.shapes import SHAPES, shaped_policy
from sqap.files import write_json
from sqap.kernels import Grids
from sqap.kernels.gpu import GpuBackend
from sqap.models import ModelConfig
from sqap.models.storage import size
from sqap.policy import Policy
from sqap.recipe import Recipe

DEVICE = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Counts what lives on ``device`` of the tensors that are made meanwhile.

    Attributes:
        now: bytes.
        peak: the most that there were at once.
    """

    def __init__(self, device: torch.device = DEVICE) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device, self._seen = device, weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device == self._device:
                self._hold(x.untyped_storage(), known)
        return out

    def _hold(self, storage: Any, known: set[int]) -> None:
        if storage in self._seen or id(storage) in known:  # a view, or what was there before
            return
        self._seen.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, storage.nbytes())

    def _release(self, nbytes: int) -> None:
        self.now -= nbytes


class OnPaper(GpuBackend):
    """Takes the meta device for a GPU."""

    def fits(self, device: torch.device, grids: Grids) -> bool:
        return device == DEVICE


class Nothing:
    """Triton programs that are not run: their results are tensors that are there before."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: None


def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    """The memory of a fused attention: its result, and while it runs a sum for each row."""
    q.new_empty(q.shape[:-1], dtype=torch.float32)
    return q.new_empty(*q.shape[:-1], v.shape[-1])


@contextmanager
def on_paper() -> Iterator[None]:
    """Let the GPU's layers run on the meta device."""
    from sqap.kernels.gpu import layer, linear

    with (
        mock.patch.object(kernels, "BACKENDS", [OnPaper(), *kernels.BACKENDS]),
        mock.patch.object(linear, "programs", Nothing()),
        mock.patch.object(layer, "programs", Nothing()),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
    ):
        yield


def hollow(module: nn.Module, name: str, like: Tensor) -> Tensor:
    """A weight of one value in memory, in the type that it is stored in."""
    stored = torch.bfloat16 if isinstance(like, nn.Parameter) else like.dtype
    return torch.zeros((), dtype=stored).expand(like.shape)


def moved(policy: Policy) -> int:
    """The most bytes that lived on the device while ``policy`` was moved there."""
    with LiveBytes() as live:
        policy.to(DEVICE)
    return live.peak


def step_bytes(policy: Policy) -> int:
    """The most bytes beside the weights in a step of a policy on the meta device, its inputs included."""
    observation = example(policy)
    with on_paper(), torch.inference_mode(), LiveBytes() as live:
        given = policy._prepare(observation, 0, None).to(policy._place)
        policy._direct([given])  # what is made once and kept is there in the next
        live.peak = live.now
        policy._direct([given])
    return live.peak


def count(model: ModelConfig, recipe: Recipe) -> dict[str, int | float]:
    """Bytes of a policy of this size, compressed and in bfloat16."""
    small = shaped_policy(model, recipe, hollow)
    found: dict[str, int | float] = {"loading": moved(small), "weights": weight_bytes(small)}
    found["step"] = step_bytes(small)
    found["unpruned_step"] = step_bytes(unpruned(small))
    del small
    dense = shaped_policy(model, Recipe(), hollow)
    found["bf16_loading"], found["bf16_weights"] = moved(dense), weight_bytes(dense)
    found["bf16_step"] = step_bytes(dense)
    peak, bf16 = found["weights"] + found["step"], found["bf16_weights"] + found["bf16_step"]
    return found | {
        "peak": peak,
        "bf16_peak": bf16,
        "weights_of_bf16": found["weights"] / found["bf16_weights"],
        "peak_of_bf16": peak / bf16,
    }


COLUMNS = {
    "weights": "weights",
    "while loading": "loading",
    "a step": "step",
    "unpruned": "unpruned_step",
    "peak": "peak",
    "bf16": "bf16_weights",
    "its step": "bf16_step",
    "its peak": "bf16_peak",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="all of them by default")
    arguments, found = parser.parse_args(), {}
    table = Table("shape", *COLUMNS, "weights of bf16", "peak of bf16")
    for shape in arguments.shape or SHAPES:
        found[shape] = row = count(SHAPES[shape], Recipe.w4a8())
        shares = [f"{100 * row[name]:.1f} %" for name in ("weights_of_bf16", "peak_of_bf16")]
        table.add_row(shape, *(size(row[key]) for key in COLUMNS.values()), *shares)
        write_json(arguments.json, {"counted, not measured": found, "torch": torch.__version__})
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
