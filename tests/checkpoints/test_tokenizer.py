"""The tokenizer of a published policy: found, checked against the model, and left as it is."""

import dataclasses
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from sqap.checkpoints import openvla
from sqap.checkpoints.choices import Choices
from sqap.errors import CheckpointError
from sqap.processing import prompt_ids

KEY = "bridge_orig"


def test_prompts_are_tokenised_by_the_directorys_own_file(written):
    published = openvla.open(written("openvla"), Choices(unnorm_key=KEY))
    prompt = dataclasses.replace(published.config.prompt, append=())
    ids = prompt_ids("open the drawer", prompt, published.tokenizer)[0].tolist()
    assert ids[0] == 1
    expected = "In: What action should the robot take to open the drawer?\nOut:"
    assert published.tokenizer.decode(ids) == expected


def test_a_tokenizer_may_lie_elsewhere(publish, tmp_path):
    directory = publish("openvla")
    (directory / "tokenizer.json").rename(tmp_path / "llama.json")
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer: put Llama 2's tokenizer\.json there, or say"
    ):
        openvla.open(directory, Choices(unnorm_key=KEY))
    with pytest.raises(CheckpointError, match=rf"no tokenizer at {tmp_path}/tokenizer\.json"):
        openvla.open(directory, Choices(unnorm_key=KEY, tokenizer=tmp_path))
    openvla.open(directory, Choices(unnorm_key=KEY, tokenizer=tmp_path / "llama.json"))
    (tmp_path / "llama.json").rename(tmp_path / "tokenizer.json")
    openvla.open(directory, Choices(unnorm_key=KEY, tokenizer=tmp_path))


def test_padding_that_a_tokenizer_asks_for_is_left_out(publish):
    directory = publish("openvla")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(max_length=2)
    tokenizer.save(str(directory / "tokenizer.json"))
    assert len(openvla.open(directory, Choices(unnorm_key=KEY)).tokenizer.encode("open the drawer").ids) == 4


def edit_tokenizer(path: Path, *, drop: str = "", add: int = -1, begin: bool = True) -> None:
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    if drop:
        data["model"]["vocab"] = {piece: i for piece, i in vocabulary.items() if piece != drop}
        data["model"]["merges"] = [m for m in data["model"]["merges"] if drop not in m]
    if add >= 0:
        vocabulary["much"] = add
    if not begin:
        data["post_processor"] = None
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add": 32064}, "has token 32064, but the model embeds tokens up to 32063: it is not Llama 2's"),
        ({"drop": "▁"}, "lacks token 29871, which Llama 2's has"),
        ({"begin": False}, "does not begin a prompt with token 1"),
    ],
)
def test_a_tokenizer_of_another_model_is_refused(publish, changes, message):
    directory = publish("openvla")
    edit_tokenizer(directory / "tokenizer.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        openvla.open(directory, Choices(unnorm_key=KEY))


def test_a_file_that_is_no_tokenizer_is_refused(publish):
    directory = publish("openvla")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        openvla.open(directory, Choices(unnorm_key=KEY))


def test_a_tokenizer_that_encodes_nothing_is_refused(publish):
    directory = publish("openvla")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    words = {piece: i for piece, i in tokenizer["model"]["vocab"].items() if piece != "▁a"}
    tokenizer["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "gone"}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot encode a prompt"):
        openvla.open(directory, Choices(unnorm_key=KEY))
