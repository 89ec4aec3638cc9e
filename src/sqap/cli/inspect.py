"""``sqap inspect``."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from sqap.checkpoints.choices import Choices
from sqap.cli.options import (
    NONE,
    SOURCE,
    JsonOption,
    load_policy,
    with_choices,
    write_numbers,
)
from sqap.errors import InputError
from sqap.kernels.cpu import describe
from sqap.kernels.gpu.describe import describe as describe_gpus
from sqap.models.storage import stored_bytes
from sqap.quantization import count_parameters, describe_table, list_linears
from sqap.report import tables
from sqap.terminal import console, user_errors


@with_choices
def inspect(
    source: Annotated[str | None, SOURCE] = None,
    linears: Annotated[bool, typer.Option(help="List every linear.")] = False,
    cpu: Annotated[bool, typer.Option(help="Show and check which kernels run on this processor.")] = False,
    gpu: Annotated[bool, typer.Option(help="Show what runs on the GPUs of this machine, and why.")] = False,
    choices: Choices = NONE,
    json_path: JsonOption = None,
) -> None:
    """Show a policy's parts, bytes and bit-widths, and what is quantized and what is not."""
    with user_errors():
        found: dict[str, Any] = {}
        if cpu:
            found |= describe()
            console.print(tables.kernels_table(found))
        if gpu:
            found |= describe_gpus()
            console.print(tables.gpus_table(found))
        if source is None:
            if not found:
                raise InputError("there is nothing to inspect; name a policy, or give --cpu or --gpu")
            write_numbers(json_path, found)
            return
        loaded = load_policy(source, choices)
        reports = list_linears(loaded.model)
        parts = {
            name: {"parameters": count_parameters(part), "bytes": stored_bytes(part)}
            for name, part in loaded.model.named_children()
        }
        table = describe_table(loaded.model.decoder)
        console.print(tables.parts_table(reports, parts))
        console.print(
            f"Embedding table: {table['rows']} rows of {table['width']}, {table['bits']} bits, "
            f"{tables.size(table['bytes'])}"
        )
        if linears:
            console.print(tables.linears_table(reports))
        console.print_json(data=loaded.recipe.to_json())
        write_numbers(
            json_path,
            {
                "policy": source,
                "family": loaded.config.family,
                "recipe": loaded.recipe.to_json(),
                "calibration": loaded.calibration and dataclasses.asdict(loaded.calibration),
                "visual_tokens": loaded.config.model.visual_tokens,
                "parts": parts,
                "embedding_table": table,
                "linears": [dataclasses.asdict(report) for report in reports],
            },
        )
