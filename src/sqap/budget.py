"""How to spend a budget of bytes, or of error, on the blocks that quantizing hurts most."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqap.errors import InputError
from sqap.models.storage import Progress
from sqap.policy import Policy
from sqap.recipe import Override, Quantization
from sqap.sensitivity import ActionError, Replay, alone, blocks, grid, kept_apart, linears


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
        named = kept_apart(replay.policy, quantization) if "head" in latest else quantization.overrides
        return dataclasses.replace(quantization, overrides=(*named, *latest.values()))

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
            f"no choice of blocks brings the error below {target_error}: with all that no override names in "
            f"bfloat16 it is {_scalar(replay.measure('', raised(steps)).error):.3g}"
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
        scheme = grid(quantization, name)
        ladder = [scheme, None]
        if scheme is not None and scheme.weight_bits == 4:
            ladder.insert(1, dataclasses.replace(scheme, weight_bits=8, activation_bits=8))
        if scheme is None or not _free(replay.policy, quantization, name):
            ladder = []  # the recipe's overrides, which go first, leave nothing to raise
        options = [alone(replay, quantization, name, s) for s in ladder]
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


def _free(policy: Policy, quantization: Quantization, block: str) -> list[str]:
    """The linears of a block that the recipe does not treat apart."""
    named = kept_apart(policy, quantization)
    return [n for n in linears(policy, block) if not any(override.matches(n) for override in named)]


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
