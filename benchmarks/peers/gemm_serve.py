"""What the peers of gemm.py share. They run in environments of their own, which need not have sqap.

`gemm.py` calls ``python gemm_<peer>.py <candidate> <threads>``, writes JSON objects, one a line, and gets as
many back:

- ``{"load": folder, "copies": c}``: make the product of the weight in ``folder`` ready, c times;
- ``{"input": file, "output": file}``: multiply this input, save what comes out, say how long a call takes;
- ``{"calls": c, "warm": w}``: call w + c times, another copy each time, and say how long the last c took.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

WARM_S = 1.0

Array = np.ndarray
Product = Callable[[], Any]
Bind = Callable[[Array], Product]  # an input to what is timed


class Weight:
    """Levels -8..7 ``(n, k)`` and one scale per row ``(n,)``.

    Every 32 channels hold a -8, so that a grid of groups which covers its largest weight holds all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.levels: Array = np.load(folder / "levels.npy")
        self.scale: Array = np.load(folder / "scale.npy")

    def dense(self) -> Array:
        """What the integers stand for, float32 ``(n, k)``."""
        return self.levels * self.scale[:, None]


Make = Callable[[Weight], Bind]


class Session:
    """Answers requests for one candidate."""

    def __init__(self, make: Make, to_array: Callable[[Any], Array]) -> None:
        self._make, self._to_array = make, to_array
        self._binds: Sequence[Bind] = ()
        self._products: Sequence[Product] = ()
        self._turn = 0

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if "load" in request:
            self._products = self._binds = ()
            weight = Weight(Path(request["load"]))
            self._binds = [self._make(weight) for _ in range(request["copies"])]
            return {}
        if "input" in request:
            x = np.load(request["input"])
            self._products = [bind(x) for bind in self._binds]
            np.save(request["output"], self._to_array(self._products[0]()).astype(np.float32))
            ms, start = self._times(1)["ms"], time.perf_counter()
            while len(ms) <= len(self._products) and time.perf_counter() - start < WARM_S:
                ms += self._times(1)["ms"]  # every copy warms up, if that does not take for ever
            return {"ms": min(ms)}
        self._times(request["warm"])
        return self._times(request["calls"])

    def _times(self, calls: int) -> dict[str, list[float]]:
        """Of every call: by the clock, and of all its threads together."""
        times: dict[str, list[float]] = {"ms": [], "cpu_ms": []}
        for _ in range(calls):
            self._turn = (self._turn + 1) % len(self._products)
            product = self._products[self._turn]
            busy, start = time.process_time(), time.perf_counter()
            product()
            stop, used = time.perf_counter(), time.process_time()
            times["ms"].append(1000 * (stop - start))
            times["cpu_ms"].append(1000 * (used - busy))
        return times


def threads() -> int:
    """How many a candidate may use."""
    return int(sys.argv[2])


def saturates() -> bool:
    """Whether 8-bit products saturate at 16 bits: on x86 without VNNI, where tools say to give up one bit."""
    with contextlib.suppress(OSError):
        flags = Path("/proc/cpuinfo").read_text()
        return "avx2" in flags and not re.search(r"\bavx(512)?_vnni\b", flags)
    return False


def serve(
    candidates: Mapping[str, Make],
    packages: Collection[str] | Mapping[str, str],
    to_array: Callable[[Any], Array] = np.asarray,
) -> None:
    """Answer for the candidate asked for, until the other side hangs up.

    Args:
        candidates: name -> weight to what binds an input.
        packages: distributions whose versions are reported, or name -> version.
        to_array: what a product returns to an array ``(m, n)``.
    """
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # libraries that print must not answer
        session = Session(candidates[sys.argv[1]], to_array)
        found = packages if isinstance(packages, Mapping) else {name: version(name) for name in packages}
        print(json.dumps({"versions": found}), file=answers, flush=True)
        for line in sys.stdin:
            try:
                answer = session(json.loads(line))
            except Exception as problem:
                said = str(problem).strip().splitlines() or [""]
                answer = {"reason": f"{type(problem).__name__}: {said[-1]}"}
            print(json.dumps(answer), file=answers, flush=True)
