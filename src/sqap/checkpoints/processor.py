"""How a published image processor prepares pixels, which must be how sqap does: stretched, then normalised.

transformers before 5 writes ``preprocessor_config.json``, later releases ``processor_config.json``, in which
the image processor is one of several. Prismatic's says twice what it does: as arguments (``means``), and as
what they come to (``tvf_normalize_params``), which then goes before the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqap.checkpoints.known_keys import PROCESSOR, RESIZE
from sqap.errors import CheckpointError
from sqap.processing.images import Triple
from sqap.serialization import read_object

OWN, SHARED, NESTED = "preprocessor_config.json", "processor_config.json", "image_processor"
STRETCH, CUBIC = "resize-naive", "bicubic"


@dataclass(frozen=True)
class Processor:
    """An image processor's configuration, and where it stands, for messages."""

    config: Mapping[str, Any]
    where: str


def read_processor(directory: Path) -> Processor:
    """The image processor of a checkpoint; an empty one if it has none.

    Raises:
        CheckpointError: there are two that differ, or a key says what sqap does not compute.
    """
    own = read_object(directory / OWN, CheckpointError)
    shared = read_object(directory / SHARED, CheckpointError).get(NESTED)
    found = Processor(own, str(directory / OWN))
    if isinstance(shared, dict):
        found = Processor(shared, f"{directory / SHARED}: {NESTED}")
        differing = [
            key for key in PROCESSOR.read if key in own and key in shared and own[key] != shared[key]
        ]
        if differing:
            raise CheckpointError(
                f"{directory}: {OWN} and {SHARED} differ in {', '.join(sorted(differing))}; leave one of them"
            )
    PROCESSOR.check(found.config, found.where)
    return found


def check_pixels(processor: Processor, sizes: Sequence[int], strategy: object) -> None:
    """Refuse images that are prepared in another way than by stretching them, bicubically.

    Args:
        processor: what says so.
        sizes: of the square image that each vision encoder sees.
        strategy: what the model's configuration says; the processor's own word goes before it.

    Raises:
        CheckpointError: with what is said instead.
    """
    config, where = processor.config, processor.where
    strategy = config.get("image_resize_strategy", strategy)
    if strategy != STRETCH:
        raise CheckpointError(f"{where}: images are resized by {strategy!r}; supported is {STRETCH!r}")
    fused = config.get("use_fused_vision_backbone")
    if fused not in (None, len(sizes) > 1):
        raise CheckpointError(
            f"{where}: use_fused_vision_backbone is {fused}, the model has {len(sizes)} encoders"
        )
    for i, size in enumerate(sizes):
        square = [size, size]
        resize, crop = (_entry(processor, f"tvf_{kind}_params", i) for kind in ("resize", "crop"))
        RESIZE.check(resize, f"{where}: tvf_resize_params[{i}]")
        _same(resize.get("size", square), square, f"{where}: tvf_resize_params[{i}].size")
        output = crop.get("output_size", square)
        _same(
            [output] * 2 if isinstance(output, int) else output,
            square,
            f"{where}: tvf_crop_params[{i}].output_size",
        )
        _same(_item(processor, "input_sizes", i, [3, *square]), [3, *square], f"{where}: input_sizes[{i}]")
        _same(_item(processor, "interpolations", i, CUBIC), CUBIC, f"{where}: interpolations[{i}]")


def normalisation(
    processor: Processor, default: Sequence[tuple[Triple, Triple]]
) -> list[tuple[Triple, Triple]]:
    """Mean and deviation of each encoder's pixels; ``default`` where the processor is silent.

    The published processors hold ImageNet's rounded to bfloat16, and that is what the models were tuned on.

    Raises:
        CheckpointError: they are not three numbers each.
    """
    out = []
    for i, (mean, std) in enumerate(default):
        entry: Mapping[str, Any] = {
            "mean": _item(processor, "means", i, mean),
            "std": _item(processor, "stds", i, std),
        }
        if processor.config.get("tvf_normalize_params") is not None:
            entry = _entry(processor, "tvf_normalize_params", i)
        try:
            out.append((_triple(entry["mean"]), _triple(entry["std"])))
            if min(out[i][1]) <= 0:
                raise ValueError
        except (TypeError, LookupError, ValueError, OverflowError) as problem:
            raise CheckpointError(
                f"{processor.where}: tvf_normalize_params must have a mean and a std of three numbers for "
                "every encoder, the latter above zero"
            ) from problem
    return out


def _item(processor: Processor, key: str, i: int, default: Any) -> Any:
    """The i-th encoder's entry of a list."""
    found = processor.config.get(key)
    if found is None:
        return default
    if not isinstance(found, list) or len(found) <= i:
        raise CheckpointError(f"{processor.where}: {key} must be a list with an entry for every encoder")
    return found[i]


def _entry(processor: Processor, key: str, i: int) -> Mapping[str, Any]:
    found = _item(processor, key, i, {})
    if not isinstance(found, dict):
        raise CheckpointError(f"{processor.where}: {key} must be a list of objects")
    return found


def _same(found: Any, supported: Any, where: str) -> None:
    if found != supported:
        raise CheckpointError(f"{where} is {found!r}; supported is {supported!r}")


def _triple(values: Any) -> Triple:
    red, green, blue = (float(value) for value in values if type(value) in (int, float))
    if not all(map(math.isfinite, (red, green, blue))):
        raise ValueError
    return red, green, blue
