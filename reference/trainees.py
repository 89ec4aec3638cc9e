"""Policies in training: the loss of each kind of action head, and what exists in training alone."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.collect import STATE_DIM
from reference.settings import HORIZON
from sqap.models import VLA, FlowHeadConfig, ModelConfig, ModelInputs
from sqap.models.heads.flow_loss import flow_loss
from sqap.models.heads.velocity import FlowInputs


class Batch(NamedTuple):
    """Labelled frames.

    Args:
        pixels: ``(batch, 3, size, size)`` in [-1, 1].
        ids: instructions, ``(batch, tokens)``, padded on the right.
        last: the place of each one's last token, ``(batch,)``.
        actions: normalised, ``(batch, horizon, action_dim)``.
        states: the simulator's, normalised, ``(batch, STATE_DIM)``, the robot's own first.
    """

    pixels: Tensor
    ids: Tensor
    last: Tensor
    actions: Tensor
    states: Tensor


class CognitionTrainee(nn.Module):
    """A policy with a diffusion head, and two heads for training.

    The loss is CogACT's (noise prediction), plus those of two heads that exist only here: one regresses the
    action chunk directly, which shapes the cognition token early, one regresses the simulator's state.
    """

    weights: ClassVar[dict[str, float]] = {"diffusion": 1.0, "l1": 1.0, "state": 0.3}

    def __init__(self, config: ModelConfig, draws: int) -> None:
        super().__init__()
        width = config.decoder.width
        self.draws = draws
        self.vla = VLA(config)
        self.l1_head = nn.Sequential(
            nn.Linear(width, 512), nn.GELU(), nn.Linear(512, HORIZON * config.head.action_dim)
        )
        self.state_head = nn.Linear(width, STATE_DIM)

    def features(self, pixels: Tensor, ids: Tensor, last: Tensor) -> Tensor:
        """Cognition tokens ``(batch, width)`` of right-padded ``ids``; ``last`` is each one's end."""
        hidden = self.vla.decoder(self.vla.embed(ModelInputs([pixels], ids)))
        text = self.vla.config.layout(ids.shape[1]).span("text")  # of which BOS is none
        return hidden[torch.arange(len(ids)), text.start + last - 1]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss by name."""
        z = self.features(batch.pixels, batch.ids, batch.last)
        actions = batch.actions
        return {
            "diffusion": self.vla.head.loss(actions.repeat(self.draws, 1, 1), z.repeat(self.draws, 1)),
            "l1": F.l1_loss(self.l1_head(z).view_as(actions), actions),
            "state": F.smooth_l1_loss(self.state_head(z), batch.states),
        }


class FlowTrainee(nn.Module):
    """A policy with a flow head, which knows of the simulator's state what the robot knows of itself.

    A batch must not be padded: the expert reads the keys and values of all tokens.
    """

    weights: ClassVar[dict[str, float]] = {"flow": 1.0}

    def __init__(self, config: ModelConfig, draws: int) -> None:
        super().__init__()
        self.draws = draws
        self.vla = VLA(config)

    def features(self, pixels: Tensor, ids: Tensor, state: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The keys and values of the decoder's layers."""
        inputs = ModelInputs([pixels], ids, proprio=state)
        (stream,) = self.vla.decoder.run(self.vla.streams([inputs]))
        return self.vla.head.prefix(stream)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss by name."""
        config, actions = self.vla.config, batch.actions
        state = batch.states[:, : config.proprio_dim]
        read = FlowInputs(
            self.features(batch.pixels, batch.ids, state),
            actions,
            config.layout(batch.ids.shape[1]),
            state if config.expert_state else None,
        )
        return {"flow": flow_loss(self.vla.head, actions, read, self.draws)}


Trainee = CognitionTrainee | FlowTrainee


def make_trainee(config: ModelConfig, draws: int) -> Trainee:
    """The policy of these sizes in training, with so many noise draws per sample."""
    if isinstance(config.head, FlowHeadConfig):
        return FlowTrainee(config, draws)
    return CognitionTrainee(config, draws)
