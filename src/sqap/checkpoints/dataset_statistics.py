"""The statistics by which published policies normalise actions and states, one set per training dataset."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqap.errors import CheckpointError
from sqap.processing import Range

# What the ends of [-1, 1] stand for.
LARGEST = 3.4028234663852886e38  # what an action, in 32 bits, can be
PERCENTILES, EXTREMES = ("q01", "q99"), ("min", "max")


@dataclass(frozen=True)
class Dataset:
    """The statistics of one dataset; ``where`` they stand, for messages."""

    key: str
    statistics: Mapping[str, Any]
    where: str


def choose_dataset(datasets: Any, key: str | None, where: Path) -> Dataset:
    """The dataset whose robot the actions are for.

    Args:
        datasets: statistics by dataset, as the checkpoint has them.
        key: which one; may be None if there is only one.
        where: their file, for messages.

    Raises:
        CheckpointError: there are no statistics, no such dataset, or several and none was chosen.
    """
    if not isinstance(datasets, dict) or not datasets:
        raise CheckpointError(f"{where} has no statistics to unnormalise actions with")
    known = ", ".join(datasets)
    if key is None and len(datasets) > 1:
        raise CheckpointError(f"{where} has statistics of several datasets; name one as unnorm_key: {known}")
    key = next(iter(datasets)) if key is None else key
    if key not in datasets:
        raise CheckpointError(f"{where} has no statistics of {key!r}; unnorm_key must be one of: {known}")
    return Dataset(key, datasets[key], f"{where}: {key}")


def read_range(dataset: Dataset, what: str, names: tuple[str, str] = PERCENTILES) -> Range:
    """The normalisation of a data set's "action" or "proprio", by the statistics of these ``names``.

    Raises:
        CheckpointError: the statistics are incomplete or not numbers.
    """
    entry = dataset.statistics.get(what) if isinstance(dataset.statistics, dict) else None
    if not isinstance(entry, dict):
        raise CheckpointError(f"{dataset.where} has no {what} statistics")
    low, high = (_numbers(entry, name, f"{dataset.where}.{what}") for name in names)
    mask = entry.get("mask", [True] * len(low))
    if not isinstance(mask, list) or not all(isinstance(item, bool) for item in mask):
        raise CheckpointError(f"{dataset.where}.{what}.mask must be a list of true and false")
    if not len(low) == len(high) == len(mask):
        raise CheckpointError(
            f"{dataset.where}.{what}: {names[0]}, {names[1]} and mask must have one length, "
            f"not {len(low)}, {len(high)} and {len(mask)}"
        )
    return Range(low, high, tuple(mask))


def check_length(dataset: Dataset, what: str, found: int, wanted: int) -> None:
    """Refuse statistics of another robot.

    Raises:
        CheckpointError: they are of ``found`` numbers, the model's of ``wanted``.
    """
    if found != wanted:
        raise CheckpointError(f"{dataset.where} has {what} of {found} numbers, but the model's have {wanted}")


def _numbers(entry: Mapping[str, Any], name: str, where: str) -> tuple[float, ...]:
    values = entry.get(name)
    if not isinstance(values, list) or not values:
        raise CheckpointError(f"{where} lacks {name}")
    if not all(type(value) in (int, float) and abs(value) <= LARGEST for value in values):
        raise CheckpointError(f"{where}.{name} must be a list of finite numbers, as 32 bits hold them")
    return tuple(float(value) for value in values)
