"""A whole policy in small, with random weights."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sqap import Policy
from sqap.config import PolicyConfig
from sqap.models import VLA, DecoderConfig, DiffusionHeadConfig, ModelConfig, VisionConfig
from sqap.processing import Clamp, Range, stretched

CAMERA = "corner2"


def tiny_policy() -> Policy:
    """16 visual tokens, four decoder layers, random weights; acts on Meta-World's camera."""
    torch.manual_seed(0)
    config = ModelConfig(
        vision=(VisionConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2, mlp_width=32),),
        projector=(32, 32),
        decoder=DecoderConfig(
            vocabulary=8, width=32, depth=4, heads=2, kv_heads=1, head_dim=16, mlp_width=64
        ),
        head=DiffusionHeadConfig(action_dim=4, horizon=8, width=16, depth=1, heads=2),
    )
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "open": 3, "close": 4, "the": 5, "drawer": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    actions = Clamp(), Range(low=(-0.5,) * 4, high=(0.5, 1.0, 2.0, 1.0), mask=(True, True, True, False))
    return Policy(
        VLA(config), PolicyConfig("cogact", config, (CAMERA,), (stretched(32),), actions), tokenizer
    )
