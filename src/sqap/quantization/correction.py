"""Weights that make up for what quantized layers before them have done to their inputs.

GPTQ makes a layer do with quantized weights what it would with exact ones, on inputs X that are wrong
already. What it should do is what it would on the exact inputs Z. With H = X^T X, the weights that come
nearest to it are W + W (Z - X)^T X H^-1; a share of the way there is best, since calibration inputs are few
(QEP, Arai & Ichikawa 2025; GPTAQ, Li et al. 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sqap.kernels.levels import row_chunks
from sqap.quantization.gptq import TOKENS, Factor


class Correction:
    """X^T (Z - X) W^T of one linear, ``(in, out)``, summed over calibration inputs."""

    def __init__(self, linear: nn.Linear) -> None:
        self._weight = linear.weight.detach()
        self._sum = torch.zeros(self._weight.T.shape, dtype=torch.float32, device=self._weight.device)

    def add(self, x: Tensor, exact: Tensor) -> None:
        """Add inputs ``(..., in)`` as they are and as they should be."""
        size = self._weight.shape[1]
        x, exact = x.reshape(-1, size), exact.reshape(-1, size)
        for tokens in row_chunks(x, TOKENS * size):
            missing = (exact[tokens].float() - x[tokens].float()) @ self._weight.T
            self._sum.addmm_(x[tokens].float().T, missing)

    def weight(self, factor: Factor, share: float) -> Tensor:
        """The weight ``(out, in)`` that goes ``share`` of the way, by the factor of X^T X."""
        return self._weight + share * factor.solve(self._sum).T
