"""Checkpoint directories as LeRobot publishes SmolVLA, pi0 and pi0.5, with random weights of any size.

Names, shapes, types and files are those that LeRobot 0.6.1 writes; figures in them are made up. As there, no
tokenizer and no configuration of the vision-language model is in the directory; a tokenizer is put there, as
a user may.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from published_names import Shapes, llama
from published_weights import Spec, random_tensor, write_safetensors
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

Json = dict[str, Any]
BOTH = "model.vlm_with_expert."
HORIZON, PADDED, HEAD_DIM = 6, 32, 64
STATE_DIM, ACTION_DIM = 6, 7
IMAGES = "observation.images."
CAMERAS = (f"{IMAGES}top", f"{IMAGES}wrist")
# Features' statistics: state, then action.
STATISTICS = ("mean", "std", "min", "max", "q01", "q10", "q50", "q90", "q99")
PI_SPECIAL, BOS = ("<pad>", "<eos>", "<bos>", "<unk>"), 2
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
class Sizes:
    """Sizes that may be smaller than published: of the vision encoder and the language model."""

    image: int
    vision_width: int
    vision_depth: int
    vision_mlp: int
    width: int
    depth: int
    mlp: int


@dataclass(frozen=True)
class SmolSizes(Sizes):
    """Sizes of SmolVLA, whose heads have 64 channels."""

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


@dataclass(frozen=True)
class PiSizes(Sizes):
    """Sizes of pi0 and pi0.5, whose keys have one head."""

    expert: int
    expert_mlp: int
    head_dim: int
    rows: int
    horizon: int = 50
    patch: int = 14
    heads: int = 8


TINY_SMOLVLA = SmolSizes(128, 128, 2, 160, 128, 4, 192, 64, 480, horizon=HORIZON)
FULL_SMOLVLA = SmolSizes(512, 768, 12, 3072, 960, 16, 2560, 320, 49_280)
TINY_PI = PiSizes(56, 64, 2, 80, 64, 3, 96, 32, 64, 16, 480, horizon=HORIZON)
FULL_PI = PiSizes(224, 1152, 27, 4304, 2048, 18, 16_384, 1024, 4096, 256, 257_152)


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


def write_pi(
    directory: Path,
    sizes: PiSizes = TINY_PI,
    seed: int = 0,
    kind: str = "pi0",
    *,
    dtype: torch.dtype = torch.float32,
    tied: bool = False,
    **config: Any,
) -> None:
    """pi0 (``kind`` "pi0") or pi0.5 ("pi05") of LeRobot 0.6.1; ``tied`` leaves out the embedding table."""
    directory.mkdir(parents=True, exist_ok=True)
    # By name, as safetensors sorts them: where there are two tables, LeRobot reads the one that comes last.
    specs = dict(sorted(pi_specs(sizes, kind, dtype).items()))
    if tied:  # with PaliGemma's output matrix, under whose name both are
        specs = {name: spec for name, spec in specs.items() if not name.endswith("embed_tokens.weight")}
    write_safetensors(directory / "model.safetensors", specs, seed)
    relative, names = (config.get(key) for key in ("use_relative_actions", "action_feature_names"))
    write_processors(directory, kind, relative=bool(relative), names=names)
    write_json(directory / "config.json", pi_config(sizes, kind) | config)
    write_json(directory / "tokenizer.json", byte_tokenizer(sizes.rows, PI_SPECIAL, BOS))


def write_openpi(
    directory: Path,
    sizes: PiSizes = TINY_PI,
    seed: int = 0,
    kind: str = "pi0",
    assets: Sequence[str] = ("trossen",),
) -> None:
    """The same weights as `write_pi` as openpi's converter names them, with one table and statistics."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {n: random_tensor(n, s, seed) for n, s in pi_specs(sizes, kind, torch.float32).items()}
    table = next(tensors.pop(name) for name in [*tensors] if name.endswith("embed_tokens.weight"))
    tensors["model.paligemma_with_expert.paligemma.lm_head.weight"] = table
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, directory / "model.safetensors")
    config = {"action_dim": PADDED, "action_horizon": sizes.horizon, "precision": "float32"}
    variants = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    write_json(directory / "config.json", config | variants)
    write_json(directory / "tokenizer.json", byte_tokenizer(sizes.rows, PI_SPECIAL, BOS))
    found: Json = {"state": {}, "actions": {}}
    for name, tensor in statistics().items():
        feature, _, statistic = name.rpartition(".")
        if statistic in ("mean", "std", "q01", "q99"):
            found["actions" if feature == "action" else "state"][statistic] = tensor.tolist()
    for name in assets:
        (directory / "assets" / name).mkdir(parents=True)
        write_json(directory / "assets" / name / "norm_stats.json", {"norm_stats": found})


def pi_specs(sizes: PiSizes, kind: str, dtype: torch.dtype) -> dict[str, Spec]:
    """Every tensor of the file."""
    both = "model.paligemma_with_expert."
    gemma, expert = f"{both}paligemma.model.", f"{both}gemma_expert.model."
    queries, keys = sizes.heads * sizes.head_dim, sizes.head_dim
    shapes = siglip(f"{gemma}vision_tower.vision_model.", sizes)
    shapes |= linear(f"{gemma}multi_modal_projector.linear", sizes.vision_width, sizes.width)
    shapes[f"{gemma}language_model.embed_tokens.weight"] = (sizes.rows, sizes.width)
    shapes |= llama(f"{gemma}language_model.", sizes.width, sizes.depth, sizes.mlp, queries, keys)
    shapes[f"{both}paligemma.lm_head.weight"] = (sizes.rows, sizes.width)
    shapes[f"{both}gemma_expert.lm_head.weight"] = (sizes.rows, sizes.expert)
    shapes |= llama(expert, sizes.expert, sizes.depth, sizes.expert_mlp, queries, keys)
    shapes |= linear("model.action_in_proj", PADDED, sizes.expert)
    shapes |= linear("model.action_out_proj", sizes.expert, PADDED)
    if kind == "pi0":
        shapes |= linear("model.state_proj", PADDED, sizes.expert)
        shapes |= linear("model.action_time_mlp_in", 2 * sizes.expert, sizes.expert)
        shapes |= linear("model.action_time_mlp_out", sizes.expert, sizes.expert)
        return _typed(shapes, dtype)
    shapes |= linear("model.time_mlp_in", sizes.expert, sizes.expert)
    shapes |= linear("model.time_mlp_out", sizes.expert, sizes.expert)
    for name in [name for name in shapes if name.startswith(expert) and name.endswith("norm.weight")]:
        shapes.pop(name)
        shapes |= linear(f"{name.removesuffix('.weight')}.dense", sizes.expert, 3 * sizes.expert)
    return _typed(shapes, dtype)


def pi_config(sizes: PiSizes, kind: str) -> Json:
    """``config.json``."""
    mode = "MEAN_STD" if kind == "pi0" else "QUANTILES"
    return any_config(kind, sizes.horizon) | {
        "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": "float32",
        "num_inference_steps": 10,
        "time_sampling_beta_alpha": 1.5,
        "time_sampling_beta_beta": 1.0,
        "time_sampling_scale": 0.999,
        "time_sampling_offset": 0.001,
        "use_relative_actions": False,
        "relative_exclude_joints": ["gripper"],
        "action_feature_names": None,
        "image_resolution": [sizes.image, sizes.image],
        "gradient_checkpointing": False,
        "freeze_vision_encoder": False,
        "train_expert_only": False,
        "tokenizer_max_length": 48 if kind == "pi0" else 200,
    }


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


def siglip(prefix: str, sizes: SmolSizes | PiSizes) -> Shapes:
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


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    """A linear with a bias."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    """A LayerNorm."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def features(cameras: Sequence[str] = CAMERAS) -> Json:
    """The features that a configuration lists; cameras may be given by their short names."""
    names = [f"{IMAGES}{name.removeprefix(IMAGES)}" for name in cameras]
    images = {name: {"type": "VISUAL", "shape": [3, 96, 128]} for name in names}
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


def write_processors(
    directory: Path,
    kind: str,
    modes: Json | None = None,
    relative: bool = False,
    names: Sequence[str] | None = None,
) -> None:
    """``policy_preprocessor.json``, ``policy_postprocessor.json`` and their state files."""
    before, after = processor_steps(kind, modes or {}, relative, names)
    for when, steps in (("preprocessor", before), ("postprocessor", after)):
        listed = []
        for i, (name, settings) in enumerate(steps):
            step: Json = {"registry_name": name, "config": settings}
            if "norm_map" in settings:
                step["state_file"] = f"policy_{when}_step_{i}_{name}.safetensors"
                save_file(statistics(), directory / step["state_file"])
            listed.append(step)
        write_json(directory / f"policy_{when}.json", {"name": f"policy_{when}", "steps": listed})


def processor_steps(
    kind: str, modes: Json, relative: bool, names: Sequence[str] | None = None
) -> tuple[list[Any], list[Any]]:
    """Steps before and behind a model: registered names and settings."""
    every, mode = features(), "QUANTILES" if kind == "pi05" else "MEAN_STD"
    norm_map = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode} | modes
    both = every["input_features"] | every["output_features"]
    smol = kind == "smolvla"
    tokenizer: Json = {
        "max_length": 200 if kind == "pi05" else 48,
        "task_key": "task",
        "padding_side": "right",
        "padding": "longest" if smol else "max_length",
        "truncation": True,
        "tokenizer_name": "HuggingFaceTB/SmolVLM2-500M-Video-Instruct"
        if smol
        else "google/paligemma-3b-pt-224",
    }
    rename = ("rename_observations_processor", {"rename_map": {}})
    batch, device = ("to_batch_processor", {}), ("device_processor", {"device": "cuda", "float_dtype": None})
    normalize = ("normalizer_processor", {"eps": 1e-8, "features": both, "norm_map": norm_map})
    settings = {"eps": 1e-8, "features": every["output_features"], "norm_map": norm_map}
    tokens, line = ("tokenizer_processor", tokenizer), (f"{kind}_new_line_processor", {})
    joints: Json = {"enabled": relative, "exclude_joints": ["gripper"], "action_names": names}
    change = ("relative_actions_processor", joints)
    state_text = ("pi05_prepare_state_tokenizer_processor_step", {})
    after: list[Any] = [("unnormalizer_processor", settings)]
    after += [] if smol else [("absolute_actions_processor", {"enabled": relative})]
    after.append(("device_processor", {"device": "cpu", "float_dtype": None}))
    before: dict[str, list[Any]] = {
        "smolvla": [rename, batch, line, tokens, device, normalize],
        "pi0": [rename, batch, line, tokens, device, change, normalize],
        "pi05": [rename, batch, change, normalize, state_text, tokens, device],
    }
    return before[kind], after


def byte_tokenizer(rows: int, special: tuple[str, ...] = SPECIAL, bos: int | None = None) -> Json:
    """A ``tokenizer.json`` with a token for each row: BPE over bytes, as SmolLM2's, which adds no token.

    PaliGemma's, which is of another kind, puts ``bos`` before a prompt.
    """
    merges: dict[str, str] = {}
    for word in WORDS.split():
        for text in (f"Ġ{word}", word):
            for end in range(2, len(text) + 1):
                merges.setdefault(text[:end], f"{text[: end - 1]} {text[end - 1]}")
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *merges]
    pieces = pieces[:rows]
    merges = {piece: merge for piece, merge in merges.items() if piece in pieces}
    vocabulary = pieces + [f"<|unused{i}|>" for i in range(rows - len(pieces))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, content) for i, content in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None if bos is None else _begin(bos, special[bos]),
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


def _begin(number: int, content: str) -> Json:
    """What puts a token before a prompt."""
    first, text = {"SpecialToken": {"id": content, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {content: {"id": content, "ids": [number], "tokens": [content]}},
    }


def _typed(shapes: Shapes, dtype: torch.dtype) -> dict[str, Spec]:
    return {name: Spec(shape, dtype) for name, shape in shapes.items()}
