import json
from types import SimpleNamespace

import numpy as np
import pytest
from evaluation_fakes import HORIZON, Corridor, Walker
from hypothesis import given, settings
from hypothesis import strategies as st

from sqap.environments import ControlUnits
from sqap.errors import InputError
from sqap.evaluation.ensemble import AdaptiveEnsemble
from sqap.evaluation.rollout import Episode, noise_seed, run_episode
from sqap.evaluation.statistics import jerk


class Fixed:
    """Always the same chunk."""

    def __init__(self, chunk):
        self.chunk = np.asarray(chunk)

    def step(self, observation, *, seed=None, memory=None):
        return SimpleNamespace(chunk=self.chunk, selection=None, memory=None)


class TestLoop:
    def test_stops_at_success_within_a_chunk(self):
        episode = run_episode(Walker(), Corridor(goal=10), seed=0)
        assert (episode.task, episode.seed, episode.success, episode.steps) == ("walk", 0, True, 10)

    def test_stops_when_time_is_up(self):
        episode = run_episode(Walker(stride=0.0), Corridor(), seed=0)
        assert (episode.success, episode.steps) == (False, Corridor.max_steps)

    def test_the_policy_looks_again_after_each_chunk(self):
        policy = Walker()
        episode = run_episode(policy, Corridor(goal=10), seed=0)
        assert policy.seen == [0, HORIZON, 2 * HORIZON]
        assert len(episode.latencies_ms) == 3

    def test_only_the_first_actions_are_executed_when_asked(self):
        policy = Walker()
        run_episode(policy, Corridor(goal=5), seed=0, execute=2)
        assert policy.seen == [0, 2, 4]

    def test_as_many_actions_are_executed_as_the_policy_says(self):
        policy = Walker()
        policy.config = SimpleNamespace(n_action_steps=3)
        run_episode(policy, Corridor(goal=5), seed=0)
        assert policy.seen == [0, 3]
        asked = Walker()
        asked.config = policy.config
        run_episode(asked, Corridor(goal=5), seed=0, execute=2)
        assert asked.seen == [0, 2, 4]

    def test_the_environment_renders_only_when_the_policy_looks(self):
        env = Corridor(goal=10)
        run_episode(Walker(), env, seed=0)
        assert env.renders == 3

    def test_latency_is_the_policys_time(self):
        episode = run_episode(Walker(pause=0.01), Corridor(goal=10), seed=0)
        assert min(episode.latencies_ms) >= 10


class Recorder(Corridor):
    """Keeps the actions it was given."""

    def reset(self, seed):
        self.given = []
        return super().reset(seed)

    def step(self, action):
        self.given.append(action)
        return super().step(action)


class TestEnsemble:
    def test_the_policy_looks_at_every_control_step(self):
        policy = Walker()
        episode = run_episode(policy, Corridor(goal=6), seed=0, ensemble=3)
        assert (episode.success, episode.steps) == (True, 6)
        assert policy.seen == [0, 1, 2, 3, 4, 5]
        assert policy.seeds == [noise_seed(0, call) for call in range(6)]
        assert len(episode.latencies_ms) == 6

    def test_each_action_is_what_the_latest_chunks_agree_on(self):
        env = Recorder(goal=8)
        run_episode(Walker(), env, seed=4, ensemble=3)
        ensemble = AdaptiveEnsemble(3)
        chunks = [Walker().step(env.observe(), seed=noise_seed(4, call)).chunk for call in range(8)]
        np.testing.assert_array_equal(env.given, [ensemble.add(chunk) for chunk in chunks])
        assert {action.dtype for action in env.given} == {np.dtype(np.float32)}

    def test_of_one_chunk_is_executing_one_action_at_a_time(self):
        averaged, plain = Recorder(), Recorder()
        run_episode(Walker(), averaged, seed=4, ensemble=1)
        run_episode(Walker(), plain, seed=4, execute=1)
        np.testing.assert_array_equal(averaged.given, plain.given)

    def test_nothing_is_left_from_the_episode_before(self):
        policy, env = Walker(), Recorder(goal=5)
        run_episode(policy, env, seed=2, ensemble=4)
        first = env.given
        run_episode(policy, env, seed=2, ensemble=4)
        np.testing.assert_array_equal(env.given, first)

    def test_watching_shows_the_look_of_each_step(self):
        frames = []

        def watch(observation, selection, step):
            frames.append((int(observation.images["camera"][0, 0, 0]), selection, step))

        run_episode(Walker(), Corridor(goal=3), seed=0, ensemble=2, watch=watch)
        assert frames == [(0, "look 1", 0), (1, "look 2", 1), (2, "look 3", 2), (3, "look 3", 3)]


class TestNoise:
    def test_two_policies_get_the_same_noise_in_the_same_episode(self):
        fast, slow = Walker(stride=1.0), Walker(stride=0.5)
        run_episode(fast, Corridor(), seed=7)
        run_episode(slow, Corridor(), seed=7)
        assert len(fast.seeds) < len(slow.seeds)
        assert fast.seeds == slow.seeds[: len(fast.seeds)]
        assert slow.seeds == [noise_seed(7, call) for call in range(len(slow.seeds))]

    def test_noise_changes_with_the_call_and_with_the_episode(self):
        assert len({noise_seed(seed, call) for seed in range(30) for call in range(30)}) == 900

    @settings(deadline=None)
    @given(st.integers(0, 2**40), st.integers(0, 10_000))
    def test_noise_seeds_are_fixed_and_valid(self, seed, call):
        assert noise_seed(seed, call) == noise_seed(seed, call)
        assert 0 <= noise_seed(seed, call) < 2**32


class TestJerkOfTheEpisode:
    def test_is_measured_on_the_clipped_actions_in_the_environments_units(self):
        chunk = np.array([[3.0, 0, 0, 0], [-3.0, 0, 0, 0]])
        units = ControlUnits(metres=0.5, hz=2.0, limit=1.0)
        episode = run_episode(Fixed(chunk), Corridor(), seed=0, units=units)
        assert episode.jerk == pytest.approx(4 * 0.5 * 2.0**3)

    def test_includes_the_seams_between_chunks(self):
        chunk = np.zeros((HORIZON, 4))
        chunk[:, 1] = np.linspace(-1, 1, HORIZON)
        episode = run_episode(Fixed(chunk), Corridor(), seed=0)
        repeated = np.tile(chunk, (8, 1))[: Corridor.max_steps]
        assert episode.jerk == pytest.approx(jerk(repeated))
        assert jerk(chunk) == pytest.approx(0)


class TestWatch:
    def test_sees_every_control_step_with_the_selection_that_led_to_it(self):
        frames = []

        def watch(observation, selection, step):
            frames.append((int(observation.images["camera"][0, 0, 0]), selection, step))

        run_episode(Walker(), Corridor(goal=6), seed=0, watch=watch)
        looks = ["look 1"] * 4 + ["look 2"] * 3
        assert frames == [(step, look, step) for step, look in enumerate(looks)]

    def test_changes_nothing(self):
        def run(watch):
            episode = run_episode(Walker(), Corridor(), seed=3, watch=watch)
            return episode.success, episode.steps, episode.jerk

        assert run(lambda *_: None) == run(None)


class TestChecks:
    def test_actions_of_another_robot_are_refused(self):
        with pytest.raises(InputError, match="gives 7 numbers an action, but walk takes 4"):
            run_episode(Fixed(np.zeros((8, 7))), Corridor(), seed=0)

    @pytest.mark.parametrize("execute", [0, HORIZON + 1])
    def test_execute_outside_the_chunk_is_refused(self, execute):
        with pytest.raises(InputError, match=f"from 1 to {HORIZON}.*got {execute}"):
            run_episode(Walker(), Corridor(), seed=0, execute=execute)

    @pytest.mark.parametrize(
        ("ensemble", "message"),
        [
            (0, "an ensemble must be of at least 1 chunk, got 0"),
            (HORIZON + 1, f"an ensemble must be of 1 to {HORIZON} chunks.*got {HORIZON + 1}"),
        ],
    )
    def test_an_ensemble_that_does_not_fit_the_chunk_is_refused(self, ensemble, message):
        with pytest.raises(InputError, match=message):
            run_episode(Walker(), Corridor(), seed=0, ensemble=ensemble)

    def test_an_ensemble_and_several_actions_a_look_exclude_each_other(self):
        with pytest.raises(InputError, match="execute=2 cannot be asked for too"):
            run_episode(Walker(), Corridor(), seed=0, ensemble=2, execute=2)

    def test_actions_that_are_not_finite_are_refused(self):
        with pytest.raises(InputError, match="not finite"):
            run_episode(Fixed(np.full((2, 4), np.nan)), Corridor(), seed=0)


class TestJson:
    def test_round_trip(self):
        episode = Episode("walk", 1_000_003, True, 12, 0.25, (40.125, 39.0))
        assert Episode.from_json(json.loads(json.dumps(episode.to_json()))) == episode

    def test_a_wrong_type_is_refused(self):
        data = Episode("walk", 3, True, 12, 0.25, ()).to_json() | {"success": 1}
        with pytest.raises(InputError, match=r"episode\.success must be bool"):
            Episode.from_json(data)
