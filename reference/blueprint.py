"""What a bundled policy is made of and how it is trained; `nano`, `smollm` and `smolvla` are the three."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer

from reference.settings import BUILD
from sqap.models import VLA, ModelConfig


@dataclass(frozen=True)
class Blueprint:
    """One policy to train.

    Args:
        name: of its directory under ``build/``, and how `sqap.load` calls it.
        packaged: where the finished policy is kept.
        config: sizes of the four parts.
        tokenizer: makes the tokenizer; its last id is the cognition token.
        initialise: gives a fresh model its first weights; None leaves it random.
        rates: learning rate by the first prefix that a parameter's name has; "" is everything else, 0 is
            frozen.
        demonstrations: episodes a task that the disturbed experts drive.
        rollouts: episodes a task that the policy drives halfway.
        batch: samples a step.
        halfway: step at which the policy drives the DAgger episodes; 0 for none.
        steps: of training in all.
        warmup: steps over which the rate rises.
        noise_draws: noise levels per sample.
        weight_decay: of matrices.
        parts: of a batch, run one after the other; with more than one, the instructions of a part are of one
            length, so that none is padded.
        bfloat16: autocast; only processors that multiply bfloat16 gain from it.
    """

    name: str
    packaged: Path
    config: ModelConfig
    tokenizer: Callable[[], Tokenizer]
    initialise: Callable[[VLA], None] | None = None
    rates: Mapping[str, float] = field(default_factory=lambda: {"": 1e-3})
    demonstrations: int = 250
    rollouts: int = 50
    batch: int = 32
    halfway: int = 2000
    steps: int = 5000
    warmup: int = 300
    noise_draws: int = 8
    weight_decay: float = 0.05
    parts: int = 1
    bfloat16: bool = True

    @property
    def work(self) -> Path:
        """Where its training state lies."""
        return BUILD / self.name
