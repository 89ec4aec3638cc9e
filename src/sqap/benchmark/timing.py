"""What a candidate's process does: load, step when told to, and say how long each part took."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sqap.benchmark import tools
from sqap.benchmark.candidates import Subject, candidate, example, weight_bytes
from sqap.benchmark.device import DeviceTimes
from sqap.benchmark.exported import Elsewhere
from sqap.errors import SqapError
from sqap.models.stream import LayerOutput
from sqap.models.through import direct
from sqap.models.vision import VisionEncoder
from sqap.policy import Policy
from sqap.process import forget_peak, peak_rss_bytes
from sqap.pruning import StepPruner


@dataclass(frozen=True)
class Loaded:
    """A candidate that is ready: ``chunk`` (horizon, action_dim) is what its first step said."""

    load_s: float
    weight_bytes: int
    chunk: np.ndarray


@dataclass(frozen=True)
class Timed:
    """One step: as it is called, its stages where they are timed as it runs, and on a GPU its time there."""

    ms: float
    stages_ms: dict[str, float]
    device_ms: float | None = None


class Bench:
    """Answers "load", "step", "peak", and on GPUs "stages" for one candidate."""

    def __init__(self, spec: tuple[Subject, str, int, Path | None]) -> None:
        self._subject, self._name, threads, environments = spec
        self._stages: Stages | None = None
        self._device: DeviceTimes | None = None
        torch.set_num_threads(threads)
        environment = candidate(self._name).environment
        if environments is not None and environment is not None:
            tools.add_environment(environments / environment)

    def __call__(self, request: str) -> Loaded | Timed | int | dict[str, float]:
        answers: dict[str, Callable[[], Loaded | Timed | int | dict[str, float]]] = {
            "load": self._load, "step": self._step, "peak": self._peak, "stages": self._device_stages,
        }  # fmt: skip
        return answers[request]()

    def _peak(self) -> int:
        """Bytes: of the device's memory on a GPU, else of the process and of those that compute for it."""
        if self._subject.kind == "cuda":
            return torch.cuda.max_memory_allocated(self._subject.device)
        elsewhere = [module for module in self._policy.model.modules() if isinstance(module, Elsewhere)]
        return peak_rss_bytes() + sum(module.peak_bytes() for module in elsewhere)

    def _forget_peak(self) -> None:
        if self._subject.kind == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._subject.device)
        forget_peak()

    def _load(self) -> Loaded:
        chosen = candidate(self._name)
        start = time.perf_counter()
        try:
            policy = chosen.make(self._subject.load())
            self._policy = policy.to(self._subject.device, graph=chosen.graph)
        except ImportError as problem:
            raise SqapError(f"{problem}: docs/bench.md says what to install") from problem
        seconds = time.perf_counter() - start
        self.observation = example(self._policy)
        if self._subject.kind == "cuda":
            self._device = DeviceTimes(self._policy, chosen.graph)
        self._forget_peak()  # what it took to make a rival out of the compressed policy is not the rival's
        first = self._policy.step(self.observation, seed=0)
        chunk, self._memory = first.chunk, first.memory
        if not np.isfinite(chunk).all():
            raise SqapError("its actions are not finite")
        if chosen.staged and self._device is None:
            self._stages = Stages(self._policy)
        return Loaded(seconds, weight_bytes(self._policy), chunk)

    def _step(self) -> Timed:
        if self._stages is not None:
            self._stages.clear()
        start = time.perf_counter()
        self._policy.step(self.observation, seed=0, memory=self._memory)
        ms = 1000 * (time.perf_counter() - start)
        stages = {} if self._stages is None else self._stages.split(ms)
        return Timed(ms, stages, None if self._device is None else self._device.last())

    def _device_stages(self) -> dict[str, float]:
        """Medians over `REPLAYS`; none of a policy that is compiled as a whole."""
        if self._device is None or not candidate(self._name).staged:
            return {}
        return self._device.stages(self.observation, self._memory)


class Stages:
    """Times a policy's parts as they run: the policy's `through`, and a pruner that looks at the clock."""

    def __init__(self, policy: Policy) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._ready = 0.0  # when the stage before ended
        policy.through = self._through
        for module in policy.model.modules():
            if isinstance(module, VisionEncoder):  # whose stem runs before its first stage
                module.patch_embed.register_forward_pre_hook(self._begin)
        if policy.selector is not None:
            policy.pruner = partial(_TimedPruner, self._seconds)

    def clear(self) -> None:
        """Forget what was timed: a step begins."""
        self._seconds.clear()
        self._ready = 0.0

    def split(self, ms: float) -> dict[str, float]:
        """Milliseconds of each stage of a step that took ``ms``; together they are the step.

        What is computed between two stages counts as the later one's, the stem of a vision encoder as vision,
        and what is before it and behind the last stage as processing: images to pixels, chunks to actions.
        """
        spent = {name: 1000 * self._seconds[name] for name in ("vision", "projector", "decoder", "head")}
        selection = 1000 * self._seconds["selection"]
        return {
            "preprocess": ms - sum(spent.values()),
            "vision": spent["vision"],
            "projector": spent["projector"],
            "decoder": spent["decoder"] - selection,
            "selection": selection,
            "head": spent["head"],
        }

    def _begin(self, *_: object) -> None:
        self._ready = self._ready or time.perf_counter()

    def _through(
        self, name: str, stage: nn.Module, states: Sequence[Any], call: Callable[..., Any]
    ) -> list[Any]:
        begin = self._ready or time.perf_counter()
        out = direct(name, stage, states, call)
        self._ready = time.perf_counter()
        self._seconds[name.partition(".")[0]] += self._ready - begin
        return out


class _TimedPruner(StepPruner):
    """Chooses as any other, and adds up how long that takes; looking ahead is part of it."""

    def __init__(self, seconds: dict[str, float], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._seconds = seconds

    def keep(self, layer: int, output: LayerOutput) -> Tensor | None:
        start = time.perf_counter()
        kept = super().keep(layer, output)
        self._seconds["selection"] += time.perf_counter() - start
        return kept
