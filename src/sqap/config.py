"""What a policy is, what calibration found and where it came from, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from sqap.models import ModelConfig
from sqap.processing import (
    ActionStep,
    ActionUnits,
    ImageSteps,
    PromptConfig,
    StateStep,
    action_dim,
    state_dim,
)


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

    @property
    def action_dim(self) -> int:
        """Numbers of an action that the robot takes."""
        return action_dim(self.actions, self.model.head.action_dim)


@dataclass(frozen=True)
class Origin:
    """Where a policy was loaded from, as far as that can be told to others: a path on this machine cannot.

    Args:
        name: ``org/name`` on the Hugging Face hub, or a bundled policy's name.
        commit: of the hub's repository; None for what is not from there.
        license: identifier that its model card states; None if it states none.
    """

    name: str | None = None
    commit: str | None = None
    license: str | None = None


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
