"""Keys and values in few bits: how far off, how small, and the same with a cache as without."""

import copy

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor

from sqap.kernels.hadamard import Hadamard
from sqap.models import DecoderConfig
from sqap.models.decoder import Attention, Decoder, DecoderLayer
from sqap.models.kv import FloatKV, KVCache
from sqap.models.stream import LayerOutput
from sqap.quantization.kv import QuantizedKV, dequantize_kv, quantize_kv, set_kv_bits

CONFIG = DecoderConfig(40, 64, 3, 4, 2, 16, 96)
all_bits = pytest.mark.parametrize("bits", [4, 8])


def make_decoder(bits: int | None, config: DecoderConfig = CONFIG) -> Decoder:
    """64 bits wide, in which no sum comes near enough to a rounding boundary to fall on its other side."""
    torch.manual_seed(0)
    decoder = Decoder(config).eval().double()
    set_kv_bits(decoder, bits)
    return decoder


def embedded(decoder: Decoder, tokens: int = 17) -> Tensor:
    ids = torch.randint(0, 40, (2, tokens), generator=torch.Generator().manual_seed(1))
    return decoder.embed_tokens(ids).detach()


class Pruner:
    """Keeps ``kept`` ``(batch, kept)`` after layer 1 and records what ``rows`` attend to."""

    def __init__(self, rows: Tensor, kept: Tensor | None = None) -> None:
        self.rows, self.kept = rows, kept
        self.received: list[Tensor] = []

    def score_rows(self, layer: int) -> Tensor | None:
        return self.rows if layer <= 1 else None

    def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
        if output.received is not None:
            self.received.append(output.received)
        return self.kept if layer == 1 else None


@given(
    bits=st.sampled_from([4, 8]),
    width=st.sampled_from([8, 24, 64]),
    size=st.sampled_from([1e-20, 1e-3, 1.0, 1e4, 1e20]),
    offset=st.sampled_from([-5.0, -1.0, 0.0, 0.5, 100.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_no_value_is_off_by_more_than_a_step(
    bits: int, width: int, size: float, offset: float, seed: int
) -> None:
    x = size * (offset + torch.randn(2, 3, 5, width, generator=torch.Generator().manual_seed(seed)))
    found = dequantize_kv(quantize_kv(x, bits), bits)
    span = x.amax(-1, keepdim=True).clamp_min(0) - x.amin(-1, keepdim=True).clamp_max(0)
    assert found.dtype == torch.float32
    assert ((found - x) / span * (2**bits - 1)).abs().max() < 1.001


@all_bits
def test_errors_are_those_of_rounding_to_the_nearest(bits: int) -> None:
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    low, high = x.aminmax(dim=-1, keepdim=True)
    error = (dequantize_kv(quantize_kv(x, bits), bits) - x) / (high - low) * (2**bits - 1)
    assert 0.8 / 12 < error.square().mean() < 1.05 / 12


@all_bits
def test_zeros_stay_zeros(bits: int) -> None:
    zeros = torch.zeros(1, 2, 3, 8)
    assert torch.equal(dequantize_kv(quantize_kv(zeros, bits), bits), zeros)


@all_bits
def test_keys_and_values_are_stored_as_packed_integers(bits: int) -> None:
    q, k, v = torch.randn(2, 4, 7, 64), torch.randn(2, 2, 7, 64), torch.randn(2, 2, 7, 64)
    turned, stored = QuantizedKV(bits, Hadamard.of(64)).store(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert turned.dtype == torch.bfloat16
    levels = torch.uint8 if bits == 4 else torch.int8
    assert [part.dtype for part in stored] == [levels, torch.float32, torch.int8] * 2
    assert [part.shape for part in stored] == [(2, 2, 7, 8 * bits), (2, 2, 7, 1), (2, 2, 7, 1)] * 2


@pytest.mark.parametrize(("bits", "share"), [(4, 0.25), (8, 0.5)])
@torch.no_grad()
def test_the_cache_is_as_small_as_it_says(bits: int, share: float) -> None:
    config = DecoderConfig(40, 64, 3, 2, 1, 128, 96)
    sizes = []
    for kv_bits in (None, bits):
        decoder, cache = make_decoder(kv_bits, config).bfloat16(), KVCache(3)
        assert cache.nbytes == 0
        for x in embedded(decoder).split([16, 1], dim=1):
            decoder(x, cache=cache)
        sizes.append(cache.nbytes)
    tokens = 3 * 2 * 17  # layers, batch, tokens
    assert sizes[0] == tokens * 2 * 128 * 2
    assert sizes[1] == tokens * 2 * (128 * bits // 8 + 4 + 1)
    assert share < sizes[1] / sizes[0] < share + 0.02


@pytest.mark.parametrize("pieces", [[16, 1], [9, 1, 1, 6], [1] * 17], ids=str)
@all_bits
@torch.no_grad()
def test_cached_and_uncached_passes_give_the_same_numbers(bits: int, pieces: list[int]) -> None:
    decoder, cache = make_decoder(bits), KVCache(3)
    x = embedded(decoder)
    parts = [decoder(part, cache=cache) for part in x.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), decoder(x), rtol=0, atol=1e-6)


@all_bits
@torch.no_grad()
def test_a_pruned_cache_goes_on_too(bits: int) -> None:
    decoder, cache = make_decoder(bits), KVCache(3)
    x, rows = embedded(decoder), torch.tensor([15])
    kept = torch.tensor([[0, 4, 5, 13, 15], [0, 1, 2, 3, 15]])
    decoder(x[:, :16], cache=cache, pruner=Pruner(rows, kept))
    later = decoder(x[:, 16:], cache=cache)
    at_once = decoder(x, pruner=Pruner(rows, F.pad(kept, (0, 1), value=16)))
    torch.testing.assert_close(later[:, -1], at_once[:, -1], rtol=0, atol=1e-6)


@torch.no_grad()
def test_fewer_bits_are_farther_off_and_none_is_exact() -> None:
    exact = make_decoder(None)
    x = embedded(exact)
    outputs = {bits: make_decoder(bits)(x) for bits in (4, 8)}
    expected = exact(x)
    errors = {bits: float((out - expected).norm() / expected.norm()) for bits, out in outputs.items()}
    assert 1e-5 < errors[8] < 0.01 < errors[4] < 0.2
    back = make_decoder(4)
    set_kv_bits(back, None)
    assert torch.equal(back(x), expected)


@torch.no_grad()
def test_scores_are_what_they_were_but_for_rounding() -> None:
    q, k = torch.randn(1, 4, 9, 24).double(), torch.randn(1, 4, 9, 24).double()
    kv = QuantizedKV(8, Hadamard.of(24))
    turned, stored = kv.store(q, k, k)
    keys, _ = kv.load(stored, torch.float64)
    scores = q @ k.transpose(-1, -2)
    assert (keys - k).norm() > 0.5 * k.norm()  # in another basis
    assert (turned @ keys.transpose(-1, -2) - scores).norm() < 0.01 * scores.norm()


@torch.no_grad()
def test_the_transform_rescues_keys_from_their_large_channels() -> None:
    torch.manual_seed(0)
    k = torch.randn(1, 1, 200, 64)
    k[..., 7] += 20
    k[..., 40] -= 30
    q = torch.randn(1, 1, 200, 64)
    exact = q @ k.transpose(-1, -2)

    def error(hadamard: Hadamard) -> float:
        kv = QuantizedKV(4, hadamard)
        turned, stored = kv.store(q, k, k)
        return float((turned @ kv.load(stored, torch.float32)[0].transpose(-1, -2) - exact).norm())

    assert error(Hadamard.of(64)) < 0.6 * error(Hadamard(1))


@all_bits
@torch.no_grad()
def test_the_pruner_scores_the_keys_that_are_attended_to(bits: int) -> None:
    """The same with a cache and without, and not those of the float keys."""
    rows = torch.tensor([3, 16])
    scores = []
    for decoder, cache in (
        (make_decoder(bits), None),
        (make_decoder(bits), KVCache(3)),
        (make_decoder(None), None),
    ):
        pruner = Pruner(rows)
        decoder(embedded(decoder), cache=cache, pruner=pruner)
        scores.append(torch.stack(pruner.received))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-6)
    assert 1e-6 < (scores[0] - scores[2]).abs().max() < 0.05


@torch.no_grad()
def test_scores_and_mixture_read_what_the_format_loads() -> None:
    class NoKeys(FloatKV):
        def load(self, stored: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            k, v = super().load(stored, dtype)
            return torch.zeros_like(k), v

    decoder = make_decoder(None)
    layer = decoder.layers[0]
    assert isinstance(layer, DecoderLayer)
    layer.self_attn.kv_format = NoKeys()
    pruner = Pruner(torch.tensor([16]))
    decoder(embedded(decoder), pruner=pruner)
    torch.testing.assert_close(pruner.received[0], torch.full((2, 17), 1 / 17), rtol=0, atol=1e-6)


def test_the_option_is_no_weight_and_survives_a_copy() -> None:
    decoder = make_decoder(4)
    assert set(decoder.state_dict()) == set(make_decoder(None).state_dict())
    formats = [
        module.kv_format for module in copy.deepcopy(decoder).modules() if isinstance(module, Attention)
    ]
    assert formats == [QuantizedKV(4, Hadamard.of(16))] * 3


@torch.no_grad()
def test_runs_in_bfloat16() -> None:
    exact, rough = make_decoder(4), make_decoder(4).bfloat16()
    expected, found = exact(embedded(exact)), rough(embedded(rough))
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() < 0.1 * expected.norm()
