"""One evaluation of a flow head's velocity: what it is computed from, and the way through the layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor

from sqap.models.heads.expert import ExpertCache, ExpertLayer, KeysValues, Rope, normalized
from sqap.models.layout import Layout


@dataclass(frozen=True)
class FlowInputs:
    """The inputs of a flow head.

    Args:
        prefix: keys and values of the decoder's layers, in the expert's type.
        noise: ``(batch, horizon, action_dim)``.
        layout: of all tokens, before any were pruned.
        state: normalised ``(batch, proprio_dim)``, if it is a token of the expert's.
    """

    prefix: list[KeysValues]
    noise: Tensor
    layout: Layout
    state: Tensor | None = None


@dataclass(frozen=True)
class Condition:
    """What the expert is conditioned on at one denoising time.

    Args:
        time: ``(width,)``, the time's input to the MLP of action and time; None with adaptive norms.
        modulations: ``(3 * width,)`` of each adaptive norm, those of the layers first; empty without any.
    """

    time: Tensor | None = None
    modulations: Sequence[Tensor] = ()

    def of_layer(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        """The modulations of the two norms of layer ``i``."""
        return (self.modulations[2 * i], self.modulations[2 * i + 1]) if self.modulations else (None, None)

    @property
    def of_final_norm(self) -> Tensor | None:
        """The modulation of the norm behind the last layer."""
        return self.modulations[-1] if self.modulations else None


@dataclass(frozen=True)
class Surroundings:
    """What some of the expert's tokens attend to.

    Args:
        caches: keys and values of each layer.
        masks: ``(tokens, cached tokens)`` of each layer, true where a token sees another; None: it sees all.
        ropes: rotary positions of the tokens behind the prefix, and from 0 on (for cross-attention).
    """

    caches: Sequence[ExpertCache]
    masks: Sequence[Tensor | None]
    ropes: tuple[Rope, Rope]


@dataclass(frozen=True)
class Suffix:
    """Some of the expert's tokens, behind the decoder's.

    Args:
        mask: ``(tokens, tokens)``, true where one sees another; None: all see all.
        ropes: as in `Surroundings`.
    """

    mask: Tensor | None
    ropes: tuple[Rope, Rope]

    def behind(self, caches: Sequence[ExpertCache]) -> Surroundings:
        """The tokens behind these prefixes, all of whose tokens they see."""
        mask = self.mask
        masks = (
            {} if mask is None else {n: F.pad(mask, (n, 0), value=True) for n in {c.length for c in caches}}
        )
        return Surroundings(caches, [masks.get(cache.length) for cache in caches], self.ropes)


@dataclass(frozen=True)
class ExpertPass:
    """One evaluation of the velocity, on its way through the expert's layers.

    Args:
        hidden: ``(batch, tokens, width)`` of the expert's tokens.
        inputs: what it is computed from.
        x: ``(batch, horizon, action_dim)``, at which it is computed.
        condition: of its time.
        suffix: the expert's tokens.
        layer: the layer to run next.
    """

    hidden: Tensor
    inputs: FlowInputs
    x: Tensor
    condition: Condition
    suffix: Suffix
    layer: int = 0

    @property
    def actions(self) -> slice:
        """Where the actions are among the expert's tokens."""
        return slice(self.hidden.shape[1] - self.x.shape[1], None)

    def advance(self, layer: ExpertLayer, prefix: KeysValues | None = None) -> ExpertPass:
        """Behind the next layer; ``prefix`` are the decoder's keys and values, by default `inputs`'."""
        prefix = self.inputs.prefix[self.layer] if prefix is None else prefix
        around = self.suffix.behind([layer.self_attn.cache(prefix, self.hidden.shape[1])])
        modulations = self.condition.of_layer(self.layer)
        hidden = layer(self.hidden, around.caches[0], around.ropes, around.masks[0], modulations)
        return replace(self, hidden=hidden, layer=self.layer + 1)

    def received(self, i: int, layer: ExpertLayer, keys: Tensor) -> Tensor:
        """Attention ``(batch, tokens)`` that actions would pay in layer ``i``, were `hidden` its input.

        ``keys`` ``(batch, kv_heads, tokens, head_dim)`` are those of the decoder's layer at the same depth.
        """
        cos, sin = self.suffix.ropes[int(layer.self_attn.cross)]
        x = normalized(layer.input_layernorm, self.hidden, self.condition.of_layer(i)[0])[:, self.actions]
        return layer.self_attn.received(x, keys.to(x), (cos[:, self.actions], sin[:, self.actions]))
