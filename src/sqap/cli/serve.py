"""``sqap serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sqap.checkpoints.choices import Choices
from sqap.cli.options import NONE, SourceArgument, load_policy, load_weights, with_choices
from sqap.errors import InputError
from sqap.terminal import console, user_errors


@with_choices
def serve(
    policy: SourceArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the API key that every request must carry.")
    ] = None,
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Serve other machines although there is no key.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    ensemble: Annotated[
        int | None, typer.Option(help="Answer with one action, averaged over so many of a robot's chunks.")
    ] = None,
    deadline_ms: Annotated[
        float | None, typer.Option(help="Drop observations that wait longer than this.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Robots that a step is computed for at once.", min=1)] = 16,
    robots: Annotated[int, typer.Option(help="Robots connected at a time.", min=1)] = 128,
    rate_hz: Annotated[float, typer.Option(help="Observations a second of one robot.")] = 200.0,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log every observation, not only what goes wrong.")
    ] = False,
    choices: Choices = NONE,
) -> None:
    """Serve a policy to robots and evaluation harnesses, in openpi's protocol.

    Prometheus reads /metrics, and a browser shows what the policy sees at /. SIGTERM answers what waits and
    stops. Logs are lines of JSON on stderr.
    """
    with user_errors():
        try:
            from sqap.serving.logs import set_up
            from sqap.serving.run import run
            from sqap.serving.settings import Limits, ServerSettings, read_key
        except ModuleNotFoundError as error:
            raise InputError(f'serving needs {error.name}; pip install "sqap[serve]"') from error

        if (tls_cert is None) != (tls_key is None):
            raise InputError("TLS needs both files: --tls-cert and --tls-key")
        settings = ServerSettings(
            host,
            port,
            None if api_key_file is None else read_key(api_key_file),
            without_key,
            None if tls_cert is None or tls_key is None else (tls_cert, tls_key),
            ensemble,
            None if deadline_ms is None else deadline_ms / 1e3,
            limits=Limits(connections=robots, rate_hz=rate_hz, batch=batch),
        )
        settings.tls_context()  # before weights are read
        loaded = load_policy(policy, choices)
        load_weights(loaded)
        set_up(log_requests)
        run(loaded, settings, lambda url: console.print(f"Serving {policy} at {url}", soft_wrap=True))
