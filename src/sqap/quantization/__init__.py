"""Quantization: grids, their packing, the rotation that suits them, GPTQ, and the walk through a model."""

from sqap.quantization.coverage import LinearReport, check_coverage, count_parameters, list_linears
from sqap.quantization.embedding import QuantizedEmbedding, describe_table
from sqap.quantization.linear import QuantizedLinear
from sqap.quantization.model import prepare_quantized, quantize_decoder, quantize_model
from sqap.quantization.partial import Partial
from sqap.quantization.rotation import prepare_rotated, rotate_decoder
from sqap.quantization.sequential import share, wanted

__all__ = [
    "LinearReport",
    "Partial",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "check_coverage",
    "count_parameters",
    "describe_table",
    "list_linears",
    "prepare_quantized",
    "prepare_rotated",
    "quantize_decoder",
    "quantize_model",
    "rotate_decoder",
    "share",
    "wanted",
]
