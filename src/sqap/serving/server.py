"""The policy server: openpi's protocol for robots, and HTTP for people and their tools, at one port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from websockets.asyncio.server import Server as Listener
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from sqap.errors import InputError
from sqap.files import reason
from sqap.policy import Policy
from sqap.serving.logs import event, logger
from sqap.serving.pages import is_robot
from sqap.serving.service import GOING_AWAY, Service
from sqap.serving.settings import ServerSettings

PING_SECONDS = 20.0  # a robot that does not answer a ping for as long is gone
OPEN_SECONDS = 10.0  # for a handshake
LINGER_SECONDS = 1.0  # for the last answers to leave
BACKLOG = 1024  # connections that wait to be accepted; the system tries a further one again in a second


class Server:
    """Serves one policy to many robots until `stop`.

    Args:
        policy: what acts.
        settings: where, to whom and how much.

    Attributes:
        url: where robots connect, once it is started.
        service: what their connections are given to.
    """

    url: str

    def __init__(self, policy: Policy, settings: ServerSettings) -> None:
        self.settings, self.service = settings, Service(policy, settings)
        self._listener: Listener | None = None

    async def start(self) -> None:
        """Warm the policy up, then listen.

        Raises:
            InputError: the address cannot be listened on, or the TLS files cannot be used.
            SqapError: the policy cannot act.
        """
        settings, limits = self.settings, self.settings.limits
        tls = settings.tls_context()
        await self.service.start()
        try:
            self._listener = await serve(
                self.service.robot,
                settings.host,
                settings.port,
                backlog=BACKLOG,
                process_request=self._answer,
                ssl=tls,
                compression=None,
                max_size=limits.message_bytes,
                max_queue=1,
                open_timeout=OPEN_SECONDS,
                ping_interval=PING_SECONDS,
                ping_timeout=PING_SECONDS,
                close_timeout=LINGER_SECONDS,
                server_header=None,
                create_connection=limited_connection(2 * limits.connections, self.service.too_many),
                logger=logger.getChild("websockets"),
            )
        except OSError as problem:
            await self.stop()
            raise InputError(
                f"cannot listen on {settings.host} port {settings.port}: {reason(problem)}"
            ) from problem
        host, port = self._listener.sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        self.url = f"{'ws' if tls is None else 'wss'}://{host}:{port}"
        event(logging.INFO, "listening", url=self.url, key=settings.key is not None, tls=tls is not None)

    async def stop(self) -> None:
        """Take nothing more, answer what waits, then close every connection."""
        if self._listener is not None:
            self._listener.close(close_connections=False)
        await self.service.drain()
        if self._listener is not None:
            await self._close_connections(self._listener)
        self.service.stop()

    async def _answer(self, connection: ServerConnection, request: Request) -> Response | None:
        return await self.service.http.answer(connection.remote_address, request, is_robot(request))

    async def _close_connections(self, listener: Listener) -> None:
        closing = [
            asyncio.create_task(connection.close(GOING_AWAY, "the server is shutting down"))
            for connection in listener.connections
        ]
        if closing:
            await asyncio.wait(closing, timeout=LINGER_SECONDS)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(listener.wait_closed(), LINGER_SECONDS)


def limited_connection(most: int, refused: Callable[[], None]) -> type[ServerConnection]:
    """A connection of which only ``most`` exist at a time, finished handshake or not; others end at once."""

    class Limited(ServerConnection):
        there = 0
        counted = False

        def connection_made(self, transport):  # type: ignore[no-untyped-def]
            super().connection_made(transport)
            if Limited.there >= most:
                refused()
                transport.abort()
            else:
                Limited.there, self.counted = Limited.there + 1, True

        def connection_lost(self, exc):  # type: ignore[no-untyped-def]
            if self.counted:
                Limited.there, self.counted = Limited.there - 1, False
            super().connection_lost(exc)

    return Limited
