"""What the rest of the project takes for granted about Meta-World, checked on the real simulator."""

import os
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest

# First, because it chooses MuJoCo's OpenGL platform, which mujoco fixes when it is imported.
from sqap import environments
from sqap.environments.metaworld import ACTION_METRES, ACTION_REPEAT, CAMERA, MAX_STEPS, STATE_DIM, MetaWorld

try:
    import metaworld  # noqa: F401
    import mujoco
except (ImportError, AttributeError, OSError) as problem:  # the latter two: no OpenGL library
    pytest.skip(f"the Meta-World simulator cannot be imported here: {problem}", allow_module_level=True)

SIZE = 128


@pytest.fixture(scope="module")
def env():
    env = MetaWorld("drawer-close", SIZE)
    yield env
    env.close()


def first_frame(env, seed):
    return env.reset(seed).images[CAMERA]


def roll(env, seed, steps=20):
    """The simulator's state and the picture after some fixed actions."""
    env.reset(seed)
    for action in np.random.default_rng(0).uniform(-1, 1, (steps, 4)):
        env.step(action)
    return env.state_vector, env.observe().images[CAMERA]


def project(camera, point):
    u, v, w = camera.intrinsics @ (camera.world_to_camera @ np.append(point, 1))[:3]
    return np.array([u, v]) / w


def render(env, scale=1, segmentation=False):
    """The camera's picture from a renderer of our own, as MuJoCo gives it: upside down."""
    size = SIZE * scale
    renderer = mujoco.Renderer(env.simulator.model, size, size)
    if segmentation:
        renderer.enable_segmentation_rendering()
    renderer.update_scene(env.simulator.data, CAMERA)
    picture = renderer.render()
    renderer._gl_context.make_current()
    renderer.close()
    return picture


def silhouette(env, geom):
    """Centroid (u, v) of the pixels that ``geom`` covers in the upright picture."""
    scale = 3
    labels = np.flip(render(env, scale, segmentation=True), (0, 1))
    rows, columns = np.nonzero(
        (labels[..., 0] == env.simulator.model.geom(geom).id) & (labels[..., 1] == mujoco.mjtObj.mjOBJ_GEOM)
    )
    assert rows.size, f"{geom} is not in the picture"
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5]) / scale


class TestObservation:
    def test_one_small_picture_with_words_and_a_calibrated_camera(self, env):
        observation = env.reset(0)
        (image,) = observation.images.values()
        assert (image.shape, image.dtype) == ((SIZE, SIZE, 3), np.uint8)
        assert image.std() > 20  # a scene, not a blank
        assert observation.instruction == "close the drawer"
        assert list(observation.cameras) == [CAMERA]
        assert observation.end_effector.shape == (3,)

    def test_the_state_is_of_the_robot_alone(self, env):
        """The hand's position and how far it is open: they change as it moves, and nothing else is told."""
        first = env.reset(0).state
        assert first.shape == (STATE_DIM,)
        for action in ([1, 0, 0, -1], [0, 0, 1, 1]):
            before = env.observe().state
            for _ in range(10):
                env.step(np.array(action))
            after = env.observe().state
            np.testing.assert_allclose(after[:3], env.simulator.get_endeff_pos(), atol=1e-6)
            axis = int(np.argmax(np.abs(after - before)[:3]))
            assert action[axis] == 1
            assert after[axis] - before[axis] > 0.02
        assert after[3] < before[3]  # fingers close above zero
        np.testing.assert_array_equal(env.reset(0).state, first)

    def test_the_picture_is_turned_upright(self, env):
        image = first_frame(env, 0).astype(float)
        upside_down = render(env).astype(float)
        # Ours has no shadows, so the two are alike but not equal.
        assert abs(image - np.flip(upside_down, (0, 1))).mean() < 10 < abs(image - upside_down).mean()


class TestSeeds:
    def test_the_same_seed_gives_the_same_first_frame_after_other_episodes(self, env):
        before = first_frame(env, 5)
        roll(env, 6)
        first_frame(env, 7)
        np.testing.assert_array_equal(first_frame(env, 5), before)

    def test_the_same_seed_gives_the_same_first_frame_in_a_fresh_environment(self, env):
        other = MetaWorld("window-open", SIZE)
        first_frame(other, 5)
        before = first_frame(env, 5)
        other.close()  # while another environment's OpenGL context is current
        np.testing.assert_array_equal(first_frame(env, 5), before)
        fresh = MetaWorld("drawer-close", SIZE)
        np.testing.assert_array_equal(first_frame(fresh, 5), before)
        fresh.close()

    def test_the_same_actions_lead_to_the_same_place(self, env):
        state, image = roll(env, 5)
        roll(env, 6)
        again, image_again = roll(env, 5)
        np.testing.assert_array_equal(again, state)
        np.testing.assert_array_equal(image_again, image)

    def test_different_seeds_differ(self, env):
        frames = [first_frame(env, seed) for seed in (5, 6, 7)]
        assert not np.array_equal(frames[0], frames[1])
        assert not np.array_equal(frames[1], frames[2])


class TestCamera:
    @pytest.mark.parametrize("seed", [0, 1])
    def test_projects_as_mujoco_defines_its_camera(self, env, seed):
        observation = env.reset(seed)
        sim = env.simulator
        # MuJoCo: x right, y up, looking along -z; then half a turn of the picture.
        identity = sim.model.camera(CAMERA).id
        focal = 0.5 * SIZE / np.tan(np.radians(sim.model.cam_fovy[identity]) / 2)
        rotation = sim.data.cam_xmat[identity].reshape(3, 3)
        x, y, z = rotation.T @ (sim.tcp_center - sim.data.cam_xpos[identity])
        upright = np.array([SIZE / 2 + focal * x / -z, SIZE / 2 - focal * y / -z])
        projected = project(observation.cameras[CAMERA], observation.end_effector)
        np.testing.assert_allclose(projected, SIZE - upright, atol=1e-9)

    @pytest.mark.parametrize("steps", [0, 15])
    def test_projects_the_fingers_to_the_pixels_they_cover(self, env, steps):
        env.reset(1)
        for _ in range(steps):
            env.step(np.array([0.5, 1.0, -0.3, 0.0]))
        camera = env.observe().cameras[CAMERA]
        for geom in ("rightpad_geom", "leftpad_geom"):
            projected = project(camera, env.simulator.data.geom(geom).xpos)
            np.testing.assert_allclose(projected, silhouette(env, geom), atol=1.0)

    def test_the_end_effector_is_between_the_fingers_at_their_tips(self, env):
        observation = env.reset(2)
        u, v = project(observation.cameras[CAMERA], observation.end_effector)
        (right_u, right_v), (left_u, left_v) = (silhouette(env, g) for g in ("rightpad_geom", "leftpad_geom"))
        assert u == pytest.approx((right_u + left_u) / 2, abs=1.5)
        assert 0 < v - (right_v + left_v) / 2 < 10


class TestSteps:
    def test_the_scripted_expert_succeeds(self, env):
        from metaworld.policies import ENV_POLICY_MAP

        expert = ENV_POLICY_MAP["drawer-close-v3"]()
        env.reset(3)
        for _ in range(MAX_STEPS):
            result = env.step(np.clip(expert.get_action(env.state_vector), -1, 1))
            if result.success:
                break
        assert result.success
        assert not result.truncated

    def test_time_is_up_after_max_steps_and_starts_again_at_reset(self, env):
        for _ in range(2):
            env.reset(0)
            results = [env.step(np.zeros(4)) for _ in range(MAX_STEPS)]
            assert [r.truncated for r in results] == [False] * (MAX_STEPS - 1) + [True]
            assert not any(r.success for r in results)

    def test_an_action_moves_the_gripper_by_its_units(self, env):
        env.reset(0)
        for _ in range(5):
            env.step(np.array([0.0, 0.0, 0.5, 0.0]))  # until it moves steadily
        before = env.observe().end_effector
        for _ in range(5):
            env.step(np.array([0.0, 0.0, 0.5, 0.0]))
        moved = env.observe().end_effector - before
        np.testing.assert_allclose(moved, [0, 0, 5 * 0.5 * ACTION_METRES * ACTION_REPEAT], atol=0.01)

    def test_actions_are_clipped(self, env):
        def place(size):
            env.reset(0)
            for _ in range(5):
                env.step(np.array([0.0, 0.0, size, 0.0]))
            return env.observe().end_effector

        np.testing.assert_array_equal(place(50.0), place(1.0))


def test_what_decides_an_episode_besides_its_seed_is_told(monkeypatch):
    told = environments.describe("metaworld")
    assert (told["mujoco"], told["metaworld"]) == (mujoco.__version__, version("metaworld"))
    assert (told["numpy"], told["max_steps"]) == (np.__version__, str(MAX_STEPS))
    for renderer in ("egl", "osmesa"):
        monkeypatch.setenv("MUJOCO_GL", renderer)
        assert environments.describe("metaworld") == told | {"renderer": renderer}
    monkeypatch.setattr("sqap.environments.metaworld.ACTION_REPEAT", ACTION_REPEAT + 1)
    assert environments.describe("metaworld")["action_repeat"] != told["action_repeat"]


def test_close_can_be_called_twice():
    env = MetaWorld("drawer-close", SIZE)
    env.close()
    env.close()


@pytest.mark.parametrize("renderer", ["nonsense", "glfw", "disable"])
def test_a_renderer_that_cannot_render_is_one_sentence(renderer):
    """In a process of its own: MuJoCo reads the variable when it is imported."""
    code = "from sqap import environments; environments.make('metaworld', 'drawer-open')"
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"MUJOCO_GL": renderer},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("sqap.errors.InputError: ")
    assert f"MUJOCO_GL={renderer}" in last
    assert "osmesa" in last
