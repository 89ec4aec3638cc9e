"""The clients: what they return, and what they do when the server is late, busy, gone or back."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
from websockets.sync.server import serve

from sqap import environments
from sqap.errors import InputError
from sqap.evaluation.rollout import run_episode
from sqap.pruning.memory import Memory
from sqap.serving import AsyncPolicyClient, Limits, PolicyClient, Refused, Rejected, Unreachable
from sqap.serving.wire import pack
from tests.serving.tools import KEY, Gate, free_port


def test_it_acts_as_the_policy_does(start, policy, observe):
    running = start(key=KEY)
    with PolicyClient(port=running.port, api_key=KEY) as client:
        assert client.metadata()["cameras"] == ["corner2"]
        reply = client.infer(observe(1), seed=4)
        assert np.array_equal(reply.actions, policy.act(observe(1), seed=4))
        assert reply.timing["infer_ms"] > 0
        assert reply.request_id == "c1-1"
        assert np.array_equal(client.step(observe(2), seed=5).chunk, policy.act(observe(2), seed=5))


def test_the_async_client_does_too(start, policy, observe):
    running = start()

    async def both() -> list[np.ndarray]:
        async with AsyncPolicyClient(running.url, None) as a, AsyncPolicyClient(running.url, None) as b:
            replies = await asyncio.gather(a.infer(observe(1), seed=1), b.infer(observe(2), seed=2))
            return [reply.actions for reply in replies]

    for seed, actions in enumerate(asyncio.run(both()), 1):
        assert np.array_equal(actions, policy.act(observe(seed), seed=seed))


def test_tasks_that_share_a_connection_get_each_their_own_answer(start, policy, observe):
    async def all_at_once() -> list[np.ndarray]:
        async with AsyncPolicyClient(start().url, None) as client:
            asked = [client.infer(observe(seed), seed=seed) for seed in range(6)]
            return [reply.actions for reply in await asyncio.gather(*asked)]

    for seed, actions in enumerate(asyncio.run(all_at_once())):
        assert np.array_equal(actions, policy.act(observe(seed), seed=seed))


def test_a_reset_that_was_not_heard_is_said_again(start, policy, observe):
    gate = Gate(policy)
    running = start(gate, ensemble=2)
    with PolicyClient(running.url, None, timeout=2) as client:
        client.infer(observe(1), seed=1)
        gate.shut()
        client.reset()
        with pytest.raises(Unreachable):
            client.infer(observe(2), seed=2)
        gate.open()
        time.sleep(0.2)
        actions = client.infer(observe(3), seed=3).actions
    assert np.array_equal(actions[0], policy.act(observe(3), seed=3)[0])


def test_it_drives_an_episode_in_place_of_a_policy(start, policy):
    env = environments.make("metaworld", "reach")
    env.max_steps = 20
    with PolicyClient(start().url, None) as client:
        remote, local = run_episode(client, env, 3), run_episode(policy, env, 3)
    env.close()
    assert (remote.steps, remote.jerk) == (local.steps, local.jerk)


def test_a_memory_is_the_servers(start, observe):
    import torch

    with PolicyClient(start().url, None) as client, pytest.raises(InputError, match="call reset"):
        client.step(observe(), memory=Memory(torch.zeros(1, 1, 1)))


def test_reset_begins_an_episode(start, policy, observe):
    running = start(ensemble=2)
    with PolicyClient(running.url, None) as client:
        first = client.infer(observe(1), seed=1).actions
        averaged = client.infer(observe(2), seed=2).actions
        client.reset()
        again = client.infer(observe(2), seed=2).actions
        client.infer(observe(1), seed=1)
    assert np.array_equal(again[0], policy.act(observe(2), seed=2)[0])
    assert not np.array_equal(again, averaged)
    assert np.array_equal(first[0], policy.act(observe(1), seed=1)[0])


def test_a_refusal_is_for_now_and_a_rejection_for_good(start, policy, observe):
    running = start(limits=Limits(rate_hz=2, image_side=40))
    with PolicyClient(running.url, None) as client:
        client.infer(observe())
        with pytest.raises(Refused, match="more than 2 observations a second came from this robot"):
            client.infer(observe())
        time.sleep(0.6)
        client.infer(observe())
    wide = observe(calibrated=False)
    object.__setattr__(wide, "images", {"corner2": np.zeros((4, 41, 3), np.uint8)})
    with PolicyClient(running.url, None) as client:
        with pytest.raises(Rejected, match="up to 40 pixels"):
            client.infer(wide)
        client.infer(observe())  # on a new connection


def test_a_wrong_key_is_not_tried_again(start, observe):
    running = start(key=KEY)
    begin = time.monotonic()
    with (
        PolicyClient(running.url, None, api_key="x" * 16) as client,
        pytest.raises(Rejected, match="answered 401: This server needs its API key"),
    ):
        client.infer(observe())
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("host", ["ws://[", "ws://"])
def test_what_is_no_address_is_said(host):
    with pytest.raises(InputError, match="no address of a server"):
        PolicyClient(host, None)


def test_a_server_that_is_not_there_is_said_in_time(observe):
    port = free_port()
    with PolicyClient(port=port, timeout=0.3) as client:
        begin = time.monotonic()
        with pytest.raises(Unreachable, match=rf"no answer from ws://127.0.0.1:{port} in 0.3 s: .*Connect"):
            client.infer(observe())
        assert time.monotonic() - begin < 5


def test_it_waits_for_a_server_that_starts_later(start, policy, observe):
    port = free_port()
    found = []
    with PolicyClient(port=port, timeout=20) as client:
        asking = threading.Thread(target=lambda: found.append(client.infer(observe(), seed=1)))
        asking.start()
        time.sleep(0.3)
        start(port=port)
        asking.join(20)
    assert np.array_equal(found[0].actions, policy.act(observe(), seed=1))


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next(start, policy, observe):
    gate = Gate(policy)
    running = start(gate)
    with PolicyClient(running.url, None, timeout=2) as client:
        client.metadata()
        gate.shut()
        with pytest.raises(Unreachable, match="in 2 s"):
            client.infer(observe(1), seed=1)
        gate.open()
        time.sleep(0.2)
        assert np.array_equal(client.infer(observe(2), seed=2).actions, policy.act(observe(2), seed=2))
    assert len(running.server.service.live._episodes) == 1, "all on one connection"


def test_an_observation_is_sent_again_where_the_connection_broke(start, policy, observe):
    gate, port = Gate(policy), free_port()
    first = start(gate, port=port)
    answers = []
    with PolicyClient(port=port, timeout=30) as client:
        client.infer(observe(0))
        gate.shut()
        asking = threading.Thread(target=lambda: answers.append(client.infer(observe(1), seed=1)))
        asking.start()
        gate.wait_for_step()
        first.loop.call_soon_threadsafe(cut, first)
        gate.open()
        asking.join(20)
    assert np.array_equal(answers[0].actions, policy.act(observe(1), seed=1))


def test_a_server_that_closes_again_and_again_is_asked_less_and_less_often(observe):
    visits = 0

    def leave(connection) -> None:
        nonlocal visits
        visits += 1
        connection.send(pack({"server": "other"}))

    with serve(leave, "127.0.0.1", 0) as server:
        serving = threading.Thread(target=server.serve_forever)
        serving.start()
        with (
            PolicyClient(port=server.socket.getsockname()[1], timeout=1) as client,
            pytest.raises(Unreachable, match="in 1 s: "),
        ):
            client.infer(observe())
        server.shutdown()
        serving.join()
    assert 1 <= visits < 20


def cut(running) -> None:
    """Break every connection as if the network had."""
    for connection in running.server._listener.connections:
        connection.transport.abort()


def test_closing_twice_is_once(start):
    client = PolicyClient(start().url, None)
    client.metadata()
    client.close()
    client.close()
