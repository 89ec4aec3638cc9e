"""Steps and stages by events, and `sqap bench --device cuda`, where a CPU stands for the GPU.

An event's time is the work that was done before it: every stage's modules count as many milliseconds as there
are in `WORK`. A graph is the function itself.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sqap.benchmark import Subject, bench, device
from sqap.benchmark.candidates import example
from sqap.benchmark.device import STAGES, DeviceTimes
from sqap.benchmark.shapes import random_policy
from sqap.benchmark.timing import Bench, Loaded, Timed
from sqap.errors import SqapError
from sqap.policy import Policy
from sqap.pruning import Selector
from sqap.recipe import Pruning, Recipe
from sqap.report.tables import bench_tables
from tests.test_graph import PRUNINGS, tensors, with_pruning
from tests.tiny import tiny_policy

MODEL = tiny_policy().config.model
WORK = {"vision": 1.0, "projector": 100.0, "decoder": 1e3, "selection": 1e5, "head": 1e6}


class Work:
    """What was done so far."""

    def __init__(self) -> None:
        self.done, self.graphs = 0.0, 0

    def add(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.done += WORK[name]

        return hook

    def watch(self, policy: Policy) -> None:
        model: Any = policy.model
        parts = {
            "vision": [block for encoder in model.vision for block in encoder.blocks],
            "projector": [model.projector],
            "decoder": model.decoder.layers,
            "head": [model.head.final_layer],
        }
        for name, modules in parts.items():
            for module in modules:
                module.register_forward_hook(self.add(name))


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    found = Work()

    class Event:
        def record(self) -> None:
            self.at = found.done

        def synchronize(self) -> None:
            self.waited_for = True

        def elapsed_time(self, end: Event) -> float:
            assert end.waited_for
            return end.at - self.at

    def capture(function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        found.graphs += 1
        for _ in range(2):
            result = function()

        def replay() -> None:
            again = function()
            for old, new in zip(tensors(result or ()), tensors(again or ()), strict=True):
                old.copy_(new)

        return result, replay

    select = Selector.select

    def chosen(self: Selector, *given: Any, **more: Any) -> Any:
        found.add("selection")()
        return select(self, *given, **more)

    monkeypatch.setattr(Selector, "select", chosen)
    monkeypatch.setattr(device, "make_event", Event)
    monkeypatch.setattr(device, "capture_cuda", capture)
    monkeypatch.setattr(device, "REPLAYS", 3)
    return found


def expected(policy: Policy) -> dict[str, float]:
    """The work of a step."""
    model, cuts = policy.config.model, 0 if policy.recipe.pruning is None else len(policy.recipe.pruning.cuts)
    head: Any = model.head
    times = (
        sum(len(encoder.blocks) for encoder in policy.model.vision),  # type: ignore[arg-type]
        1,
        model.decoder.depth,
        cuts * model.cameras,
        head.sample_steps,
    )
    return {name: WORK[name] * count for name, count in zip(STAGES, times, strict=True)}


@pytest.fixture(scope="module")
def small() -> Policy:
    return random_policy(MODEL, Recipe.w4a8(keep=1))


@pytest.mark.parametrize("pruning", [None, *PRUNINGS.values()], ids=["all", *PRUNINGS])
def test_a_step_and_its_stages(small: Policy, work: Work, pruning: Pruning | None) -> None:
    plain, policy, seen = with_pruning(small, pruning), with_pruning(small, pruning), example(small)
    policy.model = copy.deepcopy(small.model)
    first = plain.step(seen, seed=0)
    second = plain.step(seen, seed=1, memory=first.memory)
    work.watch(policy)
    times, wanted = DeviceTimes(policy, graph=True), expected(policy)
    for i, memory in enumerate((None, first.memory)):
        policy.step(seen, seed=i, memory=memory)
        assert times.last() == sum(wanted.values())
    before = work.graphs
    assert before == (2 if pruning is not None and pruning.rest == "changed" else 1)
    assert times.stages(seen, first.memory) == wanted
    assert work.graphs - before == sum(map(bool, wanted.values()))
    found = policy.step(seen, seed=1, memory=first.memory)
    assert (found.chunk == second.chunk).all(), "the policy acts as it did"
    assert times.last() == sum(wanted.values())


def test_tokens_that_are_chosen_again_are_the_same(
    small: Policy, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, found, select = with_pruning(small, PRUNINGS["attention"]), [], Selector.select

    def chosen(*given: Any, **more: Any) -> Any:
        selection = select(*given, **more)
        found.append(selection.kept.tolist())
        return selection

    monkeypatch.setattr(Selector, "select", chosen)
    DeviceTimes(policy, graph=True).stages(example(small), None)
    assert len(found) == 1 + 2 + 3
    assert all(kept == found[0] for kept in found)


def test_what_python_launches_is_no_graph(small: Policy, work: Work) -> None:
    """By choice, or because tokens are chosen on the CPU."""
    for pruning, graph in ((PRUNINGS["look-ahead"], False), (Pruning(0.5, 1, "divprune"), True)):
        policy, seen = with_pruning(small, pruning), example(small)
        policy.model = copy.deepcopy(small.model)
        work.watch(policy)
        times = DeviceTimes(policy, graph)
        policy.step(seen, seed=0)
        assert work.graphs == 0
        assert times.last() == sum(expected(policy).values())
        if not graph:
            assert times.stages(seen, None) == expected(policy)
            assert work.graphs == 0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is found as "cuda"."""
    move = Policy.to
    monkeypatch.setattr(Subject, "load", lambda self: random_policy(MODEL, self.recipe))
    monkeypatch.setattr(Policy, "to", lambda self, device, graph=True: move(self, "cpu"))
    monkeypatch.setattr("sqap.benchmark.candidates.check_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)


@pytest.mark.parametrize(
    ("name", "graphs"),
    [("sqap", 1), ("sqap-unpruned", 1), ("torch-bf16", 0), ("torch-bf16-graph", 1), ("torch-int8", 1)],
)
def test_a_candidate_on_the_device(card: None, work: Work, name: str, graphs: int) -> None:
    timed = Bench((Subject("tiny", Recipe.w4a8(keep=0.5), device="cuda"), name, 1, None))
    assert isinstance(timed("load"), Loaded)
    work.watch(timed._policy)
    step, wanted = timed("step"), expected(timed._policy)
    assert isinstance(step, Timed)
    assert step.device_ms == sum(wanted.values())
    assert step.stages_ms == {}
    assert work.graphs == graphs
    assert timed("peak") == 1000
    assert timed("stages") == wanted


def test_what_is_compiled_as_a_whole_has_no_stages(
    card: None, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    timed = Bench((Subject("tiny", Recipe(), device="cuda"), "torch-compile", 1, None))
    timed("load")
    work.watch(timed._policy)
    step = timed("step")
    assert isinstance(step, Timed)
    assert step.device_ms == sum(expected(timed._policy).values())
    assert timed("stages") == {}


class OnACard:
    """Steps without a policy: 10 ms as it is called, 8 of them on the card."""

    def __init__(self, spec: tuple[Subject, str, int, Path | None]) -> None:
        self._name = spec[1]

    def __call__(self, request: str) -> Any:
        if request == "load":
            return Loaded(0.1, 10, torch.ones(2, 3).numpy())
        if request == "stages":
            if self._name == "torch-bf16":
                raise SqapError("memory ran out")
            return {"vision": 2.0, "projector": 1.0, "decoder": 3.0, "selection": 0.5, "head": 1.0}
        slower = 2.0 if self._name == "torch-bf16" else 1.0
        return Timed(10.0 * slower, {}, 8.0 * slower) if request == "step" else 100


def test_a_report_of_a_card(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default of so many replays that there is a p99."""
    monkeypatch.setattr("sqap.benchmark.latency.Bench", OnACard)
    monkeypatch.setattr("sqap.benchmark.latency.PAUSE_S", 0)
    report = bench(Subject("reference", Recipe.w4a8(), device="cuda"), ["torch-bf16"], threads=1)
    assert report["steps"] == 200
    ours, rival = report["candidates"].values()
    assert len(ours["step_ms"]) == 200
    assert ours["device_ms"] == {"p50_ms": 8, "p90_ms": 8, "p99_ms": 8}
    assert list(ours["stages_ms"]) == ["preprocess", *STAGES, "between"]
    assert sum(ours["stages_ms"].values()) == ours["p50_ms"] == 10
    assert ours["stages_ms"]["preprocess"] == 2
    assert ours["peak_device_bytes"] == 100
    assert report["speedup_over"]["torch-bf16"] == {"median": 2, "min": 2, "max": 2, "device_median": 2}
    assert (rival["stages_ms"], rival["no_stages"]) == ({}, "memory ran out")
    console = Console(width=100, file=io.StringIO())
    for table in bench_tables(report):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "On the GPU alone, by events" in text
    assert "torch-bf16 has no stages: memory ran out" in " ".join(text.split())
