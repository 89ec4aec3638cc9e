"""Bytes of published policies before and after W4A8, by their shapes: python benchmarks/weight_bytes.py

Nothing is computed, and no weights are needed: what is stored follows from the sizes. Beside it stands what
an embedding table of 8-bit rows costs in error, on rows of a real language model (the bundled
``reference-smollm``) as they are and rotated, and on normal ones as wide as PaliGemma's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import sqap
from sqap.benchmark.shapes import SHAPES
from sqap.files import write_json
from sqap.models import ModelConfig, empty_model
from sqap.models.storage import STORAGE_DTYPE, size, stored_bytes
from sqap.quantization import QuantizedEmbedding, prepare_quantized
from sqap.quantization.rotation import Rotation
from sqap.recipe import Recipe

PALIGEMMA_WIDTH = 2048


def weight_bytes(config: ModelConfig, embedding_bits: int | None) -> dict[str, int]:
    """Bytes of the whole model and of its embedding table, by preset w4a8 with such a table."""
    quantization = Recipe.w4a8().quantization
    assert quantization is not None
    model = empty_model(config.compressed)
    prepare_quantized(model, replace(quantization, embedding_bits=embedding_bits))
    return {"all": stored_bytes(model), "table": stored_bytes(model.decoder.embed_tokens)}


def row_errors(rows: Tensor) -> dict[str, float]:
    """Norm of a row's error over the row's, mean over rows: with 8 bits, and in bfloat16."""
    eight = QuantizedEmbedding.from_embedding(nn.Embedding.from_pretrained(rows)).dequantized()  # type: ignore[no-untyped-call]
    found = {"8": eight, "bfloat16": rows.to(STORAGE_DTYPE).float()}
    return {name: float(((x - rows).norm(dim=1) / rows.norm(dim=1)).mean()) for name, x in found.items()}


def tables() -> dict[str, Tensor]:
    """Embedding tables, float32."""
    decoder = sqap.load("reference-smollm").model.decoder
    rows = decoder.embed_tokens.weight.float()
    turned = Rotation.of(decoder.config, 0).residual.apply(rows.double()).float()
    normal = torch.randn(4096, PALIGEMMA_WIDTH, generator=torch.Generator().manual_seed(0))
    return {"SmolLM2's": rows, "SmolLM2's, rotated": turned, f"normal, {PALIGEMMA_WIDTH} wide": normal}


def measure() -> dict[str, Any]:
    """All of it."""
    shapes = {}
    for name, config in SHAPES.items():
        before = stored_bytes(empty_model(config))
        after = {bits: weight_bytes(config, bits) for bits in (16, 8, None)}
        shapes[name] = {"bfloat16": before, "w4a8": {str(bits): each for bits, each in after.items()}}
    return {"shapes": shapes, "row_errors": {name: row_errors(rows) for name, rows in tables().items()}}


def show(found: Mapping[str, Any], console: Console) -> None:
    """Two tables."""
    bits = {"16": "table in bfloat16", "8": "in 8 bits", "None": "as the preset has it"}
    table = Table("", "bfloat16", *bits.values(), title="Weights, W4A8", title_justify="left")
    for name, shape in found["shapes"].items():
        whole = shape["bfloat16"]
        cells = [f"{size(x['all'])}, {x['all'] / whole:.1%}" for x in (shape["w4a8"][key] for key in bits)]
        table.add_row(name, size(whole), *cells)
    errors = Table("rows", "8 bits", "bfloat16", title="Relative error of a row", title_justify="left")
    for name, each in found["row_errors"].items():
        errors.add_row(name, f"{each['8']:.2%}", f"{each['bfloat16']:.2%}")
    console.print(table, errors)


def main() -> None:
    """Print, and write if it is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    found = measure()
    show(found, Console(width=110))
    if args.json is not None:
        write_json(args.json, {"sqap": sqap.__version__, **found})


if __name__ == "__main__":
    main()
