"""The training loss of a flow head: the error of its velocity on the way from noise to actions."""

from __future__ import annotations

import torch
from torch import Tensor

from sqap.models.decoder import rope_angles
from sqap.models.heads.flow import FlowHead, embedded_times
from sqap.models.heads.velocity import Condition, ExpertPass, FlowInputs, Suffix
from sqap.models.layout import Layout

# Times as SmolVLA and pi0 draw them: from Beta(1.5, 1), which favours noise, and never quite 0.
BETA, EARLIEST = 1.5, 1e-3


def flow_loss(head: FlowHead, actions: Tensor, inputs: FlowInputs, draws: int = 1) -> Tensor:
    """Mean squared error of the velocity at points between noise, time 1, and ``actions``, time 0.

    All draws of an observation go through the expert as one sequence, in which none sees another: what they
    read, the keys and values of the decoder, is computed once.

    Args:
        head: with an MLP of action and time, and the weights that compute it.
        actions: normalised, ``(batch, horizon, action_dim)``.
        inputs: what the head is given for the observations; their noise is not read.
        draws: points for each observation, of a time and a noise of their own.

    Raises:
        ValueError: the head has adaptive norms, or what depends on the time is stored for fixed steps.
    """
    if head.config.adaptive_norms or head.config.fixed_steps:
        raise ValueError(
            "the loss is for a head that joins the time to actions by an MLP, and not compressed"
        )
    noise = torch.randn(len(actions), draws, *actions.shape[1:], device=actions.device)
    times = draw_times(noise.shape[:2], actions.device)
    wanted = noise - actions[:, None]
    x = (actions[:, None] + times[..., None, None] * wanted).flatten(1, 2)
    predicted = _velocity(head, inputs, x, times)
    return (predicted.float() - wanted.flatten(1, 2)).square().mean()


def draw_times(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Times between 0 and 1, of which `BETA` says how they are distributed."""
    drawn = torch.rand(shape, dtype=torch.float32, device=device) ** (1 / BETA)  # inverse of t ** BETA
    return drawn * (1 - EARLIEST) + EARLIEST


def _velocity(head: FlowHead, inputs: FlowInputs, x: Tensor, times: Tensor) -> Tensor:
    """Velocities at ``x`` ``(batch, draws * horizon, action_dim)`` and ``times`` ``(batch, draws)``."""
    draws = times.shape[1]
    embedded = embedded_times(times, head.config).to(head.like)
    condition = Condition(embedded.repeat_interleave(head.config.horizon, dim=1))
    suffix = _repeated(head, inputs.layout, draws)
    given = ExpertPass(head.tokens(x, inputs.state, condition), inputs, x, condition, suffix)
    for layer in head.experts:
        given = given.advance(layer)
    return head.finish(given)


def _repeated(head: FlowHead, layout: Layout, draws: int) -> Suffix:
    """The expert's tokens with ``draws`` chunks of actions, all of them at the places of one."""
    mask, horizon = layout.expert.mask(), head.config.horizon
    states = layout.expert.length - horizon
    place = torch.cat([torch.arange(states), (states + torch.arange(horizon)).repeat(draws)])
    draw = torch.cat([torch.full((states,), -1), torch.arange(draws).repeat_interleave(horizon)])
    alike = (draw[:, None] == draw) | (draw == -1)
    like = head.like
    ropes = [
        rope_angles((first + place)[None].to(like.device), head.decoder_config, like.dtype)
        for first in (layout.decoder.length, 0)
    ]
    return Suffix((mask[place][:, place] & alike).to(like.device), (ropes[0], ropes[1]))
