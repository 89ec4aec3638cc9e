"""A LeRobotDataset v3, as LeRobot writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frame_samples import AV1, H264, identify, picture_number, write_dataset, write_video

from sqap.errors import InputError
from sqap.frames import read_dataset
from sqap.observation import hash_frames

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("av")

TOP, WRIST = "observation.images.top", "observation.images.wrist"
EPISODES = Path("meta/episodes/chunk-000/file-000.parquet")
DATA = Path("data/chunk-000/file-000.parquet")


def numbers(frames: list[Any], camera: str) -> list[int]:
    return [identify(frame.images[camera]) for frame in frames]


def edit(path: Path, **columns: Any) -> None:
    """Replace columns of a parquet file; None drops one."""
    table = pq.read_table(path)
    for name, values in columns.items():
        i = table.schema.get_field_index(name)
        table = table.remove_column(i) if values is None else table.set_column(i, name, pa.array(values))
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("cameras", "codec"),
    [
        ({TOP: "video", WRIST: "video"}, H264),
        ({TOP: "video", WRIST: "video"}, AV1),
        ({TOP: "image", WRIST: "image"}, H264),
        ({TOP: "video", WRIST: "image"}, H264),
    ],
    ids=["h264", "av1", "images", "mixed"],
)
def test_every_frame_comes_with_its_pictures_state_and_instruction(cameras, codec, tmp_path):
    root = write_dataset(tmp_path, cameras, lengths=(5, 8, 3), codec=codec)
    frames = read_dataset(root, ["top", "wrist"], 100)
    assert numbers(frames, "top") == [picture_number(0, i) for i in range(16)]
    assert numbers(frames, "wrist") == [picture_number(1, i) for i in range(16)]
    np.testing.assert_array_equal([f.state for f in frames], [[i, 0.5] for i in range(16)])
    assert [f.instruction for f in frames] == (
        ["open the drawer"] * 5 + ["close the drawer"] * 8 + ["open the drawer"] * 3
    )
    assert frames[0].images["top"].shape == (64, 64, 3)


@pytest.mark.parametrize("kind", ["video", "image"])
def test_a_subsample_is_spread_over_the_episodes_and_over_their_time(kind, tmp_path):
    root = write_dataset(tmp_path, {TOP: kind}, lengths=(10, 30, 20), per_file=2)
    frames = read_dataset(root, ["top"], 6)
    assert numbers(frames, "top") == [picture_number(0, i) for i in (2, 7, 11, 26, 47, 57)]
    assert [float(f.state[0]) for f in frames] == [2, 7, 11, 26, 47, 57]
    assert numbers(read_dataset(root, ["top"], 1), "top") == [picture_number(0, 13)]


def test_an_episode_shorter_than_its_share_leaves_the_rest_to_the_others(tmp_path):
    root = write_dataset(tmp_path, {TOP: "image"}, lengths=(1, 30, 2))
    frames = read_dataset(root, ["top"], 9)
    assert numbers(frames, "top") == [picture_number(0, i) for i in (0, 1, 6, 11, 16, 21, 26, 31, 32)]


def test_reading_twice_gives_the_same_frames_and_progress_counts_them(tmp_path):
    root = write_dataset(tmp_path, {TOP: "video", WRIST: "image"})
    seen: list[tuple[int, int]] = []
    first = read_dataset(root, ["top", "wrist"], 3, progress=lambda done, total: seen.append((done, total)))
    again = read_dataset(root, ["top", "wrist"], 3)
    assert hash_frames(first) == hash_frames(again)
    assert hash_frames(first) != hash_frames(read_dataset(root, ["top", "wrist"], 4))
    assert seen == [(0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (3, 3)]


def test_files_that_are_not_needed_are_not_opened(tmp_path):
    """One frame of the middle episode: the other episodes' files and the other camera may be broken."""
    root = write_dataset(tmp_path, {TOP: "video", WRIST: "video"}, lengths=(4, 4, 4), per_file=1)
    for broken in (0, 2):
        (root / f"data/chunk-000/file-{broken:03d}.parquet").write_bytes(b"")
        (root / f"videos/{TOP}/chunk-000/file-{broken:03d}.mp4").write_bytes(b"")
    (root / f"videos/{WRIST}/chunk-000/file-001.mp4").write_bytes(b"")
    assert numbers(read_dataset(root, ["top"], 1), "top") == [picture_number(0, 4)]


def test_the_names_of_cameras(tmp_path):
    root = write_dataset(tmp_path, {"observation.image": "image", TOP: "image"})
    by_name = read_dataset(root, ["observation.image"], 1)
    assert list(by_name[0].images) == ["observation.image"]
    mapped = read_dataset(root, ["front", "top"], 1, {"front": "observation.image"})
    assert set(mapped[0].images) == {"front", "top"}
    assert np.array_equal(mapped[0].images["front"], by_name[0].images["observation.image"])
    short = read_dataset(root, ["front"], 1, {"front": "top"})
    assert np.array_equal(short[0].images["front"], mapped[0].images["top"])
    both = read_dataset(root, ["left", "right"], 1, {"left": TOP, "right": TOP})
    assert np.array_equal(both[0].images["left"], both[0].images["right"])


def test_tasks_may_be_an_index_without_a_name(tmp_path):
    root = write_dataset(tmp_path, {TOP: "image"}, task_column="__index_level_0__")
    assert read_dataset(root, ["top"], 1)[0].instruction == "close the drawer"


def test_states_may_be_absent_or_a_single_number(tmp_path):
    without = write_dataset(tmp_path / "a", {TOP: "image"}, state=None)
    assert read_dataset(without, ["top"], 1)[0].state is None
    single = write_dataset(tmp_path / "b", {TOP: "image"}, state=float)
    assert read_dataset(single, ["top"], 1)[0].state.shape == (1,)


@pytest.mark.parametrize(
    ("cameras", "mapping", "message"),
    [
        (["front"], {}, f"no camera 'front', which the policy reads; its cameras are {TOP}, {WRIST}"),
        (["front"], {"front": "side"}, f"no camera 'side' to use as the policy's 'front'; .*{TOP}, {WRIST}"),
        (["top"], {"tip": TOP}, "the policy has no camera 'tip' to map; it reads top"),
        (["observation.state"], {}, "no camera 'observation.state'"),
    ],
)
def test_a_wrong_camera_is_answered_with_those_there_are(cameras, mapping, message, tmp_path):
    root = write_dataset(tmp_path, {TOP: "video", WRIST: "image"})
    with pytest.raises(InputError, match=message):
        read_dataset(root, cameras, 1, mapping)


@pytest.mark.parametrize(
    "mark",
    [
        {"info": {"is_depth_map": True}},
        {"info": {"video.is_depth_map": True}},
        {"video_info": {"video.is_depth_map": True}},
    ],
)
def test_a_depth_map_is_no_camera(mark, tmp_path):
    features = {TOP: {"dtype": "video", "info": {"is_depth_map": False}}, WRIST: {"dtype": "video", **mark}}
    root = write_dataset(tmp_path, {TOP: "video", WRIST: "video"}, info={"features": features})
    with pytest.raises(InputError, match=f"its cameras are {TOP}$"):
        read_dataset(root, ["wrist"], 1)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (
            {"codebase_version": "v2.1"},
            r"v2\.1, and v3\.0 is read .* scripts: to v3\.0 with .*v21_to_v30",
        ),
        (
            {"codebase_version": "v2.0"},
            r"v2\.0, .*: to v2\.1, .*v20_to_v21.*, then to v3\.0 .*v21_to_v30",
        ),
        ({"codebase_version": "v1.6"}, r"LeRobotDataset v1\.6, and v3\.0 is read here$"),
        ({"codebase_version": "v4.0"}, r"LeRobotDataset v4\.0, and v3\.0 is read here"),
        ({"codebase_version": None}, r"info\.json names no codebase_version"),
        ({"features": []}, r"info\.json must have features, an object of objects"),
        ({"features": {TOP: "video"}}, r"info\.json must have features, an object of objects"),
        ({"fps": 0}, "fps must be positive, got 0"),
        ({"fps": "10"}, "fps must be a number, got '10'"),
        ({"data_path": None}, "must have the templates data_path"),
        ({"data_path": "data/{file}.parquet"}, "'data/{file}.parquet' is no template of a path"),
        ({"video_path": "{video_key}/{file_index.x}.mp4"}, "is no template of a path"),
        ({"data_path": "/etc/{file_index}"}, "'/etc/0' is not the path of a file inside"),
        (
            {"video_path": "a/../../{file_index}.mp4"},
            r"'a/\.\./\.\./0\.mp4' is not the path of a file inside",
        ),
        ({"video_path": None}, "with videos, video_path"),
    ],
)
def test_a_malformed_info_is_refused(info, message, tmp_path):
    root = write_dataset(tmp_path, {TOP: "video"}, info=info)
    with pytest.raises(InputError, match=message) as caught:
        read_dataset(root, ["top"], 1)
    assert "\n" not in str(caught.value)


def test_an_info_that_is_not_json_is_refused(tmp_path):
    root = write_dataset(tmp_path, {TOP: "video"})
    (root / "meta/info.json").write_text("{")
    with pytest.raises(InputError, match=r"info\.json is not valid JSON"):
        read_dataset(root, ["top"], 1)
    (root / "meta/info.json").write_text("[]")
    with pytest.raises(InputError, match="names no codebase_version"):
        read_dataset(root, ["top"], 1)


def test_the_state_may_be_called_otherwise(tmp_path):
    root = write_dataset(tmp_path, {TOP: "image"}, state_key="state")
    assert read_dataset(root, ["top"], 1)[0].state is None
    (frame,) = read_dataset(root, ["top"], 1, state="state")
    assert frame.state[1] == 0.5
    message = r"no state 'observation\.state', which the policy reads; .* columns of numbers are state$"
    with pytest.raises(InputError, match=message):
        read_dataset(root, ["top"], 1, reads_state=True)
    for name in ("proprio", TOP, "timestamp"):
        with pytest.raises(InputError, match=f"has no state '{name}'; .* are state$"):
            read_dataset(root, ["top"], 1, state=name)


def test_a_state_has_its_short_name_as_a_camera_has(tmp_path):
    root = write_dataset(tmp_path, {TOP: "image"}, state_key="observation.joints")
    (frame,) = read_dataset(root, ["top"], 1, state="joints")
    assert frame.state[1] == 0.5


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_a_dataset_without_frames_is_refused(lengths, tmp_path):
    root = write_dataset(tmp_path, {TOP: "image"}, lengths=lengths)
    with pytest.raises(InputError, match="holds no frames"):
        read_dataset(root, ["top"], 1)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            lambda i: [0.0, float("nan")],
            r"frame 2 of episode 0: state\[1\] is nan; every entry must be finite",
        ),
        (lambda i: float("inf"), r"frame 2 of episode 0: state\[0\] is inf"),
    ],
)
def test_a_state_that_is_not_finite_is_refused(state, message, tmp_path):
    root = write_dataset(tmp_path, {TOP: "image"}, lengths=(5,), state=state)
    with pytest.raises(InputError, match=message):
        read_dataset(root, ["top"], 1)


def test_a_missing_instruction_is_refused(tmp_path):
    root = write_dataset(tmp_path / "a", {TOP: "image"}, lengths=(5,), tasks=(" ",))
    with pytest.raises(InputError, match="frame 2 of episode 0: the instruction is empty"):
        read_dataset(root, ["top"], 1)
    root = write_dataset(tmp_path / "b", {TOP: "image"}, lengths=(5,))
    edit(root / "meta/tasks.parquet", task_index=[7, 8])
    with pytest.raises(InputError, match=r"frame 2 of episode 0, has no instruction: .*has no task 0"):
        read_dataset(root, ["top"], 1)
    edit(root / "meta/tasks.parquet", task=None)
    with pytest.raises(InputError, match=r"tasks\.parquet has no column 'task'"):
        read_dataset(root, ["top"], 1)


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_a_corrupt_image_is_refused(content, tmp_path):
    root = write_dataset(tmp_path, {TOP: "image"}, lengths=(5,))
    edit(root / DATA, **{TOP: [{"bytes": content, "path": "x.png"}] * 5})
    with pytest.raises(InputError, match=rf"cannot read {TOP} in frame 2 of episode 0 of .*it is corrupt"):
        read_dataset(root, ["top"], 1)


def test_pictures_that_are_not_images_are_refused(tmp_path):
    root = write_dataset(tmp_path, {TOP: "image"}, lengths=(5,))
    edit(root / DATA, **{TOP: ["x.png"] * 5})
    with pytest.raises(InputError, match=rf"cannot read {TOP} in frame 2 of episode 0 of .*it is corrupt"):
        read_dataset(root, ["top"], 1)


@pytest.mark.parametrize("file", [EPISODES, DATA, Path("meta/tasks.parquet")])
def test_an_unreadable_or_missing_parquet_file_is_named(file, tmp_path):
    root = write_dataset(tmp_path, {TOP: "image"})
    (root / file).write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match=f"cannot read .*{file}, which should be parquet"):
        read_dataset(root, ["top"], 1)
    (root / file).unlink()
    with pytest.raises(InputError, match=f"{file} is missing|holds no frames"):
        read_dataset(root, ["top"], 1)


def test_a_video_shorter_than_its_metadata_says_is_refused(tmp_path):
    root = write_dataset(tmp_path, {TOP: "video"}, lengths=(20,))
    write_video(root / f"videos/{TOP}/chunk-000/file-000.mp4", range(5))
    with pytest.raises(InputError, match=r"file-000\.mp4 has no frame at 1\.000 s.*nearest is at 0\.400 s"):
        read_dataset(root, ["top"], 1)


def test_rows_that_are_not_where_the_metadata_says_are_refused(tmp_path):
    root = write_dataset(tmp_path / "a", {TOP: "image"}, lengths=(5,))
    edit(root / DATA, index=range(100, 105))
    with pytest.raises(InputError, match=r"does not hold frame 2 of episode 0 at index 2, where meta/ep"):
        read_dataset(root, ["top"], 1)
    root = write_dataset(tmp_path / "b", {TOP: "image"}, lengths=(5,))
    edit(root / DATA, episode_index=[3] * 5)
    with pytest.raises(InputError, match="does not hold frame 2 of episode 0 at index 2"):
        read_dataset(root, ["top"], 1)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"length": None}, "has no column 'length'"),
        ({"length": ["a"]}, "length must be a number, got 'a'"),
        ({"data/file_index": [None]}, "data/file_index must be a number, got None"),
        ({f"videos/{TOP}/from_timestamp": [float("nan")]}, "from_timestamp must be a number, got nan"),
    ],
)
def test_malformed_episodes_are_refused(columns, message, tmp_path):
    root = write_dataset(tmp_path, {TOP: "video"}, lengths=(5,))
    edit(root / EPISODES, **columns)
    with pytest.raises(InputError, match=message):
        read_dataset(root, ["top"], 1)


def test_whole_numbers_written_as_floats_are_taken(tmp_path):
    """As pandas writes them after a join that left gaps."""
    root = write_dataset(tmp_path, {TOP: "video"}, lengths=(5,))
    edit(root / EPISODES, **{f"videos/{TOP}/chunk_index": [0.0], "data/chunk_index": [0.0]})
    assert len(read_dataset(root, ["top"], 2)) == 2


def test_the_layout_is_the_one_that_lerobot_writes(tmp_path):
    """The fixture itself: the file names and columns of LeRobot's own writer, which wrote the list below."""
    root = write_dataset(tmp_path, {TOP: "video"}, lengths=(3, 3, 3))
    files = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    assert files == [
        "data/chunk-000/file-000.parquet",
        "data/chunk-000/file-001.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
        "meta/tasks.parquet",
        f"videos/{TOP}/chunk-000/file-000.mp4",
        f"videos/{TOP}/chunk-000/file-001.mp4",
    ]
    columns = set(pq.read_schema(root / EPISODES).names)
    assert {"dataset_from_index", "data/chunk_index", f"videos/{TOP}/from_timestamp"} < columns
    assert json.loads((root / "meta/info.json").read_text())["codebase_version"] == "v3.0"
