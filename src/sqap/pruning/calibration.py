"""How far the quantized model's attention ranking can be trusted, measured against full precision."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from sqap.defaults import defaults
from sqap.models import ModelInputs
from sqap.models.storage import Weights
from sqap.models.through import streamed
from sqap.models.vla import VLA
from sqap.pruning.attention import AttentionWatcher, query_rows
from sqap.pruning.criteria import top_k
from sqap.recipe import ScoreQueries


def overlap_at_k(a: Tensor, b: Tensor, k: int) -> float:
    """Share of the top ``k`` of scores ``a`` ``(N,)`` that is also in the top ``k`` of ``b`` ``(N,)``."""
    return float(torch.isin(top_k(a, k), top_k(b, k)).float().mean())


def overlap_curve(full: Tensor, quantized: Tensor) -> Tensor:
    """Mean `overlap_at_k` ``(N,)`` for k = 1 ... N over frames of scores ``(frames, N)``."""
    frames, tokens = full.shape
    # A token is in both top k from the k on at which the worse of its two ranks gets in.
    joins = torch.maximum(_ranks(full), _ranks(quantized))
    both = torch.bincount(joins.flatten()).cumsum(0)
    counts = torch.arange(1, tokens + 1, dtype=torch.int64, device=both.device)
    return both.float() / (frames * counts)


def choose_k(curve: Tensor, threshold: float) -> int:
    """The largest k whose overlap ``curve[k - 1]`` reaches ``threshold``; 0 if none does.

    A smaller k may have a lower overlap: a few top ranks that swap do no harm. Random rankings have an
    overlap of k / N, so the caller cuts the curve at the largest k it would use, ``curve[:limit]``.
    """
    trusted = (curve >= threshold).nonzero()
    return int(trusted[-1]) + 1 if len(trusted) else 0


@defaults()
def attention_scores(
    model: VLA,
    inputs: Sequence[ModelInputs],
    layers: Collection[int],
    queries: ScoreQueries,
    weights: Weights | None = None,
    done: Callable[[], None] | None = None,
) -> Tensor:
    """The scores that a pruner would use, ``(frames * cameras, tokens of one)``; rows sum to one.

    Args:
        model: full-precision or quantized; nothing of it is pruned. It computes in `VLA.dtype` throughout.
        inputs: of one frame each.
        layers: decoder layers, counted from 0, whose attention is averaged; at least one.
        queries: whose attention counts.
        weights: where to read stages that ``model`` has on the meta device, one at a time.
        done: called behind each stage.
    """
    visual = model.config.visual
    watchers = [
        AttentionWatcher(
            layers,
            query_rows(queries, visual, model.layout(given).blocks[0].stop),
            visual,
            model.config.cameras,
        )
        for given in inputs
    ]
    through = streamed(weights, model.dtype, done)
    streams = model.streams(inputs, through, watchers, keep=False)
    model.decoder.run(streams, through, max(layers) + 1)
    return torch.cat([watcher.scores for watcher in watchers if watcher.scores is not None])


def _ranks(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True).argsort()
