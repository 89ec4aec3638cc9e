"""Single frames out of videos: the same that decoding from the start shows."""

import numpy as np
import pytest
from frame_samples import AV1, H264, identify, write_video

from sqap.errors import InputError
from sqap.frames.video import frames_at

av = pytest.importorskip("av")


@pytest.mark.parametrize("codec", [H264, AV1], ids=["h264 with B-frames", "av1"])
@pytest.mark.parametrize("fps", [10, 30])
def test_any_order_of_times_gives_the_frames_of_a_sequential_read(codec, fps, tmp_path):
    path = write_video(tmp_path / "v.mp4", range(40), fps, codec)
    with av.open(str(path)) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    order = np.random.default_rng(0).permutation(40).tolist()
    for i, image in zip(order, frames_at(path, [i / fps for i in order], fps), strict=True):
        assert identify(image) == i
        assert np.array_equal(image, whole[i])


def test_a_time_just_beside_a_frame_is_that_frame(tmp_path):
    path = write_video(tmp_path / "v.mp4", range(20), 10)
    times = [0.70001, 0.69999, 0.74, 0.66, 1.9001]
    assert [identify(image) for image in frames_at(path, times, 10)] == [7, 7, 7, 7, 19]


def test_a_video_that_is_too_short_says_so(tmp_path):
    path = write_video(tmp_path / "v.mp4", range(20), 10)
    with pytest.raises(InputError, match=r"no frame at 2\.000 s.*nearest is at 1\.900 s.*cut short"):
        list(frames_at(path, [0.3, 2.0], 10))


def test_frames_come_one_at_a_time(tmp_path):
    path = write_video(tmp_path / "v.mp4", range(5), 10)
    frames = frames_at(path, [0.3, 99.0], 10)
    assert identify(next(frames)) == 3
    with pytest.raises(InputError, match=r"no frame at 99\.000 s"):
        next(frames)


def test_only_the_stretch_from_the_key_frame_before_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", range(100), 10, AV1)  # a key frame every second frame
    (nearest,) = frames_at(path, [9.0], 10)
    whole = path.read_bytes()
    # The first half of the media is gone: what a read from the start would stumble over.
    start = whole.index(b"mdat") + 8
    path.write_bytes(
        whole[:start] + bytes((len(whole) - start) // 2) + whole[start + (len(whole) - start) // 2 :]
    )
    (again,) = frames_at(path, [9.0], 10)
    assert identify(nearest) == 90
    assert np.array_equal(nearest, again)


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "v.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match=r"cannot decode .*v\.mp4: Invalid data"):
        list(frames_at(tmp_path / "v.mp4", [0.0], 10))
    with pytest.raises(InputError, match=r"missing\.mp4 is missing"):
        list(frames_at(tmp_path / "missing.mp4", [0.0], 10))


def test_a_truncated_file_is_refused(tmp_path):
    path = write_video(tmp_path / "v.mp4", range(20), 10)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"cannot decode .*v\.mp4"):
        list(frames_at(path, [0.0], 10))


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", 44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(InputError, match=r"a\.mp4 holds no video"):
        list(frames_at(tmp_path / "a.mp4", [0.0], 10))
