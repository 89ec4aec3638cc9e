"""The reference policy: CogACT in small, trained from nothing."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from reference.blueprint import Blueprint
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


NANO = Blueprint("reference", Path("src/sqap/assets/reference"), CONFIG, make_tokenizer)
