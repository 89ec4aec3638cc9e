"""Finished episodes on disk, one JSON line each, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from sqap.errors import InputError
from sqap.evaluation.rollout import Episode
from sqap.serialization import from_json

Key = tuple[str, str, int]  # policy fingerprint, task, seed

_LINE_START = b'{"policy": "'


@dataclass(frozen=True)
class Settings:
    """What must not change between two sittings of one evaluation, besides the policies.

    Args:
        env: name of the environment.
        execute: actions of each chunk that are executed; None for all.
        workers: policies running at the same time: it decides the latencies.
        threads: torch threads of each.
        ensemble: chunks averaged into each action; None for none, as in logs from before there were any.
    """

    env: str
    execute: int | None
    workers: int
    threads: int
    ensemble: int | None = None


@dataclass(frozen=True)
class Record:
    """One finished episode and where it comes from.

    Args:
        policy: fingerprint of the policy's files.
        settings: how it was run.
        peak_rss_bytes: largest resident memory of the policy's process until the end of the episode.
        episode: what happened.
    """

    policy: str
    settings: Settings
    peak_rss_bytes: int
    episode: Episode

    @property
    def key(self) -> Key:
        """What tells this episode from the others of the evaluation."""
        return self.policy, self.episode.task, self.episode.seed


class EpisodeLog:
    """The episodes finished so far, in memory and, if ``path`` is given, in a file of JSON lines.

    A last line that a crash left unfinished is cut off. Use as a context manager.

    Args:
        path: continued if it exists; None keeps nothing.
        settings: of the evaluation.
        policies: fingerprints of its policies.

    Raises:
        InputError: the file cannot be read or written, is no such log, or belongs to another evaluation.
    """

    def __init__(self, path: Path | None, settings: Settings, policies: Sequence[str]) -> None:
        self.finished: dict[Key, Record] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        try:
            content = path.read_bytes() if path.exists() else b""
            records, length = _parse(path, content)
            for number, record in enumerate(records, 1):
                _check_belongs(record, settings, policies, f"{path}:{number}")
                self.finished[record.key] = record
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            self._file.truncate(length)
        except OSError as error:
            raise InputError(f"cannot use {path} as an episode log: {error.strerror}") from error

    def add(self, record: Record) -> None:
        """Keep a finished episode; it is on disk when this returns."""
        self.finished[record.key] = record
        if self._file is not None:
            self._file.write(json.dumps(dataclasses.asdict(record)).encode() + b"\n")
            self._file.flush()

    def __enter__(self) -> EpisodeLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


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
        except ValueError as error:
            raise InputError(f"{where} is not a line of an episode log; name another file") from error
        records.append(from_json(Record, data, where, InputError))
        length += len(line)
    return records, length


def _is_torn(line: bytes) -> bool:
    # Only what begins like a line of ours is cut off: a file named by mistake must survive.
    ours = line.startswith(_LINE_START) or _LINE_START.startswith(line)
    return ours and not line.endswith(b"\n")


def _check_belongs(record: Record, settings: Settings, policies: Sequence[str], where: str) -> None:
    remedy = "name another log, or repeat what this one was started with"
    if record.policy not in policies:
        raise InputError(
            f"{where} holds an episode of policy {record.policy}, which is not evaluated here; {remedy}"
        )
    for field in dataclasses.fields(Settings):
        logged, asked = getattr(record.settings, field.name), getattr(settings, field.name)
        if logged != asked:
            raise InputError(f"{where} was written with {field.name}={logged}, now it is {asked}; {remedy}")
