"""A path that computes something else than plain C++ steps aside, and says so."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sqap.cli import app
from sqap.errors import InputError
from sqap.kernels import cpu
from sqap.kernels.cpu.check import difference
from sqap.kernels.cpu.layer import CpuLayer

PATHS = [path for path in cpu.paths() if path != cpu.REFERENCE]
FASTEST, NEXT = (*PATHS, cpu.REFERENCE)[:2]
broken = pytest.mark.skipif(FASTEST == cpu.PORTABLE, reason="no path steps aside for another")


@pytest.fixture(autouse=True)
def looked_at_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Paths are checked and chosen once for a process: in these tests, for each of them."""
    monkeypatch.delenv(cpu.VARIABLE, raising=False)
    for cached in (difference, cpu.chosen):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (difference, cpu.chosen):
        cached.cache_clear()


def breaks(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, spoil: Callable[..., Any]) -> None:
    """``spoil`` what the fastest path returns."""
    right = getattr(owner, name)

    def computed(*arguments: Any, **named: Any) -> Any:
        result = right(*arguments, **named)
        path = getattr(arguments[0], "path", arguments[-1])  # of a linear or layer; a product's last argument
        return spoil(result, *arguments) if path == FASTEST else result

    monkeypatch.setattr(owner, name, computed)


def one_more(result: torch.Tensor) -> torch.Tensor:
    result.view(-1)[-1] += 1
    return result


@pytest.mark.parametrize("path", PATHS)
def test_every_path_computes_the_same(path: str) -> None:
    assert difference(path) is None


def test_the_check_does_not_depend_on_pytorchs_defaults_nor_change_its_randomness() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            assert difference(FASTEST) is None
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert torch.equal(torch.rand(3), expected)


def wrong_quantize(result: Any, linear: Any, x: Any, *function: Any) -> Any:
    q, scale, zero = result
    return q, scale, None if zero is None else one_more(zero)


FAULTS: dict[str, tuple[Any, str, Callable[..., Any], str]] = {
    "products": (cpu, "matmul", lambda y, *_: one_more(y), "products with 4-bit weights"),
    "products of bytes": (
        cpu,
        "matmul",
        lambda y, q, w, bits, *_: one_more(y) if bits == 8 else y,
        "products with 8-bit weights",
    ),
    "zero points": (
        cpu.CpuLinear,
        "quantize",
        wrong_quantize,
        "a W4A8 linear, scales per channel and per token with zero points",
    ),
    "one output": (
        cpu.CpuLinear,
        "__call__",
        lambda y, *_: y.view(-1)[-1:].mul_(1.0001) is None or y,
        "a W4A8 linear, scales per channel and per token",
    ),
    "no number": (
        cpu.CpuLinear,
        "__call__",
        lambda y, *_: y.view(-1)[-1:].fill_(torch.nan) is None or y,
        "a W4A8 linear, scales per channel and per token",
    ),
    "many tokens": (
        cpu.CpuLinear,
        "__call__",
        lambda y, *_: one_more(y) if len(y) > 4 else y,
        "a W4A8 linear, scales per channel and per token",
    ),
    "a function": (
        cpu.CpuLinear,
        "__call__",
        lambda y, linear, x, function="none", *_: y * 1.1 if function == "gelu" else y,
        "a linear behind the function 'gelu'",
    ),
    "scores": (
        CpuLayer,
        "__call__",
        lambda result, *_: (result[0], result[1] if result[1] is None else result[1].roll(1)),
        "a decoder layer",
    ),
    "an encoder": (
        CpuLayer,
        "__call__",
        lambda result, layer, *rest: (result[0] * 1.1, None) if len(rest) == 1 else result,
        "an encoder block",
    ),
}


@broken
@pytest.mark.parametrize("fault", FAULTS)
def test_a_path_that_computes_something_else_steps_aside(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner, name, spoil, what = FAULTS[fault]
    breaks(monkeypatch, owner, name, spoil)
    with caplog.at_level(logging.WARNING, "sqap"):
        for _ in range(2):
            assert cpu.chosen() == NEXT
    (record,) = caplog.records
    assert record.getMessage() == (
        f"on this processor, the results of the kernels {FASTEST!r} (first of all {what}) are wrong: "
        f"{NEXT!r} is used instead"
    )


@broken
def test_a_path_that_fails_steps_aside(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no such instruction")

    breaks(monkeypatch, cpu, "matmul", fail)
    assert cpu.chosen() == NEXT
    assert "(first of all products with 4-bit weights (no such instruction))" in caplog.text


@broken
def test_a_path_that_was_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    breaks(monkeypatch, cpu, "matmul", lambda y, *_: one_more(y))
    monkeypatch.setenv(cpu.VARIABLE, FASTEST)
    sentence = f"SQAP_KERNELS is '{FASTEST}', whose results on this processor are wrong .*products with 4-bit"
    with pytest.raises(InputError, match=sentence):
        cpu.chosen()
    for other in (cpu.PORTABLE, cpu.REFERENCE):
        cpu.chosen.cache_clear()
        monkeypatch.setenv(cpu.VARIABLE, other)
        assert cpu.chosen() == other


@broken
def test_inspect_shows_the_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    breaks(monkeypatch, cpu, "matmul", lambda y, *_: one_more(y))
    result = CliRunner().invoke(app, ["inspect", "--cpu", "--json", str(tmp_path / "cpu.json")])
    assert result.exit_code == 0, result.output
    assert result.output.count("│ wrong:") == 1
    found = {path["name"]: path for path in json.loads((tmp_path / "cpu.json").read_text())["paths"]}
    assert found[FASTEST]["differs"] == "products with 4-bit weights"
    assert (found[FASTEST]["used"], found[NEXT]["used"]) == (False, True)
    assert found[cpu.PORTABLE]["differs"] is None
    assert not found[cpu.PORTABLE]["checked"]
