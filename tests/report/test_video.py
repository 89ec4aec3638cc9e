"""Pictures are checked at single pixels whose value the drawing rules decide."""

import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sqap.environments import ControlUnits, StepResult
from sqap.errors import InputError
from sqap.evaluation.rollout import Episode
from sqap.observation import Observation
from sqap.processing import Crop, ResizeWithPad, Window, window
from sqap.pruning.selector import Selection
from sqap.recipe import Recipe
from sqap.report.clips import FPS, Clip, Frame, record_episode
from sqap.report.comparison import record_comparison
from sqap.report.overlay import AROUND, ATTENDED, PRUNED_BRIGHTNESS, SAMPLED, annotate, heat_map
from sqap.report.panes import BACKGROUND, FAILURE, SUCCESS, compose
from sqap.report.video import HOLD_SECONDS, write_picture, write_video

GRID, SIZE, PANE = 4, 256, 64
PATCH = SIZE // GRID
RING = (0.1, 0.3)
QUARTER = Window(sides=(0.5, 0.5))  # of the area


def mask(*tokens):
    chosen = torch.zeros(GRID**2, dtype=torch.bool)
    chosen[list(tokens)] = True
    return chosen


def selection(target=None):
    """Patches 0 and 1 for attention, 6 for the ring, 15 sampled; the other twelve are pruned."""
    return Selection(mask(0, 1), mask(6), mask(15), target)


def middle(picture, patch):
    row, column = divmod(patch, GRID)
    return picture[row * PATCH + PATCH // 2, column * PATCH + PATCH // 2].astype(int)


def clip(steps=6, success=True, label="full precision", instruction="open the drawer", tokens=None):
    """An episode at 40 Hz whose picture brightens by one a control step."""
    frames = tuple(
        Frame(Observation({"camera": np.full((16, 16, 3), 100 + step, np.uint8)}, instruction), tokens, step)
        for step in range(0, steps + 1, 2)
    )
    return Clip(label, RING, 40.0, frames, Episode("drawer-open", 0, success, steps, 0.0, ()))


def has_color(picture, color):
    return bool((np.abs(picture.astype(int) - color).max(-1) <= 8).any())


class TestAnnotate:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)

    def test_without_a_selection_the_image_is_only_enlarged(self):
        picture = annotate(self.image, None, SIZE, RING)
        assert picture.shape == (SIZE, SIZE, 3)
        assert picture.dtype == np.uint8
        assert np.array_equal(picture, Image.fromarray(self.image).resize((SIZE, SIZE), Image.LANCZOS))

    def test_pruned_patches_are_dark_and_kept_ones_as_they_were(self):
        plain = annotate(self.image, None, SIZE, None)
        shown = annotate(self.image, selection(), SIZE, None)
        for patch in range(GRID**2):
            row, column = divmod(patch, GRID)
            inside = np.s_[
                row * PATCH + 2 : (row + 1) * PATCH - 2, column * PATCH + 2 : (column + 1) * PATCH - 2
            ]
            if patch in (0, 1, 6, 15):
                assert np.array_equal(shown[inside], plain[inside])
            else:
                share = shown[inside].mean() / plain[inside].mean()
                assert share == pytest.approx(PRUNED_BRIGHTNESS, rel=0.2)

    def test_pruned_patches_lose_color(self):
        red = np.full((8, 8, 3), (250, 0, 0), np.uint8)
        shown = middle(annotate(red, selection(), SIZE, None), 5)
        assert shown[0] - shown[1] < 0.5 * PRUNED_BRIGHTNESS * 250

    @pytest.mark.parametrize(("patch", "color"), [(0, ATTENDED), (6, AROUND), (15, SAMPLED)])
    def test_the_outline_tells_the_criterion(self, patch, color):
        gray = np.full((8, 8, 3), 128, np.uint8)
        shown = annotate(gray, selection(), SIZE, None).astype(int)
        row, column = divmod(patch, GRID)
        edge = shown[row * PATCH + PATCH // 2, column * PATCH]
        towards = np.array(color) - 128
        assert np.allclose(edge - 128, 0.7 * towards, atol=1)

    def test_patches_kept_for_the_same_reason_share_one_outline(self):
        gray = np.full((8, 8, 3), 128, np.uint8)
        shown = annotate(gray, selection(), SIZE, None)
        assert (shown[PATCH // 2, PATCH - 3 : PATCH + 3] == 128).all()

    def test_the_ring_is_two_circles_around_the_target(self):
        target = (0.5, 0.25)
        black = np.zeros((8, 8, 3), np.uint8)
        shown = annotate(black, selection(target), SIZE, RING).astype(int)
        for radius in RING:
            for right, down in ((radius, 0), (-radius, 0), (0, radius)):
                y, x = int((target[1] + down) * SIZE), int((target[0] + right) * SIZE)
                near = shown[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
                assert np.abs(near - AROUND).sum(1).min() < 120
        between = shown[int((target[1] + 0.14) * SIZE), int((target[0] + 0.14) * SIZE)]
        assert between.max() <= 5

    def test_a_crop_is_drawn_where_it_is(self):
        """A quarter of the area: patches and ring at half their size, and nothing but darkness around."""
        gray, target, half = np.full((8, 8, 3), 128, np.uint8), (0.4, 0.6), SIZE // 2
        shown = annotate(gray, selection(target), SIZE, RING, QUARTER)
        whole = annotate(gray, selection(target), half, RING)
        inside = shown[half // 2 : -half // 2, half // 2 : -half // 2].astype(int)
        # Strokes have widths of their own; what lies between them is the same.
        assert (np.abs(inside - whole).max(-1) <= 2).mean() > 0.9
        assert (shown[2 : half // 2 - 2].max(-1) < PRUNED_BRIGHTNESS * 128).all()
        assert (shown[:, : half // 2 - 2].max(-1) < PRUNED_BRIGHTNESS * 128).all()
        row, column = int(SIZE * 0.55), int(SIZE * (0.45 + RING[1] / 2))  # where the outer circle is
        near = shown[row - 2 : row + 3, column - 2 : column + 3].reshape(-1, 3).astype(int)
        assert np.abs(near - AROUND).sum(1).min() < 120

    def test_padding_is_not_drawn(self):
        """Of a 4:3 picture, an eighth of the square that the policy looks at is above it, and below."""
        gray, target = np.full((48, 64, 3), 128, np.uint8), (0.5, 0.5)
        seen = window((ResizeWithPad(32, "center"),), (48, 64))
        first_row = Selection(mask(0, 1, 2, 3), mask(), mask(), target)
        shown = annotate(gray, first_row, SIZE, None, seen)
        edge = SIZE // 6  # half a row of the grid's, four thirds as high as in the square
        assert (shown[5 : edge - 5, 5:-5] == 128).all()
        assert (shown[edge + 5 : -5, 5:-5].max(-1) < 0.5 * 128).all()
        ringed = annotate(np.zeros_like(gray), first_row, SIZE, RING, seen).astype(int)
        for right, down in ((RING[1], 0), (-RING[1], 0), (0, RING[1] * 4 / 3), (RING[0], 0)):
            y, x = int((target[1] + down) * SIZE), int((target[0] + right) * SIZE)
            near = ringed[y - 2 : y + 3, x - 2 : x + 3].reshape(-1, 3)
            assert np.abs(near - AROUND).sum(1).min() < 120

    @pytest.mark.parametrize(("target", "ring"), [(None, RING), ((0.5, 0.5), None)])
    def test_no_ring_without_a_target_or_radii(self, target, ring):
        picture = annotate(self.image, selection(target), SIZE, ring)
        assert np.array_equal(picture, annotate(self.image, selection(), SIZE, None))

    def test_a_target_outside_the_image_leaves_it_whole(self):
        picture = annotate(self.image, selection((3.0, -2.0)), SIZE, RING)
        assert np.array_equal(picture, annotate(self.image, selection(), SIZE, None))

    def test_a_grid_that_does_not_divide_the_picture(self):
        everything = Selection(torch.ones(9, dtype=torch.bool), *[torch.zeros(9, dtype=torch.bool)] * 2)
        assert annotate(self.image, everything, 100, None).shape == (100, 100, 3)


class TestRecord:
    class Walk:
        task, action_dim, max_steps = "walk", 4, 7

        def reset(self, seed):
            self.steps = 0
            return self.observe()

        def step(self, action):
            self.steps += 1
            return StepResult(success=self.steps == 7, truncated=False)

        def observe(self):
            return Observation({"camera": np.full((4, 4, 3), self.steps, np.uint8)}, "walk")

        def close(self):
            pass

    class Looks:
        """Three actions a look, each look with a selection of its own."""

        def __init__(self):
            self.selections = []

        def step(self, observation, *, seed=None, memory=None):
            self.selections.append(selection())
            return SimpleNamespace(chunk=np.zeros((3, 4)), memory=None, selection=self.selections[-1])

    def test_shows_the_camera_and_the_crop_of_the_policy(self):
        images = {name: np.full((4, 4, 3), value, np.uint8) for name, value in (("left", 10), ("wrist", 200))}
        frames = (Frame(Observation(images, "walk"), selection(), 0),)
        episode = Episode("walk", 0, True, 0, 0.0, ())
        pictures = [
            compose([Clip("x", None, 40.0, frames, episode, camera, steps)], 0, PANE)
            for camera, steps in ((None, ()), ("wrist", ()), ("wrist", (Crop(0.25),)))
        ]
        bright = [int((picture.min(-1) == 200).sum()) for picture in pictures]
        assert bright[0] == 0
        assert bright[1] > 3 * bright[2] > 0

    def test_a_comparison_shows_what_each_policy_looks_at(self, monkeypatch):
        monkeypatch.setattr("sqap.environments.make", lambda env, task: self.Walk())
        policies = [self.Looks(), self.Looks()]
        for policy, camera, crop in zip(policies, ("wrist", "camera"), (0.5, 1.0), strict=True):
            policy.recipe, policy.config = (
                Recipe(),
                SimpleNamespace(cameras=(camera, "other"), images=((Crop(crop),), ())),
            )
        columns = record_comparison(policies, "metaworld", ["door-open", "door-close"], seed=0)
        assert [[(shown.camera, shown.steps) for shown in column] for column in columns] == [
            [("wrist", (Crop(0.5),))] * 2,
            [("camera", (Crop(1.0),))] * 2,
        ]

    def record(self, hz):
        policy = self.Looks()
        units = ControlUnits(hz=hz)
        return policy, record_episode(policy, self.Walk(), 0, label="x", ring=RING, units=units)

    def test_keeps_twenty_frames_a_second_and_the_last(self):
        _, recorded = self.record(hz=40)
        assert [frame.step for frame in recorded.frames] == [0, 2, 4, 6, 7]
        assert [frame.observation.images["camera"][0, 0, 0] for frame in recorded.frames] == [0, 2, 4, 6, 7]

    def test_slow_control_keeps_every_step(self):
        _, recorded = self.record(hz=5)
        assert [frame.step for frame in recorded.frames] == list(range(8))

    def test_frames_hold_the_selection_that_was_in_use(self):
        policy, recorded = self.record(hz=40)
        first, second, third = policy.selections
        assert [frame.selection for frame in recorded.frames] == [first, first, second, third, third]

    def test_tells_how_it_went(self):
        _, recorded = self.record(hz=40)
        assert (recorded.episode.success, recorded.episode.steps) == (True, 7)
        assert recorded.seconds == pytest.approx(7 / 40)

    @pytest.mark.parametrize(
        ("seconds", "step"), [(0, 0), (0.04, 0), (0.05, 2), (0.15, 6), (0.17, 6), (9, 7)]
    )
    def test_shows_the_latest_frame(self, seconds, step):
        assert self.record(hz=40)[1].at(seconds).step == step

    def test_rounding_does_not_show_an_earlier_frame(self):
        frames = tuple(Frame(clip().frames[0].observation, None, step) for step in range(124))
        episode = Episode("drawer-open", 0, True, 123, 0.0, ())
        assert Clip("x", None, 30.0, frames, episode).at(4.1).step == 123


class TestHeatMap:
    image = np.full((32, 32, 3), 120, dtype=np.uint8)

    def test_brightness_follows_the_scores(self):
        shown = heat_map(self.image, np.arange(GRID**2, dtype=np.float32), SIZE)
        assert shown.shape == (SIZE, SIZE, 3)
        brightness = [middle(shown, patch).sum() for patch in range(GRID**2)]
        assert brightness == sorted(brightness)
        assert len(set(brightness)) == GRID**2

    def test_what_is_gone_or_scores_nothing_is_darkest(self):
        scores = np.full(GRID**2, 0.5, dtype=np.float32)
        scores[3], scores[7] = -np.inf, 0
        shown = heat_map(self.image, scores, SIZE)
        assert np.array_equal(middle(shown, 3), middle(shown, 7))
        assert middle(shown, 3).sum() < middle(shown, 4).sum()
        assert (heat_map(self.image, np.zeros(GRID**2, np.float32), SIZE) == shown[4, 4 * PATCH - 4]).all()

    def test_around_a_crop_there_is_none(self):
        shown = heat_map(self.image, np.ones(GRID**2, np.float32), SIZE, QUARTER)
        quarter = SIZE // 4
        inside = shown[quarter + 2 : -quarter - 2, quarter + 2 : -quarter - 2]
        assert inside.min() > 20
        assert (shown[: quarter - 2] == 30).all()


class TestCompose:
    def test_sides_are_even_and_columns_equal(self):
        for columns in (1, 2, 3):
            for pane in (63, 64, 101):
                height, width, _ = compose([clip()] * columns, 0, pane).shape
                assert width % 2 == height % 2 == 0
                assert width >= columns * pane

    def test_the_badge_comes_at_the_end_and_not_before(self):
        won, lost = clip(steps=6), clip(steps=6, success=False)
        before, after = compose([won, lost], 0.1), compose([won, lost], 0.15)
        assert not has_color(before, SUCCESS)
        assert not has_color(before, FAILURE)
        half = after.shape[1] // 2
        assert has_color(after[:, :half], SUCCESS)
        assert not has_color(after[:, :half], FAILURE)
        assert has_color(after[:, half:], FAILURE)

    def test_an_episode_that_is_over_shows_its_end(self):
        assert np.array_equal(compose([clip()], 0.15), compose([clip()], 3))

    def test_the_legend_names_what_is_in_the_picture(self):
        footer = np.s_[-40:]
        every = compose([clip(tokens=selection())], 0)[footer]
        assert all(has_color(every, color) for color in (ATTENDED, AROUND, SAMPLED))
        none = mask()
        random = compose([clip(tokens=Selection(none, none, mask(3, 4)))], 0)[footer]
        assert has_color(random, SAMPLED)
        assert not has_color(random, ATTENDED)
        assert not has_color(random, AROUND)

    def test_scores_are_shown_on_the_right_of_what_is_kept(self):
        ranked = dataclasses.replace(selection(), scores=torch.linspace(0, 1, GRID**2))
        plain, more = compose([clip(tokens=selection())], 0), compose([clip(tokens=ranked)], 0)
        step = 512 + 512 // 20
        assert abs(more.shape[1] - plain.shape[1] - step) <= 1  # sides are even
        assert np.array_equal(more[:, :step], plain[:, :step])
        # The highest score is in the lower right corner, the lowest in the upper left.
        top = 512 * 84 // 512
        heat = more[top : top + 512, step + 512 // 20 :][:, :512].astype(int)
        assert heat[-20, -20].sum() > heat[20, 20].sum() + 200

    @pytest.mark.parametrize("pane", [200, 300, 512, 640])
    def test_the_legend_fits(self, pane):
        picture = compose([clip(tokens=selection())], 0, pane)
        assert (picture[-pane // 20 :, -pane // 20 - 3 :] == BACKGROUND).all()

    @pytest.mark.parametrize(
        "text", ["word " * 300, "x" * 2000, "two\nlines\tand a tab", "引き出しを開ける", " "]
    )
    @pytest.mark.parametrize("pane", [40, 512])
    def test_any_text_fits(self, text, pane):
        shown = clip(label=text, instruction=text or "?") if text.strip() else clip(label=text)
        picture = compose([shown], 9, pane)
        assert picture.shape == compose([clip()], 9, pane).shape
        if pane == 512:
            # The strip of background between the cut label and the badge.
            assert (picture[:40, 25 + 309 : 25 + 313] == BACKGROUND).all()


@pytest.fixture
def imageio():
    pytest.importorskip("imageio_ffmpeg")
    return pytest.importorskip("imageio.v2")


class TestWriteVideo:
    def test_is_read_back_with_the_right_frames(self, imageio, tmp_path):
        path = tmp_path / "new" / "rollout.mp4"
        short, long = clip(steps=4), clip(steps=20, success=False)
        write_video(path, [[short, long], [long, long]], pane=PANE)
        with imageio.get_reader(path) as reader:
            meta = reader.get_meta_data()
            frames = [np.asarray(frame) for frame in reader]
        expected = compose([short, long], 0, PANE)
        assert (meta["fps"], meta["codec"], meta["pix_fmt"][:7]) == (FPS, "h264", "yuv420p")
        # Both rows last as long as their longer episode, half a second, and then hold.
        assert len(frames) == 2 * (10 + 1 + round(HOLD_SECONDS * FPS))
        assert frames[0].shape == expected.shape
        assert np.abs(frames[0].astype(int) - expected).mean() < 4
        assert [path.name for path in path.parent.iterdir()] == ["rollout.mp4"]

    def test_is_in_real_time_at_any_rate(self, imageio, tmp_path):
        path = tmp_path / "rollout.mp4"
        write_video(path, [[clip(steps=40)]], fps=10, pane=PANE)
        with imageio.get_reader(path) as reader:
            assert reader.count_frames() == 10 + 1 + 7

    def test_a_failure_on_the_way_leaves_the_old_file_and_no_other(self, imageio, tmp_path, monkeypatch):
        path = tmp_path / "rollout.mp4"
        path.write_bytes(b"old")
        drawn = []

        def fail_later(*arguments):
            drawn.append(compose(*arguments))
            if len(drawn) == 5:
                raise RuntimeError("out of paint")
            return drawn[-1]

        monkeypatch.setattr("sqap.report.video.compose", fail_later)
        with pytest.raises(RuntimeError, match="out of paint"):
            write_video(path, [[clip()]], pane=PANE)
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_file_that_the_encoder_left_unfinished_is_not_passed_off(self, imageio, tmp_path, monkeypatch):
        monkeypatch.setattr("imageio_ffmpeg.count_frames_and_secs", lambda path: (3, 0.1))
        with pytest.raises(InputError, match=r"cannot write .*rollout\.mp4: the encoder did not finish it"):
            write_video(tmp_path / "rollout.mp4", [[clip()]], pane=PANE)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("module", ["imageio.v2", "imageio_ffmpeg"])
    def test_names_what_to_install(self, module, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=r'pip install "sqap\[sim\]"'):
            write_video(tmp_path / "rollout.mp4", [[clip()]])

    def test_another_format_is_refused(self, tmp_path):
        with pytest.raises(InputError, match=r"must end in \.mp4, got 'rollout\.gif'"):
            write_video(tmp_path / "rollout.gif", [[clip()]])

    def test_a_place_that_cannot_be_written_is_named(self, imageio, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=r"cannot write .*rollout\.mp4"):
            write_video(tmp_path / "file" / "rollout.mp4", [[clip()]], pane=PANE)


class TestWritePicture:
    def test_is_read_back_exactly(self, tmp_path):
        frame = compose([clip()], 0, PANE)
        write_picture(tmp_path / "still.png", frame)
        with Image.open(tmp_path / "still.png") as image:
            assert image.format == "PNG"
            assert np.array_equal(image, frame)
        assert [path.name for path in tmp_path.iterdir()] == ["still.png"]

    def test_a_directory_in_its_place_is_left_alone(self, tmp_path):
        (tmp_path / "still.png").mkdir()
        with pytest.raises(InputError, match=r"cannot write .*still\.png"):
            write_picture(tmp_path / "still.png", compose([clip()], 0, PANE))
        assert [path.name for path in tmp_path.iterdir()] == ["still.png"]
