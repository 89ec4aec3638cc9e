"""Several cameras: each has its own budget, its own ranking and, where its place is known, its own ring."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from sqap.errors import InputError
from sqap.models import VLA, ModelInputs
from sqap.models.decoder import rope_angles, take_tokens
from sqap.pruning import Selector, StepPruner
from sqap.pruning.calibration import attention_scores
from sqap.recipe import Pruning, PruningMethod
from tests.families import FAMILIES, family_config, random_inputs, random_model

CONFIG = family_config("regression")  # two cameras of 16 tokens, the robot's state, full attention


@pytest.fixture(scope="module")
def model() -> VLA:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def inputs() -> ModelInputs:
    return random_inputs(CONFIG, 1)


def run(
    model: VLA, inputs: ModelInputs, settings: Pruning, targets: list[tuple[float, float] | None]
) -> tuple[torch.Tensor, StepPruner]:
    generator = torch.Generator().manual_seed(0)
    pruner = StepPruner(
        Selector(settings, 4, layers=(1, 2)),
        model.config.layout(5).blocks[0].stop,
        CONFIG.visual,
        targets,
        generator,
    )
    with torch.inference_mode():
        return model.decoder(model.embed(inputs), pruner=pruner), pruner


@pytest.mark.parametrize("method", get_args(PruningMethod))
def test_each_camera_keeps_exactly_its_budget(model: VLA, inputs: ModelInputs, method: str) -> None:
    settings = Pruning(keep_ratio=0.4, method=method, after_layer=1)  # type: ignore[arg-type]
    hidden, pruner = run(model, inputs, settings, [(0.5, 0.5), None])
    assert [len(selection.kept) for selection in pruner.selections] == [6, 6]
    assert hidden.shape[1] == model.config.layout(5).blocks[0].stop - 32 + 12


def test_the_ring_is_drawn_where_the_camera_is_known(model: VLA, inputs: ModelInputs) -> None:
    settings = Pruning(keep_ratio=0.5, after_layer=1, method="sqap", top_share=0.2, ring_share=0.4)
    _, pruner = run(model, inputs, settings, [None, (0.3, 0.3)])
    first, second = pruner.selections
    assert not first.ring.any()
    assert second.ring.any()
    assert second.target == (0.3, 0.3)


def test_a_camera_is_ranked_among_its_own_tokens(model: VLA, inputs: ModelInputs) -> None:
    settings = Pruning(keep_ratio=0.25, after_layer=1, method="attention")
    _, pruner = run(model, inputs, settings, [None, None])
    scores = attention_scores(model, [inputs], (0,), "text")
    assert scores.shape == (2, 16)
    torch.testing.assert_close(scores.sum(-1), torch.ones(2))
    for selection, score in zip(pruner.selections, scores, strict=True):
        assert selection.kept.tolist() == sorted(score.topk(4).indices.tolist())


def test_kept_tokens_go_on_at_their_positions(model: VLA, inputs: ModelInputs) -> None:
    """Against the layers run by hand; the state, the prompt and the empty action tokens are never dropped."""
    hidden, pruner = run(
        model, inputs, Pruning(keep_ratio=0.25, after_layer=1, method="uniform"), [None, None]
    )
    x = model.embed(inputs)
    positions = torch.arange(x.shape[1])
    stays = torch.ones(x.shape[1], dtype=torch.bool)
    stays[CONFIG.visual] = torch.cat([s.mask for s in pruner.selections])
    for i, layer in enumerate(model.decoder.layers):
        x, _ = layer(x, rope_angles(positions[None], CONFIG.decoder, x.dtype))
        if i == 0:
            x, positions = x[:, stays], positions[stays]
    torch.testing.assert_close(hidden, model.decoder.norm(x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lookahead", "sqap", "random"])
def test_several_observations_are_refused_where_one_would_decide_for_all(family: str, method: str) -> None:
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 2)

    def pruner(keep_ratio: float) -> StepPruner:
        settings = Pruning(keep_ratio=keep_ratio, method=method, after_layer=1)  # type: ignore[arg-type]
        selector = Selector(settings, config.grid)
        return StepPruner(
            selector, model.config.layout(5).blocks[0].stop, config.visual, [None] * config.cameras
        )

    with torch.inference_mode():
        with pytest.raises(InputError, match="one observation, got a batch of 2: run them one at a time"):
            model(inputs, pruner(0.5))
        # Where nothing is pruned, nothing has to be decided.
        assert torch.equal(model(inputs, pruner(1.0)), model(inputs))


def test_tokens_are_kept_for_every_observation_of_a_batch() -> None:
    x, kept = torch.arange(12.0).view(2, 3, 2), torch.tensor([[0, 2], [1, 2]])
    assert torch.equal(take_tokens(x, kept), torch.stack([x[0, [0, 2]], x[1, [1, 2]]]))
    with pytest.raises(ValueError, match="kept for a batch of 1, but there is one of 2"):
        take_tokens(x, kept[:1])
