"""vla-eval's benchmarks as environments: by a stand-in for vla-eval, and by vla-eval where there is one.

Set SQAP_SIM_PYTHON to the path of an interpreter with vla-eval to run these tests with it, too.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import Result
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from sqap import environments
from sqap.cli import app
from sqap.environments import vla_eval
from sqap.environments.vla_eval_conversion import Conversion
from sqap.errors import InputError
from sqap.study.request import StudyRequest

HERE = Path(__file__).parent
REAL = os.environ.get(vla_eval.INTERPRETER)
Configure = Callable[..., str]


def interpreter(kind: str) -> str:
    """A command that starts a Python with vla-eval, or what stands for it, and `vla_eval_drawer`."""
    if kind == "real":
        return shlex.join(["env", f"PYTHONPATH={HERE}", str(REAL)])
    run = 'exec "$0" "$1" "$3"'  # of: PYTHON FAKE -c SOURCE
    return shlex.join(["sh", "-c", run, sys.executable, str(HERE / "fake_vla_eval.py")])


@pytest.fixture(
    params=["fake", pytest.param("real", marks=pytest.mark.skipif(not REAL, reason="no vla-eval"))]
)
def sim_python(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    command = interpreter(request.param)
    monkeypatch.setenv(vla_eval.INTERPRETER, command)
    monkeypatch.setattr(vla_eval, "_KNOWN", {})
    return command


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """Write a configuration of one benchmark; returns the environment's name."""
    numbers = itertools.count()

    def write(sqap: dict[str, Any] | None = None, max_steps: int | None = 6, **params: Any) -> str:
        entry = {"benchmark": "vla_eval_drawer:Drawer", "params": params, "max_steps": max_steps}
        path = tmp_path / f"drawers-{next(numbers)}.yaml"
        path.write_text(yaml.safe_dump({"benchmarks": [entry]} | ({"sqap": sqap} if sqap else {})))
        return f"{vla_eval.PREFIX}{path}"

    return write


@pytest.fixture
def make() -> Iterator[Callable[[str, str], Any]]:
    """Environments that are closed at the end."""
    made: list[Any] = []

    def build(env: str, task: str = "open") -> Any:
        made.append(environments.make(env, task))
        return made[-1]

    yield build
    for each in made:
        each.close()


def test_a_configurations_tasks_and_settings_are_told(sim_python, configure):
    env = configure({"metres": 0.05, "hz": 20})
    assert environments.default_tasks(env) == ("open", "close")
    assert environments.action_units(env) == environments.ControlUnits(0.05, 20.0, gripper=6)
    told = environments.describe(env)
    assert {"configuration", "python", "packages", "numpy"} <= set(told)
    assert told["configuration"] != environments.describe(configure())["configuration"]
    assert environments.unmeasured(env) == []
    assert len(environments.unmeasured(configure(width=4))) == 2


def test_tasks_of_one_name_are_numbered(sim_python, configure):
    assert environments.default_tasks(configure(tasks=["open", "close", "open"])) == (
        "open (1)",
        "close",
        "open (2)",
    )


def test_an_episode_depends_on_its_seed_alone(sim_python, configure, make):
    env = configure(states=20)
    first, second = make(env), make(env)
    seen = {seed: first.reset(seed) for seed in (40, 41, 42)}
    again = {seed: second.reset(seed) for seed in (42, 40)}
    for seed, observation in again.items():
        assert np.array_equal(observation.images["agentview"], seen[seed].images["agentview"])
        assert np.array_equal(observation.state, seen[seed].state)
    assert not np.array_equal(seen[40].images["agentview"], seen[41].images["agentview"])


def test_seeds_go_round_the_initial_states(sim_python, configure, make):
    started = Path(configure().removeprefix(vla_eval.PREFIX)).with_name("started")
    world = make(configure(states=20, started=str(started)))
    for seed in (4_000_003, 4_000_023):
        world.reset(seed)
    assert {line.split()[2] for line in started.read_text().splitlines()} == {"3"}
    environments.check_tasks(configure(states=20), ["open"], 20)
    with pytest.raises(InputError, match="'open' has 20 initial states, fewer than 21 episodes"):
        environments.check_tasks(configure(states=20), ["open"], 21)
    environments.check_tasks(configure(states=None), ["open"], 1000)


def test_vla_evals_runner_ends_an_episode(sim_python, configure, make):
    world = make(configure())
    assert (world.max_steps, world.action_dim) == (6, 7)
    outcomes = {}
    for seed in (2, 3):
        observation = world.reset(seed)
        assert observation.instruction == "open the drawer"
        steps = 0
        while True:
            result = world.step(np.full(7, 0.5))
            steps += 1
            if result.success or result.truncated:
                break
        outcomes[seed] = steps, result.success, result.truncated
        assert world.step(np.zeros(7)) == result  # what is left of a chunk
    assert outcomes == {2: (4, True, False), 3: (6, False, True)}


def test_actions_are_converted_and_images_named(sim_python, configure, make):
    sqap = {"gripper": "close_positive", "rotation": "euler", "cameras": {"front": "agentview"}}
    world = make(configure(sqap))
    assert set(world.reset(0).images) == {"front", "wrist"}
    euler = np.array([0.3, -0.2, 0.5])
    world.step(np.array([0.1, 0.2, 0.3, *euler, 1.0]))
    expected = [0.1, 0.2, 0.3, *Rotation.from_euler("xyz", euler).as_rotvec(), -1.0]
    np.testing.assert_allclose(world.observe().state[:7], expected, atol=1e-6)


def test_an_episode_may_be_left(sim_python, configure, make):
    world = make(configure())
    begun = world.reset(1)
    world.step(np.zeros(7))
    world.reset(2)
    assert np.array_equal(world.reset(1).images["wrist"], begun.images["wrist"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"params": {"colour": "red"}}, "cannot run .*: TypeError"),
        ({"benchmark": "nowhere:Drawer"}, "cannot run .*No module named 'nowhere'"),
        ({"benchmark": ""}, "cannot run .*: ValueError: Config error: 'benchmark' field is required"),
        ({"mode": "live"}, "mode live: sqap's policies are waited for"),
        ({"tasks": ["shut"]}, "there are no tasks in it"),
        ({"sqap": {"grip": 1}}, "has no setting 'grip'; it has cameras, rotation, gripper, metres, hz"),
        ({"sqap": {"metres": 0.05}}, "metres needs hz"),
        ({"sqap": {"gripper": "close_positive"}, "params": {"width": 4}}, "which the 4 numbers of an action"),
        ({"render": "blender"}, "cannot run .*'blender' is not supported"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_refused(sim_python, tmp_path, given, message):
    top = {key: given[key] for key in ("sqap", "render") if key in given}
    entry = {"benchmark": "vla_eval_drawer:Drawer"} | {k: v for k, v in given.items() if k not in top}
    path = tmp_path / "refused.yaml"
    path.write_text(yaml.safe_dump({"benchmarks": [entry], **top}))
    with pytest.raises(InputError, match=message):
        environments.default_tasks(f"{vla_eval.PREFIX}{path}")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "name it by --sim-python or SQAP_SIM_PYTHON"),
        ("/nowhere/python", "cannot start the simulator's interpreter /nowhere/python: No such file"),
        (
            shlex.quote(sys.executable),
            r"cannot run .*: ModuleNotFoundError: No module named '(vla_eval|websock)",
        ),
        (
            "sh -c 'echo no such image >&2; exit 125'",
            "ended with exit code 125; its last words: no such image",
        ),
        ("sh -c 'echo hello'", "answered 'hello', which is no message"),
    ],
)
def test_an_interpreter_that_does_not_serve_is_refused(configure, monkeypatch, command, message):
    if "ModuleNotFound" in message and importlib.util.find_spec("vla_eval") is not None:
        pytest.skip("vla-eval is installed here")
    monkeypatch.setenv(vla_eval.INTERPRETER, command)
    with pytest.raises(ValueError, match=message):
        environments.default_tasks(configure())


def test_what_is_missing_is_named(sim_python, configure, make, tmp_path):
    with pytest.raises(InputError, match=r"no configuration of vla-eval at .*/none\.yaml"):
        environments.default_tasks(f"{vla_eval.PREFIX}{tmp_path}/none.yaml")
    with pytest.raises(InputError, match=r"unknown vla-eval:.* task 'shut'; known tasks: open, close"):
        make(configure(), "shut")
    with pytest.raises(InputError, match="front is to be top, but the benchmark sends agentview, wrist"):
        make(configure({"cameras": {"front": "top"}})).reset(0)
    with pytest.raises(InputError, match="actions of 4 numbers have no rotation and gripper"):
        Conversion(rotation="euler").action(np.zeros(4))


def test_a_hung_simulator_is_ended(sim_python, configure, make, monkeypatch):
    world = make(configure())
    monkeypatch.setattr(vla_eval, "SILENCE", 0.2)
    os.kill(world._simulator._process.pid, signal.SIGSTOP)
    with pytest.raises(vla_eval.SimulatorError, match="ended with exit code -9"):
        world.reset(0)


def test_the_simulators_side_is_of_vla_evals_oldest_python():
    ast.parse(Path(vla_eval.__file__).with_name("vla_eval_process.py").read_text(), feature_version=(3, 8))


def test_a_cluster_is_refused(sim_python, configure, tmp_path):
    with pytest.raises(InputError, match="--executor ray does not run vla-eval"):
        StudyRequest("policy", tmp_path, configure(), ("open",), 1, 0, executor="ray")


# The study as a command.


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy as LIBERO's are, of random weights."""
    place = tmp_path_factory.mktemp("vla_eval") / "policy"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE.parents[1] / "integrations" / "vla_eval"))
        import random_policy

        random_policy.random_policy().save(place)
    return place


def arguments(policy: Path, env: str, out: Path, episodes: int) -> list[str]:
    given = ["ablate", policy, "--env", env, "--out", out, "--episodes", episodes, "--tasks", "open"]
    given += ["--factors", "bits=16 keep=1.0,0.5 criteria=random after=1", "--frames", 2, "--yes"]
    return [str(each) for each in [*given, "--videos", 0, "--executor", "serial"]]


def ablate(policy: Path, env: str, out: Path, episodes: int) -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sqap.study.run.REPLAY_FRAMES", 2)
        return CliRunner().invoke(app, arguments(policy, env, out, episodes))


def lines(out: Path) -> list[dict[str, Any]]:
    logs = [log.read_text() for log in sorted(out.glob("episodes/*.jsonl"))]
    return [json.loads(line) for log in logs for line in log.splitlines(keepends=True) if line[-1] == "\n"]


def test_a_study_runs_pairs_and_goes_on(sim_python, configure, policy, tmp_path):
    started, out = tmp_path / "started", tmp_path / "study"
    env = configure({"gripper": "close_positive"}, raises=[1], dies=[2], started=str(started))
    first = ablate(policy, env, out, 4)
    assert first.exit_code == 0, first.output
    study = json.loads((out / "study.json").read_text())
    assert study["complete"]
    assert study["environment"]["simulator"] == environments.describe(env)
    assert any(note.startswith("jerk and path length are not measured") for note in study["notes"])
    for cell in study["cells"]:
        failures = {f["seed"]: f["reason"] for f in cell["summary"]["failures"]}
        assert set(failures) == {4_000_001, 4_000_002}
        assert "the simulator raised" in failures[4_000_001]
        assert "the solver diverged" in failures[4_000_001]
        assert "ended with exit code 7" in failures[4_000_002]
        assert cell["summary"]["jerk"] is None
        assert cell["summary"]["gripper_flips"] is not None
        assert f"--sim-python {shlex.quote(sim_python)}" in cell["commands"][-1]
    ran = [line["episode"] for line in lines(out) if line["episode"]["failure"] is None]
    assert all(episode["steps"] in (4, 6) and episode["latencies_ms"] for episode in ran)
    assert study["cells"][1]["against_baseline"]["episodes"] == 4
    assert (out / "report" / "index.html").exists()
    before, had = len(lines(out)), len(started.read_text().splitlines())
    assert ablate(policy, env, out, 6).exit_code == 0
    assert len(lines(out)) == before + 4
    keys = {(line["policy"], line["episode"]["seed"]) for line in lines(out)}
    assert len(keys) == 12
    # The episodes that are added, their simulators' first starts, and what is looked at beforehand.
    new = [line.split()[2] for line in started.read_text().splitlines()[had:]]
    assert {"4", "5"} <= set(new)
    assert not {"1", "2", "3"} & set(new)


def test_a_killed_study_goes_on_and_leaves_no_simulator(configure, policy, tmp_path):
    started, out = tmp_path / "started", tmp_path / "study"
    env = configure(started=str(started))
    command = [sys.executable, "-m", "sqap", *arguments(policy, env, out, 8)]
    command += ["--sim-python", interpreter("fake")]
    process = subprocess.Popen(command)
    while not lines(out):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = {json.dumps(line) for line in lines(out)}
    assert len(kept) < 16
    for pid in {line.split()[0] for line in started.read_text().splitlines()}:
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.02)
    subprocess.run(command, check=True)  # not here, where pytest has other threads
    found = lines(out)
    assert kept <= {json.dumps(line) for line in found}
    assert len(found) == len({(line["policy"], line["episode"]["seed"]) for line in found}) == 16
