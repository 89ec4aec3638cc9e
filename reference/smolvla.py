"""The third policy: SmolVLA in small, an action expert beside the second policy's eyes and language model.

The expert reads the keys and values of every decoder layer, and the robot's state is a token. What the
second policy learned on the same tasks is taken over, so that the expert is most of what remains to learn.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import sqap
from reference.blueprint import Blueprint
from reference.settings import HORIZON
from sqap.environments.metaworld import STATE_DIM, MetaWorld
from sqap.models import VLA, FlowHeadConfig, ModelConfig

TRUNK = "reference-smollm"
FROZEN = 3  # the language model's lower layers, as in the second policy
STATE_SCALE = 0.2  # the state's token begins at about the size of a word's


def initialise(model: VLA) -> None:
    """The second policy's vision encoder, projector and decoder; the expert stays random."""
    trunk = sqap.load(TRUNK)
    trunk.load_weights()
    wanted = model.decoder.state_dict()
    weights = {name: value for name, value in trunk.model.decoder.state_dict().items() if name in wanted}
    model.decoder.load_state_dict(weights)
    model.vision.load_state_dict(trunk.model.vision.state_dict())
    model.projector.load_state_dict(trunk.model.projector.state_dict())
    with torch.no_grad():
        for parameter in model.proprio.parameters():
            parameter.mul_(STATE_SCALE)


def config() -> ModelConfig:
    """SmolVLA's order of tokens and its expert; the decoder stays causal, as the second policy's is.

    As in SmolVLA the last layer makes keys and values alone, and every other layer of the expert reads only
    the decoder's. The expert is half as wide as the decoder, for SmolVLA's three quarters.
    """
    trunk = sqap.load(TRUNK).config.model
    return replace(
        trunk,
        decoder=replace(trunk.decoder, last_layer="keys_values"),
        head=FlowHeadConfig(action_dim=MetaWorld.action_dim, horizon=HORIZON, width=288, mlp_width=768),
        proprio_dim=STATE_DIM,
        proprio_layers=1,
        image_first=True,
    )


def blueprint() -> Blueprint:
    """Eyes, projector and the language model's lower half are frozen; its upper half moves slowly."""
    frozen = {f"vla.decoder.layers.{i}.": 0.0 for i in range(FROZEN)}
    return Blueprint(
        "reference-smolvla",
        Path("policies/reference-smolvla"),
        config(),
        lambda: sqap.load(TRUNK).tokenizer,
        initialise,
        rates={
            **frozen,
            "vla.vision": 0.0,
            "vla.projector": 0.0,
            "vla.decoder.embed_tokens": 0.0,
            "vla.decoder": 2e-4,
            "": 1e-3,
        },
        demonstrations=100,
        rollouts=12,
        halfway=600,
        steps=1720,
        warmup=60,
        noise_draws=4,
        parts=2,
    )
