"""``policy_preprocessor.json`` and ``policy_postprocessor.json``: what is done before and after the model.

LeRobot 0.4.0 and later write both, each a list of steps that run in order. A step is known by its registered
name, or by its class; what changes numbers is read, and a step that is not known is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqap.checkpoints.tensors import shorten
from sqap.errors import CheckpointError
from sqap.serialization import read_object

BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"
RENAME, TOKENIZE, STATE_TEXT = (
    "rename_observations_processor",
    "tokenizer_processor",
    "pi05_prepare_state_tokenizer_processor_step",
)
NORMALIZE, UNNORMALIZE = "normalizer_processor", "unnormalizer_processor"
RELATIVE, ABSOLUTE = "relative_actions_processor", "absolute_actions_processor"
NEW_LINES = "smolvla_new_line_processor", "pi0_new_line_processor"
# They move tensors and add dimensions.
IDLE = "to_batch_processor", "device_processor"
CLASSES = {
    "RenameObservationsProcessorStep": RENAME,
    "TokenizerProcessorStep": TOKENIZE,
    "Pi05PrepareStateTokenizerProcessorStep": STATE_TEXT,
    "NormalizerProcessorStep": NORMALIZE,
    "UnnormalizerProcessorStep": UNNORMALIZE,
    "RelativeActionsProcessorStep": RELATIVE,
    "AbsoluteActionsProcessorStep": ABSOLUTE,
    "SmolVLANewLineProcessor": NEW_LINES[0],
    "Pi0NewLineProcessor": NEW_LINES[1],
    "NewLineTaskProcessorStep": NEW_LINES[0],
    "AddBatchDimensionProcessorStep": IDLE[0],
    "DeviceProcessorStep": IDLE[1],
}
KNOWN = {*CLASSES.values()}


@dataclass(frozen=True)
class ProcessorStep:
    """One step.

    Args:
        name: the registered one.
        config: its settings.
        state_file: where its tensors are, if it has any.
        where: the file that lists it, and the step, for messages.
    """

    name: str
    config: Mapping[str, Any]
    state_file: Path | None
    where: str


@dataclass(frozen=True)
class Processors:
    """A policy's steps, of which a kind occurs at most once.

    Args:
        path: of the file before the model, for messages.
        before: steps by name, in order.
        after: likewise, behind the model.
    """

    path: Path
    before: Mapping[str, ProcessorStep]
    after: Mapping[str, ProcessorStep]

    @property
    def renamed(self) -> dict[str, str]:
        """The policy's feature -> what an observation calls it."""
        step = self.before.get(RENAME)
        names = {} if step is None else step.config.get("rename_map", {})
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{self.path}: {RENAME}: rename_map must be an object of names")
        return {theirs: ours for ours, theirs in names.items()}

    @property
    def new_line(self) -> bool:
        """Whether an instruction is made to end with a line break."""
        return any(name in self.before for name in NEW_LINES)

    @property
    def tokenizer(self) -> ProcessorStep:
        """The step that makes token ids.

        Raises:
            CheckpointError: there is none.
        """
        if TOKENIZE not in self.before:
            raise CheckpointError(f"{self.path} has no {TOKENIZE}")
        return self.before[TOKENIZE]

    @property
    def longest(self) -> int | None:
        """How many token ids are kept; None for all."""
        step = self.tokenizer
        longest, cuts = step.config.get("max_length", 512), step.config.get("truncation", True)
        if type(longest) is not int or longest < 1 or type(cuts) is not bool:
            raise CheckpointError(
                f"{step.where}: max_length must be a positive number and truncation true or false"
            )
        return longest if cuts else None

    @property
    def tokenizer_name(self) -> str | None:
        """The repository, or the directory of whoever trained, that the tokenizer is in."""
        name = self.tokenizer.config.get("tokenizer_name")
        return name if isinstance(name, str) else None

    @property
    def relative(self) -> ProcessorStep | None:
        """The step by which actions are relative to the robot's state; None if they are not.

        Raises:
            CheckpointError: only one of the two steps, before and behind the model, is switched on.
        """
        steps = [self.before.get(RELATIVE), self.after.get(ABSOLUTE)]
        switched = [bool(step is not None and step.config.get("enabled")) for step in steps]
        if switched[0] != switched[1]:
            raise CheckpointError(
                f"{self.path}: {RELATIVE} and {AFTER}'s {ABSOLUTE} must both be enabled or both not"
            )
        return steps[0] if switched[0] else None


def read_processors(directory: Path) -> Processors | None:
    """The processor files of a directory; None where there are none, as before LeRobot 0.4.0.

    Raises:
        CheckpointError: one is missing, malformed, or has a step that is not known.
    """
    paths = [directory / name for name in (BEFORE, AFTER)]
    there = [path for path in paths if path.is_file()]
    if not there:
        return None
    if len(there) == 1:
        lacking = next(path for path in paths if path not in there)
        raise CheckpointError(f"{directory} is incomplete: it has {there[0].name} and no {lacking.name}")
    before, after = (_steps(path) for path in paths)
    return Processors(paths[0], before, after)


def _steps(path: Path) -> dict[str, ProcessorStep]:
    listed = read_object(path, CheckpointError).get("steps")
    if not isinstance(listed, list):
        raise CheckpointError(f"{path} has no list of steps")
    steps: dict[str, ProcessorStep] = {}
    for i, entry in enumerate(listed):
        step = _step(path, i, entry)
        if step.name in steps:
            raise CheckpointError(f"{path} has two steps {step.name}")
        steps[step.name] = step
    unknown = [name for name in steps if name not in KNOWN]
    if unknown:
        raise CheckpointError(
            f"{path} has the step {shorten(unknown)}, which sqap does not know; known are "
            f"{', '.join(sorted(KNOWN))}"
        )
    return steps


def _step(path: Path, number: int, entry: Any) -> ProcessorStep:
    entry = entry if isinstance(entry, dict) else {}
    name, kind, config = entry.get("registry_name"), entry.get("class"), entry.get("config", {})
    if name is None and isinstance(kind, str):
        name = CLASSES.get(kind.rpartition(".")[2], kind)
    if not isinstance(name, str) or not isinstance(config, dict):
        raise CheckpointError(f"{path}: steps[{number}] must have a registry_name or a class, and a config")
    return ProcessorStep(name, config, _state_file(path, entry.get("state_file")), f"{path}: {name}")


def _state_file(path: Path, name: Any) -> Path | None:
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).name != name:
        raise CheckpointError(f"{path} names the state_file {name!r}, which is not a file beside it")
    return path.parent / name
