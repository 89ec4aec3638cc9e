"""Small valid directories of every on-disk format, and the faults that each of their files can have."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from published import write_cogact, write_openvla, write_openvla_oft
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import sqap
from sqap import Observation, Policy, Recipe
from sqap.config import PolicyConfig
from sqap.processing import Binarize, Clamp, Lower, PromptConfig, Range, Template, cropped, stretched
from sqap.recipe import Pruning
from tests.checkpoints.mutations import BESIDE, MANIFEST, Mutation, Need, file_mutations, weighted
from tests.checkpoints.mutations_json import Decisive, Telling, json_mutations
from tests.checkpoints.mutations_tensors import flatten, pickle_mutations, read, tensor_mutations
from tests.families import family_config, random_model

CONFIG, STATISTICS, PROCESSOR = "config.json", "dataset_statistics.json", "preprocessor_config.json"
DATASET = "bridge_orig"
CAMERAS = ("image", "wrist_image", "left_wrist_image", "right_wrist_image")
TEXT = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
TEXT += ("vocab_size", "head_dim", "rope_theta", "rms_norm_eps", "model_type")
HUGGING_FACE: Decisive = (
    ("model_type",),
    *(("text_config", name) for name in TEXT),
    ("image_sizes",),
    ("timm_model_ids",),
    ("use_fused_vision_backbone",),
)
PROCESSING: Decisive = (
    ("image_resize_strategy",),
    ("tvf_normalize_params", "*", "mean"),
    ("tvf_normalize_params", "*", "std"),
)
TOKENS: Decisive = (("n_action_bins",), ("pad_to_multiple_of",))
BOUNDS = ("q01", "q99", "mask")
# Whose every value counts.
WHOLE: Decisive = (("*",),)
NATIVE: Decisive = tuple(
    (key,) for key in ("format", "version", "policy", "recipe", "calibration", "linears")
)
DINO_AND_SIGLIP = r"featurizer\.(blocks\.2|norm|attn_pool)\."
# What newer tools, or another model of these classes, may say: not what is computed.
TELLING: dict[str, Telling] = {
    CONFIG: (
        *(
            (("text_config", key), value)
            for key, value in (
                ("hidden_act", "gelu"),
                ("attention_bias", True),
                ("mlp_bias", True),
                ("partial_rotary_factor", 0.5),
                ("sliding_window", 8),
                ("rope_scaling", {"type": "linear", "factor": 2.0}),
                ("rope_parameters", {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}),
                ("quantization_config", {"quant_method": "gptq", "bits": 4}),
                ("final_logit_softcapping", 30.0),
                ("model_type", "qwen2"),
                ("tie_word_embeddings", True),
            )
        ),
        (("quantization_config",), {"quant_method": "bitsandbytes", "load_in_4bit": True}),
        (("arch_specifier",), "no-align+linear"),
        (("timm_override_act_layers",), ["quick_gelu", None]),
        (("llm_backbone_id",), "phi-2-3b"),
        (("model_type",), "llava"),
    ),
    PROCESSOR: (
        (("image_resize_strategy",), "letterbox"),
        (("interpolations",), ["bilinear", "bicubic"]),
        (("input_sizes", 0), [3, 28, 28]),
        (("tvf_do_letterbox",), True),
        (("tvf_resize_params", 0, "interpolation"), 2),
        (("tvf_resize_params", 1, "antialias"), False),
        (("tvf_crop_params", 0, "output_size"), [28, 28]),
    ),
}
TIED = ("text_config", "tie_word_embeddings")  # of an output matrix, which OpenVLA-OFT does not read
TELLING_OFT = TELLING | {CONFIG: tuple(told for told in TELLING[CONFIG] if told[0] != TIED)}
ACTION_MODEL: Telling = (
    (("action_dim",), 6),
    (("future_action_window_size",), 7),
    (("past_action_window_size",), 2),
)
NEEDS: dict[str, Need] = {
    PROCESSOR: "is read where it is there",
    "proprio_projector--150000_checkpoint.pt": "is read where it is there",
    "tokenizer_config.json": "is not read",
    "generation_config.json": "is not read",
}


def _bounds(*names: str) -> Decisive:
    return tuple((DATASET, name, bound) for name in names for bound in BOUNDS)


@dataclass(frozen=True)
class Layout:
    """One on-disk format.

    Args:
        write: makes a directory of it.
        decisive: paths of what decides numbers, by the JSON file they are in.
        unused: matches the names of tensors that no policy reads.
        options: how it is loaded.
        telling: what a JSON file may say that is not what is computed.
    """

    write: Callable[[Path], object]
    decisive: dict[str, Decisive] = field(default_factory=dict)
    unused: str = "(?!)"
    options: dict[str, Any] = field(default_factory=dict)
    telling: dict[str, Telling] = field(default_factory=dict)


@dataclass(frozen=True)
class Base:
    """A valid directory and what it does."""

    layout: Layout
    directory: Path
    observation: Observation
    actions: np.ndarray
    mutations: st.SearchStrategy[Mutation]


def _write_openvla(directory: Path) -> None:
    """With ImageNet's mean in bfloat16, as published: a processor that is overlooked changes numbers."""
    write_openvla(directory)
    path = directory / PROCESSOR
    processor = json.loads(path.read_text())
    processor["tvf_normalize_params"][0]["mean"] = [0.484375, 0.455078125, 0.40625]
    path.write_text(json.dumps(processor))


def _write_single(directory: Path) -> None:
    write_openvla(directory, shards=1)
    (directory / "model.safetensors.index.json").unlink()
    (directory / "model-00001-of-00001.safetensors").rename(directory / "model.safetensors")


def _write_native(directory: Path, *, compress: bool) -> None:
    """A small policy of CogACT's kind with two cameras and a robot's state."""
    config = dataclasses.replace(family_config("diffusion"), cameras=2, proprio_dim=5)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "open": 3, "close": 4, "the": 5, "drawer": 6}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    bounds = Range((-0.5,) * 4, (0.5, 1.0, 2.0, 1.0), (True, True, True, False))
    actions, state = (Clamp(), Binarize((3,)), bounds), (Range((-1.0,) * 5, (1.0,) * 5, (True,) * 5), Clamp())
    images = tuple(cropped(stretched(vision.image_size), 0.9) for vision in config.vision)
    prompt = PromptConfig((Lower(), Template("Do: {instruction}")), append=(2,))
    about = PolicyConfig("cogact", config, CAMERAS[:2], images, actions, prompt, state)
    policy = Policy(random_model(config), about, tokenizer)
    if compress:
        recipe = dataclasses.replace(Recipe.w4a8(), pruning=Pruning())  # three layers
        policy = sqap.compress(policy, recipe, [_observe(5)])
    policy.save(directory)


ONE = {"unnorm_key": DATASET}
HF_OPENVLA: Decisive = (*HUGGING_FACE, *TOKENS, *(("norm_stats", *place) for place in _bounds("action")))
PRISMATIC = {CONFIG: (("vla", "base_vlm"),), STATISTICS: _bounds("action")}
OFT = {CONFIG: HUGGING_FACE, PROCESSOR: PROCESSING}
LIBERO, ALOHA = "libero_spatial_no_noops", "aloha1_fold_shirt_30_demos"
LAYOUTS = {
    "cogact": Layout(
        write_cogact,
        PRISMATIC,
        rf"{DINO_AND_SIGLIP}|history_embedder|lm_head|^optimizer",
        ONE,
        {CONFIG: ACTION_MODEL},
    ),
    "prismatic": Layout(partial(write_cogact, action_model=False), PRISMATIC, DINO_AND_SIGLIP, ONE),
    "openvla": Layout(
        _write_openvla, {CONFIG: HF_OPENVLA, PROCESSOR: PROCESSING}, DINO_AND_SIGLIP, ONE, TELLING
    ),
    "openvla-single": Layout(
        _write_single, {CONFIG: HF_OPENVLA, PROCESSOR: PROCESSING}, DINO_AND_SIGLIP, ONE, TELLING
    ),
    "oft": Layout(
        write_openvla_oft,
        OFT | {STATISTICS: tuple((LIBERO, n, b) for n in ("action", "proprio") for b in BOUNDS)},
        rf"{DINO_AND_SIGLIP}|lm_head",
        telling=TELLING_OFT,
    ),
    "oft-film": Layout(
        partial(write_openvla_oft, platform="aloha", film=True),
        OFT
        | {STATISTICS: tuple((ALOHA, n, b) for n in ("action", "proprio") for b in ("min", "max", "mask"))},
        rf"{DINO_AND_SIGLIP}|lm_head|^vision_backbone\.(fused_)?featurizer\.",
        telling=TELLING_OFT,
    ),
    "sqap": Layout(partial(_write_native, compress=False), {"policy.json": NATIVE}),
    "sqap-w4a8": Layout(partial(_write_native, compress=True), {"policy.json": NATIVE}),
}


def make_base(name: str, root: Path, payload: object) -> Base:
    """Write a valid directory and let its policy act once."""
    layout, directory = LAYOUTS[name], root / "valid" / name
    layout.write(directory)
    policy = sqap.load(directory, **layout.options)
    observation = _observe(policy.config.state_dim)
    return Base(
        layout,
        directory,
        observation,
        policy.act(observation, seed=0),
        weighted(*((1, _mutations(layout, directory, file, payload)) for file in _files(directory))),
    )


def _observe(state: int) -> Observation:
    random = np.random.default_rng(0)
    images = {name: random.integers(0, 256, (56, 56, 3), dtype=np.uint8) for name in CAMERAS}
    return Observation(images, "open the drawer", state=random.uniform(-0.1, 0.1, state) if state else None)


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _mutations(layout: Layout, directory: Path, file: str, payload: object) -> st.SearchStrategy[Mutation]:
    """What can happen to one file; its content is twice as likely to be at fault as the file as such."""
    path = directory / file
    if (directory / MANIFEST).is_file() and file in BESIDE:
        return file_mutations(file, "is not read")
    whole = file_mutations(file, NEEDS.get(path.name, "must be there"))
    if path.suffix == ".json":
        known = path.name != "tokenizer.json"
        decisive = layout.decisive.get(path.name, ()) if known else WHOLE
        content = json_mutations(
            file, json.loads(path.read_text()), decisive, layout.telling.get(path.name, ()), strict=known
        )
        return weighted((3, content), (1, whole))
    tensors = flatten(read(path))
    unused = re.compile(layout.unused)

    def is_used(name: str) -> bool:
        # A component of OpenVLA-OFT's has names of its own, which may look like others.
        plain = name.replace("/", ".")
        return not unused.search(plain if path.suffix != ".pt" or "--" not in file else f"--{plain}")

    content = tensor_mutations(file, tensors, is_used)
    if path.suffix == ".pt":
        return weighted((2, content), (1, pickle_mutations(file, tensors, is_used, payload)), (1, whole))
    return weighted((3, content), (1, whole))
