"""What networks and strangers do: the server goes on, leaks nothing, and says why it refuses."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import struct
import time

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from sqap import Observation
from sqap.policy import Step
from sqap.serving import Limits
from sqap.serving import server as server_module
from sqap.serving.requests import write_request
from sqap.serving.wire import pack, unpack
from tests.serving.tools import Gate, ask, get, robot

HANDSHAKE = (
    "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def raw(running, handshake: bool = True) -> socket.socket:
    """A TCP connection, behind the WebSocket handshake and the greeting if asked."""
    connection = socket.create_connection(("127.0.0.1", running.port), timeout=10)
    if handshake:
        connection.sendall(HANDSHAKE.encode())
        assert b"101 Switching Protocols" in connection.recv(4096)
    return connection


def gone(connection: socket.socket) -> bool:
    """Whether the server has closed it; what it still sends is read."""
    try:
        while connection.recv(65536):
            pass
    except (ConnectionResetError, BrokenPipeError):
        pass
    except TimeoutError:
        return False
    return True


def resident() -> int:
    """Bytes of this process in memory, the server's among them."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def wait_until(condition, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_robot_killed_while_it_waits_costs_no_step_and_one_killed_in_its_step_harms_nobody(
    start, policy, observe
):
    gate = Gate(policy)
    running = start(gate)
    in_step, waiting, other = robot(running), robot(running), robot(running)
    gate.shut()
    in_step.send(pack(write_request(observe(0))))
    gate.wait_for_step()
    waiting.send(pack(write_request(observe(1))))
    gate.wait_for_line(running, 1)
    for dead in (in_step, waiting):
        dead.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        dead.socket.close()  # as the kernel does for a process that is killed
    wait_until(lambda: len(running.server.service.live.robots) == 1)
    assert len(running.server.service.line) == 0
    gate.open()
    assert np.array_equal(ask(other, observe(2), seed=2)["actions"], policy.act(observe(2), seed=2))
    assert gate.batches == [1, 1]


def test_a_connection_that_went_silent_is_closed(start, monkeypatch):
    """Half open: the other side is gone, and no packet says so."""
    monkeypatch.setattr(server_module, "PING_SECONDS", 0.2)
    running = start()
    connection = raw(running)
    wait_until(lambda: len(running.server.service.live.robots) == 1)
    wait_until(lambda: not running.server.service.live.robots, 5)
    assert gone(connection)


def test_a_connection_that_never_asks_is_closed(start, monkeypatch):
    monkeypatch.setattr(server_module, "OPEN_SECONDS", 0.2)
    running = start()
    silent, half = raw(running, False), raw(running, False)
    half.sendall(HANDSHAKE[:40].encode())
    assert gone(silent)
    assert gone(half)


@pytest.mark.parametrize(
    "request_text",
    ["NONSENSE\r\n\r\n", "GET / HTTP/1.1\r\n" + "A: b\r\n" * 2000 + "\r\n", "GET /" + "x" * 100_000,
     "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello", "\x16\x03\x01\x02"],
)  # fmt: skip
def test_what_is_no_http_is_closed(start, observe, request_text):
    running = start()
    connection = raw(running, False)
    try:
        connection.sendall(request_text.encode())
        connection.shutdown(socket.SHUT_WR)
    except OSError:  # it was closed already
        pass
    assert gone(connection)
    ask(robot(running), observe())


def test_an_announced_length_of_two_gigabytes_is_refused_unread(start, observe):
    running = start()
    before = resident()
    connection = raw(running)
    connection.sendall(b"\x82" + struct.pack("!BQ", 0x80 | 127, 2**31) + b"\0\0\0\0" + b"x" * 1000)
    answer = b""
    while chunk := connection.recv(65536):
        answer += chunk
    assert answer[-200:].find(struct.pack("!H", 1009)) >= 0, "close code: message too big"
    assert resident() - before < 200e6
    ask(robot(running), observe())


def test_a_message_over_the_limit_in_many_frames_is_refused(start, observe):
    running = start(limits=Limits(message_bytes=10_000))
    connection = robot(running)
    with pytest.raises(ConnectionClosed) as closed:
        send_and_receive(connection, [b"x" * 1000] * 11)
    assert closed.value.rcvd.code == 1009
    ask(robot(running), observe())


def send_and_receive(connection, message):
    connection.send(message)
    return connection.recv(5)


def test_frames_that_are_no_websocket_frames_end_the_connection_alone(start, observe):
    running = start()
    for frame in (b"\xff" * 64, b"\x82\x05hello", b"\x83\x80\0\0\0\0", b"\x81\x81\0\0\0\0\xff"):
        connection = raw(running)
        connection.sendall(frame)
        assert gone(connection)
    ask(robot(running), observe())


@pytest.mark.parametrize(
    "changes",
    [
        {"images": {"corner2": np.zeros((32, 32, 3), np.float32)}},
        {"images": {"corner2": np.zeros((32, 32), np.uint8)}},
        {"images": {"corner2": np.zeros((1, 1, 3), np.uint8)}, "end_effector": [float("nan")] * 3},
        {"state": np.array([np.nan])},
        {"prompt": "\0"},
    ],
)
def test_wrong_arrays_and_numbers_that_are_none_are_one_sentence(start, observe, changes):
    running = start()
    connection = robot(running)
    connection.send(pack(write_request(observe(calibrated=False)) | changes))
    answer = connection.recv(5)
    assert isinstance(answer, str) or np.isfinite(unpack(answer)["actions"]).all()
    ask(robot(running), observe())


def test_truncated_observations_are_one_sentence(start, observe):
    running = start()
    frame = pack(write_request(observe()))
    for length in (0, 1, 10, 100, len(frame) - 1):
        connection = robot(running)
        connection.send(frame[:length])
        assert "MessagePack" in connection.recv(5)
    ask(robot(running), observe())


def test_a_robot_that_does_not_read_stops_nobody_and_is_not_read_from(start, policy, observe):
    class Large(Gate):
        def steps(self, observations, **given):
            return [Step(np.zeros((1000, 400), np.float32))] * len(observations)

    running = start(Large(policy), limits=Limits(rate_hz=1e6))
    slow = raw(running)
    payload = pack(write_request(observe()))
    frame = b"\x82" + struct.pack("!BH", 0x80 | 126, len(payload)) + b"\0\0\0\0" + payload
    slow.settimeout(1)
    sent = 0
    try:
        while sent < 20_000:
            slow.sendall(frame)
            sent += 1
    except TimeoutError:
        pass
    assert sent < 20_000, "the server stops reading where nobody reads its answers"
    assert ask(robot(running), observe())["actions"].shape == (1000, 400)
    slow.close()


def test_many_connects_leave_nothing(start, observe):
    """Ten thousand are what `benchmarks/serve_load.py --connects` makes."""
    running = start(limits=Limits(connections=8))
    ask(robot(running), observe())

    def burst(count: int) -> None:
        for i in range(count):
            connection = raw(running, False)
            if i % 3 == 0:
                connection.sendall(HANDSHAKE.encode())
            connection.close()

    def served() -> bool:
        """False while connections of the burst wait to be accepted: together they are too many."""
        try:
            return get(running, "/healthz") == (200, "OK\n")
        except OSError:
            return False

    burst(200)
    wait_until(served)
    wait_until(lambda: quiet(running))
    files = open_files()
    burst(600)
    wait_until(served)
    wait_until(lambda: quiet(running) and open_files() <= files + 2)
    ask(robot(running), observe())


def quiet(running) -> bool:
    """Whether no more than a few connections are there; each has tasks of its own."""
    return len(asyncio.all_tasks(running.loop)) <= 8


def test_connections_beyond_the_limit_are_dropped_at_once_and_room_comes_back(start, observe):
    running = start(limits=Limits(connections=4))
    held = [raw(running, False) for _ in range(8)]
    time.sleep(0.1)
    refused = raw(running, False)
    assert gone(refused)
    for connection in held:
        connection.close()
    wait_until(lambda: quiet(running))
    ask(robot(running), observe())
    assert 'sqap_connections_total{outcome="too many"} 1.0' in get(running, "/metrics")[1]


def test_memory_is_flat_over_many_steps(start, policy):
    class Quick(Gate):
        def steps(self, observations, **given):
            return [Step(np.zeros((8, 4), np.float32))] * len(observations)

    running = start(Quick(policy), limits=Limits(rate_hz=1e6))
    connection = robot(running)
    images = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), dtype=np.uint8)

    def steps(count: int) -> int:
        for i in range(count):
            ask(connection, Observation({"corner2": images[i % 8]}, "open the drawer"))
        gc.collect()
        return resident()

    before = steps(200)
    assert steps(400) - before < 400 * images[0].nbytes / 4, "not even a quarter of the images is kept"
    assert len(running.server.service.live._latencies) <= 240


def test_the_wall_clock_may_jump(start, observe, monkeypatch):
    running = start(deadline_s=5)
    with robot(running) as connection:
        monkeypatch.setattr(time, "time", lambda: 0.0)
        ask(connection, observe())
        monkeypatch.setattr(time, "time", lambda: 1e12)
        ask(connection, observe(), deadline_s=5)


def test_the_greeting_is_the_first_frame_whatever_a_robot_sends_before(start, observe):
    running = start()
    connection = connect(running.url, compression=None)
    connection.send(pack(write_request(observe())))
    assert "cameras" in unpack(connection.recv(5))
    assert "actions" in unpack(connection.recv(5))
