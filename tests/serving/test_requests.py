"""What a robot may ask, in our keys and in openpi's, and what is said of anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sqap.errors import InputError
from sqap.serving.requests import read_request, write_request
from sqap.serving.settings import Limits, ServerSettings, read_key
from sqap.serving.wire import pack, unpack

IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
PLAIN = {"prompt": "open the drawer", "images": {"front": IMAGE}}


def read(**changes: object):
    message = {key: value for key, value in (PLAIN | changes).items() if value is not ...}
    return read_request(unpack(pack(message)), Limits())


def test_a_request_survives_the_way(observe):
    observation = observe(3)
    sent = write_request(observation, seed=7, reset=True, deadline_s=0.25)
    found = read_request(unpack(pack(sent)), Limits())
    assert (found.seed, found.reset, found.deadline_s) == (7, True, 0.25)
    assert found.observation.instruction == observation.instruction
    for name, image in observation.images.items():
        assert np.array_equal(found.observation.images[name], image)
        for matrix in ("intrinsics", "world_to_camera"):
            sent_camera, camera = observation.cameras[name], found.observation.cameras[name]
            assert np.array_equal(getattr(camera, matrix), getattr(sent_camera, matrix))
    assert np.array_equal(found.observation.end_effector, observation.end_effector)


def test_nothing_is_sent_that_is_not_there(observe):
    assert set(write_request(observe(calibrated=False))) == {"prompt", "images"}
    found = read()
    assert (found.seed, found.reset, found.deadline_s) == (None, False, None)
    assert found.observation.state is None


def test_openpis_flat_keys_are_read():
    found = read(
        images=..., **{"observation/image": IMAGE, "observation/wrist": IMAGE, "observation/state": [1, 2]}
    )
    assert sorted(found.observation.images) == ["image", "wrist"]
    assert found.observation.state is not None
    assert found.observation.state.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"promt": "x"}, "unknown key 'promt'; known keys: prompt, images"),
        ({"prompt": ...}, "has no prompt"),
        ({"prompt": 3}, "has no prompt"),
        ({"prompt": " "}, "instruction is empty"),
        ({"prompt": "x" * 1001}, "may have 1000 characters, got 1001"),
        ({"images": ...}, "needs at least one image"),
        ({"images": IMAGE}, "images must be a map from cameras to arrays, got ndarray"),
        ({"images": {"front": [1]}}, "image 'front' must be a uint8 array of shape"),
        ({"images": {"front": IMAGE / 255}}, "image 'front' must be a uint8 array .* got float64"),
        ({"images": {"front": IMAGE[0]}}, r"got shape \(4, 3\)"),
        ({"images": {"front": np.zeros((1, 2049, 3), np.uint8)}}, "up to 2048 pixels wide and high"),
        ({"observation/front": IMAGE}, "camera 'front' has two images"),
        ({"state": "x"}, "state must be an array or a list of numbers, got str"),
        ({"state": ["1"]}, "state must be an array or a list of numbers, got list"),
        ({"state": np.array([[1.0]])}, "state must be a vector"),
        ({"state": np.array([1, np.nan])}, r"state\[1\] is nan"),
        ({"state": [float("inf")]}, r"state\[0\] is inf"),
        ({"end_effector": [1.0, 2.0]}, "end_effector must be a vector of 3 numbers"),
        ({"cameras": [1]}, "cameras must be a map, got list"),
        ({"cameras": {"front": {"intrinsics": IMAGE}}}, "must be a map with intrinsics and world_to_camera"),
        ({"cameras": {"front": {"intrinsics": 1, "world_to_camera": 2}}}, "must be arrays"),
        (
            {"cameras": {"front": {"intrinsics": np.eye(2), "world_to_camera": np.eye(4)}}},
            "camera intrinsics must be a finite 3x3 matrix",
        ),
        (
            {"cameras": {"back": {"intrinsics": np.eye(3), "world_to_camera": np.eye(4)}}},
            "is given for 'back'",
        ),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"seed": 2**63}, "seed must be an integer from 0"),
        ({"seed": True}, "seed must be an integer from 0"),
        ({"seed": "x"}, "seed must be an integer from 0"),
        ({"reset": 1}, "reset must be true or false, got 1"),
        ({"deadline_ms": 0}, "deadline_ms must be a positive number"),
        ({"deadline_ms": float("nan")}, "deadline_ms must be a positive number"),
        ({"deadline_ms": "soon"}, "deadline_ms must be a positive number"),
    ],
)
def test_anything_else_is_one_sentence(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        read(**changes)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"host": "0.0.0.0"}, "give --api-key-file, or --without-key"),
        ({"host": "robot.example"}, "give --api-key-file, or --without-key"),
        ({"port": 65536}, "from 0 to 65535"),
        ({"key": "short"}, "at least 16 characters, got 5"),
        ({"ensemble": 0}, "ensemble must be positive"),
        ({"deadline_s": -1.0}, "deadline must be positive"),
    ],
)
def test_settings_that_let_strangers_in_or_make_no_sense_are_refused(settings, sentence):
    with pytest.raises(InputError, match=sentence):
        ServerSettings(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "::1"},
        {"host": "127.1.2.3"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "key": "k" * 16},
        {"host": "0.0.0.0", "without_key": True},
    ],
)
def test_loopback_a_key_or_being_told_so_is_enough(settings):
    ServerSettings(**settings)


def test_a_settings_key_is_not_shown():
    assert "k" * 16 not in repr(ServerSettings(key="k" * 16))


def test_limits_are_positive():
    with pytest.raises(InputError, match="limit of rate_hz must be positive, got 0"):
        Limits(rate_hz=0)


def test_a_key_is_read_from_a_file_that_others_cannot_read(tmp_path: Path):
    file = tmp_path / "key"
    file.write_text("0123456789abcdef\n")
    file.chmod(0o644)
    with pytest.raises(InputError, match=r"others than its owner may read .* chmod 600"):
        read_key(file)
    file.chmod(0o600)
    assert read_key(file) == "0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "at least 16"),
        ("a b" * 9, "one line without"),
        ("a\n" * 9, "one line"),
        ("é" * 20, "cannot read"),
    ],
)
def test_a_file_with_something_else_is_no_key(tmp_path: Path, text, sentence):
    file = tmp_path / "key"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(InputError, match=sentence):
        read_key(file)
    with pytest.raises(InputError, match="cannot read"):
        read_key(tmp_path / "nothing")


def test_tls_files_that_are_none_are_said(tmp_path: Path):
    with pytest.raises(InputError, match="cannot serve TLS with"):
        ServerSettings(tls=(tmp_path / "a", tmp_path / "b")).tls_context()
