"""The server as robots and operators meet it."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidMessage, InvalidStatus
from websockets.sync.client import connect

import sqap
from sqap import Policy, environments
from sqap.errors import InputError
from sqap.evaluation.ensemble import AdaptiveEnsemble
from sqap.evaluation.rollout import run_episode
from sqap.policy import Step, _check_actions
from sqap.processing import ActionUnits
from sqap.serving import Limits, PolicyClient, ServerSettings
from sqap.serving.metadata import metadata
from sqap.serving.requests import write_request
from sqap.serving.server import Server
from sqap.serving.wire import pack, unpack
from tests.serving.tools import KEY, Gate, ask, get, robot


class OpenPi:
    """A policy for a rollout that speaks through openpi's own client."""

    def __init__(self, port: int, key: str | None = None) -> None:
        client = pytest.importorskip("openpi_client.websocket_client_policy")
        self.client = client.WebsocketClientPolicy("127.0.0.1", port, api_key=key)
        self.chunks: list[np.ndarray] = []

    def step(self, observation, *, seed=None, memory=None) -> Step:
        answer = self.client.infer(write_request(observation, seed=seed))
        timing = answer["server_timing"]
        assert set(timing) == {"queue_ms", "infer_ms", "overhead_ms", "total_ms", "batch"}
        parts = timing["queue_ms"] + timing["infer_ms"] + timing["overhead_ms"]
        assert parts == pytest.approx(timing["total_ms"])
        self.chunks.append(answer["actions"])
        return Step(answer["actions"])


def test_openpis_client_runs_an_episode_as_in_process(start):
    policy = sqap.load("reference")
    running = start(policy, key=KEY)
    remote, chunks = OpenPi(running.port, KEY), []
    env = environments.make("metaworld", "button-press-topdown")

    class Local:
        def step(self, observation, *, seed=None, memory=None):
            step = policy.step(observation, seed=seed, memory=memory)
            chunks.append(step.chunk)
            return step

    through, local = run_episode(remote, env, 1_000_003), run_episode(Local(), env, 1_000_003)
    env.close()
    assert len(chunks) > 2
    assert [chunk.tobytes() for chunk in remote.chunks] == [chunk.tobytes() for chunk in chunks]
    assert (through.success, through.steps, through.jerk) == (local.success, local.steps, local.jerk)
    assert local.success


def test_the_first_frame_says_what_the_policy_is(start, policy):
    found = OpenPi(start(ensemble=2).port).client.get_server_metadata()
    assert found["server"] == "sqap"
    assert found["cameras"] == ["corner2"]
    assert (found["horizon"], found["action_dim"], found["state_dim"]) == (1, 4, 0)
    assert found["action_names"] == [None] * 4
    assert found["action_low"] == [-0.5, -0.5, -0.5, -1.0]
    assert found["action_high"] == [0.5, 1.0, 2.0, 1.0]
    assert found["recipe"] == json.loads(json.dumps(policy.recipe.to_json()))
    assert found["weight_bytes"] > 1e5
    assert found["limits"]["batch"] == Limits().batch
    assert {"versions", "kernels", "family", "fingerprint", "action_units", "device"} <= set(found)


def test_actions_are_named_where_their_units_are_known(policy):
    config = dataclasses.replace(policy.config, units=ActionUnits((0, 1, 2), 10.0, 3))
    found = metadata(Policy(policy.model, config, policy.tokenizer), ServerSettings())
    assert found["action_names"] == ["dx", "dy", "dz", "gripper"]
    assert found["action_units"]["millimetres"] == 10.0


def test_what_is_wrong_is_a_text_frame_and_close_1011(start, observe):
    running = start()
    client = OpenPi(running.port)
    with pytest.raises(RuntimeError, match="unknown key 'promt'"):
        client.client.infer({"promt": "x"})
    with pytest.raises(ConnectionClosed) as closed:
        client.client.infer({"prompt": "x"})
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1011
    assert "promt" in closed.value.rcvd.reason
    ask(robot(running), observe())  # others go on


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [("hello", "must be a binary frame"), (b"\xc1", "not valid MessagePack"), (pack({}), "needs|no prompt")],
)
def test_a_frame_that_is_no_observation_is_answered_in_words(start, frame, sentence):
    with robot(start()) as connection:
        connection.send(frame)
        assert len(answer := connection.recv(5)) < 300
        assert isinstance(answer, str)
        with pytest.raises(ConnectionClosed):
            connection.recv(5)


def test_a_missing_camera_harms_its_robot_alone(start, policy, observe):
    """Also where it is in one batch with others."""
    gate = Gate(policy)
    running = start(gate)
    good, bad = write_request(observe(1), seed=1), write_request(observe(2, calibrated=False))
    bad["images"] = {"elsewhere": bad["images"]["corner2"]}
    with robot(running) as first, robot(running) as second, robot(running) as third:
        gate.shut()
        first.send(pack(good))
        gate.wait_for_step()
        second.send(pack(bad))
        third.send(pack(good))
        gate.wait_for_line(running, 2)
        gate.open()
        expected = policy.act(observe(1), seed=1)
        assert np.array_equal(unpack(first.recv(10))["actions"], expected)
        assert "the policy reads camera 'corner2'" in second.recv(10)
        assert np.array_equal(unpack(third.recv(10))["actions"], expected)
    assert gate.batches == [1, 2, 1, 1], "a batch that fails is acted on one by one"


def test_requests_that_arrive_together_are_one_batch_with_the_numbers_of_each_alone(start, policy, observe):
    gate = Gate(policy)
    running = start(gate, limits=Limits(batch=3))
    robots = [robot(running) for _ in range(5)]
    gate.shut()
    robots[0].send(pack(write_request(observe(0), seed=0)))
    gate.wait_for_step()
    for i, connection in enumerate(robots[1:], 1):
        connection.send(pack(write_request(observe(i), seed=i)))
        gate.wait_for_line(running, i)
    gate.open()
    answers = [unpack(connection.recv(10)) for connection in robots]
    for i, answer in enumerate(answers):
        assert np.array_equal(answer["actions"], policy.act(observe(i), seed=i))
    assert gate.batches == [1, 3, 1]
    assert [answer["server_timing"]["batch"] for answer in answers] == [1, 3, 3, 3, 1]


def test_the_latest_observation_of_a_robot_wins_and_the_other_is_refused(start, policy, observe):
    gate = Gate(policy)
    running = start(gate)
    with robot(running) as connection:
        gate.shut()
        connection.send(pack(write_request(observe(0), seed=0)))
        gate.wait_for_step()
        connection.send(pack(write_request(observe(1), seed=1, reset=True)))
        gate.wait_for_line(running, 1)
        connection.send(pack(write_request(observe(2), seed=2)))
        time.sleep(0.1)
        gate.open()
        assert np.array_equal(unpack(connection.recv(10))["actions"], policy.act(observe(0), seed=0))
        assert connection.recv(10) == (
            "refused: a newer observation of this robot came before it was acted on"
        )
        assert np.array_equal(unpack(connection.recv(10))["actions"], policy.act(observe(2), seed=2))
    assert sum(gate.batches) == 2, "nothing was computed for the one in the middle"


def test_late_work_is_dropped_before_it_is_computed(start, policy, observe):
    gate = Gate(policy)
    running = start(gate, deadline_s=30)
    with robot(running) as first, robot(running) as second, robot(running) as third:
        gate.shut()
        first.send(pack(write_request(observe(0))))
        gate.wait_for_step()
        second.send(pack(write_request(observe(1), deadline_s=0.01)))
        third.send(pack(write_request(observe(2), seed=2)))
        gate.wait_for_line(running, 2)
        time.sleep(0.05)
        gate.open()
        assert "longer than its deadline" in second.recv(10)
        assert np.array_equal(unpack(third.recv(10))["actions"], policy.act(observe(2), seed=2))
        ask(second, observe(3))  # its connection stays
    assert gate.batches == [1, 1, 1]


def test_a_full_line_refuses_with_a_reason_and_a_place_is_kept(start, policy, observe):
    gate = Gate(policy)
    running = start(gate, limits=Limits(waiting=1))
    with robot(running) as first, robot(running) as second, robot(running) as third:
        gate.shut()
        first.send(pack(write_request(observe(0))))
        gate.wait_for_step()
        second.send(pack(write_request(observe(1), seed=1)))
        gate.wait_for_line(running, 1)
        third.send(pack(write_request(observe(2))))
        assert third.recv(10) == "refused: 1 robots wait already, as many as may"
        gate.open()
        assert np.array_equal(unpack(second.recv(10))["actions"], policy.act(observe(1), seed=1))
        ask(third, observe(2))


def test_a_robot_that_asks_too_often_is_refused(start, observe):
    with robot(start(limits=Limits(rate_hz=2))) as connection:
        ask(connection, observe())
        connection.send(pack(write_request(observe())))
        assert connection.recv(5) == "refused: more than 2 observations a second came from this robot"
        time.sleep(0.6)
        ask(connection, observe())


def test_memory_and_ensembles_are_each_robots_own_until_it_resets(start, policy, observe):
    class Remembers(Gate):
        """Counts the steps of an episode in its memory, and adds them to its actions."""

        def steps(self, observations, *, seeds=None, memories=None):
            found = super().steps(observations, seeds=seeds, memories=None)
            counts = [0 if memory is None else memory for memory in memories]
            return [Step(step.chunk + n, memory=n + 1) for step, n in zip(found, counts, strict=True)]

    running = start(Remembers(policy), ensemble=2)

    def expected(seeds):
        averaged = AdaptiveEnsemble(2)
        return [averaged.add(policy.act(observe(seed), seed=seed) + n) for n, seed in enumerate(seeds)]

    with robot(running) as a, robot(running) as b:
        answers = {
            (name, i): ask(connection, observe(seed), seed=seed, reset=reset)["actions"]
            for i, reset in ((0, False), (1, False), (2, True), (3, False))
            for name, connection, seed in (("a", a, i), ("b", b, i + 10))
        }
    for name, first in (("a", 0), ("b", 10)):
        wanted = expected([first, first + 1]) + expected([first + 2, first + 3])
        for i, action in enumerate(wanted):
            assert answers[name, i].shape == (1, 4)
            assert np.array_equal(answers[name, i][0], action)


def test_an_ensemble_longer_than_a_chunk_is_refused_before_anything_listens(policy):
    with pytest.raises(InputError, match="up to 8 chunks"):
        asyncio.run(Server(policy, ServerSettings(port=0, ensemble=9)).start())


def test_a_taken_port_is_one_sentence(start, policy):
    running = start()
    with pytest.raises(InputError, match=f"cannot listen on 127.0.0.1 port {running.port}: "):
        asyncio.run(Server(policy, ServerSettings(port=running.port)).start())


def test_no_number_that_is_not_finite_leaves(start, policy, observe):
    class Broken(Gate):
        def steps(self, observations, **given):
            found = super().steps(observations, **given)
            _check_actions(np.full_like(found[0].chunk, np.nan))
            return found

    with robot(start(Broken(policy))) as connection:
        connection.send(pack(write_request(observe())))
        assert "which no robot may be given" in connection.recv(5)


def test_a_bug_is_logged_and_not_told(start, policy, observe, caplog):
    class Buggy(Gate):
        def steps(self, observations, **given):
            raise KeyError("secret")

    running = start(Buggy(policy))
    with robot(running) as connection:
        connection.send(pack(write_request(observe())))
        answer = connection.recv(5)
    assert "met a bug (KeyError)" in answer
    assert "secret" not in answer
    (record,) = [r for r in caplog.records if r.getMessage() == "failed"]
    assert record.fields["request"] == "c1-1"
    assert "secret" in str(record.exc_info[1])


def test_a_bug_in_one_robots_step_harms_no_other_in_its_batch(start, policy, observe):
    class Crashes(Gate):
        def steps(self, observations, **given):
            found = super().steps(observations, **given)
            if any(observation.instruction == "crash" for observation in observations):
                raise RuntimeError
            return found

    gate = Crashes(policy)
    running = start(gate)
    with robot(running) as first, robot(running) as bad, robot(running) as good:
        gate.shut()
        first.send(pack(write_request(observe(0))))
        gate.wait_for_step()
        bad.send(pack(write_request(observe(1, instruction="crash"))))
        good.send(pack(write_request(observe(2), seed=2)))
        gate.wait_for_line(running, 2)
        gate.open()
        assert "met a bug (RuntimeError)" in bad.recv(10)
        assert np.array_equal(unpack(good.recv(10))["actions"], policy.act(observe(2), seed=2))


def test_draining_answers_what_waits_and_lets_nobody_in(start, policy, observe):
    gate = Gate(policy)
    running = start(gate)
    with robot(running) as first, robot(running) as second, ThreadPoolExecutor() as pool:
        gate.shut()
        first.send(pack(write_request(observe(0), seed=0)))
        gate.wait_for_step()
        second.send(pack(write_request(observe(1), seed=1)))
        gate.wait_for_line(running, 1)
        stopping = pool.submit(running.call, running.server.stop())
        time.sleep(0.1)
        with pytest.raises((OSError, InvalidStatus)):
            connect(running.url, open_timeout=2)
        second.send(pack(write_request(observe(2), seed=2)))
        time.sleep(0.1)
        gate.open()
        assert np.array_equal(unpack(first.recv(10))["actions"], policy.act(observe(0), seed=0))
        assert np.array_equal(unpack(second.recv(10))["actions"], policy.act(observe(1), seed=1))
        assert second.recv(10) == "refused: the server is shutting down"
        for connection in (first, second):
            with pytest.raises(ConnectionClosed) as closed:
                connection.recv(10)
            assert closed.value.rcvd.code == 1001
        stopping.result(10)


def test_health_readiness_and_metrics(start, observe):
    running = start()
    assert get(running, "/healthz") == (200, "OK\n")
    assert get(running, "/readyz") == (200, "OK\n")
    assert get(running, "/nothing")[0] == 404
    with robot(running) as connection:
        ask(connection, observe())
        connection.send("text")
        connection.recv(5)
        status, text = get(running, "/metrics")
    assert status == 200
    for line in ('sqap_answers_total{outcome="acted"} 1.0', 'sqap_answers_total{outcome="invalid"} 1.0',
                 "sqap_ready 1.0", "sqap_step_seconds_count 1.0", "sqap_waiting 0.0"):  # fmt: skip
        assert line in text.splitlines()
    running.server.service.draining = True
    assert get(running, "/healthz")[0] == 200
    assert get(running, "/readyz") == (503, "the server is shutting down\n")
    with pytest.raises(InvalidStatus) as refused:
        robot(running)
    assert refused.value.response.status_code == 503


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/events", "/page.js", "/nothing"])
def test_nothing_is_answered_without_the_key(start, path):
    running = start(key=KEY)
    wrong = base64.b64encode(b"user:wrong").decode()
    for authorization in (
        None,
        "Api-Key wrong",
        f"Digest {KEY}",
        KEY,
        f"Basic {wrong}",
        "Basic x",
        "Api-Key é",
    ):
        status, text = get(running, path, authorization)
        assert status == 401
        assert "Authorization: Api-Key KEY" in text
    right = base64.b64encode(f"anyone:{KEY}".encode()).decode()
    expected = 404 if path == "/nothing" else 200
    for authorization in (f"Api-Key {KEY}", f"Bearer {KEY}", f"Basic {right}", f"api-key {KEY}"):
        assert get(running, path, authorization)[0] == expected


def test_robots_need_the_key_too(start):
    running = start(key=KEY)
    with pytest.raises(InvalidStatus) as refused:
        connect(running.url)
    assert refused.value.response.status_code == 401
    connect(running.url, additional_headers={"Authorization": f"Api-Key {KEY}"}).close()


def test_web_pages_of_others_are_kept_out(start):
    running = start()
    with pytest.raises(InvalidStatus) as refused:
        connect(running.url, origin="http://evil.example")
    assert refused.value.response.status_code == 403
    assert get(running, "/events", host="evil.example:8000")[0] == 403
    for host in ("[", "a b", ""):
        assert get(running, "/healthz", host=host)[0] == 403
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000"):
        assert get(running, "/healthz", host=host)[0] == 200


def test_no_more_robots_are_connected_than_may(start, observe):
    running = start(limits=Limits(connections=2))
    with robot(running), robot(running) as second:
        with pytest.raises(InvalidStatus) as refused:
            robot(running)
        assert refused.value.response.status_code == 503
        assert b"2 robots are connected, as many as may" in (refused.value.response.body or b"")
        ask(second, observe())
    until = time.monotonic() + 5
    while running.server.service.live.robots and time.monotonic() < until:
        time.sleep(0.01)
    ask(robot(running), observe())


def test_robots_speak_tls_where_files_are_given(start, observe, tmp_path: Path):
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert], capture_output=True
    )  # fmt: skip
    if made.returncode:
        pytest.skip("openssl makes no certificate here")
    running = start(tls=(cert, key))
    assert running.url.startswith("wss://")
    with PolicyClient(running.url, None, tls=ssl.create_default_context(cafile=str(cert))) as client:
        assert client.infer(observe()).actions.shape == (8, 4)
    with pytest.raises((OSError, InvalidMessage)):
        connect(running.url.replace("wss", "ws"), open_timeout=2)


def test_unused_parts_of_an_observation_are_said_once(start, observe, caplog):
    with robot(start()) as connection:
        message = write_request(observe()) | {"state": [1.0]}
        message["images"]["wrist"] = np.zeros((4, 4, 3), np.uint8)
        for _ in range(2):
            connection.send(pack(message))
            unpack(connection.recv(5))
    (record,) = [r for r in caplog.records if r.getMessage() == "unused"]
    assert record.fields["keys"] == ["wrist", "state"]
