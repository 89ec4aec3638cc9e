"""The diffusion schedule and its deterministic sampler.

Squared-cosine schedule of Nichol & Dhariwal 2021 (eq. 17), DDIM of Song et al. 2021 (eq. 12, eta = 0)
on evenly spaced steps 0, n/k, 2n/k ... as CogACT uses it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def cosine_alpha_bar(train_steps: int) -> Tensor:
    """``(train_steps,)`` float64: the share of signal left after each step, betas capped at 0.999."""
    # On the CPU even where a model is built on the meta device: the schedule is not in any checkpoint.
    t = torch.arange(train_steps + 1, dtype=torch.float64, device="cpu") / train_steps
    curve = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return torch.cumprod(1 - betas, dim=0)


def add_noise(clean: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """The forward process: ``sqrt(a_t) x + sqrt(1 - a_t) noise`` with ``t`` ``(batch,)``."""
    a = alpha_bar.to(clean)[t].view(-1, *[1] * (clean.dim() - 1))
    return a.sqrt() * clean + (1 - a).sqrt() * noise


def ddim_steps(train_steps: int, sample_steps: int) -> range:
    """The training steps that are sampled at, ascending."""
    return range(0, train_steps, train_steps // sample_steps)[:sample_steps]


def ddim_sample(
    predict_noise: Callable[[Tensor, int], Tensor],
    noise: Tensor,
    alpha_bar: Tensor,
    sample_steps: int,
) -> Tensor:
    """Denoise ``noise`` ``(batch, horizon, action_dim)`` in ``sample_steps`` steps, without clipping.

    ``predict_noise(x, t)`` is the network; ``t`` counts the training steps.
    """
    steps, kept = ddim_steps(len(alpha_bar), sample_steps), alpha_bar.tolist()
    x = noise
    for i in reversed(range(len(steps))):
        a, a_next = kept[steps[i]], kept[steps[i - 1]] if i else 1.0
        eps = predict_noise(x, steps[i])
        clean = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        x = math.sqrt(a_next) * clean + math.sqrt(1 - a_next) * eps
    return x
