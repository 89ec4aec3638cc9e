"""The quantized embedding table: 8-bit rows, of which a step dequantizes those that it looks up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sqap.models.config import DecoderConfig
from sqap.models.decoder import Decoder
from sqap.models.storage import STORAGE_DTYPE, stored_bytes
from sqap.quantization.grid import quantize_weight
from sqap.recipe import Quantization

# A table is large that has this share, or more, of the values that the decoder's layers have.
LARGE = 0.1
BITS = 8


class QuantizedEmbedding(nn.Module):
    """An embedding table on integers, symmetric, with a scale for each row.

    Buffers: ``weight``, int8 ``(rows, width)``; ``scale``, float32 ``(rows, 1)``.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, rows: int, width: int, device: torch.device | None = None) -> None:
        """All rows zero, to be loaded."""
        super().__init__()
        self.register_buffer("weight", torch.zeros(rows, width, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.zeros(rows, 1, dtype=torch.float32, device=device))

    @classmethod
    def empty_like(cls, table: nn.Embedding) -> QuantizedEmbedding:
        """The shape and device of ``table``, with rows yet to be loaded."""
        return cls(table.num_embeddings, table.embedding_dim, table.weight.device)

    @classmethod
    @torch.no_grad()
    def from_embedding(cls, table: nn.Embedding) -> QuantizedEmbedding:
        """Round the rows of ``table`` to the nearest level.

        Raises:
            InputError: a value is not finite.
        """
        quantized = cls.empty_like(table)
        quantized.weight, quantized.scale = quantize_weight(table.weight.detach(), BITS, "channel")
        return quantized

    def dequantized(self) -> Tensor:
        """The float32 table ``(rows, width)`` that the integers stand for."""
        return self.weight * self.scale

    def forward(self, ids: Tensor) -> Tensor:
        """The rows ``(..., width)``, float32, of token ids ``(...)``."""
        return nn.functional.embedding(ids, self.weight) * nn.functional.embedding(ids, self.scale)


def quantize_table(decoder: Decoder) -> None:
    """Store a decoder's embedding table in 8 bits, in place.

    Raises:
        InputError: a value is not finite.
    """
    decoder.add_module("embed_tokens", QuantizedEmbedding.from_embedding(decoder.embed_tokens))


def prepare_table(decoder: Decoder) -> None:
    """Give a decoder the table that `quantize_table` would, with rows yet to be loaded."""
    decoder.add_module("embed_tokens", QuantizedEmbedding.empty_like(decoder.embed_tokens))


def describe_table(decoder: Decoder) -> dict[str, int]:
    """Rows, width, bits and stored bytes of a decoder's embedding table."""
    table, config = decoder.embed_tokens, decoder.config
    bits = BITS if isinstance(table, QuantizedEmbedding) else 8 * STORAGE_DTYPE.itemsize
    return {"rows": config.vocabulary, "width": config.width, "bits": bits, "bytes": stored_bytes(table)}


def quantizes_table(config: DecoderConfig, quantization: Quantization) -> bool:
    """Whether the recipe stores the embedding table of a decoder of these sizes in 8 bits."""
    if quantization.embedding_bits is not None:
        return quantization.embedding_bits == BITS
    attention = config.head_dim * 2 * (config.heads + config.kv_heads)
    layers = config.depth * config.width * (attention + 3 * config.mlp_width)
    return config.vocabulary * config.width >= LARGE * layers
