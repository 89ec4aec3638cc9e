"""Finished episodes on disk, one JSON line each, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sqap.errors import InputError
from sqap.evaluation.rollout import Episode
from sqap.evaluation.settings import Settings
from sqap.files import sync
from sqap.serialization import from_json

Key = tuple[str, str, int]  # policy fingerprint, task, seed

_LINE_START = b'{"policy": "'
_REMEDY = "name another log, or repeat what this one was started with"


@dataclass(frozen=True)
class Record:
    """One finished episode and where it comes from.

    Args:
        policy: fingerprint of the policy.
        settings: how it was run.
        peak_rss_bytes: largest resident memory of the policy's process until the end of the episode.
        episode: what happened.
        finished: when, in UTC, as ISO 8601 has it; empty in logs from before it was noted.
        processor: that ran it, which need not be the one of ``settings`` in a cluster; empty likewise.
    """

    policy: str
    settings: Settings
    peak_rss_bytes: int
    episode: Episode
    finished: str = ""
    processor: str = ""

    @property
    def key(self) -> Key:
        """What tells this episode from the others of the evaluation."""
        return self.policy, self.episode.task, self.episode.seed


class EpisodeLog:
    """The episodes finished so far, in memory and, if ``path`` is given, in a file of JSON lines.

    The file is locked while it is open. A last line that a crash left unfinished is cut off. Use as a context
    manager.

    Args:
        path: continued if it exists; None keeps nothing.
        settings: of the evaluation.
        policies: fingerprints of its policies.

    Attributes:
        finished: every episode, by its key.

    Raises:
        InputError: the file cannot be read or written, is no such log, belongs to another evaluation, or
            another process has it open.
    """

    def __init__(self, path: Path | None, settings: Settings, policies: Sequence[str]) -> None:
        self.finished: dict[Key, Record] = {}
        self._path = path
        self._file: int | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._continue(path, self._file, settings, policies)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise InputError(f"cannot use {path} as an episode log: {error.strerror}") from error
            raise

    def _continue(self, path: Path, file: int, settings: Settings, policies: Sequence[str]) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is writing {path}; wait until it has finished, or name another log"
            ) from error
        # Only what is read under the lock says where the last whole line ends.
        content = path.read_bytes()
        records, length = _parse(path, content)
        for number, record in enumerate(records, 1):
            _check_belongs(record, settings, policies, f"{path}:{number}")
            self.finished[record.key] = record
        if length < len(content):
            os.ftruncate(file, length)
        sync(path.parent)  # or a power cut takes the name of a new file

    def add(self, record: Record) -> None:
        """Keep a finished episode; it is on disk when this returns.

        Raises:
            InputError: the disk is full, or cannot be written to any more; the episodes before are kept.
        """
        if self._file is not None:
            line = memoryview(json.dumps(dataclasses.asdict(record)).encode() + b"\n")
            try:
                while line:
                    line = line[os.write(self._file, line) :]
                os.fsync(self._file)
            except OSError as error:
                raise InputError(
                    f"cannot write {self._path}: {error.strerror}; the same command goes on from the "
                    "episodes that are in it"
                ) from error
        self.finished[record.key] = record

    def close(self) -> None:
        """Let other processes have the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> EpisodeLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def log_name(settings: Settings, policies: Sequence[str]) -> str:
    """The default name of a log: another policy, setting or build starts another file."""
    return f"{_log_prefix(settings, policies)}-{settings.mark}.jsonl"


def unused_logs(directory: Path, settings: Settings, policies: Sequence[str]) -> list[Path]:
    """Logs of default names in ``directory`` that hold the same evaluation by another build."""
    name = log_name(settings, policies)
    return [path for path in directory.glob(f"{_log_prefix(settings, policies)}*.jsonl") if path.name != name]


def _log_prefix(settings: Settings, policies: Sequence[str]) -> str:
    marks = "-".join(mark[:12] for mark in policies)
    averaged = "" if settings.ensemble is None else f"-ensemble{settings.ensemble}"
    return f"{settings.env.replace('/', '-')}-{marks}-workers{settings.workers}{averaged}"


def _parse(path: Path, content: bytes) -> tuple[list[Record], int]:
    """The records in ``content``, and the number of bytes they take up."""
    records: list[Record] = []
    length = 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        if number == len(lines) and _is_torn(line):
            break
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not a line of an episode log; name another file") from error
        records.append(from_json(Record, data, where, InputError))
        length += len(line)
    return records, length


def _is_torn(line: bytes) -> bool:
    # Only what begins like a line of ours is cut off: a file named by mistake must survive.
    ours = line.startswith(_LINE_START) or _LINE_START.startswith(line)
    return ours and not line.endswith(b"\n")


def _check_belongs(record: Record, settings: Settings, policies: Sequence[str], where: str) -> None:
    difference = record.settings.difference(settings)
    if difference is not None:
        raise InputError(f"{where} was written {difference}; {_REMEDY}")
    if record.policy not in policies:
        raise InputError(
            f"{where} holds an episode of policy {record.policy}, which is not evaluated here; {_REMEDY}"
        )
