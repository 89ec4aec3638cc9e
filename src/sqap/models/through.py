"""How the model's stages are run: `VLA.run` walks them in order, and a `Through` runs each.

A stage is as much of a model as is held in 32 bits at once: a block of a vision encoder or of the decoder,
the projector, the head. Acting calls it (`direct`), a model larger than memory loads it first and lets it go
afterwards (`streamed`), quantizing replaces its linears first (`sqap.quantization.sequential`), and
benchmarks time it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sqap.models.storage import Weights, fill

# Takes a stage's name, the stage, states and what runs the stage on one; gives what becomes of the states.
Through = Callable[[str, nn.Module, Sequence[Any], Callable[[Any, Any], Any]], list[Any]]


def direct(name: str, stage: nn.Module, states: Sequence[Any], call: Callable[[Any, Any], Any]) -> list[Any]:
    """Runs a stage as it is."""
    return [call(stage, state) for state in states]


def streamed(weights: Weights | None, dtype: torch.dtype, done: Callable[[], None] | None = None) -> Through:
    """Runs stages in ``dtype``, each in memory only while it runs if its weights have to be read or cast.

    ``done`` is called behind each stage.
    """

    def through(name: str, stage: nn.Module, states: Sequence[Any], call: Callable[..., Any]) -> list[Any]:
        with loaded(name, stage, weights, dtype):
            after = direct(name, stage, states, call)
        if done is not None:
            done()
        return after

    return through


@contextmanager
def loaded(name: str, stage: nn.Module, weights: Weights | None, dtype: torch.dtype) -> Iterator[None]:
    """A stage in ``dtype``: read if it is on the meta device, else cast; afterwards it is as it was."""
    missing = [key for key, parameter in stage.named_parameters() if parameter.is_meta]
    there = [(parameter, parameter.data) for parameter in stage.parameters() if not parameter.is_meta]
    if missing and weights is not None:
        fill(stage, weights, prefix=f"{name}.", dtype=dtype)
    for parameter, data in there:
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in there:
            parameter.data = data
        empty = {key: stage.get_parameter(key).to("meta") for key in missing}
        stage.load_state_dict(empty, assign=True, strict=False)
