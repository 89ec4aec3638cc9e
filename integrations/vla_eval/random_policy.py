"""Write a policy of random weights that reads and acts as LIBERO's policies do: python random_policy.py OUT

It tries a simulator out where no trained policy is at hand, and succeeds at nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from sqap import Policy
from sqap.config import PolicyConfig
from sqap.models import VLA, DecoderConfig, ModelConfig, RegressionHeadConfig, VisionConfig
from sqap.processing import Clamp, MeanStd, Range, stretched

CAMERAS = "agentview", "wrist"
STATE, ACTION, HORIZON, EXECUTED = 8, 7, 8, 2
SIZE, PATCH = 64, 8  # 64 visual tokens of each camera


def random_policy(cameras: Sequence[str] = CAMERAS) -> Policy:
    """Four decoder layers of OpenVLA-OFT's kind: the same weights every time."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=SIZE, patch_size=PATCH, width=32, depth=2, heads=2, mlp_width=64)
    decoder = DecoderConfig(
        vocabulary=8, width=64, depth=4, heads=4, kv_heads=2, head_dim=16, mlp_width=128, causal=False
    )
    head = RegressionHeadConfig(action_dim=ACTION, horizon=HORIZON, width=32)
    config = ModelConfig((vision,), (64, 64), decoder, head, cameras=len(cameras), proprio_dim=STATE)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    # The gripper is 0 to 1, as OpenVLA-OFT's, and so is the configurations' `gripper: close_positive`.
    actions = Clamp(), Range((-1.0,) * 6 + (0.0,), (1.0,) * ACTION, (True,) * ACTION)
    return Policy(
        VLA(config).eval(),
        PolicyConfig(
            "openvla-oft",
            config,
            tuple(cameras),
            (stretched(SIZE),),
            actions,
            state=(MeanStd((0.0,) * STATE, (1.0,) * STATE),),
            n_action_steps=EXECUTED,
        ),
        tokenizer,
    )


if __name__ == "__main__":
    random_policy().save(sys.argv[1])
