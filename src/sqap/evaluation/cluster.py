"""Episodes on a Ray cluster: one task each, so that Ray runs those of a lost node again elsewhere.

Only this process writes the log, when an answer has come: an episode that two nodes have run, since one was
lost before it could answer, is in the log once. Nodes need sqap with the simulator, of the same build.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqap.build import build_id
from sqap.checkpoints import fingerprint, is_own, locate
from sqap.errors import InputError, SqapError
from sqap.evaluation.lanes import ATTEMPTS, Job
from sqap.evaluation.log import Record
from sqap.evaluation.worker import EpisodeRunner, WorkerSpec
from sqap.process import forget_peak

Files = Mapping[str, bytes]  # of an artefact, by name
CODE = ("sqap", "package", "kernels", "torch")  # of the build, what must not differ from node to node


class RayExecutor:
    """Runs jobs as tasks of a Ray cluster. Close it.

    Args:
        address: of the cluster's head, or "auto"; None takes RAY_ADDRESS, or starts a cluster here.

    Raises:
        InputError: Ray is not installed, or there is no cluster.
    """

    def __init__(self, address: str | None = None) -> None:
        try:
            import ray
        except ImportError as problem:
            raise InputError(f'Ray is not installed ({problem}); pip install "sqap[ray]"') from problem
        self._ray: Any = ray
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as problem:
            place = "here" if address is None else f"at {address}"
            raise InputError(f"no Ray cluster {place}: {problem}") from problem

    def __call__(
        self, specs: Sequence[WorkerSpec], pending: Sequence[Job], workers: int
    ) -> Generator[Record, None, None]:
        """Records in the order they are finished, of ``workers`` tasks at a time."""
        ray = self._ray
        files = [ray.put(_files(spec)) for spec in specs]
        threads = max(spec.settings.threads for spec in specs)
        # A task whose node or process is lost is run again; what it raises itself is an answer.
        task = ray.remote(num_cpus=threads, max_retries=ATTEMPTS - 1)(_episode)
        turns = iter([(index, name, seed) for name, seed, missing in pending for index in missing])
        running: dict[Any, tuple[int, str, int]] = {}
        try:
            while True:
                while len(running) < workers and (turn := next(turns, None)) is not None:
                    index, name, seed = turn
                    running[task.remote(specs[index], files[index], name, seed)] = turn
                if not running:
                    return
                (ready,), _ = ray.wait(list(running), num_returns=1)
                index, name, seed = running.pop(ready)
                yield self._receive(ready, specs[index], name, seed)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._ray.shutdown()

    def _receive(self, reference: Any, spec: WorkerSpec, task: str, seed: int) -> Record:
        errors = self._ray.exceptions
        try:
            record: Record = self._ray.get(reference)
        except errors.RayTaskError as problem:
            cause = problem.cause
            raise cause if isinstance(cause, SqapError) else RuntimeError(str(problem)) from problem
        except (errors.RayError, errors.RayActorError) as problem:
            reason = f"the process that ran {spec.path} died {ATTEMPTS} times: {problem}"
            if not spec.keep_going:
                raise SqapError(reason) from problem
            return spec.failed(task, seed, reason)
        return record


def _files(spec: WorkerSpec) -> Files | None:
    """An sqap policy's files; None of a published one, which every node must have at the same place."""
    directory = locate(spec.path)
    if not is_own(directory):
        return None
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


_session: EpisodeRunner | None = None  # of this process's latest policy


def _episode(spec: WorkerSpec, files: Files | None, task: str, seed: int) -> Record:
    """What a task does, on its node."""
    global _session
    if _session is None or _session.spec.fingerprint != spec.fingerprint:
        if _session is not None:
            _session.close()
            _session = None
        check_build(spec)
        forget_peak()  # of the policy before
        _session = EpisodeRunner(replace(spec, path=str(place(spec, files))))
    return _session((task, seed))


def check_build(spec: WorkerSpec) -> None:
    """Refuse a node of other code: its episodes could not be compared with the others'.

    Another processor is noted in each record instead.

    Raises:
        InputError: it has other code than the process that asks.
    """
    here, asked = build_id(), spec.settings.build or {}
    for name in CODE:
        if here[name] != asked.get(name):
            raise InputError(
                f"node {os.uname().nodename} has {name} {here[name]}, the study's command {asked.get(name)}; "
                "install the same build on every node, and set SQAP_KERNELS where processors differ"
            )


def place(spec: WorkerSpec, files: Files | None) -> Path:
    """Where the policy is on this node: where it was asked for if that is it, else written from ``files``.

    All processes of a node map the same copy.
    """
    path = Path(spec.path)
    if files is None or (path.is_dir() and is_own(path) and fingerprint(path) == spec.fingerprint):
        return path
    copies = Path(tempfile.gettempdir()) / f"sqap-{os.getuid()}"
    target = copies / spec.fingerprint
    if not target.is_dir():
        copies.mkdir(mode=0o700, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=copies))
        for name, content in files.items():
            (new / name).write_bytes(content)
        try:
            new.rename(target)
        except OSError:  # another process was faster
            shutil.rmtree(new)
    return target
