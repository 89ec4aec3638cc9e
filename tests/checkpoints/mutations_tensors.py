"""Faults of files of tensors: safetensors, and what torch.save writes."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from tests.checkpoints.mutations import Effect, Mutation, weighted, write

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OTHERS = (torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn)
# Which OpenVLA-OFT's own files, PART--STEP_checkpoint.pt, may have before their names or not.
MODULE = "module."
PREFIXES = (MODULE, "_orig_mod.", "model.", "base_model.model.")
# Between the keys of nested dictionaries; the names of tensors have dots of their own.
SEPARATOR = "/"
Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], None]

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1) if t.ndim else t,
    "flat": lambda t: t.reshape(-1),
    "with one more dimension": lambda t: t[None],
    "cut in half": lambda t: t[: len(t) // 2] if t.ndim else t,
    "without rows": lambda t: t[:0] if t.ndim else t,
    "without columns": lambda t: t[..., :0] if t.ndim else t,
    "twice": lambda t: torch.cat([t, t]) if t.ndim else t,
    "of no dimension": lambda t: t.new_zeros(()),
    "of 10**12 empty rows": lambda t: t.new_zeros(10**12, 0),
    "NaN": lambda t: t * math.nan if t.is_floating_point() else t,
    "infinite": lambda t: t.abs() * math.inf if t.is_floating_point() else t,
}
# What torch.save can write, and no policy is made of.
KINDS: dict[str, Callable[[Tensor], Any]] = {
    "one number seen everywhere": lambda t: t.new_ones(()).expand(t.shape),
    "10**12 rows that are one": lambda t: t[:1].expand(10**12, *t.shape[1:]) if t.ndim else t,
    "sparse": lambda t: t.to_sparse(),
    "without data": lambda t: t.to("meta"),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
    "a list": lambda t: t.tolist() if t.numel() < 1000 else [1.0],
    "text": lambda t: "a tensor",
}


def tensor_mutations(
    file: str, tensors: Mapping[str, Tensor], is_used: Callable[[str], bool]
) -> st.SearchStrategy[Mutation]:
    """Faults that every file of tensors can have; ``is_used`` tells whether a policy reads a tensor."""

    @st.composite
    def draw_mutation(draw: st.DrawFn) -> Mutation:
        name = draw(st.sampled_from(list(tensors)))
        what, edit = draw(_edits(name))
        after = dict(tensors)
        edit(after)
        found = after.get(name, after.get(f"{MODULE}{name}") if "--" in file else None)
        effect = _effect(tensors[name], found) if is_used(name) else Effect.EQUAL
        return Mutation(file, what, effect, _editing(edit))

    return draw_mutation()


def pickle_mutations(
    file: str, tensors: Mapping[str, Tensor], is_used: Callable[[str], bool], payload: object
) -> st.SearchStrategy[Mutation]:
    """Faults of what torch.save writes; ``payload`` is an object that does something when it is unpickled."""

    @st.composite
    def draw_odd(draw: st.DrawFn) -> Mutation:
        name = draw(st.sampled_from(list(tensors)))
        kind = draw(st.sampled_from(list(KINDS)))

        def edit(tensors: Tensors) -> None:
            if isinstance(tensors.get(name), Tensor):
                tensors[name] = KINDS[kind](tensors[name])

        effect = Effect.REFUSED if is_used(name) and kind != "one number seen everywhere" else Effect.EQUAL
        if kind == "one number seen everywhere" and is_used(name):
            effect = Effect.CHANGED
        return Mutation(file, f"{name} is {kind}", effect, _editing(edit))

    def rebuilt(
        what: str, make: Callable[[Any], Any], effect: Effect, **how: Any
    ) -> st.SearchStrategy[Mutation]:
        def apply(path: Path) -> None:
            loaded = read(path)
            if loaded is not None:
                buffer = io.BytesIO()
                torch.save(make(loaded), buffer, **how)
                write(path, buffer.getvalue())

        return st.just(Mutation(file, what, effect, apply))

    def inside_itself(loaded: Any) -> Any:
        loaded["again"] = loaded
        return loaded

    old = {"_use_new_zipfile_serialization": False}
    first = next(iter(tensors)).replace(SEPARATOR, ".")
    whole = st.one_of(
        rebuilt("in the format before PyTorch 1.6", lambda x: x, Effect.EQUAL, **old),
        rebuilt("pickled with protocol 5", lambda x: x, Effect.EQUAL, pickle_protocol=5),
        rebuilt("with code", lambda x: {**x, "code": payload}, Effect.REFUSED),
        rebuilt("with code, in the old format", lambda x: {**x, "code": payload}, Effect.REFUSED, **old),
        rebuilt("in a wrapper", lambda x: {"state_dict": x}, Effect.REFUSED),
        rebuilt("in a list", lambda x: [x], Effect.REFUSED),
        rebuilt("inside itself", inside_itself, Effect.EQUAL),
        rebuilt("with an optimizer", lambda x: {**x, "optimizer": {"step": 3, "lr": 0.1}}, Effect.EQUAL),
        rebuilt("with a name twice", lambda x: {first: torch.zeros(3), **x}, Effect.EQUAL),
        rebuilt("a number", lambda x: 3, Effect.REFUSED),
        rebuilt("no tensor", lambda x: {"epoch": 3}, Effect.REFUSED),
        rebuilt("a single tensor", lambda x: torch.zeros(3), Effect.REFUSED),
        rebuilt("numbers for names", lambda x: dict(enumerate(x.values())), Effect.REFUSED),
    )
    return weighted((1, draw_odd()), (1, whole))


def read(path: Path) -> Any:
    """What a file of tensors holds; None if an earlier fault destroyed it."""
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_safetensors(path.read_bytes())
    except Exception:  # a malformed pickle makes the unpickler raise anything
        return None


def flatten(loaded: Any, prefix: str = "") -> Tensors:
    """The tensors of nested dictionaries by their keys, without a dictionary that is inside itself."""
    out: Tensors = {}
    for key, value in loaded.items():
        if value is loaded:
            continue
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}{SEPARATOR}")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _unflatten(tensors: Tensors) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *keys, last = name.split(SEPARATOR)
        node = out
        for key in keys:
            node = node.setdefault(key, {})
        node[last] = tensor
    return out


def _edits(name: str) -> st.SearchStrategy[tuple[str, Edit]]:
    def drop(tensors: Tensors) -> None:
        tensors.pop(name, None)

    def add(new: str) -> tuple[str, Edit]:
        def edit(tensors: Tensors) -> None:
            if isinstance(tensors.get(name), Tensor):
                tensors[new] = tensors[name].clone()

        return f"{name} again as {new}", edit

    def prefix(text: str, only: bool) -> tuple[str, Edit]:
        def edit(tensors: Tensors) -> None:
            for old in [name] if only else list(tensors):
                if old in tensors:
                    tensors[text + old] = tensors.pop(old)

        return f"{text} before {name if only else 'every name'}", edit

    def change(what: str, make: Callable[[Tensor], Tensor]) -> tuple[str, Edit]:
        def edit(tensors: Tensors) -> None:
            if isinstance(tensors.get(name), Tensor):
                tensors[name] = make(tensors[name]).contiguous()

        return f"{name} {what}", edit

    numbered = [name.replace(".0.", f".{n}.").replace(".1.", f".{n}.") for n in (7, 10**9, 10**30)]
    names = ["unknown.weight", "two\nlines", name + ".absmax", name + "_scale", "", *numbered]
    return st.one_of(
        st.just((f"without {name}", drop)),
        st.sampled_from(names).map(add),
        st.builds(prefix, st.sampled_from(PREFIXES), st.booleans()),
        st.sampled_from(list(SHAPES.items())).map(lambda pair: change(*pair)),
        st.sampled_from(FLOATS + OTHERS).map(lambda dtype: change(f"as {dtype}", lambda t: t.to(dtype))),
    )


def _effect(before: Tensor, now: Tensor | None) -> Effect:
    """By what became of a tensor that is read."""
    if now is None or now.shape != before.shape:
        return Effect.REFUSED
    if now.dtype != before.dtype:
        return Effect.CHANGED if {now.dtype, before.dtype} <= set(FLOATS) else Effect.REFUSED
    if now.is_floating_point() and not now.isfinite().all():
        return Effect.REFUSED
    return Effect.EQUAL if torch.equal(now, before) else Effect.CHANGED


def _editing(edit: Edit) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        loaded = read(path)
        if not isinstance(loaded, dict):
            return
        tensors = flatten(loaded)
        edit(tensors)
        if path.suffix == ".pt":
            buffer = io.BytesIO()
            torch.save(_unflatten(tensors), buffer)
            write(path, buffer.getvalue())
        else:
            write(path, save_safetensors(tensors, {"format": "pt"}))

    return apply
