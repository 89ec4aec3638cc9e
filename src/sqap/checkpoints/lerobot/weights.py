"""``model.safetensors`` of LeRobot's policies under one set of names, and layers that all have."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from sqap.checkpoints.lerobot.normalizers import INSIDE
from sqap.checkpoints.prismatic import LAYER
from sqap.checkpoints.tensors import open_safetensors
from sqap.checkpoints.weights import Part, Source, Table, TensorSet, same, stacked
from sqap.errors import CheckpointError
from sqap.models import DecoderConfig, ModelConfig, VisionConfig, empty_model

MODEL, COMPILED = "model.", "_orig_mod."
# Statistics of old checkpoints, and the output matrices of language models, which actions do not need.
UNUSED = (*(f"{prefix}*" for prefix in INSIDE), "*lm_head.weight")
BLOCK = {
    "norm1.": "layer_norm1.",
    "attn.proj.": "self_attn.out_proj.",
    "norm2.": "layer_norm2.",
    "mlp.fc1.": "mlp.fc1.",
    "mlp.fc2.": "mlp.fc2.",
}
NORMS = ("layernorm.weight", "norm.weight")


def open_weights(directory: Path) -> TensorSet:
    """The tensors of a directory; each is called ``model.<...>``, as LeRobot saves it now.

    Raises:
        CheckpointError: there are none, or two come to have one name.
    """
    return TensorSet(directory, [Part(file, rename=plain_name) for file in open_safetensors(directory)])


def plain_name(name: str) -> str:
    """A tensor's name without what compiling puts into it, and with the prefix that converters leave out."""
    name = name.replace(COMPILED, "")
    return name if name.startswith((MODEL, *INSIDE)) else MODEL + name


def read_vision(tensors: TensorSet, prefix: str, head_dim: int | None = None, heads: int = 1) -> VisionConfig:
    """The sizes of a SigLIP encoder by its tensors' shapes.

    Args:
        tensors: the checkpoint.
        prefix: of the encoder's names.
        head_dim: channels of a head, by which they are counted; None if there are always ``heads``.
        heads: how many there are otherwise.

    Raises:
        CheckpointError: the tensors that tell them are missing, or there is no square of patches.
    """
    width, _, _, patch = tensors.shape(f"{prefix}embeddings.patch_embedding.weight", 4)
    patches = tensors.shape(f"{prefix}embeddings.position_embedding.weight", 2)[0]
    grid = math.isqrt(patches)
    heads = heads if head_dim is None else width // head_dim
    if grid**2 != patches or not heads or width % heads:
        raise CheckpointError(
            f"{tensors.where}: a vision encoder of {patches} patches and {width} channels is not supported: "
            "patches must be a square, and heads share the channels evenly"
        )
    return VisionConfig(
        image_size=grid * patch,
        patch_size=patch,
        width=width,
        depth=tensors.count(f"{prefix}encoder.layers."),
        heads=heads,
        mlp_width=tensors.shape(f"{prefix}encoder.layers.0.mlp.fc1.weight", 2)[0],
        activation="gelu_tanh",
    )


def vision_table(config: VisionConfig, ours: str, theirs: str) -> Table:
    """Where a SigLIP encoder's parameters come from, in transformers' names."""
    names = {
        "patch_embed.weight": "embeddings.patch_embedding.weight",
        "patch_embed.bias": "embeddings.patch_embedding.bias",
        "pos_embed": "embeddings.position_embedding.weight",
        "norm.weight": "post_layernorm.weight",
        "norm.bias": "post_layernorm.bias",
    }
    table = {ours + name: Source((theirs + source,)) for name, source in names.items()}
    for i in range(config.depth):
        block, layer = f"{ours}blocks.{i}.", f"{theirs}encoder.layers.{i}."
        for kind in ("weight", "bias"):
            qkv = tuple(f"{layer}self_attn.{which}_proj.{kind}" for which in "qkv")
            table[f"{block}attn.qkv.{kind}"] = Source(qkv, stacked)
            table |= {f"{block}{mine}{kind}": Source((f"{layer}{its}{kind}",)) for mine, its in BLOCK.items()}
    return table


def layers_table(
    depth: int,
    ours: str,
    theirs: str,
    gain: Callable[[Tensor], Tensor] = same,
    names: tuple[str, ...] = LAYER,
) -> Table:
    """Where the parameters of Llama's layers come from; a norm's gain is ``gain`` of what is on disk."""
    return {
        f"{ours}layers.{i}.{name}": Source(
            (f"{theirs}layers.{i}.{name}",), gain if name.endswith(NORMS) else same
        )
        for i in range(depth)
        for name in names
    }


def table_name(tensors: TensorSet, name: str, tied: str) -> str:
    """Where the embedding table is: in the output matrix, if both were one tensor, saved under that name."""
    return tied if name not in tensors.tensors and tied in tensors.tensors else name


def embedding(tensors: TensorSet, name: str, tied: str) -> Source:
    """The embedding table's source, which is where `table_name` says."""
    return Source((table_name(tensors, name, tied),))


def check_depth(tensors: TensorSet, layers: str, decoder: DecoderConfig) -> None:
    """Refuse an action expert whose ``layers`` are not as many as the decoder's.

    Raises:
        CheckpointError: they are fewer or more, or there are none.
    """
    found = tensors.count(layers)
    if found != decoder.depth:
        raise CheckpointError(
            f"{tensors.where}: the action expert has {found} layers, and the language model {decoder.depth}; "
            "supported are as many"
        )


def read_by(model: ModelConfig, table: Table) -> tuple[Table, tuple[str, ...]]:
    """Those of a table's entries that a model has parameters for, and the tensors that only others read.

    Nothing reads the language model's last hidden states, so that the model has not all of its last layer.
    """
    parameters = empty_model(model).state_dict()
    kept = {name: source for name, source in table.items() if name in parameters}
    read = {name for source in kept.values() for name in source.names}
    return kept, tuple(n for source in table.values() for n in source.names if n not in read)
