"""Every tensor of a published checkpoint, name to shape, from its sizes: the layouts as data.

The lists are upstream's, down to what no policy ever reads: the last block and final norm of each vision
encoder, SigLIP's attention pooling, CogACT's history embedder. ``tests/fixtures/published-keys.json`` holds
what the authors' own classes say for `TINY`.
"""

from __future__ import annotations

from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]

VOCABULARY = 32_064
PATCH = 14
REGISTERS = 4
SIGLIP_MLP_RATIO = 3.7362


@dataclass(frozen=True)
class Sizes:
    """What of OpenVLA's architecture may be smaller than published; both vision encoders have 16 heads.

    ``decoder_heads`` is what OpenVLA's configuration states; CogACT's decoder has one per 128 channels, as
    Llama 2 has.
    """

    image: int
    dino_width: int
    dino_depth: int
    siglip_width: int
    siglip_depth: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    decoder_mlp: int
    dit_width: int
    dit_depth: int
    lora_rank: int = 32

    @property
    def patches(self) -> int:
        return (self.image // PATCH) ** 2


TINY = Sizes(
    image=56,
    dino_width=48,
    dino_depth=3,
    siglip_width=64,
    siglip_depth=3,
    decoder_width=128,
    decoder_depth=3,
    decoder_heads=4,
    decoder_mlp=192,
    dit_width=128,
    dit_depth=2,
)
FULL = Sizes(
    image=224,
    dino_width=1024,
    dino_depth=24,
    siglip_width=1152,
    siglip_depth=27,
    decoder_width=4096,
    decoder_depth=32,
    decoder_heads=32,
    decoder_mlp=11_008,
    dit_width=768,
    dit_depth=12,
)


def openvla(sizes: Sizes) -> Shapes:
    """The Hugging Face layout."""
    return (
        _dino("vision_backbone.featurizer.", sizes, "scale_factor")
        | _siglip("vision_backbone.fused_featurizer.", sizes)
        | _projector(["projector.fc1", "projector.fc2", "projector.fc3"], sizes)
        | _llama("language_model.", sizes)
    )


def prismatic(sizes: Sizes) -> dict[str, Shapes]:
    """The three parts of a native checkpoint."""
    return {
        "vision_backbone": _dino("dino_featurizer.", sizes, "gamma") | _siglip("siglip_featurizer.", sizes),
        "llm_backbone": _llama("llm.", sizes),
        "projector": _projector(["projector.0", "projector.2", "projector.4"], sizes),
    }


def action_model(sizes: Sizes, action_dim: int, horizon: int) -> Shapes:
    """CogACT's diffusion transformer."""
    width = sizes.dit_width
    shapes: Shapes = {"net.positional_embedding": (horizon + 1, width)}
    shapes |= _linear("net.history_embedder.linear", action_dim, width)
    shapes |= _linear("net.x_embedder.linear", action_dim, width)
    shapes |= _linear("net.t_embedder.mlp.0", 256, width)
    shapes |= _linear("net.t_embedder.mlp.2", width, width)
    shapes |= {"net.z_embedder.uncondition": (1, sizes.decoder_width)}
    shapes |= _linear("net.z_embedder.linear", sizes.decoder_width, width)
    for i in range(sizes.dit_depth):
        shapes |= _attention_and_mlp(f"net.blocks.{i}.", width, 4 * width)
    return shapes | _linear("net.final_layer.linear", width, action_dim)


def regression_head(sizes: Sizes, action_dim: int) -> Shapes:
    """OpenVLA-OFT's L1 head, which reads all of an action's tokens side by side."""
    width = sizes.decoder_width
    shapes = _norm("model.layer_norm1", action_dim * width)
    shapes |= _linear("model.fc1", action_dim * width, width)
    for i in range(2):
        shapes |= _norm(f"model.mlp_resnet_blocks.{i}.ffn.0", width)
        shapes |= _linear(f"model.mlp_resnet_blocks.{i}.ffn.1", width, width)
    return shapes | _norm("model.layer_norm2", width) | _linear("model.fc2", width, action_dim)


def proprio_projector(sizes: Sizes, proprio_dim: int) -> Shapes:
    """OpenVLA-OFT's projector of the robot's own state."""
    width = sizes.decoder_width
    return _linear("fc1", proprio_dim, width) | _linear("fc2", width, width)


def film_backbone(sizes: Sizes) -> Shapes:
    """OpenVLA-OFT's vision backbone with FiLM, its adapters not merged.

    peft wraps every module whose last name is that of some linear, so the patch convolutions (``proj``) too.
    """
    plain = _dino("vision_backbone.featurizer.", sizes, "scale_factor")
    plain |= _siglip("vision_backbone.fused_featurizer.", sizes)
    shapes: Shapes = {}
    for name, shape in plain.items():
        tower, blocks, rest = name.partition(".blocks.")
        if blocks:
            index, _, inner = rest.partition(".")
            name = f"{tower}.blocks.{index}.block.{inner}"
        module, _, leaf = name.rpartition(".")
        if not module.endswith((".proj", ".qkv", ".fc1", ".fc2", ".q", ".kv")):
            shapes[name] = shape
            continue
        shapes[f"{module}.base_layer.{leaf}"] = shape
        if leaf == "weight":
            kernel = (1,) * (len(shape) - 2)
            shapes[f"{module}.lora_A.default.weight"] = (sizes.lora_rank, *shape[1:])
            shapes[f"{module}.lora_B.default.weight"] = (shape[0], sizes.lora_rank, *kernel)
    for tower, width, depth in (
        ("featurizer", sizes.dino_width, sizes.dino_depth),
        ("fused_featurizer", sizes.siglip_width, sizes.siglip_depth),
    ):
        for i in range(depth):
            for part in ("scale", "shift"):
                prefix = f"vision_backbone.{tower}.blocks.{i}.{part}"
                shapes |= _linear(prefix, sizes.decoder_width, width)
    return shapes


def _dino(prefix: str, sizes: Sizes, layer_scale: str) -> Shapes:
    width, depth = sizes.dino_width, sizes.dino_depth
    shapes: Shapes = {f"{prefix}cls_token": (1, 1, width), f"{prefix}reg_token": (1, REGISTERS, width)}
    shapes |= _tower(prefix, sizes, width, depth, 4 * width)
    gains = (f"{prefix}blocks.{i}.{name}.{layer_scale}" for i in range(depth) for name in ("ls1", "ls2"))
    return shapes | dict.fromkeys(gains, (width,))


def _siglip(prefix: str, sizes: Sizes) -> Shapes:
    width = sizes.siglip_width
    hidden = int(width * SIGLIP_MLP_RATIO)
    shapes = _tower(prefix, sizes, width, sizes.siglip_depth, hidden)
    pool = f"{prefix}attn_pool."
    shapes |= {f"{pool}latent": (1, 1, width)}
    shapes |= _linear(f"{pool}q", width, width) | _linear(f"{pool}kv", width, 2 * width)
    shapes |= _linear(f"{pool}proj", width, width) | _norm(f"{pool}norm", width)
    return shapes | _linear(f"{pool}mlp.fc1", width, hidden) | _linear(f"{pool}mlp.fc2", hidden, width)


def _tower(prefix: str, sizes: Sizes, width: int, depth: int, hidden: int) -> Shapes:
    """What timm's encoders have in common."""
    shapes: Shapes = {
        f"{prefix}pos_embed": (1, sizes.patches, width),
        f"{prefix}patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        f"{prefix}patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        block = f"{prefix}blocks.{i}."
        shapes |= _norm(f"{block}norm1", width) | _norm(f"{block}norm2", width)
        shapes |= _attention_and_mlp(block, width, hidden)
    return shapes | _norm(f"{prefix}norm", width)


def _projector(names: list[str], sizes: Sizes) -> Shapes:
    vision = sizes.dino_width + sizes.siglip_width
    widths = (vision, 4 * vision, sizes.decoder_width, sizes.decoder_width)
    shapes: Shapes = {}
    for i, name in enumerate(names):
        shapes |= _linear(name, widths[i], widths[i + 1])
    return shapes


def _llama(prefix: str, sizes: Sizes) -> Shapes:
    width = sizes.decoder_width
    layers = llama(f"{prefix}model.", width, sizes.decoder_depth, sizes.decoder_mlp, width, width)
    table = {f"{prefix}model.embed_tokens.weight": (VOCABULARY, width)}
    return table | layers | {f"{prefix}lm_head.weight": (VOCABULARY, width)}


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


def _attention_and_mlp(prefix: str, width: int, hidden: int) -> Shapes:
    return (
        _linear(f"{prefix}attn.qkv", width, 3 * width)
        | _linear(f"{prefix}attn.proj", width, width)
        | _linear(f"{prefix}mlp.fc1", width, hidden)
        | _linear(f"{prefix}mlp.fc2", hidden, width)
    )


def _linear(prefix: str, inputs: int, outputs: int) -> Shapes:
    return {f"{prefix}.weight": (outputs, inputs), f"{prefix}.bias": (outputs,)}


def _norm(prefix: str, width: int) -> Shapes:
    return {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}
