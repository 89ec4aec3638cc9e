"""Sequential quantization: each stage is calibrated on the outputs of the quantized stages before it.

A stage is the part of a model that is held in float32 at one time: a block of a vision encoder or of the
decoder, the projector, the head. Calibration states pass through the stages in the order of the forward pass;
each stage is quantized before it computes the inputs of the next (GPTQ, Frantar et al. 2023).
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
    """Stops a forward pass once the wanted inputs are recorded."""


@dataclass
class _Group:
    """Linears that share an input, with the sum of squares ``(in,)`` of that input over all states."""

    names: list[str]
    squares: Tensor


@dataclass(frozen=True)
class _Run(Generic[State]):
    """A stage, its calibration states, and the function that calls it on one state."""

    stage: nn.Module
    states: Sequence[State]
    call: Callable[[nn.Module, State], Any]

    def inputs(self, key: str) -> Iterator[Tensor]:
        """The first input ``(..., in)`` of the linear called ``key``, for each state, after its rotation."""
        for state in self.states:
            seen: list[Tensor] = []
            take = partial(_keep, seen)
            with _inputs(self.stage, [key], take, stop=True), suppress(_Reached):
                self.call(self.stage, state)
            yield from seen


@dataclass
class Sequential:
    """Quantizes stages one after the other; `through` is the `sqap.models.through.Through` of `VLA.run`.

    Args:
        quantization: the recipe's.
        before: called with each stage's name and float32 module before it is quantized, e.g. to rotate it.
        done: called after each stage with the number of weights quantized so far.
        partial: stores finished stages, so that an interrupted run resumes behind them.
        weights: source of the weights of stages on the meta device.
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
        """Quantize ``stage`` in place on ``states``, and return its quantized outputs, one for each state.

        Args:
            name: path of the stage in its model; a linear's scheme is chosen by this path and its own name.
            stage: float weights of any type. Tensors shared with another model are not written to.
            states: one entry per calibration batch; may be empty when rounding to nearest.
            call: runs the stage on one state.
            exact: the full-precision states, for the recipe's ``correction``; replaced by the stage's
                full-precision outputs.

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
    """Return freed heap pages to the system: glibc keeps 34 MB for each layer of a 7B decoder otherwise."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


def _keep(seen: list[Tensor], _: str, x: Tensor) -> None:
    seen.append(x)


def share(module: M) -> M:
    """A copy of ``module`` that shares its parameters and buffers with the original."""
    memo: dict[int, object] = {id(p): nn.Parameter(p.data, requires_grad=False) for p in module.parameters()}
    memo |= {id(b): b for b in module.buffers()}
    return copy.deepcopy(module, memo)


def own(module: nn.Module) -> None:
    """Replace shared parameters by float32 copies that may be written to."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)


def wanted(name: str, stage: nn.Module, quantization: Quantization) -> Schemes:
    """The scheme of each linear of ``stage`` that the recipe quantizes, by its path inside the stage.

    Raises:
        InputError: a linear's shape does not fit its scheme.
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
    """Replace the linears that the recipe quantizes by empty quantized ones, to load a state dict into."""
    for key, scheme in wanted(name, stage, quantization).items():
        parent, _, attribute = key.rpartition(".")
        owner = stage.get_submodule(parent)
        setattr(owner, attribute, QuantizedLinear.empty_like(getattr(owner, attribute), scheme))


def _groups(run: _Run[State], schemes: Schemes) -> list[_Group]:
    """Linears in the order of the forward pass; those called with the same tensor form one group."""
    groups: dict[tuple[int, ...], _Group] = {}
    seen: dict[str, _Group] = {}
    held: list[Tensor] = []  # keeps tensors alive, so that no address is used twice within a pass
    passed: set[str] = set()

    def note(key: str, x: Tensor) -> None:
        if key in passed:  # a later block of the sequence, such as the robot's state, calls it again
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
    """Call ``take`` with the path and rotated input of some linears; ``stop`` ends the pass at the first."""

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
