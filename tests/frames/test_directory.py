"""A directory of images with instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from frame_samples import draw, identify
from PIL import Image

from sqap.errors import InputError
from sqap.frames import read_directory
from sqap.observation import hash_frames


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten images that show their number."""
    for i in range(10):
        Image.fromarray(draw(i)).save(tmp_path / f"{i:04d}.png")
    return tmp_path


def write(root: Path, *records: dict[str, Any] | str) -> None:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    (root / "metadata.jsonl").write_text("\n".join(lines))


def record(i: int, **changes: Any) -> dict[str, Any]:
    return {"file_name": f"{i:04d}.png", "instruction": f"task {i}"} | changes


def test_frames_come_in_the_order_of_the_list(root):
    write(root, *(record(i, state=[i, 0.5]) for i in (3, 1, 2)), "")
    frames = read_directory(root, ["front"], 10)
    assert [f.instruction for f in frames] == ["task 3", "task 1", "task 2"]
    assert [identify(f.images["front"]) for f in frames] == [3, 1, 2]
    np.testing.assert_array_equal([f.state for f in frames], [[3, 0.5], [1, 0.5], [2, 0.5]])
    assert list(frames[0].images) == ["front"]


def test_a_frame_needs_no_state(root):
    write(root, record(0))
    assert read_directory(root, ["front"], 1)[0].state is None


def test_a_subsample_is_spread_and_opens_no_other_image(root):
    write(root, *(record(i) for i in range(10)))
    for i in set(range(10)) - {1, 5, 8}:
        (root / f"{i:04d}.png").write_bytes(b"broken")
    frames = read_directory(root, ["front"], 3)
    assert [identify(f.images["front"]) for f in frames] == [1, 5, 8]


def test_several_cameras(root):
    (root / "wrist").mkdir()
    Image.fromarray(draw(77)).save(root / "wrist/0.webp", lossless=True)
    write(root, {"front_file_name": "0001.png", "wrist_file_name": "wrist/0.webp", "instruction": "go"})
    (frame,) = read_directory(root, ["front", "wrist"], 5)
    assert {name: identify(image) for name, image in frame.images.items()} == {"front": 1, "wrist": 77}
    (frame,) = read_directory(root, ["wrist"], 5)
    assert {name: identify(image) for name, image in frame.images.items()} == {"wrist": 77}


def test_reading_twice_gives_the_same_frames_and_progress_counts_them(root):
    write(root, *(record(i) for i in range(10)))
    seen: list[tuple[int, int]] = []
    first = read_directory(root, ["front"], 4, lambda done, total: seen.append((done, total)))
    assert hash_frames(first) == hash_frames(read_directory(root, ["front"], 4))
    assert hash_frames(first) != hash_frames(read_directory(root, ["front"], 3))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], r"metadata\.jsonl lists no frames"),
        (["", "  "], r"metadata\.jsonl lists no frames"),
        ([record(0), "{"], r"metadata\.jsonl, line 2 is not valid JSON"),
        (["[1]"], "line 1 must be a JSON object, got list"),
        ([record(0, instruction=" ")], "line 1 has no instruction; say under 'instruction'"),
        ([{"file_name": "0000.png"}], "line 1 has no instruction"),
        ([record(0, instruction=3)], "line 1 has no instruction"),
        (
            [{"instruction": "go"}],
            "camera 'front': it needs 'front_file_name' or 'file_name', and has neither",
        ),
        (
            [{"wrist_file_name": "0000.png", "instruction": "go"}],
            "camera 'front': it needs 'front_file_name' or 'file_name', and has 'wrist_file_name'",
        ),
        ([record(0, state=[0.0, float("nan")])], r"line 1: state\[1\] is nan; every entry must be finite"),
        ([record(0, state="left")], "line 1: state must be an array of numbers"),
        ([record(0, file_name="../0000.png")], "line 1: '../0000.png' is not the path of a file inside"),
        ([record(0, file_name="/etc/0000.png")], "is not the path of a file inside"),
        ([record(0, file_name=7)], "7 is not the path of a file inside"),
        ([record(0, file_name="none.png")], r"cannot read .*none\.png: No such file"),
        ([record(0, file_name="metadata.jsonl")], r"cannot read .*metadata\.jsonl: it is corrupt, or no PNG"),
    ],
)
def test_refusals_say_where_and_what(root, records, message):
    write(root, *records)
    with pytest.raises(InputError, match=message) as caught:
        read_directory(root, ["front"], 5)
    assert "\n" not in str(caught.value)


def test_one_image_is_no_answer_to_two_cameras(root):
    write(root, record(0))
    with pytest.raises(InputError, match="camera 'front': it needs 'front_file_name', and has 'file_name'"):
        read_directory(root, ["front", "wrist"], 5)


def test_a_directory_without_a_list_is_told_what_is_missing(root):
    with pytest.raises(InputError, match=r"no meta/info\.json.*has no metadata\.jsonl with a line such as"):
        read_directory(root, ["front"], 5)


def test_a_list_may_begin_with_a_byte_order_mark(root):
    write(root, record(3))
    path = root / "metadata.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert identify(read_directory(root, ["front"], 1)[0].images["front"]) == 3


READ = """
import sys
from pathlib import Path
from sqap.frames import read_directory
print(ascii(read_directory(Path(sys.argv[1]), ["front"], 1)[0].instruction))
"""


def test_a_list_is_utf_8_whatever_the_locale_says(root):
    line = json.dumps(record(0, instruction="öffne die Tür"), ensure_ascii=False)
    (root / "metadata.jsonl").write_text(line, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", READ, str(root)],
        env=os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == ascii("öffne die Tür") + "\n", done.stderr


def test_a_list_that_is_not_text_is_refused(root):
    (root / "metadata.jsonl").write_bytes(b'{"file_name": "\xff"}')
    with pytest.raises(InputError, match=r"must be UTF-8 text; byte 15 is not"):
        read_directory(root, ["front"], 5)
