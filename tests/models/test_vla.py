"""The whole model: the order of its tokens, batches, devices and number formats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sqap.models import VLA, ModelConfig
from sqap.models.projector import Projector

Inputs = tuple[list[Tensor], Tensor, Tensor]


class KeepFirst:
    """A pruner that keeps BOS, the first visual tokens and the text after layer 0."""

    def __init__(self, visual: int, kept: int, tokens: int) -> None:
        self.visual, self.kept, self.tokens = visual, kept, tokens

    def score_rows(self, layer: int) -> Tensor | None:
        return torch.tensor([self.tokens - 1]) if layer == 0 else None

    def keep(self, layer: int, received: Tensor) -> Tensor | None:
        assert received.shape[1] == self.tokens
        text = torch.arange(1 + self.visual, self.tokens)
        return torch.cat([torch.arange(1 + self.kept), text]).expand(received.shape[0], -1)


@torch.no_grad()
def test_shapes(model: VLA, config: ModelConfig, inputs: Inputs) -> None:
    pixels, token_ids, noise = inputs
    assert config.visual_tokens == 16

    visual = model.see(pixels)

    assert visual.shape == (3, 16, 32)
    assert model.sequence(visual, token_ids).shape == (3, 16 + 5, 32)
    assert model.cognition(visual, token_ids).shape == (3, 32)
    actions = model(pixels, token_ids, noise)
    assert actions.shape == (3, 6, 4)
    assert actions.dtype == torch.float32
    assert actions.isfinite().all()


@torch.no_grad()
def test_visual_tokens_follow_the_first_text_token(model: VLA, inputs: Inputs) -> None:
    _, token_ids, _ = inputs
    visual = torch.randn(3, 16, 32)

    sequence = model.sequence(visual, token_ids)

    text = model.decoder.embed_tokens(token_ids)
    assert torch.equal(sequence[:, 0], text[:, 0])
    assert torch.equal(sequence[:, 1:17], visual)
    assert torch.equal(sequence[:, 17:], text[:, 1:])


@torch.no_grad()
def test_cognition_is_the_last_token(model: VLA, inputs: Inputs) -> None:
    pixels, token_ids, _ = inputs
    visual = model.see(pixels)

    hidden = model.decoder(model.sequence(visual, token_ids))

    assert torch.equal(model.cognition(visual, token_ids), hidden[:, -1])


@torch.no_grad()
def test_batch_equals_singles(model: VLA, inputs: Inputs) -> None:
    pixels, token_ids, noise = inputs

    together = model(pixels, token_ids, noise)

    for i in range(3):
        alone = model([p[i : i + 1] for p in pixels], token_ids[i : i + 1], noise[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_deterministic_in_its_noise(model: VLA, inputs: Inputs) -> None:
    pixels, token_ids, noise = inputs
    once = model(pixels, token_ids, noise)
    assert torch.equal(once, model(pixels, token_ids, noise))
    assert not torch.allclose(once, model(pixels, token_ids, noise + 0.1))


@torch.no_grad()
def test_image_and_instruction_reach_the_action(model: VLA, inputs: Inputs) -> None:
    pixels, token_ids, noise = inputs
    base = model(pixels, token_ids, noise)

    for i in range(2):
        other = [p + 1 if i == j else p for j, p in enumerate(pixels)]
        assert not torch.equal(base, model(other, token_ids, noise))
    assert not torch.equal(base, model(pixels, (token_ids + 1) % 20, noise))


@torch.no_grad()
def test_pruner_shortens_the_sequence(model: VLA, inputs: Inputs) -> None:
    """Tokens that a pruner drops can no longer be heard; those it keeps can."""
    pixels, token_ids, _ = inputs
    visual = model.see(pixels)
    keep_all, keep_few = KeepFirst(16, 16, 21), KeepFirst(16, 4, 21)

    full = model.cognition(visual, token_ids)

    torch.testing.assert_close(model.cognition(visual, token_ids, keep_all), full)
    assert not torch.allclose(model.cognition(visual, token_ids, keep_few), full)
    hidden = model.decoder(model.sequence(visual, token_ids), pruner=keep_few)
    assert hidden.shape == (3, 1 + 4 + 4, 32)


@torch.no_grad()
def test_projector_has_gelu_between_its_linears() -> None:
    projector = Projector(6, (10, 8, 4))
    reference = nn.Sequential(
        projector.layers[0], nn.GELU(), projector.layers[1], nn.GELU(), projector.layers[2]
    )
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(projector(x), reference(x))


@torch.no_grad()
def test_no_tensor_is_tied_to_the_cpu(config: ModelConfig) -> None:
    """On the meta device any hidden CPU tensor would be an error, as it would be on a GPU."""
    with torch.device("meta"):
        model = VLA(config)
        pixels = [torch.empty(2, 3, c.image_size, c.image_size) for c in config.vision]
        token_ids, noise = torch.empty(2, 5, dtype=torch.long), torch.empty(2, 6, 4)
    pruner = KeepFirst(16, 4, 21)

    assert model(pixels, token_ids, noise).shape == (2, 6, 4)
    assert model.cognition(model.see(pixels), token_ids, pruner).device.type == "meta"


@torch.no_grad()
def test_built_on_meta_and_filled_it_is_the_same_model(
    model: VLA, config: ModelConfig, inputs: Inputs
) -> None:
    """How large checkpoints are loaded: nothing outside the state dict may stay behind on meta."""
    with torch.device("meta"):
        filled = VLA(config)
    filled.load_state_dict(model.state_dict(), strict=True, assign=True)

    assert torch.equal(filled.eval()(*inputs), model(*inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_gpu_equals_cpu(model: VLA, inputs: Inputs) -> None:
    pixels, token_ids, noise = inputs
    pruner = KeepFirst(16, 4, 21)
    on_cpu = model(pixels, token_ids, noise, pruner)

    on_gpu = model.cuda()([p.cuda() for p in pixels], token_ids.cuda(), noise.cuda(), pruner)

    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_runs_in_bfloat16(model: VLA, inputs: Inputs) -> None:
    pixels, token_ids, noise = inputs
    exact = model.cognition(model.see(pixels), token_ids)

    model.bfloat16()
    rough = model.cognition(model.see([p.bfloat16() for p in pixels]), token_ids)

    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.1
    assert model([p.bfloat16() for p in pixels], token_ids, noise.bfloat16()).isfinite().all()
