"""The server's HTTP side: health, metrics and the page, which robots' handshakes pass on their way.

`websockets` answers a request with one complete response and closes the connection. So ``/events`` gives one
server-sent event, as soon as there is something new, after which the browser asks for the next.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from http import HTTPStatus
from importlib.resources import files
from typing import Any

from websockets.http11 import Request, Response

from sqap.serving.live import Live
from sqap.serving.logs import event
from sqap.serving.metrics import CONTENT_TYPE_LATEST, Metrics
from sqap.serving.pages import authorized, is_our_name, path_of, peer, query, respond
from sqap.serving.sessions import Job, Line
from sqap.serving.settings import ServerSettings

EVENT_SECONDS = 2.0  # after which the page is told that nothing is new; well within a handshake's time
LOOK_SECONDS = 0.05  # between two looks whether something is
RETRY_MS = 500  # until a browser asks again by itself
ASSETS = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}


class Http:
    """Answers every request but the handshakes of robots that may come in.

    Args:
        settings: of the server.
        family: of its policy.
        live: what the page shows.
        line: where robots wait.
        metrics: of the server.
        not_ready: why observations are not taken now; None if they are.
    """

    def __init__(
        self,
        settings: ServerSettings,
        family: str,
        live: Live,
        line: Line[Job],
        metrics: Metrics,
        not_ready: Callable[[], str | None],
    ) -> None:
        self._settings, self._family, self._live = settings, family, live
        self._line, self._metrics, self._not_ready = line, metrics, not_ready
        folder = files("sqap.serving") / "page"
        self._assets = {path: ((folder / name).read_bytes(), kind) for path, (name, kind) in ASSETS.items()}

    async def answer(self, address: Any, request: Request, robot: bool) -> Response | None:
        """The response to a request; None lets a robot's handshake go on.

        Args:
            address: whose it is.
            request: what is asked.
            robot: it is a WebSocket handshake.
        """
        refusal = self._refuse(request, robot)
        if refusal is not None:
            status = int(refusal.status_code)
            self._metrics.connections.labels(str(status)).inc()
            event(logging.WARNING, "refused", peer=peer(address), status=status)
            return refusal
        return None if robot else await self._page(request)

    def _refuse(self, request: Request, robot: bool) -> Response | None:
        settings, robots = self._settings, len(self._live.robots)
        if not authorized(request, settings.key):
            return respond(
                HTTPStatus.UNAUTHORIZED,
                "This server needs its API key: Authorization: Api-Key KEY.\n",
                WWW_Authenticate='Basic realm="sqap: the API key is the password"',
            )
        if settings.key is None and settings.loopback and not is_our_name(request):
            return respond(HTTPStatus.FORBIDDEN, "Without a key this server answers to localhost alone.\n")
        if not robot:
            return None
        if "Origin" in request.headers:  # robots have none
            return respond(HTTPStatus.FORBIDDEN, "Browsers are not let in as robots.\n")
        why = self._not_ready()
        if why is None and robots >= settings.limits.connections:
            why = f"{robots} robots are connected, as many as may"
        return None if why is None else respond(HTTPStatus.SERVICE_UNAVAILABLE, f"Not now: {why}.\n")

    async def _page(self, request: Request) -> Response:
        path = path_of(request)
        if path == "/healthz":
            return respond(HTTPStatus.OK, "OK\n")
        if path == "/readyz":
            why = self._not_ready()
            status = HTTPStatus.OK if why is None else HTTPStatus.SERVICE_UNAVAILABLE
            return respond(status, f"{why or 'OK'}\n")
        if path == "/metrics":
            return respond(HTTPStatus.OK, self._metrics.text(), CONTENT_TYPE_LATEST)
        if path == "/events":
            return await self._event(request)
        if path in self._assets:
            return respond(HTTPStatus.OK, *self._assets[path])
        return respond(HTTPStatus.NOT_FOUND, "There is nothing at this path.\n")

    async def _event(self, request: Request) -> Response:
        """Wait for something new, at most `EVENT_SECONDS`, if the page has seen what there is."""
        seen, until = query(request, "seen"), time.monotonic() + EVENT_SECONDS
        ready = self._not_ready()
        while seen == str(self._live.changes) and time.monotonic() < until and self._not_ready() == ready:
            await asyncio.sleep(LOOK_SECONDS)
        state: dict[str, Any] = {
            "changes": self._live.changes,
            "not_ready": self._not_ready(),
            "waiting": len(self._line),
            "waiting_limit": self._settings.limits.waiting,
            "family": self._family,
            **self._live.state(),
            "shown": None,
        }
        robot = self._live.shown(query(request, "robot"))
        if robot is not None and robot.observation is not None and robot.step is not None:
            seen_by = robot.name, robot.observation, robot.step
            state["shown"] = await asyncio.to_thread(self._live.picture, *seen_by)  # robots do not wait
        text = f"retry: {RETRY_MS}\ndata: {json.dumps(state)}\n\n"
        return respond(HTTPStatus.OK, text, "text/event-stream")
