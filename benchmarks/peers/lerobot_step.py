"""LeRobot's own step as a rival of `sqap bench`, for SmolVLA:

    export LEROBOT_PYTHON=ENV/bin/python LEROBOT_POLICY=DIR PYTHONPATH=benchmarks
    python -m peers.lerobot_step DIR    # writes SmolVLA's full size with random weights, where there is none
    sqap bench DIR --vs peers.lerobot_step:float32,torch-fp32,torch-int8

LeRobot runs in an environment of its own, in a process beside the candidate's, with the weights that the
benchmarked policy is compressed from. Images, text and units are prepared by sqap, so that its time is that
of the model alone, and both start from the same noise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import published_lerobot
import torch
from peers.lerobot_step_process import receive, send
from torch import Tensor

from sqap.benchmark.candidates import Candidate
from sqap.benchmark.exported import Elsewhere
from sqap.errors import InputError, SqapError
from sqap.models import ModelInputs
from sqap.policy import Policy

PROCESS = Path(__file__).with_name("lerobot_step_process.py")
PYTHON, DIRECTORY = "LEROBOT_PYTHON", "LEROBOT_POLICY"


class LeRobotStep(Elsewhere):
    """Stands where the model stood, and asks LeRobot's process.

    Args:
        python: the interpreter that has LeRobot.
        directory: a policy as LeRobot saves it.
        precision: "float32", or "published" for the types that LeRobot itself loads it in.

    Raises:
        SqapError: the process ends before it has loaded the policy.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, python: str, directory: str, precision: str) -> None:
        command = [python, str(PROCESS), directory, precision, str(torch.get_num_threads())]
        # Without this process's paths: LeRobot's environment has other releases of the same packages.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        super().__init__(int(_answer(process)["bytes"]))
        self._process, self._peak = process, 0

    def run(self, inputs: Sequence[ModelInputs], *_: object) -> list[Tensor]:
        """Normalised actions ``(1, horizon, action_dim)`` for each of ``inputs``."""
        return [self(given) for given in inputs]

    def forward(self, inputs: ModelInputs) -> Tensor:
        assert inputs.noise is not None
        assert inputs.proprio is not None
        assert self._process.stdin is not None
        given = {
            "pixels": inputs.pixels[0].contiguous(),
            "ids": inputs.token_ids.contiguous(),
            "state": inputs.proprio.contiguous(),
            "noise": inputs.noise.contiguous(),
        }
        send(self._process.stdin, given)  # type: ignore[arg-type]
        answer = _answer(self._process)
        self._peak = int(answer["peak"])
        return answer["chunk"]

    def peak_bytes(self) -> int:
        """Of LeRobot's process, its loading not counted."""
        return self._peak


def _answer(process: subprocess.Popen[bytes]) -> dict[str, Tensor]:
    assert process.stdout is not None
    answer = receive(process.stdout)  # type: ignore[arg-type]
    if answer is None:
        raise SqapError(f"LeRobot's process ended with status {process.wait()}, and says why itself")
    return answer


def lerobot(policy: Policy, precision: str) -> Policy:
    """The policy in LeRobot; it is used up.

    Raises:
        InputError: the policy is no SmolVLA, or it is not said where LeRobot and its weights are.
        SqapError: LeRobot does not load it.
    """
    if policy.config.family != "smolvla":
        raise InputError(f"LeRobot's step is timed for SmolVLA alone, and this is a {policy.config.family}")
    lacking = [name for name in (PYTHON, DIRECTORY) if not os.environ.get(name)]
    if lacking:
        raise InputError(
            f"{' and '.join(lacking)} must be set: {PYTHON} to the interpreter of an environment with "
            f"LeRobot, {DIRECTORY} to the directory that the policy is compressed from"
        )
    policy.model.to("meta")
    # It answers as the model of a policy does, and is none: a policy's class asks for no protocol.
    model = LeRobotStep(os.environ[PYTHON], os.environ[DIRECTORY], precision)
    return Policy(model, policy.config, policy.tokenizer)  # type: ignore[arg-type]


float32, published = (
    Candidate(f"LeRobot, {about}", partial(lerobot, precision=precision), False, None, ("cpu",))
    for precision, about in (("float32", "float32"), ("published", "in the types that it loads"))
)


if __name__ == "__main__":
    published_lerobot.write_smolvla(Path(sys.argv[1]), published_lerobot.FULL_SMOLVLA)
