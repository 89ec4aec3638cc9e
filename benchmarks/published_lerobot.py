"""Checkpoint directories as LeRobot publishes SmolVLA, with random weights of any size.

Names, shapes, types and files are those that LeRobot 0.6.1 writes; figures in them are made up. As there, no
tokenizer and no configuration of the vision-language model is in the directory; a tokenizer is put there, as
a user may.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from published_names import Shapes
from published_weights import Spec, random_tensor, write_safetensors
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

Json = dict[str, Any]
BOTH = "model.vlm_with_expert."
HORIZON, PADDED, HEAD_DIM = 6, 32, 64
STATE_DIM, ACTION_DIM = 6, 7
CAMERAS = ("observation.images.top", "observation.images.wrist")
# Features' statistics: state, then action.
STATISTICS = ("mean", "std", "min", "max", "q01", "q10", "q50", "q90", "q99")
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<end_of_utterance>",
)
WORDS = (
    "pick up the red cube and put it in bowl open drawer push button fold towel place on table task state "
    "wipe move blue mug near sink close microwave door carrot plate action"
)


@dataclass(frozen=True)
class SmolSizes:
    """What of SmolVLA's architecture may be smaller than published; heads have 64 channels."""

    image: int
    vision_width: int
    vision_depth: int
    vision_mlp: int
    width: int
    depth: int
    mlp: int
    kv_width: int
    rows: int
    horizon: int = 50
    patch: int = 16
    shuffle: int = 4

    @property
    def expert(self) -> int:
        """Width of the action expert."""
        return int(self.width * 0.75)

    @property
    def expert_mlp(self) -> int:
        """Inner width of the action expert's MLPs."""
        return 256 * math.ceil(4 * (2 * self.expert // 3) / 256)


TINY_SMOLVLA = SmolSizes(128, 128, 2, 160, 128, 4, 192, 64, 480, horizon=HORIZON)
FULL_SMOLVLA = SmolSizes(512, 768, 12, 3072, 960, 16, 2560, 320, 49_280)


def write_smolvla(
    directory: Path, sizes: SmolSizes = TINY_SMOLVLA, seed: int = 0, *, old: bool = False, **config: Any
) -> None:
    """SmolVLA of LeRobot 0.6.1, or of ``old`` versions: statistics among the weights of a compiled model."""
    directory.mkdir(parents=True, exist_ok=True)
    specs = smolvla_specs(sizes)
    if old:
        weights = {name: random_tensor(name, spec, seed) for name, spec in specs.items()}
        weights = {name.replace("model.", "model._orig_mod.", 1): t for name, t in weights.items()}
        save_file(weights | statistics_inside(), directory / "model.safetensors")
    else:
        write_safetensors(directory / "model.safetensors", specs, seed)
        write_processors(directory, "smolvla")
    write_json(directory / "config.json", smolvla_config(sizes) | config)
    write_json(directory / "tokenizer.json", byte_tokenizer(sizes.rows))


def smolvla_specs(sizes: SmolSizes) -> dict[str, Spec]:
    """Every tensor of the file."""
    wide, half = torch.float32, torch.bfloat16
    vlm, text, expert = f"{BOTH}vlm.", f"{BOTH}vlm.model.text_model.", f"{BOTH}lm_expert."
    specs = _typed(siglip(f"{vlm}model.vision_model.", sizes), wide)
    channels = sizes.shuffle**2 * sizes.vision_width
    specs |= _typed({f"{vlm}model.connector.modality_projection.proj.weight": (sizes.width, channels)}, wide)
    specs |= _typed({f"{text}embed_tokens.weight": (sizes.rows, sizes.width)}, half)
    specs |= _typed(llama(text, sizes.width, sizes.depth, sizes.mlp, sizes.width, sizes.kv_width), half)
    specs |= _typed({f"{vlm}lm_head.weight": (sizes.rows, sizes.width)}, half)
    layers = llama(expert, sizes.expert, sizes.depth, sizes.expert_mlp, sizes.width, sizes.kv_width)
    specs |= _typed(layers, half)
    for layer in range(1, sizes.depth, 2):  # which make keys and values of the language model's
        for kind in "kv":
            name = f"{expert}layers.{layer}.self_attn.{kind}_proj.weight"
            specs[name] = Spec((sizes.kv_width, sizes.kv_width), wide)
    around = linear("model.state_proj", PADDED, sizes.width)
    around |= linear("model.action_in_proj", PADDED, sizes.expert)
    around |= linear("model.action_out_proj", sizes.expert, PADDED)
    around |= linear("model.action_time_mlp_in", 2 * sizes.expert, sizes.expert)
    around |= linear("model.action_time_mlp_out", sizes.expert, sizes.expert)
    return specs | _typed(around, wide)


def siglip(prefix: str, sizes: Any) -> Shapes:
    """The vision encoder in transformers' names."""
    width, hidden = sizes.vision_width, sizes.vision_mlp
    shapes: Shapes = {
        f"{prefix}embeddings.patch_embedding.weight": (width, 3, sizes.patch, sizes.patch),
        f"{prefix}embeddings.patch_embedding.bias": (width,),
        f"{prefix}embeddings.position_embedding.weight": ((sizes.image // sizes.patch) ** 2, width),
    }
    for i in range(sizes.vision_depth):
        layer = f"{prefix}encoder.layers.{i}."
        for which in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}self_attn.{which}", width, width)
        shapes |= linear(f"{layer}mlp.fc1", width, hidden) | linear(f"{layer}mlp.fc2", hidden, width)
        shapes |= norm(f"{layer}layer_norm1", width) | norm(f"{layer}layer_norm2", width)
    return shapes | norm(f"{prefix}post_layernorm", width)


def llama(prefix: str, width: int, depth: int, hidden: int, queries: int, keys: int) -> Shapes:
    """The layers of a language model, or of an expert, and the norm behind them."""
    shapes: Shapes = {}
    for i in range(depth):
        layer = f"{prefix}layers.{i}."
        for kind, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{layer}self_attn.{kind}_proj.weight"] = (rows, width)
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, queries)
        shapes[f"{layer}mlp.gate_proj.weight"] = (hidden, width)
        shapes[f"{layer}mlp.up_proj.weight"] = (hidden, width)
        shapes[f"{layer}mlp.down_proj.weight"] = (width, hidden)
        shapes[f"{layer}input_layernorm.weight"] = (width,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
    return shapes | {f"{prefix}norm.weight": (width,)}


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    """A linear with a bias."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    """A LayerNorm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def features() -> Json:
    """The features that a configuration lists."""
    images = {name: {"type": "VISUAL", "shape": [3, 96, 128]} for name in CAMERAS}
    state = {"observation.state": {"type": "STATE", "shape": [STATE_DIM]}}
    return {
        "input_features": images | state,
        "output_features": {"action": {"type": "ACTION", "shape": [ACTION_DIM]}},
    }


def any_config(kind: str, horizon: int) -> Json:
    """What LeRobot writes of every policy."""
    return features() | {
        "type": kind,
        "n_obs_steps": 1,
        "device": "cuda",
        "use_amp": False,
        "use_peft": False,
        "push_to_hub": True,
        "repo_id": None,
        "private": None,
        "tags": None,
        "license": None,
        "pretrained_path": None,
        "chunk_size": horizon,
        "n_action_steps": max(1, horizon - 2),
        "max_state_dim": PADDED,
        "max_action_dim": PADDED,
        "empty_cameras": 0,
        "min_period": 0.004,
        "max_period": 4.0,
        "rtc_config": None,
        "compile_model": False,
        "compile_mode": "max-autotune",
        "optimizer_lr": 0.0001,
        "scheduler_warmup_steps": 1000,
    }


def smolvla_config(sizes: SmolSizes) -> Json:
    """``config.json``."""
    return any_config("smolvla", sizes.horizon) | {
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"},
        "resize_imgs_with_padding": [sizes.image, sizes.image],
        "adapt_to_pi_aloha": False,
        "use_delta_joint_actions_aloha": False,
        "tokenizer_max_length": 48,
        "num_steps": 10,
        "use_cache": True,
        "freeze_vision_encoder": True,
        "train_expert_only": True,
        "train_state_proj": True,
        "vlm_model_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
        "load_vlm_weights": True,
        "add_image_special_tokens": False,
        "attention_mode": "cross_attn",
        "prefix_length": -1,
        "pad_language_to": "longest",
        "num_expert_layers": -1,
        "num_vlm_layers": sizes.depth,
        "self_attn_every_n_layers": 2,
        "expert_width_multiplier": 0.75,
    }


def statistics() -> dict[str, Tensor]:
    """A data set's, lopsided about zero and different in every dimension."""
    found = {}
    for feature, width, scale in (("observation.state", STATE_DIM, 0.8), ("action", ACTION_DIM, 0.3)):
        steps = scale * (1 + 0.25 * torch.arange(width, dtype=torch.float32))
        signs = 1 - 2 * (torch.arange(width) % 2)
        for name, share in zip(STATISTICS, (0.2, 0.6, -1.5, 1.9, -1.2, -0.9, 0.1, 1.1, 1.6), strict=True):
            found[f"{feature}.{name}"] = share * steps + (0.1 * signs if name != "std" else 0)
        found[f"{feature}.count"] = torch.tensor([1000.0])
    return found


def statistics_inside() -> dict[str, Tensor]:
    """The same as versions before 0.4.0 name them."""
    names = {
        "observation.state": ("normalize_inputs.buffer_observation_state",),
        "action": ("normalize_targets.buffer_action", "unnormalize_outputs.buffer_action"),
    }
    found = {}
    for name, tensor in statistics().items():
        feature, _, statistic = name.rpartition(".")
        if statistic in ("mean", "std"):
            found |= {f"{place}.{statistic}": tensor.clone() for place in names[feature]}
    return found


def write_processors(directory: Path, kind: str, modes: Json | None = None, relative: bool = False) -> None:
    """``policy_preprocessor.json``, ``policy_postprocessor.json`` and their state files."""
    before, after = processor_steps(kind, modes or {}, relative)
    for when, steps in (("preprocessor", before), ("postprocessor", after)):
        listed = []
        for i, (name, settings) in enumerate(steps):
            step: Json = {"registry_name": name, "config": settings}
            if "norm_map" in settings:
                step["state_file"] = f"policy_{when}_step_{i}_{name}.safetensors"
                save_file(statistics(), directory / step["state_file"])
            listed.append(step)
        write_json(directory / f"policy_{when}.json", {"name": f"policy_{when}", "steps": listed})


def processor_steps(kind: str, modes: Json, relative: bool) -> tuple[list[Any], list[Any]]:
    """Steps before and behind a model: registered names and settings."""
    every = features()
    norm_map = {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"} | modes
    both = every["input_features"] | every["output_features"]
    tokenizer: Json = {
        "max_length": 48,
        "task_key": "task",
        "padding_side": "right",
        "padding": "longest",
        "truncation": True,
        "tokenizer_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct",
    }
    rename = ("rename_observations_processor", {"rename_map": {}})
    batch, device = ("to_batch_processor", {}), ("device_processor", {"device": "cuda", "float_dtype": None})
    normalize = ("normalizer_processor", {"eps": 1e-8, "features": both, "norm_map": norm_map})
    settings = {"eps": 1e-8, "features": every["output_features"], "norm_map": norm_map}
    after: list[Any] = [("unnormalizer_processor", settings)]
    to_cpu = ("device_processor", {"device": "cpu", "float_dtype": None})
    line = (f"{kind}_new_line_processor", {})
    before = [rename, batch, line, ("tokenizer_processor", tokenizer), device, normalize]
    return before, [*after, to_cpu]


def byte_tokenizer(rows: int) -> Json:
    """A ``tokenizer.json`` with a token for each row: BPE over bytes, as SmolLM2's, which adds no token."""
    merges: dict[str, str] = {}
    for word in WORDS.split():
        for text in (f"Ġ{word}", word):
            for end in range(2, len(text) + 1):
                merges.setdefault(text[:end], f"{text[: end - 1]} {text[end - 1]}")
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merges]
    pieces = pieces[:rows]
    merges = {piece: merge for piece, merge in merges.items() if piece in pieces}
    vocabulary = pieces + [f"<|unused{i}|>" for i in range(rows - len(pieces))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, content) for i, content in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {piece: i for i, piece in enumerate(vocabulary)},
            "merges": list(merges.values()),
        },
    }


def write_json(path: Path, data: object) -> None:
    """As LeRobot writes it; a tokenizer on one line."""
    indent = None if path.name == "tokenizer.json" else 2
    path.write_text(json.dumps(data, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def _added(number: int, content: str) -> Json:
    return {
        "id": number,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _typed(shapes: Shapes, dtype: torch.dtype) -> dict[str, Spec]:
    return {name: Spec(shape, dtype) for name, shape in shapes.items()}
