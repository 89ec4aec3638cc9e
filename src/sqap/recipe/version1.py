"""Recipes of version 1: the decoder's grids among other settings, sensitive linears named by an override."""

from __future__ import annotations

import dataclasses
from typing import Any

from sqap.recipe.quantization import Scheme

# The override by which version 1 kept the linears that read or write actions in bfloat16.
ACTIONS = "head.x_embedder|head.final_layer|head.fc2|head.lm_head|head.action_*_proj"


GRIDS = {field.name for field in dataclasses.fields(Scheme)}


def version_of(data: Any, latest: int) -> Any:
    """The version that a recipe's JSON is of; where it says none, grids outside a part are of version 1."""
    if not isinstance(data, dict):
        return latest
    quantization = data.get("quantization")
    return data.get("version", 1 if isinstance(quantization, dict) and GRIDS & set(quantization) else latest)


def from_version1(data: dict[str, Any]) -> dict[str, Any]:
    """The same recipe in version 2, as JSON; what is wrong with ``data`` is left for the reader to find."""
    quantization = data.get("quantization")
    if not isinstance(quantization, dict):
        return {**data, "version": 2}
    decoder = {name: value for name, value in quantization.items() if name in GRIDS}
    rest = {name: value for name, value in quantization.items() if name not in GRIDS}
    spared = {"pattern": ACTIONS, "scheme": None}
    overrides = rest.get("overrides")
    if isinstance(overrides, list) and spared in overrides:
        rest["overrides"] = [override for override in overrides if override != spared]
    else:
        rest["sensitive"] = rest.get("head")
    return {**data, "version": 2, "quantization": {"decoder": decoder, **rest}}
