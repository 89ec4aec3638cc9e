"""Perplexity on the Python language reference: the text, its windows, and the one measure for every model.

Imports nothing of sqap: peers run it in environments of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

CALIBRATION = ("specialnames", "compound")
EVALUATION = ("types", "formatstrings", "string-methods", "typesseq", "debugger", "typesmapping")
BATCH = 4


def paragraphs(topics: Mapping[str, str], names: Collection[str]) -> list[str]:
    """The paragraphs of the topics called ``names``, each only the first time it occurs.

    ``topics`` is ``pydoc_data.topics.topics``, whose longer topics repeat shorter ones.

    Raises:
        KeyError: this Python's documentation lacks a topic.
    """
    text = "\n\n".join(topics[name] for name in names)
    return list(dict.fromkeys(re.split(r"\n{2,}", text.strip())))


def split_text(topics: Mapping[str, str]) -> tuple[str, str]:
    """A text to calibrate on and one to evaluate on that has no paragraph of the first."""
    seen = paragraphs(topics, CALIBRATION)
    unseen = [paragraph for paragraph in paragraphs(topics, EVALUATION) if paragraph not in set(seen)]
    return "\n\n".join(seen), "\n\n".join(unseen)


def windows(ids: Tensor, length: int, count: int) -> Tensor:
    """``(count, length)``: stretches of token ids ``(tokens,)`` that do not overlap, spread evenly.

    Raises:
        ValueError: there are not that many.
    """
    whole = ids[: len(ids) // length * length].view(-1, length)
    if len(whole) < count:
        raise ValueError(f"{len(ids)} tokens hold {len(whole)} windows of {length}, not {count}")
    return whole[torch.arange(count) * len(whole) // count]


@torch.inference_mode()
def perplexity(
    logits: Callable[[Tensor], Tensor],
    ids: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> float:
    """``exp`` of the mean negative log-likelihood of every token but each window's first.

    Args:
        logits: token ids ``(batch, tokens)`` to logits ``(batch, tokens, vocabulary)``.
        ids: ``(windows, tokens)``.
        progress: told after every batch how many windows are done, and of how many.
    """
    total, done = 0.0, 0
    for batch in torch.split(ids, BATCH):
        predicted = logits(batch)[:, :-1].flatten(0, 1).float()
        total += float(F.cross_entropy(predicted, batch[:, 1:].flatten(), reduction="sum"))
        done += len(batch)
        progress(done, len(ids))
    return math.exp(total / ids[:, 1:].numel())
