"""Where episodes run on this machine: in processes of their own, or in this one."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection, wait

import torch

from sqap.evaluation.log import Record
from sqap.evaluation.worker import EpisodeRunner, WorkerSpec, start_worker
from sqap.process import Worker, WorkerDied

Job = tuple[str, int, list[int]]  # task, seed, and the policies, by number, that have not run there yet
ATTEMPTS = 3  # at an episode whose process dies


def run_in_processes(
    specs: Sequence[WorkerSpec], pending: Sequence[Job], workers: int
) -> Generator[Record, None, None]:
    """Records in the order they are finished, of ``workers`` lanes. However this ends, no process is left."""
    jobs = iter(pending)
    with ExitStack() as stack:
        lanes = [stack.enter_context(closing(_Lane(specs, jobs))) for _ in range(workers)]
        busy = {pipe: lane for lane in lanes if (pipe := lane.next()) is not None}
        while busy:
            ready = wait(list(busy))
            for pipe in [pipe for pipe in busy if pipe in ready]:
                lane = busy.pop(pipe)
                record = lane.receive()
                if record is not None:
                    yield record
                if (following := lane.next() if record is not None else lane.again()) is not None:
                    busy[following] = lane


def run_here(
    specs: Sequence[WorkerSpec], pending: Sequence[Job], workers: int
) -> Generator[Record, None, None]:
    """Records of one episode after another in this process, whose memory they then tell."""
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        sessions: dict[int, EpisodeRunner] = {}
        for task, seed, missing in pending:
            for index in missing:
                if index not in sessions:
                    sessions[index] = stack.enter_context(closing(EpisodeRunner(specs[index])))
                yield sessions[index]((task, seed))


class _Lane:
    """A worker for each policy, one of which is at work: they take turns on each episode.

    Args:
        specs: of the policies.
        jobs: shared with other lanes.
    """

    def __init__(self, specs: Sequence[WorkerSpec], jobs: Iterator[Job]) -> None:
        self._specs = specs
        self._workers: dict[int, Worker] = {}
        self._turns = ((index, task, seed) for task, seed, missing in jobs for index in missing)
        self._turn: tuple[int, str, int] = (0, "", 0)
        self._deaths = 0  # since a process last answered

    def next(self) -> Connection | None:
        """Request the next episode: the pipe that its answer will come from; None if there is none."""
        turn = next(self._turns, None)
        if turn is None:
            return None
        self._turn = turn
        return self.again()

    def again(self) -> Connection:
        """Request the episode that is at hand."""
        index, task, seed = self._turn
        if index not in self._workers:
            self._workers[index] = start_worker(self._specs[index])
        worker = self._workers[index]
        worker.request((task, seed))
        return worker.pipe

    def receive(self) -> Record | None:
        """The episode's record; None if it must be requested again, since its process died.

        Where an evaluation keeps going, an episode whose process died again and again is a failed one.

        Raises:
            WorkerDied: the process died, and the evaluation does not keep going.
            SqapError: as `Worker.receive`.
        """
        index, task, seed = self._turn
        try:
            record: Record = self._workers[index].receive()
        except WorkerDied as death:
            if not self._specs[index].keep_going:
                raise
            self._workers.pop(index).close()
            self._deaths += 1
            return self._specs[index].failed(task, seed, str(death)) if self._deaths >= ATTEMPTS else None
        self._deaths = 0
        return record

    def close(self) -> None:
        """End the processes."""
        with ExitStack() as stack:
            for worker in self._workers.values():
                stack.callback(worker.close)
