"""The bundled policy, as it is shipped: loads, is small, and does its tasks on fixed seeds."""

import dataclasses

import pytest

import sqap
from sqap import environments
from sqap.checkpoints import BUNDLED
from sqap.errors import InputError
from sqap.evaluation.rollout import run_episode
from sqap.frames.simulator import collect_frames
from sqap.models.storage import stored_bytes

pytest.importorskip("metaworld")

EASY = ("drawer-close", "door-close", "handle-press")


@pytest.fixture(scope="module")
def reference():
    return sqap.load("reference")


@pytest.fixture(scope="module")
def compressed(reference):
    return sqap.compress(reference, sqap.Recipe.w4a8(), collect_frames(reference, "metaworld", EASY, 6))


def test_it_is_what_the_model_card_says(reference):
    assert reference.config.model.visual_tokens == 256
    assert reference.config.cameras == ("corner2",)
    assert stored_bytes(reference.model) < 32e6


def test_compressed_it_stores_less_than_two_thirds(reference, compressed):
    assert stored_bytes(compressed.model) < stored_bytes(reference.model) * 2 / 3


@pytest.mark.parametrize("task", EASY)
@pytest.mark.parametrize("which", ["reference", "compressed"])
def test_it_does_easy_tasks_on_fixed_seeds(which, task, request):
    policy = request.getfixturevalue(which)
    env = environments.make("metaworld", task)
    episodes = [run_episode(policy, env, 200_000 + i) for i in range(2)]
    env.close()
    assert all(episode.success for episode in episodes)


@pytest.mark.skipif(not BUNDLED["reference-smolvla"].is_dir(), reason="only in a checkout")
def test_the_policy_with_an_action_expert_does_an_easy_task_by_the_robots_state():
    policy = sqap.load("reference-smolvla")
    assert policy.config.model.head.has_expert
    assert policy.config.state_dim == 4
    assert stored_bytes(policy.model) < 60e6
    env = environments.make("metaworld", "drawer-close")
    assert run_episode(policy, env, 200_000).success
    blind = dataclasses.replace(env.observe(), state=None)
    with pytest.raises(InputError, match="reads the robot's state; the observation has none"):
        policy.act(blind)
    env.close()


def test_calibration_frames_are_the_same_every_time(reference):
    a, b = (collect_frames(reference, "metaworld", EASY, 7) for _ in range(2))
    assert [f.instruction for f in a] == [f.instruction for f in b]
    assert all((x.images["corner2"] == y.images["corner2"]).all() for x, y in zip(a, b, strict=True))
    assert len(a) == 7
