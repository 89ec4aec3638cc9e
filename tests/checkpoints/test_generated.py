"""Directories with faults: each acts as it should, or is refused in one sentence; none ends in a traceback.

A few are drawn for every change. More, and others each time, with

    SQAP_EXAMPLES=2000 python -m pytest tests/checkpoints/test_generated.py
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import sqap
from sqap import checkpoints
from sqap.checkpoints.choices import Choices
from sqap.cli import app
from sqap.errors import CheckpointError, SqapError
from tests.checkpoints.conftest import Payload
from tests.checkpoints.generated import LAYOUTS, Base, make_base
from tests.checkpoints.mutations import Effect, Mutation, apply_all

EXAMPLES = int(os.environ.get("SQAP_EXAMPLES", "0"))
# Bytes of address space: far more than a tiny policy takes, far less than a made-up size.
ROOM = 3 << 30
STATM = Path("/proc/self/statm")
SECONDS = 60
LONGEST = 1600  # characters of a sentence


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generated")


@pytest.fixture(scope="module")
def bases(root: Path) -> Callable[[str], Base]:
    """``bases("cogact")``: a valid directory, written once."""
    made: dict[str, Base] = {}

    def make(name: str) -> Base:
        if name not in made:
            made[name] = make_base(name, root, Payload(root / "executed"))
        return made[name]

    return make


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_directory_with_faults_acts_right_or_is_refused_in_a_sentence(bases, root, name):
    base = bases(name)

    @settings(
        max_examples=max(EXAMPLES // len(LAYOUTS), 20),
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(
        st.lists(base.mutations, min_size=1, max_size=3, unique_by=repr), st.integers(0, 3), st.integers(0, 3)
    )
    def check(mutations, seal, also):
        _check(base, root, mutations, seal=seal > 0, also=also)

    check()


def _check(base: Base, root: Path, mutations: list[Mutation], *, seal: bool, also: int) -> None:
    """Put the faults into a copy of a valid directory, and do what users do with one."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        directory = Path(folder) / "policy"
        shutil.copytree(base.directory, directory, copy_function=os.link)
        effect = apply_all(directory, mutations, seal=seal)
        before = _listing(Path(folder))
        with _guarded():
            _check_policy(directory, base, effect)
            if also == 0:
                _check_shell(directory, base)
            if also == 1:
                _check_fingerprint(directory, base)
        assert _listing(Path(folder)) == before
        assert not (root / "executed").exists(), "code in a pickle was run"


def _check_policy(directory: Path, base: Base, effect: Effect) -> None:
    try:
        policy = sqap.load(directory, **base.layout.options)
    except SqapError as error:
        _check_sentence(str(error), directory)
        return
    try:
        actions = policy.act(base.observation, seed=0)
    except CheckpointError as error:
        _check_sentence(str(error), directory)
        return
    except SqapError as error:  # about the observation, which is not in the directory
        _check_sentence(str(error), None)
        return
    assert effect is not Effect.REFUSED, "it was to be refused"
    assert np.isfinite(actions).all(), actions
    if effect is Effect.EQUAL:
        assert np.array_equal(actions, base.actions), "it acts otherwise than before"


def _check_fingerprint(directory: Path, base: Base) -> None:
    try:
        checkpoints.fingerprint(directory, Choices(**base.layout.options))
    except SqapError as error:
        _check_sentence(str(error), directory)


def _check_shell(directory: Path, base: Base) -> None:
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in base.layout.options.items()]
    result = CliRunner().invoke(app, ["inspect", str(directory), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in (0, 1)
    assert "Traceback" not in result.output
    if result.exit_code == 1:
        last = result.stderr.splitlines()[-1]  # behind warnings, if there are any
        assert last.startswith("error: "), result.stderr
        _check_sentence(last, directory)


def _check_sentence(message: str, directory: Path | None) -> None:
    """One line that says where, and no list without an end."""
    assert message.strip() == message != ""
    assert len(message.splitlines()) == 1, message
    assert "Traceback" not in message
    assert message.isprintable(), message
    if directory is not None:
        assert str(directory) in message, message
    assert len(message) < LONGEST + 3 * len(str(directory)), message


@contextmanager
def _guarded() -> Iterator[None]:
    """Little memory, and an end: a size that is made up is noticed before the machine is out of both."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    room = limits[0]
    if STATM.exists():  # only Linux counts, and keeps to the limit
        room = int(STATM.read_text().split()[0]) * resource.getpagesize() + ROOM
    handler = signal.signal(signal.SIGALRM, _give_up)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (room, limits[1]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


class _Hang(BaseException):
    """Not an exception that code would take for one of its own."""


def _give_up(*_: object) -> None:
    raise _Hang(f"nothing came of it in {SECONDS} seconds")


def _listing(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*"))
