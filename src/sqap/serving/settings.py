"""How a policy is served: where, to whom, and how much of everything."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from sqap.errors import InputError

LEAST_KEY = 16  # characters


@dataclass(frozen=True)
class Limits:
    """What the server takes before it refuses.

    Args:
        connections: robots connected at a time. As many HTTP requests again are answered at a time.
        message_bytes: of one observation's frame.
        image_side: pixels along an image's longer side.
        prompt_characters: of an instruction.
        rate_hz: observations a second of one robot, on average; half a second's worth may come at once.
        waiting: robots whose observation waits for the policy.
        batch: observations that the policy is given at once.

    Raises:
        InputError: one is not positive.
    """

    connections: int = 128
    message_bytes: int = 8 * 2**20
    image_side: int = 2048
    prompt_characters: int = 1000
    rate_hz: float = 200.0
    waiting: int = 64
    batch: int = 16

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise InputError(f"the limit of {name} must be positive, got {value}")


@dataclass(frozen=True)
class ServerSettings:
    """Where a policy is served, and how.

    Args:
        host: address to listen on. Others than loopback need a key, or ``without_key``.
        port: 0 takes a free one.
        key: that every request must carry; None for none.
        without_key: serve other machines although there is no key.
        tls: files of the certificate chain and of its private key, in PEM.
        ensemble: answer with one action, for which so many of the robot's latest chunks are averaged
            (`sqap.evaluation.ensemble`); None answers with whole chunks.
        deadline_s: after which an observation that still waits is dropped, unless its robot says another.
        drain_s: how long a server that is told to stop goes on computing what waits.
        limits: of everything else.

    Raises:
        InputError: the host would let others in without a key, or a setting is out of range.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    key: str | None = field(default=None, repr=False)
    without_key: bool = False
    tls: tuple[Path, Path] | None = None
    ensemble: int | None = None
    deadline_s: float | None = None
    drain_s: float = 30.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise InputError(f"the port must be from 0 to 65535, got {self.port}")
        if self.key is not None and len(self.key) < LEAST_KEY:
            raise InputError(f"the API key must have at least {LEAST_KEY} characters, got {len(self.key)}")
        if not (self.loopback or self.key or self.without_key):
            raise InputError(
                f"{self.host} is reached from other machines, which would need no key: give --api-key-file, "
                "or --without-key where the network keeps strangers out"
            )
        for name, value in (("ensemble", self.ensemble), ("deadline", self.deadline_s)):
            if value is not None and not value > 0:
                raise InputError(f"the {name} must be positive, got {value}")

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return is_loopback(self.host)

    def tls_context(self) -> ssl.SSLContext | None:
        """For the listening socket; None without TLS.

        Raises:
            InputError: a file cannot be read, or holds no certificate or key.
        """
        if self.tls is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(*self.tls)
        except (OSError, ssl.SSLError) as problem:
            files = " and ".join(map(str, self.tls))
            raise InputError(f"cannot serve TLS with {files}: {problem}") from problem
        return context


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is of this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def read_key(path: Path) -> str:
    """The API key in a file, which holds nothing else.

    Raises:
        InputError: the file cannot be read, others may read it, or it holds something else.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise InputError(f"cannot read the API key in {path}: {problem}") from problem
    if mode & 0o077:
        raise InputError(f"others than its owner may read {path}, which holds the API key: chmod 600 {path}")
    if not text.isprintable() or " " in text:
        raise InputError(f"{path} must hold the API key alone: one line without spaces")
    if len(text) < LEAST_KEY:
        raise InputError(f"the API key in {path} must have at least {LEAST_KEY} characters, got {len(text)}")
    return text
