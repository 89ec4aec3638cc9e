"""Processes that gemm.py asks: a candidate's, and the one that measures what the processor can do at most."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent
OURS = ("sqap", "torch")  # what runs in this environment


class Failed(Exception):
    """Why a candidate cannot be timed."""


class Process:
    """A candidate's process; see `gemm_serve.py` for what it answers."""

    def __init__(self, peer: str, method: str, threads: int, environments: Path | None, log: Path) -> None:
        python = Path(sys.executable)
        if peer not in OURS:
            if environments is None:
                raise Failed("needs an environment of its own: --peers")
            python = environments / peer / "bin" / "python"
            if not python.exists():
                raise Failed(f"no environment called {peer} in the folder that --peers names")
        script = PEERS / f"gemm_{peer}.py"
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, script, method, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **limits},
                start_new_session=True,  # Ctrl-C is for us
            )
        try:
            self.versions: dict[str, str] = self._receive()["versions"]
        except BaseException:
            self.close()
            raise

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer.

        Raises:
            Failed: there is none.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._receive()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise Failed(said[-1] if said else f"its process ended with exit status {status}")
        answer: dict[str, Any] = json.loads(line)
        if "reason" in answer:
            raise Failed(answer["reason"])
        return answer


class Ceilings:
    """The most that was seen of each, over the whole run; None with a reason where it cannot be measured."""

    def __init__(self, path: str, threads: int, folder: Path) -> None:
        self.best: dict[str, Any] = dict.fromkeys(("peak_gops", "peak_fp32_gflops", "bandwidth_gbs"))
        self._command = [folder / "ceilings", path, str(threads)]
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("clang++")
        if compiler is None:
            self.best["ceilings_reason"] = "no C++ compiler"
            return
        source = PEERS / "gemm_ceilings.cpp"
        build = [compiler, "-O3", "-std=c++17", "-pthread", source, "-o", folder / "ceilings"]
        made = subprocess.run(build, capture_output=True, text=True)
        if made.returncode:
            self.best["ceilings_reason"] = f"{source.name} does not compile: {made.stderr.strip()[:300]}"

    def look(self) -> None:
        """Measure once more."""
        if "ceilings_reason" in self.best:
            return
        run = subprocess.run(self._command, capture_output=True, text=True, start_new_session=True)
        if run.returncode:
            self.best["ceilings_reason"] = f"its program ended with exit status {run.returncode}"
            return
        for name, value in json.loads(run.stdout).items():
            if value is not None:
                self.best[name] = max(value, self.best[name] or 0.0)
