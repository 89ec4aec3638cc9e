"""The whole model: the order of its tokens, batches, cameras, devices and number formats."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.models import VLA, ModelConfig, ModelInputs
from sqap.models.projector import Projector
from sqap.models.stream import LayerOutput
from tests.families import FAMILIES, family_config, random_inputs, random_model


class KeepFirst:
    """A pruner that keeps BOS, the first visual tokens and the text after layer 0."""

    def __init__(self, visual: int, kept: int, tokens: int) -> None:
        self.visual, self.kept, self.tokens = visual, kept, tokens

    def score_rows(self, layer: int) -> Tensor | None:
        return torch.tensor([self.tokens - 1]) if layer == 0 else None

    def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
        if layer > 0:
            return None
        assert output.hidden.shape[1] == self.tokens
        text = torch.arange(1 + self.visual, self.tokens)
        return torch.cat([torch.arange(1 + self.kept), text]).expand(len(output.hidden), -1)


def rows(inputs: ModelInputs, i: int, cameras: int = 1) -> ModelInputs:
    """One observation of a batch."""
    one, images = slice(i, i + 1), slice(i * cameras, (i + 1) * cameras)
    return ModelInputs(
        [p[images] for p in inputs.pixels],
        inputs.token_ids[one],
        inputs.noise if inputs.noise is None else inputs.noise[one],
        inputs.proprio if inputs.proprio is None else inputs.proprio[one],
    )


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_shapes(family: str) -> None:
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 3)
    assert config.visual_tokens == 16 * config.cameras

    assert model.see(inputs.pixels, model.language(inputs.token_ids)).shape == (3, config.visual_tokens, 32)
    assert model.embed(inputs).shape == (3, config.layout(5).decoder.length, 32)
    actions = model(inputs)
    assert actions.shape == (3, config.head.horizon, 4)
    assert actions.dtype == torch.float32
    assert actions.isfinite().all()
    assert actions.std() > 0


@torch.no_grad()
def test_visual_tokens_follow_the_first_text_token(model: VLA, inputs: ModelInputs) -> None:
    visual = torch.randn(3, 16, 32)

    sequence = model.sequence(visual, inputs)

    text = model.decoder.embed(inputs.token_ids)
    assert torch.equal(sequence[:, 0], text[:, 0])
    assert torch.equal(sequence[:, 1:17], visual)
    assert torch.equal(sequence[:, 17:], text[:, 1:])


@torch.no_grad()
def test_state_and_room_for_actions_have_their_places() -> None:
    """As in OpenVLA-OFT: the state behind the images, empty tokens between the prompt and the stop token."""
    config = family_config("regression")
    model, inputs = random_model(config), random_inputs(config, 3)
    visual = torch.randn(3, 32, 32)

    sequence = model.sequence(visual, inputs)

    text = model.decoder.embed(inputs.token_ids)
    assert model.proprio is not None
    assert torch.equal(sequence[:, 33], model.proprio(inputs.proprio))
    assert torch.equal(sequence[:, 34:37], text[:, 1:-1])
    assert torch.equal(sequence[:, 37:-1], torch.zeros(3, 24, 32))
    assert torch.equal(sequence[:, -1], text[:, -1])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_batch_equals_singles(family: str) -> None:
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 3)

    together = model(inputs)

    for i in range(3):
        alone = model(rows(inputs, i, config.cameras))
        torch.testing.assert_close(alone, together[i : i + 1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_deterministic_in_its_noise(model: VLA, inputs: ModelInputs) -> None:
    once = model(inputs)
    assert torch.equal(once, model(inputs))
    assert inputs.noise is not None
    assert not torch.allclose(once, model(dataclasses.replace(inputs, noise=inputs.noise + 0.1)))


@pytest.mark.parametrize("family", ["diffusion", "regression"])
@torch.no_grad()
def test_all_that_is_read_reaches_the_action(family: str) -> None:
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 1)
    base = model(inputs)

    others = [dataclasses.replace(inputs, token_ids=(inputs.token_ids + 1) % 20)]
    for encoder in range(2):
        for camera in range(config.cameras):
            pixels = [p.clone() for p in inputs.pixels]
            pixels[encoder][camera] += 1
            others.append(dataclasses.replace(inputs, pixels=pixels))
    if inputs.proprio is not None:
        others.append(dataclasses.replace(inputs, proprio=inputs.proprio + 1))
    for other in others:
        assert not torch.equal(base, model(other))


@torch.no_grad()
def test_cameras_are_seen_alone_and_in_order(config: ModelConfig) -> None:
    two = random_model(dataclasses.replace(config, cameras=2))
    inputs = random_inputs(two.config, 2)
    visual = two.see(inputs.pixels)
    for i in range(4):
        alone = random_model(config).see([p[i : i + 1] for p in inputs.pixels])
        part = visual[i // 2, 16 * (i % 2) : 16 * (i % 2 + 1)]
        torch.testing.assert_close(part, alone[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_film_modulates_between_attention_and_mlp() -> None:
    """Kim, Finn & Liang 2025: (1 + scale) x + shift, of the mean text embedding."""
    model = random_model(family_config("regression"))
    block, x, language = model.vision[0].blocks[0], torch.randn(2, 7, 16), torch.randn(2, 32)
    attended = x + block.ls1(block.attn(block.norm1(x)))
    scale, shift = block.film.scale(language), block.film.shift(language)
    modulated = attended * (1 + scale[:, None]) + shift[:, None]
    expected = modulated + block.ls2(block.mlp(block.norm2(modulated)))
    torch.testing.assert_close(block(x, language), expected)
    ids = torch.tensor([[1, 4, 4, 2]])
    mean = model.decoder.embed_tokens.weight[[1, 4, 4, 2]].mean(0)
    torch.testing.assert_close(model.language(ids), mean.expand(2, -1))


@torch.no_grad()
def test_pruner_shortens_the_sequence(model: VLA, inputs: ModelInputs) -> None:
    """Tokens that a pruner drops can no longer be heard; those it keeps can."""
    x, keep_all, keep_few = model.embed(inputs), KeepFirst(16, 16, 21), KeepFirst(16, 4, 21)

    full = model.decoder(x)

    torch.testing.assert_close(model.decoder(x, pruner=keep_all), full)
    few = model.decoder(x, pruner=keep_few)
    assert few.shape == (3, 1 + 4 + 4, 32)
    assert not torch.allclose(few[:, -1], full[:, -1])


@torch.no_grad()
def test_projector_has_gelu_between_its_linears() -> None:
    projector = Projector(6, (10, 8, 4))
    reference = nn.Sequential(
        projector.layers[0], nn.GELU(), projector.layers[1], nn.GELU(), projector.layers[2]
    )
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(projector(x), reference(x))


@torch.no_grad()
def test_a_projector_may_have_no_biases() -> None:
    projector = Projector(6, (10, 4), bias=False)
    assert [name for name, _ in projector.named_parameters()] == ["layers.0.weight", "layers.1.weight"]
    assert torch.equal(projector(torch.zeros(1, 2, 6)), torch.zeros(1, 2, 4))


@torch.no_grad()
def test_text_alone_is_scaled() -> None:
    """Not the state, nor what FiLM is told of the text."""
    config = family_config("regression")
    scaled = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, embed_scale=3.0))
    inputs = random_inputs(config, 1)
    before, after = (random_model(c).embed(inputs)[0] for c in (config, scaled))
    text = torch.tensor([0, 34, 35, 36, len(before) - 1])
    torch.testing.assert_close(after[text], 3 * before[text])
    rest = torch.ones(len(before), dtype=torch.bool)
    rest[text] = False
    assert torch.equal(after[rest], before[rest])
    with pytest.raises(InputError, match="embed_scale must be positive, got 0"):
        dataclasses.replace(config.decoder, embed_scale=0.0)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_no_tensor_is_tied_to_the_cpu(family: str) -> None:
    """On the meta device any hidden CPU tensor would be an error, as it would be on a GPU."""
    config = family_config(family)
    with torch.device("meta"):
        model = VLA(config)
    inputs = random_inputs(config, 2)
    empty = ModelInputs(
        [p.to("meta") for p in inputs.pixels],
        inputs.token_ids.to("meta"),
        inputs.noise if inputs.noise is None else inputs.noise.to("meta"),
        inputs.proprio if inputs.proprio is None else inputs.proprio.to("meta"),
    )
    pruner = KeepFirst(config.visual_tokens, 4, config.layout(5).blocks[0].stop)
    assert model(empty, pruner).device.type == "meta"


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_the_last_layer_computes_what_the_head_reads(family: str) -> None:
    """Other rows are left out, and the head reads the same as if none were."""
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 2)
    layout = model.layout(inputs)
    streams = model.streams([inputs], tails=True) + model.streams([inputs], tails=False)
    short, whole = model.decoder.run(streams)
    tail = {"diffusion": 1, "tokens": 1, "regression": 26, "flow": 0}[family]
    assert short.blocks[0].shape[1] == tail
    assert whole.blocks[0].shape[1] == layout.blocks[0].stop
    last = whole.blocks[0][:, whole.blocks[0].shape[1] - tail :]
    torch.testing.assert_close(short.blocks[0], last, rtol=1e-5, atol=1e-5)
    states = [model.head.state(model.decoder, stream, layout, inputs.noise) for stream in (short, whole)]
    found, expected = (model.head.act(model.decoder, state) for state in states)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_built_on_meta_and_filled_it_is_the_same_model(family: str) -> None:
    """How large checkpoints are loaded: nothing outside the state dict may stay behind on meta."""
    config = family_config(family)
    model, inputs = random_model(config), random_inputs(config, 2)
    with torch.device("meta"):
        filled = VLA(config)
    filled.load_state_dict(model.state_dict(), strict=True, assign=True)

    assert torch.equal(filled.eval()(inputs), model(inputs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.no_grad()
def test_gpu_equals_cpu(model: VLA, inputs: ModelInputs) -> None:
    pruner = KeepFirst(16, 4, 21)
    on_cpu = model(inputs, pruner)
    assert inputs.noise is not None

    there = ModelInputs([p.cuda() for p in inputs.pixels], inputs.token_ids.cuda(), inputs.noise.cuda())
    on_gpu = model.cuda()(there, pruner)

    torch.testing.assert_close(on_gpu.cpu(), on_cpu, atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_runs_in_bfloat16(model: VLA, inputs: ModelInputs) -> None:
    exact = model.decoder(model.embed(inputs))[:, -1]

    model.bfloat16()
    low = dataclasses.replace(inputs, pixels=[p.bfloat16() for p in inputs.pixels])
    rough = model.decoder(model.embed(low))[:, -1]

    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() / exact.norm() < 0.1
    assert model(low).isfinite().all()


@torch.no_grad()
def test_an_embedding_table_in_bfloat16_is_read_in_the_models_type(model: VLA, inputs: ModelInputs) -> None:
    table = model.decoder.embed_tokens
    table.weight.copy_(table.weight.bfloat16())
    exact = model(inputs)
    table.bfloat16()
    assert torch.equal(model(inputs), exact)
