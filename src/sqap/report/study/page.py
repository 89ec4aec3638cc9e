"""A study as one HTML file: self-contained, without a network, readable without JavaScript."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

from sqap.errors import InputError
from sqap.files import whole_file
from sqap.models.storage import size
from sqap.report import tables
from sqap.report.study.chart import Cell, Legend, frontier, interactions, is_timed, pareto, prediction, ran
from sqap.report.study.media import Media

FORMAT, VERSION = "sqap-study", 1
BEARABLE = 0.05  # loss of success that the page's summary asks about
ALPHA = 0.05
NONE = Media()


def write_page(study: Mapping[str, Any], path: Path, media: Media = NONE) -> None:
    """Write the page of a study, whole or not at all.

    Args:
        study: what study.json holds (docs/ablate.md).
        path: of the HTML file; its folder is made.
        media: pictures and videos to show.

    Raises:
        InputError: this is no study, or one of another version, or the file cannot be written.
    """
    page = render(study, media)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def read_study(path: Path) -> dict[str, Any]:
    """The study in a directory, or in its study.json.

    Raises:
        InputError: there is none, or it is of another version.
    """
    from sqap.serialization import read_json

    data = read_json(path / "study.json" if path.is_dir() else path, InputError)
    _check(data)
    return dict(data)


def render(study: Mapping[str, Any], media: Media = NONE) -> str:
    """The page as text; raises as `write_page` does."""
    _check(study)
    legend = Legend.of(study)
    template = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template.filters.update(
        percent=_percent, points=_points, number=_number, size=size, p=_p, interval=_interval, uri=_uri
    )
    return template.get_template("page.html").render(
        study=study,
        cells=ran(study),
        waiting=[cell["name"] for cell in study["cells"] if cell["summary"] is None],
        legend=legend,
        findings=findings(study),
        pareto=pareto(study, legend),
        frontier=[cell["name"] for cell in frontier(ran(study))],
        interactions=interactions(study, legend),
        prediction=prediction(study, legend),
        media=media,
        steps=study.get("steps"),
        settings=json.dumps(study["environment"]["simulator"]),
    )


def findings(study: Mapping[str, Any]) -> list[str]:
    """What came out, in sentences that the numbers alone decide."""
    cells = {cell["name"]: cell for cell in ran(study)}
    baseline = cells.get(study["design"]["baseline"])
    if baseline is None:
        return ["The baseline has not run yet."]
    summary = baseline["summary"]
    found = [
        f"{baseline['name']}, the baseline, succeeds in {summary['successes']} of {summary['episodes']} "
        f"episodes ({_percent(summary['success'])} %, {_interval(summary['success_ci95'])})."
    ]
    others = [cell for cell in cells.values() if cell["against_baseline"] is not None]
    if not others:
        return found
    if len(others) == 1:
        return [*found, _beside(baseline, *others)]
    worse = [cell for cell in others if _is_worse(cell)]
    found.append(
        f"{len(worse)} of {len(others)} other cells succeed significantly less often (exact McNemar test, "
        f"Holm's correction, {ALPHA:g})."
    )
    found.append(_fastest_safe(baseline, others))
    interactions = [c for c in study["contrasts"] if c["kind"] == "interaction"]
    if interactions:
        real = [c for c in interactions if c["p_holm"] is not None and c["p_holm"] < ALPHA]
        named = "; ".join(f"{c['name']}: {_points(c['difference'])} points" for c in real)
        found.append(
            f"{len(real)} of {len(interactions)} interactions of quantization with pruning are significant"
            f"{': ' + named if real else ''}."
        )
    return found


def _fastest_safe(baseline: Cell, others: list[Cell]) -> str:
    """The fastest cell whose interval excludes a loss of `BEARABLE`."""
    safe = [c for c in others if c["against_baseline"]["ci95"][0] > -BEARABLE and is_timed(c)]
    if not safe:
        return f"Of no cell can a loss of {100 * BEARABLE:g} points be excluded with 95 % confidence."
    best = min(safe, key=lambda c: c["summary"]["step_latency_ms"]["p50"])
    return (
        f"Of {len(safe)} cells a loss of {100 * BEARABLE:g} points can be excluded with 95 % confidence. The "
        f"fastest of them is {_costs(best, baseline)}."
    )


def _beside(baseline: Cell, other: Cell) -> str:
    """The only other cell of a study."""
    paired = other["against_baseline"]
    apart = "a significant loss" if _is_worse(other) else "no significant loss"
    return (
        f"{_costs(other, baseline)}. Pairs won : lost are {paired['wins']} : {paired['losses']}, {apart} "
        f"(exact McNemar test, {ALPHA:g})."
    )


def _costs(cell: Cell, baseline: Cell) -> str:
    """What a cell loses and gains: points of success, bytes and time."""
    paired = cell["against_baseline"]
    text = (
        f"{cell['name']}: {_points(paired['difference'])} points "
        f"({_interval(paired['ci95'], signed=True)}), {size(cell['weight_bytes'])} of weights"
    )
    if is_timed(baseline) and is_timed(cell):
        times = [c["summary"]["step_latency_ms"] for c in (cell, baseline)]
        text += f", {times[0]['p50']:.1f} ms a step against {times[1]['p50']:.1f} ms"
    return text


def _is_worse(cell: Cell) -> bool:
    paired = cell["against_baseline"]
    p = paired["mcnemar_p_holm"]
    return p is not None and p < ALPHA and paired["difference"] < 0


def _check(study: Any) -> None:
    if not isinstance(study, Mapping) or study.get("format") != FORMAT:
        raise InputError(f"this is no study: its format must be {FORMAT!r}")
    if study.get("version") != VERSION:
        raise InputError(
            f"this sqap reads studies of version {VERSION}, this one is of {study.get('version')}"
        )


def _source(name: str) -> str:
    return files("sqap.report.study").joinpath(name).read_text(encoding="utf-8")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(share: float) -> str:
    return tables.points(share).replace("-", "\N{MINUS SIGN}")


def _interval(ci95: tuple[float, float], signed: bool = False) -> str:
    if not signed:
        return tables.interval(ci95)
    return f"{_points(ci95[0])} to {_points(ci95[1])}"


def _number(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
