"""Checkpoint directories as policies are published, with random weights of any size.

    python benchmarks/published.py {openvla,cogact,oft-libero,smolvla,...} DIR [--full] [--seed 0]

Names, shapes, types, files and configurations are those of the published directories; figures in them are
made up. `TINY` is for tests: 32064 rows as published, 128 channels, three layers. `FULL` is the real size, in
bfloat16 where it is published in float32 (CogACT's), about 15 GB; writing it needs little memory, and for the
``.pt`` files twice their size on disk while it lasts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import published_names as names
import published_text as text
import torch
from published_lerobot import FULL_SMOLVLA, TINY_SMOLVLA, write_smolvla
from published_names import FULL, TINY, Shapes, Sizes
from published_weights import Spec, write_pickle, write_shards

STEP = 150_000


@dataclass(frozen=True)
class Platform:
    """A robot that OpenVLA-OFT was tuned for, and what it fixes."""

    key: str
    action_dim: int
    chunk: int
    proprio_dim: int
    images: int
    mask: tuple[bool, ...] | None


PLATFORMS = {
    "libero": Platform("libero_spatial_no_noops", 7, 8, 8, 2, (True,) * 6 + (False,)),
    "aloha": Platform("aloha1_fold_shirt_30_demos", 14, 25, 14, 3, (True,) * 14),
    "bridge": Platform("bridge_dataset", 7, 5, 7, 1, (True,) * 6 + (False,)),
}


def write_openvla(directory: Path, sizes: Sizes = TINY, seed: int = 0, shards: int = 3) -> None:
    """OpenVLA for Hugging Face: sharded safetensors, tokenizer, configurations, two data sets' statistics."""
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(directory, _specs(names.openvla(sizes)), seed, shards)
    _write_json(directory / "config.json", text.openvla_config(sizes))
    _write_json(directory / "generation_config.json", text.GENERATION_CONFIG)
    _write_json(directory / "preprocessor_config.json", text.preprocessor_config(sizes))
    _write_json(directory / "tokenizer.json", text.tokenizer())
    _write_json(directory / "tokenizer_config.json", text.TOKENIZER_CONFIG)


def write_cogact(
    directory: Path,
    sizes: Sizes = TINY,
    seed: int = 0,
    *,
    action_model: bool = True,
    ema: bool = False,
    tokenizer: bool = True,
) -> None:
    """CogACT's native directory, or native OpenVLA's without ``action_model``.

    As published there is no tokenizer in it; ``tokenizer`` puts one there, as a user has to.
    """
    checkpoints = directory / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    parts = {part: _specs(shapes) for part, shapes in names.prismatic(sizes).items()}
    if action_model:
        parts["action_model"] = _specs(names.action_model(sizes, action_dim=7, horizon=16))
        if ema:
            parts["ema_diffusion"] = dict(parts["action_model"])
    write_pickle(checkpoints / f"step-{STEP:06d}-epoch-10-loss=0.0500.pt", parts, seed, wrap="model")
    _write_json(directory / "config.json", text.native_config(sizes, action_model))
    _write_json(directory / "dataset_statistics.json", text.pretraining_statistics())
    if tokenizer:
        _write_json(directory / "tokenizer.json", text.tokenizer())


def write_openvla_oft(
    directory: Path,
    sizes: Sizes = TINY,
    seed: int = 0,
    platform: str | Platform = "libero",
    *,
    film: bool = False,
    proprio: bool = True,
    shards: int = 3,
) -> None:
    """OpenVLA-OFT: OpenVLA's directory and the parts trained beside it, as its training leaves them.

    ``platform`` is a published robot's name, or another robot. The backbone with FiLM differs from the one in
    the safetensors, which upstream replaces with it.
    """
    robot = platform if isinstance(platform, Platform) else PLATFORMS[platform]
    write_openvla(directory, sizes, seed, shards)
    mask = None if robot.mask is None else list(robot.mask)
    statistics = text.dataset_statistics(robot.action_dim, robot.proprio_dim, mask, 0.3)
    _write_json(directory / "dataset_statistics.json", {robot.key: statistics})
    head = _wrapped(_specs(names.regression_head(sizes, robot.action_dim)))
    write_pickle(directory / f"action_head--{STEP}_checkpoint.pt", head, seed)
    if proprio:
        shapes = names.proprio_projector(sizes, robot.proprio_dim)
        specs = _wrapped(_specs(shapes, torch.float32))
        write_pickle(directory / f"proprio_projector--{STEP}_checkpoint.pt", specs, seed)
    if film:
        specs = {
            # FiLM's own linears are made in float32; peft gives its adapters the type of what they adapt.
            name: Spec(shape, torch.float32 if _is_film(name) else torch.bfloat16, "film")
            for name, shape in names.film_backbone(sizes).items()
        }
        write_pickle(directory / f"vision_backbone--{STEP}_checkpoint.pt", specs, seed)


def _write_smolvla(directory: Path, sizes: Sizes, seed: int) -> None:
    write_smolvla(directory, FULL_SMOLVLA if sizes is FULL else TINY_SMOLVLA, seed)


FAMILIES: dict[str, Callable[[Path, Sizes, int], None]] = {
    "openvla": write_openvla,
    "cogact": write_cogact,
    "native-openvla": partial(write_cogact, action_model=False),
    "oft-libero": write_openvla_oft,
    "oft-bridge": partial(write_openvla_oft, platform="bridge", proprio=False),
    "oft-aloha": partial(write_openvla_oft, platform="aloha", film=True),
    "smolvla": _write_smolvla,
}
# For tests, which name them.
__all__ = [
    "FULL",
    "TINY",
    "TINY_SMOLVLA",
    "write_cogact",
    "write_openvla",
    "write_openvla_oft",
    "write_smolvla",
]


def _specs(shapes: Shapes, dtype: torch.dtype = torch.bfloat16) -> dict[str, Spec]:
    return {name: Spec(shape, dtype) for name, shape in shapes.items()}


def _wrapped(specs: dict[str, Spec]) -> dict[str, Spec]:
    """Names as DistributedDataParallel leaves them."""
    return {f"module.{name}": spec for name, spec in specs.items()}


def _is_film(name: str) -> bool:
    return ".scale." in name or ".shift." in name


def _write_json(path: Path, data: object) -> None:
    indent = None if path.name == "tokenizer.json" else 2
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--full", action="store_true", help="the published size instead of a tiny one")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    start = time.perf_counter()
    FAMILIES[arguments.family](arguments.directory, FULL if arguments.full else TINY, arguments.seed)
    size = sum(path.stat().st_size for path in arguments.directory.rglob("*") if path.is_file())
    print(f"{arguments.directory}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
