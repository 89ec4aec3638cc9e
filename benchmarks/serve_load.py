"""A policy server under load, on this machine: python benchmarks/serve_load.py --json results.json

For every number of simulated robots, a server in a process of its own answers robots in another, each of
which sends its next observation when it has its last answer. Candidates:

- ``null``: a policy that computes nothing, so that all the time is the protocol's and the server's. Its
  robots send at a rate, ``--null-hz``, since without a policy nothing else holds them back.
- ``batch=1`` and ``batch=16``: the policy, of which a step is for one robot, or for all that wait.

Printed for each: answers a second, the round trip's p50 and p99, and

- ``step`` and ``alone``: medians of a step's time under this load, and in the same process before any robot
  was there.
- ``beyond``: the p99 of the round trip without the step and without waiting for steps of others. A round trip
  ends when the robots' process, one for all of them, reads the answer from its socket.
- ``server``: the p99 of the part of ``beyond`` that the server itself saw, from a frame that is read to an
  answer that is ready.
- ``CPU``: processor time an answer, of the server and of the robots.
- robots a step, refusals, and what the server's memory grew by from the first to the last quarter of the
  time; the file has samples of it.

At the end: how many answers ``batch=16`` gave for each of ``batch=1``.

``--connects N`` opens and leaves as many connections, a third of them with a handshake, and says after every
tenth of them what memory has grown by; then it asks once.
``--candidates null --robots 16 --seconds 1800`` is the run that shows whether memory is flat. Rows are kept
in the file, and the same command goes on with those that are not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from robots import Candidate, Server, load
from websockets.uri import parse_uri

import sqap
from sqap.build import build_id
from sqap.files import write_json
from sqap.policy import Policy
from sqap.process import available_cores
from sqap.serving import PolicyClient
from sqap.serving.engine import noise

WARM_UP_SECONDS = 3.0  # some steps for every robot, of which nothing is noted
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


def growth(memory: list[int]) -> int:
    """Bytes from the median of the first quarter of the samples to that of the last."""
    quarter = max(1, len(memory) // 4)
    return int(np.median(memory[-quarter:]) - np.median(memory[:quarter]))


def measure(
    server: Server, candidate: Candidate, robots: int, seconds: float, null_hz: float
) -> dict[str, Any]:
    """The row of one candidate and number of robots."""
    observations = [noise(LOCAL, seed) for seed in range(robots)]
    period = 1 / null_hz if candidate.null else 0.0
    seen = asyncio.run(load(server, observations, seconds, period, WARM_UP_SECONDS))
    p50, p99 = np.percentile(seen.round_trips, [50, 99])
    return {
        "candidate": asdict(candidate),
        "robots": robots,
        "seconds": seconds,
        "answers_per_second": round(len(seen.round_trips) / seconds, 1),
        "p50_ms": round(float(p50), 2),
        "p99_ms": round(float(p99), 2),
        "step_p50_ms": round(float(np.median(seen.infer)), 2),
        "alone_p50_ms": round(server.alone_ms, 2),
        "beyond_p50_ms": round(float(np.median(seen.beyond)), 2),
        "beyond_p99_ms": round(float(np.percentile(seen.beyond, 99)), 2),
        "server_p99_ms": round(float(np.percentile(seen.overhead, 99)), 2),
        "robots_processor_ms": round(seen.own_processor_ms / len(seen.round_trips), 2),
        "processor_ms": round(seen.processor_ms / len(seen.round_trips), 2),
        "robots_a_step": round(float(np.mean(seen.batches)), 2),
        "refusals": seen.refusals,
        "memory_growth_bytes": growth(seen.memory),
        "memory_bytes": seen.memory,
    }


def batching(rows: list[dict[str, Any]]) -> dict[int, float]:
    """Answers of ``batch=16`` for each of ``batch=1``, by the number of robots."""
    rates = {(row["candidate"]["name"], row["robots"]): row["answers_per_second"] for row in rows}
    return {
        robots: round(rate / rates["batch=1", robots], 2)
        for (name, robots), rate in rates.items()
        if name == "batch=16" and ("batch=1", robots) in rates
    }


def connect_often(server: Server, count: int) -> dict[str, Any]:
    """Open and leave ``count`` connections."""
    address = parse_uri(server.url)
    before, refused, begin = server.resident, 0, time.monotonic()
    grown = []
    for i in range(count):
        try:
            with socket.create_connection((address.host, address.port), timeout=10) as connection:
                if i % 3 == 0:
                    connection.sendall(HANDSHAKE)
        except OSError:
            refused += 1
        if (i + 1) % max(1, count // 10) == 0:
            grown.append(server.resident - before)
    took = time.monotonic() - begin
    with PolicyClient(server.url, None, timeout=60) as client:
        client.infer(noise(LOCAL))
    grown.append(server.resident - before)
    return {"connects": count, "refused": refused, "seconds": round(took, 1), "memory_growth_bytes": grown}


def table(rows: list[dict[str, Any]]) -> Table:
    titles = (
        "robots",
        "policy",
        "answers/s",
        "p50 ms",
        "p99",
        "step",
        "alone",
        "beyond p99",
        "server p99",
        "CPU ms",
        "robots' CPU",
        "robots a step",
        "refused",
        "memory, MB",
    )
    shown = Table(*titles)
    for row in rows:
        shown.add_row(
            str(row["robots"]),
            row["candidate"]["name"],
            f"{row['answers_per_second']:.1f}",
            f"{row['p50_ms']:.1f}",
            f"{row['p99_ms']:.1f}",
            f"{row['step_p50_ms']:.1f}",
            f"{row['alone_p50_ms']:.1f}",
            f"{row['beyond_p99_ms']:.2f}",
            f"{row['server_p99_ms']:.2f}",
            f"{row['processor_ms']:.2f}",
            f"{row['robots_processor_ms']:.2f}",
            f"{row['robots_a_step']:.1f}",
            str(row["refusals"]),
            f"{row['memory_growth_bytes'] / 1e6:+.1f}",
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--policy", default="reference")
    parser.add_argument("--robots", default="1,4,16,64")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument(
        "--null-hz", type=float, default=10.0, help="observations a second of a robot of null's"
    )
    parser.add_argument("--candidates", default="null,batch=1,batch=16")
    parser.add_argument("--threads", type=int, default=available_cores(), help="of the policy")
    parser.add_argument("--connects", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    console = Console(width=max(Console().width, 150))  # columns need room in a file too
    global LOCAL
    LOCAL = sqap.load(options.policy)
    settings = {"policy": options.policy, "threads": options.threads, "null_hz": options.null_hz,
                "seconds": options.seconds}  # fmt: skip
    about = {"build": build_id(), "settings": settings}
    found = kept(options.json, about)
    rows: list[dict[str, Any]] = found["rows"]
    for name in options.candidates.split(","):
        candidate = (
            Candidate(name, 16, True) if name == "null" else Candidate(name, int(name.removeprefix("batch=")))
        )
        for robots in map(int, options.robots.split(",")):
            if any((row["candidate"]["name"], row["robots"]) == (name, robots) for row in rows):
                continue
            with Server(options.policy, candidate, robots, options.threads) as server:
                rows.append(measure(server, candidate, robots, options.seconds, options.null_hz))
                console.print(table(rows[-1:]))
                if options.connects and found["connects"] is None:
                    found["connects"] = connect_often(server, options.connects)
                    console.print(found["connects"])
            if options.json is not None:
                write_json(options.json, about | found | {"batching": batching(rows)})
    console.print(table(rows))
    for robots, gain in batching(rows).items():
        console.print(
            f"{robots} robots: batches of up to 16 give {gain:.2f} answers for each of one at a time"
        )


def kept(path: Path | None, about: dict[str, Any]) -> dict[str, Any]:
    """The rows that a file holds, and the result of ``--connects``.

    Raises:
        SystemExit: they are of another build or other settings.
    """
    if path is None or not path.exists():
        return {"rows": [], "connects": None}
    found = json.loads(path.read_text(encoding="utf-8"))
    if {key: found.get(key) for key in about} != about:
        raise SystemExit(f"{path} is of another build or other settings; name another file")
    return {"rows": found["rows"], "connects": found["connects"]}


LOCAL: Policy

if __name__ == "__main__":
    main()
