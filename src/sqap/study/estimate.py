"""What a study will take, told before anything runs."""

from __future__ import annotations

from typing import Any

from sqap.policy import Policy
from sqap.study.design import Design
from sqap.study.request import StudyRequest, probe
from sqap.study.result import CHANGES, power


def estimate(request: StudyRequest, design: Design, policy: Policy) -> dict[str, Any]:
    """``estimate`` of ``docs/ablate.md``: from one episode of the original, which is run and not kept.

    Episodes in the logs of this build and these settings are counted by their lines; whether they are the
    same policies' is known when these are there.
    """
    mark = request.settings().mark
    total = request.pairs * len(design.cells)
    lines = {cell.name: 0 for cell in design.cells}
    for path in request.out.glob(f"episodes/*-{mark}.jsonl"):
        name = path.name.removesuffix(f"-{mark}.jsonl").rpartition("-")[0]
        if name in lines:
            with path.open("rb") as file:
                lines[name] = min(request.pairs, max(lines[name], sum(1 for _ in file)))
    from_log = sum(lines.values())
    seconds = probe(policy, request)
    return {
        "episodes": total,
        "from_log": from_log,
        "compressions": len({cell.recipe.quantization for cell in design.cells} - {None}),
        "seconds_per_episode": seconds,
        "measured_from": "probe",
        "hours": (total - from_log) * seconds / request.workers / 3600,
    }


def sentences(expected: dict[str, Any], request: StudyRequest) -> list[str]:
    """The estimate and what so many pairs can show, in words."""
    known = f", {expected['from_log']} of them in the log" if expected["from_log"] else ""
    shown = power({}, request.pairs)
    needed = ", ".join(f"{100 * change:g} points {shown['pairs_needed'][str(change)]}" for change in CHANGES)
    least = shown["detectable"]
    return [
        f"{expected['episodes']} episodes{known}: about {_span(expected['hours'])} at {request.workers} at a "
        f"time, by one episode of the original that took {expected['seconds_per_episode']:.1f} s; besides, "
        f"{expected['compressions']} quantizations and their calibration",
        f"{request.pairs} pairs show a change "
        + ("of no size" if least is None else f"of {100 * least:.1f} points")
        + f" with a power of {shown['power']:.0%} where {shown['discordance']:.0%} of the pairs differ; to "
        f"see a change takes so many pairs: {needed}",
    ]


def _span(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
