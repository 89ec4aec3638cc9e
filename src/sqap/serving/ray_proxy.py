"""What runs in Ray Serve's proxies, which import it by name: Ray's own pages are not there.

Ray's proxy answers ``/-/healthz`` and ``/-/routes`` itself, to anybody. All other requests go to a replica,
which asks for the key.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from sqap.serving.asgi import Receive, Scope, Send, send_response
from sqap.serving.pages import respond

# Of Ray Serve's processes: where a proxy finds `middleware`, and the seconds that it has to be ready, since
# importing this module imports PyTorch.
ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.middleware",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
}
OWN_PAGES = "/-/"


class WithoutOwnPages:
    """ASGI middleware that answers 404 for `OWN_PAGES`.

    Args:
        app: the proxy.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or leave it to the proxy."""
        if scope["type"] == "http" and scope["path"].startswith(OWN_PAGES):
            await send_response(
                "http.response", respond(HTTPStatus.NOT_FOUND, "There is nothing at this path.\n"), send
            )
        else:
            await self._app(scope, receive, send)


def middleware() -> list[Any]:
    """For Ray Serve, which asks for Starlette's class."""
    from starlette.middleware import Middleware

    return [Middleware(WithoutOwnPages)]
