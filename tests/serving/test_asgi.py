"""A service behind ASGI, driven as a listener drives it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from sqap.evaluation.ensemble import AdaptiveEnsemble
from sqap.serving import Limits, ServerSettings
from sqap.serving.asgi import Application
from sqap.serving.ray_proxy import WithoutOwnPages
from sqap.serving.requests import write_request
from sqap.serving.service import Service
from sqap.serving.wire import pack, unpack
from tests.serving.tools import KEY, Gate

HEADERS = [(b"host", b"localhost")]


class Exchange:
    """One scope of an application, and the messages that go in and come out."""

    def __init__(self, app: Application, kind: str, **scope: Any) -> None:
        self._in: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._out: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        given = {"type": kind, "path": "/", "headers": HEADERS, "client": ("10.0.0.9", 5)} | scope
        self.task = asyncio.create_task(app(given, self._in.get, self._out.put))

    def give(self, kind: str, **message: Any) -> None:
        self._in.put_nowait({"type": kind} | message)

    async def take(self, kind: str) -> dict[str, Any]:
        message = await asyncio.wait_for(self._out.get(), 60)
        assert message["type"] == kind, message
        return message


async def robot(app: Application) -> Exchange:
    """A connection that has read its greeting."""
    exchange = Exchange(app, "websocket")
    exchange.give("websocket.connect")
    await exchange.take("websocket.accept")
    assert unpack((await exchange.take("websocket.send"))["bytes"])["server"] == "sqap"
    return exchange


async def ask(connection: Exchange, observation: Any, **more: Any) -> dict[str, Any]:
    connection.give("websocket.receive", bytes=pack(write_request(observation, **more)))
    return unpack((await connection.take("websocket.send"))["bytes"])


def served(policy: Any, test: Callable[[Application], Awaitable[None]], **settings: Any) -> None:
    """Run ``test`` between the application's startup and shutdown."""

    async def all_of_it() -> None:
        app = Application(Service(policy, ServerSettings(**settings), "r1-"))
        lifespan = Exchange(app, "lifespan")
        lifespan.give("lifespan.startup")
        await lifespan.take("lifespan.startup.complete")
        await test(app)
        lifespan.give("lifespan.shutdown")
        await lifespan.take("lifespan.shutdown.complete")
        await lifespan.task

    asyncio.run(all_of_it())


def test_each_robot_has_its_own_actions_memory_and_names(policy, observe):
    async def test(app):
        a, b = await robot(app), await robot(app)
        for connection, first in ((a, 0), (b, 10)):
            averaged = AdaptiveEnsemble(2)
            for seed in (first, first + 1):
                answer = await ask(connection, observe(seed), seed=seed)
                wanted = averaged.add(policy.act(observe(seed), seed=seed))
                assert np.array_equal(answer["actions"][0], wanted)
                assert answer["request_id"].startswith("r1-c")
        a.give("websocket.disconnect", code=1006)
        await asyncio.wait_for(a.task, 60)
        assert list(app.service.live.robots) == ["r1-c2"]
        assert app.service.live.robots["r1-c2"].peer == "10.0.0.9:5"

    served(policy, test, ensemble=2)


def test_what_is_wrong_is_told_in_words_and_ends_the_connection(policy):
    async def test(app):
        connection = await robot(app)
        connection.give("websocket.receive", text="hello")
        assert "must be a binary frame" in (await connection.take("websocket.send"))["text"]
        assert (await connection.take("websocket.close"))["code"] == 1011
        await asyncio.wait_for(connection.task, 60)

    served(policy, test)


@pytest.mark.parametrize(("size", "count", "code"), [(5001, 1, 1009), (4900, 15, 1008), (1, 100, 1008)])
def test_a_robot_that_sends_too_much_is_disconnected(policy, observe, size, count, code):
    """Also where a listener would keep whatever nobody reads."""
    gate = Gate(policy)

    async def test(app):
        connection = await robot(app)
        gate.shut()
        connection.give("websocket.receive", bytes=pack(write_request(observe())))
        await asyncio.to_thread(gate.wait_for_step)  # what comes now is read ahead, up to a bound
        for _ in range(count):
            connection.give("websocket.receive", bytes=b"\0" * size)
        assert (await connection.take("websocket.close"))["code"] == code
        gate.open()
        await asyncio.wait_for(connection.task, 60)

    served(gate, test, limits=Limits(message_bytes=5000))


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ([(b"authorization", b"Api-Key " + KEY.encode())], None),
        ([], 401),
        ([(b"authorization", b"Api-Key " + KEY.encode()), (b"origin", b"http://evil.example")], 403),
    ],
)
def test_a_handshake_is_answered_as_by_the_server(policy, more, status):
    async def test(app):
        connection = Exchange(app, "websocket", headers=HEADERS + more)
        connection.give("websocket.connect")
        if status is None:
            await connection.take("websocket.accept")
            connection.give("websocket.disconnect", code=1000)
        else:
            assert (await connection.take("websocket.http.response.start"))["status"] == status
            assert (await connection.take("websocket.http.response.body"))["body"]
        await asyncio.wait_for(connection.task, 60)

    served(policy, test, key=KEY)


def test_http_is_that_of_the_server(policy):
    async def test(app):
        async def get(path, method="GET", **scope):
            exchange = Exchange(app, "http", method=method, path=path, **scope)
            start = await exchange.take("http.response.start")
            body = (await exchange.take("http.response.body"))["body"]
            headers = dict(start["headers"])
            assert int(headers[b"content-length"]) == len(body)
            assert b"connection" not in headers
            return start["status"], body

        assert await get("/healthz") == (200, b"OK\n")
        assert (await get("/nothing"))[0] == 404
        assert (await get("/healthz", "POST"))[0] == 405
        assert b"sqap_ready 1.0" in (await get("/metrics"))[1]
        assert (await get("/healthz", headers=[(b"host", b"evil.example")]))[0] == 403
        status, event = await get("/events", query_string=b"seen=-1")
        assert status == 200
        assert b'"family": "cogact"' in event

    served(policy, test)


def test_shutting_down_answers_what_waits_and_then_says_so(policy, observe):
    gate, seen = Gate(policy), []

    async def test(app):
        connection = await robot(app)
        gate.shut()
        connection.give("websocket.receive", bytes=pack(write_request(observe(1), seed=1)))
        await asyncio.to_thread(gate.wait_for_step)
        asyncio.get_running_loop().call_later(0.1, gate.open)
        seen.append(asyncio.create_task(watch(connection)))

    async def watch(connection):
        answer = unpack((await connection.take("websocket.send"))["bytes"])
        assert np.array_equal(answer["actions"], policy.act(observe(1), seed=1))
        assert (await connection.take("websocket.close"))["code"] == 1001

    served(gate, test)
    assert seen[0].done()
    seen[0].result()


def test_a_policy_that_cannot_be_served_so_is_a_sentence_to_the_listener(policy):
    async def start():
        lifespan = Exchange(Application(Service(policy, ServerSettings(ensemble=9))), "lifespan")
        lifespan.give("lifespan.startup")
        assert "up to 8 chunks" in (await lifespan.take("lifespan.startup.failed"))["message"]

    asyncio.run(start())


@pytest.mark.parametrize(
    ("path", "status"), [("/-/healthz", 404), ("/-/routes", 404), ("/-/", 404), ("/-", 401), ("/", 401)]
)
def test_a_proxys_own_pages_are_shut_and_the_rest_goes_to_the_replica(policy, path, status):
    async def test(app):
        exchange = Exchange(WithoutOwnPages(app), "http", method="GET", path=path)
        assert (await exchange.take("http.response.start"))["status"] == status
        assert (await exchange.take("http.response.body"))["body"]

    served(policy, test, key=KEY)
