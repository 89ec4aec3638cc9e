"""A service behind somebody else's listener, by ASGI: uvicorn's, or that of Ray Serve.

The messages are those of the specification (https://asgi.readthedocs.io): ``lifespan`` starts and ends the
service, ``http`` is answered by `sqap.serving.http`, ``websocket`` is a robot.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosedError
from websockets.http11 import Request, Response

from sqap.errors import SqapError
from sqap.serving.pages import respond
from sqap.serving.service import GOING_AWAY, Service

Message = dict[str, Any]
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

TOO_BIG, OVERRUN = 1009, 1008  # WebSocket close codes
UNREAD_MESSAGES = 4  # of the largest size, for which a robot may be ahead of its answers
FRAME_BYTES = 256  # that a frame takes beside its content


class AsgiConnection:
    """A robot's WebSocket: a `sqap.serving.service.Connection`.

    What arrives is read at once, since a listener may keep it without bound: a robot that sends far more than
    it is answered is disconnected.

    Args:
        scope: of the connection.
        receive: the listener's next message.
        send: hands a message to the listener.
        message_bytes: of the longest frame.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, message_bytes: int) -> None:
        self.remote_address = scope.get("client")
        self.close_code: int | None = None
        self.close_reason: str | None = None
        self._receive, self._send, self._most = receive, send, message_bytes
        self._frames: asyncio.Queue[str | bytes | None] = asyncio.Queue()  # None: there are no more
        self._unread = 0

    async def read(self) -> None:
        """Read what arrives until the connection is closed."""
        try:
            while self.close_code is None:
                message = await self._receive()
                if message["type"] == "websocket.disconnect":
                    self._close(message.get("code", 1005), message.get("reason"))
                    return
                frame = message.get("bytes")
                await self._take(message["text"] if frame is None else frame)
        finally:
            self._frames.put_nowait(None)

    async def _take(self, frame: str | bytes) -> None:
        if len(frame) > self._most:
            await self.close(TOO_BIG, f"a message may have {self._most} bytes")
            return
        self._unread += len(frame) + FRAME_BYTES
        if self._unread > UNREAD_MESSAGES * self._most:
            await self.close(OVERRUN, "more came than was answered")
            return
        self._frames.put_nowait(frame)

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        while (frame := await self._frames.get()) is not None:
            self._unread -= len(frame) + FRAME_BYTES
            yield frame

    async def send(self, message: str | bytes, /) -> None:
        """Send a frame.

        Raises:
            ConnectionClosedError: the connection is closed.
        """
        if self.close_code is not None:
            raise ConnectionClosedError(None, None)
        try:
            await self._send(
                {"type": "websocket.send", "text" if isinstance(message, str) else "bytes": message}
            )
        except OSError as problem:  # as the specification has it for a connection that is gone
            raise ConnectionClosedError(None, None) from problem

    async def close(self, code: int, reason: str, /) -> None:
        """Close the connection. Safe to call twice."""
        if self.close_code is None:
            self._close(code, reason)
            self._frames.put_nowait(None)
            await self._send({"type": "websocket.close", "code": code, "reason": reason})

    def _close(self, code: int, reason: str | None) -> None:
        self.close_code, self.close_reason = code, reason


class Application:
    """The ASGI application of a service.

    Args:
        service: which is not started yet.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self._robots: set[AsgiConnection] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, keep one robot's connection, or start and stop."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await self._robot(scope, receive, send)
        else:
            await self._request(scope, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            await self.service.start()
        except SqapError as problem:
            await send({"type": "lifespan.startup.failed", "message": str(problem)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.service.drain()
        for robot in list(self._robots):
            await robot.close(GOING_AWAY, "the server is shutting down")
        self.service.stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _robot(self, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        response = await self.service.http.answer(scope.get("client"), _request(scope), True)
        if response is not None:
            await send_response("websocket.http.response", response, send)
            return
        await send({"type": "websocket.accept"})
        robot = AsgiConnection(scope, receive, send, self.service.settings.limits.message_bytes)
        self._robots.add(robot)
        reader = asyncio.create_task(robot.read())
        try:
            await self.service.robot(robot)
        finally:
            self._robots.discard(robot)
            reader.cancel()
            await robot.close(1000, "")

    async def _request(self, scope: Scope, send: Send) -> None:
        if scope["method"] != "GET":
            response = respond(HTTPStatus.METHOD_NOT_ALLOWED, "Here is nothing but GET.\n", Allow="GET")
        else:
            found = await self.service.http.answer(scope.get("client"), _request(scope), False)
            assert found is not None, "only robots' handshakes go on"
            response = found
        await send_response("http.response", response, send)


def _request(scope: Scope) -> Request:
    """An ASGI scope as the request that it was made of."""
    query = scope.get("query_string", b"").decode("latin-1")
    headers = Headers([(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]])
    return Request(scope["path"] + (f"?{query}" if query else ""), headers)


async def send_response(kind: str, response: Response, send: Send) -> None:
    """Send a response as ASGI's messages of a kind: ``http.response``, or ``websocket.http.response``."""
    headers = [
        (name.lower().encode("latin-1"), value.encode("latin-1"))
        for name, value in response.headers.raw_items()
        if name != "Connection"
    ]
    await send({"type": f"{kind}.start", "status": int(response.status_code), "headers": headers})
    await send({"type": f"{kind}.body", "body": response.body or b"", "more_body": False})
