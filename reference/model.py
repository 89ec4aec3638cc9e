"""The reference policy's shape: CogACT in small."""

from __future__ import annotations

from reference.settings import HORIZON, IMAGE_SIZE
from sqap.environments.metaworld import MetaWorld
from sqap.environments.metaworld_tasks import INSTRUCTIONS
from sqap.models import DecoderConfig, DiffusionHeadConfig, ModelConfig, VisionConfig

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>")
WORDS = sorted({word for sentence in INSTRUCTIONS.values() for word in sentence.split()})

CONFIG = ModelConfig(
    vision=(
        VisionConfig(
            image_size=IMAGE_SIZE,
            patch_size=8,
            width=128,
            depth=4,
            heads=2,
            mlp_width=512,
            stem="convolutions",
        ),
    ),
    projector=(512, 192),
    decoder=DecoderConfig(
        vocabulary=len(SPECIAL) + len(WORDS),
        width=192,
        depth=6,
        heads=3,
        kv_heads=1,
        head_dim=64,
        mlp_width=512,
    ),
    head=DiffusionHeadConfig(action_dim=MetaWorld.action_dim, horizon=HORIZON, width=128, depth=4, heads=2),
)


def token_ids(instruction: str) -> list[int]:
    """``<s> words </s>``; the last one is the cognition token. The shipped tokenizer gives the same."""
    table = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    return [table["<s>"], *(table.get(w, 1) for w in instruction.lower().split()), table["</s>"]]
