"""What a policy is and what calibration found, as plain data: all of `policy.json` but the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from sqap.models import ModelConfig
from sqap.processing import ActionStep, ActionUnits, ImageSteps, PromptConfig, StateStep, state_dim


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy is, apart from its weights.

    Args:
        family: the published policy whose construction this follows, e.g. ``"cogact"``.
        model: sizes of the four parts.
        cameras: names of the images the policy reads, in order.
        images: what is done to an image for each of the vision encoders.
        actions: how its outputs become robot units.
        prompt: how the instruction becomes token ids.
        state: what is done to the robot's state, for policies that read it.
        units: what the actions mean, for reports in millimetres; None if that is not known.
        n_action_steps: how many actions of a chunk are executed before the next one; None for all.
    """

    family: str
    model: ModelConfig
    cameras: tuple[str, ...]
    images: tuple[ImageSteps, ...]
    actions: tuple[ActionStep, ...]
    prompt: PromptConfig = PromptConfig()  # noqa: RUF009 - it is frozen
    state: tuple[StateStep, ...] | None = None
    units: ActionUnits | None = None
    n_action_steps: int | None = None

    @property
    def state_dim(self) -> int:
        """Numbers of the robot's state; 0 if the policy does not read it."""
        return 0 if self.state is None else state_dim(self.state, self.model.proprio_dim or 0)


@dataclass(frozen=True)
class Calibration:
    """What `compress` learned from calibration frames, kept with the compressed policy.

    Args:
        frames: how many observations were used.
        frames_hash: SHA-256 over their pixels and instructions.
        top_k: how many tokens the ranking may choose; None if calibration has no say.
        overlap: mean agreement of the full-precision and the quantized top k at that k.
        layers: decoder layers, counted from 0, that method "lookahead" looks at.
        recall: share of the budget's best tokens, by later layers' attention in full precision, that looking
            ahead finds.
    """

    frames: int
    frames_hash: str
    top_k: int | None = None
    overlap: float | None = None
    layers: tuple[int, ...] | None = None
    recall: float | None = None
