"""Frozen dataclasses from JSON, strictly: an unknown key is an error that names the known ones."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from sqap.errors import SqapError


def read_json(path: Path, error: type[SqapError]) -> Any:
    """Parse a JSON file, or raise ``error`` with one sentence."""
    return parse_json(read_bytes(path, error), path, error)


def read_bytes(path: Path, error: type[SqapError]) -> bytes:
    """The content of a file, or raise ``error`` with one sentence."""
    if path.exists() and not path.is_file():  # opening a pipe would wait for its other end
        raise error(f"cannot read {path}: it is not a file")
    try:
        return path.read_bytes()
    except OSError as problem:
        raise error(f"cannot read {path}: {problem.strerror}") from problem


def parse_json(content: bytes, path: Path, error: type[SqapError]) -> Any:
    """Parse the content of the file at ``path``, or raise ``error`` with one sentence."""
    try:
        return json.loads(content.decode("utf-8-sig"))  # with a byte order mark or without
    except ValueError as problem:
        raise error(f"{path} is not valid JSON: {problem}") from problem
    except RecursionError:
        raise error(f"{path} is nested too deeply to be read") from None


def read_object(path: Path, error: type[SqapError]) -> dict[str, Any]:
    """A JSON file that holds an object, or an empty one if there is nothing; raises ``error`` otherwise."""
    if not os.path.lexists(path):  # a broken link is a file that is missing, not one that is not needed
        return {}
    data = read_json(path, error)
    if not isinstance(data, dict):
        raise error(f"{path} must hold an object")
    return data


def from_json(cls: type, data: Any, where: str, error: type[SqapError]) -> Any:
    """Build dataclass ``cls`` from plain ``data``, checking keys, types and allowed values.

    ``where`` names the place in messages, as ``recipe.pruning``.
    """
    if not isinstance(data, dict):
        raise error(f"{where} must be an object, got {type(data).__name__}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise error(f"{where} has no setting {unknown[0]!r}; it has {', '.join(fields)}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise error(f"{where} lacks {name!r}")
    values = {name: _convert(hints[name], value, f"{where}.{name}", error) for name, value in data.items()}
    try:
        return cls(**values)
    except SqapError as problem:
        raise error(f"{where}: {problem}") from problem


def _convert(hint: Any, value: Any, where: str, error: type[SqapError]) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(_variant(arguments, value, where, error), value, where, error)
    if origin is Literal:
        if value not in arguments:
            raise error(f"{where} must be one of {', '.join(map(repr, arguments))}, got {value!r}")
        return value
    if origin is tuple:
        return _tuple(arguments, value, where, error)
    if origin is dict:  # with names as its keys
        if not isinstance(value, dict):
            raise error(f"{where} must be an object, got {value!r}")
        return {key: _convert(arguments[1], item, f"{where}.{key}", error) for key, item in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_json(hint, value, where, error)
    if hint is float and type(value) in (int, float):
        return _finite(value, where, error)
    if type(value) is not hint:
        raise error(f"{where} must be {hint.__name__}, got {value!r}")
    return value


def _finite(value: float, where: str, error: type[SqapError]) -> float:
    with suppress(OverflowError):  # JSON's whole numbers have no end
        if math.isfinite(value):
            return float(value)
    raise error(f"{where} must be a finite number, got {value}")


def _variant(arguments: tuple[Any, ...], value: Any, where: str, error: type[SqapError]) -> Any:
    """The one type that is meant; several dataclasses are told apart by a field ``kind``."""
    variants = [a for a in arguments if a is not type(None)]
    if len(variants) == 1:
        return variants[0]
    kinds = {next(f.default for f in dataclasses.fields(v) if f.name == "kind"): v for v in variants}
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind not in kinds:
        raise error(f"{where}.kind must be one of {', '.join(map(repr, kinds))}, got {kind!r}")
    return kinds[kind]


def _tuple(arguments: tuple[Any, ...], value: Any, where: str, error: type[SqapError]) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise error(f"{where} must be a list, got {value!r}")
    if arguments[-1] is ...:
        arguments = (arguments[0],) * len(value)
    if len(arguments) != len(value):
        raise error(f"{where} must have {len(arguments)} entries, got {len(value)}")
    pairs = enumerate(zip(arguments, value, strict=True))
    return tuple(_convert(argument, item, f"{where}[{i}]", error) for i, (argument, item) in pairs)
