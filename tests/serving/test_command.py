"""``sqap serve``, as a process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import sqap
from sqap.cli import app
from sqap.serving import PolicyClient
from tests.serving.tools import KEY, serving


def test_a_served_policy_acts_and_leaves_when_told(saved: Path, observe, tmp_path: Path):
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    options = ("--port", 0, "--api-key-file", key, "--log-requests", "--threads", 1)
    with serving(saved, *options) as (process, url):
        with PolicyClient(url, None, api_key=KEY) as client:
            assert client.metadata()["threads"] == 1
            actions = client.infer(observe(), seed=3).actions
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=20)
        assert process.returncode == 0
    assert np.array_equal(actions, sqap.load(saved).act(observe(), seed=3))
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    events = [line["event"] for line in lines]
    assert [e for e in events if e in ("warm", "listening", "connected", "acted", "draining", "stopped")] == [
        "warm", "listening", "connected", "acted", "draining", "stopped"
    ]  # fmt: skip
    assert KEY not in log
    assert "leaked" not in log  # what the native extension says of objects that are never freed
    (acted,) = [line for line in lines if line["event"] == "acted"]
    assert acted["request"] == "c1-1"
    assert acted["timing"]["infer_ms"] > 0
    assert {"time", "level"} <= set(acted)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--host", "0.0.0.0"], "would need no key: give --api-key-file, or --without-key"),
        (["--api-key-file", "/nowhere/key"], "cannot read the API key in /nowhere/key"),
        (["--tls-cert", "cert.pem"], "TLS needs both files: --tls-cert and --tls-key"),
        (["--tls-cert", "/nowhere/c", "--tls-key", "/nowhere/k"], "cannot serve TLS with /nowhere/c"),
        (["--ensemble", "9", "--port", "0"], "an ensemble can be of up to 8 chunks"),
        (["--rate-hz", "0"], "the limit of rate_hz must be positive"),
        (["--ray", "--threads", "2"], "--threads: a replica has as many as cores; give --cores instead"),
    ],
)
@pytest.mark.usefixtures("usual_log")
def test_a_mistake_is_one_sentence(saved: Path, options, sentence):
    result = CliRunner().invoke(app, ["serve", str(saved), *options])
    assert result.exit_code == 1
    assert sentence in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_without_the_extra_everything_else_works_and_one_sentence_says_what_to_install():
    code = """
import sys
for name in ("websockets", "msgpack", "prometheus_client"):
    sys.modules[name] = None
import sqap
from sqap.cli import app
app(["serve", "reference"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert 'pip install "sqap[serve]"' in done.stderr
    assert len(done.stderr.splitlines()) == 1
