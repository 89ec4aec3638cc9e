"""Hadamard rotation: outlier channels spread over all, the function unchanged (QuaRot, Ashkboos et al. 2024).

With an orthonormal H, ``W x = (W H)(Hᵀ x)``. The residual stream and the values are rotated by rewriting
the weights on both sides, for nothing at run time; only the MLP's inner activations, behind a
nonlinearity, are rotated as the model runs. Random signs before H, which keep outliers that occur together
from adding up again, go into the weights too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.kernels.hadamard import Hadamard, block_hadamard, largest_block, random_signs
from sqap.models.config import DecoderConfig
from sqap.models.decoder import Decoder, DecoderLayer, KeysValuesLayer, RMSNorm
from sqap.models.stages import stages
from sqap.models.vla import VLA

PIECE = 1 << 20  # weights that are rotated at a time, in 64 bits: two or three times 8 MB


@dataclass(frozen=True, eq=False)
class Turn:
    """An orthonormal change of basis: a row ``x`` becomes ``(x * signs) H``.

    Args:
        hadamard: H, for each of its blocks.
        signs: +1 or -1 per channel, ``(width,)`` int8.
    """

    hadamard: Hadamard
    signs: Tensor

    @classmethod
    def none(cls, width: int) -> Turn:
        """The one that changes nothing."""
        return cls(Hadamard(1), torch.ones(width, dtype=torch.int8, device="cpu"))

    def apply(self, x: Tensor) -> Tensor:
        """Rows ``(..., width)`` in the new basis, in the type of ``x``."""
        return self.hadamard.apply(x * self.signs.to(x.device))


@dataclass(frozen=True, eq=False)
class Rotation:
    """The bases of a rotated decoder, the same in all of its layers.

    Args:
        residual: of the residual stream, ``(width,)``.
        values: of all that `v_proj` returns, ``(kv_heads * head_dim,)``, each head by itself.
        mixed: of what `o_proj` reads, ``(heads * head_dim,)``: the basis of the values, once per query head.
        inner: of what `down_proj` reads, ``(mlp_width,)``.
    """

    residual: Turn
    values: Turn
    mixed: Turn
    inner: Turn

    @classmethod
    def of(cls, config: DecoderConfig, seed: int | None = None) -> Rotation:
        """The rotation of a decoder of these sizes; with a seed, every H has random signs before it."""
        widths = [config.width, config.head_dim, config.mlp_width]
        even = torch.ones(sum(widths), dtype=torch.int8, device="cpu")
        signs = even if seed is None else random_signs(sum(widths), seed)
        residual, head, inner = torch.split(signs, widths)
        per_head = Hadamard.of(config.head_dim)
        return cls(
            residual=Turn(Hadamard.of(config.width), residual),
            values=Turn(per_head, head.repeat(config.kv_heads)),
            mixed=Turn(per_head, head.repeat(config.heads)),
            inner=Turn(Hadamard(largest_block(config.mlp_width)), inner),
        )


class HadamardLinear(nn.Linear):
    """A linear whose weight expects inputs rotated by `block_hadamard`, and that rotates them itself.

    Blocks of a power of two, although `Hadamard.of` may know one matrix for the whole width, because this one
    costs time. On one AVX2 thread 280 rows of 8960 take 5.2 ms in blocks of 256 and 14.2 ms as 140 * 64, for
    4-bit rounding errors a sixth smaller where inputs are heavy-tailed; 280 rows of 1536 take 0.9 ms in
    blocks of 512 and 1.2 ms as 12 * 128, for errors a twentieth smaller.
    """

    def __init__(self, linear: nn.Linear, block: int) -> None:
        """Take over the parameters of ``linear`` as they are."""
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.block = block

    def rotate_input(self, x: Tensor) -> Tensor:
        """What the weight is multiplied by: ``(..., in)`` in the basis it expects."""
        return block_hadamard(x, self.block)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.rotate_input(x), self.weight, self.bias)


class RotatedNorm(RMSNorm):
    """The final norm on a rotated residual stream: what it returns is in the original basis again.

    Its weight is the gain times the stream's random signs, so that undoing these needs no time and no seed.
    """

    def __init__(self, norm: RMSNorm) -> None:
        """Take over the weight of ``norm`` as it is."""
        nn.Module.__init__(self)
        self.weight, self.eps = norm.weight, norm.eps
        self.hadamard = Hadamard.of(len(norm.weight))

    def forward(self, x: Tensor) -> Tensor:
        wide = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)  # rotation leaves the mean square alone
        return self.hadamard.inverse(wide).to(x.dtype) * self.weight


def is_rotated(model: nn.Module) -> bool:
    """Whether the residual stream of the decoder that ``model`` is, or has, is rotated."""
    return any(isinstance(module, RotatedNorm) for module in model.modules())


def prepare_rotated(model: VLA | Decoder) -> None:
    """Give ``model`` the modules of a rotated one and leave the weights alone, as before loading them.

    Raises:
        InputError: the model is already rotated, or already quantized.
    """
    decoder = _rotatable(model)
    for layer in decoder.layers:
        _prepare_layer(layer)
    decoder.norm = RotatedNorm(decoder.norm)


def rotate_decoder(model: VLA | Decoder, seed: int | None = None) -> None:
    """Rotate a decoder's activations in place; hidden states and actions stay what they were.

    The gains of the norms go into the linears behind them; the residual stream is rotated at all that
    writes to it (embeddings, projector, o, down) and reads from it (q, k, v, gate, up); values are rotated
    per head and o undoes it; down rotates its own input.

    Args:
        model: a policy, or a decoder alone, whose input is then to be embedded by its own table. A language
            model's output matrix reads the original basis; where it is tied to the table, untie it first.
        seed: of random signs before the Hadamard matrices; None for none.

    Raises:
        InputError: the model is already rotated, or already quantized.
    """
    decoder = _rotatable(model)
    rotation = Rotation.of(decoder.config, seed)
    rotate_input(decoder.embed_tokens, model.proprio if isinstance(model, VLA) else None, rotation)
    for stage in dict(stages(model)).values() if isinstance(model, VLA) else decoder.layers:
        rotate_stage(stage, rotation)
    decoder.norm = rotate_norm(decoder.norm, rotation)


@torch.no_grad()
def rotate_input(table: nn.Embedding, proprio: nn.Module | None, rotation: Rotation) -> None:
    """Rotate in place what a decoder reads beside the image: its embeddings, and the robot's state."""
    _turn(table.weight, inputs=rotation.residual)
    if proprio is not None:
        rotate_edges(proprio, rotation)


def rotate_stage(stage: nn.Module, rotation: Rotation, done: set[nn.Module] | None = None) -> None:
    """Rotate in place what the linears of a stage read and write.

    Args:
        stage: a stage of the model, or a part of one.
        rotation: the decoder's.
        done: modules that are left out because they are rotated already; those of ``stage`` are added.

    Raises:
        InputError: it is a decoder layer that is already rotated, or already quantized.
    """
    if isinstance(stage, DecoderLayer | KeysValuesLayer):
        _prepare_layer(stage)
    done = set() if done is None else done
    for module in stage.modules():
        if module not in done:
            rotate_edges(module, rotation)
    done.update(stage.modules())


@torch.no_grad()
def rotate_edges(module: nn.Module, rotation: Rotation) -> None:
    """Rewrite the linears that a module lists as its edges (`sqap.models.edges`), in place.

    They read and write rotated activations then. The gains of norms before them become 1.
    """
    read = {name: getattr(rotation, name) for name in ("residual", "values", "mixed", "inner")}
    # The MLP's inner activations get signs alone: `HadamardLinear` does the rest as the model runs.
    written = {**read, "inner": replace(rotation.inner, hadamard=Hadamard(1))}
    edges = getattr(module, "edges", ())
    norms = {edge.norm: cast(Tensor, module.get_submodule(edge.norm).weight) for edge in edges if edge.norm}
    for edge in edges:
        linear, gain = cast(nn.Linear, module.get_submodule(edge.linear)), norms.get(edge.norm)
        _rewrite(linear, gain=gain, inputs=read.get(edge.reads), outputs=written.get(edge.writes))
    for gain in norms.values():
        gain.fill_(1)


@torch.no_grad()
def rotate_norm(norm: RMSNorm, rotation: Rotation) -> RotatedNorm:
    """The final norm for a rotated stream; ``norm`` is left as it is."""
    rotated = RotatedNorm(norm)
    rotated.weight = nn.Parameter(norm.weight * rotation.residual.signs.to(norm.weight.device))
    return rotated


def _rewrite(
    linear: nn.Linear, *, gain: Tensor | None = None, inputs: Turn | None = None, outputs: Turn | None = None
) -> None:
    """Let ``linear`` read behind a norm that has lost its ``gain``, and read and write in new bases."""
    _turn(linear.weight, gain=gain, inputs=inputs, outputs=outputs)
    if linear.bias is not None and outputs is not None:
        linear.bias.copy_(outputs.apply(linear.bias.double()))


def _turn(
    weight: Tensor, *, gain: Tensor | None = None, inputs: Turn | None = None, outputs: Turn | None = None
) -> None:
    """``W`` becomes ``Rᵀ W diag(gain) T`` for turns R of outputs and T of inputs, rounded only once."""
    inputs, outputs = inputs or Turn.none(weight.shape[1]), outputs or Turn.none(weight.shape[0])
    scale = inputs.signs.to(weight.device) * (1 if gain is None else gain.double())
    signs = outputs.signs.to(weight.device)[:, None]
    for rows, columns in _pieces(weight, outputs.hadamard.block, inputs.hadamard.block):
        piece = weight[rows, columns].double() * signs[rows] * scale[columns]
        weight[rows, columns] = outputs.hadamard.apply(inputs.hadamard.apply(piece).T).T


def _pieces(weight: Tensor, output_block: int, input_block: int) -> Iterator[tuple[slice, slice]]:
    """Stripes of whole rows or columns that turn by themselves, about `PIECE` weights each."""
    rows, columns = weight.shape
    if output_block <= input_block:
        step = max(1, PIECE // (columns * output_block)) * output_block
        return ((slice(i, i + step), slice(None)) for i in range(0, rows, step))
    step = max(1, PIECE // (rows * input_block)) * input_block
    return ((slice(None), slice(i, i + step)) for i in range(0, columns, step))


def _rotatable(model: VLA | Decoder) -> Decoder:
    """The decoder of ``model``, after a look at all of it: a refused model is left as it is."""
    decoder = model.decoder if isinstance(model, VLA) else model
    for layer in decoder.layers:
        _check_layer(layer)
    return decoder


def _prepare_layer(layer: nn.Module) -> None:
    _check_layer(layer)
    if isinstance(layer, DecoderLayer):
        down = layer.mlp.down_proj
        layer.mlp.down_proj = HadamardLinear(down, largest_block(down.in_features))


def _check_layer(layer: nn.Module) -> None:
    for name, module in layer.named_modules():
        if isinstance(module, HadamardLinear):
            raise InputError("the model is already rotated")
        if name.endswith("_proj") and not isinstance(module, nn.Linear):
            raise InputError("the decoder is already quantized; rotation comes first")
