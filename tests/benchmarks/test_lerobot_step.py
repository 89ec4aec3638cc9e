"""LeRobot's step as a rival: what its process is given, and what comes back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import published_lerobot
import pytest
import torch
from peers import lerobot_step

import sqap
from sqap.benchmark.candidates import example, weight_bytes
from sqap.errors import InputError, SqapError

# Speaks the protocol in LeRobot's place: actions that tell what was given, and a peak of twelve bytes.
PROCESS = """
import os, sys, torch
sys.path.insert(0, os.environ["PEERS"])
from lerobot_step_process import receive, send
directory, precision, threads = sys.argv[1:]
assert "PYTHONPATH" not in os.environ
if precision == "published":
    sys.exit(3)
out = sys.stdout.buffer
send(out, {"bytes": torch.tensor(7)})
while (given := receive(sys.stdin.buffer)) is not None:
    chunk = given["noise"] * 0 + given["pixels"].mean() + given["ids"].sum() + given["state"].sum()
    send(out, {"chunk": chunk + given["noise"], "peak": torch.tensor(12)})
"""


@pytest.fixture
def policy(tmp_path, monkeypatch):
    process = tmp_path / "process.py"
    process.write_text(PROCESS)
    monkeypatch.setattr(lerobot_step, "PROCESS", process)
    monkeypatch.setenv("PEERS", str(Path(lerobot_step.__file__).parent))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv(lerobot_step.PYTHON, sys.executable)
    monkeypatch.setenv(lerobot_step.DIRECTORY, str(tmp_path))
    published_lerobot.write_smolvla(tmp_path / "smolvla")
    return sqap.load(tmp_path / "smolvla")


def test_the_process_gets_the_inputs_and_its_actions_get_units(policy):
    seen = example(policy)
    given = policy.inputs(seen, torch.Generator().manual_seed(5))
    total = given.pixels[0].mean() + given.token_ids.sum() + given.proprio.sum()
    expected = sqap.processing.unnormalize(
        (given.noise[0] + total).numpy(), policy.config.actions, seen.state
    )
    rival = lerobot_step.float32.make(policy).to("cpu")
    np.testing.assert_allclose(rival.act(seen, seed=5), expected, rtol=1e-5)
    assert weight_bytes(rival) == 7
    assert rival.model.peak_bytes() == 12


def test_what_cannot_be_timed_is_one_sentence(policy, monkeypatch):
    with pytest.raises(SqapError, match="LeRobot's process ended with status 3"):
        lerobot_step.published.make(policy)
    monkeypatch.delenv(lerobot_step.PYTHON)
    with pytest.raises(InputError, match="LEROBOT_PYTHON must be set: LEROBOT_PYTHON to the interpreter"):
        lerobot_step.float32.make(policy)
    with pytest.raises(InputError, match="for SmolVLA alone, and this is a cogact"):
        lerobot_step.float32.make(sqap.load("reference"))
