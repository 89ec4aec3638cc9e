"""Faults of JSON files: keys dropped and added, values of another kind or out of all bounds."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tests.checkpoints.mutations import Effect, Mutation, weighted, write

Key = str | int
Place = tuple[Key, ...]
# Paths of what decides numbers; "*" stands for any key. What is in it decides, and so does what it is in.
Decisive = Sequence[Place]
Telling = Sequence[tuple[Place, Any]]

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    10**9,
    10**30,
    10**400,
    0.5,
    -0.0,
    1e-40,
    1e38,
    1e300,
    math.inf,
    -math.inf,
    math.nan,
    "",
    "x",
    "{",
    "{0}",
    "../x",
    "two\nlines [red]",
    "x" * 5000,
    [],
    [1],
    [[]],
    list(range(2000)),
    {},
    {"a": {"b": [1]}},
    {str(i): i for i in range(2000)},
]


def json_mutations(
    file: str, data: Any, decisive: Decisive, telling: Telling, *, strict: bool
) -> st.SearchStrategy[Mutation]:
    """Faults of a file that holds ``data``.

    Args:
        file: which one.
        data: what it holds.
        decisive: paths of what decides numbers.
        telling: what it may say that is not what is computed, and must be refused.
        strict: whatever is decisive and gets another kind of value must be refused.
    """
    important = [place for place in _places(data) if _decides(place, decisive)] if strict else []

    @st.composite
    def draw_mutation(draw: st.DrawFn) -> Mutation:
        place = draw(st.sampled_from(important) if important and draw(st.booleans()) else _walk(data))
        decides = _decides(place, decisive)
        kind = draw(st.sampled_from(["drop", "retype", "retype", "add", "repeat"]))
        if kind == "drop":
            return Mutation(file, f"without {place}", _effect(decides), _editing(place, _drop))
        value = draw(st.sampled_from(VALUES))
        shown = repr(value)[:40]
        if kind == "retype":
            effect = _retyped(_at(data, place), value) if decides and strict else _effect(decides)
            return Mutation(file, f"{place} := {shown}", effect, _editing(place, _put(value)))
        if kind == "repeat":
            name = draw(st.sampled_from(list(data)))
            text = f"{{{json.dumps(name)}: {_dump(value)}, ".encode()
            return Mutation(file, f"{name} twice, first as {shown}", Effect.EQUAL, _prefixing(text))
        # A key that is not known may be added to what decides as well.
        effect = Effect.EQUAL if strict else Effect.CHANGED
        return Mutation(file, f"{place} + unknown: {shown}", effect, _editing(place, _add(value)))

    if not telling:
        return draw_mutation()
    said = [
        Mutation(file, f"{place} says {value!r}", Effect.REFUSED, _editing(place, _set(value)))
        for place, value in telling
    ]
    return weighted((5, draw_mutation()), (1, st.sampled_from(said)))


def _walk(data: Any) -> st.SearchStrategy[Place]:
    """A place in ``data``, no deeper more likely than another: a vocabulary must not hide the rest."""

    @st.composite
    def draw_place(draw: st.DrawFn) -> Place:
        place: Place = ()
        node = data
        while isinstance(node, dict | list) and node:
            if place and draw(st.integers(0, 3)) == 0:
                break
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = draw(st.sampled_from(keys))
            place, node = (*place, key), node[key]
        return place

    return draw_place()


def _places(data: Any, place: Place = ()) -> Iterator[Place]:
    if place:
        yield place
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from _places(value, (*place, key))


def _decides(place: Place, decisive: Decisive) -> bool:
    return any(all(p in ("*", k) for p, k in zip(pattern, place, strict=False)) for pattern in decisive)


def _effect(decides: bool) -> Effect:
    return Effect.CHANGED if decides else Effect.EQUAL


def _retyped(old: Any, new: Any) -> Effect:
    if isinstance(new, float) and not math.isfinite(new):
        return Effect.REFUSED
    return Effect.CHANGED if new is None or old is None or _kind(old) == _kind(new) else Effect.REFUSED


def _kind(value: Any) -> str:
    return "number" if type(value) in (int, float) else type(value).__name__


def _at(data: Any, place: Place) -> Any:
    for key in place:
        data = data[key]
    return data


Edit = Callable[[Any, Key], None]


def _editing(place: Place, edit: Edit) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        try:
            root = {"": json.loads(path.read_bytes())}
            edit(_at(root, ("", *place)[:-1]), ("", *place)[-1])
        except (ValueError, LookupError, TypeError, RecursionError):
            return  # an earlier fault took the place away
        if "" in root:
            write(path, _dump(root[""]).encode())

    return apply


def _drop(parent: Any, key: Key) -> None:
    del parent[key]


def _put(value: Any) -> Edit:
    def put(parent: Any, key: Key) -> None:
        parent[key]  # is there
        parent[key] = copy.deepcopy(value)

    return put


def _set(value: Any) -> Edit:
    def put(parent: Any, key: Key) -> None:
        parent[key] = copy.deepcopy(value)

    return put


def _add(value: Any) -> Edit:
    def add(parent: Any, key: Key) -> None:
        node = parent[key] if isinstance(parent[key], dict) else parent
        if isinstance(node, dict):
            node["un\nknown"] = value

    return add


def _prefixing(text: bytes) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = path.read_bytes().lstrip()
        if content.startswith(b"{") and not content.startswith(b"{}"):
            write(path, text + content[1:])

    return apply


def _dump(data: Any) -> str:
    """JSON, with what overflows a double written out in digits."""
    return json.dumps(data, ensure_ascii=False).replace("Infinity", "1e400")
