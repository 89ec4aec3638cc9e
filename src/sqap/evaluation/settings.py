"""What must be equal for two episodes to belong to one evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sqap import environments
from sqap.build import build_and_processor
from sqap.checkpoints.choices import Choices
from sqap.process import available_cores


@dataclass(frozen=True)
class Settings:
    """What must not change between two sittings of one evaluation, besides the policies.

    Args:
        env: name of the environment.
        execute: actions of each chunk that are executed; None for as many as each policy says, or else all.
        workers: policies running at the same time: it decides the latencies.
        threads: torch threads of each.
        ensemble: chunks averaged into each action; None for none, as in logs from before there were any.
        choices: options by which published policies are loaded, those that were given.
        build: the code and the processor that ran the policies; None in logs from before it was noted.
        simulator: versions and settings of the environment; None in such logs.
    """

    env: str
    execute: int | None
    workers: int
    threads: int
    ensemble: int | None = None
    choices: dict[str, str] = field(default_factory=dict)
    build: dict[str, str] | None = None
    simulator: dict[str, str] | None = None

    def difference(self, now: Settings) -> str | None:
        """The first setting that ``now`` has otherwise, to follow "was written"; None if they are equal."""
        logged, asked = _flat(self), _flat(now)
        for name in dict.fromkeys([*asked, *logged]):
            before, after = logged.get(name), asked.get(name)
            if before != after:
                group = name.partition(".")[0]
                if getattr(self, group) is None and group in ("build", "simulator"):
                    return f"before logs noted the {group} that an episode was run with"
                return f"with {name}={before}, now it is {after}"
        return None

    @property
    def mark(self) -> str:
        """Eight characters that stand for all of it, in the names of logs."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]


def current_settings(
    env: str,
    *,
    execute: int | None = None,
    workers: int = 1,
    threads: int | None = None,
    ensemble: int | None = None,
    choices: Sequence[Choices] = (),
) -> Settings:
    """The settings of an evaluation that is run now, here; without ``threads`` workers share the cores.

    Raises:
        InputError: the environment is unknown, or SQAP_KERNELS names a path that does not run here.
    """
    return Settings(
        env=env,
        execute=execute,
        workers=workers,
        threads=threads or max(1, available_cores() // workers),
        ensemble=ensemble,
        choices=_told(choices),
        build=build_and_processor(),
        simulator=environments.describe(env),
    )


def _told(choices: Sequence[Choices]) -> dict[str, str]:
    """The choices that are not the default, of whichever policies have them."""
    usual = vars(Choices())
    return {
        name: str(value) for chosen in choices for name, value in vars(chosen).items() if value != usual[name]
    }


def _flat(settings: Settings) -> dict[str, Any]:
    """Name -> value, with a dot in the names of what the dictionaries hold."""
    flat: dict[str, Any] = {}
    for name, value in vars(settings).items():
        if isinstance(value, dict):
            flat |= {f"{name}.{key}": item for key, item in value.items()}
        elif value is not None or name not in ("build", "simulator"):
            flat[name] = value
    return flat
