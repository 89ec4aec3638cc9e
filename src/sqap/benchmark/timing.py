"""What a candidate's process does: load, step when told to, and say how long each part took."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sqap.benchmark import tools
from sqap.benchmark.candidates import CANDIDATES, Subject, example, weight_bytes
from sqap.errors import SqapError
from sqap.models.decoder import LayerOutput
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
    """One step."""

    ms: float
    stages_ms: dict[str, float]


class Bench:
    """Answers "load", "step" and "peak" for one candidate."""

    def __init__(self, spec: tuple[Subject, str, int, Path | None]) -> None:
        self._subject, self._name, threads, environments = spec
        torch.set_num_threads(threads)
        environment = CANDIDATES[self._name].environment
        if environments is not None and environment is not None:
            tools.add_environment(environments / environment)

    def __call__(self, request: str) -> Loaded | Timed | int:
        if request == "load":
            return self._load()
        return self._step() if request == "step" else peak_rss_bytes()

    def _load(self) -> Loaded:
        candidate = CANDIDATES[self._name]
        start = time.perf_counter()
        try:
            self._policy = candidate.make(self._subject.load())
        except ImportError as problem:
            raise SqapError(f"{problem}: docs/bench.md says what to install") from problem
        seconds = time.perf_counter() - start
        self.observation = example(self._policy)
        forget_peak()  # what it took to make a rival out of the compressed policy is not the rival's
        chunk = self._policy.act(self.observation, seed=0)
        if not np.isfinite(chunk).all():
            raise SqapError("its actions are not finite")
        self._stages = Stages(self._policy) if candidate.staged else None
        return Loaded(seconds, weight_bytes(self._policy), chunk)

    def _step(self) -> Timed:
        if self._stages is not None:
            self._stages.clear()
        start = time.perf_counter()
        self._policy.act(self.observation, seed=0)
        ms = 1000 * (time.perf_counter() - start)
        return Timed(ms, {} if self._stages is None else self._stages.split(ms))


class Stages:
    """Times a policy's parts as they run: hooks around modules, and a pruner that looks at the clock."""

    def __init__(self, policy: Policy) -> None:
        self._seconds: dict[str, float] = defaultdict(float)
        self._started: dict[str, float] = {}
        model = policy.model
        for encoder in model.vision:
            self._watch("vision", encoder)
        for name, part in (("projector", model.projector), ("decoder", model.decoder), ("model", model)):
            self._watch(name, part)
        if policy.selector is not None:
            policy.pruner = partial(_TimedPruner, self._seconds)

    def clear(self) -> None:
        """Forget what was timed."""
        self._seconds.clear()

    def split(self, ms: float) -> dict[str, float]:
        """Milliseconds of each stage of a step that took ``ms``; together they are the step."""
        spent = {name: 1000 * seconds for name, seconds in self._seconds.items()}
        selection = spent.get("selection", 0.0)
        vision, projector, decoder = (spent[name] for name in ("vision", "projector", "decoder"))
        return {
            "preprocess": ms - spent["model"],
            "vision": vision,
            "projector": projector,
            "decoder": decoder - selection,
            "selection": selection,
            "head": spent["model"] - vision - projector - decoder,
        }

    def _watch(self, name: str, module: nn.Module) -> None:
        def before(*_: Any) -> None:
            self._started[name] = time.perf_counter()

        def after(*_: Any) -> None:
            self._seconds[name] += time.perf_counter() - self._started[name]

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


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
