"""The main job from end to end, with fewer episodes."""

import json

import pytest
from typer.testing import CliRunner

from sqap import demo
from sqap.cli import app
from sqap.report.study.page import read_study
from tests.browser import Browser, find_chromium

pytest.importorskip("metaworld")


def test_the_demo_prints_a_table_and_leaves_a_page_and_a_video(tmp_path, monkeypatch):
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
        "comparison.mp4", "comparison.png", "episodes.jsonl", "policy", "report", "report.json", "study.json",
    }  # fmt: skip
    check_study(read_study(tmp_path / "demo"), report)
    page = tmp_path / "demo" / "report" / "index.html"
    assert str(page) in result.stdout.replace("\n", "")
    check_page(page)


def check_study(study, report):
    assert study["complete"]
    assert study["notes"] == []
    original, small = study["cells"]
    for cell, summary in ((original, report["against"]), (small, report)):
        assert cell["weight_bytes"] == summary["weight_bytes"]
        assert cell["visual_tokens"] == summary["visual_tokens"]
        assert cell["summary"]["success"] == summary["success"]
        assert cell["summary"]["step_latency_ms"] == summary["step_latency_ms"]
    assert small["recipe"] == report["recipe"]
    assert small["against_baseline"]["difference"] == report["against"]["difference"]
    assert small["artefact"] == "policy"
    assert small["commands"] == [
        "sqap eval policy --env metaworld --tasks drawer-close --episodes 1 --seed 1000000 --workers 1"
    ]


def check_page(page):
    text = page.read_text()
    assert "replayed" not in text  # nothing was
    assert text.count("data:video/mp4;base64,") == text.count("data:image/png;base64,") == 1
    program = find_chromium()
    if program is None:
        return
    with Browser(program) as browser:
        browser.open(page.as_uri())
        browser.wait_for("document.readyState === 'complete' && document.images.length === 1", 60)
        assert browser.evaluate("document.images[0].naturalWidth") > 0
        browser.wait_for("document.querySelector('video').videoWidth > 0", 60)
        assert browser.evaluate("document.querySelectorAll('svg.chart').length") == 1
        assert browser.problems == []
