"""What quantizing costs in robot units, block by block, and how to spend a budget of bytes on it.

The same observations are replayed with the same diffusion noise through the original and through a
candidate, and their action chunks are compared. Nothing moves: this ranks settings in seconds; whether the
task is still done, only closed loop tells (`sqap.evaluation`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sqap.compress import compress, model_inputs, ranking_scores
from sqap.errors import InputError
from sqap.models.stages import stages
from sqap.models.storage import stored_bytes
from sqap.observation import Observation
from sqap.policy import Policy, PolicyConfig
from sqap.pruning.calibration import overlap_curve
from sqap.quantization import wanted
from sqap.recipe import Override, Pruning, Quantization, Recipe, Scheme

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ActionError:
    """How far a candidate's chunks are from the original's, means over frames.

    Args:
        millimetres: between the displacements of one control step.
        drift: between the places the gripper has reached at the end of a chunk, millimetres.
        gripper_flips: share of control steps at which the gripper's command is the other one.
        relative: root mean square difference, over that of the original's own actions around their mean.
    """

    millimetres: float | None
    drift: float | None
    gripper_flips: float | None
    relative: float


@dataclass(frozen=True)
class Option:
    """One way to quantize, and what it costs.

    Args:
        name: what is quantized, or how.
        weight_bytes: of the whole policy as stored.
        error: against the original.
        overlap: of the pruner's top k with full precision's, mean over frames; None without a pruner.
    """

    name: str
    weight_bytes: int
    error: ActionError
    overlap: float | None = None


def action_error(originals: np.ndarray, candidates: np.ndarray, config: PolicyConfig) -> ActionError:
    """Compare chunks ``(frames, horizon, action_dim)`` in robot units."""
    difference = candidates - originals
    spread = float(np.sqrt(np.mean((originals - originals.mean((0, 1))) ** 2)))
    relative = float(np.sqrt(np.mean(difference**2))) / max(spread, 1e-12)
    units = config.units
    if units is None:
        return ActionError(None, None, None, relative)
    moved = difference[..., list(units.translation)] * units.millimetres
    flips = None
    if units.gripper is not None:
        open_, opened = (c[..., units.gripper] >= units.gripper_threshold for c in (originals, candidates))
        flips = float(np.mean(open_ != opened))
    return ActionError(
        millimetres=float(np.linalg.norm(moved, axis=-1).mean()),
        drift=float(np.linalg.norm(moved.sum(1), axis=-1).mean()),
        gripper_flips=flips,
        relative=relative,
    )


@dataclass
class Replay:
    """Replays ``frames`` through candidates of one policy.

    Args:
        policy: the original.
        frames: observations, as for `compress`.
        pruning: whose ranking of tokens is watched; it is not applied, so that errors are quantization's.
    """

    policy: Policy
    frames: Sequence[Observation]
    pruning: Pruning | None = None

    def __post_init__(self) -> None:
        if not self.frames:
            raise InputError("there is nothing to replay; give at least one frame")
        self._originals = self._chunks(self.policy)
        self._scores = self._ranking(self.policy)

    def measure(self, name: str, quantization: Quantization) -> Option:
        """Quantize a copy of the policy and replay."""
        small = compress(self.policy, Recipe(quantization), self.frames)
        error = action_error(self._originals, self._chunks(small), self.policy.config)
        return Option(name, stored_bytes(small.model), error, self._overlap(small))

    def _chunks(self, policy: Policy) -> np.ndarray:
        return np.stack([policy.act(frame, seed=seed) for seed, frame in enumerate(self.frames)])

    def _overlap(self, small: Policy) -> float | None:
        scores = self._ranking(small)
        if self.pruning is None or scores is None or self._scores is None:
            return None
        k = self.pruning.budget(scores.shape[1])
        if self.pruning.method == "sqap":
            k = max(round(self.pruning.top_share * k), 1)
        return float(overlap_curve(self._scores, scores)[k - 1])

    def _ranking(self, policy: Policy) -> Tensor | None:
        if self.pruning is None or self.pruning.method not in ("sqap", "attention"):
            return None
        inputs = [model_inputs(self.policy, frame, seed) for seed, frame in enumerate(self.frames)]
        return ranking_scores(policy.model, self.pruning, inputs, policy.weights)


def compare_options(
    replay: Replay, quantization: Quantization, progress: Progress | None = None
) -> list[Option]:
    """The recipe's quantizer, built up from plain rounding one ingredient at a time."""
    plain = dataclasses.replace(
        quantization, rounding="nearest", clip=False, rotate=False, rotation_seed=None, kv_bits=None
    )
    rotated = dataclasses.replace(plain, rotate=True)
    signed = dataclasses.replace(rotated, rotation_seed=0)
    ladder = {
        "round to nearest": plain,
        "+ Hadamard": rotated,
        "+ random signs": signed,
        "+ clip search": dataclasses.replace(signed, clip=True),
        "+ GPTQ": dataclasses.replace(signed, clip=True, rounding="gptq"),
    }
    if quantization not in ladder.values():
        ladder["the recipe"] = quantization
    options = []
    for name, setting in ladder.items():
        options.append(replay.measure(name, setting))
        if progress is not None:
            progress(len(options), len(ladder))
    return options


def block_sensitivity(
    replay: Replay, quantization: Quantization, progress: Progress | None = None
) -> list[Option]:
    """Each block quantized alone, everything else as it was; blocks the recipe leaves alone are left out."""
    names = blocks(replay.policy, quantization)
    options = []
    for name in names:
        options.append(_alone(replay, quantization, name, quantization.scheme(f"{name}.anything")))
        if progress is not None:
            progress(len(options), len(names))
    return options


def blocks(policy: Policy, quantization: Quantization) -> list[str]:
    """Names of the policy's stages of which the recipe quantizes a linear."""
    return [name for name, stage in stages(policy.model) if wanted(name, stage, quantization)]


def fit(
    replay: Replay,
    quantization: Quantization,
    *,
    target_bytes: int | None = None,
    target_error: float | None = None,
    progress: Progress | None = None,
) -> Quantization:
    """The recipe with its worst offenders at 8-bit weights, then in bfloat16, as far as a target allows.

    Blocks are raised in the order of error saved per byte, measured one block at a time. With
    ``target_bytes`` as many are raised as fit; with ``target_error`` as few as bring the whole policy's
    measured error, millimetres per control step (relative error where the units are unknown), below it.

    Raises:
        InputError: the target cannot be met; the message says what can.
    """
    if (target_bytes is None) == (target_error is None):
        raise InputError("give a target in bytes or a target error, one of the two")
    steps = _steps(replay, dataclasses.replace(quantization, rounding="nearest"), progress)

    def raised(chosen: Sequence[_Step]) -> Quantization:
        latest = {step.block: step.override for step in chosen}
        return dataclasses.replace(quantization, overrides=(*quantization.overrides, *latest.values()))

    if target_bytes is not None:
        least = replay.measure("", dataclasses.replace(quantization, rounding="nearest")).weight_bytes
        if least > target_bytes:
            raise InputError(f"no choice fits {target_bytes} bytes: the recipe's smallest takes {least}")
        return raised(_affordable(steps, target_bytes - least))

    def misses(count: int) -> bool:
        assert target_error is not None
        return _scalar(replay.measure("", raised(steps[:count])).error) > target_error

    failing = _last(misses, len(steps))
    if failing == len(steps):
        raise InputError(
            f"no choice of blocks brings the error below {target_error}: with every block in bfloat16 it is "
            f"{_scalar(replay.measure('', raised(steps)).error):.3g}"
        )
    return raised(steps[: 0 if failing is None else failing + 1])


@dataclass(frozen=True)
class _Step:
    """One block raised by one step: the override that does it, what it costs in bytes and what it saves."""

    block: str
    override: Override
    cost: int
    saved: float

    @property
    def worth(self) -> float:
        return self.saved / max(self.cost, 1)


def _steps(replay: Replay, quantization: Quantization, progress: Progress | None) -> list[_Step]:
    """All steps of all blocks, by what they save per byte; those of one block in their order."""
    waiting: dict[str, list[_Step]] = {}
    names = blocks(replay.policy, quantization)
    for done, name in enumerate(names):
        scheme = quantization.scheme(f"{name}.anything")
        ladder = [scheme, None]
        if scheme is not None and scheme.weight_bits == 4:
            ladder.insert(1, dataclasses.replace(scheme, weight_bits=8, activation_bits=8))
        options = [_alone(replay, quantization, name, s) for s in ladder]
        waiting[name] = [
            _Step(
                name,
                Override(f"{name}.*", better),
                after.weight_bytes - before.weight_bytes,
                _scalar(before.error) - _scalar(after.error),
            )
            for before, after, better in zip(options, options[1:], ladder[1:], strict=False)
        ]
        if progress is not None:
            progress(done + 1, len(names))
    order = []
    while any(waiting.values()):
        best = max((name for name in names if waiting[name]), key=lambda name: waiting[name][0].worth)
        order.append(waiting[best].pop(0))
    return order


def _affordable(steps: Sequence[_Step], room: int) -> list[_Step]:
    """Steps that fit into ``room`` bytes together: each in its turn, or none more of its block."""
    chosen: list[_Step] = []
    closed = set()
    for step in steps:
        if step.block in closed or step.cost > room or step.saved <= 0:
            closed.add(step.block)
        else:
            chosen.append(step)
            room -= step.cost
    return chosen


def _alone(replay: Replay, quantization: Quantization, name: str, scheme: Scheme | None) -> Option:
    overrides = (*_exceptions(name, quantization), Override(f"{name}.*", scheme), Override("*", None))
    return replay.measure(name, dataclasses.replace(quantization, overrides=overrides))


def _exceptions(name: str, quantization: Quantization) -> list[Override]:
    return [o for o in quantization.overrides if o.pattern.startswith(f"{name}.")]


def _last(holds: Callable[[int], bool], size: int) -> int | None:
    """The largest count up to ``size`` for which ``holds``, if it holds below it; None if not even for 0."""
    low, high = -1, size
    while low < high:
        middle = (low + high + 1) // 2
        if holds(middle):
            low = middle
        else:
            high = middle - 1
    return low if low >= 0 else None


def _scalar(error: ActionError) -> float:
    return error.relative if error.millimetres is None else error.millimetres
