"""LeRobot's configuration of an sqap policy: ``config.json``, as `sqap.Policy.save` writes it."""

from __future__ import annotations

from dataclasses import dataclass

from lerobot.configs import PreTrainedConfig


@PreTrainedConfig.register_subclass("sqap")
@dataclass
class SqapConfig(PreTrainedConfig):
    """What LeRobot is told of a policy, apart from its features.

    Args:
        n_action_steps: how many actions of a chunk are executed before the next.
    """

    n_action_steps: int = 1

    def validate_features(self) -> None:
        """There is nothing to be checked that the policy does not check itself, by its own files."""

    @property
    def observation_delta_indices(self) -> None:
        """It reads one observation at a time."""
        return None

    @property
    def action_delta_indices(self) -> None:
        """It is not trained."""
        return None

    @property
    def reward_delta_indices(self) -> None:
        """It is not trained."""
        return None

    def get_optimizer_preset(self) -> None:
        """It is not trained."""
        raise NotImplementedError("a compressed policy is not trained: train the original, and compress it")

    def get_scheduler_preset(self) -> None:
        """It is not trained."""
        return None
