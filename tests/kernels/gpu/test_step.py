"""A whole step of every family by the GPU backend, on a device that computes nothing ("meta").

What runs there can be captured: asking for a value raises, and so does an operator that takes tensors of two
devices. The Triton programs are counted instead of run.
"""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="Triton is there for Linux alone")

from sqap import kernels
from sqap.kernels import Grids
from sqap.kernels.gpu import GpuBackend, layer, linear
from sqap.models import VLA
from sqap.pruning import Draws, Selector, StepPruner
from sqap.pruning.attention import score_queries
from sqap.pruning.lookahead import layers_to_look_at
from sqap.quantization import quantize_model
from sqap.recipe import Cut, Pruning, Quantization, Scheme
from tests.families import FAMILIES, family_config, random_inputs, random_model

META = torch.device("meta")
# Operators of PyTorch and programs of Triton in a step: what there are, and a tenth more.
MOST = {
    "diffusion": (1365, 273),
    "tokens": (1042, 209),
    "regression": (729, 114),
    "flow": (2446, 519),
    "pi0": (2547, 547),
    "pi0.5": (2229, 501),
}


class Programs:
    """Stands for `sqap.kernels.gpu.programs`: checks the arguments, and counts."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        programs = self

        class Program:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                def run(*arguments: Any, **constants: Any) -> None:
                    tensors = [x for x in arguments if isinstance(x, Tensor)]
                    assert all(x.is_meta and (x.is_contiguous() or name == "place") for x in tensors)
                    assert all(0 < blocks < 1 << 16 or i == 0 for i, blocks in enumerate(grid))
                    programs.ran[name] += 1

                return run

        return Program()


class Watch(TorchDispatchMode):
    """Counts operators, and refuses those of two devices."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        devices = {x.device for x in tensors if x.dim()}
        assert len(devices) < 2, f"{func} has tensors on {devices}"  # a schedule is a constant of the CPU
        return out


class Fake(GpuBackend):
    def fits(self, device: torch.device, grids: Grids) -> bool:
        return device == META


def run(family: str, quantized: VLA) -> int:
    """Operators of a step that is pruned twice."""
    config = family_config(family)
    settings = Pruning(0.75, 1, ring_share=0.2, later=(Cut(2, 0.25),))
    settings = replace(settings, score_queries=score_queries(settings, config))
    selector = Selector(settings, config.grid, layers=layers_to_look_at(settings, config.decoder))
    targets = [(0.4, 0.6)] * config.cameras
    order = torch.empty(16, dtype=torch.int64, device=META)
    draws = [[Draws(order, order, order.bool())] * config.cameras] * 2
    length = config.layout(5).blocks[0].stop
    moved, inputs = deepcopy(quantized).to(META), random_inputs(config, 1).to(lambda x: x.to(META))

    def step() -> StepPruner:
        pruner = StepPruner(selector, length, config.visual, targets, None, None, META, draws)
        assert moved(inputs, pruner).shape == (1, horizon, config.head.action_dim)
        return pruner

    horizon, watch = 1 if family == "tokens" else config.head.horizon, Watch()
    with torch.inference_mode():
        step()  # makes Hadamard matrices, as warming up does
        with watch:
            pruner = step()
    assert len(pruner.selections) == config.cameras
    return watch.count


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_stays_on_the_device(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized = quantize_model(random_model(family_config(family)), Quantization(*[Scheme(4, 8)] * 4))
    operators = run(family, quantized)
    programs = Programs()
    monkeypatch.setattr(kernels, "BACKENDS", [Fake(), *kernels.BACKENDS])
    monkeypatch.setattr(linear, "programs", programs)
    monkeypatch.setattr(layer, "programs", programs)
    found = run(family, quantized)
    print(family, operators, found, programs.ran)
    programs.ran.subtract({name: count // 2 for name, count in programs.ran.items()})
    most, launched = MOST[family]
    assert found <= most < operators
    assert sum(programs.ran.values()) <= launched
    assert programs.ran["product"] > programs.ran["norm_quantize"] > 0
    assert programs.ran["activation_quantize"] > 0
