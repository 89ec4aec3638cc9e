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

from sqap.compress import compress, model_inputs, score_overlaps
from sqap.errors import InputError
from sqap.models.storage import stored_bytes
from sqap.observation import Observation
from sqap.policy import Policy, PolicyConfig
from sqap.quantization import stages, wanted
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

    def measure(self, name: str, quantization: Quantization) -> Option:
        """Quantize a copy of the policy and replay."""
        small = compress(self.policy, Recipe(quantization), self.frames)
        error = action_error(self._originals, self._chunks(small), self.policy.config)
        return Option(name, stored_bytes(small.model), error, self._overlap(small))

    def _chunks(self, policy: Policy) -> np.ndarray:
        return np.stack([policy.act(frame, seed=seed) for seed, frame in enumerate(self.frames)])

    def _overlap(self, small: Policy) -> float | None:
        pruning = self.pruning
        if pruning is None or pruning.method not in ("sqap", "attention"):
            return None
        inputs = [model_inputs(self.policy, frame, seed) for seed, frame in enumerate(self.frames)]
        budget = pruning.budget(self.policy.config.model.visual_tokens)
        k = round(pruning.top_share * budget) if pruning.method == "sqap" else budget
        return float(score_overlaps(pruning, self.policy.model, small.model, inputs)[max(k, 1) - 1])


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
        "the recipe": quantization,
    }
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
    order = _upgrades(replay, dataclasses.replace(quantization, rounding="nearest"), progress)

    def raised(count: int) -> Quantization:
        chosen = {override.pattern: override for override in order[:count]}  # a later step replaces the first
        return dataclasses.replace(quantization, overrides=(*quantization.overrides, *chosen.values()))

    def fits(count: int) -> bool:
        option = replay.measure("", raised(count))
        if target_bytes is not None:
            return option.weight_bytes <= target_bytes
        assert target_error is not None
        return _scalar(option.error) <= target_error

    if target_bytes is not None:
        count = _last(fits, len(order))
        if count is None:
            least = replay.measure("", quantization).weight_bytes
            raise InputError(f"no choice fits {target_bytes} bytes: the recipe's smallest takes {least}")
    else:
        failing = _last(lambda n: not fits(n), len(order))
        count = 0 if failing is None else failing + 1
        if count > len(order):
            raise InputError(
                f"no choice of blocks brings the error below {target_error}: with none quantized that can be "
                f"spared it is {_scalar(replay.measure('', raised(len(order))).error):.3g}"
            )
    return raised(count)


def _upgrades(replay: Replay, quantization: Quantization, progress: Progress | None) -> list[Override]:
    """Overrides that each raise one block by one step, in the order of error saved per byte."""
    steps: dict[str, list[tuple[float, Override]]] = {}
    names = blocks(replay.policy, quantization)
    for done, name in enumerate(names):
        scheme = quantization.scheme(f"{name}.anything")
        ladder = [scheme, None]
        if scheme is not None and scheme.weight_bits == 4:
            ladder.insert(1, dataclasses.replace(scheme, weight_bits=8, activation_bits=8))
        options = [_alone(replay, quantization, name, s) for s in ladder]
        steps[name] = [
            (
                (_scalar(before.error) - _scalar(after.error))
                / max(after.weight_bytes - before.weight_bytes, 1),
                Override(f"{name}.*", better),
            )
            for before, after, better in zip(options, options[1:], ladder[1:], strict=False)
        ]
        if progress is not None:
            progress(done + 1, len(names))
    order = []
    while any(steps.values()):
        best = max((name for name in names if steps[name]), key=lambda name: steps[name][0][0])
        order.append(steps[best].pop(0)[1])
    return order


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
