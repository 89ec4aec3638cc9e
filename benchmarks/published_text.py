"""What stands beside the weights of a published checkpoint: a tokenizer, configurations, statistics.

Llama 2's own tokenizer comes with a licence to accept, so this one is made up: the same kind (BPE over
sentencepiece's underlines with bytes to fall back on), the same size and the same ids for what is special,
with merges for the words of a robot's instructions. Other words fall apart into letters.
"""

from __future__ import annotations

import string
from typing import Any

from published_names import VOCABULARY, Sizes

Json = dict[str, Any]

UNKNOWN, BOS, EOS, UNDERLINE, PAD = 0, 1, 2, 29_871, 32_000
# Upstream checks that each letter and answer is one token.
_WORDS = (
    "In What action should the robot take to pick up place put move push pull open close turn on off and",
    "of in into from a red green blue yellow black white bowl plate cup can mug drawer door microwave",
    "stove pot lid spoon fork knife apple banana carrot eggplant cube block cloth towel basket cabinet",
    "top bottom middle left right front near lift stack fold wipe sink table coke sponge orange Out True",
    "False Yes No",
)
_LETTERS = "etaionrslhdcumpgfbywvkxjzqETAIONRSLHDCUMPGFBYWVKXJZQ0123456789.,:;?!-_'\"()/&+*=#%"

TOKENIZER_CONFIG: Json = {
    "add_bos_token": True,
    "add_eos_token": False,
    "added_tokens_decoder": {
        str(i): {
            "content": content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, content in ((UNKNOWN, "<unk>"), (BOS, "<s>"), (EOS, "</s>"), (PAD, "<PAD>"))
    },
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "legacy": False,
    "model_max_length": 2048,
    "pad_token": "<PAD>",
    "padding_side": "right",
    "processor_class": "PrismaticProcessor",
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
}
GENERATION_CONFIG: Json = {
    "_from_model_config": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "transformers_version": "4.40.1",
}


def tokenizer() -> Json:
    """A ``tokenizer.json`` of 32001 pieces, ids 0 to 32000, as Llama 2's with a padding token."""
    merges: dict[str, str] = {}
    for word in [*" ".join(_WORDS).split(), *string.ascii_uppercase]:
        pieces = "Out" if word == "Out" else f"▁{word}"  # "Out" follows a line break, without a space
        for end in range(2, len(pieces) + 1):
            merges.setdefault(pieces[:end], f"{pieces[: end - 1]} {pieces[end - 1]}")
    vocabulary = {"<unk>": UNKNOWN, "<s>": BOS, "</s>": EOS}
    vocabulary |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocabulary |= {piece: 259 + i for i, piece in enumerate(merges)}
    vocabulary |= {piece: UNDERLINE + i for i, piece in enumerate("▁" + _LETTERS)}
    taken = set(vocabulary.values())
    # Pieces that no merge leads to keep the size what it is.
    vocabulary |= {f"▁piece{i}": i for i in range(PAD) if i not in taken}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": int(i), **entry} for i, entry in TOKENIZER_CONFIG["added_tokens_decoder"].items()
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                bos,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "merges": list(merges.values()),
        },
    }


def openvla_config(sizes: Sizes) -> Json:
    """``config.json`` of the Hugging Face layout; ``text_config`` says only what Llama's defaults do not."""
    text: Json = {"model_type": "llama", "pad_token_id": PAD, "torch_dtype": "bfloat16"}
    text["vocab_size"] = VOCABULARY
    for name, value, default in (
        ("hidden_size", sizes.decoder_width, 4096),
        ("intermediate_size", sizes.decoder_mlp, 11_008),
        ("num_attention_heads", sizes.decoder_heads, 32),
        ("num_hidden_layers", sizes.decoder_depth, 32),
        ("num_key_value_heads", sizes.decoder_heads, 32),
    ):
        if value != default:
            text[name] = value
    return {
        "arch_specifier": "no-align+fused-gelu-mlp",
        "architectures": ["OpenVLAForActionPrediction"],
        "auto_map": {
            "AutoConfig": "configuration_prismatic.OpenVLAConfig",
            "AutoModelForVision2Seq": "modeling_prismatic.OpenVLAForActionPrediction",
        },
        "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_resize_strategy": "resize-naive",
        "image_sizes": [sizes.image, sizes.image],
        "llm_backbone_id": "llama2-7b-pure",
        "llm_max_length": 2048,
        "model_type": "openvla",
        "n_action_bins": 256,
        "norm_stats": pretraining_statistics(),
        "output_projector_states": False,
        "pad_to_multiple_of": 64,
        "pad_token_id": PAD,
        "text_config": text,
        "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
        "timm_override_act_layers": [None, None],
        "torch_dtype": "bfloat16",
        "transformers_version": "4.40.1",
        "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px",
    }


def preprocessor_config(sizes: Sizes) -> Json:
    """``preprocessor_config.json`` of the Hugging Face layout."""
    side = sizes.image
    means = [[0.485, 0.456, 0.406], [0.5, 0.5, 0.5]]
    deviations = [[0.229, 0.224, 0.225], [0.5, 0.5, 0.5]]
    resize = {"antialias": True, "interpolation": 3, "max_size": None, "size": [side, side]}
    return {
        "auto_map": {
            "AutoImageProcessor": "processing_prismatic.PrismaticImageProcessor",
            "AutoProcessor": "processing_prismatic.PrismaticProcessor",
        },
        "image_processor_type": "PrismaticImageProcessor",
        "image_resize_strategy": "resize-naive",
        "input_sizes": [[3, side, side]] * 2,
        "interpolations": ["bicubic", "bicubic"],
        "means": means,
        "processor_class": "PrismaticProcessor",
        "stds": deviations,
        "tvf_crop_params": [{"output_size": [side, side]}] * 2,
        "tvf_do_letterbox": False,
        "tvf_letterbox_fill": None,
        "tvf_normalize_params": [
            {"inplace": False, "mean": mean, "std": std} for mean, std in zip(means, deviations, strict=True)
        ],
        "tvf_resize_params": [resize] * 2,
        "use_fused_vision_backbone": True,
    }


def native_config(sizes: Sizes, cogact: bool) -> Json:
    """``config.json`` of a native run: how it was trained, of which only ``vla`` matters to its reader."""
    identity = "prism-dinosiglip-224px+" + ("oxe+diffusion" if cogact else "mx-oxe-magic-soup-plus")
    config: Json = {
        "data_root_dir": "datasets/open-x-embodiment",
        "hf_token": ".hf_token",
        "image_aug": True,
        "is_resume": False,
        "pretrained_checkpoint": None,
        "resume_epoch": None,
        "resume_step": None,
        "run_id": identity,
        "run_root_dir": "runs",
        "save_interval": 2500,
        "seed": 42,
        "trackers": ["jsonl", "wandb"],
        "vla": {
            "base_vlm": "prism-dinosiglip-224px+7b",
            "data_mix": "oxe_magic_soup_plus_minus" if cogact else "oxe_magic_soup_plus",
            "enable_gradient_checkpointing": True,
            "enable_mixed_precision_training": True,
            "epochs": 100,
            "expected_world_size": 16,
            "freeze_llm_backbone": False,
            "freeze_vision_backbone": False,
            "global_batch_size": 256,
            "learning_rate": 2e-05,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "max_steps": None,
            "per_device_batch_size": 16,
            "reduce_in_full_precision": True,
            "shuffle_buffer_size": 250_000,
            "train_strategy": "fsdp-full-shard",
            "type": identity,
            "unfreeze_last_llm_layer": False,
            "vla_id": identity,
            "warmup_ratio": 0.0,
            "weight_decay": 0.0,
        },
        "wandb_entity": "",
        "wandb_project": "",
    }
    if cogact:
        kind = {384: "DiT-S", 1024: "DiT-L"}.get(sizes.dit_width, "DiT-B")
        config |= {
            "action_dim": 7,
            "action_model_type": kind,
            "future_action_window_size": 15,
            "load_all_data_for_training": True,
            "past_action_window_size": 0,
            "repeated_diffusion_steps": 8,
            "use_ema": False,
        }
    return config


def pretraining_statistics() -> Json:
    """Two of the data sets that OpenVLA and CogACT were trained on, with made-up figures."""
    gripper = [True] * 6 + [False]
    return {
        "bridge_orig": dataset_statistics(7, 7, gripper, 0.02),
        "fractal20220817_data": dataset_statistics(7, 7, gripper, 0.3),
    }


def dataset_statistics(action_dim: int, proprio_dim: int, mask: list[bool] | None, scale: float) -> Json:
    """One data set's entry; ``mask`` is left out where it is None."""
    action = _quantiles(action_dim, scale)
    if mask is not None:
        action["mask"] = mask
        for name in ("min", "q01", "max", "q99"):
            limit = 0.0 if name in ("min", "q01") else 1.0
            action[name] = [v if m else limit for v, m in zip(action[name], mask, strict=True)]
    return {
        "action": action,
        "num_trajectories": 60_064,
        "num_transitions": 2_135_463,
        "proprio": _quantiles(proprio_dim, 10 * scale),
    }


def _quantiles(dim: int, scale: float) -> Json:
    """Figures that differ in every dimension and lie lopsided about zero."""
    steps = [scale * (1 + 0.25 * i) for i in range(dim)]
    return {
        "max": [round(3.5 * s, 6) for s in steps],
        "mean": [round(0.125 * s, 6) for s in steps],
        "min": [round(-3.0 * s, 6) for s in steps],
        "q01": [round(-1.0 * s, 6) for s in steps],
        "q99": [round(1.25 * s, 6) for s in steps],
        "std": [round(0.5 * s, 6) for s in steps],
    }
