"""A whole step on the meta device, where no value can be asked for and no shape can depend on one.

What runs there waits for no GPU: `item()`, `cpu()`, `nonzero()` and masks as indices raise.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from sqap.models import VLA
from sqap.pruning import Selector, StepPruner
from sqap.pruning.lookahead import layers_to_look_at
from sqap.pruning.memory import Memory
from sqap.quantization import quantize_model
from sqap.recipe import Cut, Pruning, Quantization, Scheme
from sqap.recipe.pruning import ScoreQueries
from tests.families import EXPERTS, FAMILIES, family_config, random_inputs, random_model

META = torch.device("meta")
SETTINGS = {
    "lookahead": Pruning(0.5, 1),
    "a ring": Pruning(0.5, 1, ring_share=0.2),
    "changed": Pruning(0.5, 1, rest="changed"),
    "sqap": Pruning(0.5, 2, "sqap", score_layers=(0, 1), rest="random"),
    "farthest": Pruning(0.5, 1, "sqap"),
    "attention": Pruning(0.5, 1, "attention", score_queries="last"),
    "random": Pruning(0.5, 1, "random"),
    "uniform": Pruning(0.5, 1, "uniform"),
}
# These choose one token after the other, on the CPU: as tensor operations, so many small steps take longer.
ON_THE_CPU = {
    "divprune": Pruning(0.5, 1, "divprune"),
    "dart": Pruning(0.5, 1, "dart"),
    "cdpruner": Pruning(0.5, 1, "cdpruner"),
}


@cache
def model(family: str, quantized: bool) -> VLA:
    found = random_model(family_config(family))
    if quantized:
        found = quantize_model(found, Quantization(*[Scheme(4, 8)] * 4, sensitive=Scheme(8, 8)))
    return found.to(META)


def run(family: str, quantized: bool, settings: Pruning) -> tuple[Tensor, StepPruner]:
    config = family_config(family)
    visual = torch.empty(config.cameras, 16, config.decoder.width, device=META)
    pruner = StepPruner(
        Selector(settings, config.grid, top_k=3, layers=layers_to_look_at(settings, config.decoder)),
        config.layout(5).blocks[0].stop,
        config.visual,
        [(0.4, 0.6)] * config.cameras,
        torch.Generator().manual_seed(0),
        Memory(visual),
        META,
    )
    return model(family, quantized)(random_inputs(config, 1).to(lambda x: x.to(META)), pruner), pruner


def check(family: str, quantized: bool, settings: Pruning) -> None:
    actions, pruner = run(family, quantized, settings)
    assert actions.is_meta
    assert len(pruner.selections) == family_config(family).cameras
    assert all(selection.mask.is_meta for selection in pruner.selections)


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "w4a8"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_no_step_asks_the_device_for_a_value(family: str, quantized: bool) -> None:
    queries: ScoreQueries = "actions" if family in EXPERTS else "text"
    check(family, quantized, Pruning(0.75, 1, score_queries=queries, later=(Cut(2, 0.25),)))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@torch.inference_mode()
def test_no_criterion_asks_the_device_for_a_value(settings: Pruning) -> None:
    check("regression", False, settings)


@pytest.mark.parametrize("settings", ON_THE_CPU.values(), ids=ON_THE_CPU)
@torch.inference_mode()
def test_what_asks_for_values_is_known(settings: Pruning) -> None:
    """Who makes one of these wait no more moves it up."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        run("diffusion", False, settings)
