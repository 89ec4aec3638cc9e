"""A policy whose networks other tools run: each is exported, the rest of the step stays as it is.

The networks are the vision encoders, the projector, the decoder's layers and the blocks of a diffusion head.
They are exported one by one, so that a policy larger than memory in 32 bits can be, and with the shapes that
a step gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from sqap.errors import SqapError
from sqap.models.decoder import DecoderLayer
from sqap.policy import Policy

Arrays = Sequence[np.ndarray]
Network = Callable[[Arrays], np.ndarray]
# Of a network and an example of its inputs: what runs it, and the bytes of its weights.
Tool = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Network, int]]


class Elsewhere(nn.Module):
    """What another tool computes, with ``nbytes`` of weights of its own."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes

    def peak_bytes(self) -> int:
        """The largest resident set of the process that computes, where that is another; 0 where it is not."""
        return 0


class Exported(Elsewhere):
    """Stands where the network stood."""

    def __init__(self, network: Network, nbytes: int) -> None:
        super().__init__(nbytes)
        self._network = network

    def forward(self, *inputs: Tensor | None) -> Tensor:
        return torch.from_numpy(self._network([x.contiguous().numpy() for x in inputs if x is not None]))


class _ExportedLayer(nn.Module):
    """Stands where a decoder layer stood."""

    def __init__(self, exported: Exported) -> None:
        super().__init__()
        self.exported = exported

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], layer: int, cache: None, rows: None, first: int
    ) -> tuple[Tensor, None]:
        return self.exported(x, *rope)[:, first:], None


class _Whole(nn.Module):
    """A vision encoder as one network."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixels: Tensor, language: Tensor | None = None) -> Tensor:
        out: Tensor = self.encoder(pixels, language)
        return out


class _Layer(nn.Module):
    """A decoder layer as a function of tensors alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        out: Tensor = self.layer(x, (cos, sin))[0]
        return out


def export(
    policy: Policy, tool: Tool, dense: Callable[[nn.Module], object], step: Callable[[Policy], Any]
) -> Policy:
    """The policy with its networks in the hands of ``tool``, nothing pruned.

    Args:
        policy: compressed; it is used up.
        tool: exports one network.
        dense: turns a network's packed linears into float32 ones, in place.
        step: lets the policy act, so that the networks' inputs can be seen.

    Raises:
        SqapError: its head reads the decoder's keys and values.
    """
    model = policy.model
    if model.head.reads_keys_values:
        raise SqapError("a decoder that keeps keys and values for its head is not exported")
    policy = Policy(model, policy.config, policy.tokenizer)
    owners: list[tuple[nn.Module, str]] = [(model, "projector")]
    for parts in (model.vision, model.decoder.layers):
        owners += [(parts, str(i)) for i in range(len(parts))]
    if model.head.chain:
        blocks = cast(nn.ModuleList, getattr(model.head, model.head.chain))
        together = nn.ModuleList([nn.Sequential(*blocks)])
        setattr(model.head, model.head.chain, together)
        owners.append((together, "0"))
    for i, encoder in enumerate(model.vision):
        model.vision[i] = _Whole(encoder)
    networks = [owner.get_submodule(name) for owner, name in owners]
    examples = _inputs(networks, lambda: step(policy))
    for (owner, name), network in zip(owners, networks, strict=True):
        dense(network)
        example = examples.pop(network)
        if isinstance(network, DecoderLayer):
            setattr(owner, name, _ExportedLayer(Exported(*tool(_Layer(network), (example[0], *example[1])))))
        else:
            tensors = tuple(x for x in example if x is not None)
            setattr(owner, name, Exported(*tool(network, tensors)))
        network.to("meta")  # what it was exported from is not needed any more
    dense(model)
    return policy


def _inputs(networks: Sequence[nn.Module], run: Callable[[], Any]) -> dict[nn.Module, tuple[Any, ...]]:
    """What each network is given first while something runs."""
    seen: dict[nn.Module, tuple[Any, ...]] = {}

    def look(network: nn.Module, given: tuple[Any, ...]) -> None:
        seen.setdefault(network, given)

    hooks = [network.register_forward_pre_hook(look) for network in networks]
    run()
    for hook in hooks:
        hook.remove()
    return seen
