"""Quantizing the linears of any module in place: `quantize_`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sqap.defaults import defaults
from sqap.errors import InputError
from sqap.quantization.gptq import Factor, Hessian
from sqap.quantization.linear import QuantizedLinear, stored_shapes
from sqap.recipe import Scheme

Skip = str | Iterable[str] | Callable[[str, nn.Linear], bool]
HESSIANS = 1 << 30  # bytes of Hessians that are summed up in one pass
HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass(frozen=True)
class Replacement:
    """What `quantize_` has done.

    Args:
        replaced: names of the linears that are packed now.
        skipped: names of those that are as they were, and why.
    """

    replaced: tuple[str, ...]
    skipped: Mapping[str, str]


@defaults()
def quantize_(
    module: nn.Module,
    scheme: Scheme | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    skip: Skip = (),
) -> Replacement:
    """Replace the ``nn.Linear`` s in any module by packed ones (`QuantizedLinear`), in place.

    Weights are rounded to nearest, or by GPTQ where there are calibration inputs; scales are those of the
    smallest squared error. Nothing is rotated. A packed linear has no gradient: run the module under
    ``torch.no_grad()``. Hooks on the linears go over to the packed ones.

    Skipped, with the reason, are linears that ``skip`` names, that share a parameter with another module (a
    language model's tied output matrix), whose weight is no parameter, whose ``in_features`` the scheme
    cannot pack, that are of a subclass or have a ``forward`` of their own, whose weight
    ``nn.TransformerEncoderLayer`` reads itself, and that calibration does not reach. A linear that the module
    has in several places is replaced in all, and goes by its first name.

    Args:
        module: any, but not itself a linear.
        scheme: the grids; W4A8 by default.
        calibration: inputs that are typical of the module's work. A mapping is called as
            ``module(**inputs)``, a tuple or list as ``module(*inputs)``, anything else as ``module(inputs)``,
            in evaluation mode, in two passes or more: the last ones sum up Hessians, as many at a time as
            take `HESSIANS` bytes, and linears are rounded between passes, on what those before them have
            become.
        skip: names of linears, or patterns of them as `fnmatch` has them (``"*.head"``), or a function of a
            name and a linear that says whether to skip it.

    Raises:
        InputError: the module is a linear, a pattern matches none, a weight is not finite or on the meta
            device, or calibration is empty: all found before anything is replaced. Or a calibration input of
            a linear is not finite: then others may be replaced already.
    """
    scheme = scheme or Scheme()
    if isinstance(module, nn.Linear):
        raise InputError("the module is itself a linear, which cannot be replaced in place; give its owner")
    wanted, skipped = _choose(module, scheme, skip)
    for name, linear in wanted.items():
        _check(name, linear.weight)
    if calibration is None:
        for linear in wanted.values():
            _replace(module, linear, scheme, None)
    else:
        passed = list(calibration)
        if not passed:
            raise InputError("calibration is empty; give inputs, or None to round to nearest")
        with _evaluating(module):
            for name in _by_gptq(module, wanted, scheme, passed):
                skipped[name] = "calibration does not reach it"
    return Replacement(tuple(name for name in wanted if name not in skipped), skipped)


def _choose(module: nn.Module, scheme: Scheme, skip: Skip) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linears to replace, and why the others are not."""
    owners: dict[int, list[str]] = {}
    for name, part in module.named_modules():
        for key, parameter in part._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{name}.{key}")
    linears = {name: m for name, m in module.named_modules() if isinstance(m, nn.Linear)}
    named = _named(linears, skip)
    wanted, skipped = {}, {}
    for name, linear in linears.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        reason = "named by skip" if name in named else _reason(name, linear, owner, owners, scheme)
        if reason is None:
            wanted[name] = linear
        else:
            skipped[name] = reason
    return wanted, skipped


def _named(linears: Mapping[str, nn.Linear], skip: Skip) -> set[str]:
    if callable(skip):
        return {name for name, linear in linears.items() if skip(name, linear)}
    found: set[str] = set()
    for pattern in [skip] if isinstance(skip, str) else skip:
        matched = {name for name in linears if fnmatchcase(name, pattern)}
        if not matched:
            raise InputError(f"skip names {pattern!r}, which matches no linear of the module")
        found |= matched
    return found


def _reason(
    name: str, linear: nn.Linear, owner: nn.Module, owners: Mapping[int, list[str]], scheme: Scheme
) -> str | None:
    """Why a linear cannot be replaced, if it cannot."""
    if type(linear) is not nn.Linear:
        return f"it is a {type(linear).__name__}, which may do more than a linear"
    if "forward" in vars(linear):
        return "its forward has been replaced"
    if "weight" not in linear._parameters:
        return "its weight is no parameter"
    for key, parameter in linear._parameters.items():
        others = [other for other in owners[id(parameter)] if other != f"{name}.{key}"]
        if parameter is not None and others:
            return f"its {key} is {others[0]}, too"
    if isinstance(owner, nn.TransformerEncoderLayer):
        return "nn.TransformerEncoderLayer reads its weight itself"
    try:
        stored_shapes(linear.in_features, linear.out_features, scheme)
    except InputError as problem:
        return str(problem)
    return None


def _check(name: str, weight: Tensor) -> None:
    if weight.is_meta:
        raise InputError(f"{name} has its weight on the meta device; load it first")
    if weight.numel() and not all(bool(extreme.isfinite()) for extreme in weight.detach().aminmax()):
        raise InputError(f"{name} holds weights that are not finite, which no grid can carry")


def _by_gptq(
    module: nn.Module, linears: Mapping[str, nn.Linear], scheme: Scheme, calibration: Sequence[Any]
) -> list[str]:
    """Replace the linears that calibration reaches; the names of the others."""
    squares: dict[str, Tensor] = {}

    def energy(name: str, x: Tensor) -> None:
        sums = x.reshape(-1, x.shape[-1]).float().square().sum(0, dtype=torch.float64)
        squares[name] = squares[name] + sums if name in squares else sums

    _run(module, linears, calibration, energy)
    for names in _parts(squares):
        hessians = {name: Hessian(squares[name].argsort(), name) for name in names}
        part = {name: linears[name] for name in names}
        _run(module, part, calibration, partial(_add, hessians))
        for name, linear in part.items():
            _replace(module, linear, scheme, hessians.pop(name).factor())
    return [name for name in linears if name not in squares]


def _add(hessians: Mapping[str, Hessian], name: str, x: Tensor) -> None:
    hessians[name].add(x)


def _parts(squares: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names in the order in which linears are reached, so many that their Hessians are about `HESSIANS`."""
    part, size = [], 0
    for name, sums in squares.items():
        part.append(name)
        size += 2 * len(sums) ** 2  # half a square of float32
        if size >= HESSIANS:
            yield part
            part, size = [], 0
    if part:
        yield part


def _run(
    module: nn.Module,
    linears: Mapping[str, nn.Linear],
    calibration: Sequence[Any],
    take: Callable[[str, Tensor], None],
) -> None:
    """Run the module on all inputs, and give ``take`` those ``(..., in)`` of the linears at every call."""

    def hook(name: str) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            take(name, args[0] if args else kwargs["input"])

        return before

    handles = [m.register_forward_pre_hook(hook(n), with_kwargs=True) for n, m in linears.items()]
    try:
        for inputs in calibration:
            if isinstance(inputs, Mapping):
                module(**inputs)
            elif isinstance(inputs, tuple | list):
                module(*inputs)
            else:
                module(inputs)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    modes = {name: part.training for name, part in module.named_modules()}
    module.eval()
    try:
        yield
    finally:
        for name, training in modes.items():
            module.get_submodule(name).training = training


def _replace(module: nn.Module, linear: nn.Linear, scheme: Scheme, factor: Factor | None) -> None:
    """Put the packed linear wherever the module has this one."""
    packed = QuantizedLinear.from_linear(linear, scheme, clip=True, factor=factor)
    packed.train(linear.training)
    for hooks in HOOKS:  # the dictionaries themselves, so that a hook's handle still removes it
        setattr(packed, hooks, getattr(linear, hooks))
    for owner in [*module.modules()]:
        for attribute, child in [*owner._modules.items()]:
            if child is linear:
                setattr(owner, attribute, packed)
