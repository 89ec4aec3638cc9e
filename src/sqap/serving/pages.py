"""HTTP requests and responses: who asks, whether he may, and what an answer is made of."""

from __future__ import annotations

import base64
import binascii
import hmac
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from sqap.serving.settings import is_loopback

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


def peer(address: Any) -> str:
    """Host and port, of a connection that may be gone already."""
    return ":".join(map(str, (address or ("unknown",))[:2]))


def path_of(request: Request) -> str:
    """A request's path without its query."""
    return request.path.partition("?")[0]


def query(request: Request, name: str) -> str | None:
    """A parameter of the request's query."""
    found = parse_qs(request.path.partition("?")[2]).get(name)
    return found[0] if found else None
