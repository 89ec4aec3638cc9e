"""The page at ``/``: what it is told, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import connect

from sqap import Policy
from sqap.recipe import Pruning, Recipe
from sqap.serving import http, server
from sqap.serving.live import EPISODES, LATENCIES, PICTURE, Live
from tests.browser import Browser, find_chromium
from tests.serving.tools import KEY, ask, get, robot


@pytest.fixture
def pruned(policy) -> Policy:
    """Keeps half of the visual tokens, some of them around the gripper."""
    recipe = Recipe(pruning=Pruning(keep_ratio=0.5, after_layer=1, method="sqap"))
    return Policy(policy.model, policy.config, policy.tokenizer, recipe)


def event(running, path: str = "/events") -> dict:
    """The data of one server-sent event."""
    status, text = get(running, path)
    assert status == 200
    retry, data, *rest = text.split("\n")
    assert retry.startswith("retry: ")
    assert data.startswith("data: ")
    assert rest == ["", ""]
    return json.loads(data.removeprefix("data: "))


def test_an_event_has_robots_latencies_episodes_and_a_picture(start, pruned, observe):
    running = start(pruned)
    empty = event(running)
    assert (empty["robots"], empty["shown"], empty["latencies"]) == ([], None, [])
    with robot(running) as a, robot(running) as b:
        ask(a, observe(1))
        ask(a, observe(2), reset=True)
        ask(b, observe(3, instruction="close the drawer"))
        state = event(running)
        assert event(running, "/events?robot=c1")["shown"]["name"] == "c1"
        assert event(running, "/events?robot=nobody")["shown"]["name"] == "c2"
    assert [(r["name"], r["episode"], r["steps"]) for r in state["robots"]] == [("c1", 2, 1), ("c2", 1, 1)]
    assert [r["instruction"] for r in state["robots"]] == ["open the drawer", "close the drawer"]
    (episode,) = state["episodes"]
    assert (episode["robot"], episode["episode"], episode["steps"]) == ("c1", 1, 1)
    assert [latency["batch"] for latency in state["latencies"]] == [1, 1, 1]
    shown = state["shown"]
    assert (shown["name"], shown["kept"], shown["tokens"]) == ("c2", 8, 16)
    picture = Image.open(io.BytesIO(base64.b64decode(shown["image"].partition(",")[2])))
    assert picture.size == (PICTURE, PICTURE)
    dark = np.asarray(picture.convert("L")) < 60
    assert 0.3 < dark.mean() < 0.7, "half of the patches are dark"


def test_an_event_waits_for_what_is_new(start, observe, monkeypatch):
    monkeypatch.setattr(http, "EVENT_SECONDS", 0.3)
    running = start()
    with robot(running) as connection:
        ask(connection, observe())
        seen = event(running)["changes"]
        assert event(running, f"/events?seen={seen}")["changes"] == seen
        ask(connection, observe())
        assert event(running, f"/events?seen={seen}")["changes"] == seen + 1


def test_what_is_kept_for_the_page_does_not_grow(policy, observe):
    live, step = Live(policy), policy.step(observe())
    timing = {"queue_ms": 0.0, "infer_ms": 1.0, "total_ms": 1.0, "batch": 1.0}
    for i in range(2 * LATENCIES):
        live.connect(f"c{i}", "peer")
        live.acted(f"c{i}", False, observe(), step, timing)
        live.disconnect(f"c{i}")
        live.acted(f"c{i}", False, observe(), step, timing)  # its step ended after it was gone
    state = live.state()
    assert len(state["latencies"]) == LATENCIES
    assert len(state["episodes"]) == EPISODES
    assert state["robots"] == []


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (390, True)])
def test_a_browser_shows_it_without_a_complaint(start, pruned, observe, width, dark, tmp_path, monkeypatch):
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium")
    monkeypatch.setattr(server, "OPEN_SECONDS", 60)  # a busy machine is no complaint
    running = start(pruned, key=KEY)
    headers = {"Authorization": f"Api-Key {KEY}"}
    # What a robot says is text, whatever it says.
    with (
        connect(running.url, additional_headers=headers) as connection,
        Browser(program, width, dark=dark) as browser,
    ):
        connection.recv(5)
        ask(connection, observe(1, instruction="<img src=x onerror=alert(1)> open"))
        browser.open(running.url.replace("ws", "http") + "/", **headers)
        browser.wait_for("document.getElementById('status').textContent === 'ready'")
        browser.wait_for("document.getElementById('robots').rows.length === 1")
        ask(connection, observe(2, instruction="close the drawer"))
        browser.wait_for("document.getElementById('robots').textContent.includes('close the drawer')")
        ask(connection, observe(3), reset=True)
        browser.wait_for("document.getElementById('episodes').rows.length === 1")
        assert browser.evaluate("document.getElementById('image').naturalWidth") == PICTURE
        assert (
            browser.evaluate("document.getElementById('kept').textContent")
            == "c1 keeps 8 of 16 visual tokens"
        )
        assert browser.evaluate("document.querySelectorAll('#chart rect').length") == 6
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(19, 22, 27)" if dark else "rgb(246, 247, 249)")
        assert browser.problems == []
        browser.screenshot(tmp_path / "page.png")
    assert Image.open(tmp_path / "page.png").size[0] == width


def test_a_complaint_would_be_noticed(start):
    program = find_chromium()
    if program is None:
        pytest.skip("there is no Chromium")
    with Browser(program) as browser:
        browser.open(start().url.replace("ws", "http") + "/nothing")
        browser.evaluate("console.error('wrong')")
        browser.evaluate("0")
        assert any("wrong" in problem for problem in browser.problems)
        assert any("404" in problem for problem in browser.problems)
