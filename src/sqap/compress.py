"""The whole method on one page: rotate and quantize the policy, then calibrate the pruner on it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from sqap.build import build_id
from sqap.defaults import defaults
from sqap.errors import InputError
from sqap.models import VLA, ModelInputs, empty_model
from sqap.models.stages import fill_around, stages, widen_around
from sqap.models.storage import Rounded, Weights, check_finite, hash_tensors, round_to_storage
from sqap.observation import Observation
from sqap.policy import Calibration, Policy, hash_frames
from sqap.pruning.attention import score_layers
from sqap.pruning.calibration import attention_scores, choose_k, overlap_curve
from sqap.quantization import Partial, quantize_model, share
from sqap.recipe import Pruning, Recipe


@defaults()
def compress(
    policy: Policy,
    recipe: Recipe,
    frames: Sequence[Observation] = (),
    *,
    progress: Callable[[int, int], None] | None = None,
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
        progress: gets (weights quantized, weights to quantize), part by part.
        resume: a directory of its own for what is finished; the same call, interrupted, goes on from there.
            It is removed at the end. A `Partial` is left to the caller, who removes it when the policy is
            saved.

    Raises:
        InputError: the policy is compressed already, the recipe does not fit it, frames are needed, a weight
            is not finite, or the directory cannot be used.
        CheckpointError: weights cannot be read, or hold values that are not finite.
    """
    if policy.recipe != Recipe():
        raise InputError("the policy is compressed already; compress the original it was made from")
    _check_frames(recipe, frames)
    with _finished_stages(resume) as partial:
        return _compress(policy, recipe, frames, progress, partial)


def _compress(
    policy: Policy,
    recipe: Recipe,
    frames: Sequence[Observation],
    progress: Callable[[int, int], None] | None,
    partial: Partial | None,
) -> Policy:
    inputs = [model_inputs(policy, frame, seed) for seed, frame in enumerate(frames)]
    weights = policy.weights
    original = policy.model if weights is None else empty_model(policy.config.model)
    check_finite(original, InputError)
    # First, while there is no compressed model in memory.
    full = _full_scores(original, recipe, inputs, weights)
    if recipe.quantization is not None:
        if partial is not None:
            partial.begin(_key(policy, recipe, frames, inputs))
        quantization = recipe.quantization
        model = quantize_model(
            original, quantization, inputs, weights=weights, progress=progress, partial=partial
        )
        left = None
    else:
        model = share(original)
        left = None if weights is None else Rounded(weights)
    if left is None:
        round_to_storage(model)
        check_finite(model, InputError)
    small = Policy(model, policy.config, policy.tokenizer, recipe, weights=left)
    calibration = None
    if frames and recipe != Recipe():
        calibration = _calibrate(small, frames, inputs, full)
    source = policy.fingerprint if weights is None else weights.fingerprint
    return dataclasses.replace(small, calibration=calibration, source=source)


def model_inputs(policy: Policy, frame: Observation, seed: int) -> ModelInputs:
    """What the policy's model is given for ``frame``, with the diffusion noise of ``seed``."""
    return policy.inputs(frame, torch.Generator(device="cpu").manual_seed(seed))


def ranking_scores(
    model: VLA, pruning: Pruning, inputs: Sequence[ModelInputs], weights: Weights | None = None
) -> torch.Tensor:
    """The attention scores by which ``pruning`` would rank, ``(frames * cameras, tokens of a camera)``.

    In float32, whatever the types of ``model``; where there are ``weights``, by them instead of its own.
    """
    model = share(model) if weights is None else empty_model(model.config)
    widen_around(model, [stage for _, stage in stages(model)])
    if weights is not None:
        fill_around(model, weights)
    return attention_scores(model, inputs, score_layers(pruning), pruning.score_queries, weights)


def _full_scores(
    original: VLA, recipe: Recipe, inputs: list[ModelInputs], weights: Weights | None
) -> torch.Tensor | None:
    """By what the uncompressed policy would rank its tokens, if the recipe's pruner asks attention."""
    pruning = recipe.pruning
    if not inputs or pruning is None or pruning.method != "sqap":
        return None
    return ranking_scores(original, pruning, inputs, weights)


def _calibrate(
    small: Policy, frames: Sequence[Observation], inputs: list[ModelInputs], full: torch.Tensor | None
) -> Calibration:
    """Find the largest k whose quantized top k still agrees with full precision."""
    pruning, top_k, overlap = small.recipe.pruning, None, None
    if full is not None and pruning is not None:
        limit = round(pruning.top_share * pruning.budget(small.config.model.grid**2))
        curve = overlap_curve(full, ranking_scores(small.model, pruning, inputs, small.weights))[:limit]
        top_k = choose_k(curve, pruning.overlap)
        overlap = float(curve[top_k - 1]) if top_k else 0.0
    return Calibration(len(frames), hash_frames(frames), top_k, overlap)


def _check_frames(recipe: Recipe, frames: Sequence[Observation]) -> None:
    if frames:
        return
    if recipe.quantization is not None and recipe.quantization.rounding == "gptq":
        raise InputError("rounding 'gptq' calibrates on frames; give at least one, or round to 'nearest'")
    if recipe.pruning is not None and recipe.pruning.method == "sqap":
        raise InputError("pruning method 'sqap' calibrates its attention ranking; give at least one frame")


@contextmanager
def _finished_stages(resume: str | Path | Partial | None) -> Iterator[Partial | None]:
    """Where stages are kept: a directory is taken here and removed if all goes well."""
    if resume is None or isinstance(resume, Partial):
        yield resume
        return
    with Partial(resume) as partial:
        yield partial
        partial.remove()


def _key(policy: Policy, recipe: Recipe, frames: Sequence[Observation], inputs: Sequence[ModelInputs]) -> str:
    """Hash of everything that decides the numbers: an interrupted compression shares it with what goes on."""
    weights = policy.weights
    decides = {
        "recipe": recipe.to_json(),
        "policy": dataclasses.asdict(policy.config),
        "tokenizer": policy.tokenizer.to_str(),
        "weights": hash_tensors(policy.model.state_dict()) if weights is None else weights.fingerprint,
        "frames": hash_frames(frames),
        "inputs": [_hash_inputs(given) for given in inputs],  # noise is among them
        "build": build_id(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _hash_inputs(inputs: ModelInputs) -> str:
    tensors = {f"pixels.{i}": pixels for i, pixels in enumerate(inputs.pixels)}
    others = {"ids": inputs.token_ids, "noise": inputs.noise, "proprio": inputs.proprio}
    return hash_tensors(tensors | {name: tensor for name, tensor in others.items() if tensor is not None})
