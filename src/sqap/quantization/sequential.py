"""Quantizing stage by stage: every linear on what the quantized ones before it produce.

A stage is as much of a model as is held in 32 bits at a time: a block of a vision encoder or of the decoder,
the projector, the head. Calibration states flow through the stages as data does, each quantized before the
next sees what it makes of them (GPTQ, Frantar et al. 2023).
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn

from sqap.errors import InputError
from sqap.models.storage import Weights, fill
from sqap.quantization.correction import Correction
from sqap.quantization.gptq import Factor, Hessian
from sqap.quantization.linear import QuantizedLinear, stored_shapes
from sqap.quantization.partial import Partial
from sqap.quantization.rotation import HadamardLinear
from sqap.recipe import Quantization, Scheme

State = TypeVar("State")
M = TypeVar("M", bound=nn.Module)
Schemes = dict[str, Scheme]


class _Reached(Exception):
    """Ends a pass through a stage at the linears it was run for."""


@dataclass
class _Group:
    """Linears that read the same input, and the sum of that input's squares ``(in,)``."""

    names: list[str]
    squares: Tensor


@dataclass(frozen=True)
class _Run(Generic[State]):
    """A stage, what it is run on, and how."""

    stage: nn.Module
    states: Sequence[State]
    call: Callable[[nn.Module, State], Any]

    def inputs(self, key: str) -> Iterator[Tensor]:
        """What a linear's weight meets first in each state: ``(..., in)``."""
        for state in self.states:
            seen: list[Tensor] = []
            take = partial(_keep, seen)
            with _inputs(self.stage, [key], take, stop=True), suppress(_Reached):
                self.call(self.stage, state)
            yield from seen


@dataclass
class Sequential:
    """Quantizes the stages it is led through.

    Args:
        quantization: the recipe's.
        before: called with each stage's name and float32 module first, to rotate it, for one.
        done: called after each stage with the number of weights done so far.
        partial: keeps finished stages, so that an interrupted run goes on from them.
        weights: where stages on the meta device are read from.
    """

    quantization: Quantization
    before: Callable[[str, nn.Module], None] = lambda name, stage: None
    done: Callable[[int], None] = lambda count: None
    partial: Partial | None = None
    weights: Weights | None = None
    _count: int = field(default=0, init=False)

    def through(
        self,
        name: str,
        stage: nn.Module,
        states: Sequence[State],
        call: Callable[[Any, State], Any],
        exact: list[State] | None = None,
    ) -> list[Any]:
        """Quantize ``stage`` in place on ``states``, and return what it then makes of them.

        Args:
            name: of the stage in its model; with the linears' own names after it, what schemes go by.
            stage: float weights of any type, perhaps shared with another model, which keeps them as they are.
            states: one entry per calibration batch; may be empty when rounding to nearest.
            call: runs the stage on one state.
            exact: what the states would be had nothing been quantized, for the recipe's ``correction``;
                becomes what the stage makes of them before it is quantized.

        Raises:
            InputError: a linear's shape does not fit its scheme, or a weight or an input is not finite.
        """
        self._count += sum(parameter.numel() for parameter in stage.parameters())
        if self.weights is not None:
            fill(stage, self.weights, prefix=f"{name}.")
        own(stage)
        self.before(name, stage)
        meant = None if exact is None else _Run(share(stage), exact, call)
        finished = None if self.partial is None else self.partial.load(name)
        if finished is not None:
            prepare(name, stage, self.quantization)
            stage.load_state_dict(finished)
        else:
            self._quantize(name, _Run(stage, states, call), meant)
            if self.partial is not None:
                self.partial.save(name, stage)
        if exact is not None and meant is not None:
            exact[:] = [call(meant.stage, state) for state in exact]
            del meant
        _give_back_memory()
        self.done(self._count)
        return [call(stage, state) for state in states]

    def _quantize(self, name: str, run: _Run[State], meant: _Run[State] | None) -> None:
        schemes = wanted(name, run.stage, self.quantization)
        if self.quantization.rounding == "gptq" and schemes:
            self._by_gptq(name, run, meant, schemes)
            return
        for key, scheme in schemes.items():
            self._replace(name, run.stage, key, scheme, None)

    def _by_gptq(self, name: str, run: _Run[State], meant: _Run[State] | None, schemes: Schemes) -> None:
        for group in _groups(run, schemes):
            first = group.names[0]
            hessian = Hessian(group.squares.argsort(), f"{name}.{first}")
            linears = [cast(nn.Linear, run.stage.get_submodule(key)) for key in group.names]
            corrections = [] if meant is None else [Correction(linear) for linear in linears]
            meaning = itertools.repeat(None) if meant is None else meant.inputs(first)
            for x, exact in zip(run.inputs(first), meaning, strict=False):
                hessian.add(x)
                for correction in corrections:
                    correction.add(x, cast(Tensor, exact))
            factor = hessian.factor()
            for linear, correction in zip(linears, corrections, strict=False):
                corrected = correction.weight(factor, self.quantization.correction)
                linear.weight = nn.Parameter(corrected, requires_grad=False)
            for key in group.names:
                self._replace(name, run.stage, key, schemes[key], factor)

    def _replace(self, name: str, stage: nn.Module, key: str, scheme: Scheme, factor: Factor | None) -> None:
        parent, _, attribute = key.rpartition(".")
        owner = stage.get_submodule(parent)
        try:
            quantized = QuantizedLinear.from_linear(
                getattr(owner, attribute), scheme, clip=self.quantization.clip, factor=factor
            )
        except InputError as problem:
            raise InputError(f"{name}.{key} cannot be quantized: {problem}") from problem
        setattr(owner, attribute, quantized)


def _give_back_memory() -> None:
    """Let glibc return what it keeps between blocks in use: 34 MB for each layer of a 7B decoder."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


def _keep(seen: list[Tensor], _: str, x: Tensor) -> None:
    seen.append(x)


def share(module: M) -> M:
    """A copy of ``module`` whose tensors are those of the original until it is given others."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b for b in module.buffers()}
    return copy.deepcopy(module, memo)


def own(module: nn.Module) -> None:
    """Give a module that shares its tensors float32 parameters of its own, which may be written to."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)


def wanted(name: str, stage: nn.Module, quantization: Quantization) -> Schemes:
    """The linears of ``stage`` that the recipe quantizes, by their names inside it.

    Raises:
        InputError: one's shape does not fit its scheme.
    """
    schemes = {}
    sensitive = getattr(stage, "sensitive", ())
    for key, module in stage.named_modules():
        if isinstance(module, nn.Linear):
            scheme = quantization.scheme(f"{name}.{key}", key in sensitive)
            if scheme is not None:
                try:
                    stored_shapes(module.in_features, module.out_features, scheme)
                except InputError as problem:
                    raise InputError(f"{name}.{key} cannot be quantized: {problem}") from problem
                schemes[key] = scheme
    return schemes


def prepare(name: str, stage: nn.Module, quantization: Quantization) -> None:
    """Give ``stage`` the modules it will have when quantized, with weights yet to be loaded."""
    for key, scheme in wanted(name, stage, quantization).items():
        parent, _, attribute = key.rpartition(".")
        owner = stage.get_submodule(parent)
        setattr(owner, attribute, QuantizedLinear.empty_like(getattr(owner, attribute), scheme))


def _groups(run: _Run[State], schemes: Schemes) -> list[_Group]:
    """The linears in the order in which they are reached; those that are given one tensor together."""
    groups: dict[tuple[int, ...], _Group] = {}
    seen: dict[str, _Group] = {}
    held: list[Tensor] = []  # keeps a tensor's address from being used again within a pass
    passed: set[str] = set()

    def note(key: str, x: Tensor) -> None:
        if key in passed:  # by a later block of the sequence, such as the token of the robot's state
            return
        passed.add(key)
        squares = x.flatten(0, -2).square().sum(0, dtype=torch.float64)
        held.append(x)
        if key in seen:
            if seen[key].names[0] == key:
                seen[key].squares += squares
            return
        group = groups.setdefault((x.data_ptr(), *x.shape), _Group([], squares))
        group.names.append(key)
        seen[key] = group

    with _inputs(run.stage, list(schemes), note):
        for state in run.states:
            run.call(run.stage, state)
            held.clear()
            groups.clear()
            passed.clear()
    missed = [key for key in schemes if key not in seen]
    if missed:
        raise InputError(
            f"calibration never reached {missed[0]}; GPTQ needs at least one frame that uses every linear"
        )
    return list({id(group): group for group in seen.values()}.values())


@contextmanager
def _inputs(
    stage: nn.Module, keys: Sequence[str], take: Callable[[str, Tensor], None], *, stop: bool = False
) -> Iterator[None]:
    """Give ``take`` the inputs of some linears as their weights meet them, and perhaps end the pass there."""

    def hook(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def before(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            take(key, linear.rotate_input(x) if isinstance(linear, HadamardLinear) else x)
            if stop:
                raise _Reached

        return before

    handles = [stage.get_submodule(key).register_forward_pre_hook(hook(key)) for key in keys]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
