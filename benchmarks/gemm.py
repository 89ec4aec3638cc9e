"""Matrix products of 7B shapes beside every tool's: python benchmarks/gemm.py --json P --peers DIR

Each candidate multiplies the same weights in a process of its own, in turns with the others, from floats to
floats; what the processor and its memory can do at most is measured in between. docs/gemm.md says what it all
means, and how to make the peers' environments in DIR.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peers.gemm_process import Ceilings, Failed, Process
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import sqap
from sqap.files import write_json
from sqap.kernels import cpu
from sqap.process import available_cores

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # (n, k): attention, up and down projections
TOKENS = (1, 16, 34, 176, 280)
TURN_MS = 60.0
CALLS = 16  # of a turn, at most
PAUSE_S = 0.02  # between turns: other libraries' threads spin for a while after a call
EIGHT, FOUR = 0.05, 0.2  # relative errors that 8 and 4 bits of normal inputs explain


class Candidate(NamedTuple):
    """``bits`` are what a weight takes in memory, scales included; ``error`` is how far off it may be."""

    peer: str
    method: str
    bits: float
    error: float = EIGHT

    @property
    def name(self) -> str:
        return f"{self.peer} {self.method}"


CANDIDATES = (
    Candidate("sqap", "w4a8", 4),
    Candidate("sqap", "w4a8-g128", 4.25),
    Candidate("sqap", "w4a4", 4, FOUR),
    Candidate("sqap", "w4a4-a32", 4, FOUR),
    Candidate("sqap", "w8a8", 8),
    Candidate("torch", "fp32", 32),
    Candidate("torch", "bf16", 16),
    Candidate("torch", "int8-x86", 8),
    Candidate("torch", "int8-onednn", 8),
    Candidate("torch", "int8-static", 8),
    Candidate("torch", "int4pack", 4.25),
    Candidate("openvino", "int8-static", 8),
    Candidate("openvino", "int8", 8),
    Candidate("openvino", "int4-g128", 4.125),
    Candidate("onnxruntime", "int8", 8),
    Candidate("onnxruntime", "int4-g128", 4.25),
    Candidate("onnxruntime", "int4-g32", 5),
    Candidate("llamacpp", "q4_0", 4.5),
    Candidate("llamacpp", "q8_0", 8.5),
)


@dataclass
class Cell:
    """One candidate at one shape: ``reason`` is why there are no times."""

    n: int
    k: int
    m: int
    candidate: Candidate
    ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    error: float | None = None
    reason: str | None = None
    calls: int = 1  # of a turn

    def row(self, copies: int) -> dict[str, Any]:
        """What the JSON says of it."""
        row: dict[str, Any] = {"n": self.n, "k": self.k, "m": self.m, "candidate": self.candidate.name}
        row |= {} if self.error is None else {"error": self.error}
        if self.reason is not None or not self.ms:
            return row | {"reason": self.reason or "interrupted before it was timed"}
        median = float(np.median(self.ms))
        row |= {"gops": 2e-6 * self.n * self.k * self.m / median, "ms": median, "min_ms": min(self.ms)}
        row |= {"spread": np.percentile(self.ms, (10, 90)).tolist(), "cpu_ms": float(np.median(self.cpu_ms))}
        row |= {"calls": len(self.ms), "copies": copies}
        if self.m == 1:
            row["gbs"] = self.n * self.k * self.candidate.bits / 8e6 / median
        return row


def copies_of(n: int, k: int, bits: float) -> int:
    """How many weights take turns, so that none is in a cache when its turn comes again."""
    return max(2, math.ceil(2 * cache_bytes() / (n * k * bits / 8)))


def cache_bytes() -> int:
    """Of the last level; 64 MiB if nobody says."""
    found = [64 << 20]
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    with contextlib.suppress(OSError, ValueError):
        found = [int(size.read_text().strip().removesuffix("K")) << 10 for size in sizes] or found
    return max(found)


class Run:
    """All candidates, at all shapes."""

    def __init__(self, candidates: Collection[Candidate], threads: int, rounds: int, folder: Path) -> None:
        self.candidates, self.threads, self.rounds, self.folder = candidates, threads, rounds, folder
        self.cells: list[Cell] = []
        self.versions: dict[str, str] = {}
        self.ceilings = Ceilings(cpu.chosen(), threads, folder)
        self._processes: dict[str, Process] = {}
        self._reasons: dict[str, str] = {}  # why a candidate has no process

    def start(self, environments: Path | None) -> None:
        """Start every process. They import what they need, and wait."""
        for candidate in self.candidates:
            log = self.folder / f"{candidate.name}.log"
            try:
                process = Process(candidate.peer, candidate.method, self.threads, environments, log)
            except (Failed, OSError) as problem:
                self._reasons[candidate.name] = str(problem)
                continue
            self._processes[candidate.name] = process
            self.versions |= process.versions

    def close(self) -> None:
        for process in self._processes.values():
            process.close()

    def shape(self, n: int, k: int, tokens: Collection[int], tell: Callable[[str, int], None]) -> None:
        """One weight, at all numbers of tokens; ``tell`` gets what is timed after every turn."""
        dense = self._draw(n, k)
        reasons = dict(self._reasons)
        for candidate in self.candidates:
            name = candidate.name
            if name not in reasons:
                try:
                    copies = copies_of(n, k, candidate.bits)
                    self._processes[name].ask(load=str(self.folder), copies=copies)
                except Failed as problem:
                    reasons[name] = str(problem)
        for m in tokens:
            cells = [Cell(n, k, m, c, reason=reasons.get(c.name)) for c in self.candidates]
            self.cells += cells
            self.ceilings.look()
            self._bind(cells, dense)
            for _ in range(self.rounds):
                for cell in cells:
                    self._turn(cell)
                    tell(f"{n} x {k}, {m} tokens", 1)

    def _draw(self, n: int, k: int) -> torch.Tensor:
        """Write the levels and scales for everybody; the same in float32 ``(n, k)``."""
        generator = np.random.default_rng(n * k)
        levels = generator.integers(-8, 8, (n, k), dtype=np.int8)
        levels[:, ::32] = -8
        scale = generator.uniform(0.5, 1.5, n).astype(np.float32) / (8 * math.sqrt(k))
        np.save(self.folder / "levels.npy", levels)
        np.save(self.folder / "scale.npy", scale)
        return torch.from_numpy(levels).float().mul_(torch.from_numpy(scale)[:, None])

    def _bind(self, cells: Collection[Cell], dense: torch.Tensor) -> None:
        """Give everybody the same input, look at what comes out, and see how long it takes."""
        x = np.random.default_rng(cells[0].m).standard_normal((cells[0].m, cells[0].k), dtype=np.float32)
        exact = (torch.from_numpy(x) @ dense.T).numpy()
        given, made = self.folder / "x.npy", self.folder / "y.npy"
        np.save(given, x)
        for cell in cells:
            if cell.reason is not None:
                continue
            try:
                ms = self._processes[cell.candidate.name].ask(input=str(given), output=str(made))["ms"]
            except Failed as problem:
                cell.reason = str(problem)
                continue
            cell.calls = int(np.clip(TURN_MS / ms, 1, CALLS))
            cell.error = float(np.linalg.norm(np.load(made) - exact) / np.linalg.norm(exact))
            if not cell.error <= cell.candidate.error:
                cell.reason = f"wrong by {cell.error:.2g}, where its bits explain {cell.candidate.error}"

    def _turn(self, cell: Cell) -> None:
        if cell.reason is not None:
            return
        time.sleep(PAUSE_S)
        warm = int(cell.calls > 1)  # wakes the threads
        try:
            times = self._processes[cell.candidate.name].ask(calls=cell.calls, warm=warm)
        except Failed as problem:
            cell.reason = str(problem)
            return
        cell.ms += times["ms"]
        cell.cpu_ms += times["cpu_ms"]

    def report(self) -> dict[str, Any]:
        """The file that ``--json`` names."""
        rows = [cell.row(copies_of(cell.n, cell.k, cell.candidate.bits)) for cell in self.cells]
        return {
            **self.ceilings.best,
            "threads": self.threads,
            "rounds": self.rounds,
            "rows": rows,
            "machine": {
                "processor": cpu.describe()["processor"],
                "cores": available_cores(),
                "cache_bytes": cache_bytes(),
                "kernels": cpu.chosen(),
                "system": platform.platform(),
                "load": os.getloadavg(),
            },
            "versions": {"python": platform.python_version(), "sqap": sqap.__version__, **self.versions},
        }


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Everything that was asked for. Interrupted, it reports what it has."""
    threads = args.threads or available_cores()
    torch.set_num_threads(threads)
    wanted = [c for c in CANDIDATES if not args.only or any(part in c.name for part in args.only.split(","))]
    tokens = [int(m) for m in args.tokens.split(",")] if args.tokens else TOKENS
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes.split(",")] if args.shapes else SHAPES
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        run = Run(wanted, threads, args.rounds, Path(folder))
        total = len(shapes) * len(tokens) * args.rounds * len(wanted)
        bar = progress.add_task("starting", total=total)

        def tell(what: str, done: int = 0) -> None:
            progress.update(bar, description=what, advance=done)

        try:
            run.start(args.peers)
            for n, k in shapes:
                tell(f"{n} x {k}: loading")
                run.shape(n, k, tokens, tell)
        except KeyboardInterrupt:
            console.print("interrupted")
        finally:
            run.close()
        return run.report()


def grids(result: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """A title, a header and lines of cells for every shape."""
    rows = {(r["n"], r["k"], r["m"], r["candidate"]): r for r in result["rows"]}
    tokens = sorted({m for _, _, m, _ in rows})
    for n, k in dict.fromkeys((n, k) for n, k, _, _ in rows):
        heads = ["1 token, ms" if m == 1 else f"{m} tokens, GOPS" for m in tokens]
        names = dict.fromkeys(name for *_, name in rows)
        lines = []
        for name in names:
            found = [rows.get((n, k, m, name)) for m in tokens]
            lines.append([name, *(cell_text(row, result) for row in found)])
        yield f"{n} x {k}", ["candidate", *heads], lines


def cell_text(row: Mapping[str, Any] | None, result: Mapping[str, Any]) -> str:
    """Speed and share of the ceiling: of the memory's for one token, of the integers' for more."""
    if row is None or "reason" in row:
        return "-"
    one = row["m"] == 1
    ceiling = result["bandwidth_gbs" if one else "peak_gops"]
    share = f" ({100 * row['gbs' if one else 'gops'] / ceiling:.0f} %)" if ceiling else ""
    return (f"{row['ms']:.2f}" if one else f"{row['gops']:.0f}") + share


def reasons(result: Mapping[str, Any]) -> dict[str, str]:
    """Why candidates have no figure, each reason once."""
    return {row["candidate"]: row["reason"] for row in result["rows"] if "reason" in row}


def markdown(result: Mapping[str, Any]) -> str:
    """The tables of docs/gemm.md."""
    lines = []
    for title, header, cells in grids(result):
        lines += [f"**{title}**", "", f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        lines += [f"| {' | '.join(line)} |" for line in cells] + [""]
    lines += [f"- {name}: {reason}" for name, reason in reasons(result).items()]
    return "\n".join(lines).rstrip()


def show(result: Mapping[str, Any], console: Console) -> None:
    """The tables on a terminal, and between which times the middle four fifths of the calls lie."""
    for title, header, cells in grids(result):
        table = Table(*header, title=title)
        for line in cells:
            table.add_row(*line)
        console.print(table)
    spread = Table("candidate", "shape", "tokens", "median ms", "min", "p10", "p90", title="Calls")
    for row in result["rows"]:
        if "ms" in row:
            times = (row["ms"], row["min_ms"], *row["spread"])
            shape = f"{row['n']} x {row['k']}", str(row["m"])
            spread.add_row(row["candidate"], *shape, *(f"{t:.2f}" for t in times))
    console.print(spread)
    for name, reason in reasons(result).items():
        console.print(f"{name}: {reason}", markup=False)
    ceilings = {name: value for name, value in result.items() if name.startswith(("peak", "bandw", "ceil"))}
    console.print(f"{result['threads']} threads; at most {ceilings}", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument(
        "--threads", type=int, help="of each candidate; as many as there are cores if not given"
    )
    parser.add_argument("--peers", type=Path, help="folder of virtual environments named after the peers")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each candidate")
    parser.add_argument("--only", help="candidates whose names contain one of these, with commas between")
    parser.add_argument("--tokens", help="numbers of tokens, with commas between")
    parser.add_argument("--shapes", help="n x k like 4096x4096, with commas between")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown")
    parser.add_argument(
        "--show", type=Path, help="print the tables of an earlier run's JSON; measure nothing"
    )
    args = parser.parse_args()
    console = Console()
    result = json.loads(args.show.read_text()) if args.show else measure(args, console)
    if args.json:
        write_json(args.json, result)
    if args.markdown:
        print(markdown(result))
    else:
        show(result, console)


if __name__ == "__main__":
    main()
