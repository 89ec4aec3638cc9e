"""From an observation to what the model is given, and to where a pruner's ring is; all on the CPU."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from torch import Tensor

from sqap.config import PolicyConfig
from sqap.errors import InputError
from sqap.models import ModelConfig, ModelInputs
from sqap.observation import Observation, find_camera
from sqap.processing import normalize_state, pixel_values, prompt_ids, window
from sqap.pruning.geometry import project


def prepare(
    observation: Observation, config: PolicyConfig, tokenizer: Tokenizer, generator: torch.Generator
) -> ModelInputs:
    """The model's inputs; floats are float32, whatever the model computes in. See `sqap.Policy.inputs`."""
    head, state = config.model.head, read_state(observation, config)
    told = state[0].numpy() if state is not None and config.prompt.tells_state else None
    ids = prompt_ids(observation.instruction, config.prompt, tokenizer, told)
    _check_ids(ids, config.model)
    noise = None
    if head.noisy:
        shape = 1, head.horizon, head.action_dim
        noise = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return ModelInputs(read_images(observation, config), ids, noise, state if told is None else None)


def read_images(observation: Observation, config: PolicyConfig) -> list[Tensor]:
    """What each vision encoder sees, ``(cameras, 3, size, size)``."""
    names = [find_camera(camera, observation.images) for camera in config.cameras]
    images = [observation.images[name] for name in names if name is not None]
    if len(images) < len(names):
        lacking, wanted = config.cameras[names.index(None)], ", ".join(config.cameras)
        raise InputError(
            f"the policy reads camera {lacking!r}; the observation has {sorted(observation.images)}, and "
            f"the policy's cameras are {wanted}: name the images so, or load the published policy with "
            "the observation's names as its cameras (--cameras)"
        )
    return [torch.cat([pixel_values(image, steps) for image in images]) for steps in config.images]


def read_state(observation: Observation, config: PolicyConfig) -> Tensor | None:
    """The normalised state ``(1, proprio_dim)``; None of policies that read none."""
    if config.state is None:
        return None
    if observation.state is None:
        raise InputError("the policy reads the robot's state; the observation has none")
    return normalize_state(observation.state, config.state)


def find_effector(observation: Observation, camera: str, config: PolicyConfig) -> tuple[float, float] | None:
    """Where the end effector is in what is looked at of a camera's image, if the observation tells."""
    name = find_camera(camera, observation.cameras)
    if name is None or observation.end_effector is None:
        return None
    shape = observation.images[name].shape[:2]
    place = project(observation.cameras[name], observation.end_effector, shape)
    return None if place is None else window(config.images[0], shape).into(place)


def _check_ids(ids: Tensor, config: ModelConfig) -> None:
    """Make sure that the model embeds the token ids ``(1, tokens)``, and has one for either end."""
    highest, least = int(ids.max()) if ids.numel() else 0, config.least_text
    if highest >= config.decoder.vocabulary:
        raise InputError(
            f"the tokenizer makes token {highest} of the instruction, but the model embeds tokens up to "
            f"{config.decoder.vocabulary - 1}"
        )
    if ids.shape[1] < least:
        raise InputError(f"the tokenizer makes {ids.shape[1]} tokens of the instruction; {least} are needed")
