"""Look-ahead: ranks visual tokens by the attention that later layers would pay them.

Attention in the first layers predicts attention in later ones poorly. Right behind a cut, each later layer's
own norm, query and key projections are therefore applied to the current hidden states.
The score of a token is the attention that the text behind the image pays it there, averaged over rows, heads
and layers (`sqap.models.decoder.Decoder.look_ahead`). With a flow head, whose action expert reads the keys of
every layer, it is the attention that the action tokens of the first denoising step would pay
(`sqap.models.heads.flow.ActionQueries`). On a quantized model these are its packed
projections. Nothing is trained, and nothing is kept between steps.

Layers rank tokens differently, so scores are averaged over several: all later layers where that is cheap,
else those that calibration finds, as many as `affordable` allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from sqap.defaults import defaults
from sqap.errors import InputError
from sqap.models import DecoderConfig, ModelInputs
from sqap.models.storage import Weights
from sqap.models.vla import VLA
from sqap.pruning.criteria import top_k
from sqap.pruning.queries import look_and_attend
from sqap.recipe import Pruning

COST = 0.05  # of the pruned decoder's multiply-adds, at most
GAIN = 0.005  # of recall that one more layer must bring


def layers_to_look_at(
    settings: Pruning, decoder: DecoderConfig, calibrated: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The decoder layers, counted from 0, that method "lookahead" looks at; none for other methods.

    Those that the settings name, else those that calibration has found, else as many as `affordable` allows,
    evenly spaced.

    Raises:
        InputError: a named layer is none of the decoder's, or there is none to look at.
    """
    if settings.method != "lookahead":
        return ()
    later = later_layers(settings, decoder)
    if settings.score_layers is not None:
        beyond = [layer for layer in settings.score_layers if layer >= decoder.depth]
        if beyond:
            raise InputError(
                f"score_layers has layer {beyond[0]}, but the decoder has {decoder.depth} layers"
            )
        without = [layer for layer in settings.score_layers if layer not in later]
        if without:
            raise InputError(
                f"score_layers has layer {without[0]}, which has keys and no queries of the text: "
                "score_queries must be 'actions'"
            )
        return settings.score_layers
    if calibrated is not None:
        return tuple(calibrated)
    if not later:
        raise InputError(
            f"behind layer {settings.last_layer} there is only the last one, which has keys and no queries "
            "of the text: score_queries must be 'actions'"
        )
    count = min(len(later), affordable(settings, decoder))
    return tuple(later[(2 * i + 1) * len(later) // (2 * count)] for i in range(count))


def later_layers(settings: Pruning, decoder: DecoderConfig) -> range:
    """The layers behind the last cut that have the queries whose attention counts."""
    text = settings.score_queries in ("text", "last")
    keys_alone = text and decoder.last_layer == "keys_values"
    return range(settings.last_layer, decoder.depth - int(keys_alone))


def affordable(settings: Pruning, decoder: DecoderConfig) -> int:
    """How many layers may be looked at for `COST`; at least one.

    A look is a product of every token with a layer's key projection; what the few rows cost is left out.
    """
    return max(1, int(COST * whole_layers(settings, decoder) / look_cost(decoder)))


def whole_layers(settings: Pruning, decoder: DecoderConfig) -> float:
    """How many decoder layers over all visual tokens the pruned decoder's multiply-adds amount to."""
    ratios = 1.0, *(cut.keep_ratio for cut in settings.cuts)
    ends = (0, *(cut.after_layer for cut in settings.cuts), decoder.depth)
    return sum(ratio * (end - start) for ratio, (start, end) in zip(ratios, pairwise(ends), strict=True))


def look_cost(decoder: DecoderConfig) -> float:
    """Multiply-adds of a layer's key projection, as a share of the layer's."""
    queries, keys = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    return keys / (2 * queries + 2 * keys + 3 * decoder.mlp_width)


@defaults()
def later_attention(
    model: VLA,
    inputs: Sequence[ModelInputs],
    settings: Pruning,
    weights: Weights | None = None,
    *,
    layers: Sequence[int] | None = None,
    done: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Look-ahead scores at the last cut, and the attention that later layers then pay.

    Args:
        model: run without pruning.
        inputs: of one observation each.
        settings: say where the cut is, and whose attention counts.
        weights: where to read stages that ``model`` has on the meta device, one at a time.
        layers: to look at; all behind the cut by default. Attention is then only read as far as the last.
        done: called behind each stage.

    Returns:
        Both ``(layers, frames * cameras, tokens of one)``, layers ascending.
    """
    wanted = later_layers(settings, model.config.decoder) if layers is None else layers
    looked, attended = look_and_attend(model, inputs, settings, weights, wanted, done)
    shape = len(wanted), len(inputs) * model.config.cameras, -1
    return looked.float().view(shape), attended.float().view(shape)


def recall(looked: Tensor, attended: Tensor, k: int) -> float:
    """Share of the top ``k`` of later layers' mean attention that is in the top ``k`` by looking ahead.

    Args:
        looked: ``(layers, frames, N)``, of the layers that are looked at.
        attended: ``(layers, frames, N)``, of all later layers.
        k: the budget.
    """
    pairs = zip(looked.mean(0), attended.mean(0), strict=True)
    found = [torch.isin(top_k(a, k), top_k(b, k)).float().mean() for a, b in pairs]
    return float(torch.stack(found).mean())


def choose_layers(looked: Tensor, attended: Tensor, k: int, most: int) -> tuple[int, ...]:
    """Places in ``looked`` and ``attended`` ``(layers, frames, N)`` of at most so many layers to look at.

    All, if that many are allowed; else greedily the one that brings the most `recall`, as long as it brings
    `GAIN`.
    """
    if len(looked) <= most:
        return tuple(range(len(looked)))
    chosen: list[int] = []
    best = 0.0
    while len(chosen) < most:
        others = [i for i in range(len(looked)) if i not in chosen]
        recalls = [recall(looked[[*chosen, i]], attended, k) for i in others]
        if chosen and max(recalls) < best + GAIN:
            break
        best = max(recalls)
        chosen.append(others[recalls.index(best)])
    return tuple(sorted(chosen))
