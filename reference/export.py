"""From a training state to a policy directory, averaged weights and all."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from reference.model import CONFIG, SPECIAL, WORDS
from reference.settings import WORK
from sqap.environments.metaworld import CAMERA
from sqap.models import VLA
from sqap.policy import Policy, PolicyConfig
from sqap.processing import ActionStatistics


def make_tokenizer() -> Tokenizer:
    """One token per word of Meta-World's instructions, between ``<s>`` and ``</s>``."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(t, vocabulary[t]) for t in ("<s>", "</s>")]
    )
    return tokenizer


def export(directory: Path) -> int:
    """Write the policy in training to ``directory``; returns the training step it stems from."""
    saved = torch.load(WORK / "training.pt", weights_only=True)
    prefix = "module.vla."
    weights = {k.removeprefix(prefix): v for k, v in saved["average"].items() if k.startswith(prefix)}
    model = VLA(CONFIG)
    model.load_state_dict(weights)
    statistics = json.loads((WORK / "statistics.json").read_text())
    actions = ActionStatistics(
        q01=tuple(statistics["q01"]),
        q99=tuple(statistics["q99"]),
        mask=(True,) * CONFIG.head.action_dim,
    )
    config = PolicyConfig(family="cogact", model=CONFIG, cameras=(CAMERA,), actions=actions)
    Policy(model, config, make_tokenizer()).save(directory)
    return int(saved["step"])
