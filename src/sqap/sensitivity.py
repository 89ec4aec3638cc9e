"""What quantizing costs in robot units, block by block.

The same observations are replayed with the same diffusion noise through the original and through a
candidate, and their action chunks are compared. Nothing moves: this ranks settings in seconds; whether the
task is still done, only closed loop tells (`sqap.evaluation`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from sqap.compress import compress, model_inputs
from sqap.config import PolicyConfig
from sqap.errors import InputError
from sqap.models.stages import stages
from sqap.models.storage import Progress, stored_bytes
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.pruning.calibration import overlap_curve
from sqap.pruning.ranking import Ranker, Ranking
from sqap.quantization import wanted
from sqap.recipe import Override, Pruning, Quantization, Recipe, Scheme
from sqap.recipe.pruning import SHARED


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
        self._full = self._ranking(self.policy)

    def measure(self, name: str, quantization: Quantization) -> Option:
        """Quantize a copy of the policy and replay."""
        small = compress(self.policy, Recipe(quantization), self.frames)
        error = action_error(self._originals, self._chunks(small), self.policy.config)
        return Option(name, stored_bytes(small.model), error, self._overlap(small))

    def _chunks(self, policy: Policy) -> np.ndarray:
        return np.stack([policy.act(frame, seed=seed) for seed, frame in enumerate(self.frames)])

    def _overlap(self, small: Policy) -> float | None:
        if self.pruning is None or self._full is None:
            return None
        quantized = self._ranking(small, self._full.layers)
        assert quantized is not None
        k = self.pruning.budget(quantized.scores.shape[1])
        if self.pruning.method in SHARED:
            k = max(round(self.pruning.top_share * k), 1)
        return float(overlap_curve(self._full.scores, quantized.scores)[k - 1])

    def _ranking(self, policy: Policy, layers: tuple[int, ...] | None = None) -> Ranking | None:
        if self.pruning is None or self.pruning.method not in (*SHARED, "attention"):
            return None
        inputs = [model_inputs(self.policy, frame, seed) for seed, frame in enumerate(self.frames)]
        return Ranker(policy.model, inputs, policy.weights)(self.pruning, layers)


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
        options.append(alone(replay, quantization, name, grid(quantization, name)))
        if progress is not None:
            progress(len(options), len(names))
    return options


def blocks(policy: Policy, quantization: Quantization) -> list[str]:
    """Names of the policy's stages of which the recipe quantizes a linear."""
    return [name for name, stage in stages(policy.model) if wanted(name, stage, quantization)]


def alone(replay: Replay, quantization: Quantization, name: str, scheme: Scheme | None) -> Option:
    """One block on grids of ``scheme``, but for linears that the recipe treats apart."""
    overrides = (
        *_exceptions(linears(replay.policy, name), kept_apart(replay.policy, quantization)),
        Override(f"{name}.*", scheme),
        Override("*", None),
    )
    return replay.measure(name, dataclasses.replace(quantization, overrides=overrides, embedding_bits=16))


def kept_apart(policy: Policy, quantization: Quantization) -> tuple[Override, ...]:
    """The recipe's overrides, and one for the head's sensitive linears, which a block's grids are not for."""
    return (*quantization.overrides, Override("|".join(policy.model.sensitive), quantization.sensitive))


def _exceptions(linears: Sequence[str], overrides: Sequence[Override]) -> list[Override]:
    """The overrides, in their order, as far as they are about ``linears``."""
    matched = [(override, [n for n in linears if override.matches(n)]) for override in overrides]
    return [Override("|".join(names), override.scheme) for override, names in matched if names]


def linears(policy: Policy, block: str) -> list[str]:
    """Names of a block's linears."""
    modules = dict(stages(policy.model))[block].named_modules()
    return [f"{block}.{key}" for key, module in modules if isinstance(module, nn.Linear)]


def grid(quantization: Quantization, block: str) -> Scheme | None:
    """The grids of the part that a block belongs to, which its overrides make exceptions from."""
    return dataclasses.replace(quantization, overrides=()).scheme(block)
