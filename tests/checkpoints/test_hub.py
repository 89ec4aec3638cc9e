"""Downloads: against a hub of our own on this machine, against none, and against one that fails oddly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from sqap.checkpoints import hub
from sqap.errors import CheckpointError

COMMIT = "a" * 40
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "checkpoints/latest.pt": b"pickle",
    "modeling_openvla.py": b"raise SystemExit",
    "modeling_prismatic.py": b"from prismatic.vla.constants import NUM_ACTIONS_CHUNK",
    "lora_adapter/adapter_model.safetensors": b"adapter",
    "README.md": b"words",
}
# What the hub itself answers, by repository: a status and a code in a header.
REFUSALS = {"gone": (404, "RepoNotFound"), "gated": (403, "GatedRepo"), "down": (500, "")}
# Runs in a process of its own, because the hub's client reads its address once, when it is imported. Tries
# every name, waits for a word, tries every name again.
CLIENT = """
import json, sys
from sqap.checkpoints.hub import download
from sqap.errors import CheckpointError

def attempt(name):
    try:
        snapshot = download(name)
        return [str(snapshot.directory), snapshot.commit]
    except CheckpointError as error:
        return str(error)

for _ in range(2):
    print(json.dumps({name: attempt(name) for name in sys.argv[1:]}), flush=True)
    sys.stdin.readline()
"""


class Hub(BaseHTTPRequestHandler):
    """Answers as huggingface.co does, for ``org/policy`` and for what is refused."""

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        repository = path.removeprefix("/api/models").split("/")[2]
        if repository in REFUSALS:
            self.reply(b"{}", *REFUSALS[repository])
        elif path in ("/api/models/org/policy/revision/main", "/api/models/org/policy/revision/v1.0"):
            self.reply(json.dumps({"id": "org/policy", "sha": COMMIT, "siblings": []}).encode())
        elif path == f"/api/models/org/policy/tree/{COMMIT}":
            tree = [{"type": "file", "path": p, "size": len(b), "oid": p} for p, b in FILES.items()]
            self.reply(json.dumps(tree).encode())
        elif path.startswith(f"/org/policy/resolve/{COMMIT}/"):
            self.reply(FILES[path.split("/", 5)[5]])
        else:
            self.reply(b"{}", 404, "RevisionNotFound")

    def reply(self, body: bytes, status: int = 200, code: str = "") -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "ETag": f'"{len(body)}"', "X-Repo-Commit": COMMIT}
        for name, value in (headers | ({"X-Error-Code": code} if code else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What came of each name at a hub on this machine, and what after that was gone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    environment |= {"HF_HOME": str(tmp_path_factory.mktemp("hub")), "NO_PROXY": "127.0.0.1"}
    names = ["org/policy", "org/policy@v1.0", "org/policy@v2", *(f"org/{name}" for name in REFUSALS)]
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT, *names],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stdin is not None
        assert client.stdout is not None
        with_hub = json.loads(client.stdout.readline())
        server.shutdown()
        server.server_close()
        client.stdin.write("\n")
        client.stdin.flush()
        without = json.loads(client.stdout.readline())
    return with_hub, without


@pytest.mark.parametrize("name", ["org/policy", "org/policy@v1.0"])
def test_what_is_needed_arrives_and_is_pinned_to_its_commit(runs, name):
    directory, commit = runs[0][name]
    assert commit == COMMIT
    files = {str(path.relative_to(directory)) for path in Path(directory).rglob("*") if path.is_file()}
    weights = {"model.safetensors", "checkpoints/latest.pt"}
    assert files == {"config.json", "modeling_prismatic.py", "README.md"} | weights
    assert (Path(directory) / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/policy@v2", "org/policy has no revision v2; give a branch, a tag or a commit of it"),
        (
            "org/gone",
            "there is no repository org/gone on the hub, or it is private and `hf auth login` is needed",
        ),
        (
            "org/gated",
            "org/gated is gated: accept its terms on https://huggingface.co/org/gated, then log in with "
            "`hf auth login`",
        ),
        (
            "org/down",
            "cannot reach the hub, and org/down at main is not on this machine: download it where there is a "
            "network, and give its directory",
        ),
    ],
)
def test_refusals_are_explained(runs, name, message):
    assert runs[0][name] == message


def test_without_a_network_what_was_downloaded_is_still_there(runs):
    with_hub, without = runs
    for name in ("org/policy", "org/policy@v1.0"):
        assert without[name] == with_hub[name]


def test_without_a_network_that_is_said(runs):
    assert runs[1]["org/policy@v2"] == (
        "cannot reach the hub, and org/policy at v2 is not on this machine: download it where there is a "
        "network, and give its directory"
    )


@pytest.mark.parametrize(
    "name", ["policy", "org/policy/more", "org/policy@", "/org/policy", "../policy", "o r/g"]
)
def test_other_things_are_no_names(name):
    assert hub.parse(name) is None
    with pytest.raises(CheckpointError, match=r"is no name on the hub: give org/name or org/name@revision"):
        hub.download(name)


@pytest.mark.parametrize(
    ("name", "revision", "asked"),
    [
        ("org/policy", None, "main"),
        ("org/policy@feature/x", None, "feature/x"),
        ("org/policy@v1", "v2", "v2"),
    ],
)
def test_the_revision_is_the_arguments_the_names_or_main(
    monkeypatch, tmp_path, caplog, name, revision, asked
):
    calls = []

    def snapshot(repository: str, **options: object) -> str:
        assert f"read from the Hugging Face hub, at {asked}, and downloaded" in caplog.text
        calls.append((repository, options["revision"]))
        return str(tmp_path / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hub.download(name, revision) == hub.Snapshot(tmp_path / COMMIT, COMMIT)
    assert calls == [("org/policy", asked)]


@pytest.mark.parametrize(
    ("problem", "reason"),
    [(OSError(28, "No space left on device"), "No space left on device"), (KeyError(), "KeyError")],
)
def test_anything_else_is_one_sentence_too(monkeypatch, problem, reason):
    def fail(*arguments: object, **options: object) -> None:
        raise problem

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=rf"^cannot download org/policy at main: .*{reason}$"):
        hub.download("org/policy")
