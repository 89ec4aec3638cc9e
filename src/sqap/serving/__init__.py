"""A policy server in openpi's protocol, and its clients. Needs the extra: ``pip install "sqap[serve]"``."""

from sqap.serving.client import AsyncPolicyClient, PolicyClient, Rejected, Reply, Unreachable
from sqap.serving.requests import Refused
from sqap.serving.run import run
from sqap.serving.server import Server
from sqap.serving.settings import Limits, ServerSettings

__all__ = [
    "AsyncPolicyClient",
    "Limits",
    "PolicyClient",
    "Refused",
    "Rejected",
    "Reply",
    "Server",
    "ServerSettings",
    "Unreachable",
    "run",
]
