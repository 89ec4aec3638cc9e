"""A policy: an observation in, a chunk of actions out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from sqap.errors import InputError
from sqap.models import VLA, ModelConfig
from sqap.observation import Observation
from sqap.processing import ActionStatistics, ActionUnits, pixel_values, prompt_ids, unnormalize
from sqap.pruning.geometry import project
from sqap.pruning.selector import Selection, Selector, StepPruner
from sqap.recipe import Recipe


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy is, apart from its weights.

    Args:
        family: the published policy whose construction this follows, e.g. ``"cogact"``.
        model: sizes of the four parts.
        cameras: names of the images the policy reads, in order.
        actions: how its outputs become robot units.
        prompt: template around the instruction.
        units: what the actions mean, for reports in millimetres; None if that is not known.
    """

    family: str
    model: ModelConfig
    cameras: tuple[str, ...]
    actions: ActionStatistics
    prompt: str = "{instruction}"
    units: ActionUnits | None = None


@dataclass(frozen=True)
class Calibration:
    """What `compress` learned from calibration frames, kept with the compressed policy.

    Args:
        frames: how many observations were used.
        frames_hash: SHA-256 over their pixels and instructions.
        top_k: how many tokens the attention ranking may choose; None if nothing is ranked.
        overlap: mean agreement of the full-precision and the quantized top k at that k.
    """

    frames: int
    frames_hash: str
    top_k: int | None = None
    overlap: float | None = None


@dataclass(frozen=True)
class Step:
    """One policy step: ``chunk`` (horizon, action_dim) in robot units, and what the pruner kept."""

    chunk: np.ndarray
    selection: Selection | None


@dataclass
class Policy:
    """A loaded policy, original or compressed.

    Args:
        model: the network; compressed policies hold packed linears in its decoder.
        config: cameras, prompt, action statistics and sizes.
        tokenizer: instruction to token ids.
        recipe: how it was compressed; an empty one for an original.
        calibration: what compression measured, if it needed frames.
        source: fingerprint of the policy this one was compressed from.
        fingerprint: identifies the directory it was loaded from; None if it was not.
    """

    model: VLA = field(repr=False)
    config: PolicyConfig
    tokenizer: Tokenizer = field(repr=False)
    recipe: Recipe = field(default_factory=Recipe)
    calibration: Calibration | None = None
    source: str | None = None
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        pruning = self.recipe.pruning
        self._selector: Selector | None = None
        if pruning is not None:
            if pruning.after_layer >= self.config.model.decoder.depth:
                raise InputError(
                    f"pruning after layer {pruning.after_layer} would save nothing: "
                    f"the decoder has {self.config.model.decoder.depth} layers"
                )
            pruning.budget(self.config.model.visual_tokens)
            top_k = self.calibration.top_k if self.calibration else None
            self._selector = Selector(pruning, self.config.model.grid, top_k)

    def act(self, observation: Observation, *, seed: int | None = None) -> np.ndarray:
        """The next actions ``(horizon, action_dim)`` float32 in robot units.

        The same seed gives the same diffusion noise, so that policies can be compared in pairs.

        Raises:
            InputError: the observation lacks an image the policy reads.
        """
        return self.step(observation, seed=seed).chunk

    @torch.inference_mode()
    def step(self, observation: Observation, *, seed: int | None = None) -> Step:
        """Like `act`, and tells which visual tokens the decoder kept."""
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        ids, noise, pixels = self.token_ids(observation), self.noise(generator), self.pixels(observation)
        pruner = self._pruner(observation, ids.shape[1], generator)
        actions = self.model(pixels, ids, noise.to(pixels[0]), pruner)
        chunk = unnormalize(actions[0].float().numpy(), self.config.actions)
        return Step(chunk, pruner.selection if pruner is not None else None)

    def token_ids(self, observation: Observation) -> torch.Tensor:
        """The instruction in its prompt, ``(1, text tokens)``."""
        return prompt_ids(observation.instruction, self.config.prompt, self.tokenizer)

    def noise(self, generator: torch.Generator) -> torch.Tensor:
        """Where the diffusion head starts from, ``(1, horizon, action_dim)``."""
        head = self.config.model.head
        return torch.randn(1, head.horizon, head.action_dim, generator=generator)

    def pixels(self, observation: Observation) -> list[torch.Tensor]:
        """The model's view of an observation, one ``(1, 3, size, size)`` tensor per vision encoder."""
        (camera,) = self.config.cameras
        if camera not in observation.images:
            raise InputError(
                f"the policy reads camera {camera!r}; the observation has {sorted(observation.images)}"
            )
        dtype = self.model.decoder.embed_tokens.weight.dtype
        return [
            pixel_values(observation.images[camera], vision).to(dtype) for vision in self.config.model.vision
        ]

    def save(self, directory: str | Path) -> None:
        """Write the policy, whole or not at all; see `sqap.checkpoints.native`."""
        from sqap.checkpoints.native import save_policy

        save_policy(self, Path(directory))

    def _pruner(
        self, observation: Observation, text_tokens: int, generator: torch.Generator
    ) -> StepPruner | None:
        if self._selector is None:
            return None
        (camera,) = self.config.cameras
        target = None
        if camera in observation.cameras and observation.end_effector is not None:
            shape = observation.images[camera].shape[:2]
            target = project(observation.cameras[camera], observation.end_effector, shape)
        return StepPruner(self._selector, text_tokens + self._selector.tokens, target, generator)


def hash_frames(frames: Sequence[Observation]) -> str:
    """SHA-256 over the pixels, instructions and states of observations, in order."""
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(frame.instruction.encode())
        for name in sorted(frame.images):
            digest.update(name.encode())
            digest.update(frame.images[name].tobytes())
        if frame.state is not None:
            digest.update(b"state")
            digest.update(frame.state.tobytes())
    return digest.hexdigest()
