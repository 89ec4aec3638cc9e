"""What opening any of LeRobot's flow-matching policies has in common."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from sqap.checkpoints.choices import Choices
from sqap.checkpoints.lerobot.config import LeRobotConfig
from sqap.checkpoints.lerobot.policy import Around, find_tokenizer
from sqap.checkpoints.lerobot.weights import UNUSED, check_depth, read_by
from sqap.checkpoints.opened import Opened, open_published
from sqap.checkpoints.settings import positive
from sqap.checkpoints.tokenizer import Vocabulary
from sqap.checkpoints.weights import Table, TensorSet
from sqap.config import PolicyConfig
from sqap.errors import CheckpointError
from sqap.models import DecoderConfig, FlowHeadConfig


def open_policy(
    directory: Path,
    choices: Choices,
    policy: PolicyConfig,
    around: Around,
    vocabulary: Vocabulary,
    tensors: TensorSet,
    table: Table,
) -> Opened:
    """A checkpoint, with its tokenizer from wherever it is, and without the tensors that nothing reads.

    Raises:
        CheckpointError: its parts do not fit, or there is no tokenizer.
    """
    tokenizer = find_tokenizer(directory, choices.tokenizer, around.tokenizer, vocabulary.name)
    choices = replace(choices, tokenizer=tokenizer)
    read, unread = read_by(policy.model, table)
    return open_published(directory, choices, policy, vocabulary, tensors, read, (*UNUSED, *unread))


def read_head(
    config: LeRobotConfig,
    tensors: TensorSet,
    expert: str,
    decoder: DecoderConfig,
    steps: str,
    **kind: Any,
) -> FlowHeadConfig:
    """The sizes of a flow-matching head.

    Args:
        config: the policy's.
        tensors: the checkpoint.
        expert: before the names of the expert's tensors.
        decoder: the decoder's sizes.
        steps: the configuration's name for the number of denoising steps.
        **kind: what the family decides.

    Raises:
        CheckpointError: the tensors that tell them are missing, or the configuration contradicts them.
    """
    check_depth(tensors, f"{expert}layers.", decoder)
    head = FlowHeadConfig(
        action_dim=config.padded_action,
        horizon=config.horizon,
        width=tensors.shape("model.action_in_proj.weight", 2)[0],
        mlp_width=tensors.shape(f"{expert}layers.0.mlp.gate_proj.weight", 2)[0],
        sample_steps=config.number(steps, 10),
        min_period=positive(config.data, "min_period", 4e-3, config.path),
        max_period=positive(config.data, "max_period", 4.0, config.path),
        **kind,
    )
    for fault in head.faults():
        raise CheckpointError(f"{config.path}{fault}")
    return head
