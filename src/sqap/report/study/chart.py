"""Geometry of a study's charts; the template draws what is computed here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

Cell = Mapping[str, Any]  # one of `cells` in study.json
Scale = Callable[[float], float]

PALETTE = 8  # colours that the page's style sheet has
FEW = 3  # cells whose names fit into a chart
SHAPES = ("circle", "square", "diamond", "triangle", "cross", "plus", "wedge", "bar")
QUANTIZATION, PRUNING = ("bits", "rotation", "rounding"), ("criteria", "after")


@dataclass(frozen=True)
class Tick:
    """A line of the grid: its place in pixels, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Mark:
    """A cell in a chart.

    Args:
        x: place, pixels.
        y: place, pixels.
        low: lower end of its interval, pixels.
        high: upper end.
        colour: number of its colour, below `PALETTE`.
        shape: one of `SHAPES`.
        text: what a pointer is shown.
        link: name of the cell, whose row in the table it leads to.
        label: what stands beside it; mostly nothing.
    """

    x: float
    y: float
    low: float
    high: float
    colour: int
    shape: str
    text: str
    link: str
    label: str = ""


@dataclass(frozen=True)
class Polyline:
    """Points that belong together, as the attribute of an SVG polyline."""

    points: str
    colour: int | None = None


@dataclass(frozen=True)
class Chart:
    """One chart of ``width`` x ``height`` pixels, with its axes' titles and what is in it."""

    title: str
    x_title: str
    y_title: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    marks: tuple[Mark, ...]
    lines: tuple[Polyline, ...]
    width: int
    height: int
    left: int = 56
    right: int = 20
    top: int = 26
    bottom: int = 46


def spoken(cell: Cell) -> str:
    """A cell in one line: its success with the interval, and its latency."""
    summary = cell["summary"]
    low, high = summary["success_ci95"]
    text = f"{cell['name']}: {100 * summary['success']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"
    return f"{text}, step p50 {_latency(cell):.1f} ms" if is_timed(cell) else text


def quantization(cell: Cell, varied: Iterable[str]) -> str:
    """How a cell is quantized, by the factors that the study varies."""
    levels = cell["levels"]
    words = [str(levels["bits"])]
    for name in ("rotation", "rounding"):
        if name in varied and levels[name] is not None:
            words.append(f"{name} {levels[name]}" if name == "rotation" else str(levels[name]))
    return ", ".join(words)


def criterion(cell: Cell, varied: Iterable[str]) -> str:
    """How a cell ranks its visual tokens; "unpruned" where it keeps all."""
    levels = cell["levels"]
    if levels["criteria"] is None:
        return "unpruned"
    return (
        f"{levels['criteria']}, after layer {levels['after']}"
        if "after" in varied
        else str(levels["criteria"])
    )


@dataclass(frozen=True)
class Legend:
    """Colours of quantizations and shapes of criteria, in the order in which they occur."""

    colours: Mapping[str, int]
    shapes: Mapping[str, str]
    varied: frozenset[str]

    @classmethod
    def of(cls, study: Mapping[str, Any]) -> Legend:
        """The legend of a study; colours and shapes are used again when there are too many."""
        varied = frozenset(name for name, levels in study["design"]["factors"].items() if len(levels) > 1)
        groups = dict.fromkeys(quantization(cell, varied) for cell in study["cells"])
        kinds = dict.fromkeys(criterion(cell, varied) for cell in study["cells"])
        return cls(
            {name: i % PALETTE for i, name in enumerate(groups)},
            {name: SHAPES[i % len(SHAPES)] for i, name in enumerate(kinds)},
            varied,
        )

    def colour(self, cell: Cell) -> int:
        """The colour of a cell's quantization."""
        return self.colours[quantization(cell, self.varied)]

    def shape(self, cell: Cell) -> str:
        """The shape of a cell's criterion."""
        return self.shapes[criterion(cell, self.varied)]


def pareto(study: Mapping[str, Any], legend: Legend) -> Chart | None:
    """Success against latency, with a line through the `frontier`; None without two latencies.

    Names stand beside the frontier's cells, or beside all where there are few.
    """
    cells = [cell for cell in ran(study) if is_timed(cell)]
    if len(cells) < 2:
        return None
    size = (460, 320) if len(cells) <= FEW else (760, 440)  # the small one fits into a phone's screen
    chart = _empty("Success against latency", "step latency p50, ms", "success, %", *size)
    x, x_ticks = _axis(0, max(_latency(c) for c in cells), chart.left, chart.width - chart.right)
    y, y_ticks = _success_axis(cells, chart)
    best = frontier(cells)
    named = _apart(
        cells if len(cells) <= FEW else best, lambda c: (x(_latency(c)), y(c["summary"]["success"]))
    )
    marks = [_mark(c, x(_latency(c)), y, legend, c["name"] if c in named else "") for c in cells]
    steps = [f"{x(_latency(c)):.1f},{y(c['summary']['success']):.1f}" for c in best]
    return _with(chart, x_ticks, y_ticks, marks, [Polyline(" ".join(steps))])


def _apart(cells: Sequence[Cell], place: Callable[[Cell], tuple[float, float]]) -> list[Cell]:
    """Those of ``cells`` whose names do not touch, the most successful first."""
    chosen: list[Cell] = []
    for cell in sorted(cells, key=lambda c: -c["summary"]["success"]):
        x, y = place(cell)
        if all(abs(x - u) > 170 or abs(y - v) > 15 for u, v in map(place, chosen)):
            chosen.append(cell)
    return chosen


def frontier(cells: Sequence[Cell]) -> list[Cell]:
    """The cells that no faster one, and none as fast, equals or beats in success; the fastest first.

    Cells that were not timed are left out.
    """
    best: list[Cell] = []
    for cell in sorted(filter(is_timed, cells), key=lambda c: (_latency(c), -c["summary"]["success"])):
        if not best or cell["summary"]["success"] > best[-1]["summary"]["success"]:
            best.append(cell)
    return best


def interactions(study: Mapping[str, Any], legend: Legend) -> list[Chart]:
    """For each criterion success against the tokens kept, a line for each quantization.

    A criterion is left out where no quantization has run with two numbers of tokens.
    """
    cells, varied = ran(study), legend.varied
    kinds = [kind for kind in legend.shapes if kind != "unpruned"]
    keeps = sorted({cell["levels"]["keep"] for cell in cells}, reverse=True)
    if not kinds or len(keeps) < 2:
        return []
    charts = [_interaction(kind, cells, keeps, legend, varied) for kind in kinds]
    return [chart for chart in charts if any(" " in line.points for line in chart.lines)]


def _interaction(
    kind: str, cells: Sequence[Cell], keeps: Sequence[float], legend: Legend, varied: frozenset[str]
) -> Chart:
    chart = _empty(kind, "share of visual tokens kept", "success, %", 380, 280)
    step = (chart.width - chart.left - chart.right) / len(keeps)
    places = {keep: chart.left + (i + 0.5) * step for i, keep in enumerate(keeps)}
    y, y_ticks = _success_axis(cells, chart)
    shown = [c for c in cells if criterion(c, varied) in (kind, "unpruned")]
    shown.sort(key=lambda c: (quantization(c, varied), -c["levels"]["keep"]))
    groups = [list(group) for _, group in groupby(shown, lambda c: quantization(c, varied))]
    marks, lines = [], []
    for number, group in enumerate(groups):
        aside = (number - (len(groups) - 1) / 2) * min(7, 0.7 * step / max(len(groups), 1))
        own = [_mark(c, places[c["levels"]["keep"]] + aside, y, legend) for c in group]
        marks += own
        lines.append(Polyline(" ".join(f"{m.x:.1f},{m.y:.1f}" for m in own), own[0].colour))
    return _with(chart, tuple(Tick(at, f"{keep:g}") for keep, at in places.items()), y_ticks, marks, lines)


def prediction(study: Mapping[str, Any], legend: Legend) -> Chart | None:
    """Success against the action error on replayed frames; None with fewer than three cells."""
    cells = [cell for cell in ran(study) if cell["replay"] is not None]
    if len(cells) < 3:
        return None
    chart = _empty(
        "Success against replayed error", "replayed action error, share of the spread", "success, %", 560, 340
    )
    x, x_ticks = _axis(0, max(c["replay"]["relative"] for c in cells), chart.left, chart.width - chart.right)
    y, y_ticks = _success_axis(cells, chart)
    return _with(
        chart, x_ticks, y_ticks, [_mark(c, x(c["replay"]["relative"]), y, legend) for c in cells], []
    )


def ran(study: Mapping[str, Any]) -> list[Cell]:
    """The cells of which episodes have run."""
    return [cell for cell in study["cells"] if cell["summary"] is not None]


def is_timed(cell: Cell) -> bool:
    """Whether steps of the cell were timed; not where every episode failed."""
    times = cell["summary"]["step_latency_ms"]
    return times is not None and times["p50"] is not None


def _latency(cell: Cell) -> float:
    return float(cell["summary"]["step_latency_ms"]["p50"])


def _empty(title: str, x_title: str, y_title: str, width: int, height: int) -> Chart:
    return Chart(title, x_title, y_title, (), (), (), (), width, height)


def _with(
    chart: Chart, x: Sequence[Tick], y: Sequence[Tick], marks: Sequence[Mark], lines: Sequence[Polyline]
) -> Chart:
    return replace(chart, x_ticks=tuple(x), y_ticks=tuple(y), marks=tuple(marks), lines=tuple(lines))


def _mark(cell: Cell, x: float, y: Scale, legend: Legend, label: str = "") -> Mark:
    summary = cell["summary"]
    low, high = summary["success_ci95"]
    colour, shape = legend.colour(cell), legend.shape(cell)
    return Mark(x, y(summary["success"]), y(low), y(high), colour, shape, spoken(cell), cell["name"], label)


def _success_axis(cells: Sequence[Cell], chart: Chart) -> tuple[Scale, tuple[Tick, ...]]:
    """In per cent, from a multiple of ten below the lowest interval to 100."""
    least = min(cell["summary"]["success_ci95"][0] for cell in cells)
    low = math.floor(10 * least) / 10
    return _axis(low, 1.0, chart.height - chart.bottom, chart.top, lambda value: f"{100 * value:.0f}")


def _axis(
    low: float, high: float, start: float, end: float, label: Callable[[float], str] = "{:g}".format
) -> tuple[Scale, tuple[Tick, ...]]:
    """A linear scale from ``start`` to ``end`` pixels, and ticks at round numbers."""
    high = high if high > low else low + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.ceil(high / step - 1e-9)
    top = last * step

    def scale(value: float) -> float:
        return start + (value - low) / (top - low) * (end - start)

    ticks = (round(i * step, 10) for i in range(first, last + 1))
    return scale, tuple(Tick(scale(value), label(value)) for value in ticks)
