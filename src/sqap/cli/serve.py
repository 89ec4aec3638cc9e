"""``sqap serve``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from sqap.checkpoints import BUNDLED
from sqap.checkpoints.choices import Choices
from sqap.cli.options import NONE, SourceArgument, load_policy, load_weights, with_choices
from sqap.errors import InputError
from sqap.policy import Policy
from sqap.terminal import console, user_errors

if TYPE_CHECKING:  # they need an extra
    from sqap.serving.replicas import Replicas
    from sqap.serving.settings import ServerSettings


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
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads of the policy; all cores if not given. Fewer leave cores to the server.", min=1
        ),
    ] = None,
    robots: Annotated[int, typer.Option(help="Robots connected at a time.", min=1)] = 128,
    rate_hz: Annotated[float, typer.Option(help="Observations a second of one robot.")] = 200.0,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log every observation, not only what goes wrong.")
    ] = False,
    on_ray: Annotated[
        bool,
        typer.Option("--ray", help="Serve by replicas on a Ray cluster, by default one of this machine."),
    ] = False,
    address: Annotated[str | None, typer.Option(help="Of the Ray cluster, as ray.init takes it.")] = None,
    replicas: Annotated[int | None, typer.Option(help="Replicas, always so many: 1.", min=1)] = None,
    min_replicas: Annotated[int | None, typer.Option(help="Replicas at least.", min=1)] = None,
    max_replicas: Annotated[int | None, typer.Option(help="Replicas at most.", min=1)] = None,
    robots_per_replica: Annotated[
        float | None, typer.Option(help="Robots a replica, on average, above which another is added: 8.")
    ] = None,
    cores: Annotated[int | None, typer.Option(help="Cores of a replica: 1.", min=1)] = None,
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
        asked = {
            "--address": address,
            "--replicas": replicas,
            "--min-replicas": min_replicas,
            "--max-replicas": max_replicas,
            "--robots-per-replica": robots_per_replica,
            "--cores": cores,
        }
        ray = _replicas(on_ray, {name: value for name, value in asked.items() if value is not None})
        if threads is not None:
            if ray is not None:
                raise InputError("--threads: a replica has as many as cores; give --cores instead")
            torch.set_num_threads(threads)
        loaded = load_policy(policy, choices)

        def started(url: str) -> None:
            console.print(f"Serving {policy} at {url}", soft_wrap=True)

        if ray is not None:
            _run_on_ray(loaded, policy, choices, settings, ray, log_requests, started)
            return
        load_weights(loaded)
        set_up(log_requests)
        run(loaded, settings, started)


def _replicas(on_ray: bool, asked: dict[str, Any]) -> Replicas | None:
    """What the options for Ray ask for; None without ``--ray``."""
    from sqap.serving.replicas import Replicas

    if not on_ray:
        if asked:
            raise InputError(f"{' and '.join(asked)}: for replicas on a Ray cluster; give --ray as well")
        return None
    if "--replicas" in asked and ("--min-replicas" in asked or "--max-replicas" in asked):
        raise InputError("--replicas is a fixed number: give it, or --min-replicas and --max-replicas")
    if "--robots-per-replica" in asked and "--max-replicas" not in asked:
        raise InputError("--robots-per-replica says when replicas are added: give --max-replicas as well")
    least = asked.get("--replicas", asked.get("--min-replicas", 1))
    most = asked.get("--max-replicas", least)
    names = {"--robots-per-replica": "robots", "--cores": "cores", "--address": "address"}
    return Replicas(least, most, **{names[option]: asked[option] for option in names.keys() & asked.keys()})


def _run_on_ray(
    loaded: Policy,
    source: str,
    choices: Choices,
    settings: ServerSettings,
    replicas: Replicas,
    log_requests: bool,
    started: Callable[[str], None],
) -> None:
    from sqap.serving.service import check_ensemble

    check_ensemble(loaded, settings)
    try:
        from sqap.serving.ray_serve import Served, run
    except ModuleNotFoundError as error:
        raise InputError(f'serving on Ray needs {error.name}; pip install "sqap[ray]"') from error
    run(Served(place(source), choices, loaded.fingerprint, settings, log_requests), replicas, started)


def place(source: str) -> str:
    """What a process in another directory loads the same policy by."""
    directory = Path(source).expanduser()
    return str(directory.resolve()) if source not in BUNDLED and directory.is_dir() else source
