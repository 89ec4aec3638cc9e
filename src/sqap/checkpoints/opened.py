"""The record that every format on disk opens as, and how a published one is checked against its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenizers import Tokenizer

from sqap.checkpoints import adapters
from sqap.checkpoints.choices import Choices
from sqap.checkpoints.tokenizer import Vocabulary, read_tokenizer
from sqap.checkpoints.weights import CheckpointWeights, Table, TensorSet
from sqap.config import Calibration, Origin, PolicyConfig
from sqap.models import VLA, empty_model, storage
from sqap.processing import cropped
from sqap.recipe import Recipe

CONFIG = "config.json"


@dataclass(frozen=True)
class Opened:
    """A checkpoint: all of a policy.

    Args:
        model: the network, on the meta device as far as its weights are left on disk.
        config: what the policy is, apart from its weights.
        tokenizer: instruction to token ids.
        recipe: how it was compressed; an empty one for an original.
        calibration: what compression measured.
        source: fingerprint of the policy this one was compressed from.
        fingerprint: SHA-256 of ``policy.json``; None for what is not sqap's own.
        weights: where to read what the model has on the meta device; None if that is nothing.
        origin: where it was loaded from, or what it was compressed from.
        card: the model card beside sqap's own policies, as it is on disk.
    """

    model: VLA = field(repr=False)
    config: PolicyConfig
    tokenizer: Tokenizer = field(repr=False)
    recipe: Recipe = field(default_factory=Recipe)
    calibration: Calibration | None = None
    source: str | None = None
    fingerprint: str | None = None
    weights: storage.Weights | None = field(default=None, repr=False)
    origin: Origin = Origin()  # noqa: RUF009 - it is frozen
    card: bytes | None = field(default=None, repr=False)


def open_published(
    directory: Path,
    choices: Choices,
    config: PolicyConfig,
    vocabulary: Vocabulary,
    tensors: TensorSet,
    table: Table,
    unused: Sequence[str],
) -> Opened:
    """A published checkpoint, its tokenizer and tensors checked against the model that ``config`` makes.

    Args:
        directory: the checkpoint.
        choices: the tokenizer's place and the crop, if they were chosen.
        config: the policy that its files describe.
        vocabulary: of its language model.
        tensors: what is on disk.
        table: for each of the model's parameters, where it comes from.
        unused: patterns of names on disk that the model has no use for.

    Raises:
        CheckpointError: they do not fit, there is no tokenizer, or an adapter is not merged.
    """
    adapters.refuse_unmerged(directory, tensors)
    rows, needed = config.model.decoder.vocabulary, config.prompt.append
    tokenizer = read_tokenizer(directory, choices.tokenizer, vocabulary, rows=rows, needed=needed)
    model = empty_model(config.model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if choices.crop is not None:
        config = replace(config, images=tuple(cropped(steps, choices.crop) for steps in config.images))
    return Opened(model, config, tokenizer, weights=CheckpointWeights(tensors, table, shapes, unused))
