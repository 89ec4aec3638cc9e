"""What happens before and after the model: pixels and tokens in, robot units out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from sqap.errors import InputError, panics_raise
from sqap.models.config import VisionConfig


@dataclass(frozen=True)
class ActionStatistics:
    """How normalised actions become robot units, per action dimension.

    ``low`` and ``high`` are what -1 and 1 stand for: the training data's 1st and 99th percentiles, or its
    extremes; where ``mask`` is false the normalised value is the action. Dimensions in ``binarize`` (a
    gripper) become 0 or 1 at 0.5 *before* the rest, as in CogACT. ``clip`` cuts normalised actions to [-1, 1]
    first.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]
    binarize: tuple[int, ...] = ()
    clip: bool = True


@dataclass(frozen=True)
class ProprioStatistics:
    """How the robot's state is normalised, per dimension; where ``mask`` is false it is taken as it is."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    mask: tuple[bool, ...]


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
    """``(horizon, action_dim)`` in [-1, 1] to robot units: ``0.5 (a + 1)(high - low) + low``."""
    actions = np.clip(actions, -1.0, 1.0) if statistics.clip else actions.copy()
    for dimension in statistics.binarize:
        actions[:, dimension] = actions[:, dimension] >= 0.5
    low, high = np.array(statistics.low), np.array(statistics.high)
    return np.where(statistics.mask, 0.5 * (actions + 1) * (high - low) + low, actions).astype(np.float32)


def normalize_proprio(state: np.ndarray, statistics: ProprioStatistics) -> Tensor:
    """The robot's state ``(proprio_dim,)`` to ``(1, proprio_dim)`` in [-1, 1], as OpenVLA-OFT does.

    Raises:
        InputError: the state is of another length.
    """
    low, high = np.array(statistics.low), np.array(statistics.high)
    if state.shape != low.shape:
        raise InputError(f"the policy reads a state of {len(low)} numbers, got {len(state)}")
    scaled = 2 * (state - low) / (high - low + 1e-8) - 1
    normalised = np.clip(np.where(statistics.mask, scaled, state), -1.0, 1.0)
    return torch.from_numpy(normalised.astype(np.float32))[None]


def pixel_values(image: np.ndarray, config: VisionConfig, crop: float = 1.0) -> Tensor:
    """A uint8 ``(H, W, 3)`` image to ``(1, 3, image_size, image_size)``: resized, then normalised.

    Resizing is PIL's bicubic, to the bit what OpenVLA's processor computes. With ``crop`` below one, the
    central part with that share of the area is then enlarged to the whole (`center_crop`).
    """
    size = (config.image_size, config.image_size)
    image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    if crop < 1:
        image = center_crop(image, crop)
    pixels = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1).div_(255)
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (config.mean, config.std))
    return pixels.sub_(mean).div_(std)[None]


def center_crop(image: np.ndarray, area: float) -> np.ndarray:
    """The central ``area`` of a uint8 ``(size, size, 3)`` image, enlarged to its size.

    Bilinear between pixel centres, corner on corner, as TensorFlow's ``crop_and_resize``: what policies that
    were trained on random crops are shown at work (OpenVLA's fine-tuned ones, OpenVLA-OFT).
    """
    # In 32 bits and in TensorFlow's order of operations, so that the bytes are the same.
    single, size = np.float32, len(image)
    side = np.sqrt(single(area))
    start = (1 - side) / single(2)  # of the part, as a share of the image
    step = (start + side - start) * single(size - 1) / single(size - 1)
    places = start * single(size - 1) + np.arange(size, dtype=single) * step
    below, above = np.floor(places).astype(int), np.ceil(places).astype(int)
    share = places - below.astype(single)
    pixels = image.astype(single) * single(1 / 255)
    columns = pixels[:, below] + (pixels[:, above] - pixels[:, below]) * share[:, None]
    both = columns[below] + (columns[above] - columns[below]) * share[:, None, None]
    out: np.ndarray = (both * single(255.5)).astype(np.uint8)
    return out


def prompt_ids(instruction: str, prompt: str, tokenizer: Tokenizer, append: Sequence[int] = ()) -> Tensor:
    """The instruction, in lower case inside its prompt, as token ids ``(1, tokens)``.

    ``append`` follows, less what of it the prompt ends with already.

    Raises:
        InputError: the tokenizer cannot encode it.
    """
    try:
        with panics_raise():
            ids: list[int] = tokenizer.encode(prompt.format(instruction=instruction.lower())).ids
    except Exception as problem:  # the library raises nothing narrower
        raise InputError(f"the tokenizer cannot encode {instruction!r}: {problem}") from problem
    repeated = next(n for n in range(len(append), -1, -1) if n == 0 or ids[-n:] == list(append[:n]))
    return torch.tensor([[*ids, *append[repeated:]]], dtype=torch.int64, device="cpu")
