"""The statistics by which LeRobot's policies normalise states and actions.

They are tensors ``<feature>.<statistic>`` in files of their own, or inside ``model.safetensors`` in
checkpoints from before LeRobot 0.4.0. A policy that was trained on several data sets has a group of them for
each. Formulas are LeRobot's: nothing is clipped, and where a range is empty it is ``eps`` wide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from sqap.checkpoints.dataset_statistics import EXTREMES, LARGEST, PERCENTILES
from sqap.checkpoints.tensors import safetensors_file, shorten
from sqap.checkpoints.weights import TensorSet
from sqap.errors import CheckpointError
from sqap.processing import MeanStd, Range

# An unnorm_key: states go in and actions come out as the model has them.
NONE = "none"
IDENTITY, MEAN_STD, MIN_MAX = "IDENTITY", "MEAN_STD", "MIN_MAX"
# What -1 and 1 stand for.
BOUNDS = {MIN_MAX: EXTREMES, "QUANTILES": PERCENTILES, "QUANTILE10": ("q10", "q90")}
MODES = (IDENTITY, MEAN_STD, *BOUNDS)
GROUP = ".buffer."  # behind a data set's name
EPSILON = 1e-8
# Prefixes of statistics among the weights: of states, of actions, and of actions once more, for training.
INPUTS, OUTPUTS, TARGETS = INSIDE = "normalize_inputs.", "unnormalize_outputs.", "normalize_targets."

Values = Mapping[str, tuple[float, ...]]  # by the statistic's name


@dataclass(frozen=True)
class Statistics:
    """Statistics of features, by data set.

    Args:
        where: their file, for messages.
        groups: data set -> feature -> statistic -> numbers; "" is the data set of a file that names none.
    """

    where: str
    groups: Mapping[str, Mapping[str, Values]]

    @property
    def datasets(self) -> list[str]:
        """The data sets that have names."""
        return sorted(name for name in self.groups if name)

    def of(self, feature: str, dataset: str | None) -> Values | None:
        """A feature's, of a data set or of none; None if there are none.

        Raises:
            CheckpointError: only data sets have them, and none of these was chosen.
        """
        mine = self.groups.get(dataset or "", {}).get(feature) or self.groups.get("", {}).get(feature)
        having = [name for name in self.datasets if feature in self.groups[name]]
        if mine is None and dataset is None and having:
            raise CheckpointError(
                f"{self.where} has statistics of several datasets; name one as unnorm_key: "
                f"{', '.join(self.datasets)}, or {NONE} for {feature} as the model has it"
            )
        return mine


@dataclass(frozen=True)
class Normalization:
    """How one feature is normalised.

    Args:
        feature: its name.
        mode: one of `MODES`.
        width: its numbers.
        epsilon: what LeRobot adds to a deviation, and puts for a range that is empty.
        added: added to a range as well, in what goes in (before LeRobot 0.4.0).
    """

    feature: str
    mode: str
    width: int
    epsilon: float = EPSILON
    added: float = 0.0

    def step(self, statistics: Statistics, dataset: str | None) -> MeanStd | Range | None:
        """The step that normalises and unnormalises; None if the numbers stay as they are.

        Raises:
            CheckpointError: the statistics are missing, which LeRobot passes over silently, or are not of
                this feature.
        """
        if self.mode == IDENTITY or dataset == NONE:
            return None
        values = statistics.of(self.feature, dataset)
        if values is None:
            raise CheckpointError(
                f"{statistics.where} has no statistics of {self.feature}, by which it is normalised "
                f"({self.mode}){self._elsewhere(statistics)}; unnorm_key {NONE} (--unnorm-key {NONE}) leaves "
                "states and actions as the model has them, as LeRobot does without a word"
            )
        if self.mode == MEAN_STD:
            mean, std = (self._numbers(values, name, statistics.where) for name in ("mean", "std"))
            return MeanStd(mean, std, self.epsilon)
        low, high = (self._numbers(values, name, statistics.where) for name in BOUNDS[self.mode])
        if not self.added:  # an empty range is made as wide as epsilon
            high = tuple(top if top != b else b + self.epsilon for b, top in zip(low, high, strict=True))
        return Range(low, high, (True,) * self.width, self.added)

    def _elsewhere(self, statistics: Statistics) -> str:
        found = statistics.datasets
        return f"; it has those of {', '.join(found)}" if found else ""

    def _numbers(self, values: Values, name: str, where: str) -> tuple[float, ...]:
        found = values.get(name)
        if found is None:
            raise CheckpointError(
                f"{where}: {self.feature} lacks {name}, by which it is normalised ({self.mode}); it has "
                f"{', '.join(sorted(values))}"
            )
        if len(found) != self.width:
            raise CheckpointError(
                f"{where}: {self.feature}.{name} has {len(found)} numbers, but the policy's have {self.width}"
            )
        if not all(abs(number) <= LARGEST for number in found):
            raise CheckpointError(f"{where}: {self.feature}.{name} has numbers that are not finite")
        return found


def identity(width: int) -> MeanStd:
    """A step that changes nothing but tells how many numbers there are."""
    return MeanStd((0.0,) * width, (1.0,) * width, 0.0)


def check_dataset(statistics: Iterable[Statistics], key: str | None) -> None:
    """Refuse a data set that no statistics are of.

    Raises:
        CheckpointError: with those that there are.
    """
    found = [*statistics]
    known = list(dict.fromkeys(name for each in found for name in each.datasets))
    if key in (None, NONE, *known):
        return
    names = f"one of: {', '.join([*known, NONE])}" if known else f"left out, or {NONE}"
    raise CheckpointError(f"{found[0].where} has no statistics of {key!r}; unnorm_key must be {names}")


def read_statistics(path: Path | None, where: str) -> Statistics:
    """The statistics of a normalizer's state file; none of it has no file, as base models' have none.

    Raises:
        CheckpointError: the file is missing, damaged or holds other names.
    """
    if path is None:
        return Statistics(where, {})
    file = safetensors_file(path)
    groups: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {}
    for name, tensor in file.read(file.tensors).items():
        feature, _, statistic = name.rpartition(".")
        dataset, grouped, inner = feature.rpartition(GROUP)
        group = groups.setdefault(dataset if grouped else "", {})
        group.setdefault(inner if grouped else feature, {})[statistic] = _floats(tensor)
    return Statistics(str(path), groups)


def statistics_inside(tensors: TensorSet, prefix: str, features: Iterable[str]) -> Statistics:
    """The statistics among a checkpoint's weights: ``<prefix>[<data set>_]buffer_<feature>.<statistic>``.

    Args:
        tensors: the weights.
        prefix: `INPUTS` or `OUTPUTS`.
        features: the policy's; a tensor's name has ``_`` for every dot of a feature's.

    Raises:
        CheckpointError: a tensor is of none of these features.
    """
    spelt = {feature.replace(".", "_"): feature for feature in features}
    groups: dict[str, dict[str, dict[str, tuple[float, ...]]]] = {}
    odd = []
    for name, tensor in tensors.read([n for n in tensors.tensors if n.startswith(prefix)]).items():
        buffer, _, statistic = name.removeprefix(prefix).rpartition(".")
        dataset, _, feature = f"_{buffer}".rpartition("_buffer_")
        if feature not in spelt:
            odd.append(name)
            continue
        group = groups.setdefault(dataset.removeprefix("_"), {})
        group.setdefault(spelt[feature], {})[statistic] = _floats(tensor)
    if odd:
        raise CheckpointError(f"{tensors.where} has statistics of no feature of its own: {shorten(odd)}")
    return Statistics(str(tensors.where), groups)


def added_range(normalization: Normalization) -> Normalization:
    """The same as before LeRobot 0.4.0, which added to a range what it put for an empty one later."""
    return replace(normalization, added=normalization.epsilon)


def _floats(tensor: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in tensor.double().flatten())
