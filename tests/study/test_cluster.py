"""A Ray cluster of several nodes on one machine, one of which is killed in the middle."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sqap.build import build_id
from sqap.checkpoints import fingerprint
from sqap.errors import InputError
from sqap.evaluation import evaluate
from sqap.evaluation.cluster import RayExecutor, _files, check_build, place
from sqap.evaluation.settings import current_settings
from sqap.evaluation.worker import WorkerSpec
from tests.evaluation import evaluation_fakes as fakes

ROOT = Path(__file__).parents[2]
TASKS = ("door-open", "door-close")
MEMORY = 80 << 20  # of a node's object store


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head and two nodes of one processor each."""
    pytest.importorskip("ray", reason='Ray is not installed: pip install "sqap[ray]"')
    from ray.cluster_utils import Cluster

    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))  # nodes inherit it
    node = {"num_cpus": 1, "object_store_memory": MEMORY}
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        found.nodes = [found.add_node(**node) for _ in range(2)]
        found.wait_for_nodes()
        yield found
    finally:
        found.shutdown()


def test_every_episode_is_there_once_though_a_node_is_killed(
    cluster: Any, saved: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log.jsonl"
    killed: list[Any] = []

    def kill(record: Any, done: int, total: int) -> None:
        if done >= 4 and not killed:
            killed.append(cluster.nodes[0])
            cluster.remove_node(killed[0], allow_graceful=False)

    executor = RayExecutor(cluster.address)
    try:
        (run,) = evaluate(
            [saved],
            "metaworld",
            TASKS,
            12,
            100,
            fingerprints=[fingerprint(saved)],
            log=log,
            workers=3,
            threads=1,
            load=fakes.load_stroller,
            make=fakes.make,
            executor=executor,
            keep_going=True,
            progress=kill,
        )
    finally:
        executor.close()
    assert killed
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    keys = Counter((line["episode"]["task"], line["episode"]["seed"]) for line in lines)
    assert keys == {(task, 100 + e): 1 for task in TASKS for e in range(12)}
    assert {line["episode"]["failure"] for line in lines} == {None}
    (here,) = evaluate(
        [saved],
        "metaworld",
        TASKS,
        12,
        100,
        fingerprints=[fingerprint(saved)],
        load=fakes.load_walker,
        make=fakes.make,
    )
    outcomes = [
        [(r.episode.success, r.episode.steps, r.episode.jerk) for r in each.records] for each in (run, here)
    ]
    assert outcomes[0] == outcomes[1]


def spec(saved: Path) -> WorkerSpec:
    return WorkerSpec(str(saved), fingerprint(saved), current_settings("metaworld"))


def test_a_node_that_lacks_the_policy_writes_a_copy(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = _files(spec(saved))
    assert place(spec(saved), files) == saved
    elsewhere = WorkerSpec("/no/such/place", fingerprint(saved), current_settings("metaworld"))
    copy = place(elsewhere, files)
    assert copy.is_relative_to(tmp_path)
    assert fingerprint(copy) == fingerprint(saved)
    assert place(elsewhere, files) == copy
    assert [path.name for path in copy.parent.iterdir()] == [fingerprint(saved)]


def test_a_node_of_another_build_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = spec(saved)
    check_build(asked)
    monkeypatch.setattr("sqap.evaluation.cluster.build_id", lambda: build_id() | {"kernels": "portable"})
    with pytest.raises(InputError, match=r"has kernels portable, .*; install the same build"):
        check_build(asked)


def test_without_ray_it_is_said_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "sqap\[ray\]"'):
        RayExecutor()
