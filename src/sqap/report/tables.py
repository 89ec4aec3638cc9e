"""Results as Rich tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sqap.kernels import cpu
from sqap.models.storage import size as size
from sqap.quantization import LinearReport
from sqap.sensitivity import Option

if TYPE_CHECKING:  # only `sqap tune` and `sqap replay` need what these import
    from sqap.replay import Comparison
    from sqap.tune import Standing

Column = tuple[str, Mapping[str, Any]]  # label, and a summary as `sqap.evaluation.summary` makes it

UNANSWERED = ("refused", "superseded", "late")


def percent(share: float) -> str:
    """0.123 as 12.3 %."""
    return f"{100 * share:.1f} %"


def duration(ms: float) -> str:
    """Milliseconds, or seconds from the first one on."""
    return f"{ms:.1f} ms" if ms < 1e3 else f"{ms / 1e3:.2f} s"


def success_table(columns: Sequence[Column]) -> Table:
    """One row per task, and the totals with their 95 % intervals."""
    table = Table(title="Closed-loop success", title_justify="left")
    table.add_column("task")
    for label, _ in columns:
        table.add_column(label, justify="right")
    for task in columns[0][1]["tasks"]:
        counts = [summary["tasks"][task] for _, summary in columns]
        table.add_row(task, *(f"{c['successes']}/{c['episodes']}" for c in counts))
    table.add_section()
    table.add_row("success", *(percent(s["success"]) for _, s in columns), style="bold")
    table.add_row("95 % interval", *(interval(s["success_ci95"]) for _, s in columns))
    return table


def replay_table(compared: Comparison) -> Table:
    """One row for each dimension of an action: mean and largest absolute error, in robot units."""
    table = Table(title="Error per dimension, robot units: mean (largest)", title_justify="left")
    table.add_column("dimension")
    for name in ("recorded spread", *compared.errors):
        table.add_column(name, justify="right")
    for i, name in enumerate(compared.names):
        cells = [f"{error.mean[i]:.4g} ({error.largest[i]:.4g})" for error in compared.errors.values()]
        table.add_row(name, f"{compared.spread[i]:.4g}", *cells)
    return table


def replay_lines(compared: Comparison, every: int) -> str:
    """What was replayed, and the errors over all dimensions."""
    numbers = ", ".join(str(one["episode"]) for one in compared.episodes)
    actions = sum(one["frames"] for one in compared.episodes)
    known = [f"{name} {share:.3g}" for name, share in compared.relative.items() if share is not None]
    return (
        f"Episode{'s' * (len(compared.episodes) > 1)} {numbers}: {actions} recorded actions, {every} of each "
        f"chunk. Root mean square error, in units of each dimension's spread: "
        f"{', '.join(known) or 'none, since no dimension moves'}."
    )


def standings_table(standings: Sequence[Standing]) -> Table:
    """One row for each setting that is still in, the most promising first."""
    table = Table(title="Settings that go on", title_justify="left")
    left = ("recipe", "keep")
    for column in (*left, "step p50", "weights", "pairs", "minus original", "95 % interval"):
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    for s in standings:
        interval = difference_interval((s.low, s.high))
        cost = duration(s.cost.latency_ms), size(s.cost.weight_bytes)
        table.add_row(
            s.setting.recipe, s.setting.kept, *cost, str(s.episodes), points(s.difference), interval
        )
    return table


def confirmed_line(standing: Standing, max_drop: float | None) -> str:
    """What other seeds say about the setting that was found."""
    interval = f"{difference_interval((standing.low, standing.high))} at 95 %"
    cost = standing.cost
    says = (
        f"{standing.setting.name}: a step of {duration(cost.latency_ms)} ({duration(cost.fastest_ms)} to "
        f"{duration(cost.slowest_ms)}), {size(cost.weight_bytes)}; on {standing.episodes} pairs of other "
        f"seeds {points(standing.difference)} points ({interval})"
    )
    if max_drop is None:
        return says
    return f"{says}, which {'bears' if standing.difference >= -max_drop / 100 else 'does not bear'} that out"


def cost_table(columns: Sequence[Column], extra: Mapping[str, Sequence[str]] | None = None) -> Table:
    """Time, smoothness and memory; ``extra`` adds rows, name -> one cell per column."""
    table = Table(title="Cost", title_justify="left")
    table.add_column("")
    for label, _ in columns:
        table.add_column(label, justify="right")
    for name, cells in (extra or {}).items():
        table.add_row(name, *cells)
    for q in ("p50", "p95", "p99"):
        table.add_row(f"step latency {q}", *(_number(s["step_latency_ms"][q], "ms") for _, s in columns))
    table.add_row("peak memory of the process", *(size(s["peak_rss_bytes"]) for _, s in columns))
    table.add_row("steps to completion", *(_number(s["completion_steps"]) for _, s in columns))
    table.add_row("jerk", *(_number(s["jerk"], "m/s³") for _, s in columns))
    return table


def paired_line(against: Mapping[str, Any]) -> str:
    """The paired difference in one sentence."""
    return (
        f"Paired difference {points(against['difference'])} points "
        f"(95 % interval {difference_interval(against['difference_ci95'])}), "
        f"McNemar's exact p = {against['mcnemar_p']:.3f}"
    )


def parts_table(linears: Sequence[LinearReport], parts: Mapping[str, Mapping[str, int]]) -> Table:
    """The four parts: ``parameters`` and ``bytes`` as stored, and the bit-widths of their linears."""
    table = Table(title="Parts", title_justify="left")
    for column in ("part", "parameters", "linears", "quantized", "bits", "stored"):
        table.add_column(column, justify="left" if column in ("part", "bits") else "right")
    for part, counts in parts.items():
        mine = [linear for linear in linears if linear.part == part]
        bits = sorted({f"W{x.weight_bits}A{x.activation_bits}" for x in mine})
        table.add_row(
            part,
            f"{counts['parameters'] / 1e6:.2f} M",
            str(len(mine)),
            str(sum(x.quantized for x in mine)),
            ", ".join(bits),
            size(counts["bytes"]),
        )
    table.add_section()
    total = {key: sum(counts[key] for counts in parts.values()) for key in ("parameters", "bytes")}
    quantized = str(sum(x.quantized for x in linears))
    parameters = f"{total['parameters'] / 1e6:.2f} M"
    table.add_row("all", parameters, str(len(linears)), quantized, "", size(total["bytes"]))
    return table


def linears_table(linears: Sequence[LinearReport]) -> Table:
    """Every linear as it is stored."""
    table = Table(title="Linears", title_justify="left")
    for column in ("name", "shape", "weights", "activations", "scale per", "rotation", "bytes"):
        table.add_column(column, no_wrap=True)
    for x in linears:
        per = f"{x.granularity} of {x.group_size}" if x.group_size else x.granularity or "-"
        table.add_row(
            x.name,
            f"{x.out_features} x {x.in_features}",
            f"{x.weight_bits} bit" + ("" if x.quantized else " float"),
            f"{x.activation_bits} bit" + ("" if x.quantized else " float"),
            per,
            (x.rotation or "-") + (f" {x.hadamard_block}" if x.hadamard_block else ""),
            str(x.bytes),
        )
    return table


def options_table(title: str, options: Sequence[Option]) -> Table:
    """What each way to quantize costs, in bytes and on the robot."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True, min_width=max(len(option.name) for option in options))
    for column in ("stored", "mm a step", "mm a chunk", "gripper flips", "relative", "top-k overlap"):
        table.add_column(column, justify="right")
    for option in options:
        error = option.error
        table.add_row(
            option.name,
            size(option.weight_bytes),
            _figure(error.millimetres),
            _figure(error.drift),
            "-" if error.gripper_flips is None else percent(error.gripper_flips),
            f"{error.relative:.4f}",
            "-" if option.overlap is None else percent(option.overlap),
        )
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def interval(bounds: Sequence[float]) -> str:
    """The ends of a share's interval, in percent."""
    return f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"


def points(share: float) -> str:
    """A difference of success in points: 0.031 as +3.1."""
    return f"{100 * share:+.1f}"


def difference_interval(bounds: Sequence[float]) -> str:
    """The ends of a difference's interval, in points."""
    return f"{points(bounds[0])} to {points(bounds[1])}"


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.1f} {unit}".rstrip()


def kernels_table(found: Mapping[str, Any]) -> Table:
    """`sqap.kernels.cpu.describe` as a table: each path, what it needs, if it is in use, and its check."""
    state = {(True, True): "in use", (True, False): "runs here", (False, False): "not on this processor"}
    table = Table(title=f"{found['processor']}, {found['threads']} threads", title_justify="left")
    for column in ("kernels", "need", "", "check"):
        table.add_column(column)
    table.caption = f"Checked: that small products and layers are the same as those of {cpu.PORTABLE!r}."
    for path in found["paths"]:
        style = "bold" if path["used"] else "red" if path["differs"] else None
        check = f"wrong: {path['differs']}" if path["differs"] else "right" if path["checked"] else ""
        table.add_row(path["name"], path["needs"], state[path["runs"], path["used"]], check, style=style)
    if not found["built"]:
        table.caption = "The native kernels are not built: install sqap with pip, from its source or a wheel."
    return table


def gpus_table(found: Mapping[str, Any]) -> Table:
    """`sqap.kernels.gpu.describe.describe` as a table: each GPU, what multiplies there, and why."""
    title = f"PyTorch for CUDA: {found['torch_cuda'] or 'no'}, Triton: {found['triton'] or 'no'}"
    table = Table(title=title, title_justify="left")
    for column in ("GPU", "compute capability", "memory", "backend", ""):
        table.add_column(column)
    for gpu in found["gpus"]:
        memory, backend = size(gpu["memory_bytes"]), gpu["backend"] or "none"
        table.add_row(gpu["name"], gpu["capability"], memory, backend, gpu["reason"])
    table.caption = found["reason"]
    return table


def capacity_table(found: Mapping[str, Any]) -> Table:
    """`sqap.capacity.planning.plan` as a table: a row for each number of replicas that was simulated."""
    load, rows = found["load"], found["rows"]
    lost = [name for name in UNANSWERED if any(row["unanswered"][name] for row in rows)]
    table = Table(title=f"{load['robots']} robots at {load['rate_hz']:g} Hz, in ms", title_justify="left")
    for column in ("replicas", "p50", "p99", "95 %", "Hz", "busy", "a step", *lost):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row["replicas"]),
            *(_milliseconds(row[f"p{q}_ms"]) for q in (50, 99)),
            "-".join(map(_milliseconds, row["p99_ci95_ms"])) if row["p99_ms"] else "",
            f"{row['rate_hz']:.2f}",
            f"{100 * row['utilisation']:.0f} %",
            f"{row['robots_a_step']:.1f}",
            *(percent(row["unanswered"][name]) for name in lost),
            style="bold" if row["replicas"] == found["replicas"] else None,
        )
    return table


def _milliseconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def bench_tables(report: Mapping[str, Any]) -> list[Table]:
    """`sqap.benchmark.bench` as tables: times, memory, and where each candidate spends its step."""
    machine = report["machine"]
    subject = report["subject"]
    if report["layers"] is not None:
        subject += f", {report['layers']} decoder layers"
    title = f"{subject}: {machine['processor']}, {report['threads']} threads, {machine['kernels']}"
    steps = _numbers(title, ("step p50", "p90", "p99", "sqap is faster by"))
    device = _numbers("On the GPU alone, by events", ("step p50", "p90", "p99", "sqap is faster by"))
    memory = _numbers("Memory", ("weights", "peak memory", "load"))
    spent: dict[str, Mapping[str, float]] = {}
    reasons = []
    for name, row in report["candidates"].items():
        if "reason" in row:
            reasons.append(f"{name}: {row['reason']}")
            continue
        ratio = report["speedup_over"].get(name, {})
        steps.add_row(name, *_percentiles(row), _speedup(ratio))
        if "device_ms" in row:
            faster = f"{ratio['device_median']:.2f}" if ratio else ""
            device.add_row(name, *_percentiles(row["device_ms"]), faster)
        if "no_stages" in row:
            reasons.append(f"{name} has no stages: {row['no_stages']}")
        peak = row.get("peak_device_bytes", row.get("peak_rss_bytes", 0))
        sizes = [size(row["weight_bytes"]), size(peak)]
        memory.add_row(name, *sizes, duration(1e3 * row["load_s"]))
        if row["stages_ms"]:
            spent[name] = row["stages_ms"]
    stages = _numbers("Stages, median", tuple(spent))
    for stage in dict.fromkeys(stage for times in spent.values() for stage in times):
        stages.add_row(stage, *(duration(times[stage]) if stage in times else "" for times in spent.values()))
    steps.caption = "; ".join(reasons) or None
    return [steps, *([device] if device.row_count else []), memory, stages]


def _percentiles(times: Mapping[str, Any]) -> list[str]:
    return [duration(times[f"p{q}_ms"]) for q in (50, 90, 99)]


def _numbers(title: str, columns: Sequence[str]) -> Table:
    """A table of numbers behind a column of names, none of them broken over lines."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _speedup(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else ""
