"""The sampler against a plain transcription of the published equations, in 64-bit numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from sqap.models.heads.ddim import add_noise, cosine_alpha_bar, ddim_sample


def f(t: float, steps: int) -> float:
    """Nichol & Dhariwal 2021, eq. 17: the curve, with s = 0.008."""
    s = 0.008
    return float(np.cos((t / steps + s) / (1 + s) * np.pi / 2) ** 2)


def published_schedule(steps: int) -> np.ndarray:
    """Products of 1 - beta_t with beta_t = min(1 - alpha_bar(t) / alpha_bar(t - 1), 0.999)."""
    alpha_bar, product = [], 1.0
    for t in range(1, steps + 1):
        beta = min(1 - (f(t, steps) / f(0, steps)) / (f(t - 1, steps) / f(0, steps)), 0.999)
        product *= 1 - beta
        alpha_bar.append(product)
    return np.array(alpha_bar)


def published_ddim(
    predict: Callable[[np.ndarray, int], np.ndarray], x: np.ndarray, alpha_bar: np.ndarray, taus: list[int]
) -> np.ndarray:
    """Song et al. 2021, eq. 12 with sigma = 0, down the steps ``taus``; before the first, alpha is 1."""
    for i in range(len(taus) - 1, -1, -1):
        a, before = alpha_bar[taus[i]], (alpha_bar[taus[i - 1]] if i > 0 else 1.0)
        e = predict(x, taus[i])
        predicted_x0 = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
        direction = np.sqrt(1 - before) * e
        x = np.sqrt(before) * predicted_x0 + direction
    return x


@pytest.mark.parametrize("steps", [10, 100, 1000])
def test_schedule_is_the_published_one(steps: int) -> None:
    ours = cosine_alpha_bar(steps).numpy()

    assert ours.dtype == np.float64
    np.testing.assert_allclose(ours, published_schedule(steps), rtol=1e-12)
    # Where no beta is capped, products telescope into the curve itself.
    middle = steps // 2
    np.testing.assert_allclose(ours[middle - 1], f(middle, steps) / f(0, steps), rtol=1e-12)
    assert (np.diff(ours) < 0).all()
    assert ours[-1] > 0


def test_sampling_is_the_published_one() -> None:
    noise = np.random.default_rng(0).standard_normal((3, 8, 4))
    alpha_bar = cosine_alpha_bar(100)

    def predict(x: Tensor, t: int) -> Tensor:
        return torch.tanh(1.3 * x) + 0.01 * t * torch.cos(x.flip(-1))

    ours = ddim_sample(predict, torch.from_numpy(noise), alpha_bar, 10)

    expected = published_ddim(
        lambda x, t: np.tanh(1.3 * x) + 0.01 * t * np.cos(x[..., ::-1]),
        noise,
        published_schedule(100),
        list(range(0, 100, 10)),
    )
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("train", "sample", "expected"),
    [
        (100, 10, [90, 80, 70, 60, 50, 40, 30, 20, 10, 0]),
        (100, 4, [75, 50, 25, 0]),
        (100, 1, [0]),
        (5, 5, [4, 3, 2, 1, 0]),
    ],
)
def test_steps_are_evenly_spaced_from_zero(train: int, sample: int, expected: list[int]) -> None:
    seen: list[int] = []

    def predict(x: Tensor, t: int) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    ddim_sample(predict, torch.zeros(2, 1, 1), cosine_alpha_bar(train), sample)

    assert seen == expected


def test_sampling_recovers_what_a_perfect_network_knows() -> None:
    clean = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4)
    alpha_bar = cosine_alpha_bar(100)
    noise = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def predict(x: Tensor, t: int) -> Tensor:
        a = alpha_bar[t]
        return (x - a.sqrt() * clean) / (1 - a).sqrt()

    torch.testing.assert_close(ddim_sample(predict, noise, alpha_bar, 10), clean)


def test_noise_is_added_per_sample() -> None:
    alpha_bar = torch.tensor([0.81, 0.36], dtype=torch.float64)
    clean, noise = torch.full((2, 2, 1), 10.0), torch.full((2, 2, 1), 2.0)

    noisy = add_noise(clean, noise, torch.tensor([0, 1]), alpha_bar)

    expected = torch.tensor([9 + 2 * 0.19**0.5, 6 + 2 * 0.64**0.5]).view(2, 1, 1).expand(2, 2, 1)
    torch.testing.assert_close(noisy, expected)
