"""A step on a GPU by CUDA events: all of it, and its stages, each captured as a CUDA graph of its own.

An event is recorded by the device when it gets there, so that two of them say how long the kernels between
them took, whatever the CPU did meanwhile. Where a step is a graph, they stand around its replay; where Python
launches the kernels, they stand around the model's pass, and the gaps between launches count.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sqap.given import Given, Outcome
from sqap.graph import Graphs, Replay, capture_cuda
from sqap.models.stream import LayerOutput, Stream
from sqap.models.through import direct
from sqap.observation import Observation
from sqap.policy import Policy
from sqap.pruning import StepPruner
from sqap.pruning.memory import Memory

REPLAYS, LEAST = 200, 20
EAGER_WARMUPS = 3
STAGES = "vision", "projector", "decoder", "selection", "head"


def make_event() -> Any:
    """A `torch.cuda.Event` that knows its time."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def elapsed(function: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
    """What ``function`` returns, and what waits for its kernels and says their milliseconds."""
    begin, end = make_event(), make_event()
    begin.record()
    found = function()
    end.record()

    def milliseconds() -> float:
        end.synchronize()
        ms: float = begin.elapsed_time(end)
        return ms

    return found, milliseconds


def repeated(
    function: Callable[[], Any], *, graph: bool = True, within_s: float | None = None
) -> list[float]:
    """Milliseconds of `REPLAYS` of a CUDA graph of ``function``, or of calls whose kernels Python launches.

    Args:
        function: without arguments; what it returns is not read.
        graph: whether it is captured first, and then replayed.
        within_s: after so many seconds, `LEAST` are enough.
    """
    if graph:
        _, function = capture_cuda(function)
    else:
        for _ in range(EAGER_WARMUPS):
            function()
    found: list[float] = []
    while len(found) < REPLAYS and (within_s is None or len(found) < LEAST or sum(found) < 1e3 * within_s):
        found.append(elapsed(function)[1]())
    return found


class DeviceTimes:
    """Times the steps of a policy on a GPU: a replay where a step is captured, the model's pass where not.

    Args:
        policy: on its device; its graphs are made anew.
        graph: whether its steps are captured, where they can be.
    """

    def __init__(self, policy: Policy, graph: bool) -> None:
        self._policy, self._graph, self._capturing = policy, graph, False
        self._last: Callable[[], float] = lambda: 0.0
        self._run = policy._direct
        policy._direct = self._direct  # type: ignore[method-assign]
        if graph:
            policy._graphs = Graphs(policy.device, self._capture)

    def last(self) -> float:
        """Milliseconds of the last step on the device."""
        return self._last()

    def stages(
        self, observation: Observation, memory: Memory | None, *, within_s: float | None = None
    ) -> dict[str, float]:
        """Median milliseconds of each stage of a step, `repeated` from a graph of its own.

        A stage's blocks are one graph, on the inputs that they had in a step. Choosing tokens is a stage,
        looking ahead included; the decoder's layers are then given the tokens that were chosen. What is
        computed between two stages is in none.
        """
        policy, calls = self._policy, _Calls()
        policy.through, policy.pruner = calls.through, partial(_Recording, calls)
        try:
            policy.step(observation, seed=0, memory=memory)
        finally:
            policy.through, policy.pruner = direct, StepPruner
        with policy._acting(), torch.inference_mode():
            measured = partial(repeated, graph=self._graph, within_s=within_s)
            return {
                name: float(np.median(measured(partial(calls.run, name)))) if name in calls.of else 0.0
                for name in STAGES
            }

    def _direct(self, placed: Sequence[Given]) -> list[Outcome]:
        if self._capturing:  # an event in a graph has no time
            return self._run(placed)
        found: list[Outcome]
        found, self._last = elapsed(lambda: self._run(placed))
        return found

    def _capture(self, function: Callable[[], Any]) -> tuple[Any, Replay]:
        self._capturing = True
        try:
            found, replay = capture_cuda(function)
        finally:
            self._capturing = False

        def timed() -> None:
            _, self._last = elapsed(replay)

        return found, timed


class _Calls:
    """What a step calls, stage by stage, so that it can be called again."""

    def __init__(self) -> None:
        self.of: dict[str, list[Callable[[], Any]]] = defaultdict(list)

    def run(self, name: str) -> None:
        """All calls of a stage in their order; each is given what it was given in the step."""
        for call in self.of[name]:
            call()

    def through(
        self, name: str, stage: nn.Module, states: Sequence[Any], call: Callable[..., Any]
    ) -> list[Any]:
        """As `sqap.models.through.direct`."""
        self.of[name.partition(".")[0]] += [partial(call, stage, _chosen(state)) for state in states]
        return direct(name, stage, states, call)


def _chosen(state: Any) -> Any:
    """A stream whose pruner says again what it said in the step."""
    if isinstance(state, Stream) and isinstance(state.pruner, _Recording):
        return replace(state, pruner=_Chosen(state.pruner))
    return state


class _Recording(StepPruner):
    """Chooses as any other, and remembers what it was asked and what it answered."""

    def __init__(self, calls: _Calls, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._calls = calls
        self.rows: dict[int, Tensor | None] = {}
        self.kept: dict[int, Tensor | None] = {}

    def score_rows(self, layer: int) -> Tensor | None:
        self.rows[layer] = super().score_rows(layer)
        return self.rows[layer]

    def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
        before, self.kept[layer] = self._copy(), super().keep(layer, output)
        if self.kept[layer] is not None:
            self._calls.of["selection"].append(lambda: StepPruner.keep(before._copy(), layer, output))
        return self.kept[layer]

    def _copy(self) -> _Recording:
        """One that can choose without a change of this one."""
        found = copy(self)
        found._received = [*self._received]
        return found


class _Chosen:
    """A `TokenPruner` that answers as ``recording`` did, without computing anything."""

    def __init__(self, recording: _Recording) -> None:
        self._recording = recording

    def score_rows(self, layer: int) -> Tensor | None:
        return self._recording.rows[layer]

    def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
        return self._recording.kept[layer]
