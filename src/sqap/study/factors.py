"""The factors of a study and their levels, as the command line names them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, get_args

from sqap.errors import InputError
from sqap.recipe import Pruning, PruningMethod, Quantization, Recipe

Level = str | float | int
Levels = Mapping[str, Level | None]  # factor -> level; None where it means nothing

NAMES: dict[str, PruningMethod] = {"fastv": "attention", "paper": "sqap"}  # criteria by their papers' names
CRITERIA: dict[str, PruningMethod] = {
    **{name: name for name in get_args(PruningMethod) if name not in NAMES.values()},
    **NAMES,
}
CHOICES: dict[str, tuple[str, ...]] = {
    "bits": ("16", "w8a8", "w4a8", "w4a4"),
    "rotation": ("off", "on"),
    "rounding": ("rtn", "gptq"),
    "criteria": tuple(CRITERIA),
}
DEFAULTS: dict[str, tuple[Level, ...]] = {
    "bits": ("16", "w4a8"),
    "rotation": ("on",),
    "rounding": ("gptq",),
    "keep": (1.0,),
    "criteria": ("lookahead",),
    "after": (3,),
}
QUANTIZATION = ("rotation", "rounding")  # mean nothing at 16 bits
PRUNING = ("criteria", "after")  # mean nothing where all tokens are kept


def parse(text: str) -> dict[str, tuple[Level, ...]]:
    """``"bits=16,w4a8 keep=1.0,0.4"`` as factor -> levels, of all factors in their order.

    Raises:
        InputError: a factor or level is unknown or named twice.
    """
    given: dict[str, tuple[Level, ...]] = {}
    for part in text.split():
        factor, equals, levels = part.partition("=")
        if not equals or factor not in DEFAULTS:
            raise InputError(
                f"--factors: {part!r} must be FACTOR=LEVEL,LEVEL; factors: {', '.join(DEFAULTS)}"
            )
        if factor in given:
            raise InputError(f"--factors: {factor} is named more than once")
        given[factor] = tuple(_level(factor, level) for level in levels.split(","))
        if len(set(given[factor])) < len(given[factor]):
            raise InputError(f"--factors: {part} names a level more than once")
    return {factor: given.get(factor, levels) for factor, levels in DEFAULTS.items()}


def _level(factor: str, text: str) -> Level:
    if factor in CHOICES:
        if text not in CHOICES[factor]:
            raise InputError(
                f"--factors: {factor} has no level {text!r}; it has {', '.join(CHOICES[factor])}"
            )
        return text
    try:
        value = float(text) if factor == "keep" else int(text)
    except ValueError:
        kind = "a number" if factor == "keep" else "a whole number"
        raise InputError(f"--factors: {factor}={text} must be {kind}") from None
    if factor == "keep" and not 0 < value <= 1:
        raise InputError(f"--factors: keep={text} must be in (0, 1]")
    return value


def meaningful(levels: Levels) -> dict[str, Level | None]:
    """The levels with None for each factor that decides nothing beside the others."""
    nothing: tuple[str, ...] = ()
    if levels["bits"] == "16":
        nothing += QUANTIZATION
    if levels["keep"] == 1:
        nothing += PRUNING
    return {factor: None if factor in nothing else level for factor, level in levels.items()}


def recipe(levels: Levels) -> Recipe:
    """What a combination of levels does to a policy.

    Raises:
        InputError: no policy can be pruned so.
    """
    return Recipe(_quantization(levels), _pruning(levels))


def name(levels: Levels) -> str:
    """A short name, as ``w4a4-rtn+lookahead-0.25``: what is as usual is left out."""
    parts = [str(levels["bits"])]
    parts += ["norot"] if levels["rotation"] == "off" else []
    parts += ["rtn"] if levels["rounding"] == "rtn" else []
    found = "-".join(parts)
    if levels["criteria"] is not None:
        found += f"+{levels['criteria']}-{levels['keep']}"
        found += "" if levels["after"] == 3 else f"-after{levels['after']}"
    return found


def _quantization(levels: Levels) -> Quantization | None:
    bits = levels["bits"]
    if bits == "16":
        return None
    presets = {"w8a8": Recipe.w8a8, "w4a8": Recipe.w4a8, "w4a4": Recipe.w4a4}
    preset = presets[str(bits)](keep=1).quantization
    assert preset is not None
    changes: dict[str, Any] = {"rounding": "nearest" if levels["rounding"] == "rtn" else "gptq"}
    if levels["rotation"] == "off":
        changes |= {"rotate": False, "rotation_seed": None}
    return replace(preset, **changes)


def _pruning(levels: Levels) -> Pruning | None:
    criterion, keep, after = levels["criteria"], levels["keep"], levels["after"]
    if criterion is None or keep == 1:
        return None
    return Pruning(float(keep or 0), int(after or 0), CRITERIA[str(criterion)])
