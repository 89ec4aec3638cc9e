"""Every key of a published configuration that sqap knows, in one place.

A key is read, or it has one value that is what sqap computes and is refused with any other, or it changes no
number. Other keys come from newer tools: where they are set to anything, they are logged by name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqap.checkpoints.tensors import shorten
from sqap.errors import CheckpointError

logger = logging.getLogger("sqap")


@dataclass(frozen=True)
class Keys:
    """What is known of the keys of one object.

    Args:
        read: those that something reads and checks.
        fixed: those whose values must be among the given ones, which mean what sqap computes.
        idle: those that change no number at inference.
        strict: whether others are refused, and not only logged.
    """

    read: frozenset[str]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    idle: frozenset[str] = frozenset()
    strict: bool = False

    def check(self, config: Mapping[str, Any], where: str) -> None:
        """Refuse what sqap does not compute, and log what is not known.

        Raises:
            CheckpointError: a key has another value, or is unknown and the object strict.
        """
        for key, allowed in self.fixed.items():
            value = config.get(key)
            if value is not None and value not in allowed:
                supported = " or ".join(map(repr, allowed)) if allowed else "none"
                raise CheckpointError(f"{where}: {key} is {value!r}; supported is {supported}")
        unknown = [
            key
            for key, value in config.items()
            if key not in self.read | self.idle | self.fixed.keys() and value not in (None, False, {}, [])
        ]
        if unknown and self.strict:
            raise CheckpointError(f"{where}: {shorten(unknown)} is not supported")
        if unknown:
            logger.warning(
                "%s: sqap does not know %s, and goes on as if it changed nothing", where, shorten(unknown)
            )


def _words(*lines: str) -> frozenset[str]:
    return frozenset(" ".join(lines).split())


# What transformers' PretrainedConfig writes of any model; generation is greedy whatever it says.
_ANY_MODEL = _words(
    "_name_or_path _attn_implementation _attn_implementation_autoset _commit_hash architectures auto_map",
    "attn_implementation bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id",
    "torch_dtype dtype transformers_version use_cache return_dict return_dict_in_generate output_scores",
    "output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss chunk_size_feed_forward",
    "is_decoder add_cross_attention cross_attention_hidden_size tie_encoder_decoder decoder_start_token_id",
    "max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature",
    "top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size bad_words_ids",
    "encoder_no_repeat_ngram_size num_return_sequences forced_bos_token_id forced_eos_token_id",
    "remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens",
    "finetuning_task id2label label2id problem_type task_specific_params tokenizer_class prefix",
)
_UNQUANTIZED: dict[str, tuple[Any, ...]] = {"quantization_config": (), "pruned_heads": ({},)}
TEXT = Keys(
    read=_words(
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads",
        "num_key_value_heads head_dim rms_norm_eps rope_theta rope_scaling rope_parameters",
        "tie_word_embeddings",
    ),
    fixed=_UNQUANTIZED
    | {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "partial_rotary_factor": (1.0,),
        "sliding_window": (),
        "use_sliding_window": (False,),
        "is_encoder_decoder": (False,),
        "attn_logit_softcapping": (),
        "final_logit_softcapping": (),
        "embedding_multiplier": (1.0,),
        "attention_multiplier": (),
        "residual_multiplier": (1.0,),
        "logits_scaling": (1.0,),
        "use_qk_norm": (False,),
    },
    # Slices of a product add up to it: pretraining_tp is how it is computed, not what.
    idle=_ANY_MODEL
    | _words("attention_dropout initializer_range max_position_embeddings pretraining_tp max_window_layers"),
)
ROPE = Keys(
    read=_words("rope_theta"),
    fixed={"rope_type": ("default",), "type": ("default",), "partial_rotary_factor": (1.0,)},
    strict=True,
)
OPENVLA = Keys(
    read=_words(
        "model_type text_config vision_backbone_id timm_model_ids image_sizes image_resize_strategy",
        "use_fused_vision_backbone timm_override_act_layers arch_specifier llm_backbone_id norm_stats",
        "n_action_bins pad_to_multiple_of use_film",
    ),
    fixed=_UNQUANTIZED | {"is_encoder_decoder": (False,)},
    # Which matrices the language model shares is its own configuration's to say.
    idle=_ANY_MODEL | _words("hf_llm_id llm_max_length output_projector_states tie_word_embeddings"),
)
PROCESSOR = Keys(
    read=_words(
        "image_resize_strategy input_sizes interpolations means stds tvf_resize_params tvf_crop_params",
        "tvf_normalize_params use_fused_vision_backbone",
    ),
    fixed={"tvf_do_letterbox": (False,)},
    idle=_words(
        "auto_map image_processor_type feature_extractor_type processor_class _processor_class",
        "tvf_letterbox_fill",
    ),
)
RESIZE = Keys(
    read=_words("size"),
    # As PIL's numbers, and as torchvision's names.
    fixed={"interpolation": (3, "bicubic"), "antialias": (True,), "max_size": ()},
)
# What LeRobot writes of any policy.
_LEROBOT_READ = _words(
    "type input_features output_features normalization_mapping chunk_size n_action_steps max_state_dim",
    "max_action_dim min_period max_period tokenizer_max_length use_peft",
)
_LEROBOT_FIXED: dict[str, tuple[Any, ...]] = {"n_obs_steps": (1,)}
# Training, and how it is run; empty cameras are pictures that nothing reads, and real-time chunking changes a
# chunk only by the one before it.
_LEROBOT_IDLE = _words(
    "device use_amp push_to_hub repo_id private tags license pretrained_path pretrained_revision rtc_config",
    "compile_model compile_mode empty_cameras freeze_vision_encoder train_expert_only gradient_checkpointing",
    "optimizer_lr optimizer_betas optimizer_eps optimizer_weight_decay optimizer_grad_clip_norm",
    "scheduler_warmup_steps scheduler_decay_steps scheduler_decay_lr",
)
SMOLVLA = Keys(
    read=_LEROBOT_READ
    | _words(
        "resize_imgs_with_padding num_steps vlm_model_name attention_mode num_vlm_layers num_expert_layers",
        "self_attn_every_n_layers",
    ),
    fixed=_LEROBOT_FIXED
    | {
        "add_image_special_tokens": (False,),
        "adapt_to_pi_aloha": (False,),
        "use_delta_joint_actions_aloha": (False,),
    },
    # Padding of the prompt and the prefix is masked, and what is masked takes no position.
    idle=_LEROBOT_IDLE
    | _words(
        "use_cache train_state_proj load_vlm_weights prefix_length pad_language_to expert_width_multiplier"
    ),
)
# openpi's conversion to PyTorch: sizes that the tensors tell, and what was computed in.
OPENPI = Keys(
    read=_words("action_dim action_horizon"),
    idle=_words("paligemma_variant action_expert_variant precision dtype pi05 max_token_len"),
)
PI = Keys(
    read=_LEROBOT_READ
    | _words(
        "image_resolution num_inference_steps use_relative_actions relative_exclude_joints",
        "action_feature_names",
    ),
    fixed=_LEROBOT_FIXED,
    # What it is computed in, and which sizes the tensors have, these tell.
    idle=_LEROBOT_IDLE
    | _words(
        "paligemma_variant action_expert_variant dtype time_sampling_beta_alpha time_sampling_beta_beta",
        "time_sampling_scale time_sampling_offset",
    ),
)
