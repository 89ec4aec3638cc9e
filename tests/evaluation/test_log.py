import dataclasses
import errno
import json
import os

import pytest

from sqap.errors import InputError
from sqap.evaluation.log import EpisodeLog, Record, log_name
from sqap.evaluation.rollout import Episode
from sqap.evaluation.settings import Settings

BUILD = {"sqap": "0.1.0", "package": "beef", "kernels": "avx2", "torch": "2.13.0"}
SETTINGS = Settings("metaworld", None, workers=1, threads=2, build=BUILD, simulator={"mujoco": "3.3.0"})


def record(seed, policy="aaaa", settings=SETTINGS):
    episode = Episode("door-open", seed, success=True, steps=40, jerk=1.5, latencies_ms=(30.0, 31.25))
    return Record(policy, settings, peak_rss_bytes=123 << 20, episode=episode)


def write(path, *records):
    policies = sorted({r.policy for r in records})
    with EpisodeLog(path, records[0].settings, policies) as log:
        for r in records:
            log.add(r)


def read(path, settings=SETTINGS, policies=("aaaa", "bbbb")):
    with EpisodeLog(path, settings, policies) as log:
        return log.finished


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "log.jsonl"


def test_round_trip_keeps_episodes_apart_by_policy_task_and_seed(path):
    records = [record(1), record(2), record(1, policy="bbbb")]
    write(path, *records)
    assert read(path) == {r.key: r for r in records}


def test_each_episode_is_on_disk_at_once(path):
    with EpisodeLog(path, SETTINGS, ["aaaa"]) as log:
        log.add(record(1))
        assert json.loads(path.read_text())["episode"]["seed"] == 1
        log.add(record(2))
        assert len(path.read_text().splitlines()) == 2


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with EpisodeLog(None, SETTINGS, ["aaaa"]) as log:
        log.add(record(1))
    assert list(log.finished) == [("aaaa", "door-open", 1)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", [1, 5, 40, -1])
def test_a_half_written_last_line_is_cut_off_and_rewritten(path, left):
    write(path, record(1), record(2))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[:first] + whole[first:][:left])
    assert set(read(path)) == {record(1).key}
    write(path, record(2))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", ["my precious notes", "a\nb", '{"policy": 3}', '{\n  "a": 1\n}\n'])
def test_a_file_that_is_no_log_is_refused_and_survives(path, content):
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(InputError, match=r"log\.jsonl:1"):
        read(path)
    assert path.read_text() == content


def test_a_spoiled_line_in_the_middle_is_refused(path):
    write(path, record(1), record(2))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0][:30], lines[1]]) + "\n")
    with pytest.raises(InputError, match=r"log\.jsonl:1 is not a line of an episode log"):
        read(path)


@pytest.mark.parametrize(
    ("field", "value"), [("env", "libero"), ("execute", 4), ("workers", 2), ("threads", 1), ("ensemble", 7)]
)
def test_a_log_of_other_settings_is_refused(path, field, value):
    write(path, record(1))
    changed = dataclasses.replace(SETTINGS, **{field: value})
    with pytest.raises(InputError, match=f"{field}={getattr(SETTINGS, field)}, now it is {value}"):
        read(path, settings=changed)


def test_a_log_from_before_there_were_ensembles_had_none(path):
    write(path, record(1))
    line = json.loads(path.read_text())
    del line["settings"]["ensemble"]
    path.write_text(json.dumps(line) + "\n")
    assert read(path) == {record(1).key: record(1)}
    with pytest.raises(InputError, match="ensemble=None, now it is 2"):
        read(path, settings=dataclasses.replace(SETTINGS, ensemble=2))


def test_a_log_of_another_policy_is_refused(path):
    write(path, record(1, policy="cccc"))
    with pytest.raises(InputError, match="policy cccc, which is not evaluated here"):
        read(path)


def test_a_directory_is_no_log(tmp_path):
    with pytest.raises(InputError, match=r"cannot use .* as an episode log"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("now", "sentence"),
    [
        ({"build": BUILD | {"package": "dead"}}, "with build.package=beef, now it is dead"),
        ({"build": BUILD | {"kernels": "portable"}}, "with build.kernels=avx2, now it is portable"),
        ({"build": BUILD | {"torch": "2.6.0"}}, "with build.torch=2.13.0, now it is 2.6.0"),
        ({"simulator": {"mujoco": "3.4.0"}}, "with simulator.mujoco=3.3.0, now it is 3.4.0"),
        ({"choices": {"unnorm_key": "b"}}, "with choices.unnorm_key=None, now it is b"),
    ],
)
def test_episodes_of_another_build_simulator_or_choice_are_refused(path, now, sentence):
    write(path, record(1))
    before = path.read_bytes()
    with pytest.raises(InputError, match=sentence):
        read(path, dataclasses.replace(SETTINGS, **now))
    assert path.read_bytes() == before


def test_a_log_from_before_builds_were_noted_is_refused(path):
    write(path, record(1))
    line = json.loads(path.read_text())
    for name in ("build", "simulator", "choices"):
        del line["settings"][name]
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="before logs noted the build"):
        read(path)


def test_the_name_of_a_log_says_what_must_be_equal():
    names = {
        log_name(settings, ["a" * 64, "b" * 64])
        for settings in (
            SETTINGS,
            dataclasses.replace(SETTINGS, build=BUILD | {"package": "dead"}),
            dataclasses.replace(SETTINGS, simulator={"mujoco": "3.4.0"}),
            dataclasses.replace(SETTINGS, threads=1),
        )
    }
    assert len(names) == 4
    assert log_name(SETTINGS, ["a" * 64, "b" * 64]) in names


def test_a_log_has_one_writer_at_a_time(path):
    with EpisodeLog(path, SETTINGS, ["aaaa"]) as log:
        log.add(record(1))
        with pytest.raises(InputError, match="another process is writing"):
            EpisodeLog(path, SETTINGS, ["aaaa"])
        log.add(record(2))
    assert {key[2] for key in read(path)} == {1, 2}


def test_an_episode_is_synchronized_and_a_full_disk_is_a_sentence(path, monkeypatch):
    synchronized = []
    monkeypatch.setattr(os, "fsync", lambda file: synchronized.append(os.fstat(file).st_size))
    with EpisodeLog(path, SETTINGS, ["aaaa"]) as log:
        log.add(record(1))
        assert synchronized[-1] == path.stat().st_size > 0

        def full(file, line):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(InputError, match="No space left on device; the same command goes on"):
                log.add(record(2))
        assert [key[2] for key in log.finished] == [1]
