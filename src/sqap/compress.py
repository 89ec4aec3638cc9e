"""The whole method on one page: rotate and quantize the decoder, then calibrate the pruner on it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from sqap.errors import InputError
from sqap.models import VLA
from sqap.models.storage import round_to_storage
from sqap.observation import Observation
from sqap.policy import Calibration, Policy, hash_frames
from sqap.processing import prompt_ids
from sqap.pruning.attention import score_layers
from sqap.pruning.calibration import attention_scores, choose_k, overlap_curve
from sqap.quantization import quantize_decoder
from sqap.recipe import Pruning, Recipe


def compress(policy: Policy, recipe: Recipe, frames: Sequence[Observation] = ()) -> Policy:
    """A compressed copy of ``policy``; the original is left as it is.

    The decoder's linears are rotated and packed as the recipe says; everything else keeps its precision.
    The pruner trusts the quantized model's attention only as far as it agrees with full precision on
    ``frames``.

    Args:
        policy: an uncompressed policy.
        recipe: what to do; `Recipe.w4a8`, `Recipe.w4a4` and `Recipe.paper` are good starts.
        frames: observations to calibrate on, typical of the policy's work. Needed by pruning method
            "sqap".

    Raises:
        InputError: the policy is compressed already, the recipe does not fit it, or frames are needed.
    """
    if policy.recipe != Recipe():
        raise InputError("the policy is compressed already; compress the original it was made from")
    model = copy.deepcopy(policy.model)
    if recipe.quantization is not None:
        quantize_decoder(model, recipe.quantization)
    round_to_storage(model)
    calibration = None
    if recipe.pruning is not None and recipe.pruning.method == "sqap":
        calibration = _calibrate(policy, model, recipe.pruning, frames)
    return Policy(model, policy.config, policy.tokenizer, recipe, calibration, policy.fingerprint)


def _calibrate(
    policy: Policy, quantized: VLA, pruning: Pruning, frames: Sequence[Observation]
) -> Calibration:
    """Find the largest k whose quantized top k still agrees with full precision."""
    if not frames:
        raise InputError("pruning method 'sqap' calibrates its attention ranking; give at least one frame")
    full, low = (_scores(policy, model, pruning, frames) for model in (policy.model, quantized))
    share = round(pruning.top_share * pruning.budget(policy.config.model.visual_tokens))
    curve = overlap_curve(full, low)[:share]
    top_k = choose_k(curve, pruning.overlap)
    overlap = float(curve[top_k - 1]) if top_k else 0.0
    return Calibration(len(frames), hash_frames(frames), top_k, overlap)


@torch.inference_mode()
def _scores(policy: Policy, model: VLA, pruning: Pruning, frames: Sequence[Observation]) -> torch.Tensor:
    """Attention scores ``(frames, N)`` of ``model``."""
    layers = score_layers(pruning)
    rows = []
    for frame in frames:
        ids = prompt_ids(frame.instruction, policy.config.prompt, policy.tokenizer)
        rows.append(attention_scores(model, policy.pixels(frame), ids, layers, pruning.score_queries))
    return torch.cat(rows)
