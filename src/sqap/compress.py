"""The whole method on one page: rotate and quantize the policy, then calibrate the pruner on it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeGuard

import torch

from sqap.build import build_id
from sqap.config import Calibration
from sqap.defaults import defaults
from sqap.errors import InputError
from sqap.models import ModelInputs, empty_model
from sqap.models.storage import Progress, Rounded, check_finite, hash_tensors, round_to_storage
from sqap.observation import Observation, hash_frames
from sqap.policy import Policy
from sqap.pruning.calibration import choose_k, overlap_curve
from sqap.pruning.check import check_pruning
from sqap.pruning.ranking import Ranker, Ranking
from sqap.quantization import Partial, quantize_model, share
from sqap.recipe import Pruning, Recipe
from sqap.recipe.pruning import SHARED

# Parts that progress is told in, and how many of them, about, it takes to rank tokens in full precision and
# again: measured where weights are rounded to the nearest level, and a part of that where GPTQ takes longer.
PARTS, RANKING, GPTQ = 1000, (250, 60), 4


@defaults()
def compress(
    policy: Policy,
    recipe: Recipe,
    frames: Sequence[Observation] = (),
    *,
    progress: Progress | None = None,
    resume: str | Path | Partial | None = None,
) -> Policy:
    """A compressed copy of ``policy``; the original is left as it is.

    The linears that the recipe names are rotated, rounded and packed; everything else is rounded to bfloat16,
    as it is stored. The pruner trusts the quantized model's attention only as far as it agrees with full
    precision on ``frames``.

    The copy computes in float32, whatever the types of the original and whether it has acted before: it acts
    as it does once it is saved and loaded, bit for bit. A recipe that prunes alone leaves the weights of a
    published policy on disk: calibrating reads a stage at a time, saving reads all in bfloat16, and acting
    reads all in float32.

    Args:
        policy: an uncompressed policy. A published one is read from its files (`Policy.weights`).
        recipe: what to do; `Recipe.w4a8`, `Recipe.w4a4` and `Recipe.paper` are good starts.
        frames: observations to calibrate on, typical of the policy's work. Needed by rounding "gptq" and by
            pruning method "sqap".
        progress: gets (done, all), in parts of about the time that it takes to rank the frames' tokens in
            full precision, to quantize, and to rank them again.
        resume: a directory of its own for what is finished; the same call, interrupted, goes on from there.
            It is removed at the end. A `Partial` is left to the caller, who removes it when the policy is
            saved.

    Raises:
        InputError: the policy is compressed already or not on the CPU, the recipe does not fit it, frames are
            needed, a weight is not finite, or the directory cannot be used.
        CheckpointError: weights cannot be read, or hold values that are not finite.
    """
    if policy.recipe != Recipe():
        raise InputError("the policy is compressed already; compress the original it was made from")
    _check(policy, recipe, frames)
    with _finished_stages(resume) as partial:
        return _compress(policy, recipe, frames, progress, partial)


def _compress(
    policy: Policy,
    recipe: Recipe,
    frames: Sequence[Observation],
    progress: Progress | None,
    partial: Partial | None,
) -> Policy:
    inputs = [model_inputs(policy, frame, seed) for seed, frame in enumerate(frames)]
    weights = policy.weights
    ranked, quantized, again = _passes(recipe, progress)
    original = policy.model if weights is None else empty_model(policy.config.model)
    check_finite(original, InputError)
    # First, while there is no compressed model in memory.
    pruning, full = recipe.pruning, None
    if frames and _is_ranked(pruning):
        full = Ranker(original, inputs, weights, ranked)(pruning)
    if recipe.quantization is not None:
        if partial is not None:
            partial.begin(key(recipe, deciding(policy, frames, inputs)))
        quantization = recipe.quantization
        model = quantize_model(
            original, quantization, inputs, weights=weights, progress=quantized, partial=partial
        )
        left = None
    else:
        model = share(original)
        left = None if weights is None else Rounded(weights)
    if left is None:
        round_to_storage(model)
        check_finite(model, InputError)
    config = dataclasses.replace(policy.config, model=model.config)
    small = Policy(model, config, policy.tokenizer, recipe, weights=left, origin=policy.origin)
    calibration = None
    if frames and recipe != Recipe():
        calibration = _calibrate(small, frames, Ranker(model, inputs, left, again), full)
    source = policy.fingerprint if weights is None else weights.fingerprint
    return dataclasses.replace(small, calibration=calibration, source=source)


def _passes(recipe: Recipe, progress: Progress | None) -> Iterator[Progress | None]:
    """``progress`` of the passes over the model: ranking tokens, quantizing, and ranking them again."""
    quantization = recipe.quantization
    longer = GPTQ if quantization is not None and quantization.rounding == "gptq" else 1
    ranking, again = (parts // longer for parts in RANKING) if _is_ranked(recipe.pruning) else (0, 0)
    for first, last in pairwise((0, ranking, PARTS - again, PARTS)):
        yield None if progress is None else _part(progress, first, last)


def _part(progress: Progress, first: int, last: int) -> Progress:
    return lambda done, total: progress(first + (last - first) * done // total, PARTS)


def reprune(
    policy: Policy, small: Policy, pruning: Pruning | None, frames: Sequence[Observation] = ()
) -> Policy:
    """``small`` with another pruner, calibrated as `compress` does; its weights are shared, not copied.

    Args:
        policy: the original that ``small`` was compressed from.
        small: a policy that `compress` has returned.
        pruning: the new setting; None prunes nothing.
        frames: those that ``small`` was calibrated on; needed by pruning method "sqap".

    Raises:
        InputError: the setting does not fit the policy, or frames are needed.
    """
    return Repruner(policy, small, frames).prune(pruning)


class Repruner:
    """`reprune` for many settings: what several of them measure on the frames is measured once.

    Args are those of `reprune`.
    """

    @defaults()
    def __init__(self, policy: Policy, small: Policy, frames: Sequence[Observation] = ()) -> None:
        _check_device(small)
        self._policy, self._small, self._frames = policy, small, frames
        self._inputs = [model_inputs(policy, frame, seed) for seed, frame in enumerate(frames)]
        self._full = Ranker(policy.model, self._inputs, policy.weights)
        self._quantized = Ranker(small.model, self._inputs, small.weights)

    @defaults()
    def prune(self, pruning: Pruning | None) -> Policy:
        """The compressed policy with another pruner, or none. Raises as `reprune` does."""
        _check(self._policy, Recipe(pruning=pruning), self._frames)
        recipe = dataclasses.replace(self._small.recipe, pruning=pruning)
        other = dataclasses.replace(self._small, recipe=recipe, calibration=None, fingerprint=None)
        if not self._frames:
            return other
        full = self._full(pruning) if _is_ranked(pruning) else None
        return dataclasses.replace(other, calibration=_calibrate(other, self._frames, self._quantized, full))


def model_inputs(policy: Policy, frame: Observation, seed: int) -> ModelInputs:
    """What the policy's model is given for ``frame``, with the diffusion noise of ``seed``."""
    return policy.inputs(frame, torch.Generator(device="cpu").manual_seed(seed))


def _is_ranked(pruning: Pruning | None) -> TypeGuard[Pruning]:
    """Whether calibration has a say in how many tokens the ranking takes."""
    return pruning is not None and pruning.method in SHARED


def _calibrate(
    small: Policy, frames: Sequence[Observation], quantized: Ranker, full: Ranking | None
) -> Calibration:
    """Find the largest k whose quantized top k still agrees with full precision.

    Looking ahead is trusted with no larger share of the budget than what it finds of later attention.
    """
    found, pruning = Calibration(len(frames), hash_frames(frames)), small.recipe.pruning
    if full is None or pruning is None:
        return found
    share = pruning.top_share if full.recall is None else min(pruning.top_share, full.recall)
    limit = round(share * pruning.budget(small.config.model.grid**2))
    curve = overlap_curve(full.scores, quantized(pruning, full.layers).scores)[:limit]
    top_k = choose_k(curve, pruning.overlap)
    overlap = float(curve[top_k - 1]) if top_k else 0.0
    return dataclasses.replace(found, top_k=top_k, overlap=overlap, layers=full.layers, recall=full.recall)


def _check(policy: Policy, recipe: Recipe, frames: Sequence[Observation]) -> None:
    """Make sure that the recipe fits the policy, and that there are frames where it needs some."""
    _check_device(policy)
    if recipe.pruning is not None:
        check_pruning(recipe.pruning, policy.config.model)
    if frames:
        return
    if recipe.quantization is not None and recipe.quantization.rounding == "gptq":
        raise InputError("rounding 'gptq' calibrates on frames; give at least one, or round to 'nearest'")
    if recipe.pruning is not None and recipe.pruning.method == "sqap":
        raise InputError("pruning method 'sqap' calibrates its attention ranking; give at least one frame")


def _check_device(policy: Policy) -> None:
    if policy.device.type != "cpu":
        raise InputError(f"the policy is on {policy.device}; calibrate it on the CPU: policy.to('cpu')")


@contextmanager
def _finished_stages(resume: str | Path | Partial | None) -> Iterator[Partial | None]:
    """Where stages are kept: a directory is taken here and removed if all goes well."""
    if resume is None or isinstance(resume, Partial):
        yield resume
        return
    with Partial(resume) as partial:
        yield partial
        partial.remove()


def key(recipe: Recipe, decides: Mapping[str, Any]) -> str:
    """Hash of a recipe and of all else that decides the numbers: what compresses alike shares it."""
    return hashlib.sha256(
        json.dumps({"recipe": recipe.to_json(), **decides}, sort_keys=True).encode()
    ).hexdigest()


def deciding(policy: Policy, frames: Sequence[Observation], inputs: Sequence[ModelInputs]) -> dict[str, Any]:
    """What decides a compressed policy's numbers, besides the recipe."""
    weights = policy.weights
    return {
        "policy": dataclasses.asdict(policy.config),
        "tokenizer": policy.tokenizer.to_str(),
        "weights": hash_tensors(policy.model.state_dict()) if weights is None else weights.fingerprint,
        "frames": hash_frames(frames),
        "inputs": [_hash_inputs(given) for given in inputs],  # noise is among them
        "build": build_id(),
    }


def _hash_inputs(inputs: ModelInputs) -> str:
    tensors = {f"pixels.{i}": pixels for i, pixels in enumerate(inputs.pixels)}
    others = {"ids": inputs.token_ids, "noise": inputs.noise, "proprio": inputs.proprio}
    return hash_tensors(tensors | {name: tensor for name, tensor in others.items() if tensor is not None})
