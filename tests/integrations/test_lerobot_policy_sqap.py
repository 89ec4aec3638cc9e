"""The plug-in for LeRobot, without LeRobot: what it is found by, and what it makes of LeRobot's batches."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sqap
from sqap import Observation, Policy, Recipe
from sqap.errors import InputError
from sqap.models import VLA
from sqap.processing import Clamp, MeanStd
from sqap.recipe import Pruning

PACKAGE = Path(__file__).parents[2] / "integrations" / "lerobot" / "lerobot_policy_sqap"
IMAGE = "observation.images.corner2"


def _load(name: str) -> Any:
    """A module of the plug-in, without its package, which imports LeRobot."""
    spec = importlib.util.spec_from_file_location(f"plug_in_{name}", PACKAGE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Runner = _load("runner").Runner


def batch(count: int = 1, seed: int = 0, image: str = IMAGE) -> dict[str, Any]:
    """What LeRobot gives a policy."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, 40, 32), dtype=np.uint8)
    return {image: torch.from_numpy(pixels).float() / 255, "task": ["open the drawer"] * count}


def observation(given: dict[str, Any], i: int = 0) -> Observation:
    """The same, as the environment had it."""
    pixels = (given[IMAGE][i].double() * 255).round().byte().permute(1, 2, 0).numpy()
    return Observation({"corner2": pixels}, given["task"][i])


@pytest.fixture
def stateful(policy: Policy) -> Policy:
    """A policy that reads a state of three numbers."""
    model = dataclasses.replace(policy.config.model, proprio_dim=3)
    state = (MeanStd((0.0,) * 3, (1.0,) * 3), Clamp())
    config = dataclasses.replace(policy.config, model=model, state=state)
    torch.manual_seed(0)
    return Policy(VLA(model), config, policy.tokenizer)


def test_lerobot_finds_it_by_its_names():
    """LeRobot imports distributions called lerobot_policy_*, and modules and classes by a rule."""
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert re.search(r'^name = "lerobot_policy_sqap"$', project, re.MULTILINE)
    assert PACKAGE.name == "lerobot_policy_sqap"
    names = {
        path.stem: {node.name for node in ast.parse(path.read_text()).body if hasattr(node, "name")}
        for path in PACKAGE.glob("*.py")
    }
    assert "SqapConfig" in names["configuration_sqap"]
    assert "SqapPolicy" in names["modeling_sqap"]
    assert "make_sqap_pre_post_processors" in names["processor_sqap"]
    assert "configuration_sqap import SqapConfig" in (PACKAGE / "__init__.py").read_text()


def test_every_key_of_the_artefacts_config_is_the_plug_ins_or_lerobots(saved):
    """LeRobot refuses a key that it does not know."""
    tree = ast.parse((PACKAGE / "configuration_sqap.py").read_text())
    (config,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    own = {node.target.id for node in config.body if isinstance(node, ast.AnnAssign)}
    assert f'register_subclass("{json.loads((saved / "config.json").read_text())["type"]}")' in ast.unparse(
        config.decorator_list[0]
    ).replace("'", '"')
    lerobots = {"type", "input_features", "output_features", "device"}
    assert set(json.loads((saved / "config.json").read_text())) == lerobots | own


def test_a_chunk_is_the_policys_own_and_its_first_actions_are_executed(policy):
    given, other = batch(), batch(seed=1)
    torch.manual_seed(3)
    seed = int(torch.randint(0, 2**63 - 1, (1,)))
    expected = policy.act(observation(given), seed=seed)
    runner = Runner(policy, n_action_steps=2)
    torch.manual_seed(3)
    actions = [runner.select(given), runner.select(other), runner.select(other)]
    assert [action.shape for action in actions] == [(1, 4)] * 3
    assert actions[0].dtype == torch.float32
    assert np.array_equal(torch.cat(actions[:2]), expected[:2])
    assert not np.array_equal(actions[2][0], expected[2]), "two were executed, and the policy looked again"


def test_a_run_repeats_after_torch_is_seeded(policy):
    def run() -> torch.Tensor:
        torch.manual_seed(7)
        runner = Runner(policy, n_action_steps=1)
        return torch.stack([runner.select(batch()) for _ in range(3)])

    assert torch.equal(run(), run())
    assert not torch.equal(run()[0], run()[1]), "every look has noise of its own"


def test_environments_are_independent_and_one_each(policy):
    given = batch(3)
    torch.manual_seed(1)
    seeds = torch.randint(0, 2**63 - 1, (3,)).tolist()
    torch.manual_seed(1)
    chunks = Runner(policy, 8).predict(given)
    for i, seed in enumerate(seeds):
        assert np.array_equal(chunks[i], policy.act(observation(given, i), seed=seed))


def test_each_environment_has_a_memory_until_it_is_reset(policy):
    pruning = Pruning(keep_ratio=0.5, method="lookahead", rest="changed", top_share=0.25, score_layers=(2,))
    small = sqap.compress(policy, Recipe(pruning=pruning))
    looks = [batch(2, seed) for seed in range(2)]
    runner = Runner(small, 8)
    for again in range(2):  # as if new
        torch.manual_seed(2)
        found = [runner.predict(given) for given in looks]
        torch.manual_seed(2)
        memories = [None, None]
        for chunk, given in zip(found, looks, strict=True):
            seeds = torch.randint(0, 2**63 - 1, (2,)).tolist()
            seen = [observation(given, i) for i in range(2)]
            steps = small.steps(seen, seeds=seeds, memories=memories)
            memories = [step.memory for step in steps]
            assert np.array_equal(chunk, np.stack([step.chunk for step in steps])), again
        assert memories[0] is not None
        runner.reset()


def test_reset_forgets_the_actions_that_are_left(policy):
    runner = Runner(policy, 8)
    torch.manual_seed(5)
    first = runner.select(batch())
    runner.reset()
    torch.manual_seed(5)
    assert torch.equal(runner.select(batch()), first)


def test_as_many_environments_as_before_or_a_reset(policy):
    runner = Runner(policy, 1)
    runner.select(batch(2))
    with pytest.raises(InputError, match="there are 3 environments now and were 2 before: call reset"):
        runner.select(batch(3))
    runner.reset()
    assert runner.select(batch(3)).shape == (3, 4)


def test_bytes_come_back_as_they_were(policy):
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    module = _load("runner")
    for image in (pixels, pixels.float() / 255):
        (seen,) = module.observations({IMAGE: image, "task": "open"}, policy)
        assert np.array_equal(seen.images["corner2"], pixels[0].permute(1, 2, 0).numpy())


def test_a_state_goes_to_a_policy_that_reads_one(stateful):
    given = batch() | {"observation.state": torch.tensor([[0.25, -0.5, 0.75]])}
    torch.manual_seed(4)
    seed = int(torch.randint(0, 2**63 - 1, (1,)))
    torch.manual_seed(4)
    chunk = Runner(stateful, 8).predict(given)
    state = np.array([0.25, -0.5, 0.75])
    assert np.array_equal(
        chunk[0], stateful.act(dataclasses.replace(observation(given), state=state), seed=seed)
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({IMAGE: None}, f"the policy reads the image {IMAGE}, and the batch has none: name the camera so"),
        ({IMAGE: torch.zeros(3, 8, 8)}, r"must be of shape \(batch, 3, height, width\), got \(3, 8, 8\)"),
        ({IMAGE: torch.full((1, 3, 8, 8), 255.0)}, r"must be in \[0, 1\], got values from 255 to 255"),
        ({IMAGE: torch.full((1, 3, 8, 8), torch.nan)}, "got values from nan to nan"),
        ({"observation.state": None}, "observation.state of 3 numbers, and the batch has none"),
        ({"observation.state": torch.zeros(1, 4)}, r"must be of shape \(batch, 3\), got \(1, 4\)"),
        ({"observation.state": torch.zeros(2, 3)}, "observation.state is of 2 environments, and .* of 1"),
        ({"observation.state": torch.full((1, 3), torch.inf)}, r"state\[0\] is inf"),
        ({"task": None}, "an instruction for each of 1 environments, a list of strings called 'task'"),
        ({"task": ["a", "b"]}, r"and got \['a', 'b'\]"),
        ({"task": [""]}, "the instruction is empty"),
    ],
)
def test_a_batch_that_no_policy_could_act_on_is_one_sentence(stateful, change, sentence):
    given = batch() | {"observation.state": torch.zeros(1, 3)} | change
    given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(InputError, match=sentence):
        Runner(stateful, 8).select(given)


def test_a_camera_of_another_name_is_shown_with_the_option_that_maps_it(policy):
    with pytest.raises(InputError, match=r"and the batch has observation.image: .*--rename_map="):
        Runner(policy, 8).select(batch(image="observation.image"))


@pytest.mark.parametrize("n_action_steps", [0, 9])
def test_no_more_actions_are_executed_than_a_chunk_has(policy, n_action_steps):
    with pytest.raises(InputError, match=f"n_action_steps must be from 1 to 8.* got {n_action_steps}"):
        Runner(policy, n_action_steps)
