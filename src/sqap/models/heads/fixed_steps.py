"""A flow head that stores what depends on the denoising time alone, for its fixed steps.

The linears of pi0.5's adaptive norms are 116 of the expert's 427 M weights, and read nothing but the time:
their outputs in 10 steps are 1.1 M numbers. Of the MLP of action and time in SmolVLA and pi0, the half that
reads the time becomes one bias for each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from sqap.models.heads.flow import FlowHead
from sqap.models.storage import Weights, fill


@torch.inference_mode(False)  # or the weights could never be changed outside of it
@torch.no_grad()
def fix_steps(head: FlowHead, weights: Weights | None = None) -> FlowHead:
    """A head that computes the same at the times of its denoising steps, and nothing at others.

    Its other parameters are those of ``head``, on the meta device where these are.

    Args:
        head: may have parameters on the meta device.
        weights: where these are read from, one linear at a time.
    """
    if head.config.fixed_steps:
        return head
    config = replace(head.config, fixed_steps=True)
    with torch.device("meta"):
        fixed = FlowHead(config, head.decoder_config, head.state_dim).eval().requires_grad_(False)
    made = _modulations(head, weights) if config.adaptive_norms else _time_bias(head, weights)
    found = dict(head.named_parameters()) | made
    fixed.load_state_dict({name: found[name] for name in fixed.state_dict()}, assign=True)
    return fixed


def _modulations(head: FlowHead, weights: Weights | None) -> dict[str, Tensor]:
    """Scale, shift and gate of every adaptive norm in every step, ``(steps, 3 * width)``."""
    found = {}
    with _read(head, ("time_mlp_in", "time_mlp_out"), weights):
        times = head.embedded_times(head.times, head.time_mlp_in.weight.device)
        condition = head.embed_time(times)
    for name, norm in head.adaptive_norms().items():
        with _read(head, (f"{name}.dense",), weights):
            found[f"{name}.modulation"] = norm.modulations(condition)
    return found


def _time_bias(head: FlowHead, weights: Weights | None) -> dict[str, Tensor]:
    """The weight of actions ``(width, width)``, and the bias of every step ``(steps, width)``."""
    width = head.config.width
    with _read(head, ("action_time_mlp_in",), weights):
        linear = head.action_time_mlp_in
        weight, bias = linear.weight.detach(), linear.bias.detach()
        biases = head.embedded_times(head.times, weight.device) @ weight[:, width:].T + bias
        actions = nn.Parameter(weight[:, :width].clone(), requires_grad=False)
    return {"action_time_mlp_in.weight": actions, "action_time_bias": biases}


@contextmanager
def _read(head: FlowHead, names: tuple[str, ...], weights: Weights | None) -> Iterator[None]:
    """Some of the head's linears in 32 bits; afterwards they are as they were."""
    linears = {name: head.get_submodule(name) for name in names}
    before = {name: dict(linear.named_parameters()) for name, linear in linears.items()}
    for name, linear in linears.items():
        if weights is not None:
            fill(linear, weights, prefix=f"head.{name}.", dtype=torch.float32)
        wide = {
            key: nn.Parameter(x.detach().float(), requires_grad=False) for key, x in linear.named_parameters()
        }
        linear.load_state_dict(wide, assign=True)
    try:
        yield
    finally:
        for name, linear in linears.items():
            linear.load_state_dict(before[name], assign=True)
