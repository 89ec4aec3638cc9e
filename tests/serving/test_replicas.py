"""``sqap serve --ray``: what is asked of a cluster, and a real one where Ray is installed."""

from __future__ import annotations

import os
import signal
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import sqap
from sqap.checkpoints.choices import Choices
from sqap.cli import app
from sqap.cli.serve import place
from sqap.errors import CheckpointError, InputError
from sqap.evaluation.ensemble import AdaptiveEnsemble
from sqap.serving import Limits, PolicyClient, Rejected, ServerSettings
from sqap.serving.asgi import Application
from sqap.serving.replicas import Replicas, check_cores, deployment_options, http_options
from sqap.serving.service import Service
from tests.serving.tools import KEY, get_at, serving


def test_a_fixed_number_of_replicas_holds_as_many_robots_each_as_one_server():
    settings = ServerSettings(limits=Limits(connections=10), drain_s=7)
    options = deployment_options(Replicas(2, 2, cores=3), settings)
    assert options["num_replicas"] == 2
    assert "autoscaling_config" not in options
    assert options["ray_actor_options"] == {"num_cpus": 3}
    assert options["max_ongoing_requests"] > 10, "the eleventh is told why it is refused"
    assert options["graceful_shutdown_timeout_s"] == 7


def test_replicas_follow_the_robots_that_are_connected():
    options = deployment_options(Replicas(1, 4, robots=6), ServerSettings())
    assert "num_replicas" not in options
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (1, 4)
    assert scaling["target_ongoing_requests"] == 6
    assert scaling["downscale_delay_s"] > scaling["upscale_delay_s"], "a robot forgets with its replica"


def test_ray_listens_where_the_server_would():
    tls = Path("cert.pem"), Path("key.pem")
    assert http_options(ServerSettings("0.0.0.0", key=KEY, tls=tls), 8001) == {
        "host": "0.0.0.0",
        "port": 8001,
        "ssl_certfile": str(Path.cwd() / "cert.pem"),  # the proxy is elsewhere
        "ssl_keyfile": str(Path.cwd() / "key.pem"),
    }
    assert http_options(ServerSettings(), 8000) == {"host": "127.0.0.1", "port": 8000}


def test_a_machine_that_is_too_small_is_a_sentence():
    check_cores(Replicas(1, 2, cores=2), 4)
    with pytest.raises(InputError, match="2 replicas with --cores 3 need 6 cores, this machine has 4"):
        check_cores(Replicas(1, 2, cores=3), 4)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--replicas", "2"], "--replicas: for replicas on a Ray cluster; give --ray as well"),
        (["--ray", "--replicas", "2", "--max-replicas", "3"], "--replicas is a fixed number"),
        (["--ray", "--min-replicas", "3", "--max-replicas", "2"], "at least 3 replicas, but at most 2"),
        (["--ray", "--robots-per-replica", "4"], "give --max-replicas as well"),
        (["--ray", "--max-replicas", "2", "--robots-per-replica", "0"], "robots of the replicas must be"),
        (["--ray", "--host", "0.0.0.0"], "would need no key: give --api-key-file"),
        (["--ray", "--ensemble", "9"], "an ensemble can be of up to 8 chunks"),
    ],
)
def test_a_mistake_is_one_sentence(saved: Path, options, sentence):
    result = CliRunner().invoke(app, ["serve", str(saved), *options])
    assert result.exit_code == 1
    assert sentence in " ".join(result.output.split())


def test_without_ray_one_sentence_says_what_to_install(saved: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "sqap.serving.ray_serve", raising=False)
    result = CliRunner().invoke(app, ["serve", str(saved), "--ray"])
    assert result.exit_code == 1
    assert 'serving on Ray needs ray; pip install "sqap[ray]"' in " ".join(result.output.split())


def test_a_replica_finds_the_policy_that_was_named(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("reference", "mine"):
        (tmp_path / name).mkdir()
    assert place("mine") == str(tmp_path / "mine")
    assert place("reference") == "reference", "the bundled one, whatever is called so here"
    assert place("org/name") == "org/name"


@pytest.fixture
def ray_serve():
    """The module, where Ray is installed: it is too large to be among the tools for development."""
    pytest.importorskip("ray.serve", reason='needs Ray: pip install "sqap[ray]"')
    from sqap.serving import ray_serve

    return ray_serve


@pytest.mark.usefixtures("usual_log")
def test_a_machine_with_another_policy_is_found_out(ray_serve, saved: Path):
    served = ray_serve.Served(str(saved), Choices(), "another", ServerSettings())
    with pytest.raises(CheckpointError, match="is another policy than on the machine that serves it"):
        ray_serve._load(served)


def test_a_replica_that_computes_nothing_is_replaced(ray_serve, policy):
    replica = ray_serve.Replica()
    replica.app = Application(Service(policy, ServerSettings()))
    with pytest.raises(RuntimeError, match="nothing computes"):
        replica.check_health()
    replica.app.service.broken = lambda: None
    replica.check_health()


def replica_processes(mark: str) -> list[int]:
    """Those of the cluster whose environment has a mark."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            name, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        except (OSError, ValueError):
            continue
        if name.startswith(b"ray::ServeReplica") and mark.encode() in environment:
            found.append(int(process.name))
    return found


@pytest.mark.usefixtures("ray_serve")
def test_robots_of_a_cluster_keep_their_replica_until_it_dies(
    saved: Path, observe, tmp_path: Path, monkeypatch
):
    mark = uuid.uuid4().hex
    monkeypatch.setenv("SQAP_TEST_CLUSTER", mark)
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    policy = sqap.load(saved)

    def replica(reply) -> str:
        return reply.request_id.partition("-")[0]

    options = "--ray", "--replicas", 2, "--port", 0, "--api-key-file", key, "--ensemble", 2
    with serving(saved, *options) as (process, url):
        robots = [PolicyClient(url, None, api_key=KEY, timeout=120) for _ in range(4)]
        first = [robot.infer(observe(i), seed=i) for i, robot in enumerate(robots)]
        second = [robot.infer(observe(i), seed=i + 10) for i, robot in enumerate(robots)]
        assert len({replica(reply) for reply in first}) == 2, "both have robots"
        for i, (before, after) in enumerate(zip(first, second, strict=True)):
            averaged = AdaptiveEnsemble(2)
            for reply, seed in ((before, i), (after, i + 10)):
                wanted = averaged.add(policy.act(observe(i), seed=seed))
                assert np.array_equal(reply.actions[0], wanted), "the ensemble of this robot alone"
            assert after.request_id == before.request_id.removesuffix("-1") + "-2", "one connection"
        assert get_at(url, "/healthz")[0] == 401
        for path in ("/-/healthz", "/-/routes", "/-/"):  # which Ray answers to anybody
            assert get_at(url, path)[0] == 404
        assert get_at(url, "/healthz", f"Api-Key {KEY}") == (200, "OK\n")
        with PolicyClient(url, None, api_key="x" * 16) as stranger, pytest.raises(Rejected, match="401"):
            stranger.metadata()

        os.kill(replica_processes(mark)[0], signal.SIGKILL)
        third = [robot.infer(observe(i), seed=i + 20) for i, robot in enumerate(robots)]
        stayed = [i for i, reply in enumerate(third) if reply.request_id.endswith("-3")]
        assert 0 < len(stayed) < 4
        for i, reply in enumerate(third):
            if i not in stayed:  # connected again, where nothing is known of it
                assert reply.request_id.endswith("-1")
                assert np.array_equal(reply.actions[0], policy.act(observe(i), seed=i + 20)[0])
        for robot in robots:
            robot.close()
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=120)
        assert process.returncode == 0, log
    assert not replica_processes(mark)
