"""Rotation: a rotated policy is the same function, in another basis."""

import copy
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.kernels.hadamard import Hadamard, block_hadamard
from sqap.models import VLA, DecoderConfig, ModelInputs
from sqap.models.decoder import Decoder, DecoderLayer, RMSNorm, rope_angles
from sqap.models.stream import LayerOutput
from sqap.quantization import prepare_rotated, quantize_model, rotate_decoder
from sqap.quantization import rotation as rotation_module
from sqap.quantization.rotation import (
    HadamardLinear,
    Rotation,
    is_rotated,
    rotate_input,
    rotate_norm,
    rotate_stage,
)
from sqap.recipe import Quantization
from tests.families import family_config, random_model

MakeModel = Callable[..., VLA]
seeds = pytest.mark.parametrize("seed", [None, 3])


def random_decoder(config: DecoderConfig) -> Decoder:
    """Gains and biases are random, so that nothing passes because one is one or zero."""
    torch.manual_seed(0)
    decoder = Decoder(config).eval()
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            nn.init.uniform_(module.weight, 0.3, 3.0)
    return decoder


SHAPES = [
    {},
    {"width": 256, "heads": 4, "kv_heads": 2},
    {"width": 192, "heads": 3, "kv_heads": 3, "mlp": 512},
    {"width": 72, "heads": 6, "kv_heads": 2, "head_dim": 12, "mlp": 88},
    {"width": 46, "heads": 3, "kv_heads": 1, "head_dim": 14, "mlp": 7},
]


@pytest.mark.parametrize("shape", SHAPES)
@seeds
@torch.no_grad()
def test_a_rotated_policy_is_the_same_function(
    make_model: MakeModel, inputs: ModelInputs, shape: dict[str, int], seed: int | None
) -> None:
    model, rotated = make_model(**shape), make_model(**shape)
    rotate_decoder(rotated, seed)
    before, after = model.decoder(model.embed(inputs)), rotated.decoder(rotated.embed(inputs))
    assert (after - before).norm() < 1e-5 * before.norm()
    torch.testing.assert_close(rotated(inputs), model(inputs), rtol=0, atol=1e-4)


@given(
    width=st.sampled_from([144, 24, 96, 48, 40, 32, 10]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2), (2, 2)]),
    head_dim=st.sampled_from([2, 8, 12, 20, 24]),
    mlp=st.sampled_from([144, 24, 96, 44, 7]),
    seed=st.one_of(st.none(), st.integers(0, 2**40)),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=15, deadline=None)
@torch.no_grad()
def test_a_decoder_alone_is_the_same_function(
    width: int, heads: tuple[int, int], head_dim: int, mlp: int, seed: int | None, dtype: torch.dtype
) -> None:
    decoder = random_decoder(DecoderConfig(11, width, 2, *heads, head_dim, mlp)).to(dtype)
    rotated = copy.deepcopy(decoder)
    rotate_decoder(rotated, seed)
    ids = torch.tensor([[1, 5, 9, 2, 10, 0]])
    before, after = decoder(decoder.embed_tokens(ids)), rotated(rotated.embed_tokens(ids))
    assert (after - before).norm() < 1e-5 * before.norm()


@torch.no_grad()
def test_everything_inside_is_in_another_basis(make_model: MakeModel, inputs: ModelInputs) -> None:
    model, rotated = make_model(), make_model()
    rotate_decoder(rotated)
    before, after = model.see(inputs.pixels), rotated.see(inputs.pixels)
    torch.testing.assert_close(after, block_hadamard(before, 128), rtol=0, atol=1e-5)
    for name, weight in model.decoder.layers.named_parameters():
        changed = (rotated.decoder.layers.get_parameter(name) - weight).norm() / weight.norm()
        assert changed > 0.1, name


@torch.no_grad()
def test_signs_are_another_basis_again(make_model: MakeModel, inputs: ModelInputs) -> None:
    plain, signed, other = make_model(), make_model(), make_model()
    for model, seed in ((plain, None), (signed, 3), (other, 4)):
        rotate_decoder(model, seed)
    names = [f"decoder.{name}" for name, _ in plain.decoder.named_parameters() if "layernorm" not in name]
    for name in names:
        matrices = [model.get_parameter(name) for model in (plain, signed, other)]
        for a, b in ((0, 1), (1, 2), (0, 2)):
            assert (matrices[a] - matrices[b]).norm() > 0.1 * matrices[a].norm(), name
    rotation = Rotation.of(signed.config.decoder, 3)
    expected = rotation.residual.apply(make_model().see(inputs.pixels))
    torch.testing.assert_close(signed.see(inputs.pixels), expected, rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_bytes(make_model: MakeModel) -> None:
    first, second = make_model(), make_model()
    rotate_decoder(first, 3)
    rotate_decoder(second, 3)
    for name, weight in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], weight), name


@torch.no_grad()
def test_biases_are_rotated_too() -> None:
    """Qwen's q, k and v have biases."""
    decoder = random_decoder(DecoderConfig(11, 96, 2, 4, 2, 24, 48))
    for name, module in list(decoder.layers.named_modules()):
        if isinstance(module, nn.Linear):
            biased = nn.Linear(module.in_features, module.out_features)
            parent, _, attribute = name.rpartition(".")
            setattr(decoder.layers.get_submodule(parent), attribute, biased)
    rotated = copy.deepcopy(decoder)
    rotate_decoder(rotated, 3)
    ids = torch.tensor([[1, 5, 9, 2, 10, 0]])
    before, after = decoder(decoder.embed_tokens(ids)), rotated(rotated.embed_tokens(ids))
    assert (after - before).norm() < 1e-5 * before.norm()


@seeds
@torch.no_grad()
def test_stages_rotated_one_by_one_are_the_whole(make_model: MakeModel, seed: int | None) -> None:
    whole, staged = make_model(), make_model()
    rotate_decoder(whole, seed)
    rotation = Rotation.of(staged.config.decoder, seed)
    rotate_input(staged.decoder.embed_tokens, None, rotation)
    rotate_stage(staged.projector, rotation)
    staged.decoder.norm = rotate_norm(staged.decoder.norm, rotation)
    for layer in reversed(staged.decoder.layers):
        assert isinstance(layer, DecoderLayer)
        rotate_stage(layer, rotation)
    for name, weight in whole.state_dict().items():
        assert torch.equal(staged.state_dict()[name], weight), name


@seeds
@torch.no_grad()
def test_one_layer_reads_and_writes_the_rotated_stream(seed: int | None) -> None:
    config = DecoderConfig(11, 96, 1, 4, 2, 24, 48)
    layer = random_decoder(config).layers[0]
    rotated, rotation = copy.deepcopy(layer), Rotation.of(config, seed)
    assert isinstance(rotated, DecoderLayer)
    rotate_stage(rotated, rotation)
    x, rope = torch.randn(2, 5, 96), rope_angles(torch.arange(5)[None], config, torch.float32)
    expected = rotation.residual.apply(layer(x, rope)[0])
    torch.testing.assert_close(rotated(rotation.residual.apply(x), rope)[0], expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_norm_is_copied_not_changed() -> None:
    decoder = random_decoder(DecoderConfig(11, 96, 1, 4, 2, 24, 48))
    before, rotation = decoder.norm.weight.clone(), Rotation.of(decoder.config, 3)
    rotated, x = rotate_norm(decoder.norm, rotation), torch.randn(2, 96)
    assert torch.equal(decoder.norm.weight, before)
    torch.testing.assert_close(rotated(rotation.residual.apply(x)), decoder.norm(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_weights_rotated_piece_by_piece_are_the_same(
    make_model: MakeModel, shape: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, in_pieces = make_model(**shape), make_model(**shape)
    rotate_decoder(at_once, 3)
    monkeypatch.setattr(rotation_module, "PIECE", 3000)
    rotate_decoder(in_pieces, 3)
    for name, weight in at_once.state_dict().items():
        torch.testing.assert_close(in_pieces.state_dict()[name], weight, rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_attention_is_what_it_was(make_model: MakeModel, inputs: ModelInputs) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.received: list[Tensor] = []

        def score_rows(self, layer: int) -> Tensor:
            return torch.tensor([17, 20])

        def keep(self, layer: int, output: LayerOutput) -> None:
            assert output.received is not None
            self.received.append(output.received)

    records = []
    for rotate in (False, True):
        model, recorder = make_model(), Recorder()
        if rotate:
            rotate_decoder(model)
        model.decoder(model.embed(inputs), pruner=recorder)
        records.append(torch.stack(recorder.received))
    torch.testing.assert_close(records[1], records[0], rtol=1e-4, atol=1e-6)


@seeds
@torch.no_grad()
def test_rotated_weights_load_into_a_prepared_model(
    make_model: MakeModel, inputs: ModelInputs, seed: int | None
) -> None:
    rotated, loaded = make_model(), make_model()
    names = set(rotated.state_dict())
    rotate_decoder(rotated, seed)
    assert set(rotated.state_dict()) == names
    weights = copy.deepcopy(loaded.state_dict())
    prepare_rotated(loaded)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, weights[name])
    loaded.load_state_dict(rotated.state_dict())
    assert torch.equal(loaded(inputs), rotated(inputs))


@torch.no_grad()
def test_half_precision_weights_are_rounded_once(make_model: MakeModel) -> None:
    exact, half = make_model().bfloat16().double(), make_model().bfloat16()
    rotate_decoder(exact, 3)
    rotate_decoder(half, 3)
    for name, weight in exact.state_dict().items():
        assert torch.equal(half.state_dict()[name], weight.bfloat16()), name


@torch.no_grad()
def test_weights_are_rotated_in_64_bits(make_model: MakeModel) -> None:
    model, rotated = make_model().double(), make_model().double()
    rotate_decoder(rotated, 3)
    rotation = Rotation.of(model.config.decoder, 3)
    gain = model.get_parameter("decoder.layers.0.input_layernorm.weight")
    for name, scale in (("embed_tokens", 1), ("layers.0.self_attn.q_proj", gain)):
        expected = rotation.residual.apply(model.get_parameter(f"decoder.{name}.weight") * scale)
        found = rotated.get_parameter(f"decoder.{name}.weight")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


def test_rotating_twice_is_refused(make_model: MakeModel) -> None:
    model = make_model()
    assert not is_rotated(model)
    rotate_decoder(model)
    assert is_rotated(model)
    assert is_rotated(model.decoder)
    weights = copy.deepcopy(model.state_dict())
    layer: Any = model.decoder.layers[0]
    for again in (
        lambda: rotate_decoder(model),
        lambda: rotate_decoder(model.decoder),
        lambda: prepare_rotated(model),
        lambda: rotate_stage(layer, Rotation.of(model.config.decoder)),
    ):
        with pytest.raises(InputError, match="already rotated"):
            again()
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name


@pytest.mark.parametrize("verb", [rotate_decoder, prepare_rotated])
def test_a_quantized_decoder_is_not_rotated(make_model: MakeModel, verb: Callable[[VLA], None]) -> None:
    """Not even in part: here only the last layer is quantized, and the first is looked at before it."""
    model, quantized = make_model(), quantize_model(make_model(), Quantization(rotate=False))
    model.decoder.layers[-1] = quantized.decoder.layers[-1]
    weights = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match="already quantized"):
        verb(model)
    assert not is_rotated(model)
    assert not any(isinstance(module, HadamardLinear) for module in model.modules())
    for name, weight in model.state_dict().items():
        assert torch.equal(weights[name], weight), name


def test_a_hadamard_linear_shares_the_parameters_it_takes_over() -> None:
    linear = torch.nn.Linear(64, 3)
    rotating = HadamardLinear(linear, 64)
    assert rotating.weight is linear.weight
    assert rotating.bias is linear.bias
    x = torch.randn(5, 64)
    torch.testing.assert_close(rotating(block_hadamard(x, 64)), linear(x))
    torch.testing.assert_close(rotating.rotate_input(x), Hadamard(64).apply(x))


@torch.no_grad()
def test_what_is_rotated_is_left_alone_and_holds_no_weight() -> None:
    """A head's layers come before the rest of it; their linears are packed in between, and not kept."""
    config = family_config("pi0")
    head, rotation = random_model(config).head, Rotation.of(config.decoder, 3)
    layer, done = head.get_submodule("layers.1"), set[nn.Module]()
    rotate_stage(layer, rotation, done)
    once = layer.state_dict()["self_attn.v_proj.weight"].clone()
    rotate_stage(head, rotation, done)
    assert torch.equal(layer.state_dict()["self_attn.v_proj.weight"], once)
    assert done == {head.get_submodule(f"layers.{i}") for i in range(3)}
