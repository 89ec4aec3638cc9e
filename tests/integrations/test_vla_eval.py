"""The model server for vla-eval and the comparison of policies: with vla-eval where it is installed, and with
the few names they use of it in its place elsewhere."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.spatial.transform import Rotation

import sqap
from sqap import Observation, Policy, Recipe
from sqap.environments.vla_eval_conversion import rotation_vector
from sqap.errors import InputError
from sqap.evaluation.ensemble import AdaptiveEnsemble
from sqap.evaluation.rollout import noise_seed
from sqap.models import VLA
from sqap.processing import Clamp, Range
from sqap.recipe import Pruning

FOLDER = Path(__file__).parents[2] / "integrations" / "vla_eval"
CONFIGS = sorted((FOLDER / "configs").glob("*.yaml"))
INSTALLED = importlib.util.find_spec("vla_eval") is not None
SPECS = ["GRIPPER_CLOSE_POS", "GRIPPER_RAW", "IMAGE_RGB", "LANGUAGE", "POSITION_DELTA", "RAW", "ROTATION_AA"]


class FakePredictModelServer:
    """What `model_server.py` uses of vla-eval's."""

    def __init__(
        self, *, chunk_size: int | None = None, max_batch_size: int = 1, max_wait_time: float = 0.01
    ):
        self.chunk_size, self.max_batch_size, self.max_wait_time = chunk_size, max_batch_size, max_wait_time

    async def on_episode_start(self, config: dict[str, Any], ctx: Any) -> None: ...

    async def on_episode_end(self, result: dict[str, Any], ctx: Any) -> None: ...


@dataclasses.dataclass(frozen=True)
class FakeDimSpec:
    name: str
    dims: int
    format: str


def fakes() -> dict[str, ModuleType]:
    specs = {name: FakeDimSpec(name.lower(), 0, name.lower()) for name in SPECS}
    contents: dict[str, dict[str, Any]] = {
        "vla_eval": {},
        "vla_eval.model_servers": {},
        "vla_eval.model_servers.base": {"SessionContext": SimpleNamespace},
        "vla_eval.model_servers.predict": {"PredictModelServer": FakePredictModelServer},
        "vla_eval.model_servers.serve": {"run_server": None},
        "vla_eval.specs": specs | {"DimSpec": FakeDimSpec},
    }
    modules = {name: ModuleType(name) for name in contents}
    for name, module in modules.items():
        vars(module).update(contents[name])
    return modules


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The two scripts as modules."""
    with pytest.MonkeyPatch.context() as patch:
        if not INSTALLED:
            for name, module in fakes().items():
                patch.setitem(sys.modules, name, module)
        patch.syspath_prepend(str(FOLDER))
        import compare
        import model_server

        yield SimpleNamespace(server=model_server, compare=compare)
        for name in ("compare", "model_server"):
            patch.delitem(sys.modules, name)


@pytest.fixture
def arm(policy: Policy) -> Policy:
    """A policy of actions as arms have them, and two cameras of other names than the benchmark's."""
    head = dataclasses.replace(policy.config.model.head, action_dim=7)
    model = dataclasses.replace(policy.config.model, head=head, cameras=2)
    actions = Clamp(), Range((-1.0,) * 7, (1.0,) * 7, (True,) * 7)
    config = dataclasses.replace(policy.config, model=model, actions=actions, cameras=("front", "hand"))
    torch.manual_seed(0)
    return Policy(VLA(model), config, policy.tokenizer)


@pytest.fixture
def directory(policy: Policy, tmp_path: Path) -> str:
    """A compressed policy that remembers its last step."""
    pruning = Pruning(keep_ratio=0.5, method="lookahead", rest="changed", top_share=0.25, score_layers=(2,))
    sqap.compress(policy, Recipe(pruning=pruning)).save(tmp_path / "policy")
    return str(tmp_path / "policy")


@pytest.fixture
def arm_directory(arm: Policy, tmp_path: Path) -> str:
    arm.save(tmp_path / "arm")
    return str(tmp_path / "arm")


def look(seed: int = 0, names: tuple[str, ...] = ("corner2",)) -> dict[str, Any]:
    """An observation as vla-eval sends them."""
    generator = np.random.default_rng(seed)
    images = {name: generator.integers(0, 256, (40, 32, 3), dtype=np.uint8) for name in names}
    return {"images": images, "task_description": "open the drawer", "states": np.zeros(8)}


def begin(server: Any, session: str, index: int = 0, task: str = "drawer") -> Any:
    """Start an episode; returns its context."""
    ctx = SimpleNamespace(session_id=session, episode_id=f"{session}-{index}")
    asyncio.run(server.on_episode_start({"task": {"name": task, "episode_idx": index}}, ctx))
    return ctx


def test_sessions_of_a_batch_have_each_their_memory_and_their_noise(scripts, directory):
    server, alone = scripts.server.SqapModelServer(directory, max_batch_size=2), sqap.load(directory)
    contexts = [begin(server, "a", 3), begin(server, "b", 4)]
    looks = [[look(0), look(1)], [look(2), look(3)], [look(4), look(5)]]
    found = [server.predict_batch(seen, contexts) for seen in looks]
    for robot, index in enumerate((3, 4)):
        seed, memory = scripts.server.episode_seed(0, "drawer", index), None
        for call, seen in enumerate(looks):
            observation = Observation(seen[robot]["images"], "open the drawer")
            step = alone.step(observation, seed=noise_seed(seed, call), memory=memory)
            memory = step.memory
            assert np.array_equal(found[call][robot]["actions"], step.chunk)
        assert memory is not None

    asyncio.run(server.on_episode_end({}, contexts[0]))
    with pytest.raises(InputError, match="before the start of its episode"):
        server.predict_batch([look()], contexts[:1])
    again = server.predict_batch([look(0)], [begin(server, "a", 3)])
    assert np.array_equal(again[0]["actions"], found[0][0]["actions"]), "as if new"


def test_an_episodes_noise_is_of_its_task_and_number_alone(scripts):
    seeds = [
        scripts.server.episode_seed(seed, task, index)
        for seed in (0, 1)
        for task in ("stack", "put")
        for index in (0, 1)
    ]
    assert len(set(seeds)) == len(seeds)
    assert seeds[0] == scripts.server.episode_seed(0, "stack", 0)


def test_an_ensemble_answers_with_one_action_and_begins_anew(scripts, directory):
    server, chunks = scripts.server.SqapModelServer(directory, ensemble=3), AdaptiveEnsemble(3)
    plain = scripts.server.SqapModelServer(directory, execute=2)
    assert (server.chunk_size, plain.chunk_size) == (None, 2)
    for seed in range(4):
        if seed == 0:
            ctx, other = begin(server, "a"), begin(plain, "a")
        (action,) = server.predict_batch([look(seed)], [ctx])
        (chunk,) = plain.predict_batch([look(seed)], [other])
        assert np.array_equal(action["actions"], chunks.add(chunk["actions"]))
    begin(server, "a")
    begin(plain, "a")
    (action,) = server.predict_batch([look(9)], [ctx])
    (chunk,) = plain.predict_batch([look(9)], [other])
    assert np.array_equal(action["actions"], chunk["actions"][0])


def test_rotations_and_grippers_become_the_benchmarks(scripts, arm_directory):
    make = scripts.server.SqapModelServer
    names = ("primary", "wrist")
    plain = make(arm_directory)
    turned = make(arm_directory, rotation="euler", gripper="close_positive")
    (a,) = plain.predict_batch([look(1, names)], [begin(plain, "a")])
    (b,) = turned.predict_batch([look(1, names)], [begin(turned, "a")])
    expected = Rotation.from_euler("xyz", a["actions"][:, 3:6]).as_rotvec()
    assert np.allclose(b["actions"][:, 3:6], expected, atol=1e-6)
    assert np.array_equal(b["actions"][:, :3], a["actions"][:, :3])
    assert np.allclose(b["actions"][:, 6], 1 - 2 * a["actions"][:, 6])
    assert plain.get_action_spec() != turned.get_action_spec()
    assert plain.get_action_spec().keys() == {"position", "rotation", "gripper"}


def test_rotation_vectors_are_scipys():
    euler = np.random.default_rng(0).uniform(-np.pi, np.pi, (500, 3))
    euler[0], euler[1] = 0, (1e-12, 0, 0)
    found, expected = rotation_vector(euler), Rotation.from_euler("xyz", euler).as_rotvec()
    assert np.allclose(found, expected, atol=1e-9)


def test_cameras_are_found_by_name_by_a_map_or_by_order(scripts, arm_directory, caplog):
    make, names = scripts.server.SqapModelServer, ("primary", "wrist", "side")
    by_order, mapped = make(arm_directory), make(arm_directory, cameras={"front": "side", "hand": "primary"})
    seen = look(1, names)
    renamed = {"front": seen["images"]["primary"], "hand": seen["images"]["wrist"]}
    moved = {"primary": seen["images"]["side"], "wrist": seen["images"]["primary"]}

    def act(server: Any, images: dict[str, np.ndarray]) -> np.ndarray:
        actions: np.ndarray = server.predict_batch([seen | {"images": images}], [begin(server, "a")])[0][
            "actions"
        ]
        return actions

    first = act(by_order, seen["images"])
    assert caplog.text.count("by order") == 1
    act(by_order, seen["images"])
    assert caplog.text.count("by order") == 1
    assert np.array_equal(first, act(by_order, renamed))
    assert np.array_equal(act(mapped, seen["images"]), act(by_order, moved))
    assert set(mapped.get_observation_spec()) == {"side", "primary", "language"}
    with pytest.raises(InputError, match=r"reads hand, and the benchmark sends front; .*observation_params"):
        act(by_order, {"front": seen["images"]["side"]})


def test_the_benchmark_is_told_what_the_policy_reads(scripts, arm_directory, directory):
    two = scripts.server.SqapModelServer(arm_directory, observation_params={"max_episode_steps": 120})
    assert two.get_observation_params() == {"send_wrist_image": True, "max_episode_steps": 120}
    one = scripts.server.SqapModelServer(directory)
    assert one.get_observation_params() == {}
    assert set(one.get_action_spec()) == {"actions"}


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"execute": 9}, "execute must be from 1 to 8"),
        ({"ensemble": 0}, "ensemble must be from 1 to 8"),
        ({"ensemble": 2, "execute": 2}, "leave execute out"),
        ({"rotation": "euler"}, "actions of 4 numbers have no rotation"),
        ({"cameras": {"primary": "x"}}, "cameras must be of the policy's"),
    ],
)
def test_settings_that_do_not_suit_the_policy_are_refused(scripts, directory, options, what):
    with pytest.raises(InputError, match=what):
        scripts.server.SqapModelServer(directory, **options)


def test_choices_of_a_published_policy_are_left_out_for_one_of_sqaps_own(scripts, directory, caplog):
    caplog.set_level("INFO")
    assert scripts.server.load(directory, {"unnorm_key": "bridge_orig"}).recipe.pruning is not None
    assert "bridge_orig" in caplog.text


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_name_what_is_there(scripts, path):
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "script" in config:
        assert FOLDER.parents[1] / config["script"] == FOLDER / "model_server.py"
        own = set(inspect.signature(scripts.server.SqapModelServer.__init__).parameters)
        assert set(config["args"]) <= own | {"max_batch_size", "max_wait_time"}
        assert set(config["args"].get("choices", {})) <= set(inspect.signature(sqap.load).parameters)
    else:
        assert config["docker"]["image"].startswith("ghcr.io/allenai/vla-evaluation-harness/")
        assert config["server"]["timeout"] >= 60
        for benchmark in config["benchmarks"]:
            assert re.fullmatch(r"vla_eval\.benchmarks\.\w+\.benchmark:\w+Benchmark", benchmark["benchmark"])
            assert "seed" in benchmark["params"], "policies are compared on the same episodes"


def test_uv_is_told_what_the_script_needs():
    (block,) = re.findall(
        r"^# /// script\n(.*?)^# ///$", (FOLDER / "model_server.py").read_text(), re.S | re.M
    )
    assert '"sqap[serve]"' in block
    assert 'sqap = { path = "../.." }' in block
    assert (FOLDER / "../.." / "pyproject.toml").is_file()


def run_of(policy: str, successes: list[bool], errors: tuple[int, ...] = ()) -> dict[str, Any]:
    episodes = [
        {
            "benchmark": "simpler",
            "task": "stack",
            "episode": i,
            "success": success,
            "steps": 1,
            "error": "timeout" if i in errors else None,
        }
        for i, success in enumerate(successes)
    ]
    return {"policy": policy, "episodes": episodes}


def test_policies_are_compared_in_pairs_without_the_episodes_that_had_errors(scripts):
    original = run_of("original", [True, True, False, False, True])
    small = run_of("small", [True, False, True, True, False], errors=(4,))
    pair = scripts.compare.compare(small, original)
    assert (pair["pairs"], pair["wins"], pair["losses"], pair["left_out"]) == (4, 2, 1, 1)
    assert pair["difference"] == 0.25
    told = scripts.compare.sentence(pair)
    assert "2 wins, 1 losses in 4 episodes" in told
    assert "1 episodes had errors" in told
    with pytest.raises(InputError, match="no episode was run to its end"):
        scripts.compare.compare(small, run_of("none", []))


def test_a_file_of_other_settings_is_not_gone_on_with(scripts, tmp_path):
    path, settings = (
        tmp_path / "results.json",
        {"server": {"seed": 0}, "benchmark": "a.yaml", "overrides": {}},
    )
    assert scripts.compare.kept(path, settings) == {}
    scripts.compare.write_json(path, settings | {"runs": [run_of("original", [True])], "pairs": []})
    assert set(scripts.compare.kept(path, settings)) == {"original"}
    with pytest.raises(InputError, match="name another file"):
        scripts.compare.kept(path, settings | {"benchmark": "b.yaml"})


def test_a_run_is_of_the_policy_that_was_in_the_directory(scripts, directory, policy):
    fingerprint = sqap.load(directory).fingerprint
    run = run_of(directory, []) | {"fingerprint": fingerprint}
    scripts.compare.check_same(run, sqap.load(directory))
    policy.save(f"{directory}-2")
    with pytest.raises(InputError, match="was another policy when it was evaluated"):
        scripts.compare.check_same(run, sqap.load(f"{directory}-2"))


@pytest.mark.skipif(not INSTALLED, reason="vla-eval is not installed: integrations/vla_eval/README.md")
def test_through_vla_evals_own_protocol_the_actions_are_the_policys(scripts, directory, tmp_path):
    import vla_eval

    benchmark = {"benchmark": f"{__name__}:Still", "episodes_per_task": 2, "max_steps": 5}
    module = sys.modules[__name__]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Still", still_benchmark(), raising=False)
        server = scripts.server.SqapModelServer(directory, execute=2, max_batch_size=4)
        results = vla_eval.evaluate(server, {"benchmarks": [benchmark]}, output_dir=tmp_path, docker=False)
        sent = module.Still.sent
    episodes = results[0]["tasks"][0]["episodes"]
    assert [episode["steps"] for episode in episodes] == [5, 5]
    assert not any(episode.get("failure_reason") for episode in episodes)
    alone, expected = sqap.load(directory), []
    for index in range(2):
        seed, memory = scripts.server.episode_seed(0, "open the drawer", index), None
        for call in range(3):
            seen = Observation(look(10 * index + 2 * call)["images"], "open the drawer")
            step = alone.step(seen, seed=noise_seed(seed, call), memory=memory)
            memory = step.memory
            expected.extend(step.chunk[:2])
        del expected[5 * (index + 1) :]
    assert np.array_equal(sent, expected)


def still_benchmark() -> Any:
    """A benchmark whose observations are noise of the episode's number and step, and what it was sent."""
    from vla_eval.benchmarks.base import StepBenchmark, StepResult

    class Still(StepBenchmark):
        sent: list[np.ndarray] = []  # noqa: RUF012 - of all instances, for the test to read

        def get_tasks(self) -> list[dict[str, Any]]:
            return [{"name": "open the drawer"}]

        def reset(self, task: dict[str, Any]) -> Any:
            self.index, self.steps = task["episode_idx"], 0
            return None

        def step(self, action: dict[str, Any]) -> StepResult:
            self.sent.append(action["actions"])
            self.steps += 1
            return StepResult(obs=None, reward=0.0, done=False, info={})

        def make_obs(self, raw_obs: Any, task: dict[str, Any]) -> dict[str, Any]:
            return look(10 * self.index + self.steps)

        def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
            return {"success": False}

    return Still
