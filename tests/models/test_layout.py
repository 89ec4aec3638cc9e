"""Who attends to whom, for every family, against tables written by hand and against the decoder itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from sqap.models import FlowHeadConfig, ModelConfig, VisionConfig
from sqap.models.layout import Layout, Segment
from tests.families import DECODER, FAMILIES, family_config, random_inputs, random_model

VISION = VisionConfig(image_size=8, patch_size=8, width=16, depth=1, heads=2, mlp_width=32)
FLOW = FlowHeadConfig(action_dim=2, horizon=2, width=24, mlp_width=40)


def expert(**settings: Any) -> ModelConfig:
    """Two images of one visual token each, a state, and an action expert for two actions."""
    decoder = dataclasses.replace(DECODER, causal=False)
    head = dataclasses.replace(FLOW, causal_actions=settings.pop("causal_actions", True))
    return ModelConfig(
        (VISION,),
        (32,),
        decoder,
        head,
        cameras=2,
        proprio_dim=3,
        proprio_layers=1,
        image_first=True,
        **settings,
    )


SMOLVLA = """
    visual  x x x x . . .
    visual  x x x x . . .
    text    x x x x . . .
    text    x x x x . . .
    state   x x x x x . .
    actions x x x x x x .
    actions x x x x x x x
"""
PI0 = """
    visual  x x x x . . .
    visual  x x x x . . .
    text    x x x x . . .
    text    x x x x . . .
    state   x x x x x . .
    actions x x x x x x x
    actions x x x x x x x
"""
PI05 = """
    visual  x x x x . .
    visual  x x x x . .
    text    x x x x . .
    text    x x x x . .
    actions x x x x x x
    actions x x x x x x
"""


@pytest.mark.parametrize(
    ("config", "by_hand", "decoder"),
    [
        (expert(), SMOLVLA, 5),
        (expert(state_in="expert", causal_actions=False), PI0, 4),
        (expert(state_in="text", causal_actions=False), PI05, 4),
    ],
    ids=["smolvla", "pi0", "pi0.5"],
)
def test_an_experts_policy_sees_what_the_table_says(config: ModelConfig, by_hand: str, decoder: int) -> None:
    layout, rows = config.layout(2), [line.split() for line in by_hand.strip().splitlines()]
    names = [segment.name for segment in layout.segments for _ in range(segment.length)]
    assert names == [row[0] for row in rows]
    assert layout.mask().tolist() == [[mark == "x" for mark in row[1:]] for row in rows]
    assert layout.decoder.length == decoder


@pytest.mark.parametrize(
    ("family", "order", "causal"),
    [
        ("diffusion", {"bos": 1, "visual": 16, "text": 4}, True),
        ("tokens", {"bos": 1, "visual": 16, "text": 4}, True),
        ("regression", {"bos": 1, "visual": 32, "state": 1, "text": 3, "actions": 24, "end": 1}, False),
    ],
)
def test_one_block_is_causal_or_sees_everything(family: str, order: dict[str, int], causal: bool) -> None:
    layout = family_config(family).layout(5)
    assert {segment.name: segment.length for segment in layout.segments} == order
    everything = torch.ones(layout.length, layout.length, dtype=torch.bool)
    assert torch.equal(layout.mask(), everything.tril() if causal else everything)
    assert layout.blocks == (slice(0, layout.length),)


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_decoder_obeys_the_mask(family: str) -> None:
    """A token's change reaches those that see it, and no others: masks of blocks are transitive."""
    config = family_config(family)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, last_layer="whole"))
    model, inputs = random_model(config), random_inputs(config, 1)
    layout = model.layout(inputs).decoder
    x, mask = model.embed(inputs), layout.mask()

    def final(x: torch.Tensor) -> torch.Tensor:
        (stream,) = model.decoder.run([model.decoder.start(x, layout.blocks)])
        return torch.cat(stream.blocks, dim=1)[0]

    before = final(x)
    for token in (0, layout.span("visual").stop - 1, layout.span("text").start, layout.length - 1):
        changed = x.clone()
        changed[0, token] += 1
        moved = (final(changed) - before).abs().amax(-1) > 1e-6
        assert torch.equal(moved, mask[:, token])


def test_places_are_found_from_either_end() -> None:
    layout = Layout(
        (
            Segment("visual", 4),
            Segment("text", 3),
            Segment("state", 1, 1),
            Segment("actions", 6, 2, expert=True),
        )
    )
    assert (layout.length, layout.decoder.length) == (14, 8)
    assert layout.span("text") == slice(4, 7)
    assert layout.from_end("text") == slice(-4, -1)
    assert layout.blocks == (slice(0, 7), slice(7, 8), slice(8, 14))
    with pytest.raises(KeyError):
        layout.span("bos")


@pytest.mark.parametrize("second", [Segment("text", 1, 0), Segment("text", 1, 1)])
def test_blocks_ascend_and_the_expert_comes_last(second: Segment) -> None:
    first = Segment("visual", 1, 1, expert=second.block == 1)
    with pytest.raises(ValueError, match="segment 'text' cannot come behind 'visual'"):
        Layout((first, second))
