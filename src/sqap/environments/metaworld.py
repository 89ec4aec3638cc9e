"""Meta-World (3.x, MuJoCo) as an `Environment`: seeded, fast to render, with a calibrated camera.

Seeding, rendering flags and the upside-down ``corner2`` camera follow what was measured on
metaworld 3.1.1; each workaround says why it is there.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from sqap.environments.base import StepResult
from sqap.environments.metaworld_tasks import INSTRUCTIONS, SHOWS_GOAL
from sqap.errors import InputError
from sqap.observation import Camera, Observation

# OSMesa needs one apt package and no display; a user's own choice is left alone. MuJoCo reads this when
# it is first imported; an empty value says as little as none.
RENDERER = "MUJOCO_GL"
if sys.platform == "linux" and not os.environ.get(RENDERER):
    os.environ[RENDERER] = "osmesa"

CAMERA = "corner2"
FOVY_DEGREES = 50.0
CONTROL_HZ = 40  # the simulator's 80 Hz with every action held for two of its steps
ACTION_REPEAT = 2
ACTION_METRES = 0.01  # an action of 1 moves the gripper's target by 1 cm
MAX_STEPS = 150
STATE_DIM = 4  # of the robot itself: the hand's position in metres, and how far its fingers are apart
IMAGE_SIZE = 128


class MetaWorld:
    """One Meta-World task.

    Actions are ``(4,)`` in [-1, 1]: the gripper's displacement in x, y, z (1 cm per unit per simulator
    step) and the finger effort, held for `ACTION_REPEAT` simulator steps.

    Args:
        task: name without version, e.g. ``"drawer-open"``.
        image_size: height and width of the square image in pixels.

    Raises:
        InputError: the task is unknown, or the simulator is not installed or has nothing to render with.
    """

    action_dim = 4
    max_steps = MAX_STEPS

    def __init__(self, task: str, image_size: int = IMAGE_SIZE) -> None:
        check_task(task)
        metaworld, mujoco = _import_simulator()
        self._mujoco = mujoco
        self.task = task
        self.instruction = INSTRUCTIONS[task]
        # MT1(seed=42) only supplies the task object; the start state comes from reset(seed).
        benchmark = metaworld.MT1(f"{task}-v3", seed=42)
        self._sim: Any = benchmark.train_classes[f"{task}-v3"]()
        self._sim.set_task(benchmark.train_tasks[0])
        self._sim.model.cam_pos[2] = [0.75, 0.075, 0.7]
        self._sim.reset()
        self._sim._freeze_rand_vec = False
        self._sim.seeded_rand_vec = True

        self._camera_id = self._sim.model.camera(CAMERA).id
        self._sim.model.cam_fovy[self._camera_id] = FOVY_DEGREES
        # Multisampling and shadows cost 20 times the rest of the picture; both must go before the
        # renderer exists.
        self._sim.model.vis.quality.offsamples = 0
        self._renderer: Any = _make_renderer(mujoco, self._sim.model, image_size)
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._options = mujoco.MjvOption()
        if task not in SHOWS_GOAL:
            self._options.sitegroup[:] = 0  # a goal marker would give the instruction away
        self._image_size = image_size
        self._vector = np.zeros(0)
        self._steps = 0

    def reset(self, seed: int) -> Observation:
        """Start an episode. The same seed gives bit-identical first frames."""
        # Twice, because a reset moves bodies without telling MuJoCo to recompute where things are: the
        # first one leaves goals and handles measured at the previous episode's places.
        for _ in range(2):
            self._sim.seed(seed)
            self._sim.reset(seed=seed)
            self._forward()
        # The simulator moves its goal markers only in step(): without this the first frame shows the
        # goal of the previous episode.
        for site in self._sim._target_site_config:
            self._sim._set_pos_site(*site)
        self._forward()
        self._vector = self._sim._get_obs()
        self._steps = 0
        return self.observe()

    def step(self, action: np.ndarray) -> StepResult:
        """Hold ``action`` (4,) for `ACTION_REPEAT` simulator steps, without rendering."""
        clipped = np.clip(np.asarray(action, dtype=np.float64), -1.0, 1.0)
        success = False
        for _ in range(ACTION_REPEAT):
            self._vector, _, _, _, info = self._sim.step(clipped)
            success = success or bool(info["success"])
        self._steps += 1
        return StepResult(success=success, truncated=self._steps >= self.max_steps)

    def observe(self) -> Observation:
        """Render the present moment."""
        return Observation(
            images={CAMERA: self._render()},
            instruction=self.instruction,
            state=self._vector[:STATE_DIM],
            cameras={CAMERA: self._camera()},
            end_effector=np.array(self._sim.tcp_center),
        )

    @property
    def state_vector(self) -> np.ndarray:
        """The simulator's own 39 numbers, which its scripted experts act on. No policy sees them."""
        return np.array(self._vector)

    @property
    def simulator(self) -> Any:
        """Meta-World's own environment, for whoever needs more than a policy may see."""
        return self._sim

    def close(self) -> None:
        """Free the renderer. Safe to call twice."""
        renderer, self._renderer = self._renderer, None
        if renderer is not None:
            # MuJoCo deletes its textures in whichever GL context is current; another environment's
            # pictures would be spoiled if that were not our own.
            renderer._gl_context.make_current()
            renderer.close()

    def __del__(self) -> None:
        if getattr(self, "_renderer", None) is not None:
            self.close()

    def _forward(self) -> None:
        self._mujoco.mj_forward(self._sim.model, self._sim.data)

    def _render(self) -> np.ndarray:
        self._renderer.update_scene(self._sim.data, self._camera_id, self._options)
        # corner2 is mounted upside down.
        return np.ascontiguousarray(np.flip(self._renderer.render(), (0, 1)))

    def _camera(self) -> Camera:
        size = self._image_size
        focal = 0.5 * size / np.tan(np.radians(FOVY_DEGREES) / 2)
        intrinsics = np.array([[focal, 0, size / 2], [0, focal, size / 2], [0, 0, 1]])
        # MuJoCo's camera looks along -z with y up, and the picture is turned by half a turn: together
        # x is mirrored, y (down, then turned) stays, z is mirrored.
        turn = np.diag([-1.0, 1.0, -1.0])
        rotation = turn @ self._sim.data.cam_xmat[self._camera_id].reshape(3, 3).T
        world_to_camera = np.eye(4)
        world_to_camera[:3, :3] = rotation
        world_to_camera[:3, 3] = -rotation @ self._sim.data.cam_xpos[self._camera_id]
        return Camera(intrinsics, world_to_camera)


def check_task(task: str) -> None:
    """Raise `InputError`, naming what exists, unless ``task`` is a Meta-World task."""
    if task not in INSTRUCTIONS:
        raise InputError(f"unknown metaworld task {task!r}; known tasks: {', '.join(sorted(INSTRUCTIONS))}")


def describe() -> dict[str, str]:
    """The packages' versions and the settings that decide an episode besides its seed."""
    return {
        "metaworld": _version("metaworld"),
        "mujoco": _version("mujoco"),
        "numpy": np.__version__,  # draws the start states
        "renderer": os.environ.get(RENDERER) or "mujoco's own choice",
        "image": f"{CAMERA}, {IMAGE_SIZE} x {IMAGE_SIZE} pixels, {FOVY_DEGREES} degrees",
        "action_repeat": str(ACTION_REPEAT),
        "max_steps": str(MAX_STEPS),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _make_renderer(mujoco: Any, model: Any, image_size: int) -> Any:
    # GLFW without a display, which is MuJoCo's choice if it was imported before MUJOCO_GL was set, would
    # end the process at the second attempt.
    if os.environ.get(RENDERER) in ("osmesa", "egl") and "glfw" in mujoco.gl_context.GLContext.__module__:
        raise InputError(
            "MuJoCo was imported before sqap.environments and chose a renderer that needs a display; "
            "import sqap.environments first, or set MUJOCO_GL=osmesa"
        )
    problem = _try_context(mujoco)
    if problem is not None:
        raise InputError(
            f"{_renderer_setting()} cannot render here ({problem}); set MUJOCO_GL=osmesa, which needs "
            "neither a display nor a GPU"
        )
    return mujoco.Renderer(model, image_size, image_size)


@lru_cache(maxsize=1)
def _try_context(mujoco: Any) -> str | None:
    """Why no OpenGL context can be had; None if one can. A `mujoco.Renderer` would leave half an object."""
    context: Any = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GLFW says everything twice
            if not hasattr(mujoco.gl_context, "GLContext"):
                return "that switches rendering off"
            context = mujoco.gl_context.GLContext(IMAGE_SIZE, IMAGE_SIZE)
            if not context._context:
                return "there is no display"
            context.make_current()
            context.free()
    except Exception as error:  # each of MuJoCo's renderers raises its own
        if context is not None:
            context._context = None  # what cannot be made current cannot be freed either
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    try:
        text = str(error).strip()
    except Exception:  # PyOpenGL's cannot always say what they are
        text = ""
    return text.partition("\n")[0] or type(error).__name__


def _renderer_setting() -> str:
    return f"MUJOCO_GL={os.environ.get(RENDERER, '')}"


def _import_simulator() -> tuple[Any, Any]:
    try:
        import metaworld
        import mujoco
    except ImportError as error:
        raise InputError(f'the simulator is not installed ({error}); pip install "sqap[sim]"') from error
    except RuntimeError as error:
        raise InputError(
            f"{_renderer_setting()} names no renderer of MuJoCo's ({error}); set it to osmesa, egl or glfw"
        ) from error
    except (AttributeError, OSError) as error:
        raise InputError(
            "MuJoCo found no OpenGL library to render with; apt-get install libosmesa6 "
            f"(or set MUJOCO_GL=egl): {error}"
        ) from error
    return metaworld, mujoco
