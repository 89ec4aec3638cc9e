"""How many servers a Ray cluster runs for a policy, and what Ray Serve is told of it. Ray is not imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqap.errors import InputError
from sqap.serving.settings import ServerSettings

# A robot loses its memory with its replica, so replicas are removed slowly.
UP_SECONDS, DOWN_SECONDS = 10.0, 600.0
ATTEMPTS = 3  # to start a replica


@dataclass(frozen=True)
class Replicas:
    """Replicas of a policy on a Ray cluster.

    Args:
        least: replicas there always are.
        most: replicas there may be; Ray Serve adds and removes some where there may be more than ``least``.
        robots: connected to a replica, on average, above which another is added.
        cores: that a replica reserves, and computes with.
        address: of the cluster, as for ``ray.init``; None starts one here, for as long as it serves.

    Raises:
        InputError: a number is not positive, or fewer replicas may be than must.
    """

    least: int = 1
    most: int = 1
    robots: float = 8.0
    cores: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        for name in ("least", "most", "robots", "cores"):
            value = getattr(self, name)
            if not value > 0:
                raise InputError(f"{name} of the replicas must be positive, got {value}")
        if self.least > self.most:
            raise InputError(f"at least {self.least} replicas, but at most {self.most}, cannot be")


def check_cores(replicas: Replicas, cores: int) -> None:
    """Refuse a cluster on this machine that could not start all replicas.

    Raises:
        InputError: it has fewer cores.
    """
    if (needed := replicas.most * replicas.cores) > cores:
        raise InputError(
            f"{replicas.most} replicas with --cores {replicas.cores} need {needed} cores, "
            f"this machine has {cores}"
        )


def deployment_options(replicas: Replicas, settings: ServerSettings) -> dict[str, Any]:
    """Arguments of Ray's ``serve.deployment``.

    Ray Serve counts a robot's connection as one request that goes on as long as it is connected.
    """
    connections = settings.limits.connections
    count: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.least < replicas.most:
        count = {
            "autoscaling_config": {
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": replicas.robots,
                "upscale_delay_s": UP_SECONDS,
                "downscale_delay_s": DOWN_SECONDS,
            }
        }
    return count | {
        "ray_actor_options": {"num_cpus": replicas.cores},
        "max_ongoing_requests": 2 * connections,  # HTTP requests as well, which say what is wrong
        "max_queued_requests": connections,
        "graceful_shutdown_timeout_s": settings.drain_s,
        "max_constructor_retry_count": ATTEMPTS,
    }


def http_options(settings: ServerSettings, port: int) -> dict[str, Any]:
    """Where Ray Serve listens, as its ``HTTPOptions``."""
    options: dict[str, Any] = {"host": settings.host, "port": port}
    if settings.tls is not None:
        cert, key = settings.tls
        options |= {"ssl_certfile": str(cert.absolute()), "ssl_keyfile": str(key.absolute())}
    return options
