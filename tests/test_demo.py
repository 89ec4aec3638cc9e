"""The main job from end to end, with fewer episodes."""

import json

import pytest
from typer.testing import CliRunner

from sqap import demo
from sqap.cli import app

pytest.importorskip("metaworld")


def test_the_demo_prints_a_table_and_leaves_a_report_and_a_video(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "TASKS", ("drawer-close",))
    monkeypatch.setattr(demo, "VIDEO_TASKS", ("drawer-close",))
    monkeypatch.setattr(demo, "FRAMES", 2)
    arguments = [
        "demo",
        "--out",
        str(tmp_path / "demo"),
        "--episodes",
        "1",
        "--json",
        str(tmp_path / "r.json"),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "drawer-close" in result.stdout
    for work in ("calibration frames: 2 of 2", "quantizing: 100 %", "episodes: 2 of 2", "video: 1 of 1"):
        assert work in result.stderr
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    assert report == json.loads((tmp_path / "r.json").read_text())
    assert report["visual_tokens"] == 102
    assert report["weight_bytes"] < report["against"]["weight_bytes"]
    assert report["against"]["visual_tokens"] == 256
    assert "beside `reference`" in (tmp_path / "demo" / "policy" / "README.md").read_text()
    assert {p.name for p in (tmp_path / "demo").iterdir()} == {
        "comparison.mp4", "comparison.png", "episodes.jsonl", "policy", "report.json",
    }  # fmt: skip
