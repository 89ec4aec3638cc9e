"""Another library reads our 4-bit weights: compressed-tensors decodes them to the same values."""

import pytest
import torch
from torch import nn

from sqap.quantization.linear import QuantizedLinear
from sqap.recipe import Scheme

compressed_tensors = pytest.importorskip("compressed_tensors")


@pytest.mark.parametrize(
    "scheme", [Scheme(4, 8), Scheme(4, 8, "group", 32)], ids=["per channel", "groups of 32"]
)
def test_compressed_tensors_decodes_our_weights(scheme: Scheme) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    linear = QuantizedLinear.from_linear(nn.Linear(128, 24, bias=False), scheme)
    stored = {
        "weight_packed": linear.weight.view(torch.int32),
        "weight_scale": linear.scale,
        "weight_shape": torch.tensor([24, 128]),
    }
    theirs = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(
            num_bits=4,
            symmetric=True,
            strategy=scheme.weight_granularity,
            group_size=scheme.group_size,
        ),
    )
    decoded = PackedQuantizationCompressor.decompress(stored, theirs)["weight"]
    assert torch.equal(decoded, linear.dequantized())
