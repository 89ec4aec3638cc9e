"""A policy's replicas on a Ray cluster. Needs the extra: ``pip install "sqap[ray]"``.

Ray Serve's proxy takes robots' connections and gives each to a replica, where it stays. A replica is a
`sqap.serving.service.Service` behind ASGI, with the memory of the robots that are connected to it. Ray's
processes pickle what they exchange: the settings below, and ASGI's messages, in which a frame of a robot is a
value of type bytes. Nothing unpickles the frame itself.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError

import sqap
from sqap.checkpoints.choices import Choices
from sqap.errors import CheckpointError, InputError, one_line
from sqap.files import reason
from sqap.process import available_cores
from sqap.serving.asgi import Application
from sqap.serving.logs import set_up
from sqap.serving.ray_proxy import ENVIRONMENT
from sqap.serving.replicas import Replicas, check_cores, deployment_options, http_options
from sqap.serving.run import set_up_process, signals
from sqap.serving.service import Service
from sqap.serving.settings import ServerSettings

NAME = "sqap"  # of the application


@dataclass(frozen=True)
class Served:
    """What every replica loads.

    Args:
        source: of the policy, which is at the same place on every machine.
        choices: how it is read, if it is a published one.
        fingerprint: of the policy, if it is known.
        settings: of the server.
        log_requests: every observation is logged.
    """

    source: str
    choices: Choices
    fingerprint: str | None
    settings: ServerSettings
    log_requests: bool = False


class Replica:
    """What Ray Serve asks of a replica beside its requests."""

    app: Application

    def check_health(self) -> None:
        """Ray Serve replaces a replica for which this raises."""
        if (why := self.app.service.broken()) is not None:
            raise RuntimeError(why)


def run(served: Served, replicas: Replicas, started: Callable[[str], None]) -> None:
    """Serve until SIGTERM or SIGINT; robots that are connected then have ``drain_s`` to leave.

    Args:
        served: what the replicas load.
        replicas: of the policy.
        started: called with the address when all that there must be are ready.

    Raises:
        InputError: there is no such cluster, it serves something already, the address is taken, or the
            proxies do not start.
        CheckpointError: a replica could not be started.
    """
    settings = served.settings
    port = _port(settings)
    with _cluster(replicas):
        try:
            serve.start(
                proxy_location="HeadOnly" if settings.loopback else "EveryNode",
                http_options=http_options(settings, port),
            )
        except (RayError, TimeoutError) as problem:
            raise InputError(f"Ray Serve's proxies cannot be started: {one_line(str(problem))}") from problem
        try:
            serve.run(application(served, replicas), name=NAME, route_prefix="/")
        except RuntimeError as problem:
            raise CheckpointError(f"the replicas cannot be started: {problem}") from problem
        started(f"{'ws' if settings.tls is None else 'wss'}://{settings.host}:{port}")
        asyncio.run(_told_to_stop())


def application(served: Served, replicas: Replicas) -> Any:
    """The application for ``serve.run``."""

    def build() -> Application:
        return _load(served)

    return serve.deployment(name=NAME, **deployment_options(replicas, served.settings))(
        serve.ingress(build)(Replica)
    ).bind()


def _load(served: Served) -> Application:
    """In a replica's process: the policy in memory, before its service starts."""
    set_up(served.log_requests)
    set_up_process()
    policy = sqap.load(served.source, **vars(served.choices))
    if policy.fingerprint != served.fingerprint:
        raise CheckpointError(
            f"{served.source} on {socket.gethostname()} is another policy than on the machine that serves it"
        )
    policy.load_weights()
    name = serve.get_replica_context().replica_id.unique_id
    return Application(Service(policy, served.settings, f"{name}-"))


@contextmanager
def _cluster(replicas: Replicas) -> Iterator[None]:
    """A cluster that serves nothing else; Ray Serve on it is shut down in the end."""
    if replicas.address is None:
        check_cores(replicas, available_cores())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Whoever reaches Ray's dashboard runs programs here.
    where: dict[str, Any] = (
        {"address": replicas.address} if replicas.address else {"include_dashboard": False}
    )
    where["runtime_env"] = {"env_vars": ENVIRONMENT}  # Ray Serve starts its proxies with it
    try:
        ray.init(**where)
    except Exception as problem:  # Ray raises what it likes, a bare Exception too
        place = replicas.address or "this machine"
        raise InputError(f"cannot use a Ray cluster at {place}: {problem}") from problem
    try:
        if serve.status().proxies:
            raise InputError(
                f"Ray Serve runs already on the cluster at {replicas.address}, and where it listens cannot "
                "be changed: end it with `serve shutdown`, or use another cluster"
            )
        try:
            yield
        finally:
            serve.shutdown()
    finally:
        ray.shutdown()


def _port(settings: ServerSettings) -> int:
    """The port to listen on, which nobody else does; 0 is made a free one.

    Raises:
        InputError: somebody does.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.create_server((settings.host, settings.port), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as problem:
        raise InputError(
            f"cannot listen on {settings.host} port {settings.port}: {reason(problem)}"
        ) from problem


async def _told_to_stop() -> None:
    with signals() as told:
        await told.wait()
