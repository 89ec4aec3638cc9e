"""OpenVLA's Hugging Face layout: ``config.json`` of model type ``openvla``, safetensors, a tokenizer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sqap.checkpoints import prismatic
from sqap.checkpoints.choices import Choices, choose_cameras
from sqap.checkpoints.dataset_statistics import Dataset, choose_dataset, read_range
from sqap.checkpoints.known_keys import OPENVLA, ROPE, TEXT
from sqap.checkpoints.opened import CONFIG, Opened, open_published
from sqap.checkpoints.prismatic import VLM, VOCABULARY, Encoder, Names
from sqap.checkpoints.processor import check_pixels, normalisation, read_processor
from sqap.checkpoints.robots import refuse_discrete
from sqap.checkpoints.settings import MOST, positive
from sqap.checkpoints.tensors import open_safetensors
from sqap.checkpoints.weights import Part, Source, TensorSet, copied
from sqap.config import PolicyConfig
from sqap.errors import CheckpointError
from sqap.models import DecoderConfig, TokenHeadConfig, VisionConfig
from sqap.processing import Clamp
from sqap.processing.images import Triple
from sqap.serialization import read_object

FAMILY = "OpenVLA"
MODEL_TYPE = "openvla"
CAMERAS = ("image",)
# What fine-tuning in OpenVLA-OFT's way leaves beside the model's own files.
COMPONENTS = ("action_head", "proprio_projector", "vision_backbone", "noisy_action_projector")
LANGUAGE_MODELS = ("llama2-7b-pure", "llama2-13b-pure")
NAMES = Names(
    fused=("vision_backbone.featurizer.", "vision_backbone.fused_featurizer."),
    single="vision_backbone.featurizer.",
    projector=("projector.fc1.", "projector.fc2.", "projector.fc3."),
    llm="language_model.",
    layer_scale="scale_factor",
)
MOST_LAYERS = 1 << 10


def recognise(directory: Path) -> bool:
    """Whether ``directory`` is OpenVLA's, and not one that was tuned in OpenVLA-OFT's way."""
    return is_openvla(directory) and not any(components(directory, name) for name in COMPONENTS)


def open(directory: Path, choices: Choices) -> Opened:
    """Open a directory that was recognised.

    Raises:
        CheckpointError: something is missing, damaged, does not fit or is not supported.
    """
    config = read_object(directory / CONFIG, CheckpointError)
    names = choose_cameras(choices.cameras, CAMERAS, (1,), FAMILY)
    choices.refuse(FAMILY, "bounds", "ema", "film")
    if choices.chunk is None:
        refuse_discrete(directory, config)
    prismatic.check_one_action(choices)
    where = directory / CONFIG
    dataset = read_dataset(directory, config, choices.unnorm_key)
    actions = read_range(dataset, "action")
    tensors = TensorSet(directory, [Part(file) for file in open_safetensors(directory)])
    vlm = read_vlm(directory, config, tensors)
    policy = PolicyConfig(
        family="openvla",
        model=prismatic.make_model(vlm, _head(config, vlm.decoder, actions.width, where), names),
        cameras=names,
        images=vlm.images,
        actions=(Clamp(), actions),
        prompt=prismatic.prompt(prismatic.SPACE),
    )
    table = vlm.table | {"head.lm_head.weight": _output_matrix(config, tensors, where)}
    return open_published(directory, choices, policy, VOCABULARY, tensors, table, vlm.unused)


def is_openvla(directory: Path) -> bool:
    """Whether the directory's configuration is of OpenVLA's class."""
    return read_object(directory / CONFIG, CheckpointError).get("model_type") == MODEL_TYPE


def components(directory: Path, name: str) -> list[Path]:
    """A part's files of its own, one for every training step that was kept."""
    return sorted(directory.glob(f"{name}--*checkpoint.pt"))


def read_dataset(directory: Path, config: Mapping[str, Any], key: str | None) -> Dataset:
    """The statistics to unnormalise with: fine-tuning's own file goes before those in the configuration.

    Raises:
        CheckpointError: there are none for that key.
    """
    where = directory / prismatic.STATISTICS
    if os.path.lexists(where):
        return choose_dataset(read_object(where, CheckpointError), key, where)
    return choose_dataset(config.get("norm_stats"), key, directory / CONFIG)


def read_vlm(directory: Path, config: Mapping[str, Any], tensors: TensorSet) -> VLM:
    """The vision-language model that a configuration describes.

    Raises:
        CheckpointError: the configuration is malformed or of a kind that is not supported.
    """
    where = directory / CONFIG
    OPENVLA.check(config, str(where))
    _check_parts(config, where)
    decoder = _decoder(config, tensors, where)
    vision, normalise = _vision(directory, config, tensors)
    return prismatic.describe_vlm(tensors, NAMES, vision, normalise, decoder)


def _head(config: Mapping[str, Any], decoder: DecoderConfig, actions: int, where: Path) -> TokenHeadConfig:
    padding = positive(config, "pad_to_multiple_of", prismatic.PADDING_ROWS, where)
    bins, last = positive(config, "n_action_bins", 256, where), decoder.vocabulary - padding
    if not 2 <= bins <= last:
        raise CheckpointError(
            f"{where}: {bins} n_action_bins do not go into the {last} tokens before the padding, or are "
            "less than 2"
        )
    return TokenHeadConfig(actions, decoder.vocabulary, bins, last)


def _decoder(config: Mapping[str, Any], tensors: TensorSet, where: Path) -> DecoderConfig:
    """Sizes as ``text_config`` has them, with the defaults of transformers' ``LlamaConfig``."""
    text = config.get("text_config", {})
    if not isinstance(text, dict):
        raise CheckpointError(f"{where}: text_config must be an object")
    kind, backbone = text.get("model_type", "llama"), config.get("llm_backbone_id", LANGUAGE_MODELS[0])
    if kind != "llama" or backbone not in LANGUAGE_MODELS:
        raise CheckpointError(
            f"{where}: the language model is {backbone} ({kind}); supported are {', '.join(LANGUAGE_MODELS)}"
        )
    TEXT.check(text, f"{where}: text_config")
    rows = tensors.shape(f"{NAMES.llm}model.embed_tokens.weight", 2)[0]
    width, heads = (
        positive(text, "hidden_size", 4096, where),
        positive(text, "num_attention_heads", 32, where),
    )
    kv_heads = positive(text, "num_key_value_heads", heads, where)
    head_dim = positive(text, "head_dim", max(1, width // heads), where)
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{where}: {heads} attention heads of {head_dim} channels cannot share {kv_heads} of keys "
            "and values: the channels must be even, and the heads a multiple"
        )
    return DecoderConfig(
        vocabulary=positive(text, "vocab_size", rows, where),
        width=width,
        depth=positive(text, "num_hidden_layers", 32, where, MOST_LAYERS),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=positive(text, "intermediate_size", 11008, where),
        rope_theta=_rope_theta(text, where),
        norm_eps=positive(text, "rms_norm_eps", 1e-6, where),
    )


def _rope_theta(text: Mapping[str, Any], where: Path) -> float:
    """The base of rotary positions, which transformers 5 moved into an object that may also scale them.

    Raises:
        CheckpointError: they are scaled, or it is said twice, differently.
    """
    found = positive(text, "rope_theta", 0.0, where)
    for key in ("rope_scaling", "rope_parameters"):
        rope = text.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise CheckpointError(f"{where}: text_config.{key} must be an object")
        ROPE.check(rope, f"{where}: text_config.{key}")
        theta = positive(rope, "rope_theta", found, where)
        if found not in (0.0, theta):
            raise CheckpointError(
                f"{where}: text_config has the rope_theta {found:g} and {theta:g}; leave one"
            )
        found = theta
    return found or 10_000.0


def _output_matrix(config: Mapping[str, Any], tensors: TensorSet, where: Path) -> Source:
    """The language model's, or the embedding table if that is said to be the same matrix.

    Raises:
        CheckpointError: it is said to be the same, and is not.
    """
    own, table = f"{NAMES.llm}lm_head.weight", f"{NAMES.llm}model.embed_tokens.weight"
    if config.get("text_config", {}).get("tie_word_embeddings") is not True:
        return Source((own,))
    if own not in tensors.tensors:
        return Source((table,), copied)
    if not torch.equal(*tensors.read([own, table]).values()):
        raise CheckpointError(
            f"{where}: text_config.tie_word_embeddings makes one matrix of {own} and {table}, but the "
            "weights have two that differ; set it to false if these are right"
        )
    return Source((own,))


def _vision(
    directory: Path, config: Mapping[str, Any], tensors: TensorSet
) -> tuple[list[VisionConfig], list[tuple[Triple, Triple]]]:
    """The encoders, and the mean and deviation of each one's pixels."""
    where = directory / CONFIG
    encoders, sizes = _encoders(config, where)
    processor = read_processor(directory)
    # The class's default, which transformers leaves out of the file.
    check_pixels(processor, sizes, config.get("image_resize_strategy", "letterbox"))
    normalise = normalisation(processor, [(encoder.mean, encoder.std) for encoder in encoders])
    prefixes = NAMES.vision(len(encoders))
    described = [
        prismatic.vision_config(tensors, *each) for each in zip(prefixes, encoders, sizes, strict=True)
    ]
    return described, normalise


def _check_parts(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a projector or vision encoders that compute something else than their names tell."""
    projector, functions = config.get("arch_specifier"), config.get("timm_override_act_layers")
    if projector is not None and not str(projector).endswith("gelu-mlp"):
        raise CheckpointError(
            f"{where}: arch_specifier is {projector!r}; supported are projectors that end with 'gelu-mlp'"
        )
    if functions is not None and not (isinstance(functions, list) and all(f is None for f in functions)):
        raise CheckpointError(
            f"{where}: timm_override_act_layers is {functions}; supported are the encoders' own"
        )


def _encoders(config: Mapping[str, Any], where: Path) -> tuple[list[Encoder], list[int]]:
    """The encoders, and the size of the image that each one sees."""
    backbone = prismatic.BACKBONES.get(str(config.get("vision_backbone_id")))
    ids = config.get("timm_model_ids", backbone and list(backbone.encoders))
    sizes = config.get("image_sizes", backbone and [backbone.image_size] * len(backbone.encoders))
    if (
        not isinstance(ids, list)
        or len(ids) not in (1, 2)
        or not all(isinstance(i, str) and i in prismatic.ENCODERS for i in ids)
    ):
        raise CheckpointError(
            f"{where}: the vision encoders are {ids or config.get('vision_backbone_id')}; "
            f"supported are one or two of {', '.join(prismatic.ENCODERS)}"
        )
    if (
        not isinstance(sizes, list)
        or len(sizes) != len(ids)
        or not all(type(s) is int and 0 < s <= MOST for s in sizes)
    ):
        raise CheckpointError(f"{where}: image_sizes must be {len(ids)} positive numbers, got {sizes}")
    fused = config.get("use_fused_vision_backbone")
    if fused is not None and (type(fused) is not bool or (fused and len(ids) == 1)):
        raise CheckpointError(
            f"{where}: use_fused_vision_backbone is {fused!r} with {len(ids)} vision encoder"
        )
    count = 1 if fused is False else len(ids)
    return [prismatic.ENCODERS[i] for i in ids[:count]], sizes[:count]
