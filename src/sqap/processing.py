"""What happens before and after the model: pixels and tokens in, robot units out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from sqap.models.config import VisionConfig


@dataclass(frozen=True)
class ActionStatistics:
    """How normalised actions become robot units, per action dimension.

    ``q01`` and ``q99`` are the training data's percentiles; where ``mask`` is false the normalised value
    is the action. Dimensions in ``binarize`` (a gripper) become 0 or 1 at 0.5 *before* the rest, as in
    CogACT.
    """

    q01: tuple[float, ...]
    q99: tuple[float, ...]
    mask: tuple[bool, ...]
    binarize: tuple[int, ...] = ()


@dataclass(frozen=True)
class ActionUnits:
    """What an action's dimensions mean on the robot.

    ``translation`` names the dimensions that displace the gripper, by ``millimetres`` per unit; ``gripper``
    the one that opens and closes it, which changes its mind at ``gripper_threshold``.
    """

    translation: tuple[int, ...]
    millimetres: float
    gripper: int | None = None
    gripper_threshold: float = 0.0


def unnormalize(actions: np.ndarray, statistics: ActionStatistics) -> np.ndarray:
    """``(horizon, action_dim)`` in [-1, 1] to robot units: ``0.5 (a + 1)(q99 - q01) + q01``."""
    actions = np.clip(actions, -1.0, 1.0)
    for dimension in statistics.binarize:
        actions[:, dimension] = actions[:, dimension] >= 0.5
    low, high = np.array(statistics.q01), np.array(statistics.q99)
    return np.where(statistics.mask, 0.5 * (actions + 1) * (high - low) + low, actions).astype(np.float32)


def pixel_values(image: np.ndarray, config: VisionConfig) -> Tensor:
    """A uint8 ``(H, W, 3)`` image to ``(1, 3, image_size, image_size)``: resized, then normalised."""
    size = (config.image_size, config.image_size)
    if image.shape[:2] != size:
        image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    pixels = torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor(config.mean), torch.tensor(config.std)
    return ((pixels - mean[:, None, None]) / std[:, None, None])[None]


def prompt_ids(instruction: str, prompt: str, tokenizer: Tokenizer) -> Tensor:
    """The instruction, in lower case inside its prompt, as token ids ``(1, tokens)``."""
    encoding = tokenizer.encode(prompt.format(instruction=instruction.lower().strip()))
    return torch.tensor([encoding.ids])
