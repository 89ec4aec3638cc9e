"""The GPU backend on a card: python benchmarks/gpu.py --json PATH (under 8 minutes; --dry needs no GPU)

In this order, written after every part: the programs against float64, a compressed policy's chunk against the
CPU's, the card's ceilings, whole steps of every shape beside bfloat16 with and without a CUDA graph, and
every tile of products beside cuBLAS. docs/gpu.md says what the results decide.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1" if "--dry" in sys.argv else "0"  # before Triton is imported

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sqap.benchmark import device, latency
from sqap.benchmark.candidates import CANDIDATES, Subject, example, unpruned, weight_bytes
from sqap.benchmark.shapes import SHAPES, random_policy
from sqap.errors import InputError
from sqap.files import write_json
from sqap.kernels import Grids, Packed
from sqap.kernels.gpu import GpuBackend, linear
from sqap.kernels.gpu.backend import check_device
from sqap.kernels.gpu.tiles import Tile
from sqap.kernels.levels import level_range
from sqap.models import DecoderConfig, DiffusionHeadConfig, ModelConfig, TokenHeadConfig, VisionConfig
from sqap.policy import Policy
from sqap.recipe import Recipe

DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
TOKENS = (3,) if DRY else (1, 17, 34, 178, 280)
WIDTHS = ((40, 96),) if DRY else ((768, 768), (4096, 4096), (4304, 1152), (1000, 11008))  # (out, in)
PRODUCTS = {"tiny": (64, 128)} if DRY else {
    "query": (4096, 4096), "gate": (11008, 4096), "down": (4096, 11008), "SigLIP fc1": (4304, 1152),
    "DiT fc1": (3072, 768),
}  # fmt: skip
TILES = [
    Tile(16, 64, 256), Tile(32, 64, 256), Tile(32, 128, 128), Tile(64, 64, 128), Tile(64, 128, 128),
    Tile(64, 128, 128, 8), Tile(64, 256, 128, 8, 3), Tile(128, 128, 128, 8), Tile(128, 256, 64, 8, 3),
]  # fmt: skip
TINY = {
    name: ModelConfig(
        (VisionConfig(28, 14, 64, 2, 2, 128),), (64,), DecoderConfig(64, 64, 5, 2, 2, 32, 128), head
    )
    for name, head in (
        ("tiny", DiffusionHeadConfig(action_dim=4, horizon=4, width=64, depth=1, heads=2)),
        ("tiny tokens", TokenHeadConfig(action_dim=3, vocabulary=64, bins=9, last_token=60)),
    )
}
started = time.monotonic()


def say(*words: Any) -> None:
    print(f"[{time.monotonic() - started:5.0f} s]", *words, flush=True)


class Watch:
    """Stands for an event where there is no GPU: the CPU's time."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Watch) -> float:
        return 1e3 * (end.seconds - self.seconds)


if DRY:
    device.make_event, device.REPLAYS, device.LEAST, device.EAGER_WARMUPS = Watch, 1, 1, 0
    device.capture_cuda = lambda function: (function(), function)


def milliseconds(function: Callable[[], Any], graph: bool = True, seconds: float = 2.0) -> list[float]:
    """Of calls: 200, or as many as there are in so many ``seconds``."""
    return device.repeated(function, graph=graph, within_s=seconds)


def percentiles(ms: Sequence[float]) -> dict[str, float]:
    return latency.percentiles(ms) | {"replays": len(ms)}


def packed(n: int, k: int, bits: int = 4, activation_bits: int = 8, hadamard: int = 1) -> Packed:
    """Random levels of a linear of ``k`` to ``n`` channels, its scales and bias."""
    if bits == 4:
        weight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=DEVICE)
    else:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=DEVICE)
    scale = (torch.rand(n, 1, device=DEVICE) + 0.5) * k**-0.5 / 4.6
    bias = torch.randn(n, device=DEVICE)
    return Packed(weight, scale, bias, Grids(bits, activation_bits, True, k, hadamard))


def right() -> dict[str, Any]:
    """Relative errors of products, and shares of levels that are one off; memory held NaN before."""
    worst: dict[str, float] = defaultdict(float)
    for m in TOKENS:
        for n, k in WIDTHS:
            for bits, activation_bits in ((4, 8), (8, 8), (4, 4)):
                given, x = packed(n, k, bits, activation_bits), torch.randn(m, k, device=DEVICE)
                bound = GpuBackend().linear(given)
                levels = bound.quantize(x)
                poison = torch.full((m, n), torch.nan, device=DEVICE)
                del poison  # PyTorch's allocator gives its memory to the result
                q, scale = levels.q.cpu().double(), levels.scale.cpu().double()[:, None]
                if bits == 4:
                    q = torch.stack([q[:, : k // 2], q[:, k // 2 :]], 2).flatten(1)
                low, high = level_range(activation_bits)
                exact = (x.cpu().double() / scale).round().clamp(low, high)
                off = (q - exact).abs()
                assert off.max() <= 1, f"levels of {k} channels are {off.max()} off"
                weight = given.weight.cpu().long()
                if bits == 4:
                    weight = torch.stack([weight & 15, weight >> 4], -1).flatten(1) - 8
                dense = weight.double() * given.scale.cpu().double()
                expected = q * scale @ dense.T + given.bias.cpu().double()
                found = bound.multiply(levels, torch.float32).cpu().double()
                error = float((found - expected).norm() / expected.norm())
                assert error < 1e-6, f"W{bits}A{activation_bits}, {m} x {n} x {k}: {error}"
                name = f"W{bits}A{activation_bits}"
                worst[f"{name} error"] = max(worst[f"{name} error"], error)
                worst[f"{name} levels off"] = max(
                    worst[f"{name} levels off"], float((off > 0).double().mean())
                )
    return dict(worst)


def chunks() -> dict[str, Any]:
    """The bundled policy, W4A8 without calibration: its chunk here, and on the CPU."""
    here = Subject("reference", Recipe.w4a8(), device=str(DEVICE)).load()
    there = Subject("reference", Recipe.w4a8()).load()
    observation, errors, same = example(there), [], 0
    for seed in range(1 if DRY else 20):
        expected, found = there.step(observation, seed=seed), here.step(observation, seed=seed)
        errors.append(float(np.linalg.norm(found.chunk - expected.chunk) / np.linalg.norm(expected.chunk)))
        assert expected.selection is not None
        assert found.selection is not None
        same += int(torch.equal(found.selection.mask, expected.selection.mask))
    return {"relative_errors": errors, "same_tokens": same, "limit": 0.01}


def ceilings() -> dict[str, Any]:
    if DRY:
        return {}
    a = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    x, y = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    i, j = (torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device=DEVICE) for _ in range(2))
    rate = {
        "copy_TB_s": 2 * a.numel() / min(milliseconds(lambda: b.copy_(a))) / 1e9,
        "bf16_TFLOP_s": 2 * 8192**3 / min(milliseconds(lambda: x @ y)) / 1e9,
        "int8_TOP_s": 2 * 8192**3 / min(milliseconds(lambda: torch._int_mm(i, j.T))) / 1e9,
    }
    torch.cuda.empty_cache()
    return rate


def step(policy: Policy, graph: bool) -> dict[str, Any]:
    """A step's time on the device and as it is called, its stages captured one by one, and its memory."""
    observation = example(policy)
    given = policy._prepare(observation, 0, None).to(lambda x: x.to(DEVICE))
    policy.to(DEVICE, graph=graph)
    held = 0  # what forms measured before have left: their graphs, and weights that this one does not have
    if not DRY:
        held = torch.cuda.memory_allocated() - weight_bytes(policy)
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        policy.step(observation, seed=0)
        row: dict[str, Any] = {"device": percentiles(milliseconds(partial(policy._direct, [given]), graph))}
        walls = []
        for seed in range(1 if DRY else 30):
            begin = time.perf_counter()
            policy.step(observation, seed=seed)
            walls.append(1e3 * (time.perf_counter() - begin))
        row["called"] = percentiles(walls)
        row["peak_bytes"] = 0 if DRY else torch.cuda.max_memory_allocated() - held
        row["weight_bytes"] = weight_bytes(policy)
        if graph:
            times = device.DeviceTimes(replace(policy), graph)
            row["stages_ms"] = times.stages(observation, None, within_s=0.3)
    return row


def steps() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shape, config in (TINY if DRY else SHAPES).items():
        found[shape] = attempt(partial(forms, config))
        say(shape, {name: value for name, value in found[shape].items() if not isinstance(value, dict)})
        if not DRY:
            torch.cuda.empty_cache()
    return found


def forms(config: ModelConfig) -> dict[str, Any]:
    """A policy of random weights in each of its forms, and how many times as long the rivals take."""
    small, rows = random_policy(config, Recipe.w4a8(0.5 if DRY else 0.4), DEVICE), {}
    rows["w4a8 pruned"] = step(small, True)
    rows["w4a8"] = step(unpruned(small), True)
    dense = CANDIDATES["torch-bf16"].make(small)
    rows["bf16 graph"], rows["bf16"] = step(dense, True), step(dense, False)
    p50 = {name: row["device"]["p50_ms"] for name, row in rows.items()}
    return rows | {
        "pruned_over_bf16_graph": p50["bf16 graph"] / p50["w4a8 pruned"],
        "unpruned_over_bf16_graph": p50["bf16 graph"] / p50["w4a8"],
        "pruned_over_bf16": p50["bf16"] / p50["w4a8 pruned"],
    }


def attempt(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a part, or the reason of its failure, which does not end the others."""
    try:
        return part()
    except Exception as problem:
        if DRY:
            raise
        return {"failed": f"{type(problem).__name__}: {problem}"}


def products() -> dict[str, Any]:
    """Microseconds of a product by every tile, and by cuBLAS in bfloat16; weights come from memory."""
    table: dict[str, Any] = {}
    for name, (n, k) in PRODUCTS.items():
        copies = 1 if DRY else max(1, 120_000_000 // (n * k // 2))
        bound = [GpuBackend().linear(packed(n, k)) for _ in range(copies)]
        dense = [torch.randn(n, k, dtype=torch.bfloat16, device=DEVICE) for _ in range(min(copies, 6))]
        for m in TOKENS[-3:]:
            x = torch.randn(m, k, device=DEVICE).bfloat16()
            levels, row = bound[0].quantize(x), {}
            for tile in TILES[:2] if DRY else TILES:
                if tile.tokens >= 2 * m and tile.tokens > 16:
                    continue
                row[str(tile)] = _us(partial(_multiply, bound, levels, tile), copies)
            best = min((us for us in row.values() if isinstance(us, float)), default=0.0)
            row["cuBLAS bf16"] = _us(partial(_dense, x, dense), len(dense))
            table[f"{name}, {m} tokens"] = row
            say(name, m, f"{best:.1f} us,", "cuBLAS", row["cuBLAS bf16"])
    return table


def _multiply(bound: list[Any], levels: Any, tile: Tile) -> list[Tensor]:
    linear.choose = lambda *_: tile
    return [one.multiply(levels, torch.bfloat16) for one in bound]


def _dense(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [F.linear(x, weight) for weight in weights]


def _us(function: Callable[[], Any], count: int) -> float | str:
    try:
        return float(np.median(milliseconds(function, seconds=0.05))) * 1e3 / count
    except Exception as problem:
        return type(problem).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="small sizes on the CPU, in Triton's interpreter")
    path, report = parser.parse_args().json, {}
    try:
        check_device(DEVICE)
    except InputError as problem:
        sys.exit(f"{problem}; --dry runs all of it small on one")
    report["versions"] = {"torch": torch.__version__, "triton": triton.__version__}
    report["gpu"] = None if DRY else torch.cuda.get_device_name()
    usual = linear.choose
    for part in (right, chunks, ceilings, steps, products):  # what matters most comes first
        report[part.__name__] = attempt(part)
        linear.choose = usual
        say(part.__name__, report[part.__name__] if part not in (steps, products) else "done")
        write_json(path, report)


if __name__ == "__main__":
    main()
