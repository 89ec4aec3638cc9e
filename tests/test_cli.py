"""The commands, as a user meets them."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

import sqap
from sqap.cli import app
from sqap.kernels import cpu

runner = CliRunner()


def run(*arguments: object, code: int = 0) -> str:
    result = runner.invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_compress_inspect_and_eval(saved, tmp_path):
    """The line of the README on a tiny policy: simulator, artefact, pairs, JSON."""
    pytest.importorskip("metaworld")
    small, log = tmp_path / "small", tmp_path / "log.jsonl"
    run("compress", saved, "--out", small, "--recipe", "w4a8", "--keep", 0.5, "--frames", 2,
        "--json", tmp_path / "c.json")  # fmt: skip
    made = json.loads((tmp_path / "c.json").read_text())
    assert made["recipe"]["pruning"]["keep_ratio"] == 0.5
    assert made["weight_bytes"]["after"] < made["weight_bytes"]["before"]
    assert made["calibration"]["frames"] == 2

    out = run("inspect", small, "--linears", "--json", tmp_path / "i.json")
    assert "W4A8" in out
    seen = json.loads((tmp_path / "i.json").read_text())
    assert {x["weight_bits"] for x in seen["linears"] if x["part"] == "decoder"} == {4}
    assert sum(part["bytes"] for part in seen["parts"].values()) == made["weight_bytes"]["after"]
    run("inspect", saved, "--json", tmp_path / "o.json")
    original = json.loads((tmp_path / "o.json").read_text())
    for name, part in seen["parts"].items():
        assert part["parameters"] == original["parts"][name]["parameters"]

    arguments = ["eval", small, "--against", saved, "--tasks", "drawer-open", "--episodes", 1, "--seed", 5]
    run(*arguments, "--card", "--log", log, "--json", tmp_path / "e.json")
    report = json.loads((tmp_path / "e.json").read_text())
    assert report["tasks"] == {"drawer-open": {"successes": 0, "episodes": 1}}
    assert report["against"]["mcnemar_p"] == 1.0
    assert report["step_latency_ms"]["p50"] > 0
    assert report["peak_rss_bytes"] > 1e7
    assert "McNemar's exact p = 1.000" in (small / "README.md").read_text()
    lines = log.read_text()
    run(*arguments, "--log", log)
    assert log.read_text() == lines, "a finished evaluation is not run again"


@pytest.fixture
def pictures(tmp_path, observe):
    """Two calibration frames as a directory of images."""
    directory = tmp_path / "pictures"
    directory.mkdir()
    lines = []
    for i in range(2):
        Image.fromarray(observe(i).images["corner2"]).save(directory / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "instruction": "open the drawer"}))
    (directory / "metadata.jsonl").write_text("\n".join(lines))
    return directory


def test_frames_may_come_from_a_directory_and_bytes_from_a_budget(saved, pictures, tmp_path):
    least = ["compress", saved, "--out", tmp_path / "least", "--frames-from", pictures]
    run(*least, "--json", tmp_path / "least.json")
    smallest = json.loads((tmp_path / "least.json").read_text())
    assert smallest["calibration"]["frames"] == 2
    budget = smallest["weight_bytes"]["after"] + 4000
    out = run("compress", saved, "--out", tmp_path / "spent", "--frames-from", pictures,
              "--target-bytes", budget, "--json", tmp_path / "spent.json")  # fmt: skip
    spent = json.loads((tmp_path / "spent.json").read_text())
    assert smallest["weight_bytes"]["after"] < spent["weight_bytes"]["after"] <= budget
    assert "8-bit weights" in out
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_sensitivity_shows_options_and_blocks(saved, pictures, tmp_path):
    out = run("sensitivity", saved, "--frames-from", pictures, "--json", tmp_path / "s.json")
    assert "round to nearest" in out
    report = json.loads((tmp_path / "s.json").read_text())
    assert [option["name"] for option in report["options"]][-1] == "+ GPTQ"
    assert [block["name"] for block in report["blocks"]][-1] == "head"
    assert all(0 <= block["overlap"] <= 1 for block in report["blocks"])


def test_inspect_says_which_kernels_run(tmp_path, monkeypatch):
    out = run("inspect", "--cpu", "--json", tmp_path / "cpu.json")
    assert "portable" in out
    found = json.loads((tmp_path / "cpu.json").read_text())
    assert [path["name"] for path in found["paths"] if path["runs"]] == list(cpu.paths())
    assert [path["name"] for path in found["paths"] if path["used"]] == [cpu.chosen()]
    monkeypatch.setattr(cpu, "chosen", cpu.chosen.__wrapped__)
    monkeypatch.setenv(cpu.VARIABLE, "mmx")
    assert "SQAP_KERNELS is 'mmx'" in run("inspect", "--cpu", code=1)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["compress", "POLICY", "--out", "OUT", "--frames-from", "mars"], "no calibration frames at mars"),
        (["compress", "POLICY", "--out", "OUT", "--camera", "wrist"], "must be POLICY_CAMERA=DATASET_KEY"),
        (
            ["compress", "POLICY", "--out", "OUT", "--camera", "top=a", "--camera", "top=b"],
            "--camera top is given twice: a and b",
        ),
        (["compress", "POLICY", "--out", "OUT", "--state", "joints"], "only a LeRobotDataset's are mapped"),
        (["sensitivity", "POLICY", "--state", "joints"], "only a LeRobotDataset's are mapped"),
        (["inspect", "nowhere"], "no policy at nowhere"),
        (["inspect"], "name a policy, or give --cpu"),
        (["compress", "POLICY", "--out", "OUT", "--keep", 0], "keep_ratio must be in (0, 1], got 0"),
        (["compress", "POLICY", "--out", "OUT", "--keep", 1.5], "keep_ratio must be in (0, 1], got 1.5"),
        (["compress", "POLICY", "--out", "OUT", "--recipe", "w3"], "cannot read w3"),
        (["eval", "POLICY", "--tasks", "make-coffee"], "unknown metaworld task 'make-coffee'"),
        (["eval", "POLICY", "--ensemble", 0], "an ensemble must be of at least 1 chunk, got 0"),
        (["eval", "POLICY", "--ensemble", 2, "--video", "OUT"], "leave out --video or --ensemble"),
        (["eval", "POLICY", "--card"], "--card writes down a comparison; give --against, too"),
        (["eval", "POLICY", "--env", "mars"], "unknown environment 'mars'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_one(saved, tmp_path, arguments, sentence):
    given = [{"POLICY": saved, "OUT": tmp_path / "out"}.get(a, a) for a in arguments]
    result = runner.invoke(app, [str(a) for a in given])
    assert result.exit_code == 1
    assert sentence in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize("command", ["compress", "eval", "bench", "sensitivity", "inspect", "tune"])
def test_how_a_published_policy_is_read_can_be_said_to_every_command(command):
    words = set(runner.invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output.split())
    options = {"--unnorm-key", "--cameras", "--tokenizer", "--crop", "--chunk", "--bounds", "--ema"}
    assert words >= options | {"--film", "--no-film"}


def test_keep_without_pruning_is_a_contradiction(saved, tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps({"quantization": {"weight_bits": 8}}))
    out = run("compress", saved, "--out", tmp_path / "x", "--recipe", tmp_path / "recipe.json",
              "--keep", 0.5, code=1)  # fmt: skip
    assert "does not prune" in out


def test_a_failed_compress_leaves_no_directory(saved, pictures, tmp_path):
    run("compress", saved, "--out", tmp_path / "out", "--frames-from", pictures, "--keep", 0.001, code=1)
    assert not (tmp_path / "out").exists()


def test_the_version_is_the_packages():
    from importlib.metadata import version

    assert sqap.__version__ == version("sqap")
