"""Which published format a directory is in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqap.checkpoints import adapters, cogact, openpi, openvla, openvla_oft, pi0, smolvla
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.opened import CONFIG, Opened
from sqap.checkpoints.tensors import shorten
from sqap.errors import CheckpointError
from sqap.serialization import read_object


@dataclass(frozen=True)
class Format:
    """A published layout on disk: how to tell it, and how to open it, checked but not read."""

    name: str
    recognise: Callable[[Path], bool]
    open: Callable[[Path, Choices], Opened]


FORMATS = (
    Format("OpenVLA", openvla.recognise, openvla.open),
    Format("OpenVLA-OFT", openvla_oft.recognise, openvla_oft.open),
    Format("CogACT and OpenVLA in Prismatic's own layout", cogact.recognise, cogact.open),
    Format("SmolVLA", smolvla.recognise, smolvla.open),
    Format("pi0 and pi0.5", pi0.recognise, pi0.open),
    Format("pi0 and pi0.5 of openpi, converted to PyTorch", openpi.recognise, openpi.open),
)
# LeRobot's policies that people may well bring, and what they are called.
NOT_SUPPORTED = {
    "pi0_fast": "pi0-FAST",
    "pi0fast": "pi0-FAST",
    "groot": "GR00T",
    "xvla": "X-VLA",
}
ORBAX = "params/_METADATA"  # openpi's JAX checkpoints


def recognise(directory: Path) -> Format:
    """The format of ``directory``, by what its files say.

    Raises:
        CheckpointError: it is none that sqap knows, or its configuration is not JSON.
    """
    found = [known for known in FORMATS if known.recognise(directory)]
    if len(found) > 1:
        both = " and ".join(known.name for known in found)
        raise CheckpointError(f"{directory / CONFIG} is that of {both}; leave one of them there")
    if found:
        return found[0]
    names = "; ".join(known.name for known in FORMATS)
    raise CheckpointError(
        f"{directory} is of no family that sqap knows: {_found(directory)}; known are {names}"
    )


def _found(directory: Path) -> str:
    """What there is instead, as a phrase."""
    path = directory / CONFIG
    if (directory / ORBAX).is_file():
        return (
            f"its {ORBAX} is of openpi's JAX checkpoints, which LeRobot has for PyTorch on the hub "
            "(lerobot/pi0_base, lerobot/pi05_base), and openpi's convert_jax_model_to_pytorch.py converts"
        )
    if not path.is_file():
        if adapters.find(directory):
            return "it has a LoRA adapter without the model that it adapts: merge it into that one first"
        there = sorted(entry.name for entry in directory.iterdir())
        return f"it has no {path.name}, but {shorten(there)}" if there else "it is empty"
    config = read_object(path, CheckpointError)
    if config.get("type") in NOT_SUPPORTED:
        return f"LeRobot's {NOT_SUPPORTED[config['type']]} is not supported"
    for key in ("model_type", "type"):
        if key in config:
            return f"its {path.name} has the {key} {config[key]!r}"
    return f"its {path.name} has neither a model_type nor a base VLM"
