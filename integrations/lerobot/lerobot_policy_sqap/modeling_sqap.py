"""The policy that LeRobot calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

import sqap
from lerobot_policy_sqap.configuration_sqap import SqapConfig
from lerobot_policy_sqap.runner import Runner


class SqapPolicy(PreTrainedPolicy):
    """An sqap policy behind LeRobot's interface. It acts, and is not trained.

    Args:
        config: LeRobot's.
        policy: what acts.
    """

    config_class = SqapConfig
    name = "sqap"

    def __init__(self, config: SqapConfig, policy: sqap.Policy) -> None:
        super().__init__(config)
        self.runner = Runner(policy, config.n_action_steps)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: SqapConfig | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> SqapPolicy:
        """Load a directory, or a repository of the hub at ``revision``.

        Args:
            pretrained_name_or_path: of what `sqap.Policy.save` has written.
            config: LeRobot's; its own ``config.json`` if None.
            revision: a branch, a tag or a commit.
            kwargs: what LeRobot gives to policies that are trained, and how it reaches the hub; not used.

        Raises:
            CheckpointError: there is no such policy, or it is damaged.
        """
        if config is None:
            config = PreTrainedConfig.from_pretrained(pretrained_name_or_path, revision=revision)
        directory = Path(pretrained_name_or_path)
        if directory.is_dir():
            policy = sqap.load(directory)
        else:
            name = str(pretrained_name_or_path)
            policy = sqap.load(name if revision is None else f"{name}@{revision}")
        policy.load_weights()
        return cls(config, policy).to(config.device)

    def to(self, device: torch.device | str) -> SqapPolicy:
        """Let the policy act on a device; its types stay as they are."""
        self.runner.policy.to(device)
        return self

    def reset(self) -> None:
        """Forget the actions that are left and what is remembered: another episode begins."""
        self.runner.reset()

    def select_action(self, batch: dict[str, Any]) -> Tensor:
        """The next action of each environment, ``(batch, action_dim)`` in robot units."""
        return self.runner.select(batch)

    def predict_action_chunk(self, batch: dict[str, Any]) -> Tensor:
        """A chunk for each environment, ``(batch, horizon, action_dim)`` in robot units."""
        return self.runner.predict(batch)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any] | None]:
        """It has no loss."""
        raise NotImplementedError("a compressed policy is not trained: train the original, and compress it")

    def get_optim_params(self) -> dict[str, Any]:
        """It has no parameters that are trained."""
        raise NotImplementedError("a compressed policy is not trained: train the original, and compress it")

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        raise NotImplementedError("save the policy with sqap: policy.runner.policy.save(directory)")
