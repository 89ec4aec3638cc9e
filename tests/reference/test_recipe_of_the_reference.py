"""The training recipe: labels are the expert's, and labelling leaves the episode as it was."""

import numpy as np
import pytest

pytest.importorskip("metaworld")

from reference import collect, model, train
from reference.export import make_tokenizer
from sqap.environments.metaworld import MetaWorld
from sqap.environments.metaworld_tasks import INSTRUCTIONS


@pytest.fixture
def env():
    world = MetaWorld("drawer-close")
    yield world
    world.close()


def test_a_label_is_what_the_expert_then_does(env):
    env.reset(3)
    expert = collect.Expert(env)
    promised = expert.chunk()
    done = []
    for _ in range(len(promised)):
        done.append(expert.action())
        env.step(done[-1])
    np.testing.assert_allclose(done, promised, atol=1e-6)


def test_labelling_leaves_the_episode_as_it_was(env):
    def final_state(label: bool) -> np.ndarray:
        env.reset(4)
        expert = collect.Expert(env)
        for _ in range(20):
            if label:
                expert.chunk()
            env.step(expert.action())
        return env.state_vector

    np.testing.assert_allclose(final_state(label=True), final_state(label=False), atol=1e-9)


def test_the_disturbed_expert_still_closes_the_drawer(env):
    samples = collect.Samples([], [], [])
    assert collect.record_demonstration(env, 0, samples)
    assert len(samples.images) == len(samples.chunks) == len(samples.states) > 5
    assert samples.chunks[0].shape == (8, 4)


def test_training_and_the_shipped_tokenizer_agree():
    tokenizer = make_tokenizer()
    for instruction in [*INSTRUCTIONS.values(), "Open the POD bay door"]:
        assert tokenizer.encode(instruction.lower()).ids == model.token_ids(instruction)


def test_the_learning_rate_warms_up_holds_and_ends_at_zero():
    rates = [train.learning_rate(step, 5000) for step in range(5000)]
    assert rates[0] < rates[100] < train.PEAK_RATE
    assert rates[1000] == rates[2000] == train.PEAK_RATE
    assert rates[-1] < 1e-3 * train.PEAK_RATE
