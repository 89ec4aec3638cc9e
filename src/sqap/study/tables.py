"""A study in the terminal: the design before, the cells and contrasts after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from sqap.report.tables import difference_interval, interval, percent, points
from sqap.study.design import Design


def design_lines(design: Design) -> list[str]:
    """The design in words: what is run, merged, left out, and cannot be told apart."""
    varied = [f"{name} {', '.join(map(str, levels))}" for name, levels in design.factors.items()]
    lines = [
        f"{design.kind}, {design.fraction} of {design.runs} combinations: {len(design.cells)} cells",
        f"factors: {'; '.join(varied)}",
        f"every cell is compared with {design.baseline}",
    ]
    lines += [f"{merged.runs} combinations merged: {merged.reason}" for merged in design.merged]
    lines += [f"left out, as it cannot be: {each.levels}: {each.reason}" for each in design.impossible]
    if design.generators:
        lines.append(f"resolution {design.resolution}, by {', '.join(design.generators)}")
    return [*lines, *design.aliasing]


def cells_table(study: Mapping[str, Any]) -> Table:
    """One row for each cell that has run."""
    table = Table(title="Cells", title_justify="left")
    table.add_column("cell", no_wrap=True)
    for column in ("success", "95 % interval", "minus baseline", "p (Holm)", "replay error", "p50", "failed"):
        table.add_column(column, justify="right")
    for cell in study["cells"]:
        summary, pair, replay = cell["summary"], cell["against_baseline"], cell["replay"]
        if summary is None:
            continue
        p50 = summary["step_latency_ms"]["p50"]
        table.add_row(
            cell["name"],
            percent(summary["success"]),
            interval(summary["success_ci95"]),
            "" if pair is None else f"{points(pair['difference'])} ({difference_interval(pair['ci95'])})",
            "" if pair is None else f"{pair['mcnemar_p_holm']:.2g}",
            "" if replay is None else f"{replay['relative']:.3f}",
            "" if p50 is None else f"{p50:.1f} ms",
            str(summary["failed"] or ""),
        )
    return table


def contrasts_table(study: Mapping[str, Any]) -> Table:
    """One row for each contrast."""
    table = Table(title="Contrasts of success, in points", title_justify="left")
    table.add_column("contrast")
    for column in ("difference", "95 % interval", "p (Holm)"):
        table.add_column(column, justify="right")
    for each in study["contrasts"]:
        table.add_row(
            each["name"],
            points(each["difference"]),
            difference_interval(each["ci95"]),
            f"{each['p_holm']:.2g}",
        )
    return table


def findings(study: Mapping[str, Any]) -> list[str]:
    """What else the numbers say, in words."""
    lines = list(study["notes"])
    failed = [
        (cell["name"], f) for cell in study["cells"] for f in (cell["summary"] or {}).get("failures", ())
    ]
    lines += [f"failed: {name}, {f['task']}, seed {f['seed']}: {f['reason']}" for name, f in failed[:10]]
    if len(failed) > 10:
        lines.append(f"{len(failed) - 10} more episodes failed; study.json names them")
    prediction, power = study["prediction"], study["power"]
    if prediction is not None and prediction["spearman"] is not None:
        spearman, kendall = prediction["spearman"]["value"], prediction["kendall"]["value"]
        lines.append(
            f"replayed action error against success over {prediction['cells']} cells: rank correlation "
            f"{spearman:+.2f} (Spearman), {kendall:+.2f} (Kendall)"
        )
    if power["pairs_needed"]["0.03"] is not None:
        lines.append(
            f"{power['discordance']:.1%} of the pairs differ; to see a change of 3 points takes "
            f"{power['pairs_needed']['0.03']} pairs, this study has {power['pairs']} a cell"
        )
    return lines
