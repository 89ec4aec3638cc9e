"""The page of a study: its charts' geometry, what it says, and what a browser makes of it."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import sqap
from sqap.cli import app
from sqap.errors import InputError
from sqap.evaluation.rollout import Episode
from sqap.observation import Observation
from sqap.report.clips import Clip, Frame
from sqap.report.study import Media, Picture, media, record, write_page
from sqap.report.study.chart import Legend, frontier, interactions, pareto, prediction
from sqap.report.study.page import findings, read_study, render
from tests.browser import Browser, find_chromium

EXAMPLE = Path(__file__).parent.parent / "study" / "example.json"


@pytest.fixture
def study() -> dict[str, Any]:
    return json.loads(EXAMPLE.read_text())


def cell(study: dict[str, Any], name: str) -> dict[str, Any]:
    return next(cell for cell in study["cells"] if cell["name"] == name)


def png() -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (32, 16), "red").save(out, "PNG")
    return out.getvalue()


def set_outcome(cell: dict[str, Any], success: float, p50: float) -> None:
    cell["summary"]["success"] = success
    cell["summary"]["step_latency_ms"]["p50"] = p50


def test_the_frontier_has_what_no_faster_cell_equals(study):
    outcomes = {"16": (0.9, 30), "16+lookahead-0.25": (0.95, 25), "16+random-0.25": (0.7, 26),
                "w4a8": (0.8, 12), "w4a8+lookahead-0.25": (0.8, 9), "w4a8+random-0.25": (0.6, 9)}  # fmt: skip
    for name, outcome in outcomes.items():
        set_outcome(cell(study, name), *outcome)
    assert [c["name"] for c in frontier(study["cells"])] == ["w4a8+lookahead-0.25", "16+lookahead-0.25"]


def test_marks_are_where_their_numbers_are(study):
    chart = pareto(study, Legend.of(study))
    at = {tick.label: tick.at for tick in chart.x_ticks}
    up = {tick.label: tick.at for tick in chart.y_ticks}
    for one in study["cells"]:
        mark = next(mark for mark in chart.marks if mark.link == one["name"])
        summary, (low, high) = one["summary"], one["summary"]["success_ci95"]
        assert mark.x == pytest.approx(
            at["0"] + summary["step_latency_ms"]["p50"] / 10 * (at["10"] - at["0"])
        )
        for place, share in ((mark.y, summary["success"]), (mark.low, low), (mark.high, high)):
            assert place == pytest.approx(up["100"] + (1 - share) / 0.2 * (up["80"] - up["100"]))
        assert chart.left <= mark.x <= chart.width - chart.right
        assert chart.top <= mark.high <= mark.y <= mark.low <= chart.height - chart.bottom


def test_a_line_of_an_interaction_goes_from_unpruned_to_fewer_tokens(study):
    charts = interactions(study, Legend.of(study))
    assert [chart.title for chart in charts] == ["lookahead", "random"]
    (first, _) = charts
    assert [mark.link for mark in first.marks] == ["16", "16+lookahead-0.25", "w4a8", "w4a8+lookahead-0.25"]
    assert [line.colour for line in first.lines] == [0, 1]
    xs = [mark.x for mark in first.marks]
    assert xs[0] < xs[2] < xs[1] < xs[3]  # beside each other at each share


def test_charts_that_would_show_nothing_are_left_out(study):
    for one in study["cells"]:
        one["replay"] = None
    assert prediction(study, Legend.of(study)) is None
    study["cells"] = [cell(study, "16"), cell(study, "w4a8+random-0.25")]  # no line joins two points
    assert interactions(study, Legend.of(study)) == []
    study["cells"] = [cell(study, "16")]
    assert interactions(study, Legend.of(study)) == []
    for one in study["cells"]:
        one["summary"]["step_latency_ms"] = None
    assert pareto(study, Legend.of(study)) is None
    assert "Success against latency" not in render(study)


def test_findings_follow_from_the_numbers(study):
    first, worse, safe, interaction = findings(study)
    assert first == "16, the baseline, succeeds in 12 of 12 episodes (100.0 %, 80.0 to 100.0)."
    assert worse.startswith("0 of 5 other cells succeed significantly less often")
    assert safe == "Of no cell can a loss of 5 points be excluded with 95 % confidence."
    assert interaction == "0 of 2 interactions of quantization with pruning are significant."

    cell(study, "w4a8+random-0.25")["against_baseline"].update(mcnemar_p_holm=0.01)
    cell(study, "16+random-0.25")["against_baseline"].update(mcnemar_p_holm=0.01, difference=0.2)  # better
    for name, low in (("w4a8", -0.02), ("16+lookahead-0.25", -0.01)):
        cell(study, name)["against_baseline"].update(difference=0.01, ci95=[low, 0.05])
    study["contrasts"][1].update(p_holm=0.001)
    _, worse, safe, interaction = findings(study)
    assert worse.startswith("1 of 5 ")
    assert safe == (
        "Of 2 cells a loss of 5 points can be excluded with 95 % confidence. The fastest of them is w4a8: "
        "+1.0 points (\N{MINUS SIGN}2.0 to +5.0), 2.60 MB of weights, 12.0 ms a step against 30.0 ms."
    )
    assert interaction == (
        "1 of 2 interactions of quantization with pruning are significant: "
        "bits: w4a8 minus 16, under lookahead minus unpruned: +8.0 points."
    )


def test_of_two_cells_the_other_one_is_told_of(study):
    study["cells"] = [cell(study, "16"), cell(study, "w4a8")]
    other, summary = study["cells"][1]["against_baseline"], study["cells"][1]["summary"]
    other.update(difference=-0.1, ci95=[-0.2, 0.01], wins=1, losses=5, mcnemar_p_holm=0.2)
    minus = "\N{MINUS SIGN}"
    assert findings(study)[1] == (
        f"w4a8: {minus}10.0 points ({minus}20.0 to +1.0), 2.60 MB of weights, 12.0 ms a step against "
        "30.0 ms. Pairs won : lost are 1 : 5, no significant loss (exact McNemar test, 0.05)."
    )
    other["mcnemar_p_holm"] = 0.01
    assert "1 : 5, a significant loss" in findings(study)[1]
    summary["step_latency_ms"]["p50"] = None  # every episode failed
    assert "2.60 MB of weights. Pairs" in findings(study)[1]


def test_of_few_cells_all_are_named_in_the_chart(study):
    set_outcome(cell(study, "w4a8"), 0.8, 40)  # slower and worse, so that the frontier has one cell
    study["cells"] = [cell(study, "16"), cell(study, "w4a8")]
    assert [mark.label for mark in pareto(study, Legend.of(study)).marks] == ["16", "w4a8"]


def test_what_has_not_run_is_named(study):
    study["complete"] = False
    cell(study, "w4a8")["summary"] = None
    page = render(study)
    assert "no episode has run of w4a8" in page
    cell(study, "16")["summary"] = None
    assert findings(study) == ["The baseline has not run yet."]
    render(study)


def test_it_says_how_many_pairs_a_change_takes(study):
    assert "695 pairs for 3.0 points" in " ".join(render(study).split())


def test_names_and_reasons_are_text(study):
    hostile = "<script>alert(1)</script>"
    study["policy"]["source"] = hostile
    cell(study, "w4a8")["summary"].update(
        failed=1, failures=[{"task": "reach", "seed": 3, "reason": hostile}]
    )
    page = render(study)
    assert hostile not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 3
    assert "w4a8, reach, seed 3" in page


def test_nothing_is_fetched(study):
    page = render(study, Media((Picture(png(), "a picture"),), ()))
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", page)
    assert "url(" not in page
    assert "@import" not in page


@pytest.mark.parametrize(
    ("data", "says"),
    [({"format": "other"}, "this is no study"), ([], "this is no study"),
     ({"format": "sqap-study", "version": 2}, "of version 1, this one is of 2")],
)  # fmt: skip
def test_other_files_are_refused(data, says, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=says):
        read_study(tmp_path)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert says in " ".join(result.output.split())
    assert not (tmp_path / "report").exists()


def test_the_command_writes_the_page(study, tmp_path):
    (tmp_path / "study.json").write_text(json.dumps(study))
    arguments = ["report", str(tmp_path), "--videos", "0", "--json", str(tmp_path / "r.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "16, the baseline, succeeds in 12 of 12 episodes" in " ".join(result.output.split())
    assert (tmp_path / "report" / "index.html").read_text() == render(study)
    assert json.loads((tmp_path / "r.json").read_text())["findings"] == findings(study)


def test_the_baseline_and_the_best_are_recorded_side_by_side(study, tmp_path, monkeypatch):
    pytest.importorskip("imageio_ffmpeg")
    set_outcome(cell(study, "w4a8+lookahead-0.25"), 0.9, 9)
    set_outcome(cell(study, "w4a8+random-0.25"), 0.6, 8)
    loaded: list[object] = []
    frame = Frame(Observation({"camera": np.full((16, 16, 3), 90, np.uint8)}, "open the drawer"), None, 0)

    def compare(policies, env, tasks, seed, progress):
        assert (env, seed) == ("metaworld", study["seeds"]["first"])
        clip = Clip("", None, 40.0, (frame,), Episode(tasks[0], seed, True, 0, 0.0, ()))
        return [[clip for _ in tasks] for _ in policies]

    monkeypatch.setattr(sqap, "load", lambda source, **_: loaded.append(source))
    monkeypatch.setattr(media, "record_comparison", compare)
    found = record(study, tmp_path, ["drawer-open"])
    others = [tmp_path / cell(study, name)["artefact"] for name in ("w4a8", "w4a8+random-0.25")]
    assert loaded == ["reference", *others]  # the most successful of the frontier, and the fastest
    assert Image.open(io.BytesIO(found.pictures[0].png)).size[0] > 3 * media.PANE
    assert found.videos[0].mp4[4:8] == b"ftyp"
    assert found.videos[0].caption.startswith("drawer-open, seed ")


@pytest.mark.parametrize(("width", "dark", "scripts"), [(1100, False, True), (390, True, False)])
def test_a_browser_shows_it_without_a_complaint(study, tmp_path, width, dark, scripts):
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium")
    write_page(study, tmp_path / "index.html", Media((Picture(png(), "a picture"),)))
    with Browser(program, width, dark=dark) as browser:
        browser.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        browser.open((tmp_path / "index.html").as_uri())
        browser.wait_for("document.readyState === 'complete' && document.images.length === 1")
        assert browser.evaluate("document.images[0].naturalWidth") == 32
        assert browser.evaluate("document.querySelectorAll('svg.chart').length") == 4
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(19, 22, 27)" if dark else "rgb(246, 247, 249)")
        names = "[...document.querySelectorAll('table.sortable tbody')[0].rows].map(r => r.id).join()"
        as_written = ",".join(c["name"] for c in study["cells"])
        assert browser.evaluate(names) == as_written
        if scripts:
            browser.evaluate("document.querySelectorAll('table.sortable th button')[8].click()")
            ms = {c["name"]: c["summary"]["step_latency_ms"]["p50"] for c in study["cells"]}
            assert browser.evaluate(names) == ",".join(sorted(ms, key=ms.get, reverse=True))
            browser.evaluate("document.querySelectorAll('table.sortable th button')[8].click()")
            assert browser.evaluate(names) == ",".join(sorted(ms, key=ms.get))
        assert browser.problems == []


def test_a_page_is_written_whole_or_not_at_all(study, tmp_path, monkeypatch):
    path = tmp_path / "index.html"
    path.write_text("before")
    broken = copy.deepcopy(study)
    del broken["cells"][0]["weight_bytes"]
    with pytest.raises(Exception, match="weight_bytes"):
        write_page(broken, path)
    assert path.read_text() == "before"
