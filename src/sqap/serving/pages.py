"""The server's HTTP side: health, metrics and the page, which WebSocket handshakes pass on their way.

`websockets` answers a request with one complete response and closes the connection. So ``/events`` gives one
server-sent event, as soon as there is something new, and tells the browser's ``EventSource`` to come again.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
from collections.abc import Callable
from http import HTTPStatus
from importlib.resources import files
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import ServerConnection
from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from sqap.serving.settings import is_loopback

RETRY_MS = 200  # until a browser asks for the next event
ASSETS = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def respond(status: HTTPStatus, body: str | bytes, kind: str = "text/plain", **more: str) -> Response:
    """A response that closes the connection. Underscores of further headers' names are hyphens."""
    data = body.encode() if isinstance(body, str) else body
    charset = "" if ";" in kind else "; charset=utf-8"
    headers = Headers(
        {
            "Content-Type": kind + charset,
            "Content-Length": str(len(data)),
            "Connection": "close",
            **SECURITY,
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
    )
    return Response(status, status.phrase, headers, data)


def is_robot(request: Request) -> bool:
    """Whether a request is a WebSocket handshake."""
    return any("websocket" in value.lower() for value in request.headers.get_all("Upgrade"))


def authorized(request: Request, key: str | None) -> bool:
    """Whether a request carries the key: ``Api-Key KEY``, ``Bearer KEY``, or as the password of ``Basic``.

    The comparison takes as long whatever the key is.
    """
    if key is None:
        return True
    values = request.headers.get_all("Authorization")
    scheme, _, given = (values[0] if len(values) == 1 else "").partition(" ")
    if scheme.lower() == "basic":
        try:
            given = base64.b64decode(given, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            given = ""
    elif scheme.lower() not in ("api-key", "bearer"):
        given = ""
    return hmac.compare_digest(given.encode(), key.encode())


def is_our_name(request: Request) -> bool:
    """Whether a request without a key names this machine, as no other site's page can make a browser do.

    A site can let its own name point to 127.0.0.1 (DNS rebinding); the name is then in ``Host``.
    """
    hosts = request.headers.get_all("Host")
    try:
        name = urlsplit(f"//{hosts[0]}").hostname if len(hosts) == 1 else None
    except ValueError:  # a bracket that is not closed
        return False
    return name is not None and is_loopback(name)


def read_assets() -> dict[str, Response]:
    """The page's files by path."""
    folder = files("sqap.serving") / "page"
    return {
        path: respond(HTTPStatus.OK, (folder / name).read_bytes(), kind)
        for path, (name, kind) in ASSETS.items()
    }


def path_of(request: Request) -> str:
    """A request's path without its query."""
    return request.path.partition("?")[0]


def query(request: Request, name: str) -> str | None:
    """A parameter of the request's query."""
    found = parse_qs(request.path.partition("?")[2]).get(name)
    return found[0] if found else None


def one_event(state: object) -> Response:
    """A server-sent event, after which the browser comes again."""
    text = f"retry: {RETRY_MS}\ndata: {json.dumps(state)}\n\n"
    return respond(HTTPStatus.OK, text, "text/event-stream")


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
