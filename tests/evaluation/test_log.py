import dataclasses
import json

import pytest

from sqap.errors import InputError
from sqap.evaluation.log import EpisodeLog, Record, Settings
from sqap.evaluation.rollout import Episode

SETTINGS = Settings(env="metaworld", execute=None, workers=1, threads=2)


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
