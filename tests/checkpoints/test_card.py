"""The model card: what the hub reads of it, what people read of it, and what outlives what."""

import dataclasses
import shutil

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors import safe_open

import sqap
from sqap import Recipe
from sqap.checkpoints import hub
from sqap.checkpoints.card import NOTHING, add_measurement, code, measured
from sqap.config import Origin
from sqap.errors import CheckpointError

COMMIT = "c" * 40


def card(directory):
    return ModelCard((directory / "README.md").read_text())


@pytest.fixture
def small(policy, observe, tmp_path):
    """Compressed from a policy of the hub, on disk."""
    original = dataclasses.replace(policy, origin=Origin("org/policy", COMMIT, "mit"))
    sqap.compress(original, Recipe.w4a8(0.5), [observe(0), observe(1)]).save(tmp_path / "small")
    return tmp_path / "small"


def test_the_hub_reads_what_it_sorts_policies_by(small):
    data = card(small).data.to_dict()
    assert data["library_name"] == "sqap"
    assert data["pipeline_tag"] == "robotics"
    assert (data["base_model"], data["base_model_relation"], data["license"]) == (
        "org/policy",
        "quantized",
        "mit",
    )
    assert {"vision-language-action", "quantization", "token-pruning"} <= set(data["tags"])


def test_what_is_not_known_is_not_stated(saved):
    data = card(saved).data.to_dict()
    assert {"license", "base_model", "base_model_relation"}.isdisjoint(data)
    assert {"quantization", "token-pruning"}.isdisjoint(data["tags"])
    for sentence in ("whose name on the hub is not known", "License: none was found", "Not at all"):
        assert sentence in card(saved).text


def test_people_read_how_it_was_made_and_how_large_it_is(small):
    text, policy = card(small).text, sqap.load(small)
    assert f"[`org/policy`](https://huggingface.co/org/policy) at commit `{COMMIT}`" in text
    assert "8 of 16 behind decoder layer" in text
    assert "Weights were rounded by GPTQ, after Hadamard rotations." in text
    assert "Gives chunks of 8 actions of 4 numbers" in text
    assert f"Calibrated on 2 observations (SHA-256 `{policy.calibration.frames_hash}`)" in text
    with safe_open(small / "model.safetensors", "pt") as file:
        sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118 - it is no dictionary
    assert f"Weights: {sum(sizes) / 1e6:.2f} MB, which is" in text
    assert "| decoder | 28 | 28 | W4A8 |" in text
    assert NOTHING in text


def test_its_example_runs_as_it_stands(small, observe, monkeypatch):
    monkeypatch.chdir(small.parent)
    lines = card(small).text.split("```python\n")[1].split("```")[0]
    names = {"image": observe().images["corner2"]}
    exec(lines.replace("path/to/this/policy", "small"), names)
    assert names["actions"].shape == (8, 4)


def test_names_of_users_are_neither_markdown_nor_html(policy, tmp_path):
    odd = "`cam`|<script>\n\n# Title\n```\n[a](b)"
    config = dataclasses.replace(policy.config, cameras=(odd,), family='<b>"`x\n---\n# Title')
    dataclasses.replace(policy, config=config).save(tmp_path / "own")
    assert card(tmp_path / "own").data.library_name == "sqap"
    tokens = MarkdownIt().enable("table").parse(card(tmp_path / "own").text)
    inside = [child for token in tokens for child in token.children or ()]
    html = [token.content.strip() for token in [*tokens, *inside] if token.type.startswith("html")]
    assert all(comment.startswith("<!-- sqap's measurements") for comment in html)
    assert len([token for token in tokens if token.type == "heading_open"]) == 5
    assert not [token for token in inside if token.type == "link_open"]


@pytest.mark.parametrize("text", ["plain", "a`b", "``", "`x", "x`", "", "a\nb", "<b>|"])
def test_a_code_span_holds_anything(text):
    (paragraph,) = (token for token in MarkdownIt().parse(code(text)) if token.type == "inline")
    (span,) = paragraph.children
    assert span.type == "code_inline"
    assert span.content.strip() == text.replace("\n", "\\n")


def test_what_was_measured_takes_the_place_of_nothing(small):
    add_measurement(small, "Success", "All of it.")
    add_measurement(small, "Error", "None.\n\n| a |\n|---|\n| 1 |")
    add_measurement(small, "Success", "Half of it.")
    assert measured(small) == {"Success": "Half of it.", "Error": "None.\n\n| a |\n|---|\n| 1 |"}
    text = card(small).text
    assert NOTHING not in text
    assert text.count("### ") == 2
    assert text.index("## What was measured") < text.index("### Success") < text.index("## How to use it")


def test_a_card_in_the_hubs_cache_is_left_alone(small, tmp_path):
    (small / "README.md").rename(tmp_path / "blob")
    (small / "README.md").symlink_to(tmp_path / "blob")
    with pytest.raises(CheckpointError, match=r"README\.md is a link, as in the hub's cache"):
        add_measurement(small, "Success", "All of it.")
    assert NOTHING in (tmp_path / "blob").read_text()


def test_a_card_without_the_comments_is_left_alone(small):
    (small / "README.md").write_text("mine")
    with pytest.raises(CheckpointError, match="lacks the comments"):
        add_measurement(small, "Success", "All of it.")
    assert (small / "README.md").read_text() == "mine"
    (small / "README.md").unlink()
    with pytest.raises(
        CheckpointError, match=r"cannot read the model card .*README\.md: No such file or directory$"
    ):
        measured(small)


def test_the_card_of_an_unchanged_policy_is_kept_and_of_a_changed_one_is_new(small, tmp_path):
    add_measurement(small, "Success", "All of it.")
    edited = (small / "README.md").read_bytes() + b"\nA word of mine, \xff.\n"
    (small / "README.md").write_bytes(edited)
    policy = sqap.load(small)
    policy.save(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_bytes() == edited
    config = dataclasses.replace(policy.config, n_action_steps=2)
    dataclasses.replace(policy, config=config).save(tmp_path / "other")
    text = (tmp_path / "other" / "README.md").read_text()
    assert NOTHING in text
    assert "A word of mine" not in text


def test_a_bundled_policy_and_one_of_the_hub_are_named(written, tmp_path, monkeypatch):
    assert sqap.load("reference").origin == Origin("reference", None, "apache-2.0")
    directory = tmp_path / COMMIT
    shutil.copytree(written("smolvla"), directory)
    (directory / "README.md").write_text("---\ntags:\n- x\nlicense: MIT\n---\nlicense: none\n")
    monkeypatch.setattr(hub, "download", lambda name: hub.Snapshot(directory, COMMIT))
    assert sqap.load("org/policy@main").origin == Origin("org/policy", COMMIT, "mit")
    assert sqap.load(directory).origin == Origin(license="mit")


@pytest.mark.parametrize(
    "text",
    [
        b"license: mit\n",
        b"---\nlicense: two words\n---\n",
        b"---\nlicense:\n- mit\n---\n",
        b"---\nlicense: mit\n",
        b"\xff",
    ],
)
def test_a_license_that_is_not_stated_plainly_is_not_guessed(saved, text):
    (saved / "README.md").write_bytes(text)
    assert sqap.load(saved).origin.license is None
