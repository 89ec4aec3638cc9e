"""Whether a model can be pruned as a recipe says."""

from __future__ import annotations

from sqap.errors import InputError
from sqap.models import ModelConfig
from sqap.pruning.attention import score_queries
from sqap.pruning.lookahead import layers_to_look_at
from sqap.recipe import Pruning


def check_pruning(pruning: Pruning, config: ModelConfig) -> None:
    """Make sure that a pruner's layers and budgets fit the model.

    Raises:
        InputError: with the first problem.
    """
    depth = config.decoder.depth
    if pruning.last_layer >= depth:
        raise InputError(
            f"pruning after layer {pruning.last_layer} would save nothing: the decoder has {depth} layers"
        )
    pruning.budget(config.grid**2)
    layers_to_look_at(pruning, config.decoder)
    score_queries(pruning, config)
