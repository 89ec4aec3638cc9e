"""Quantization: the grid, its packing, the rotation that suits it, and the linear that uses all three."""

from sqap.quantization.coverage import LinearReport, check_coverage, count_parameters, list_linears
from sqap.quantization.linear import QuantizedLinear, prepare_quantized, quantize_decoder
from sqap.quantization.rotation import prepare_rotated, rotate_decoder

__all__ = [
    "LinearReport",
    "QuantizedLinear",
    "check_coverage",
    "count_parameters",
    "list_linears",
    "prepare_quantized",
    "prepare_rotated",
    "quantize_decoder",
    "rotate_decoder",
]
